//! What one replica needs to be told. All of it was validated by whoever read it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{EngineConfig, ModelRunner, TokenId};
use servelab_front::prompts::{Prompter, TextFiles};
use servelab_telemetry::{LoadStage, MemoryPart, Metrics, Secret, Traces};
use servelab_wire::DeviceState;

use crate::kv_events::zmq::KvZmqOptions;

/// The device side of a replica, behind the seam that the engine drives.
pub type Runner = Box<dyn ModelRunner + Send>;

/// Loads the model. Called once, on the engine's own thread, after the socket listens.
pub type Loader = Box<dyn FnOnce() -> Result<LoadedModel, LoadError> + Send>;

/// Settings of one replica.
pub struct ServerOptions {
    /// Address to listen on, e.g. `127.0.0.1`.
    pub host: String,
    /// 0 takes a free port; see [`crate::Server::local_addr`].
    pub port: u16,
    /// Names under which clients may ask for the model; at least one. Answers carry the one asked for,
    /// metrics the first.
    pub served_model_names: Vec<String>,
    /// Requests that may wait beyond those that run; one more is answered 429.
    pub max_waiting: u32,
    /// Connections that may be open at once; one more is answered 503 and closed.
    pub max_connections: usize,
    /// Largest request body, in bytes; a larger one is answered 413.
    pub max_body_bytes: usize,
    /// Keys of which a client must present one; empty lets everybody in.
    pub api_keys: Vec<Secret>,
    /// How long running requests may go on after the signal to stop.
    pub drain_timeout: Duration,
    /// `/live` and `/ready` fail when the engine has work and no step ended for that long. Must exceed
    /// the longest step that the device can take.
    pub stall_timeout: Duration,
    /// Mixed into the seed of every request that gives none: two replicas with the same seed answer the
    /// same series of requests alike.
    pub seed: u64,
    /// Publishes KV events over ZeroMQ as well; over HTTP they are always there to be asked for.
    pub kv_zmq: Option<KvZmqOptions>,
    /// Made with [`crate::ROUTES`], so that requests are counted by route.
    pub metrics: Arc<Metrics>,
    /// Whoever started them shuts them down, after the server has ended.
    pub traces: Traces,
    pub load: Loader,
}

/// What [`ServerOptions::load`] brings.
pub struct LoadedModel {
    pub runner: Runner,
    /// `max_waiting` is replaced by [`ServerOptions::max_waiting`] plus `max_running`: admission counts
    /// at the HTTP front, and the engine's own bound stands behind it.
    pub engine: EngineConfig,
    pub prompter: Prompter,
    /// What the prompter was made of, for routers that want to tokenise alike.
    pub text_files: TextFiles,
    /// Tokens that end an answer, from `generation_config.json` or `config.json`.
    pub eos_token_ids: Vec<TokenId>,
    /// Rows of the logits: token ids in requests must be smaller.
    pub vocab_size: u32,
    /// Folder or hub id the model came from, for `/v1/models`.
    pub root: String,
    /// From the checkpoint's `generation_config.json`; used where a request is silent, as vLLM does.
    pub sampling_defaults: SamplingDefaults,
    /// What computes. A simulated one has no logits: requests for log-probabilities or with a bias are refused.
    pub device: DeviceState,
    /// Element type of the KV cache, for the metrics, e.g. `bf16`.
    pub kv_dtype: String,
    /// How long the stages of loading took, for the metrics.
    pub load_times: LoadTimes,
    /// What the model takes, for the metrics.
    pub memory: ModelMemory,
}

/// Bytes that a model takes, by what they hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModelMemory {
    pub weights: u64,
    /// Those of the largest step.
    pub activations: u64,
    pub kv_cache: u64,
}

impl ModelMemory {
    pub fn of(&self, part: MemoryPart) -> u64 {
        match part {
            MemoryPart::Weights => self.weights,
            MemoryPart::Activations => self.activations,
            MemoryPart::KvCache => self.kv_cache,
        }
    }
}

/// How long the stages of loading took.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadTimes {
    pub read: Duration,
    pub compile: Duration,
    pub convert: Duration,
    pub warm_up: Duration,
    pub record: Duration,
}

impl LoadTimes {
    pub fn of(&self, stage: LoadStage) -> Duration {
        match stage {
            LoadStage::Read => self.read,
            LoadStage::Compile => self.compile,
            LoadStage::Convert => self.convert,
            LoadStage::WarmUp => self.warm_up,
            LoadStage::Record => self.record,
        }
    }
}

/// Sampling values of `generation_config.json`. `None` falls back to OpenAI's default, which turns the
/// modification off (temperature 1).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

/// Why the model could not be loaded; carries the whole text for the operator.
#[derive(Debug)]
pub struct LoadError(pub String);

impl fmt::Display for LoadError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for LoadError {}
