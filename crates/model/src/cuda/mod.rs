//! The decoder's operations on an NVIDIA GPU, without a CUDA toolkit.
//!
//! [`gpu`] is the trait that everything goes through, [`kernels`] the table of the kernels in `kernels/*.cu`,
//! [`geometry`] their launches as pure functions.

pub mod geometry;
pub mod gpu;
pub mod kernels;
