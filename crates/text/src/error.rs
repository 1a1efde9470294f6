//! What can go wrong with text, with the operands.

/// A fault of a tokenizer, a chat template or the text given to them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` cannot be read.
    #[error("tokenizer.json cannot be read: {reason}; give the file that tokenizers or transformers saved")]
    TokenizerFile {
        /// What the reader says.
        reason: String,
    },
    /// `tokenizer_config.json` cannot be read.
    #[error(
        "tokenizer_config.json cannot be read: {reason}; it must be a JSON object as transformers saves it"
    )]
    TokenizerConfig {
        /// What the reader says.
        reason: String,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is not in the vocabulary; ids run from 0 to {}", vocab_size.saturating_sub(1))]
    UnknownToken {
        /// The id that was given.
        id: u32,
        /// Largest id of the vocabulary plus one.
        vocab_size: usize,
    },
    /// The tokenizer failed on a text.
    #[error("the text cannot be tokenised: {reason}")]
    Encode {
        /// What the tokenizer says.
        reason: String,
    },
    /// The tokenizer failed on token ids.
    #[error("the token ids cannot be decoded: {reason}")]
    Decode {
        /// What the tokenizer says.
        reason: String,
    },
    /// An empty stop string: it would match before the first token.
    #[error("stop[{index}] is empty; a stop string needs at least one character: leave it out")]
    EmptyStop {
        /// Place in the list of stop strings.
        index: usize,
    },
    /// The chat template is no valid Jinja, or uses something that is not implemented.
    #[error("the chat template cannot be compiled: {reason}; repair the model's chat_template")]
    TemplateSyntax {
        /// What the template engine says, with the line.
        reason: String,
    },
    /// The template called `raise_exception`: it refuses this conversation.
    #[error("the chat template refuses these messages: {message}")]
    TemplateRefused {
        /// The text that the template gave.
        message: String,
    },
    /// The template failed on this conversation, for instance on a field that a message lacks.
    #[error("the chat template failed on these messages: {reason}")]
    TemplateRender {
        /// What the template engine says, with the line.
        reason: String,
    },
    /// The template used more instructions, memory, output or nesting than a chat can need.
    #[error(
        "the chat template exceeds its limit of {limit}; shorten the conversation or repair the template"
    )]
    TemplateLimit {
        /// Which limit, with its value.
        limit: String,
    },
    /// A list of named templates without one called `default`.
    #[error("the model has chat templates named {names:?} but none named `default`; add one")]
    NoDefaultTemplate {
        /// The names that are there.
        names: Vec<String>,
    },
    /// `continue_final_message` cannot be done for this conversation.
    #[error("continue_final_message: {reason}")]
    ContinueFinalMessage {
        /// Why not, and what to do.
        reason: String,
    },
    /// A request's messages, tools or documents have the wrong shape.
    #[error("{what} must be {expected}")]
    ChatInput {
        /// The field.
        what: String,
        /// What is allowed there.
        expected: &'static str,
    },
}

impl TextError {
    /// Whether the request is at fault (HTTP 400) and not the model's files (HTTP 500, or no start at all).
    ///
    /// A template that fails while it renders counts as the request's fault: with valid templates that is what
    /// it is, a message without a field that the template reads.
    pub fn is_request_fault(&self) -> bool {
        !matches!(
            self,
            TextError::TokenizerFile { .. }
                | TextError::TokenizerConfig { .. }
                | TextError::TemplateSyntax { .. }
                | TextError::NoDefaultTemplate { .. }
        )
    }
}
