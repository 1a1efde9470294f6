//! From a source to a runner, in two stages: what the configuration says first, so that the caller
//! can size the KV cache, then the weights.

use std::time::{Duration, Instant};

use servelab_engine::{BlockId, ModelRunner, SequenceId, Step, StepSequence};

use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, WeightDtype};
use crate::cpu::KvDtype;
use crate::cpu::runner::{CpuOptions, CpuRunner, LOGITS_ROWS, kv_bytes_per_block};
use crate::decoder::activation_values;
use crate::dummy::DummyWeights;
use crate::error::ModelError;
use crate::hub::HubOptions;
use crate::naive::NaiveRunner;
use crate::source::{ModelSource, TextFiles, WeightOrigin};
use crate::weights::Weights;

/// Which implementation computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// The decoder over paged blocks, any number of sequences in a step.
    #[default]
    Paged,
    /// candle-transformers' own models, one sequence at a time: the baseline. Needs an engine with
    /// `max_running` 1, no prefix cache and `max_batched_tokens` of at least `max_model_len`.
    Naive,
}

/// What can be chosen before the files are looked at.
#[derive(Default)]
pub struct OpenOptions {
    pub hub: HubOptions,
    /// Convert the weights to this; default: as the checkpoint stores them.
    pub dtype: Option<WeightDtype>,
    /// Of dummy weights.
    pub seed: u64,
}

/// What is decided once the configuration is known.
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    pub engine: EngineKind,
    /// Blocks of the KV cache, as in the engine's configuration.
    pub num_blocks: u32,
    /// Tokens per block, as in the engine's configuration.
    pub block_size: u32,
    /// Longest sequence in tokens; at most [`ModelConfig::max_position_embeddings`] makes sense.
    pub max_model_len: u32,
    /// Most tokens of one step.
    pub max_batched_tokens: u32,
    /// Threads that compute; 0: as many as the machine has cores.
    pub threads: usize,
    pub kv_dtype: KvDtype,
}

/// Bytes of memory by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    pub weight_bytes: u64,
    /// The KV cache; for the naive engine, whose cache grows, that of the longest sequence.
    pub kv_cache_bytes: u64,
    /// Activations of the largest step; 0 for the naive engine, which allocates them anew.
    pub activation_bytes: u64,
}

/// How long the stages of loading took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadTimings {
    /// Finding (or downloading) and mapping the files and checking their headers.
    pub read: Duration,
    /// Reading the weights, and converting and packing them for the device.
    pub convert: Duration,
    /// A first step over one token and one over the largest batch.
    pub warm_up: Duration,
}

/// A model whose files were found, read as far as the headers and checked.
pub struct Prepared {
    config: ModelConfig,
    text: TextFiles,
    weights: Weights,
    dtype: WeightDtype,
    /// What the caller asked for, if anything.
    given_dtype: Option<WeightDtype>,
    read: Duration,
}

/// A model ready to serve.
pub struct LoadedModel {
    pub runner: Box<dyn ModelRunner + Send>,
    pub config: ModelConfig,
    pub text: TextFiles,
    pub memory: MemoryReport,
    pub timings: LoadTimings,
}

