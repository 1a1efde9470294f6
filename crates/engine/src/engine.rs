//! Plan, run, apply.

use crate::request::{FinishReason, RequestId, Timestamp, TokenId};
use crate::runner::{ModelRunner, RunnerError, TokenLogprobs};

/// Sizes and limits of one engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens per KV block; a power of two.
    pub block_size: u32,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_model_len: u32,
    /// Most tokens computed in one step.
    pub max_batched_tokens: u32,
    /// Most sequences that run at once.
    pub max_running: u32,
    /// Most requests that wait at once.
    pub max_waiting: u32,
    /// Keep the blocks of ended sequences and reuse them for equal prefixes.
    pub prefix_cache: bool,
}

/// Why a request was not taken. Nothing of it remains in the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    #[error("n {n} exceeds the {max_running} sequences that run at once; lower n to {max_running} or less")]
    TooManyChoices { n: u32, max_running: u32 },
    #[error(
        "max_tokens {max_tokens} + prompt {prompt} exceeds the context length {max_model_len}; {}",
        advice_for_context(*prompt, *max_model_len)
    )]
    ContextLength { prompt: u32, max_tokens: u32, max_model_len: u32 },
    #[error(
        "the request needs {needed} KV blocks and the pool has {num_blocks}; shorten the prompt, lower \
         max_tokens or n, or start the server with more KV memory"
    )]
    NeverFits { needed: u32, num_blocks: u32 },
    #[error("{max_waiting} requests are already waiting; try again later")]
    QueueFull { max_waiting: u32 },
    #[error("request id {0:?} is already in use")]
    DuplicateId(RequestId),
}

fn advice_for_context(prompt: u32, max_model_len: u32) -> String {
    match max_model_len.saturating_sub(prompt) {
        0 => format!("shorten the prompt to {} tokens or less", max_model_len.saturating_sub(1)),
        room => format!("lower max_tokens to {room} or less"),
    }
}

/// Something that happened to a request in a step, in the order it happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request left the queue; `cached_tokens` of its prompt were found in the prefix cache.
    /// Comes again after a preemption.
    Scheduled { request: RequestId, cached_tokens: u32 },
    /// One entry per prompt token; the first is `None`. Comes before the first token.
    PromptLogprobs { request: RequestId, logprobs: Vec<Option<TokenLogprobs>> },
    Token { request: RequestId, choice: u32, token: TokenId, logprobs: Option<TokenLogprobs> },
    /// The choice lost its blocks and waits to be computed again.
    Preempted { request: RequestId, choice: u32 },
    /// The last event of a choice. A request has ended when all its choices have.
    Finished { request: RequestId, choice: u32, reason: FinishReason },
}

/// What one step did.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    pub events: Vec<Event>,
    /// Tokens computed: prompt tokens (and recomputed ones) and decoded ones.
    pub prefill_tokens: u32,
    pub decode_tokens: u32,
    /// Set when the runner can compute no more; the requests of the step have ended with an error.
    pub fatal: Option<RunnerError>,
}

/// Gauges and counters, cheap to read after every step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences that run.
    pub running: u32,
    /// Requests that wait, preempted ones among them.
    pub waiting: u32,
    pub blocks_total: u32,
    /// Blocks that a sequence holds.
    pub blocks_held: u32,
    /// Blocks that nobody holds and whose content can still be reused.
    pub blocks_cached: u32,
    pub blocks_free: u32,
    /// Counted since the start, in tokens.
    pub prefix_query_tokens: u64,
    pub prefix_hit_tokens: u64,
    /// Counted since the start.
    pub preemptions: u64,
}

/// The scheduler, the block pool and the prefix cache around a [`ModelRunner`].
pub struct Engine<R> {
    runner: R,
}

impl<R: ModelRunner> Engine<R> {
    /// One pass: plan what to compute, run it, apply the outcome.
    pub fn step(&mut self, _now: Timestamp) -> StepReport {
        let _ = &mut self.runner;
        StepReport::default()
    }
}
