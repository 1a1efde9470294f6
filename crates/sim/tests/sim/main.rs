//! Tests of the arithmetic from outside.
//!
//! - `autoscale`: KEDA and the Horizontal Pod Autoscaler beside their sources
//! - `device`: the simulated device under the real engine
//! - `fit`: calibration against a known truth
//! - `models`: the models and GPUs that the other tests name
//! - `ledger`: every computed figure of the ledger of quoted numbers
//! - `published`: the uncalibrated estimate against published figures
//! - `properties`: what must hold for any input
//! - `promql`: the queries' language beside the real one
//! - `roofline`: steps counted by hand
//! - `scaling_scripts`: whole manifests through scripts of what their queries give
//! - `planner`: whole plans, and what they refuse
#![allow(clippy::type_complexity, reason = "rows of a table")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod autoscale;
mod device;
mod fit;
mod ledger;
mod models;
mod planner;
mod promql;
mod properties;
mod published;
mod roofline;
mod scaling_scripts;
