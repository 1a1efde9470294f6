//! The models of the ledger, from the published config.json files, and the GPUs.

use servelab_sim::formulas::{DecodeModel, Gpus};
use servelab_sim::{Dtype, HardwareProfile, ModelShape};

/// Llama 3.1 8B.
pub fn llama_8b() -> ModelShape {
    ModelShape {
        name: "llama-3.1-8b".to_owned(),
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14_336,
        vocabulary: 128_256,
        tied_embeddings: false,
        max_context_tokens: 131_072,
        sliding_window: None,
        parameters: 8_030_261_248,
        weight_dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
    }
}

/// Llama 3.1 70B.
pub fn llama_70b() -> ModelShape {
    ModelShape {
        name: "llama-3.1-70b".to_owned(),
        layers: 80,
        hidden: 8192,
        heads: 64,
        intermediate: 28_672,
        parameters: 70_553_706_496,
        ..llama_8b()
    }
}

pub fn h100() -> HardwareProfile {
    HardwareProfile::named("h100").unwrap()
}

pub fn decode_model(shape: &ModelShape) -> DecodeModel {
    DecodeModel {
        streamed_parameters: shape.streamed_parameters() as f64,
        streamed_bytes: shape.streamed_bytes(),
        kv_bytes_per_token: shape.kv_bytes_per_token(),
    }
}

/// `count` GPUs of the profile of that name, computing in bf16.
pub fn gpus(name: &str, count: u32) -> Gpus {
    let profile = HardwareProfile::named(name).unwrap();
    Gpus {
        count,
        bandwidth_bytes_per_second: profile.bandwidth_bytes_per_second,
        flops_per_second: profile.arithmetic(Dtype::Bf16).unwrap().1,
    }
}
