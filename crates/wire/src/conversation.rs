//! A conversation as a request carries it: what `chat/completions` and `tokenize` make a prompt of, and a router the
//! same one.

use serde_json::{Map, Value};

use crate::fields::{FieldError, Fields};
use crate::message::{ChatMessage, read_messages};

/// Messages and how they become a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// At least one.
    pub messages: Vec<ChatMessage>,
    /// End the prompt with the opening of an assistant's message.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to go on with.
    pub continue_final_message: bool,
    /// Variables for the chat template.
    pub chat_template_kwargs: Map<String, Value>,
}

impl Conversation {
    /// Takes its fields out of a request's.
    ///
    /// # Errors
    /// The first of them that is missing or wrong.
    pub fn take(fields: &mut Fields) -> Result<Self, FieldError> {
        let messages = fields
            .take("messages")
            .ok_or_else(|| FieldError::missing("messages", "a list of at least one message"))?;
        let (add_generation_prompt, continue_final_message) = prompt_end(fields)?;
        Ok(Self {
            messages: read_messages(messages)?,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs: fields.object("chat_template_kwargs")?.unwrap_or_default(),
        })
    }
}

/// How the prompt ends: `add_generation_prompt` and `continue_final_message`.
fn prompt_end(fields: &mut Fields) -> Result<(bool, bool), FieldError> {
    let open_new = fields.boolean("add_generation_prompt")?;
    let continue_last = fields.boolean("continue_final_message")?.unwrap_or(false);
    if continue_last && open_new == Some(true) {
        let message = "continue_final_message and add_generation_prompt exclude each other; give one";
        return Err(FieldError::new("continue_final_message", message));
    }
    Ok((open_new.unwrap_or(!continue_last), continue_last))
}
