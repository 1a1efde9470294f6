//! From settings to a model that the server can take: files, sizes, runner, tokenizer, template.

use std::sync::Arc;

use servelab_engine::EngineConfig;
use servelab_front::prompts::Prompter;
use servelab_model::cuda::driver::CudaGpu;
use servelab_model::cuda::gpu::Gpu;
use servelab_model::hub::{Download, HubOptions};
use servelab_model::{
    CudaRunnerOptions, EngineKind, KvDtype, ModelConfig, ModelSource, OpenOptions, Prepared, TextFiles, demo,
};
use servelab_server::{LoadError, LoadTimes, LoadedModel, ModelMemory};
use servelab_text::{ChatTemplate, Tokenizer};
use servelab_wire::DeviceState;

use crate::device::{self, Chosen, Device};
use crate::generation_config;
use crate::memory;
use crate::plan::{Facts, Plan, PlanError, plan};
use crate::settings::{EngineSettings, ModelSettings};
use crate::simulated::{self, SimulatedSettings};
use crate::size::ByteSize;

/// What the banner tells about a loaded model.
#[derive(Clone, Debug)]
pub struct Summary {
    /// `cpu`, or the GPU in words.
    pub device: String,
    pub architecture: &'static str,
    pub parameters: u64,
    pub weight_dtype: &'static str,
    pub weight_bytes: u64,
    pub kv_dtype: &'static str,
    pub kv_cache_bytes: u64,
    pub engine: servelab_engine::EngineConfig,
    pub has_chat_template: bool,
}

/// Finds the model's files and checks them; downloads them first if the source is a hub.
///
/// # Errors
/// Whatever is wrong with the files, in one line.
pub fn open(settings: &ModelSettings) -> Result<Prepared, LoadError> {
    let hub = HubOptions {
        endpoint: settings.hub_endpoint.clone(),
        cache: settings.hub_cache.clone(),
        token: settings.hub_token.as_ref().map(|token| token.expose().to_owned()),
        progress: Some(Box::new(progress())),
    };
    let options = OpenOptions { hub, dtype: settings.dtype, seed: settings.seed };
    Prepared::open(&settings.source, options).map_err(|error| LoadError(error.to_string()))
}

/// Whether [`open`] only looks at files of this machine, so that it takes no time worth showing.
pub fn is_local(source: &ModelSource) -> bool {
    !matches!(source, ModelSource::Hub { .. })
}

/// One log line each tenth of a file.
fn progress() -> impl FnMut(&Download) + Send {
    let mut last = (String::new(), u64::MAX);
    move |download| {
        let tenths = 10 * download.downloaded_bytes / download.total_bytes.max(1);
        if last.0 != download.file || last.1 != tenths {
            last = (download.file.clone(), tenths);
            let (done, total) = (ByteSize(download.downloaded_bytes), ByteSize(download.total_bytes));
            tracing::info!(file = download.file, "downloading: {done} of {total}");
        }
    }
}

/// A model on its device, and the sizes of its engine.
struct OnDevice {
    model: servelab_model::LoadedModel,
    engine: EngineConfig,
    device: DeviceState,
    weight_dtype: &'static str,
    kv_dtype: &'static str,
}

