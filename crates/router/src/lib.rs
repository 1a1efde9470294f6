//! The prefix-aware router: the choice of a replica as a pure function, and the proxy around it.
//!
//! The way of a request: `routes` (read it) - `prompt` (what it says) - `limits` (what its key may use, whose turn it
//! is) - `parity::desk` (its tokens) - `replicas::registry` over `choice` (where it goes) - `proxy` (there and back).
//! `discovery` says which replicas there are, `replicas::probe` how they are, `events` what they say that they hold, and
//! `parity` what they tokenise with.

mod app;
pub mod choice;
pub mod decisions;
pub mod discovery;
pub mod errors;
pub mod events;
pub mod idempotency;
pub mod limits;
pub mod metrics;
pub mod options;
pub mod parity;
pub mod prompt;
pub mod proxy;
pub mod replicas;
mod routes;
mod server;
pub mod usage;

pub use options::{
    ClientKey, Dns, HoldOptions, KubernetesService, Question, RouterOptions, ServicePort, Source, Timeouts,
};
pub use server::{RouteError, Server};
