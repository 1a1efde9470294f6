//! The decoder's operations on an NVIDIA GPU, without a CUDA toolkit.
//!
//! [`gpu`] is the trait that everything goes through, [`kernels`] the table of the kernels in `kernels/*.cu`,
//! [`geometry`] their launches and work lists as pure functions, [`launch`] a checked function for each kernel,
//! [`draws`] what the sampling kernel is told, and [`checks`] compares every kernel with plain loops.

pub mod checks;
pub mod disk_cache;
pub mod draws;
pub mod driver;
pub mod geometry;
pub mod gpu;
pub mod kernels;
pub mod launch;
pub mod libraries;
pub mod nvrtc;
pub mod ops;
pub mod plan;
mod products;
pub mod runner;
mod transfer;
pub mod upload;
pub mod words;
