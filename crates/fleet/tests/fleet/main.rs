//! Whole fleets in virtual time.
#![allow(clippy::print_stdout, reason = "a seed that fails is told as a table")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

/// Small fleets that are quick to simulate.
mod small;

/// The same settings give the same result, to the byte, and the fast replica the result of the engine.
mod same;

/// What must hold whatever the settings: conservation, and that more replicas do not make it worse.
mod laws;

/// Random fleets with random faults, each from a seed: `just sim`.
mod seeds;

/// How fast it is, and how large a fleet may be.
mod speed;

/// KEDA and the Horizontal Pod Autoscaler over the simulated metrics.
mod scaling;
