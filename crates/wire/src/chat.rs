//! `POST /v1/chat/completions`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::common::{CommonFields, MAX_LOGPROBS};
use crate::fields::{FieldError, Fields};
use crate::logprobs::{ChatLogprobs, PromptLogprobs};
use crate::message::{ChatMessage, read_messages};
use crate::unsupported::{Api, refuse_the_rest};
use crate::usage::{FinishReason, StopReason, Usage};

/// What a client asks of a chat.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub common: CommonFields,
    pub messages: Vec<ChatMessage>,
    /// How many alternatives to report per token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// End the prompt with the opening of an assistant's message.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to go on with.
    pub continue_final_message: bool,
    /// Variables for the chat template.
    pub chat_template_kwargs: Map<String, Value>,
}

impl ChatRequest {
    /// # Errors
    /// The first field that is missing, wrong, unknown or not supported.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let messages = fields
            .take("messages")
            .ok_or_else(|| FieldError::missing("messages", "a list of at least one message"))?;
        let (add_generation_prompt, continue_final_message) = prompt_end(&mut fields)?;
        let request = Self {
            messages: read_messages(messages)?,
            common: CommonFields::take(&mut fields)?,
            logprobs: chat_logprobs(&mut fields)?,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs: fields.object("chat_template_kwargs")?.unwrap_or_default(),
        };
        refuse_the_rest(&fields, Api::Chat)?;
        Ok(request)
    }
}

/// How the prompt ends: `add_generation_prompt` and `continue_final_message`.
pub(crate) fn prompt_end(fields: &mut Fields) -> Result<(bool, bool), FieldError> {
    let open_new = fields.boolean("add_generation_prompt")?;
    let continue_last = fields.boolean("continue_final_message")?.unwrap_or(false);
    if continue_last && open_new == Some(true) {
        let message = "continue_final_message and add_generation_prompt exclude each other; give one";
        return Err(FieldError::new("continue_final_message", message));
    }
    Ok((open_new.unwrap_or(!continue_last), continue_last))
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
    pub id: String,
    pub object: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: String,
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
    pub id: String,
    pub object: String,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
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