impl Prepared {
    /// Finds the files, reads the configuration and checks that the checkpoint belongs to it.
    ///
    /// # Errors
    /// Every [`ModelError`] but those of sizes and warm-up.
    pub fn open(source: &ModelSource, options: OpenOptions) -> Result<Self, ModelError> {
        let start = Instant::now();
        let files = source.resolve(options.hub)?;
        let config = ModelConfig::parse(&files.config, files.text.generation_config.as_deref())?;
        let weights = match &files.weights {
            WeightOrigin::Dummy => Weights::Dummy(DummyWeights { seed: options.seed }),
            WeightOrigin::Files(files) => {
                let checkpoint = Checkpoint::open(files)?;
                checkpoint.check(&config)?;
                Weights::Checkpoint(checkpoint)
            }
        };
        let dtype = options.dtype.unwrap_or(weights.dtype());
        Ok(Self {
            config,
            text: files.text,
            weights,
            dtype,
            given_dtype: options.dtype,
            read: start.elapsed(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn text_files(&self) -> &TextFiles {
        &self.text
    }

    /// The format that the weights will be kept in.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Bytes of all weights in that format.
    pub fn weight_bytes(&self) -> u64 {
        self.config.num_parameters() * self.dtype.bytes() as u64
    }

    /// Bytes of one block of the KV cache, keys and values of all layers.
    pub fn kv_bytes_per_block(&self, block_size: u32, kv_dtype: KvDtype) -> u64 {
        kv_bytes_per_block(&self.config, block_size, kv_dtype)
    }

    /// Moves the weights into the engine's own layout, allocates the KV cache and all buffers, and
    /// runs a first step.
    ///
    /// # Errors
    /// [`ModelError::Option`] for impossible sizes, [`ModelError::OutOfMemory`],
    /// [`ModelError::NaiveUnsupported`] and [`ModelError::WarmUp`].
    pub fn into_runner(self, options: &RunnerOptions) -> Result<LoadedModel, ModelError> {
        check_sizes(options)?;
        check_memory(self.weight_bytes())?;
        let start = Instant::now();
        let (mut runner, memory) = self.build(options)?;
        let convert = start.elapsed();
        let start = Instant::now();
        for tokens in [1, options.max_batched_tokens] {
            warm_up(runner.as_mut(), tokens, options)?;
        }
        let timings = LoadTimings { read: self.read, convert, warm_up: start.elapsed() };
        Ok(LoadedModel { runner, config: self.config, text: self.text, memory, timings })
    }

    fn build(
        &self,
        options: &RunnerOptions,
    ) -> Result<(Box<dyn ModelRunner + Send>, MemoryReport), ModelError> {
        let (config, weights) = (&self.config, &self.weights);
        match options.engine {
            EngineKind::Paged => {
                let cpu = CpuOptions {
                    num_blocks: options.num_blocks as usize,
                    block_size: options.block_size as usize,
                    max_batched_tokens: options.max_batched_tokens as usize,
                    threads: options.threads,
                    kv_dtype: options.kv_dtype,
                };
                let runner = CpuRunner::new(config, weights, self.dtype, cpu)?;
                let memory = MemoryReport {
                    weight_bytes: runner.weight_bytes(),
                    kv_cache_bytes: runner.kv_cache_bytes(),
                    activation_bytes: 4 * activation_values(config, cpu.max_batched_tokens, LOGITS_ROWS),
                };
                Ok((Box::new(runner), memory))
            }
            EngineKind::Naive => {
                let dtype = self.given_dtype.unwrap_or(WeightDtype::F32);
                let max_model_len = options.max_model_len as usize;
                let runner = NaiveRunner::new(config, weights, dtype, max_model_len, options.threads)?;
                let values = config.kv_values_per_token() * u64::from(options.max_model_len);
                let memory = MemoryReport {
                    weight_bytes: config.num_parameters() * dtype.bytes() as u64,
                    kv_cache_bytes: values * dtype.bytes() as u64,
                    activation_bytes: 0,
                };
                Ok((Box::new(runner), memory))
            }
        }
    }
}

fn check_sizes(options: &RunnerOptions) -> Result<(), ModelError> {
    let positive = |option: &'static str, value: u32| match value {
        0 => Err(ModelError::Option { option, value: "0".to_owned(), rule: "at least 1".to_owned() }),
        _ => Ok(()),
    };
    positive("block size", options.block_size)?;
    positive("number of KV blocks", options.num_blocks)?;
    positive("max batched tokens", options.max_batched_tokens)?;
    positive("max model length", options.max_model_len)?;
    let slots = u64::from(options.num_blocks) * u64::from(options.block_size);
    if slots > u64::from(u32::MAX) {
        return Err(ModelError::Option {
            option: "number of KV blocks",
            value: options.num_blocks.to_string(),
            rule: format!(
                "at most {} at a block size of {}",
                u32::MAX / options.block_size,
                options.block_size
            ),
        });
    }
    Ok(())
}

/// Refuses weights that the machine has no room for, where the system tells how much that is: an
/// allocation that fails later ends the process.
fn check_memory(needed_bytes: u64) -> Result<(), ModelError> {
    let available = |text: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let kibibytes = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    match kibibytes.map(|kibibytes| kibibytes.saturating_mul(1024)) {
        Some(free_bytes) if needed_bytes > free_bytes => {
            Err(ModelError::OutOfMemory { needed_bytes, free_bytes })
        }
        _ => Ok(()),
    }
}

/// Touches all weights and buffers, so that the first request does not pay for it. Writes only to
/// blocks that no sequence has used yet.
fn warm_up(runner: &mut dyn ModelRunner, tokens: u32, options: &RunnerOptions) -> Result<(), ModelError> {
    let room = options.num_blocks.saturating_mul(options.block_size);
    let tokens = tokens.min(room).min(options.max_model_len);
    let blocks = tokens.div_ceil(options.block_size);
    let step = Step {
        tokens: vec![0; tokens as usize],
        positions: (0..tokens).collect(),
        slots: (0..tokens).collect(),
        blocks: (0..blocks).map(BlockId).collect(),
        sequences: vec![StepSequence {
            id: SequenceId(u64::MAX),
            tokens: 0..tokens as usize,
            blocks: 0..blocks as usize,
            context_len: tokens,
        }],
        ..Step::default()
    };
    runner.run(&step).map(|_| ()).map_err(|e| ModelError::WarmUp(e.to_string()))
}
