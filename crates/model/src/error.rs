//! Everything that can go wrong before a model runs, with the values that were wrong.

use std::path::PathBuf;

use crate::cuda::driver::OpenError;
use crate::cuda::gpu::GpuError;
use crate::cuda::plan::NoRoom;

/// Why a model could not be found, read or prepared.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A value that would change the maths and is not implemented.
    #[error("{field} {value} in {file} is not supported; supported: {supported}")]
    Unsupported { file: &'static str, field: String, value: String, supported: String },
    /// A value that makes no sense.
    #[error("{field} is {value} in {file}; it must be {rule}")]
    Invalid { file: &'static str, field: String, value: String, rule: String },
    #[error("{file} lacks {field}; take config.json from a complete checkpoint")]
    MissingField { file: &'static str, field: String },
    #[error("{file} is not valid JSON: {source}")]
    Json { file: String, source: serde_json::Error },
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} has {bytes} bytes; this kind of file may have {limit} at most", path.display())]
    FileTooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{place} has no {file}; {advice}")]
    MissingFile { place: String, file: String, advice: &'static str },
    #[error("{file} is not a readable safetensors file: {reason}; download or convert it again")]
    Safetensors { file: String, reason: String },
    #[error("model.safetensors.index.json names the file {name:?}; only plain file names beside it are read")]
    IndexEscapes { name: String },
    #[error("the checkpoint has no tensor {name} (shape {shape:?} expected from config.json)")]
    MissingTensor { name: String, shape: Vec<usize> },
    #[error(
        "tensor {name} has shape {found:?} and config.json asks for {expected:?}; the two do not belong together"
    )]
    TensorShape { name: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor {name} has dtype {found}; supported: F32, F16, BF16")]
    TensorDtype { name: String, found: String },
    #[error(
        "the checkpoint has tensors that this architecture has no use for, so its maths must differ: {}",
        names.join(", ")
    )]
    UnexpectedTensors { names: Vec<String> },
    #[error("model hub, {id} at {revision}: {reason}")]
    Hub { id: String, revision: String, reason: String },
    #[error("{id:?} is neither a folder nor a hub id such as owner/name")]
    HubId { id: String },
    #[error("unknown shape preset {name:?}; known: {}; or give the path of a config.json", known.join(", "))]
    UnknownPreset { name: String, known: Vec<&'static str> },
    /// `--engine naive` runs candle-transformers' models as they are.
    #[error("the naive engine does not support {feature}; use the paged engine")]
    NaiveUnsupported { feature: String },
    #[error("{option} is {value}; it must be {rule}")]
    Option { option: &'static str, value: String, rule: String },
    #[error(
        "the weights need {needed_bytes} bytes of memory and {free_bytes} are free; choose a smaller model or \
         a narrower dtype"
    )]
    OutOfMemory { needed_bytes: u64, free_bytes: u64 },
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    NoGpu(#[from] OpenError),
    #[error(transparent)]
    NoPool(#[from] NoRoom),
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    #[error("the warm-up step failed: {0}")]
    WarmUp(String),
}
