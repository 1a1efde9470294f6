//! The text crate against what Hugging Face's own code makes of the same input (`tests/fixtures`), against naive
//! models on random input, and against hostile templates.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod chat; // renderings equal transformers' apply_chat_template, byte for byte
mod detokenizer; // pieces join to what decode gives, for random tokens
mod hostile; // templates and files that mean harm end with an error
mod tokenizer; // ids and texts equal tokenizers'

/// A file of `tests/fixtures`.
fn fixture(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn fixture_json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&fixture(name)).unwrap()
}

/// One of the two small tokenizers: `byte_level` or `pieces`.
fn load(name: &str) -> servelab_text::Tokenizer {
    servelab_text::Tokenizer::from_json(&fixture(&format!("{name}.json")), None).unwrap()
}
