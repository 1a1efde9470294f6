//! `POST /v1/chat/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::common::{CommonFields, MAX_LOGPROBS};
use crate::conversation::Conversation;
use crate::fields::{FieldError, Fields};
use crate::logprobs::{ChatLogprobs, PromptLogprobs};
use crate::unsupported::{Api, refuse_the_rest};
use crate::usage::{FinishReason, StopReason, Usage};

/// What a client asks of a chat.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub common: CommonFields,
    pub conversation: Conversation,
    /// How many alternatives to report per token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
}

impl ChatRequest {
    /// # Errors
    /// The first field that is missing, wrong, unknown or not supported.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let request = Self {
            conversation: Conversation::take(&mut fields)?,
            common: CommonFields::take(&mut fields)?,
            logprobs: chat_logprobs(&mut fields)?,
        };
        refuse_the_rest(&fields, Api::Chat)?;
        Ok(request)
    }
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<u32>, FieldError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(FieldError::new("top_logprobs", "top_logprobs is only allowed with \"logprobs\": true"))
        }
    }
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    pub id: Arc<str>,
    pub object: Cow<'static, str>,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: Arc<str>,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    pub index: u32,
    pub message: ChatReply,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: FinishReason,
    pub stop_reason: Option<StopReason>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatReply {
    pub role: String,
    pub content: String,
    pub refusal: Option<String>,
}

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    pub id: Arc<str>,
    pub object: Cow<'static, str>,
    pub created: u64,
    pub model: Arc<str>,
    pub system_fingerprint: Arc<str>,
    pub choices: Vec<ChatChunkChoice>,
    /// Absent unless the client asked for usage; null in all chunks but the last, or in none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunkChoice {
    pub index: u32,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<FinishReason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatDelta {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
