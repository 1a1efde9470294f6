//! The load generator: workloads, arrivals, the client, statistics and results.

pub mod arrivals;
pub mod result;
pub mod stats;
