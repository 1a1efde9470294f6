//! What two processes must agree on: OpenAI types, error envelope, SSE frames, KV events, state snapshot.
//!
//! Requests are read field by field from JSON ([`Fields`]) and not by derived deserialisation: every
//! complaint names the field, what it held and what it may hold, and a field that this server does not
//! implement is refused by name ([`unsupported`]).

pub mod chat;
pub mod common;
pub mod completions;
pub mod conversation;
pub mod error;
pub mod fields;
pub mod kv_events;
pub mod logprobs;
pub mod message;
pub mod models;
pub mod sse;
pub mod state;
pub mod tokenize;
pub mod tokenizer;
pub mod unsupported;
pub mod usage;

pub use chat::{ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatReply, ChatRequest};
pub use common::{CommonFields, StreamOptions};
pub use completions::{Completion, CompletionChoice, CompletionRequest, Prompt};
pub use conversation::Conversation;
pub use error::{ErrorBody, ErrorEnvelope, ErrorType};
pub use fields::{FieldError, Fields};
pub use logprobs::{
    ChatLogprobs, CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob,
};
pub use message::{ChatMessage, Role};
pub use models::{ModelCard, ModelList};
pub use state::{
    BlocksState, ConfigState, DeviceState, EngineState, PrefixCacheState, RunningState, StateSnapshot,
    WaitingState,
};
pub use tokenize::{DetokenizeRequest, Detokenized, TokenizeInput, TokenizeRequest, Tokenized};
pub use tokenizer::{TokenizerFile, TokenizerManifest};
pub use usage::{FinishReason, PromptTokensDetails, StopReason, Usage};
