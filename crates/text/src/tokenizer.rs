//! `tokenizer.json` behind one type: text to token ids and back.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;

use crate::decoding::Decoding;
use crate::detokenizer::TextStream;
use crate::error::TextError;

/// The special tokens that transformers knows by role, in the order of its `special_tokens_map`.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer: immutable, shared between threads behind an `Arc`.
///
/// Special tokens written out in a text (`<|im_end|>` in a user's message) are encoded as the special token, as
/// transformers and vLLM do.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    decoding: Decoding,
    /// Of the tokens that `skip_special_tokens` leaves out, in order.
    special_ids: Vec<u32>,
    special_tokens: BTreeMap<String, String>,
    vocab_size: usize,
    placeholders: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("decoding", &self.decoding)
            .field("vocab_size", &self.vocab_size)
            .field("placeholders", &self.placeholders)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, for the names of the special tokens, `tokenizer_config.json`.
    ///
    /// Truncation and padding that the file may carry are left from training and switched off. The
    /// `clean_up_tokenization_spaces` of the config is not applied: it changes text that the model wrote.
    ///
    /// Fails with [`TextError::TokenizerFile`] or [`TextError::TokenizerConfig`].
    pub fn from_json(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Tokenizer, TextError> {
        let fault = |reason: String| TextError::TokenizerFile { reason };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(tokenizer_json)).map_err(fault)?;
        inner.with_truncation(None).map_err(|error| fault(error.to_string()))?;
        inner.with_padding(None);
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| fault(error.to_string()))?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let special_tokens = tokenizer_config.map(special_tokens).transpose()?.unwrap_or_default();
        let decoding = Decoding::from_decoder(&decoder);
        let special_ids = special_ids(&inner);
        Ok(Tokenizer { inner, decoding, special_ids, special_tokens, vocab_size, placeholders: false })
    }

    /// For models with drawn weights, whose vocabulary is larger than the tokenizer's: ids up to `vocab_size`
    /// that the tokenizer does not have decode to a short visible text like ` ⟨51234⟩`.
    pub fn with_placeholders(self, vocab_size: usize) -> Tokenizer {
        Tokenizer { vocab_size: self.vocab_size.max(vocab_size), placeholders: true, ..self }
    }

    /// Token ids of a text.
    ///
    /// `add_special_tokens`: whether the post-processor puts its tokens (usually BOS) around the text; false for
    /// a rendered chat template, which has written them itself.
    ///
    /// Cost: O(n log n) in the bytes of the text, about 1 to 5 MB/s on one core; memory about 100 bytes a byte.
    /// A text of a whole context takes tens of milliseconds: not on an async thread.
    ///
    /// Fails with [`TextError::Encode`], for instance on a character that the vocabulary lacks and has no
    /// unknown token for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens))
            .map_err(|reason| TextError::Encode { reason })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids, as `tokenizers` decodes it. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// Fails with [`TextError::UnknownToken`] on an id outside the vocabulary, with [`TextError::Decode`] if the
    /// file's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        let mut foreign = false;
        for &id in ids {
            foreign |= self.stored(id)?.is_none();
        }
        if !foreign {
            return self.decode_known(ids, skip_special_tokens);
        }
        let mut stream = TextStream::new(skip_special_tokens);
        let mut text = String::new();
        for &id in ids {
            text += &stream.push(self, id)?;
        }
        Ok(text + &stream.finish(self))
    }

    /// Text of ids that are all the tokenizer's own.
    pub(crate) fn decode_known(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        guarded(|| self.inner.decode(ids, skip_special_tokens)).map_err(|reason| TextError::Decode { reason })
    }

    /// The text of this token alone, with its leading space, special or not: what OpenAI's log-probabilities
    /// show as `token`. Part of a character is U+FFFD; the bytes are in [`Tokenizer::token_bytes`]. An id outside
    /// the vocabulary is shown as a placeholder.
    pub fn token_text(&self, id: u32) -> String {
        match self.token_bytes(id) {
            Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            None => self.decode(&[id], false).unwrap_or_else(|_| placeholder(id)),
        }
    }

    /// The bytes of this token: OpenAI's `bytes` of a log-probability. `None` for an id outside the vocabulary,
    /// and for decoders where one token has no bytes of its own (neither byte-level nor SentencePiece).
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        match self.stored(id).ok()? {
            Some(token) => self.decoding.bytes(&token),
            None => Some(placeholder(id).into_bytes()),
        }
    }

    /// Largest id of the vocabulary plus one, or the size given to [`Tokenizer::with_placeholders`] if larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The beginning-of-sequence token of the config, such as `<s>`.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token").map(String::as_str)
    }

    /// The end-of-sequence token of the config, such as `</s>`.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }

    /// The id of a token given by its stored form, such as that of [`Tokenizer::eos_token`].
    pub fn special_token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `skip_special_tokens` leaves this id out of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.binary_search(&id).is_ok()
    }

    /// The token as `tokenizer.json` stores it; `None` if a placeholder stands in for it.
    pub(crate) fn stored(&self, id: u32) -> Result<Option<String>, TextError> {
        match self.inner.id_to_token(id) {
            Some(token) => Ok(Some(token)),
            None if self.placeholders && (id as usize) < self.vocab_size => Ok(None),
            None => Err(TextError::UnknownToken { id, vocab_size: self.vocab_size }),
        }
    }

    pub(crate) fn decoding(&self) -> &Decoding {
        &self.decoding
    }
}

fn special_ids(tokenizer: &tokenizers::Tokenizer) -> Vec<u32> {
    let vocabulary = tokenizer.get_added_vocabulary();
    let added = vocabulary.get_added_tokens_decoder().iter();
    let mut ids: Vec<u32> =
        added.filter(|(_, token)| vocabulary.is_special_token(&token.content)).map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids
}

/// The visible text of an id without a token.
pub(crate) fn placeholder(id: u32) -> String {
    format!(" ⟨{id}⟩")
}

/// Reads the special tokens of a `tokenizer_config.json`: role to token. A token is a string or an object with
/// `content`.
pub(crate) fn special_tokens(tokenizer_config: &[u8]) -> Result<BTreeMap<String, String>, TextError> {
    let config = read_config(tokenizer_config)?;
    let token = |role: &&str| {
        let value = config.get(*role)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((role.to_string(), text.to_owned()))
    };
    Ok(ROLES.iter().filter_map(token).collect())
}

/// `tokenizer_config.json` as an object.
pub(crate) fn read_config(tokenizer_config: &[u8]) -> Result<serde_json::Map<String, Value>, TextError> {
    serde_json::from_slice(tokenizer_config)
        .map_err(|error| TextError::TokenizerConfig { reason: error.to_string() })
}

/// Runs code of the tokenizers crate, which panics on some malformed files (a `Strip` decoder longer than a
/// token, for one): a file is not trusted, so a panic in it is an error like any other.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer panicked; its file is malformed".into()),
    }
}
