//! The load generator: workloads, arrivals, the client, statistics and results.

pub mod result;
