//! The client against servers whose behaviour is known to the microsecond, and against servers that misbehave.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

/// A scripted server on plain threads, and a run against it.
mod server;

/// Every way to fail is counted under its own name, and the run ends.
mod hostile;
/// The same over TLS.
mod https;
/// What the client measures is what the server did.
mod truth;
