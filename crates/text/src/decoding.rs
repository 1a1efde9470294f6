//! How a token's stored form becomes text: the decoder of `tokenizer.json`, as bytes of one token at a time.

use std::sync::LazyLock;

use serde_json::Value;

/// The decoders that turn each token into bytes on its own, whatever stands beside it.
///
/// The Llama, Mistral and Qwen families use one of the first three. Text is then the UTF-8 reading of the bytes
/// of all tokens, which can be done incrementally without decoding anything twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Each character stands for one byte (GPT-2's table): Llama 3, Qwen, Mistral's tekken.
    ByteLevel,
    /// SentencePiece with byte fallback: `▁` is a space, `<0x0A>` a byte: Llama 2, Mistral, Gemma.
    Pieces {
        /// Whether one leading space of the whole text is dropped: the tokenizer put it there.
        strip_first_space: bool,
    },
    /// SentencePiece without bytes: the replacement character is a space, and nothing in the first token.
    Metaspace {
        /// Usually `▁`.
        replacement: char,
        /// Whether the first token loses its replacement characters.
        strip_first_token: bool,
    },
    /// Anything else (WordPiece, none, ...): only whole sequences can be decoded.
    Sequence,
}

impl Decoding {
    /// Recognises the decoder from its JSON form as `tokenizers` writes it.
    pub(crate) fn from_decoder(decoder: &Value) -> Decoding {
        let kind = |value: &Value| value["type"].as_str().unwrap_or_default().to_owned();
        match kind(decoder).as_str() {
            "ByteLevel" => Decoding::ByteLevel,
            "Metaspace" => Decoding::metaspace(decoder),
            "Sequence" => {
                let steps = decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
                let kinds: Vec<String> = steps.iter().map(kind).collect();
                let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
                match (kinds.as_slice(), steps) {
                    (["Replace", "ByteFallback", "Fuse"], [replace, ..]) if is_space(replace) => {
                        Decoding::Pieces { strip_first_space: false }
                    }
                    (["Replace", "ByteFallback", "Fuse", "Strip"], [replace, _, _, strip])
                        if is_space(replace) && is_first_space(strip) =>
                    {
                        Decoding::Pieces { strip_first_space: true }
                    }
                    (["ByteLevel"], _) => Decoding::ByteLevel,
                    (["Metaspace"], [only]) => Decoding::metaspace(only),
                    _ => Decoding::Sequence,
                }
            }
            _ => Decoding::Sequence,
        }
    }

    fn metaspace(decoder: &Value) -> Decoding {
        let replacement = decoder["replacement"].as_str().and_then(|s| s.chars().next()).unwrap_or('▁');
        Decoding::Metaspace { replacement, strip_first_token: decoder["prepend_scheme"] != "never" }
    }

    /// The bytes of a stored token; `None` where a token has no bytes of its own.
    pub(crate) fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        match self {
            Decoding::ByteLevel => {
                let mapped: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                Some(mapped.unwrap_or_else(|| token.as_bytes().to_vec()))
            }
            Decoding::Pieces { .. } => {
                let token = token.replace('▁', " ");
                Some(fallback_byte(&token).map_or_else(|| token.into_bytes(), |byte| vec![byte]))
            }
            Decoding::Metaspace { replacement, .. } => Some(token.replace(*replacement, " ").into_bytes()),
            Decoding::Sequence => None,
        }
    }
}

fn is_space(replace: &Value) -> bool {
    replace["pattern"]["String"] == "▁" && replace["content"] == " "
}

fn is_first_space(strip: &Value) -> bool {
    strip["content"] == " " && strip["start"] == 1 && strip["stop"] == 0
}

/// `<0x0A>` is byte 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's `bytes_to_unicode`, reversed: printable Latin-1 bytes stand for themselves, the other 68 follow each
/// other from U+0100 (Radford et al. 2019, `encoder.py`).
static BYTE_OF_CHAR: LazyLock<[Option<u8>; 0x100 + 68]> = LazyLock::new(|| {
    let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|byte| !itself(byte)).zip(0x100..);
    let direct = (0..=255u8).filter(itself).map(|byte| (byte, usize::from(byte)));
    let mut bytes = [None; _];
    direct.chain(others).for_each(|(byte, c)| bytes[c] = Some(byte));
    bytes
});

fn byte_of(c: char) -> Option<u8> {
    *BYTE_OF_CHAR.get(c as usize)?
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_table_is_a_bijection() {
        let bytes: BTreeSet<u8> = BYTE_OF_CHAR.iter().copied().flatten().collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!([' ', '\u{ad}', 'ń'].map(byte_of), [None; 3]);
        assert_eq!(['a', 'Ġ', 'Ċ', 'Ń'].map(byte_of), [b'a', b' ', b'\n', 0xad].map(Some));
    }

    #[test]
    fn a_token_outside_the_byte_table_is_its_own_text() {
        assert_eq!(Decoding::ByteLevel.bytes("<|a b|>").unwrap(), b"<|a b|>");
        assert_eq!(Decoding::ByteLevel.bytes("ĠaÃ").unwrap(), b" a\xc3");
    }

    #[test]
    fn only_two_hex_digits_are_a_byte() {
        let pieces = Decoding::Pieces { strip_first_space: true };
        assert_eq!(pieces.bytes("<0x0A>").unwrap(), b"\n");
        assert_eq!(pieces.bytes("<0xGG>").unwrap(), b"<0xGG>");
        assert_eq!(pieces.bytes("<0x123>").unwrap(), b"<0x123>");
        assert_eq!(pieces.bytes("▁a▁").unwrap(), b" a ");
    }

    #[test]
    fn an_unknown_chain_of_decoders_is_not_taken_for_a_known_one() {
        let strip_two = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 2, "stop": 0}]});
        assert_eq!(Decoding::from_decoder(&strip_two), Decoding::Sequence);
        assert_eq!(Decoding::from_decoder(&Value::Null), Decoding::Sequence);
        assert_eq!(Decoding::from_decoder(&json!({"type": "WordPiece"})), Decoding::Sequence);
    }
}
