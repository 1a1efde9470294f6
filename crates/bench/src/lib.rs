//! The load generator: workloads, arrivals, the client, statistics and results.

pub mod arrivals;
pub mod client;
pub mod clock;
mod histogram;
pub mod live;
pub mod measure;
pub mod phases;
pub mod prompt;
pub mod result;
pub mod run;
pub mod slo;
pub mod stats;
pub mod workload;
