//! The baseline: candle-transformers' own models with their dense KV cache, one sequence at a time.
//!
//! What batching and paging buy is the distance to this engine, and its independent implementation of
//! the maths is what the paged one is tested against. It needs an engine with `max_running` 1, no
//! prefix cache and `max_batched_tokens` of at least `max_model_len`; slots and block tables are of no
//! use to it. Weights are computed with in f32 unless another format is asked for: with candle's CPU
//! products f32 is both the fastest and exact.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use servelab_engine::{ModelRunner, RunnerError, SequenceId, Step, StepOutput, TokenId};

use crate::config::{Architecture, ModelConfig, WeightDtype};
use crate::error::ModelError;
use crate::rope::RopeScaling;
use crate::sampler::Sampler;
use crate::weights::{EMBEDDING, HEAD, Weights, expected_tensors};

/// Runs steps of a single sequence.
pub struct NaiveRunner {
    model: Model,
    pool: rayon::ThreadPool,
    sampler: Sampler,
    vocab_size: usize,
    /// Whose tokens are in the dense cache, and how many.
    cached: Option<(SequenceId, usize)>,
}

impl NaiveRunner {
    /// Builds candle's model. `threads` 0 is as many as the machine has cores.
    ///
    /// # Errors
    /// [`ModelError::NaiveUnsupported`] for what candle-transformers does not compute as the
    /// checkpoint means it, and [`ModelError::Candle`].
    pub fn new(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        max_model_len: usize,
        threads: usize,
    ) -> Result<Self, ModelError> {
        refuse_unsupported(config, dtype, max_model_len)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
            ModelError::Option { option: "threads", value: threads.to_string(), rule: e.to_string() }
        })?;
        let model = Model::load(config, weights, dtype, max_model_len)?;
        Ok(Self { model, pool, sampler: Sampler::default(), vocab_size: config.vocab_size, cached: None })
    }

    /// Checks that the step continues the cached sequence or starts another one.
    fn begin(&mut self, step: &Step) -> Result<(), RunnerError> {
        let refuse = |what: &str| {
            Err(RunnerError::Step(format!(
                "the naive engine computes one sequence from its start ({what}); run it with max_running 1 and \
                 no prefix cache"
            )))
        };
        let [sequence] = step.sequences.as_slice() else { return refuse("a step of several sequences") };
        if !step.copies.is_empty() {
            return refuse("a forked sequence");
        }
        if let Some(token) = step.tokens.iter().find(|token| **token as usize >= self.vocab_size) {
            let size = self.vocab_size;
            return Err(RunnerError::Step(format!("token {token} is not in the vocabulary of {size}")));
        }
        match (step.positions.first(), self.cached) {
            (Some(0), _) => {
                self.model.clear();
                self.cached = Some((sequence.id, 0));
                Ok(())
            }
            (Some(position), Some((id, length))) if id == sequence.id && *position as usize == length => {
                Ok(())
            }
            _ => refuse("a step that does not continue the last one"),
        }
    }
}

impl ModelRunner for NaiveRunner {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        if step.tokens.is_empty() {
            return Ok(StepOutput::default());
        }
        self.begin(step)?;
        let mut output = StepOutput::default();
        let mut done = 0;
        // The models give the logits of the last row only, so a step is cut behind each wanted row.
        let mut ends: Vec<usize> = step.rows.iter().map(|row| row.row + 1).collect();
        ends.push(step.tokens.len());
        ends.dedup();
        for end in ends {
            let tokens = step.tokens.get(done..end).unwrap_or_default();
            let logits = self.logits(tokens)?;
            for row in step.rows.iter().filter(|row| row.row + 1 == end) {
                output.rows.push(self.sampler.answer(&logits, row)?);
            }
            done = end;
        }
        Ok(output)
    }
}

impl NaiveRunner {
    /// Appends `tokens` to the cached sequence; the logits behind the last of them.
    fn logits(&mut self, tokens: &[TokenId]) -> Result<Vec<f32>, RunnerError> {
        let Some((_, length)) = self.cached.as_mut() else {
            return Err(RunnerError::Step("no sequence has been started".to_owned()));
        };
        let position = *length;
        *length += tokens.len();
        let logits = self.pool.install(|| self.model.forward(tokens, position));
        logits.map_err(|error| {
            self.cached = None;
            RunnerError::Step(format!("candle: {error}"))
        })
    }
}

/// candle-transformers' models, each with its own interface.
enum Model {
    Llama { model: llama::Llama, empty: llama::Cache, cache: llama::Cache },
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
}

impl Model {
    fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        max_model_len: usize,
    ) -> Result<Self, ModelError> {
        let tensors = tensors(config, weights, dtype)?;
        let vb = VarBuilder::from_tensors(tensors, candle_dtype(dtype), &Device::Cpu);
        // candle tabulates the angles of all positions, so it is told the context that is used.
        let positions = max_model_len;
        Ok(match config.architecture {
            Architecture::Llama => {
                let config = llama_config(config, positions);
                let empty = llama::Cache::new(true, candle_dtype(dtype), &config, &Device::Cpu)?;
                Self::Llama { model: llama::Llama::load(vb, &config)?, cache: empty.clone(), empty }
            }
            Architecture::Mistral => {
                Self::Mistral(mistral::Model::new(&mistral_config(config, positions), vb)?)
            }
            Architecture::Qwen2 => {
                Self::Qwen2(qwen2::ModelForCausalLM::new(&qwen2_config(config, positions), vb)?)
            }
            Architecture::Qwen3 => {
                Self::Qwen3(qwen3::ModelForCausalLM::new(&qwen3_config(config, positions), vb)?)
            }
        })
    }

    fn clear(&mut self) {
        match self {
            Self::Llama { empty, cache, .. } => *cache = empty.clone(),
            Self::Mistral(model) => model.clear_kv_cache(),
            Self::Qwen2(model) => model.clear_kv_cache(),
            Self::Qwen3(model) => model.clear_kv_cache(),
        }
    }

    fn forward(&mut self, tokens: &[TokenId], position: usize) -> candle_core::Result<Vec<f32>> {
        let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama { model, cache, .. } => model.forward(&input, position, cache)?,
            Self::Mistral(model) => model.forward(&input, position)?,
            Self::Qwen2(model) => model.forward(&input, position)?,
            Self::Qwen3(model) => model.forward(&input, position)?,
        };
        logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
    }
}

