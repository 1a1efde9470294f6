//! UTF-8 that arrives in pieces.

/// Turns bytes that arrive in any pieces into text, holding back an incomplete last character.
///
/// Over all pieces together the text equals `String::from_utf8_lossy` of all bytes: a byte sequence that can no
/// longer become a character is one U+FFFD per maximal part (Unicode 15, section 3.9, "substitution of maximal
/// subparts"). At most 3 bytes are held.
#[derive(Debug, Default, Clone)]
pub(crate) struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// The text that is final after these bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        let held = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(bad) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[bad..];
                        }
                        None => break after.len(),
                    }
                }
            }
        };
        self.pending.drain(..self.pending.len() - held);
        text
    }

    /// What is still held, as U+FFFD: no more bytes will complete it.
    pub(crate) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_pieces_give_the_lossy_text(pieces in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..6),
                prop::sample::select(vec!["é", "漢", "🦀", "a\u{301}"]).prop_map(|s| s.as_bytes().to_vec()),
                prop::collection::vec(prop::sample::select(vec![0xf0u8, 0x9f, 0xa6, 0x80, 0xe2, 0x82, 0xac, 0xc3]), 1..4),
            ], 0..12)) {
            let mut stream = Utf8Stream::default();
            let mut text = String::new();
            for piece in &pieces {
                text += &stream.push(piece);
                prop_assert!(stream.pending.len() <= 3);
            }
            text += &stream.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}
