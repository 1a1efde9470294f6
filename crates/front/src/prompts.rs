//! From what a request says to token ids: the one way of the replica that computes them and of the router that looks
//! for whoever has computed them before.
//!
//! Everything here takes milliseconds for a long prompt; callers move it off the async threads.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;
use servelab_text::{ChatInput, ChatTemplate, TextError, Tokenizer};
use servelab_wire::{Conversation, TokenizeInput, TokenizeRequest};
use xxhash_rust::xxh3::Xxh3;

/// The names of the files, in the order in which [`TextFiles::revision`] reads them.
pub const FILE_NAMES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// What a model brings for its text, not parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFiles {
    /// tokenizer.json; its post-processor says which special tokens go around a text.
    pub tokenizer: Bytes,
    /// tokenizer_config.json: the special tokens by role, and often the chat template.
    pub tokenizer_config: Option<Bytes>,
    /// chat_template.jinja; goes before the config's.
    pub chat_template: Option<Bytes>,
}

impl TextFiles {
    /// Those that are there, by name.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, &Bytes)> {
        let all = [Some(&self.tokenizer), self.tokenizer_config.as_ref(), self.chat_template.as_ref()];
        FILE_NAMES.into_iter().zip(all).filter_map(|(name, file)| Some((name, file?)))
    }

    /// The place of a file of that name. `None` for a name that is none of [`FILE_NAMES`].
    pub fn put(&mut self, name: &str, content: Bytes) -> Option<()> {
        match FILE_NAMES.iter().position(|known| *known == name)? {
            0 => self.tokenizer = content,
            1 => self.tokenizer_config = Some(content),
            _ => self.chat_template = Some(content),
        }
        Some(())
    }

    /// A hash over names and contents: the same for the same files, in every process.
    pub fn revision(&self) -> u128 {
        let mut hasher = Xxh3::new();
        for (name, content) in self.list() {
            hasher.update(name.as_bytes());
            hasher.update(&(content.len() as u64).to_le_bytes());
            hasher.update(content);
        }
        hasher.digest128()
    }
}

/// A prompt as token ids, and the text that it stands for.
#[derive(Clone, Debug)]
pub struct TokenisedPrompt {
    pub tokens: Arc<[u32]>,
    /// Needed only for `echo`.
    pub text: String,
}

/// Why a request makes no prompt.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PromptError {
    #[error("this model has no chat template, so that it cannot chat; use /v1/completions")]
    NoChatTemplate,
    #[error(transparent)]
    Text(#[from] TextError),
    /// A fault of this program.
    #[error("the messages cannot be written as JSON: {0}")]
    Messages(String),
}

/// Tokenizer and chat template of a model.
#[derive(Debug)]
pub struct Prompter {
    pub tokenizer: Arc<Tokenizer>,
    /// Without one, there is no chat.
    pub chat_template: Option<Arc<ChatTemplate>>,
}

impl Prompter {
    /// # Errors
    /// If a file cannot be read.
    pub fn new(files: &TextFiles) -> Result<Self, TextError> {
        let config = files.tokenizer_config.as_deref();
        let template = files.chat_template.as_deref().map(String::from_utf8_lossy);
        Ok(Self {
            tokenizer: Arc::new(Tokenizer::from_json(&files.tokenizer, config)?),
            chat_template: ChatTemplate::from_files(config, template.as_deref())?.map(Arc::new),
        })
    }

    /// The prompt of a conversation. `add_special_tokens`: rarely, since the template has written them itself.
    ///
    /// # Errors
    /// If there is no template, or the template or the tokenizer refuses the messages.
    pub fn chat(
        &self,
        chat: &Conversation,
        tools: Option<&[Value]>,
        add_special_tokens: bool,
    ) -> Result<TokenisedPrompt, PromptError> {
        let template = self.chat_template.as_ref().ok_or(PromptError::NoChatTemplate)?;
        let messages: Result<Vec<_>, _> = chat.messages.iter().map(serde_json::to_value).collect();
        let text = template.render(&ChatInput {
            messages: &messages.map_err(|error| PromptError::Messages(error.to_string()))?,
            tools,
            documents: None,
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            extra: &chat.chat_template_kwargs,
        })?;
        self.text(text, add_special_tokens)
    }

    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn text(&self, text: String, add_special_tokens: bool) -> Result<TokenisedPrompt, PromptError> {
        let tokens = self.tokenizer.encode(&text, add_special_tokens)?.into();
        Ok(TokenisedPrompt { tokens, text })
    }

    /// What `/tokenize` answers.
    ///
    /// # Errors
    /// As [`Prompter::chat`].
    pub fn tokenize(&self, request: TokenizeRequest) -> Result<TokenisedPrompt, PromptError> {
        match request.input {
            TokenizeInput::Prompt(text) => self.text(text, request.add_special_tokens),
            TokenizeInput::Chat(chat) => self.chat(&chat, None, request.add_special_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_changes_with_every_file_and_with_nothing_else() {
        let mut files = TextFiles { tokenizer: Bytes::from_static(b"{}"), ..TextFiles::default() };
        let mut seen = vec![files.revision()];
        for (name, content) in
            [("tokenizer_config.json", "{}"), ("chat_template.jinja", "{{ 1 }}"), ("tokenizer.json", "{ }")]
        {
            files.put(name, Bytes::from_static(content.as_bytes())).unwrap();
            assert_eq!(files.revision(), files.clone().revision());
            seen.push(files.revision());
        }
        assert_eq!(files.put("../passwords", Bytes::new()), None);
        let names: Vec<_> = files.list().map(|(name, _)| name).collect();
        assert_eq!(names, FILE_NAMES);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 4);
    }
}
