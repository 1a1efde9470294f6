//! Sequences, scheduler, block pool and prefix cache: plain data, no IO, no clock, no text.
//!
//! Start at [`Engine::step`]: plan (`scheduler.rs`), run (whatever implements [`ModelRunner`]),
//! apply (`scheduler.rs`).

mod admission;
pub mod block_hash;
pub mod block_pool;
mod config;
pub mod engine;
mod event;
pub mod fake_runner;
mod kv_event;
pub mod request;
pub mod runner;
mod scheduler;
mod sequence;
mod stats;
mod step;
mod trace;

pub use block_hash::{BlockHash, HashChain, block_hash, hash_blocks};
pub use block_pool::{BlockId, BlockPool};
pub use engine::{
    AdmissionError, ConfigError, Engine, EngineConfig, EngineSnapshot, EngineStats, Event, RunningSequence,
    StepReport, StepTrace, WaitingSequence,
};
pub use fake_runner::FakeRunner;
pub use kv_event::{KvEvent, StoredBlock};
pub use request::{FinishReason, Request, RequestId, SamplingParams, StopConditions, Timestamp, TokenId};
pub use runner::{
    Draw, FromLast, History, LogitsRow, ModelRunner, RowOutput, RunnerError, SequenceId, Step, StepOutput,
    StepSequence, Submitted, TokenLogprobs, Want,
};

#[cfg(test)]
mod tests;
