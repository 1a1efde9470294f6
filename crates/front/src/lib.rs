//! What every HTTP front shares, a replica's and the router's: bounded connections, API keys, request ids.

pub mod auth;
pub mod connections;
pub mod request_id;

pub use auth::{ApiKeys, KeyError, UnusableKey};
