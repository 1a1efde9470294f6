//! The choice of a replica, as plain data and pure functions: no IO, no clock, no randomness but a seeded one.
//!
//! [`index`] knows which replica holds which prefix, [`load`] how much each has to do, [`rates`] how fast it works;
//! [`picker`] chooses by a [`policy`], by default by the [`cost`] in seconds. [`fleet`] puts them together.

pub mod cost;
pub mod expected;
pub mod fleet;
pub mod index;
pub mod latency;
pub mod load;
pub mod picker;
pub mod policy;
pub mod rates;
pub mod replica_set;
mod table;
