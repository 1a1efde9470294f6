//! `GET /state`: what a replica holds right now.

use serde::{Deserialize, Serialize};

/// One moment between two steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StateSnapshot {
    pub model: String,
    /// `loading`, `ready`, `draining` or `failed`.
    pub phase: String,
    pub uptime_seconds: f64,
    /// Absent until the model is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceState>,
    /// Absent, as all that follows, until the model is loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineState>,
}

/// What computes. The same for the life of a replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// `cpu`, `cuda` or `sim`.
    pub kind: String,
    /// In words.
    pub name: String,
    /// GPUs that share the model; 0 for a CPU.
    pub gpus: u32,
    /// Nothing is computed: answers are a fixed text, and take the time that the device would.
    pub simulated: bool,
    /// How many times as fast as the device a simulated one is; `inf` for one that takes no time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<String>,
}

/// The engine between two steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineState {
    /// Steps since the start.
    pub steps: u64,
    pub config: ConfigState,
    pub blocks: BlocksState,
    pub prefix_cache: PrefixCacheState,
    /// Since the start.
    pub preemptions: u64,
    /// In order of precedence.
    pub running: Vec<RunningState>,
    /// In the order in which they will be admitted.
    pub waiting: Vec<WaitingState>,
}

/// Sizes and limits of the engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigState {
    /// Tokens per KV block.
    pub block_size: u32,
    pub num_blocks: u32,
    pub max_model_len: u32,
    pub max_batched_tokens: u32,
    pub max_running: u32,
    /// Requests that may wait beyond those that run.
    pub max_waiting: u32,
    pub prefix_cache: bool,
}

/// `held + cached + free = total`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlocksState {
    pub total: u32,
    pub held: u32,
    pub cached: u32,
    pub free: u32,
    /// One number a block: 0 is free, 1 is cached, 1 + r is held by r sequences (at most 254 shown).
    pub map: Vec<u8>,
}

/// Tokens looked up and found since the start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefixCacheState {
    pub query_tokens: u64,
    pub hit_tokens: u64,
}

/// A sequence that holds blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningState {
    /// As in the log and in `x-request-id`.
    pub request_id: String,
    pub choice: u32,
    pub priority: i32,
    pub prompt_tokens: u32,
    /// Prompt and output so far.
    pub tokens: u32,
    /// Those whose keys and values are in the cache.
    pub computed_tokens: u32,
    /// Those that were found in the prefix cache.
    pub cached_tokens: u32,
    /// Ids of the blocks that it holds.
    pub blocks: Vec<u32>,
}

/// A sequence that holds none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WaitingState {
    /// As in the log and in `x-request-id`.
    pub request_id: String,
    pub choice: u32,
    pub priority: i32,
    pub prompt_tokens: u32,
    /// Prompt and output so far; more than the prompt only after a preemption.
    pub tokens: u32,
    pub preempted: bool,
    pub waited_seconds: f64,
}
