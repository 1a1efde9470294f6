//! The replicas as the network shows them: where they are, whether they are well, what they report.
//!
//! [`registry`] is the one list that everything else reads; [`discovery`](crate::discovery) fills it, [`probe`] asks
//! each of its replicas how it is, the proxy takes from it and tells it what became of requests.

pub mod address;
pub mod breaker;
pub mod client;
pub mod exposition;
pub mod probe;
pub mod registry;
