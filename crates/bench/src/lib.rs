//! The load generator: workloads, arrivals, the client, statistics and results.

pub mod arrivals;
pub mod client;
pub mod clock;
pub mod compare;
pub mod definitions;
pub mod find_rate;
mod histogram;
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
