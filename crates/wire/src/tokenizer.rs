//! `GET /tokenizer`: what a router needs to cut a prompt into the tokens that the replica computes.

use serde::{Deserialize, Serialize};

/// What the replica tokenises with. Each file is at `/tokenizer/NAME`, byte for byte as the model brought it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerManifest {
    /// The name that clients use.
    pub model: String,
    /// A hash over all files, 32 hexadecimal digits. Replicas with the same one tokenise alike.
    pub revision: String,
    /// Tokens per block of the prefix cache.
    pub block_size: u32,
    pub files: Vec<TokenizerFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerFile {
    /// `tokenizer.json`, `tokenizer_config.json` or `chat_template.jinja`.
    pub name: String,
    pub bytes: u64,
}
