//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat::prompt_end;
use crate::fields::{FieldError, Fields, token_ids};
use crate::message::{ChatMessage, read_messages};
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
    Messages {
        messages: Vec<ChatMessage>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Map<String, Value>,
    },
}

impl TokenizeRequest {
    /// # Errors
    /// The first field that is missing, wrong, unknown or not supported.
    pub fn read(body: Value) -> Result<Self, FieldError> {
        let mut fields = Fields::of_body(body)?;
        let model = fields.string("model")?;
        let return_token_strs = fields.boolean("return_token_strs")?.unwrap_or(false);
        let special = fields.boolean("add_special_tokens")?;
        let (input, default_special) = match (fields.string("prompt")?, fields.take("messages")) {
            (Some(prompt), None) => (TokenizeInput::Prompt(prompt), true),
            (None, Some(messages)) => (Self::chat(&mut fields, messages)?, false),
            (Some(_), Some(_)) => {
                return Err(FieldError::new("prompt", "prompt and messages exclude each other; give one"));
            }
            (None, None) => return Err(FieldError::missing("prompt", "give prompt or messages")),
        };
        refuse_the_rest(&fields, Api::Tokenize)?;
        Ok(Self { model, input, add_special_tokens: special.unwrap_or(default_special), return_token_strs })
    }

    fn chat(fields: &mut Fields, messages: Value) -> Result<TokenizeInput, FieldError> {
        let (add_generation_prompt, continue_final_message) = prompt_end(fields)?;
        Ok(TokenizeInput::Messages {
            messages: read_messages(messages)?,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs: fields.object("chat_template_kwargs")?.unwrap_or_default(),
        })
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
