//! What a client asked for, as the engine sees it: token ids and numbers, no text.

use std::sync::Arc;
use std::time::Duration;

/// An entry of the model's vocabulary.
pub type TokenId = u32;

/// A point in time as the caller's clock tells it, counted from any fixed origin.
/// The engine never reads a clock, so that it runs the same in real and in virtual time.
pub type Timestamp = Duration;

/// One request of a client. Chosen by the caller, unique among the requests that are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What a client asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    /// Token ids of the prompt; at least one.
    pub prompt: Arc<[TokenId]>,
    /// How many independent continuations are wanted; at least one.
    pub n: u32,
    pub sampling: Arc<SamplingParams>,
    pub stop: StopConditions,
    /// Smaller is served first; requests of equal priority are served first come, first served.
    pub priority: i32,
    /// Mixed into every block hash of the request: requests of different salts never share KV blocks.
    pub cache_salt: u64,
    /// When the request entered the queue.
    pub arrival: Timestamp,
}

/// How the next token is chosen from the logits. All values are validated by the front end.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 picks the likeliest token (greedy); otherwise the logits are divided by it.
    pub temperature: f32,
    /// Keep only the `k` likeliest tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keep the smallest set of likeliest tokens whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest one; in [0, 1].
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Logits of tokens seen in prompt or output are divided (positive) or multiplied (negative)
    /// by this; 1 is off. (Keskar et al. 2019, CTRL, section 4.1)
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// With the choice's index and the output position this fixes every random draw.
    pub seed: u64,
    /// Report the chosen token's natural-log probability and that many likeliest alternatives.
    pub logprobs: Option<u32>,
    /// The same for every prompt token after the first.
    pub prompt_logprobs: Option<u32>,
}

impl SamplingParams {
    /// Greedy decoding without any modification of the logits.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// Whether the sampler has to know which tokens the sequence already holds.
    pub fn needs_history(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// When a sequence ends by itself.
#[derive(Clone, Debug)]
pub struct StopConditions {
    /// Most tokens generated per choice; at least one.
    pub max_tokens: u32,
    /// No stop token may be chosen before that many tokens were generated.
    pub min_tokens: u32,
    /// Tokens that end the sequence: the model's end-of-sequence tokens (unless the client asked to
    /// ignore them) and the client's own. The stop token itself is reported as generated.
    pub stop_token_ids: Arc<[TokenId]>,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated, or the caller found a stop string (`None`).
    Stop(Option<TokenId>),
    /// `max_tokens` were generated.
    Length,
    /// The caller gave the request up.
    Abort,
    /// The model failed in a step that this sequence was part of.
    Error(String),
}
