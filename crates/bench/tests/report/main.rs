//! Reports as people get them. The pages stay in the folder of the test's temporary files, to be looked at.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod fixture;
mod page;
mod text;
