//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::conversation::Conversation;
use crate::fields::{FieldError, Fields, token_ids};
use crate::unsupported::{Api, refuse_the_rest};

/// Text to turn into token ids.
#[derive(Clone, Debug)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub input: TokenizeInput,
    pub add_special_tokens: bool,
    pub return_token_strs: bool,
}

#[derive(Clone, Debug)]
pub enum TokenizeInput {
    Prompt(String),
    Chat(Conversation),
}

impl TokenizeRequest {
    /// # Errors
    /// The first field that is missing, wrong, unknown or not supported.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let model = fields.string("model")?;
        let return_token_strs = fields.boolean("return_token_strs")?.unwrap_or(false);
        let special = fields.boolean("add_special_tokens")?;
        let (input, default_special) = match (fields.string("prompt")?, fields.has("messages")) {
            (Some(prompt), false) => (TokenizeInput::Prompt(prompt), true),
            (None, true) => (TokenizeInput::Chat(Conversation::take(&mut fields)?), false),
            (Some(_), true) => {
                return Err(FieldError::new("prompt", "prompt and messages exclude each other; give one"));
            }
            (None, false) => return Err(FieldError::missing("prompt", "give prompt or messages")),
        };
        refuse_the_rest(&fields, Api::Tokenize)?;
        Ok(Self { model, input, add_special_tokens: special.unwrap_or(default_special), return_token_strs })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokenized {
    pub count: usize,
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

/// Token ids to turn into text.
#[derive(Clone, Debug)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// # Errors
    /// The first field that is missing, wrong or unknown.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let model = fields.string("model")?;
        let tokens = fields.take("tokens").ok_or_else(|| FieldError::missing("tokens", "a list of ids"))?;
        let tokens = token_ids(tokens, "tokens", usize::MAX)?;
        fields.none_left()?;
        Ok(Self { model, tokens })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detokenized {
    pub prompt: String,
}
