//! The load generator, its reports, and the ledger of quoted numbers.
//!
//! One benchmark, from what was asked to what is shown: a workload ([`workload`]) says what requests are, arrivals
//! ([`arrivals`]) when they come, phases ([`phases`]) which of them are measured. [`run`] sends them over HTTP
//! ([`client`]), [`offline`] into an engine in this process; both leave records. [`measure`] makes figures of records,
//! [`session`] repeats that for every level of load, and a [`result::BenchResult`] is what remains, for
//! [`summary`], [`report`] and [`compare`] to show.
//!
//! *Invariants.* The clock of a request starts when it was scheduled. An open loop never waits for an answer. Tokens
//! are counted from the server's usage. A failed request stays in the denominator.

pub mod arrivals;
pub mod client;
pub mod clock;
pub mod compare;
pub mod definitions;
pub mod experiments;
pub mod find_rate;
mod histogram;
pub mod ledger;
pub mod limits;
pub mod live;
pub mod measure;
pub mod offline;
pub mod output;
pub mod phases;
pub mod prompt;
pub mod report;
pub mod result;
pub mod run;
pub mod saved;
pub mod server;
pub mod session;
pub mod slo;
pub mod stats;
pub mod summary;
pub mod vllm;
pub mod vocabulary;
pub mod workload;
