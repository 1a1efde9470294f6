use serde_json::json;
use servelab_text::{TextError, Tokenizer};

use crate::{fixture, fixture_json, load};

#[test]
fn ids_and_texts_equal_those_of_tokenizers() {
    let all = fixture_json("tokenizer_cases.json");
    for name in ["byte_level", "pieces"] {
        let tokenizer = load(name);
        for case in all[name].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let special = case["add_special_tokens"].as_bool().unwrap();
            assert_eq!(tokenizer.encode(text, special).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"], "{name}: {text:?}");
            assert_eq!(
                tokenizer.decode(&ids, true).unwrap(),
                case["decoded_without_special"],
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn truncation_and_padding_of_the_file_are_switched_off() {
    // The byte_level fixture says: cut to 8 tokens, fill up to 16.
    let tokenizer = load("byte_level");
    assert!(tokenizer.encode(&"word ".repeat(50), false).unwrap().len() > 50);
    assert!(tokenizer.encode("a", false).unwrap().len() == 1);
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error_that_names_the_range() {
    let tokenizer = load("pieces");
    let id = tokenizer.vocab_size() as u32;
    let error = tokenizer.decode(&[1, id], false).unwrap_err();
    assert_eq!(error, TextError::UnknownToken { id, vocab_size: tokenizer.vocab_size() });
    assert_eq!(
        error.to_string(),
        format!("token id {id} is not in the vocabulary; ids run from 0 to {}", id - 1)
    );
    assert!(tokenizer.decode(&[u32::MAX], true).is_err());
    assert_eq!(tokenizer.token_bytes(id), None);
}

#[test]
fn placeholders_stand_for_ids_up_to_the_size_given_and_no_further() {
    let tokenizer = load("byte_level").with_placeholders(50_000);
    assert_eq!(tokenizer.vocab_size(), 50_000);
    let a = tokenizer.encode("a", false).unwrap()[0];
    assert_eq!(tokenizer.decode(&[a, 49_999, a], false).unwrap(), "a ⟨49999⟩a");
    assert_eq!(tokenizer.token_text(49_999), " ⟨49999⟩");
    assert!(tokenizer.decode(&[50_000], false).is_err());
    assert!(!tokenizer.is_special(49_999));
}

#[test]
fn one_token_shows_its_text_with_its_space_and_its_bytes() {
    let tokenizer = load("pieces");
    let the = tokenizer.encode("a The", false).unwrap();
    assert_eq!(the.iter().map(|&id| tokenizer.token_text(id)).collect::<String>(), " a The");
    let newline = tokenizer.special_token_id("<0x0A>").unwrap();
    assert_eq!(tokenizer.token_text(newline), "\n");
    assert_eq!(tokenizer.token_bytes(newline).unwrap(), b"\n");
    let part = tokenizer.special_token_id("<0xF0>").unwrap();
    assert_eq!(tokenizer.token_text(part), "\u{fffd}");
    assert_eq!(tokenizer.token_bytes(part).unwrap(), [0xf0]);
    for name in ["byte_level", "pieces"] {
        let tokenizer = load(name);
        let crab = tokenizer.encode("ꙮ🦀", false).unwrap();
        let bytes: Vec<u8> = crab.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), "ꙮ🦀", "{name}");
    }
}

#[test]
fn special_tokens_of_the_config_may_be_strings_or_objects() {
    let config = json!({"bos_token": {"content": "<|bos|>", "special": true}, "eos_token": "<|end|>", "pad_token": null});
    let config = serde_json::to_vec(&config).unwrap();
    let tokenizer = Tokenizer::from_json(&fixture("byte_level.json"), Some(&config)).unwrap();
    assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<|bos|>"), Some("<|end|>")));
    let end = tokenizer.special_token_id("<|end|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert!(!tokenizer.is_special(tokenizer.special_token_id("<tool_call>").unwrap()));
    assert_eq!(tokenizer.special_token_id("<|nope|>"), None);
    assert_eq!(load("byte_level").bos_token(), None);
}

#[test]
fn malformed_files_are_errors() {
    for bytes in [&b""[..], b"{}", b"null", b"[1]", b"\xff\xfe", b"{\"model\": {\"type\": \"BPE\"}}"] {
        assert!(matches!(Tokenizer::from_json(bytes, None), Err(TextError::TokenizerFile { .. })));
    }
    let good = fixture("pieces.json");
    assert!(matches!(Tokenizer::from_json(&good, Some(b"[]")), Err(TextError::TokenizerConfig { .. })));
    for cut in [10, good.len() / 2, good.len() - 3] {
        assert!(Tokenizer::from_json(&good[..cut], None).is_err());
    }
}

#[test]
fn a_decoder_that_panics_is_an_error() {
    // tokenizers indexes past the start of a token shorter than `stop`.
    let mut file = fixture_json("pieces.json");
    file["decoder"] = json!({"type": "Strip", "content": " ", "start": 0, "stop": 9});
    file["model"]["vocab"]["    "] = json!(999);
    let tokenizer = Tokenizer::from_json(&serde_json::to_vec(&file).unwrap(), None).unwrap();
    assert!(matches!(tokenizer.decode(&[999], false), Err(TextError::Decode { .. })));
}