/// Decides the sizes, loads the weights and everything that turns text into tokens and back.
///
/// # Errors
/// Whatever is wrong with sizes, weights or tokenizer files, in one line.
pub fn load(
    prepared: Prepared,
    model: &ModelSettings,
    engine: &EngineSettings,
    chosen: &Chosen,
) -> Result<(LoadedModel, Summary), LoadError> {
    let mut text = Text::new(prepared.text_files(), prepared.config(), &model.source)?;
    if matches!(chosen.device, Device::Sim(_)) && prepared.text_files().tokenizer.is_none() {
        text.end_in_its_own_words();
    }
    let sampling_defaults =
        generation_config::sampling_defaults(prepared.text_files().generation_config.as_deref())
            .map_err(|error| LoadError(error.to_string()))?;
    let (architecture, parameters) =
        (prepared.config().architecture.name(), prepared.config().num_parameters());
    let OnDevice { model: loaded, engine, device, weight_dtype, kv_dtype } =
        on_device(prepared, model, engine, chosen, &text)?;
    let summary = Summary {
        device: device.name.clone(),
        architecture,
        parameters,
        weight_dtype,
        weight_bytes: loaded.memory.weight_bytes,
        kv_dtype,
        kv_cache_bytes: loaded.memory.kv_cache_bytes,
        engine: engine.clone(),
        has_chat_template: text.chat_template.is_some(),
    };
    let (timings, memory) = (loaded.timings, loaded.memory);
    let served = LoadedModel {
        runner: loaded.runner,
        engine,
        prompter: Prompter {
            tokenizer: Arc::new(text.tokenizer),
            chat_template: text.chat_template.map(Arc::new),
        },
        text_files: text.files,
        eos_token_ids: text.eos_token_ids,
        vocab_size: u32::try_from(loaded.config.vocab_size).unwrap_or(u32::MAX),
        root: root(&model.source),
        sampling_defaults,
        device,
        kv_dtype: kv_dtype.to_owned(),
        load_times: LoadTimes {
            read: timings.read,
            compile: timings.compile,
            convert: timings.convert,
            warm_up: timings.warm_up,
            record: timings.record,
        },
        memory: ModelMemory {
            weights: memory.weight_bytes,
            activations: memory.activation_bytes,
            kv_cache: memory.kv_cache_bytes,
        },
    };
    Ok((served, summary))
}

fn on_device(
    prepared: Prepared,
    model: &ModelSettings,
    engine: &EngineSettings,
    chosen: &Chosen,
    text: &Text,
) -> Result<OnDevice, LoadError> {
    let gpu = match &chosen.device {
        Device::Cpu => return on_cpu(prepared, model, engine),
        Device::Sim(simulated) => return on_simulated(&prepared, model, engine, simulated, text),
        Device::Cuda(gpu) => gpu,
    };
    let options = gpu_options(engine, model, prepared.config())?;
    let only_gpu = engine.gpu.fp8_weights || engine.gpu.fp8_kv;
    match prepared.cuda_options(&**gpu, &options) {
        // A GPU that was not asked for is no reason to refuse a model that the CPU can compute.
        Err(error) if chosen.may_change && !only_gpu => {
            tracing::info!("device cpu: {error}");
            on_cpu(prepared, model, engine)
        }
        Err(error) => Err(LoadError(error.to_string())),
        Ok(cuda) => {
            check_kv_dtype(engine.gpu.kv_dtype, cuda.element.dtype().name())?;
            on_gpu(prepared, model, engine, gpu, &options)
        }
    }
}

fn on_simulated(
    prepared: &Prepared,
    model: &ModelSettings,
    engine: &EngineSettings,
    simulated: &SimulatedSettings,
    text: &Text,
) -> Result<OnDevice, LoadError> {
    let words = (&text.tokenizer, &text.eos_token_ids[..]);
    let loaded = simulated::load(prepared, model, engine, simulated, words)?;
    Ok(OnDevice {
        model: loaded.model,
        engine: loaded.engine,
        device: DeviceState {
            kind: "sim".to_owned(),
            name: format!("{}, simulated", simulated.name()),
            gpus: simulated.gpus,
            simulated: true,
            speed: Some(simulated.shown_speed()),
        },
        weight_dtype: loaded.weight_dtype,
        kv_dtype: loaded.kv_dtype,
    })
}

/// On a GPU keys and values have the weights' format, or 8 bits.
fn check_kv_dtype(asked: Option<&str>, weights: &str) -> Result<(), LoadError> {
    match asked.filter(|asked| *asked != weights) {
        Some(asked) => Err(LoadError(format!(
            "--kv-dtype {asked} does not go with {weights} weights on a GPU, where it is {weights} or fp8; leave it out"
        ))),
        None => Ok(()),
    }
}

fn on_cpu(prepared: Prepared, model: &ModelSettings, engine: &EngineSettings) -> Result<OnDevice, LoadError> {
    if engine.gpu.fp8_weights || engine.gpu.fp8_kv {
        return Err(LoadError(
            "fp8 weights and KV caches need a GPU; leave --dtype and --kv-dtype out".into(),
        ));
    }
    if engine.gpu.kv_dtype == Some("f16") {
        return Err(LoadError("--kv-dtype f16 needs a GPU; on the CPU it is f32 or bf16".into()));
    }
    for name in &engine.gpu.given {
        tracing::warn!("--{name} is for GPUs and changes nothing on the CPU");
    }
    let plan = sizes(&prepared, model, engine)?;
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    let weight_dtype = prepared.dtype().name();
    let loaded = prepared.into_runner(&plan.runner).map_err(|error| LoadError(error.to_string()))?;
    let kv_dtype = plan.runner.kv_dtype.name();
    let device = DeviceState { kind: "cpu".to_owned(), name: "cpu".to_owned(), ..DeviceState::default() };
    Ok(OnDevice { model: loaded, engine: plan.engine, device, weight_dtype, kv_dtype })
}

