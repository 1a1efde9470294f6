//! What prompts can be made of at this server, so that their length in tokens is right.
//!
//! Token ids are the exact way: `/v1/completions` takes them where the server is vLLM, llama.cpp or servelab, and no
//! tokenizer comes between. Which ids are ordinary tokens, `/tokenize` tells for a list of common words.
//!
//! Where text is needed (chat, conversations, servers without ids) prompts are words that are one token each, with
//! and without a blank before them: tokenizers split at blanks first, so that a hundred words are a hundred tokens.
//! What the server puts around them, a chat template or a first token, is measured with two requests and their usage.
//! A server without `/tokenize` is measured the same way; if its words are not one token each, their mean length is
//! used, and the report calls the lengths estimated.

use std::sync::Arc;

use futures::StreamExt;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::Client;
use crate::prompt::Pool;
use crate::result::Endpoint;
use crate::server::{ServerError, ask, refusal};

const WORDS: &str = include_str!("../data/words.txt");
/// Questions to `/tokenize` under way at once.
const AT_ONCE: usize = 16;
/// Fewer words that are one token each are not enough to make prompts that differ.
const FEWEST: usize = 32;
/// Of English in the vocabularies of large models, where the server does not tell its own.
const USUAL_TOKENS_PER_WORD: f64 = 4.0 / 3.0;
/// Words of the shorter of the two prompts that are measured; the longer has twice as many.
const PROBE_WORDS: usize = 24;

/// How prompts shall travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FormChoice {
    /// Ids where the server takes them, else words.
    #[default]
    Auto,
    TokenIds,
    Words,
}

/// Finds out what prompts can be made of. Sends one to three requests of one output token: the server must be able
/// to answer.
///
/// # Errors
/// If the server does not answer, refuses, or cannot take what is asked for.
pub async fn discover(
    client: &Client,
    endpoint: Endpoint,
    model: &str,
    form: FormChoice,
) -> Result<Pool, ServerError> {
    let url = || client.target().to_string();
    let found = Words::find(client, model).await?;
    if endpoint == Endpoint::Completions && form != FormChoice::Words {
        match try_ids(client, model, &found.ids).await {
            Ok(pool) => return Ok(pool),
            Err(reason) if form == FormChoice::TokenIds => {
                return Err(match found.ids.is_empty() {
                    true => ServerError::NoTokenizer { url: url() },
                    false => ServerError::NoTokenIds { url: url(), reason },
                });
            }
            Err(_) => {}
        }
    }
    measure_words(client, endpoint, model, found.words).await
}

/// Prompts for a server that did not tell.
pub fn unknown() -> Pool {
    let words: Vec<String> = WORDS.split_whitespace().map(str::to_owned).collect();
    Pool::Words { words: Arc::from(words), overhead_tokens: 0, tokens_per_word: USUAL_TOKENS_PER_WORD }
}

/// The words of the list, seen through the server's tokenizer.
struct Words {
    /// Those that are one token each, or all if there are too few of them or nobody can tell.
    words: Vec<String>,
    /// Ids of ordinary tokens; empty if nobody can tell.
    ids: Vec<u32>,
}

impl Words {
    async fn find(client: &Client, model: &str) -> Result<Self, ServerError> {
        let all: Vec<String> = WORDS.split_whitespace().map(str::to_owned).collect();
        let Some(dialect) = Dialect::find(client, model).await? else {
            return Ok(Self { words: all, ids: Vec::new() });
        };
        let asked = all.iter().map(|word| async move {
            let inner = dialect.tokenize(client, model, &format!(" {word}")).await;
            let first = dialect.tokenize(client, model, word).await;
            (word, inner, first)
        });
        let answers: Vec<_> = futures::stream::iter(asked).buffered(AT_ONCE).collect().await;
        let (mut words, mut single, mut any) = (Vec::new(), Vec::new(), Vec::new());
        for (word, inner, first) in answers {
            let (Some(inner), Some(first)) = (inner, first) else { continue };
            if let ([id], [_]) = (&inner[..], &first[..]) {
                words.push(word.clone());
                single.push(*id);
            }
            any.extend(inner);
        }
        any.sort_unstable();
        any.dedup();
        let enough = words.len() >= FEWEST;
        Ok(Self { words: if enough { words } else { all }, ids: if enough { single } else { any } })
    }
}

