//! What the router reads of a request: enough to choose a replica and to count it, and never to judge it.
//!
//! A request that cannot be read goes to a replica all the same, whose answer says what is wrong with it.
//!
//! For replicas without token parity (see [`crate::parity`]) the text that stands in the prompt is cut into pieces of
//! four bytes, which is about a token of English text, and hashed in blocks as a replica hashes its tokens. Such a
//! chain says where two prompts part nearly as well as the true one does. Prompts that are given as token ids are
//! taken as they are. The chain of a text costs microseconds and is always made; tokens are made for the tokenizers
//! that replicas have.

use http::HeaderMap;
use serde_json::Value;
use servelab_engine::hash_blocks;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::choice::fleet::{Exact, Prompt};

/// Pieces in a block, as most replicas have tokens.
pub const BLOCK_SIZE: u32 = 16;
const PIECE_BYTES: usize = 4;
/// Tokens that an answer is taken to have where the request does not say how many it wants at most.
const USUAL_OUTPUT_TOKENS: u32 = 256;
/// Headers and the cookie that name a session.
const SESSION_HEADER: &str = "x-session-id";
const SESSION_COOKIE: &str = "servelab_session=";

/// A request that generates something.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    pub prompt: Prompt,
    /// The answer comes piece by piece.
    pub streams: bool,
    /// Most tokens that all answers may have together.
    pub max_output_tokens: u32,
}

/// Reads the body of a request; one that is no JSON object gives an empty prompt.
pub fn read(body: &Value, headers: &HeaderMap) -> Asked {
    let number =
        |name: &str| body.get(name).and_then(Value::as_u64).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let sequences = number("n").unwrap_or(1).clamp(1, 4096);
    let output = number("max_completion_tokens").or_else(|| number("max_tokens"));
    let Pieces { first, all, are_ids } = pieces(body);
    let salt = salt(body.get("cache_salt").and_then(Value::as_str));
    let prompt = Prompt {
        tokens: all,
        pieces: all,
        chain: hash_blocks(&first, BLOCK_SIZE as usize, salt),
        is_exact: are_ids,
        exact: Vec::new(),
        session: session(headers, body),
        sequences,
        output_tokens: output.unwrap_or(USUAL_OUTPUT_TOKENS),
    };
    let max_output_tokens = prompt.output_tokens.saturating_mul(sequences);
    let streams = body.get("stream").and_then(Value::as_bool).unwrap_or(false);
    Asked { prompt, streams, max_output_tokens }
}

impl Asked {
    /// Takes over what a tokenizer has made of it.
    pub fn set_exact(&mut self, exact: Vec<Exact>) {
        if let Some(exact) = exact.first() {
            self.prompt.tokens = exact.tokens;
        }
        self.prompt.exact = exact;
    }
}

/// The salt of block hashes that a `cache_salt` gives, as at a replica.
pub fn salt(text: Option<&str>) -> u64 {
    text.map_or(0, |text| xxh3_64(text.as_bytes()).max(1))
}

