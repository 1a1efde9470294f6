//! `POST /v1/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::common::{CommonFields, MAX_LOGPROBS};
use crate::fields::{FieldError, Fields, token_ids};
use crate::logprobs::{CompletionLogprobs, PromptLogprobs};
use crate::unsupported::{Api, refuse_the_rest};
use crate::usage::{FinishReason, StopReason, Usage};

/// Prompts of one request; each takes a place in the queue.
pub const MAX_PROMPTS: usize = 256;

/// What a client asks of a text completion.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    pub common: CommonFields,
    /// At least one. Choice `i * n + j` is the `j`th continuation of prompt `i`.
    pub prompts: Vec<Prompt>,
    /// How many alternatives to report per token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// Repeat the prompt before the answer.
    pub echo: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl CompletionRequest {
    /// # Errors
    /// The first field that is missing, wrong, unknown or not supported.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let prompt = fields.take("prompt").ok_or_else(|| FieldError::missing("prompt", PROMPT))?;
        let request = Self {
            prompts: read_prompts(prompt)?,
            common: CommonFields::take(&mut fields)?,
            logprobs: fields.count("logprobs", 0..=MAX_LOGPROBS)?,
            echo: fields.boolean("echo")?.unwrap_or(false),
        };
        refuse_the_rest(&fields, Api::Completions)?;
        if request.echo && request.common.stream.is_some() && request.logprobs.is_some() {
            let message = "echo with logprobs cannot be streamed; leave out stream, echo or logprobs";
            return Err(FieldError::new("echo", message));
        }
        Ok(request)
    }
}

const PROMPT: &str = "a string, a list of strings, a list of token ids, or a list of lists of token ids";

/// Reads the field `prompt`.
///
/// # Errors
/// If it is none of what it may be.
pub fn read_prompts(value: Value) -> Result<Vec<Prompt>, FieldError> {
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(items) if items.is_empty() => {
            Err(FieldError::new("prompt", "prompt is an empty list; give at least one prompt"))
        }
        Value::Array(items) if items[0].is_number() => {
            Ok(vec![Prompt::Tokens(token_ids(Value::Array(items), "prompt", usize::MAX)?)])
        }
        Value::Array(items) if items.len() > MAX_PROMPTS => Err(FieldError::new(
            "prompt",
            format!("prompt has {} prompts; at most {MAX_PROMPTS} are allowed", items.len()),
        )),
        Value::Array(items) => items.into_iter().enumerate().map(|(at, item)| one(item, at)).collect(),
        other => Err(FieldError::wanted("prompt", PROMPT, &other)),
    }
}

fn one(value: Value, at: usize) -> Result<Prompt, FieldError> {
    let path = format!("prompt[{at}]");
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        ids @ Value::Array(_) => Ok(Prompt::Tokens(token_ids(ids, &path, usize::MAX)?)),
        other => Err(FieldError::wanted(path, "a string or a list of token ids", &other)),
    }
}

/// The whole answer, or, when streamed, a piece of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    pub id: Arc<str>,
    pub object: Cow<'static, str>,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: Arc<str>,
    pub choices: Vec<CompletionChoice>,
    pub system_fingerprint: Arc<str>,
    /// Absent from the chunks of a stream unless the client asked for it; then null in all but the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompletionChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<FinishReason>,
    pub stop_reason: Option<StopReason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
}
