//! Text of a growing sequence of tokens, piece by piece.

use std::sync::Arc;

use crate::decoding::Decoding;
use crate::error::TextError;
use crate::tokenizer::{Tokenizer, placeholder};
use crate::utf8::Utf8Stream;

/// Tokens of the prompt that are looked at: enough for any incomplete character and for the spacing.
const PROMPT_TAIL_TOKENS: usize = 8;

/// Tokens that the window of a whole-sequence decoder may hold back before it gives out what it has.
const WINDOW_TOKENS: usize = 16;

/// Text of generated tokens, in pieces that never change later.
///
/// The pieces together are the text that [`Tokenizer::decode`] gives for prompt and generated tokens, less the
/// prompt's. No piece ends within a character, no space is lost or added at a seam. A token costs amortised O(1).
///
/// One difference from `decode`, for SentencePiece with byte fallback: there a run of byte tokens that is not
/// valid UTF-8 as a whole decodes to one U+FFFD per byte, valid characters in it included. That cannot be known
/// before the run ends, so here only the invalid parts become U+FFFD.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stream: TextStream,
}

impl Detokenizer {
    /// `prompt_tail`: the last tokens of the prompt (the whole prompt will do, 8 suffice; an empty slice only
    /// if there is no prompt): the first generated token keeps its space after a prompt, and completes a
    /// character that the prompt left open. Ids outside the vocabulary are passed over here.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_tail: &[u32], skip_special_tokens: bool) -> Detokenizer {
        let mut stream = TextStream::new(skip_special_tokens);
        for &id in &prompt_tail[prompt_tail.len().saturating_sub(PROMPT_TAIL_TOKENS)..] {
            // What the prompt says is known to the client; only the state that it leaves counts.
            let _prompt_text = stream.push(&tokenizer, id);
        }
        Detokenizer { tokenizer, stream }
    }

    /// Takes the next token; the text that is now final, often that of the token, possibly empty.
    ///
    /// Fails with [`TextError::UnknownToken`] on an id outside the vocabulary; the state is then unchanged.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.stream.push(&self.tokenizer, id)
    }

    /// The text still held back, now that no more tokens come: an incomplete character as U+FFFD.
    pub fn finish(&mut self) -> String {
        self.stream.finish(&self.tokenizer)
    }
}

/// The state of a [`Detokenizer`], for a tokenizer that the caller holds.
#[derive(Debug)]
pub(crate) struct TextStream {
    skip_special_tokens: bool,
    bytes: Utf8Stream,
    /// No token has given text yet: the place where a prefix space may be dropped.
    at_start: bool,
    window: Window,
}

impl TextStream {
    pub(crate) fn new(skip_special_tokens: bool) -> TextStream {
        TextStream {
            skip_special_tokens,
            bytes: Utf8Stream::default(),
            at_start: true,
            window: Window::default(),
        }
    }

    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        let Some(token) = tokenizer.stored(id)? else {
            let held = self.finish(tokenizer);
            self.at_start = false;
            return Ok(held + &placeholder(id));
        };
        if self.skip_special_tokens && tokenizer.is_special(id) {
            return Ok(String::new());
        }
        match (tokenizer.decoding(), tokenizer.decoding().bytes(&token)) {
            (Decoding::Metaspace { replacement, strip_first_token: true }, Some(_)) if self.at_start => {
                self.at_start = false;
                Ok(token.replace(*replacement, ""))
            }
            (Decoding::Pieces { strip_first_space: true }, Some(bytes)) => {
                let text = self.bytes.push(&bytes);
                Ok(self.without_first_space(text))
            }
            (_, Some(bytes)) => Ok(self.bytes.push(&bytes)),
            (_, None) => self.window.push(tokenizer, id),
        }
    }

    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let rest = self.bytes.finish();
        rest + &self.window.finish(tokenizer)
    }

    fn without_first_space(&mut self, mut text: String) -> String {
        if self.at_start && !text.is_empty() {
            self.at_start = false;
            if text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }
}

/// For decoders that only know whole sequences: decodes the last few tokens twice, with and without the new one,
/// and emits the difference. This is the `prefix_offset` and `read_offset` technique of Hugging Face TGI
/// (`decode_token`, server/text_generation_server/models/model.py) and vLLM (`detokenize_incrementally`).
#[derive(Debug, Default)]
struct Window {
    /// Tokens from `prefix_offset` on; the ones before can no longer change the text.
    ids: Vec<u32>,
    /// How many of `ids` have been emitted: TGI's `read_offset` less its `prefix_offset`.
    read: usize,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let (before, after) = self.texts(tokenizer)?;
        let incomplete =
            after.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.read < WINDOW_TOKENS;
        if incomplete {
            return Ok(String::new());
        }
        let text = new_text(&before, &after);
        if !text.is_empty() || self.ids.len() > WINDOW_TOKENS {
            self.ids.drain(..self.read);
            self.read = self.ids.len();
        }
        Ok(text)
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        // Tokens that were pushed have decoded before: an error cannot arise here, and if it did, the text
        // emitted so far stands.
        let text = self.texts(tokenizer).map(|(before, after)| new_text(&before, &after)).unwrap_or_default();
        self.read = self.ids.len();
        text
    }

    fn texts(&self, tokenizer: &Tokenizer) -> Result<(String, String), TextError> {
        // Special tokens to be skipped never get here.
        let before = tokenizer.decode_known(&self.ids[..self.read], false)?;
        Ok((before, tokenizer.decode_known(&self.ids, false)?))
    }
}

/// What `after` has beyond `before`. A decoder may rewrite its last character when more comes; what was emitted
/// stays, and only characters beyond it count.
fn new_text(before: &str, after: &str) -> String {
    match after.strip_prefix(before) {
        Some(rest) => rest.to_owned(),
        None => after.chars().skip(before.chars().count()).collect(),
    }
}