/// How the server wants to be asked for tokens.
#[derive(Clone, Copy, Debug)]
enum Dialect {
    /// vLLM and servelab.
    Prompt,
    /// llama.cpp.
    Content,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

impl Dialect {
    /// # Errors
    /// If the server does not answer at all.
    async fn find(client: &Client, model: &str) -> Result<Option<Self>, ServerError> {
        for dialect in [Self::Prompt, Self::Content] {
            let reply = ask(client, Method::POST, "/tokenize", Some(dialect.body(model, " the"))).await?;
            let tokens = serde_json::from_slice(&reply.body).ok().filter(|_| reply.status.is_success());
            if tokens.is_some_and(|Tokens { tokens }| !tokens.is_empty()) {
                return Ok(Some(dialect));
            }
        }
        Ok(None)
    }

    fn body(self, model: &str, text: &str) -> Value {
        match self {
            Self::Prompt => json!({"model": model, "prompt": text, "add_special_tokens": false}),
            Self::Content => json!({"content": text, "add_special": false}),
        }
    }

    async fn tokenize(self, client: &Client, model: &str, text: &str) -> Option<Vec<u32>> {
        let reply = ask(client, Method::POST, "/tokenize", Some(self.body(model, text))).await.ok()?;
        serde_json::from_slice(&reply.body).ok().map(|Tokens { tokens }| tokens)
    }
}

/// Sends a prompt of ids. In words, why they cannot be used.
async fn try_ids(client: &Client, model: &str, ids: &[u32]) -> Result<Pool, String> {
    if ids.is_empty() {
        return Err("no ids are known".into());
    }
    let prompt: Vec<u32> = ids.iter().copied().cycle().take(PROBE_WORDS).collect();
    let body = json!({"model": model, "prompt": prompt, "max_tokens": 1});
    let path = Endpoint::Completions.path();
    let tokens = prompt_tokens(client, path, body).await.map_err(|error| error.to_string())?;
    if tokens != prompt.len() as u32 {
        return Err(format!("{} ids were counted as {tokens} tokens", prompt.len()));
    }
    Ok(Pool::Ids(ids.into()))
}

async fn measure_words(
    client: &Client,
    endpoint: Endpoint,
    model: &str,
    words: Vec<String>,
) -> Result<Pool, ServerError> {
    let mut counts = [0.0; 2];
    for (count, length) in counts.iter_mut().zip([PROBE_WORDS, 2 * PROBE_WORDS]) {
        let text = words.iter().cycle().take(length).map(String::as_str).collect::<Vec<_>>().join(" ");
        let mut body = json!({"model": model, "max_tokens": 1});
        match endpoint {
            Endpoint::Completions => body["prompt"] = json!(text),
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": text}]),
        }
        *count = f64::from(prompt_tokens(client, endpoint.path(), body).await?);
    }
    let tokens_per_word = ((counts[1] - counts[0]) / PROBE_WORDS as f64).max(0.1);
    let overhead = (counts[0] - PROBE_WORDS as f64 * tokens_per_word).max(0.0);
    Ok(Pool::Words { words: Arc::from(words), overhead_tokens: overhead.round() as u32, tokens_per_word })
}

#[derive(Deserialize)]
struct Answer {
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
}

/// Sends a small request and returns how many tokens its prompt was.
async fn prompt_tokens(client: &Client, path: &str, body: Value) -> Result<u32, ServerError> {
    let reply = ask(client, Method::POST, path, Some(body)).await?;
    if !reply.status.is_success() {
        return Err(refusal(client, path, &reply));
    }
    let usage = serde_json::from_slice::<Answer>(&reply.body).ok().and_then(|answer| answer.usage);
    usage.map(|usage| usage.prompt_tokens).ok_or_else(|| ServerError::NotUnderstood {
        url: client.target().to_string(),
        path: path.to_owned(),
        expected: "completion with usage",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_different_plain_words() {
        let mut words: Vec<&str> = WORDS.split_whitespace().collect();
        assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase())));
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert!(count == words.len() && count >= 8 * FEWEST, "{count}");
    }
}
