//! Tests of the arithmetic from outside.
//!
//! - `models`: the models and GPUs that the other tests name
//! - `ledger`: every computed figure of the ledger of quoted numbers
//! - `properties`: what must hold for any input
//! - `roofline`: steps counted by hand
//! - `planner`: whole plans, and what they refuse
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod ledger;
mod models;
mod planner;
mod properties;
mod roofline;