fn gpu_options(
    engine: &EngineSettings,
    model: &ModelSettings,
    config: &ModelConfig,
) -> Result<CudaRunnerOptions, LoadError> {
    let context = context(config);
    if let Some(asked) = model.max_model_len.filter(|&asked| asked > context) {
        return Err(LoadError(PlanError::BeyondContext { asked, context }.to_string()));
    }
    Ok(CudaRunnerOptions {
        block_size: engine.block_size,
        max_model_len: model.max_model_len.unwrap_or(context),
        max_batched_tokens: engine.gpu.max_batched_tokens,
        max_running: engine.gpu.max_running,
        fp8_kv: engine.gpu.fp8_kv,
        fp8_weights: engine.gpu.fp8_weights,
        pool: engine.gpu.pool,
        ways: engine.gpu.ways,
    })
}

fn on_gpu(
    prepared: Prepared,
    model: &ModelSettings,
    engine: &EngineSettings,
    gpu: &Arc<CudaGpu>,
    options: &CudaRunnerOptions,
) -> Result<OnDevice, LoadError> {
    let progress = weights_progress();
    let loaded = prepared.into_cuda_runner(Arc::clone(gpu), options, progress);
    let loaded = loaded.map_err(|error| LoadError(error.to_string()))?;
    let (pool, room) = (loaded.pool, u32::try_from(loaded.pool.tokens).unwrap_or(u32::MAX));
    tracing::info!(
        weight_bytes = loaded.model.memory.weight_bytes,
        activation_bytes = loaded.model.memory.activation_bytes,
        pool_bytes = pool.pool_bytes,
        blocks = pool.blocks,
        tokens = pool.tokens,
        "GPU memory: weights of {}, activations of {}, KV pool of {} for {} tokens, {:.1} sequences of {} at once",
        ByteSize(loaded.model.memory.weight_bytes),
        ByteSize(loaded.model.memory.activation_bytes),
        ByteSize(pool.pool_bytes),
        pool.tokens,
        pool.concurrency,
        options.max_model_len
    );
    if options.max_model_len > room && model.max_model_len.is_some() {
        tracing::warn!(
            "the KV pool holds {room} tokens, less than one sequence of --max-model-len {}: longer requests are \
             refused",
            options.max_model_len
        );
    }
    let engine = EngineConfig {
        block_size: options.block_size,
        num_blocks: pool.blocks,
        max_model_len: model.max_model_len.unwrap_or(options.max_model_len.min(room)),
        max_batched_tokens: options.max_batched_tokens,
        max_running: options.max_running,
        max_waiting: engine.max_waiting,
        prefix_cache: engine.prefix_cache,
    };
    Ok(OnDevice {
        model: loaded.model,
        engine,
        device: DeviceState {
            kind: "cuda".to_owned(),
            name: device::describe(gpu.info()),
            gpus: 1,
            ..DeviceState::default()
        },
        weight_dtype: loaded.weight_dtype,
        kv_dtype: loaded.kv_dtype,
    })
}

/// One log line each tenth of the weights.
fn weights_progress() -> servelab_model::Progress {
    let mut last = 0;
    Box::new(move |done, total| {
        let tenths = 10 * done / total.max(1);
        if tenths > last {
            last = tenths;
            tracing::info!("weights on the GPU: {} of {}", ByteSize(done), ByteSize(total));
        }
    })
}

fn sizes(prepared: &Prepared, model: &ModelSettings, engine: &EngineSettings) -> Result<Plan, LoadError> {
    let suiting = match engine.kind {
        EngineKind::Paged => KvDtype::suiting(prepared.dtype()),
        EngineKind::Naive => KvDtype::F32,
    };
    let kv_dtype = engine.kv_dtype.unwrap_or(suiting);
    let facts = Facts {
        context: context(prepared.config()),
        kv_dtype,
        block_bytes: prepared.kv_bytes_per_block(engine.block_size, kv_dtype),
        weight_bytes: prepared.weight_bytes(),
        free_bytes: memory::free_bytes(),
    };
    plan(engine, model.max_model_len, facts).map_err(|error| LoadError(error.to_string()))
}

