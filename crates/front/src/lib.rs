//! What every HTTP front shares, a replica's and the router's: bounded connections and bodies, API keys, request
//! ids, what is said of a panic, and the way from a request's text to token ids.

pub mod auth;
pub mod body;
pub mod connections;
pub mod panics;
pub mod prompts;
pub mod request_id;

pub use auth::{ApiKeys, KeyError, UnusableKey};
pub use body::BodyError;
