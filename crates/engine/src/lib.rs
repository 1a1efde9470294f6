//! Sequences, scheduler, block pool and prefix cache: plain data, no IO, no clock, no text.

pub mod block_pool;
pub mod engine;
pub mod request;
pub mod runner;

pub use block_pool::BlockId;
pub use engine::{AdmissionError, Engine, EngineConfig, EngineStats, Event, StepReport};
pub use request::{FinishReason, Request, RequestId, SamplingParams, StopConditions, Timestamp, TokenId};
pub use runner::{
    Draw, History, LogitsRow, ModelRunner, RowOutput, RunnerError, SequenceId, Step, StepOutput,
    StepSequence, TokenLogprobs, Want,
};
