//! Log-probabilities (natural logarithm), in the three shapes in which clients expect them.

use serde::{Deserialize, Serialize};
use serde_json::Map;

/// Of a chat answer: one entry per generated token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    /// The token's own bytes: a character may be spread over several tokens.
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// Of a text completion: parallel lists, one entry per token. With `echo` the prompt's tokens come
/// first, and the first of them has no probability.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionLogprobs {
    /// Where each token's text begins, in characters from the start of the choice's text.
    pub text_offset: Vec<usize>,
    pub token_logprobs: Vec<Option<f32>>,
    pub tokens: Vec<String>,
    /// The likeliest tokens and the chosen one; `token text: log-probability`.
    pub top_logprobs: Vec<Option<Map<String, serde_json::Value>>>,
}

/// vLLM's `prompt_logprobs`: one entry per prompt token, the first null, the others a map from token
/// id (in decimal) to its log-probability.
pub type PromptLogprobs = Vec<Option<std::collections::BTreeMap<u32, PromptLogprob>>>;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprob {
    pub logprob: f32,
    /// 1 for the likeliest token of the vocabulary.
    pub rank: u32,
    pub decoded_token: String,
}
