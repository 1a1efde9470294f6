//! The decoder's operations on the CPU: own kernels over packed weights and a paged KV cache.
//!
//! Every kernel gives a row the same bits whether it is computed alone or in a batch, in one chunk or
//! many, with one thread or several: the order of each sum depends on nothing but the row's own
//! length and position. That is what makes the server's "same answer" promise hold exactly.

pub mod attention;
mod buffer;
pub mod elementwise;
pub mod kv_cache;
pub mod level;
pub mod limits;
pub mod matmul;
pub(crate) mod random;
pub mod runner;
mod self_check;
mod simd;
#[cfg(test)]
mod test_support;
pub mod threads;

pub use attention::{Attention, paged_attention};
pub use elementwise::{RopeTable, add_rms_norm, argmax, rms_norm, silu_mul};
pub use kv_cache::{KvCache, KvDtype, QkvRows, rope_and_cache};
pub use level::{Kernels, Level};
pub use matmul::{PackedMatrix, WeightRows};
pub use threads::ThreadPool;
