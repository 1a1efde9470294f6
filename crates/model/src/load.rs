//! From a source to a runner, in two stages: what the configuration says first, so that the caller
//! can size the KV cache, then the weights.

use std::sync::Arc;
use std::time::{Duration, Instant};

use servelab_engine::{BlockId, ModelRunner, SequenceId, Step, StepSequence};

use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, WeightDtype};
use crate::cpu::KvDtype;
use crate::cpu::runner::{CpuOptions, CpuRunner, LOGITS_ROWS, kv_bytes_per_block};
use crate::cuda::driver::CudaGpu;
use crate::cuda::gpu::{Gpu, GpuError};
use crate::cuda::kernels::{Element, KvElement};
use crate::cuda::ops::{CudaOptions, specialisation};
use crate::cuda::plan::PoolPlan;
use crate::cuda::runner::{CudaModel, Ways};
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

/// How a model is put on a GPU, decided once the configuration is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaRunnerOptions {
    /// Tokens per block: 16, 32 or 64.
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
    /// Most tokens of one step.
    pub max_batched_tokens: u32,
    /// Most sequences of one step.
    pub max_running: u32,
    /// Keys and values in 8 bits.
    pub fp8_kv: bool,
    /// The layers' weights in 8 bits.
    pub fp8_weights: bool,
    pub pool: PoolSize,
    pub ways: Ways,
}

/// How large the KV pool of a GPU is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PoolSize {
    /// What is left of this share of the GPU's memory.
    Utilization(f64),
    Blocks(u32),
    Bytes(u64),
}

/// A model on a GPU.
pub struct LoadedCuda {
    pub model: LoadedModel,
    pub pool: PoolPlan,
    /// Such as `bf16` or `fp8`.
    pub weight_dtype: &'static str,
    pub kv_dtype: &'static str,
}

/// Told how many bytes of the weights are on the GPU, and how many there are.
pub type Progress = Box<dyn FnMut(u64, u64) + Send>;

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
    /// Compiling kernels for the GPU, or finding them compiled.
    pub compile: Duration,
    /// Reading the weights, and converting and packing them for the device.
    pub convert: Duration,
    /// First steps: over one token and over the largest batch; on a GPU over every size for which products are
    /// chosen.
    pub warm_up: Duration,
    /// Making the KV pool of a GPU and recording its decode steps.
    pub record: Duration,
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
        let timings =
            LoadTimings { read: self.read, convert, warm_up: start.elapsed(), ..LoadTimings::default() };
        Ok(LoadedModel { runner, config: self.config, text: self.text, memory, timings })
    }

    /// How the model is computed on a GPU. f32 weights become bf16.
    ///
    /// # Errors
    /// [`ModelError::Option`] if f32 was asked for; [`ModelError::Gpu`] if there are no kernels for this model or
    /// this GPU.
    pub fn cuda_options<G: Gpu>(
        &self,
        gpu: &G,
        options: &CudaRunnerOptions,
    ) -> Result<CudaOptions, ModelError> {
        let element = match (self.dtype, self.given_dtype) {
            (WeightDtype::F16, _) => Element::F16,
            (WeightDtype::BF16, _) | (WeightDtype::F32, None) => Element::BF16,
            (WeightDtype::F32, Some(_)) => {
                let rule = "bf16, f16 or fp8 on a GPU".to_owned();
                return Err(ModelError::Option { option: "--dtype", value: "f32".to_owned(), rule });
            }
        };
        let cuda = CudaOptions {
            element,
            fp8_weights: options.fp8_weights,
            kv: if options.fp8_kv { KvElement::E4M3 } else { KvElement::Same },
            block_size: options.block_size,
            max_batched_tokens: options.max_batched_tokens as usize,
            max_sequences: options.max_running as usize,
            max_model_len: options.max_model_len,
        };
        specialisation(gpu, &self.config, &cuda)?;
        Ok(cuda)
    }

    /// Compiles the kernels, brings the weights to the GPU, tries all sizes, gives the rest of the memory to the KV
    /// pool and records the decode steps.
    ///
    /// # Errors
    /// As [`Prepared::cuda_options`], and what can be missing or not fit.
    pub fn into_cuda_runner(
        self,
        gpu: Arc<CudaGpu>,
        options: &CudaRunnerOptions,
        progress: Progress,
    ) -> Result<LoadedCuda, ModelError> {
        let cuda = self.cuda_options(&*gpu, options)?;
        if self.dtype == WeightDtype::F32 {
            tracing::warn!("the weights are stored in f32; on the GPU they are kept in bf16");
        }
        let start = Instant::now();
        gpu.prepare(&specialisation(&*gpu, &self.config, &cuda)?.modules(gpu.info().arch))?;
        let compile = start.elapsed();

        let start = Instant::now();
        let mut model = CudaModel::load(Arc::clone(&gpu), &self.config, &self.weights, cuda, progress)?;
        let convert = start.elapsed();

        let start = Instant::now();
        model.try_all_sizes(options.ways)?;
        gpu.keep_algorithms();
        let warm_up = start.elapsed();

        let start = Instant::now();
        let pool = pool(&model, options)?;
        let (weight_bytes, activation_bytes) = (model.weight_bytes(), model.activation_bytes());
        let runner = model.into_runner(pool.blocks as usize, options.ways)?;
        let timings = LoadTimings { read: self.read, compile, convert, warm_up, record: start.elapsed() };
        let memory = MemoryReport { weight_bytes, kv_cache_bytes: pool.pool_bytes, activation_bytes };
        let model =
            LoadedModel { runner: Box::new(runner), config: self.config, text: self.text, memory, timings };
        let weight_dtype = if options.fp8_weights { "fp8" } else { cuda.element.dtype().name() };
        let kv_dtype = if options.fp8_kv { "fp8" } else { cuda.element.dtype().name() };
        Ok(LoadedCuda { model, pool, weight_dtype, kv_dtype })
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

fn pool<G: Gpu>(model: &CudaModel<G>, options: &CudaRunnerOptions) -> Result<PoolPlan, ModelError> {
    match options.pool {
        PoolSize::Utilization(share) => Ok(model.pool_demand(share, options.ways)?.plan()?),
        PoolSize::Blocks(blocks) => Ok(model.pool_demand(1.0, options.ways)?.of_blocks(blocks)),
        PoolSize::Bytes(bytes) => {
            let demand = model.pool_demand(1.0, options.ways)?;
            match u32::try_from(bytes / demand.block_bytes).unwrap_or(u32::MAX) {
                0 => Err(ModelError::Gpu(GpuError::Refused {
                    what: format!("--kv-memory of {bytes} bytes"),
                    reason: format!("a block takes {}", demand.block_bytes),
                })),
                blocks => Ok(demand.of_blocks(blocks)),
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
