//! The same small random model twice: the log-probabilities of a prompt, and greedy tokens.
//!
//! A GPU is compared with the CPU, and the CPU with candle's own models. They differ by rounding: a GPU keeps
//! activations in 16 bits where the CPU has f32. So log-probabilities may differ a little, and where the two
//! likeliest tokens are that close to each other the answers may part.

use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{
    BlockId, Engine, EngineConfig, Event, LogitsRow, ModelRunner, Request, RequestId, RunnerError,
    SamplingParams, SequenceId, Step, StepSequence, StopConditions, TokenLogprobs, Want,
};

use super::geometry::MOST_LOGPROBS;
use super::gpu::Gpu;
use super::kernels::{Element, KvElement};
use super::ops::CudaOptions;
use super::runner::{CudaModel, Ways};
use crate::config::{ModelConfig, WeightDtype};
use crate::cpu::KvDtype;
use crate::cpu::runner::{CpuOptions, CpuRunner};
use crate::dummy::DummyWeights;
use crate::error::ModelError;
use crate::naive::NaiveRunner;
use crate::weights::Weights;

const BLOCK_SIZE: u32 = 16;
const MAX_MODEL_LEN: u32 = 256;
const BLOCKS: u32 = 32;
const DUMMY: Weights = Weights::Dummy(DummyWeights { seed: 7 });

/// In which numbers a GPU computes the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    Bf16,
    /// 8 bits for keys and values.
    Fp8Kv,
    /// 8 bits for the layers' weights and what they are multiplied with.
    Fp8Weights,
}

impl Numbers {
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Fp8Kv, Self::Fp8Weights];

    /// In words.
    pub fn title(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8Kv => "fp8 KV cache",
            Self::Fp8Weights => "fp8 weights",
        }
    }

    /// How far log-probabilities may be from those of bf16 weights and f32 activations. The logits of the model have
    /// a standard deviation of about 0.5, so that wrong ones are off by 2 somewhere; on the emulator the largest
    /// differences are 0.015, 0.09 and 0.21.
    pub fn tolerance(self) -> f32 {
        match self {
            Self::Bf16 => 0.03,
            Self::Fp8Kv => 0.2,
            Self::Fp8Weights => 0.4,
        }
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct CompareSizes {
    pub layers: u32,
    pub hidden: u32,
    pub vocabulary: u32,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
}

impl CompareSizes {
    /// On a real GPU.
    pub const FULL: Self =
        Self { layers: 4, hidden: 512, vocabulary: 4096, prompt_tokens: 100, output_tokens: 64 };
    /// On an emulator.
    pub const SMALL: Self =
        Self { layers: 2, hidden: 64, vocabulary: 160, prompt_tokens: 20, output_tokens: 6 };
}

/// The outcome.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Largest difference of a log-probability among the likeliest tokens of every row of the prompt.
    pub logprob_error: f32,
    pub output_tokens: usize,
    /// Greedy tokens before the first one that differs.
    pub equal_tokens: usize,
    /// Where the answers part: by how much the reference prefers its own token. 0 if they do not.
    pub gap: f32,
    /// How far log-probabilities may be apart.
    pub tolerance: f32,
}

impl Comparison {
    /// Whether the differences are those of rounding.
    pub fn passed(&self) -> bool {
        self.logprob_error <= self.tolerance && self.gap <= 2.0 * self.tolerance
    }
}

/// A GPU beside the CPU.
///
/// # Errors
/// If a runner cannot be built or a step fails.
pub fn compare<G: Gpu>(
    gpu: Arc<G>,
    sizes: CompareSizes,
    numbers: Numbers,
    ways: Ways,
) -> Result<Comparison, ModelError> {
    let config = config(sizes)?;
    let options = CudaOptions {
        element: Element::BF16,
        fp8_weights: numbers == Numbers::Fp8Weights,
        kv: if numbers == Numbers::Fp8Kv { KvElement::E4M3 } else { KvElement::Same },
        block_size: BLOCK_SIZE,
        max_batched_tokens: MAX_MODEL_LEN as usize,
        max_sequences: 4,
        max_model_len: MAX_MODEL_LEN,
    };
    let model = CudaModel::load(gpu, &config, &DUMMY, options, Box::new(|_, _| ()))?;
    let on_gpu = model.into_runner(BLOCKS as usize, ways)?;
    beside(on_gpu, on_cpu(&config, KvDtype::BF16, 0)?, sizes, numbers.tolerance())
}

/// The CPU beside candle's models. `threads` 0 is as many as the machine has cores.
///
/// # Errors
/// As [`compare`].
pub fn compare_cpu(sizes: CompareSizes, threads: usize) -> Result<Comparison, ModelError> {
    let config = config(sizes)?;
    let reference = NaiveRunner::new(&config, &DUMMY, WeightDtype::F32, MAX_MODEL_LEN as usize, threads)?;
    beside(on_cpu(&config, KvDtype::F32, threads)?, reference, sizes, Numbers::Bf16.tolerance())
}

fn on_cpu(config: &ModelConfig, kv_dtype: KvDtype, threads: usize) -> Result<CpuRunner, ModelError> {
    let options = CpuOptions {
        num_blocks: BLOCKS as usize,
        block_size: BLOCK_SIZE as usize,
        max_batched_tokens: MAX_MODEL_LEN as usize,
        threads,
        kv_dtype,
    };
    CpuRunner::new(config, &DUMMY, WeightDtype::BF16, options)
}

