//! Tests of the whole engine around the fake runner.
//!
//! - `harness`: requests in one line, an engine whose every step is checked
//! - `fuzz`: thousands of random workloads
//! - `faults`: one named test for each fault seen in other engines, or found by a seed here
//! - `overlap`: two steps at once
//! - `behaviour`: what the scheduler promises, one promise a test
//! - `trace`: the printed trace, as a snapshot
//! - `pool`: the block pool against a naive model

mod behaviour;
mod faults;
mod fuzz;
mod harness;
mod overlap;
mod pool;
mod trace;
