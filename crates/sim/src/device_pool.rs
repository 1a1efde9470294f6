//! How many KV blocks a replica has room for, as on the real GPUs.

use crate::formulas::{self, ReplicaMemory};
use crate::hardware::HardwareProfile;
use crate::roofline::possible_gpus;
use crate::shape::ModelShape;

/// Activations, graphs and workspaces of one GPU, a usual value; `servelab plan` takes the same.
pub const ACTIVATION_BYTES_PER_GPU: f64 = crate::Assumptions::DEFAULT.activation_bytes_per_gpu;

/// What the memory of a replica is used for. Bytes of all its GPUs together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvPool {
    pub num_blocks: u32,
    /// Each head as often as it is stored.
    pub bytes_per_token: f64,
    pub pool_bytes: f64,
    pub weight_bytes: f64,
    pub activation_bytes: f64,
}

/// Too little memory.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "{model} with room for {tokens} tokens needs {:.1} GB and {gpus} x {hardware} offer {:.1} GB; {}",
    needed_bytes / 1e9, usable_bytes / 1e9, advice(*smallest)
)]
pub struct DoesNotFit {
    pub model: String,
    pub hardware: String,
    pub gpus: u32,
    pub tokens: u64,
    pub needed_bytes: f64,
    pub usable_bytes: f64,
    /// The fewest GPUs that would do.
    pub smallest: Option<u32>,
}

fn advice(smallest: Option<u32>) -> String {
    match smallest {
        Some(gpus) => format!("use --tp {gpus}, the smallest that fits"),
        None => "no number of its GPUs is enough; choose a narrower number format or larger GPUs".to_owned(),
    }
}

/// The pool that `utilisation` of the memory leaves beside weights and activations, in blocks of `block_size` tokens.
///
/// # Errors
/// If it does not hold `least_tokens`.
pub fn kv_pool(
    shape: &ModelShape,
    hardware: &HardwareProfile,
    gpus: u32,
    utilisation: f64,
    block_size: u32,
    least_tokens: u64,
) -> Result<KvPool, DoesNotFit> {
    let tokens = |gpus| pool_bytes(shape, hardware, gpus, utilisation) / bytes_per_token(shape, gpus);
    if tokens(gpus) < least_tokens as f64 {
        let needed = bytes_per_token(shape, gpus) * least_tokens as f64
            + shape.weight_bytes()
            + f64::from(gpus) * ACTIVATION_BYTES_PER_GPU;
        return Err(DoesNotFit {
            model: shape.name.clone(),
            hardware: hardware.name.clone(),
            gpus,
            tokens: least_tokens,
            needed_bytes: needed,
            usable_bytes: f64::from(gpus) * hardware.memory_bytes * utilisation,
            smallest: possible_gpus(shape, hardware)
                .into_iter()
                .find(|other| *other > gpus && tokens(*other) >= least_tokens as f64),
        });
    }
    // Blocks are addressed by slot, in 32 bits.
    let most = f64::from(u32::MAX / block_size);
    let num_blocks = (tokens(gpus) / f64::from(block_size)).floor().min(most);
    Ok(KvPool {
        num_blocks: num_blocks as u32,
        bytes_per_token: bytes_per_token(shape, gpus),
        pool_bytes: num_blocks * f64::from(block_size) * bytes_per_token(shape, gpus),
        weight_bytes: shape.weight_bytes(),
        activation_bytes: f64::from(gpus) * ACTIVATION_BYTES_PER_GPU,
    })
}

fn bytes_per_token(shape: &ModelShape, gpus: u32) -> f64 {
    shape.kv_bytes_per_token() * shape.kv_copies(gpus) as f64
}

fn pool_bytes(shape: &ModelShape, hardware: &HardwareProfile, gpus: u32, utilisation: f64) -> f64 {
    formulas::kv_pool_bytes(ReplicaMemory {
        gpus,
        memory_bytes_per_gpu: hardware.memory_bytes,
        utilisation,
        weight_bytes: shape.weight_bytes(),
        activation_bytes_per_gpu: ACTIVATION_BYTES_PER_GPU,
    })
}