fn candle_dtype(dtype: WeightDtype) -> DType {
    match dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::F16 => DType::F16,
        WeightDtype::BF16 => DType::BF16,
    }
}

fn tensors(
    config: &ModelConfig,
    weights: &Weights,
    dtype: WeightDtype,
) -> Result<HashMap<String, Tensor>, ModelError> {
    let mut tensors = HashMap::new();
    for spec in expected_tensors(config) {
        let data = weights.tensor(&spec.name, &spec.shape)?;
        let tensor =
            Tensor::from_raw_buffer(&data.bytes, candle_dtype(data.dtype), &spec.shape, &Device::Cpu)?;
        tensors.insert(spec.name, tensor.to_dtype(candle_dtype(dtype))?);
    }
    // Mistral's model knows no tied embeddings.
    if config.tie_word_embeddings && config.architecture == Architecture::Mistral {
        let embedding = tensors.get(EMBEDDING).cloned();
        tensors.extend(embedding.map(|tensor| (HEAD.to_owned(), tensor)));
    }
    Ok(tensors)
}

fn refuse_unsupported(
    config: &ModelConfig,
    dtype: WeightDtype,
    max_model_len: usize,
) -> Result<(), ModelError> {
    let refuse = |feature: String| Err(ModelError::NaiveUnsupported { feature });
    let architecture = config.architecture;
    let llama = architecture == Architecture::Llama;
    match &config.rope.scaling {
        RopeScaling::Default => {}
        RopeScaling::Llama3 { .. } if llama => {}
        RopeScaling::Linear { .. } => return refuse("rope_type linear".to_owned()),
        RopeScaling::Llama3 { .. } => return refuse(format!("rope_type llama3 of {}", architecture.name())),
        RopeScaling::Yarn(_) => return refuse("rope_type yarn".to_owned()),
    }
    if let Some(window) = config.shortest_window().filter(|window| *window < max_model_len) {
        return refuse(format!(
            "a sliding window of {window} tokens, shorter than the context {max_model_len}"
        ));
    }
    let derived_head_dim = matches!(architecture, Architecture::Llama | Architecture::Qwen2);
    if derived_head_dim && config.head_dim * config.num_heads != config.hidden_size {
        return refuse(format!("head_dim {} other than hidden_size / heads", config.head_dim));
    }
    if config.mlp_bias || (llama && config.qkv_bias) {
        return refuse("attention_bias or mlp_bias".to_owned());
    }
    if architecture == Architecture::Qwen2 && dtype != WeightDtype::F32 {
        return refuse(format!("Qwen2 in {}: candle would round positions to it", dtype.name()));
    }
    Ok(())
}

fn llama_config(config: &ModelConfig, max_position_embeddings: usize) -> llama::Config {
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            Some(llama::Llama3RopeConfig {
                factor: factor as f32,
                low_freq_factor: low_freq_factor as f32,
                high_freq_factor: high_freq_factor as f32,
                original_max_position_embeddings: original_context as usize,
                rope_type: llama::Llama3RopeType::Llama3,
            })
        }
        _ => None,
    };
    llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        num_key_value_heads: config.num_kv_heads,
        use_flash_attn: false,
        rms_norm_eps: f64::from(config.rms_norm_eps),
        rope_theta: config.rope.theta as f32,
        bos_token_id: config.bos_token_id,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

fn mistral_config(config: &ModelConfig, max_position_embeddings: usize) -> mistral::Config {
    mistral::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        head_dim: Some(config.head_dim),
        num_key_value_heads: config.num_kv_heads,
        hidden_act: Activation::Silu,
        max_position_embeddings,
        rms_norm_eps: f64::from(config.rms_norm_eps),
        rope_theta: config.rope.theta,
        // Windows shorter than the context were refused.
        sliding_window: None,
        use_flash_attn: false,
    }
}

fn qwen2_config(config: &ModelConfig, max_position_embeddings: usize) -> qwen2::Config {
    qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        num_key_value_heads: config.num_kv_heads,
        max_position_embeddings,
        // candle masks by it even where the checkpoint says not to.
        sliding_window: max_position_embeddings + 1,
        max_window_layers: config.num_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: f64::from(config.rms_norm_eps),
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn qwen3_config(config: &ModelConfig, max_position_embeddings: usize) -> qwen3::Config {
    qwen3::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        head_dim: config.head_dim,
        attention_bias: config.qkv_bias,
        num_key_value_heads: config.num_kv_heads,
        max_position_embeddings,
        sliding_window: None,
        max_window_layers: config.num_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: f64::from(config.rms_norm_eps),
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}
