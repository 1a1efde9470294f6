//! What every HTTP front shares, a replica's and the router's: bounded connections and bodies, API keys, request
//! ids, and what is said of a panic.

pub mod auth;
pub mod body;
pub mod connections;
pub mod panics;
pub mod request_id;

pub use auth::{ApiKeys, KeyError, UnusableKey};
pub use body::BodyError;