/// By header, else by cookie, else by OpenAI's `user`.
fn session(headers: &HeaderMap, body: &Value) -> Option<u64> {
    let header = headers.get(SESSION_HEADER).map(|value| value.as_bytes());
    let cookie = || {
        let cookies = headers.get_all(http::header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        cookies.flat_map(|text| text.split(';')).find_map(|pair| pair.trim().strip_prefix(SESSION_COOKIE))
    };
    let user = || body.get("user").and_then(Value::as_str);
    header.or_else(|| cookie().map(str::as_bytes)).or_else(|| user().map(str::as_bytes)).map(xxh3_64)
}

/// The pieces of the first prompt, and how many all have together.
#[derive(Default)]
struct Pieces {
    first: Vec<u32>,
    all: u32,
    /// The first ones are the prompt's own tokens.
    are_ids: bool,
}

fn pieces(body: &Value) -> Pieces {
    let one = |first: Vec<u32>, are_ids| Pieces { all: first.len() as u32, first, are_ids };
    match (body.get("messages"), body.get("prompt")) {
        (Some(Value::Array(messages)), _) => {
            let mut text = Vec::new();
            // Templates put the tools before all messages.
            if let Some(tools) = body.get("tools").filter(|tools| !tools.is_null()) {
                text.extend_from_slice(tools.to_string().as_bytes());
            }
            messages.iter().for_each(|message| add_message(&mut text, message));
            one(cut(&text), false)
        }
        (_, Some(Value::String(prompt))) => one(cut(prompt.as_bytes()), false),
        (_, Some(Value::Array(prompts))) => match ids(prompts) {
            Some(ids) => one(ids, true),
            None => of_several(prompts),
        },
        _ => Pieces::default(),
    }
}

/// All prompts count; they go to one replica, and the chain of the first stands for all.
fn of_several(prompts: &[Value]) -> Pieces {
    let read = |prompt: &Value| match prompt {
        Value::String(text) => cut(text.as_bytes()),
        Value::Array(ids) => self::ids(ids).unwrap_or_default(),
        _ => Vec::new(),
    };
    let others: usize = prompts.iter().skip(1).map(|prompt| read(prompt).len()).sum();
    let first = prompts.first().map(read).unwrap_or_default();
    let are_ids = prompts.first().is_some_and(Value::is_array);
    Pieces { all: u32::try_from(first.len() + others).unwrap_or(u32::MAX), first, are_ids }
}

fn cut(text: &[u8]) -> Vec<u32> {
    let piece = |bytes: &[u8]| {
        let mut padded = [0; PIECE_BYTES];
        padded[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(padded)
    };
    text.chunks(PIECE_BYTES).map(piece).collect()
}

/// `None` unless all of them are token ids.
fn ids(values: &[Value]) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    (!values.is_empty()).then(|| values.iter().map(id).collect())?
}

/// Role and content in the order of the conversation. Where the one ends and the other begins is marked, so that
/// no two conversations read the same.
fn add_message(text: &mut Vec<u8>, message: &Value) {
    for part in ["role", "name", "tool_call_id"] {
        if let Some(Value::String(value)) = message.get(part) {
            text.push(0x1e);
            text.extend_from_slice(value.as_bytes());
        }
    }
    text.push(0x1f);
    match message.get("content") {
        Some(Value::String(content)) => text.extend_from_slice(content.as_bytes()),
        Some(Value::Array(parts)) => parts.iter().for_each(|part| match part.get("text") {
            Some(Value::String(content)) => text.extend_from_slice(content.as_bytes()),
            _ => text.extend_from_slice(part.to_string().as_bytes()),
        }),
        _ => {}
    }
    if let Some(calls) = message.get("tool_calls").filter(|calls| !calls.is_null()) {
        text.extend_from_slice(calls.to_string().as_bytes());
    }
}

/// A hash of a request's body, to tell whether two are the same.
pub fn fingerprint(path: &str, body: &[u8]) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(path.as_bytes());
    hasher.update(&[0]);
    hasher.update(body);
    hasher.digest128()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(body: &Value) -> Asked {
        read(body, &HeaderMap::new())
    }

    fn chat(messages: &[(&str, &str)]) -> Value {
        let messages: Vec<Value> =
            messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        json!({"messages": messages, "max_tokens": 40})
    }

    /// Blocks that two prompts share.
    fn shared(one: &Value, other: &Value) -> usize {
        let (one, other) = (asked(one).prompt.chain, asked(other).prompt.chain);
        one.iter().zip(&other).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn a_later_turn_continues_the_chain_of_the_earlier_one() {
        let system = "You are terse. ".repeat(40);
        let first = chat(&[("system", &system), ("user", "What is a block?")]);
        let second = chat(&[
            ("system", &system),
            ("user", "What is a block?"),
            ("assistant", "Sixteen tokens."),
            ("user", "And a page?"),
        ]);
        let other = chat(&[("system", &system), ("user", "Tell me a story about a router")]);
        let blocks = asked(&first).prompt.chain.len();
        assert_eq!(blocks, (system.len() + "system".len() + 2 + "user".len() + 2 + 16) / 64);
        assert_eq!(shared(&first, &second), blocks);
        assert_eq!(shared(&first, &other), system.len() / 64);
    }

    #[test]
    fn parts_read_as_the_text_that_they_are_and_a_salt_shares_nothing() {
        let text = "the same words ".repeat(20);
        let plain = chat(&[("user", &text)]);
        let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]});
        assert_eq!(asked(&plain).prompt.chain, asked(&parts).prompt.chain);
        let mut salted = plain.clone();
        salted["cache_salt"] = json!("tenant");
        assert_eq!(shared(&plain, &salted), 0);
    }

    #[test]
    fn token_ids_are_taken_as_they_are() {
        let ids: Vec<u32> = (0..40).collect();
        for (prompt, tokens) in [(json!(ids), 40), (json!([ids, [1, 2]]), 42)] {
            let asked = asked(&json!({"prompt": prompt, "n": 3, "max_tokens": 5, "stream": true}));
            assert_eq!(asked.prompt.chain, hash_blocks(&ids, 16, 0));
            assert!(asked.prompt.is_exact);
            let counted = asked.prompt.tokens - (tokens - 40);
            assert_eq!((counted, asked.prompt.sequences, asked.max_output_tokens), (40, 3, 15));
            assert!(asked.streams);
        }
    }

    #[test]
    fn of_several_prompts_all_count() {
        let (long, short) = ("a block of words ".repeat(8), "word");
        let several = asked(&json!({"prompt": [long, short, short]})).prompt;
        let alone = asked(&json!({"prompt": long})).prompt;
        assert_eq!((several.tokens, &several.chain), (alone.tokens + 2, &alone.chain));
        assert!(!several.is_exact && !alone.is_exact);
    }

    #[test]
    fn what_cannot_be_read_is_an_empty_prompt() {
        for body in [
            json!([]),
            json!(null),
            json!({"prompt": 7}),
            json!({"messages": {}}),
            json!({"prompt": ["a", 1, null]}),
        ] {
            assert_eq!(asked(&body).prompt.chain.len(), 0, "{body}");
        }
        let huge = asked(&json!({"prompt": "x", "n": 1e19, "max_tokens": u64::MAX, "stream": "yes"}));
        assert_eq!((huge.max_output_tokens, huge.streams), (u32::MAX, false));
    }

    #[test]
    fn a_session_is_named_by_header_cookie_or_user() {
        let body = json!({"prompt": "x", "user": "anna"});
        let mut headers = HeaderMap::new();
        let session = |headers: &HeaderMap| read(&body, headers).prompt.session;
        assert_eq!(session(&headers), Some(xxh3_64(b"anna")));
        headers.insert("cookie", "a=b; servelab_session=17".parse().unwrap());
        assert_eq!(session(&headers), Some(xxh3_64(b"17")));
        headers.insert("x-session-id", "s-1".parse().unwrap());
        assert_eq!(session(&headers), Some(xxh3_64(b"s-1")));
        assert_eq!(asked(&json!({})).prompt.session, None);
    }
}
