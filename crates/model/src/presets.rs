//! Shapes of well-known models, for dummy weights. The numbers are those of the published
//! config.json files.

use serde_json::{Value, json};

use crate::error::ModelError;

/// One published shape.
struct Preset {
    name: &'static str,
    architecture: &'static str,
    vocab_size: u32,
    hidden_size: u32,
    intermediate_size: u32,
    layers: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rms_norm_eps: f64,
    max_positions: u32,
    rope_theta: f64,
    /// The factor of Llama 3.1's scaling of the frequencies.
    llama3_factor: Option<f64>,
    tied: bool,
    bos: u32,
    eos: u32,
}

const LLAMA_3_8B: Preset = Preset {
    name: "llama-3.1-8b",
    architecture: "LlamaForCausalLM",
    vocab_size: 128_256,
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    rms_norm_eps: 1e-5,
    max_positions: 131_072,
    rope_theta: 500_000.0,
    llama3_factor: Some(8.0),
    tied: false,
    bos: 128_000,
    eos: 128_001,
};

const LLAMA_3_70B: Preset = Preset {
    name: "llama-3.1-70b",
    hidden_size: 8192,
    intermediate_size: 28_672,
    layers: 80,
    heads: 64,
    ..LLAMA_3_8B
};

const QWEN3_8B: Preset = Preset {
    name: "qwen3-8b",
    architecture: "Qwen3ForCausalLM",
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 12_288,
    layers: 36,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    rms_norm_eps: 1e-6,
    max_positions: 40_960,
    rope_theta: 1_000_000.0,
    llama3_factor: None,
    tied: false,
    bos: 151_643,
    eos: 151_645,
};

const QWEN2_5_7B: Preset = Preset {
    name: "qwen2.5-7b",
    architecture: "Qwen2ForCausalLM",
    vocab_size: 152_064,
    hidden_size: 3584,
    intermediate_size: 18_944,
    layers: 28,
    heads: 28,
    kv_heads: 4,
    max_positions: 131_072,
    eos: 151_643,
    ..QWEN3_8B
};

const PRESETS: &[Preset] = &[
    LLAMA_3_8B,
    Preset { name: "llama-3-8b", max_positions: 8192, llama3_factor: None, ..LLAMA_3_8B },
    LLAMA_3_70B,
    Preset { name: "llama-3-70b", max_positions: 8192, llama3_factor: None, ..LLAMA_3_70B },
    Preset {
        name: "llama-3.2-1b",
        hidden_size: 2048,
        intermediate_size: 8192,
        layers: 16,
        head_dim: 64,
        llama3_factor: Some(32.0),
        tied: true,
        ..LLAMA_3_8B
    },
    Preset {
        name: "llama-3.2-3b",
        hidden_size: 3072,
        intermediate_size: 8192,
        layers: 28,
        heads: 24,
        llama3_factor: Some(32.0),
        tied: true,
        ..LLAMA_3_8B
    },
    Preset {
        name: "mistral-7b",
        architecture: "MistralForCausalLM",
        vocab_size: 32_768,
        max_positions: 32_768,
        rope_theta: 1_000_000.0,
        llama3_factor: None,
        bos: 1,
        eos: 2,
        ..LLAMA_3_8B
    },
    Preset {
        name: "smollm2-135m",
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        max_positions: 8192,
        rope_theta: 100_000.0,
        llama3_factor: None,
        tied: true,
        bos: 0,
        eos: 0,
        ..LLAMA_3_8B
    },
    Preset {
        name: "qwen3-0.6b",
        hidden_size: 1024,
        intermediate_size: 3072,
        layers: 28,
        heads: 16,
        tied: true,
        ..QWEN3_8B
    },
    QWEN3_8B,
    Preset {
        name: "qwen2.5-0.5b",
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        max_positions: 32_768,
        tied: true,
        ..QWEN2_5_7B
    },
    QWEN2_5_7B,
];

/// The names that `--load-format dummy` takes; `demo` is the shape of the embedded model.
pub fn names() -> Vec<&'static str> {
    PRESETS.iter().map(|preset| preset.name).chain(["demo"]).collect()
}

/// The config.json of a preset.
///
/// # Errors
/// [`ModelError::UnknownPreset`], which lists the known ones.
pub fn config_json(name: &str) -> Result<Vec<u8>, ModelError> {
    if name == "demo" {
        return Ok(crate::demo::CONFIG.to_vec());
    }
    let unknown = || ModelError::UnknownPreset { name: name.to_owned(), known: names() };
    let preset = PRESETS.iter().find(|preset| preset.name == name).ok_or_else(unknown)?;
    Ok(to_json(preset).to_string().into_bytes())
}

fn to_json(preset: &Preset) -> Value {
    let rope_scaling = preset.llama3_factor.map(|factor| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        })
    });
    json!({
        "architectures": [preset.architecture],
        "model_type": preset.architecture.trim_end_matches("ForCausalLM").to_lowercase(),
        "vocab_size": preset.vocab_size,
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": preset.rms_norm_eps,
        "max_position_embeddings": preset.max_positions,
        "rope_theta": preset.rope_theta,
        "rope_scaling": rope_scaling,
        "sliding_window": null,
        "tie_word_embeddings": preset.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": preset.bos,
        "eos_token_id": preset.eos,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // Model cards, in millions.
        let published = [
            ("llama-3-8b", 8030.0),
            ("llama-3-70b", 70_554.0),
            ("llama-3.1-8b", 8030.0),
            ("llama-3.1-70b", 70_554.0),
            ("llama-3.2-1b", 1236.0),
            ("llama-3.2-3b", 3213.0),
            ("mistral-7b", 7248.0),
            ("smollm2-135m", 134.5),
            ("qwen3-0.6b", 596.0),
            ("qwen3-8b", 8191.0),
            ("qwen2.5-0.5b", 494.0),
            ("qwen2.5-7b", 7616.0),
        ];
        for (name, millions) in published {
            let config = ModelConfig::parse(&config_json(name).unwrap(), None).unwrap();
            let counted = config.num_parameters() as f64 / 1e6;
            assert!((counted - millions).abs() < 1.0, "{name}: {counted} against {millions}");
        }
        assert_eq!(published.len() + 1, names().len());
    }

    #[test]
    fn an_unknown_preset_lists_the_known_ones() {
        let message = config_json("gpt-5").unwrap_err().to_string();
        assert!(message.contains("gpt-5") && message.contains("smollm2-135m"), "{message}");
    }
}
