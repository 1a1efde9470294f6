//! What a step tells its caller.

use crate::request::{FinishReason, RequestId, TokenId};
use crate::runner::{RunnerError, TokenLogprobs};

/// Something that happened to a request in a step, in the order it happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request left the queue; `cached_tokens` of its prompt were found in the prefix cache.
    /// Comes again after a preemption.
    Scheduled {
        request: RequestId,
        cached_tokens: u32,
    },
    /// One entry per prompt token; the first is `None`. Comes before the first token.
    PromptLogprobs {
        request: RequestId,
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    Token {
        request: RequestId,
        choice: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
    /// The choice lost its blocks and waits to be computed again. Choices that have not yet forked
    /// from the first one are not listed.
    Preempted {
        request: RequestId,
        choice: u32,
    },
    /// The last event of a choice. A request has ended when all its choices have.
    Finished {
        request: RequestId,
        choice: u32,
        reason: FinishReason,
    },
}

impl Event {
    pub fn request(&self) -> RequestId {
        match self {
            Event::Scheduled { request, .. }
            | Event::PromptLogprobs { request, .. }
            | Event::Token { request, .. }
            | Event::Preempted { request, .. }
            | Event::Finished { request, .. } => *request,
        }
    }
}

/// What one step did.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    pub events: Vec<Event>,
    /// Tokens computed: prompt tokens (and recomputed ones) and decoded ones. A step that failed
    /// computed none.
    pub prefill_tokens: u32,
    pub decode_tokens: u32,
    /// Sequences that took part in the step.
    pub sequences: u32,
    /// Why the runner failed, if it did; the requests of the step have ended with an error.
    pub error: Option<RunnerError>,
    /// Set when the runner can compute no more; all requests have ended with an error.
    pub fatal: Option<RunnerError>,
}
