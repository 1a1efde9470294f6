//! The decoder's operations on an NVIDIA GPU, without a CUDA toolkit.
//!
//! [`gpu`] is the trait that everything goes through, [`kernels`] the table of the kernels in `kernels/*.cu`,
//! [`geometry`] their launches and work lists as pure functions, [`launch`] a checked function for each kernel,
//! [`draws`] what the sampling kernel is told, and [`checks`] compares every kernel with plain loops.
//!
//! Around them: [`libraries`] finds NVIDIA's libraries on this machine, [`nvrtc`] compiles the kernels and keeps
//! them on disk, [`driver`] is the trait on a real GPU, with cuBLASLt's products. [`ops`] are the decoder's
//! operations, [`upload`] is what a step brings to the GPU, [`plan`] divides its memory, [`runner`] is what the engine
//! drives, with recorded decode steps. [`examine`] is the doctor, [`limits`] and [`compare`] are its instruments.

pub mod checks;
pub mod compare;
pub mod disk_cache;
pub mod draws;
pub mod driver;
pub mod examine;
pub mod geometry;
pub mod gpu;
pub mod kernels;
pub mod launch;
pub mod libraries;
pub mod limits;
pub mod nvrtc;
pub mod ops;
pub mod plan;
mod products;
pub mod runner;
mod transfer;
pub mod upload;
pub mod words;
