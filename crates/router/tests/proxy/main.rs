//! The router as its clients see it, in front of backends that do as the test says: slow, full, dying, silent.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

/// Backends and a router on free ports; HTTP in a few words.
mod util;

/// The way down.
mod drain;
/// Replicas that fail, before and after the first byte.
mod faults;
/// No replica there, then one.
mod hold;
/// Keys, limits, idempotency, the administrator's routes.
mod limits;
/// Whose tokens the router hashes.
mod parity;
/// What passes unchanged, and what the router adds.
mod transparent;
