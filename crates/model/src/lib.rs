//! Checkpoints, the decoder, its operations on the CPU and on NVIDIA GPUs, and the sampler. The only home of
//! unsafe code.
//!
//! A model is loaded in two stages: [`Prepared::open`] finds and checks the files, so that the caller
//! can size the KV cache ([`Prepared::kv_bytes_per_block`]), and [`Prepared::into_runner`] builds what
//! the engine drives. On a GPU ([`Prepared::into_cuda_runner`]) the cache takes what memory is left.

pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod decoder;
pub mod demo;
pub mod dummy;
mod error;
pub mod hub;
mod load;
pub mod naive;
pub mod ops;
pub mod presets;
pub mod rope;
pub mod sampler;
pub mod source;
pub mod weights;

pub use config::{Architecture, ModelConfig, WeightDtype};
pub use cpu::KvDtype;
pub use error::ModelError;
pub use load::{
    CudaRunnerOptions, EngineKind, LoadTimings, LoadedCuda, LoadedModel, MemoryReport, OpenOptions, PoolSize,
    Prepared, Progress, RunnerOptions,
};
pub use source::{DummyShape, LoadFormat, ModelSource, TextFiles, text_files};