/// The longest context of a model, in tokens.
pub fn context(config: &ModelConfig) -> u32 {
    u32::try_from(config.max_position_embeddings).unwrap_or(u32::MAX)
}

/// What `/v1/models` shows as the model's origin. Not the path: that is nobody's business outside.
fn root(source: &ModelSource) -> String {
    source.to_string()
}

/// The files as prompts are made of them.
pub fn for_prompts(files: &TextFiles, tokenizer: &[u8]) -> servelab_front::prompts::TextFiles {
    servelab_front::prompts::TextFiles {
        tokenizer: tokenizer.to_vec().into(),
        tokenizer_config: files.tokenizer_config.clone().map(Into::into),
        chat_template: files.chat_template.clone().map(Into::into),
    }
}

/// The text side of a model.
struct Text {
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    eos_token_ids: Vec<u32>,
    /// What both were made of.
    files: servelab_front::prompts::TextFiles,
}

impl Text {
    fn new(files: &TextFiles, config: &ModelConfig, source: &ModelSource) -> Result<Self, LoadError> {
        if let Some(tokenizer) = &files.tokenizer {
            let mut text = Self::read(files, tokenizer, config.eos_token_ids.clone())?;
            if matches!(source, ModelSource::Dummy(_)) {
                text.tokenizer = text.tokenizer.with_placeholders(config.vocab_size);
            }
            return text.with_end(source);
        }
        match source {
            // A shape alone has no words of its own: prompts are cut with the demo's tokenizer, and what the
            // drawn weights say is shown as numbers where that has no word.
            ModelSource::Dummy(_) => Self::borrowed(config),
            _ => Err(LoadError(format!(
                "{source} has no tokenizer.json; add the one that the model was trained with"
            ))),
        }
    }

    fn read(files: &TextFiles, tokenizer: &[u8], eos_token_ids: Vec<u32>) -> Result<Self, LoadError> {
        let failed = |error: servelab_text::TextError| LoadError(error.to_string());
        let tokenizer_config = files.tokenizer_config.as_deref();
        Ok(Self {
            tokenizer: Tokenizer::from_json(tokenizer, tokenizer_config).map_err(failed)?,
            chat_template: ChatTemplate::from_files(tokenizer_config, files.chat_template.as_deref())
                .map_err(failed)?,
            eos_token_ids,
            files: for_prompts(files, tokenizer),
        })
    }

    fn borrowed(config: &ModelConfig) -> Result<Self, LoadError> {
        let files = demo::text_files();
        let tokenizer = files.tokenizer.clone().unwrap_or_default();
        let mut text = Self::read(&files, &tokenizer, config.eos_token_ids.clone())?;
        if text.tokenizer.vocab_size() > config.vocab_size {
            return Err(LoadError(format!(
                "the shape has a vocabulary of {} and dummy weights borrow the demo's tokenizer, which has {}; give a \
                 folder with a tokenizer.json, or a larger vocab_size",
                config.vocab_size,
                text.tokenizer.vocab_size()
            )));
        }
        text.tokenizer = text.tokenizer.with_placeholders(config.vocab_size);
        Ok(text)
    }

    /// With a borrowed tokenizer the model's end of sequence is a number without a word. What a simulated device says
    /// can end as the tokenizer does.
    fn end_in_its_own_words(&mut self) {
        let end = self.tokenizer.eos_token().and_then(|token| self.tokenizer.special_token_id(token));
        self.eos_token_ids = end.into_iter().collect();
    }

    /// Adds the tokenizer's own end of sequence, which some checkpoints name nowhere else.
    fn with_end(mut self, source: &ModelSource) -> Result<Self, LoadError> {
        let end = self.tokenizer.eos_token().and_then(|token| self.tokenizer.special_token_id(token));
        if self.eos_token_ids.is_empty() {
            self.eos_token_ids.extend(end);
        }
        if self.eos_token_ids.is_empty() {
            tracing::warn!("{source} names no end-of-sequence token; answers end at max_tokens");
        }
        Ok(self)
    }
}
