//! Text on both sides of the model: chat template and tokenizer in, incremental detokenizer and stop strings
//! out.
//!
//! Everything here is plain, synchronous and free of the clock (but for `strftime_now` in a chat template).
//! Rendering and encoding of a long prompt cost milliseconds: callers on an async runtime move them to a
//! blocking thread.
//!
//! What comes from outside (tokenizer.json, tokenizer_config.json, chat templates, messages, token ids) is not
//! trusted: faults come back as a [`TextError`], never as a panic.

mod chat_template;
mod decoding;
mod detokenizer;
mod error;
mod jinja;
mod stop_strings;
mod tokenizer;
mod utf8;

pub use chat_template::{ChatInput, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop_strings::{Fed, StopStrings};
pub use tokenizer::Tokenizer;
