//! The router as its clients see it, in front of backends that do as the test says: slow, full, dying, silent.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

/// A name server with a zone that the test writes.
mod dns_server;
/// An API server of Kubernetes that knows EndpointSlices and fails as it is told.
mod kubernetes_api;
/// A replica that writes its own bytes.
mod raw;
/// A Redis of the test's own.
mod redis_server;
/// Backends and a router on free ports; HTTP in a few words.
mod util;

/// Replicas that come and go under load, from wherever they are listed.
mod discovery;
/// The way down.
mod drain;
/// Replicas that fail, before and after the first byte.
mod faults;
/// No replica there, then one.
mod hold;
/// Replicas that break the protocol, never end, or vanish.
mod hostile;
/// What other routers are known to do wrong.
mod known_faults;
/// What replicas say that they hold.
mod kv_events;
/// Keys, limits, idempotency, the administrator's routes.
mod limits;
/// Whose tokens the router hashes.
mod parity;
/// Limits that routers share in Redis.
mod shared_limits;
/// What passes unchanged, and what the router adds.
mod transparent;
