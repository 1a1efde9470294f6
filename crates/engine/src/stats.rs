//! Plain data about the engine for metrics and for the live page.

use crate::block_pool::BlockId;
use crate::request::{RequestId, Timestamp};

/// Gauges and counters, cheap to read after every step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences that run.
    pub running: u32,
    /// Requests that wait, preempted ones among them (each preempted choice counts).
    pub waiting: u32,
    pub blocks_total: u32,
    /// Blocks that a sequence holds.
    pub blocks_held: u32,
    /// Blocks that nobody holds and whose content can still be reused.
    pub blocks_cached: u32,
    pub blocks_free: u32,
    /// Prompt tokens looked up in the prefix cache, counted since the start and once per request,
    /// when it is first scheduled. Recomputation after a preemption counts neither here nor as a
    /// hit, so that preemptions do not flatter the hit rate. Requests that may not read the cache
    /// (they want log-probabilities of the prompt) do not count.
    pub prefix_query_tokens: u64,
    /// Those of them that were found.
    pub prefix_hit_tokens: u64,
    /// Counted since the start.
    pub preemptions: u64,
}

/// The state of the engine at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineSnapshot {
    /// Steps that ran the model so far.
    pub steps: u64,
    /// The caller's clock at the last step.
    pub now: Timestamp,
    /// In order of precedence.
    pub running: Vec<RunningSequence>,
    /// In the order in which they will be admitted.
    pub waiting: Vec<WaitingSequence>,
    /// One byte a block: 0 is free, 1 is cached, 1 + r is held by r sequences (at most 254 shown).
    pub blocks: Vec<u8>,
}

/// A sequence that holds blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningSequence {
    pub request: RequestId,
    pub choice: u32,
    pub priority: i32,
    pub prompt_tokens: u32,
    /// Prompt and output so far.
    pub tokens: u32,
    /// Those whose keys and values are in the cache.
    pub computed: u32,
    /// Those that were found in the prefix cache.
    pub cached: u32,
    pub blocks: Vec<BlockId>,
}

/// A sequence that holds none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingSequence {
    pub request: RequestId,
    pub choice: u32,
    pub priority: i32,
    pub prompt_tokens: u32,
    /// Prompt and output so far; more than the prompt only after a preemption.
    pub tokens: u32,
    pub preempted: bool,
    pub arrival: Timestamp,
}
