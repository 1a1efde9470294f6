use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::json;
use servelab_text::{Detokenizer, TextError, Tokenizer};

use crate::{fixture_json, load};

static BYTE_LEVEL: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(load("byte_level")));
static PIECES: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(load("pieces")));

/// The pieces tokenizer with another decoder.
fn with_decoder(decoder: serde_json::Value) -> Arc<Tokenizer> {
    let mut file = fixture_json("pieces.json");
    file["decoder"] = decoder;
    Arc::new(Tokenizer::from_json(&serde_json::to_vec(&file).unwrap(), None).unwrap())
}

static METASPACE: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    with_decoder(json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}))
});
/// A chain of decoders that is none of the known ones: goes through the window.
static WINDOWED: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    with_decoder(json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]}))
});
static WORDS: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| with_decoder(serde_json::Value::Null));

fn pieces_of(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt, skip);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn every_fixture_text_streams_to_what_decode_gives() {
    let all = fixture_json("tokenizer_cases.json");
    for (name, tokenizer) in [("byte_level", &*BYTE_LEVEL), ("pieces", &*PIECES)] {
        for case in all[name].as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            for (skip, expected) in [(false, "decoded"), (true, "decoded_without_special")] {
                assert_eq!(pieces_of(tokenizer, &[], &ids, skip).concat(), case[expected], "{name} {ids:?}");
            }
        }
    }
}

#[test]
fn a_character_in_several_tokens_comes_whole_at_its_last_one() {
    let ids = BYTE_LEVEL.encode("ꙮ", false).unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(pieces_of(&BYTE_LEVEL, &[], &ids, false), ["", "", "ꙮ", ""]);
    assert_eq!(pieces_of(&BYTE_LEVEL, &[], &ids[..2], false), ["", "", "\u{fffd}"]);
}

#[test]
fn the_first_token_after_a_prompt_keeps_its_space() {
    let ids = PIECES.encode("The block", false).unwrap();
    assert_eq!(pieces_of(&PIECES, &[], &ids, true).concat(), "The block");
    assert_eq!(pieces_of(&PIECES, &ids, &ids, true).concat(), " The block");
    assert_eq!(pieces_of(&METASPACE, &ids, &ids, true).concat(), " The block");
}

#[test]
fn a_skipped_special_token_in_the_middle_takes_no_space_with_it() {
    let word = PIECES.encode("The", false).unwrap();
    let ids = [&word[..], &[PIECES.special_token_id("</s>").unwrap()], &word].concat();
    assert_eq!(pieces_of(&PIECES, &[], &ids, true).concat(), "The The");
    assert_eq!(PIECES.decode(&ids, true).unwrap(), "The The");
}

#[test]
fn a_character_that_the_prompt_left_open_is_completed() {
    let ids = BYTE_LEVEL.encode("aꙮ", false).unwrap();
    assert_eq!(pieces_of(&BYTE_LEVEL, &ids[..2], &ids[2..], false).concat(), "ꙮ");
}

#[test]
fn an_unknown_id_is_an_error_and_changes_nothing() {
    let ids = BYTE_LEVEL.encode("ꙮ", false).unwrap();
    let mut detokenizer = Detokenizer::new(BYTE_LEVEL.clone(), &[u32::MAX], false);
    let mut text = String::new();
    for id in ids {
        assert!(matches!(detokenizer.push(1 << 20), Err(TextError::UnknownToken { .. })));
        text += &detokenizer.push(id).unwrap();
    }
    assert_eq!(text, "ꙮ");
}

#[test]
fn invalid_bytes_of_pieces_lose_no_valid_character_beside_them() {
    let byte = |byte: u8| PIECES.special_token_id(&format!("<0x{byte:02X}>")).unwrap();
    let ids = [0xe4, 0xbd, 0xa0, 0xff].map(byte);
    assert_eq!(pieces_of(&PIECES, &[], &ids, false).concat(), "你\u{fffd}");
    // The documented difference: tokenizers gives up the whole run.
    assert_eq!(PIECES.decode(&ids, false).unwrap(), "\u{fffd}".repeat(4));
}

/// Ids of a tokenizer, each one equally likely.
fn ids(tokenizer: &LazyLock<Arc<Tokenizer>>, max: usize) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0..tokenizer.vocab_size() as u32, 0..max)
}

/// Whether a token is one byte of the fallback.
fn is_byte(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer.token_bytes(id).is_some_and(|bytes| {
        bytes.len() == 1 && tokenizer.special_token_id(&format!("<0x{:02X}>", bytes[0])) == Some(id)
    })
}

/// What decode gives for prompt and generated tokens, less the prompt's text.
fn expected(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32], skip: bool) -> String {
    let before = tokenizer.decode(prompt, skip).unwrap();
    let all = tokenizer.decode(&[prompt, ids].concat(), skip).unwrap();
    all.strip_prefix(&before).unwrap_or_else(|| panic!("{before:?} is no prefix of {all:?}")).to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn random_byte_level_tokens_join_to_what_decode_gives(tokens in ids(&BYTE_LEVEL, 40), skip in any::<bool>()) {
        let pieces = pieces_of(&BYTE_LEVEL, &[], &tokens, skip);
        prop_assert_eq!(pieces.concat(), BYTE_LEVEL.decode(&tokens, skip).unwrap());
    }

    #[test]
    fn random_pieces_join_to_what_decode_gives(tokens in ids(&PIECES, 40), split in 0usize..40, skip in any::<bool>()) {
        // Without the byte tokens, whose invalid runs differ by design.
        let tokens: Vec<u32> = tokens.into_iter().filter(|&id| !is_byte(&PIECES, id)).collect();
        let (prompt, generated) = tokens.split_at(split.min(tokens.len()));
        let pieces = pieces_of(&PIECES, prompt, generated, skip);
        prop_assert_eq!(pieces.concat(), expected(&PIECES, prompt, generated, skip));
    }

    #[test]
    fn random_characters_in_bytes_join_whole(text in "[a-c éü漢🦀\n]{0,20}", split in 0usize..60) {
        for tokenizer in [&*PIECES, &*BYTE_LEVEL] {
            let tokens = tokenizer.encode(&text, false).unwrap();
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[], false);
            let mut joined = String::new();
            for &id in &tokens {
                let piece = detokenizer.push(id).unwrap();
                prop_assert!(!piece.contains('\u{fffd}'), "half a character in {piece:?}");
                joined += &piece;
            }
            prop_assert_eq!(joined + &detokenizer.finish(), text.clone());
            // Cut into prompt and generated anywhere, within a character too: both together are the text.
            let (prompt, generated) = tokens.split_at(split.min(tokens.len()));
            let after = pieces_of(tokenizer, prompt, generated, false).concat();
            prop_assert!(text.ends_with(&after) , "{after:?} of {text:?}");
        }
    }

    #[test]
    fn other_decoders_join_to_what_decode_gives(tokens in ids(&PIECES, 40), skip in any::<bool>()) {
        for tokenizer in [&*METASPACE, &*WINDOWED, &*WORDS] {
            let pieces = pieces_of(tokenizer, &[], &tokens, skip);
            prop_assert_eq!(pieces.concat(), tokenizer.decode(&tokens, skip).unwrap());
        }
    }
}