fn beside(
    mut runner: impl ModelRunner,
    mut reference: impl ModelRunner,
    sizes: CompareSizes,
    tolerance: f32,
) -> Result<Comparison, ModelError> {
    let prompt: Vec<u32> =
        (0..sizes.prompt_tokens).map(|at| (at * at * 7 + at * 31) % sizes.vocabulary).collect();
    let failed = |error: RunnerError| ModelError::WarmUp(error.to_string());
    let found = runner.run(&prompt_step(&prompt, MOST_LOGPROBS)).map_err(failed)?;
    let expected = reference.run(&prompt_step(&prompt, sizes.vocabulary)).map_err(failed)?;
    let rows = found.rows.iter().zip(&expected.rows);
    let logprob_error = rows
        .map(|(found, expected)| row_error(found.logprobs.as_ref(), expected.logprobs.as_ref()))
        .fold(0.0, f32::max);
    let found = greedy(runner, &prompt, sizes.output_tokens).map_err(failed)?;
    let expected = greedy(reference, &prompt, sizes.output_tokens).map_err(failed)?;
    let equal_tokens =
        found.iter().zip(&expected).take_while(|(found, expected)| found.0 == expected.0).count();
    let gap = match (found.get(equal_tokens), expected.get(equal_tokens)) {
        (Some((token, _)), Some((_, row))) => row.logprob - logprob_of(row, *token),
        (None, None) => 0.0,
        _ => f32::INFINITY,
    };
    Ok(Comparison { logprob_error, output_tokens: expected.len(), equal_tokens, gap, tolerance })
}

fn config(sizes: CompareSizes) -> Result<ModelConfig, ModelError> {
    let CompareSizes { layers, hidden, vocabulary, .. } = sizes;
    let json = format!(
        r#"{{"architectures": ["Qwen3ForCausalLM"], "vocab_size": {vocabulary}, "hidden_size": {hidden},
        "intermediate_size": {}, "num_hidden_layers": {layers}, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false}}"#,
        3 * hidden
    );
    ModelConfig::parse(json.as_bytes(), None)
}

fn prompt_step(prompt: &[u32], top: u32) -> Step {
    let tokens = prompt.len() as u32;
    let target = |row: usize| prompt.get(row + 1).copied().unwrap_or(0);
    let want =
        |row| LogitsRow { row, sequence: SequenceId(1), want: Want::Score { target: target(row), top } };
    Step {
        tokens: prompt.to_vec(),
        positions: (0..tokens).collect(),
        slots: (0..tokens).collect(),
        blocks: (0..tokens.div_ceil(BLOCK_SIZE)).map(BlockId).collect(),
        sequences: vec![StepSequence {
            id: SequenceId(1),
            tokens: 0..prompt.len(),
            blocks: 0..tokens.div_ceil(BLOCK_SIZE) as usize,
            context_len: tokens,
        }],
        rows: (0..prompt.len()).map(want).collect(),
        ..Step::default()
    }
}

/// Infinite if one is missing or no number.
fn row_error(found: Option<&TokenLogprobs>, expected: Option<&TokenLogprobs>) -> f32 {
    let (Some(found), Some(expected)) = (found, expected) else { return f32::INFINITY };
    let mut all: Vec<f32> = vec![(found.logprob - expected.logprob).abs()];
    all.extend(found.top.iter().map(|(token, logprob)| (logprob - logprob_of(expected, *token)).abs()));
    all.into_iter().map(|error| if error.is_nan() { f32::INFINITY } else { error }).fold(0.0, f32::max)
}

fn logprob_of(row: &TokenLogprobs, token: u32) -> f32 {
    let found = row.top.iter().find(|(other, _)| *other == token);
    found.map_or(f32::NEG_INFINITY, |(_, logprob)| *logprob)
}

/// The greedy answer, with the log-probabilities of the likeliest tokens in each place.
fn greedy<R: ModelRunner>(
    runner: R,
    prompt: &[u32],
    max_tokens: u32,
) -> Result<Vec<(u32, TokenLogprobs)>, RunnerError> {
    let config = EngineConfig {
        block_size: BLOCK_SIZE,
        num_blocks: BLOCKS,
        max_model_len: MAX_MODEL_LEN,
        max_batched_tokens: MAX_MODEL_LEN,
        max_running: 1,
        max_waiting: 1,
        prefix_cache: false,
    };
    let refused = |reason: String| RunnerError::Step(reason);
    let mut engine = Engine::new(config, runner).map_err(|error| refused(error.to_string()))?;
    let sampling = SamplingParams { logprobs: Some(MOST_LOGPROBS), ..SamplingParams::greedy() };
    let request = Request {
        id: RequestId(1),
        prompt: prompt.into(),
        n: 1,
        sampling: Arc::new(sampling),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: [].into() },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    };
    engine.add(request).map_err(|error| refused(error.to_string()))?;
    let mut answer = Vec::new();
    while engine.has_work() {
        let report = engine.step(Duration::ZERO);
        if let Some(error) = report.error {
            return Err(error);
        }
        for event in report.events {
            if let Event::Token { token, logprobs: Some(logprobs), .. } = event {
                answer.push((token, logprobs));
            }
        }
    }
    Ok(answer)
}
