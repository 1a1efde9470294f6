//! What is asked: prompts as stretches of random streams, and how they become requests.
//!
//! A prompt is a list of [`Segment`]s. Two prompts that hold the same stretch of the same stream have the same
//! tokens there, and nothing else in common: so a tree of shared prefixes is a matter of which streams are named.
//! Tokens are drawn from a pool when the request is written, from seed, salt, stream and position alone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::client::Outgoing;
use crate::result::{Endpoint, PromptForm};

/// A stretch of a stream of random tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub stream: u64,
    /// Position of the first token in the stream.
    pub start: u32,
    pub tokens: u32,
}

impl Segment {
    /// The first `tokens` of a stream.
    pub fn of(stream: u64, tokens: u32) -> Self {
        Self { stream, start: 0, tokens }
    }
}

/// What one request adds to its conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Random(Vec<Segment>),
    /// The user's own words; how many tokens that is, the server tells.
    Given(Arc<str>),
}

impl Content {
    /// 0 for given text.
    pub fn tokens(&self) -> u32 {
        match self {
            Self::Random(segments) => segments.iter().map(|segment| segment.tokens).sum(),
            Self::Given(_) => 0,
        }
    }
}

/// One request of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub content: Content,
    pub output_tokens: u32,
    /// How long after the answer to the turn before this one is sent. Nothing for the first.
    pub think: Duration,
}

/// Requests of which each waits for the answer to the one before; most often a single one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub turns: Vec<Turn>,
}

impl Job {
    pub fn single(content: Content, output_tokens: u32) -> Self {
        Self { turns: vec![Turn { content, output_tokens, think: Duration::ZERO }] }
    }
}

/// What prompts are made of.
#[derive(Clone, Debug)]
pub enum Pool {
    /// Ordinary token ids of the vocabulary, each the only token of its kind.
    Ids(Arc<[u32]>),
    Words {
        words: Arc<[String]>,
        /// Tokens that the server puts around each message.
        overhead_tokens: u32,
        /// 1 if every word of the pool is one token.
        tokens_per_word: f64,
    },
}

impl Pool {
    pub fn form(&self) -> PromptForm {
        match self {
            Self::Ids(_) => PromptForm::TokenIds,
            Self::Words { tokens_per_word, .. } if *tokens_per_word == 1.0 => PromptForm::Words,
            Self::Words { .. } => PromptForm::EstimatedWords,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Words { words, .. } => words.len(),
        }
    }
}

/// How every request of a run is written.
#[derive(Clone, Debug)]
pub struct Writer {
    pub endpoint: Endpoint,
    pub model: String,
    pub pool: Pool,
    /// Seed and salt, mixed: the same key gives the same prompts.
    pub key: u64,
    /// Put in front of given text where a salt is wanted.
    pub salt_text: Option<String>,
    pub ignore_eos: bool,
    pub temperature: Option<f64>,
    /// Further fields of the body.
    pub extra_body: Map<String, Value>,
}

impl Writer {
    /// The request of the last of `turns`, after the `answers` to those before it.
    pub fn write(&self, turns: &[Turn], answers: &[String]) -> Outgoing {
        let output_tokens = turns.last().map_or(1, |turn| turn.output_tokens);
        let mut body = self.fields(output_tokens);
        let (name, prompt) = match self.endpoint {
            Endpoint::Chat => ("messages", self.messages(turns, answers)),
            Endpoint::Completions => ("prompt", self.prompt(turns, answers)),
        };
        body.insert(name.into(), prompt);
        // A map of strings, numbers and lists has a JSON form.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        Outgoing {
            endpoint: self.endpoint,
            body: Bytes::from(body),
            output_tokens,
            keep_text: turns.len() > answers.len() + 1,
        }
    }

    /// All of a body but what is asked.
    pub(crate) fn fields(&self, output_tokens: u32) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("model".into(), json!(self.model));
        body.insert("max_tokens".into(), json!(output_tokens));
        body.insert("stream".into(), json!(true));
        body.insert("stream_options".into(), json!({"include_usage": true}));
        if self.ignore_eos {
            body.insert("ignore_eos".into(), json!(true));
        }
        if let Some(temperature) = self.temperature {
            body.insert("temperature".into(), json!(temperature));
        }
        body.extend(self.extra_body.clone());
        body
    }

    fn messages(&self, turns: &[Turn], answers: &[String]) -> Value {
        let mut messages = Vec::new();
        for (at, turn) in turns.iter().enumerate() {
            messages.push(json!({"role": "user", "content": self.text(&turn.content, at == 0)}));
            if let Some(answer) = answers.get(at) {
                messages.push(json!({"role": "assistant", "content": answer}));
            }
        }
        Value::Array(messages)
    }

    fn prompt(&self, turns: &[Turn], answers: &[String]) -> Value {
        if let ([Turn { content: Content::Random(segments), .. }], Pool::Ids(ids)) = (turns, &self.pool) {
            return Value::Array(self.draws(segments).map(|at| Value::from(ids[at])).collect());
        }
        let mut prompt = String::new();
        for (at, turn) in turns.iter().enumerate() {
            if at > 0 {
                prompt.push(' ');
            }
            prompt += &self.text(&turn.content, at == 0);
            prompt += answers.get(at).map_or("", String::as_str);
        }
        Value::String(prompt)
    }

    fn text(&self, content: &Content, is_first: bool) -> String {
        match (content, &self.pool) {
            (Content::Given(text), _) => {
                let salt = self.salt_text.as_deref().filter(|_| is_first).unwrap_or_default();
                format!("{salt}{text}")
            }
            (Content::Random(segments), Pool::Words { words, overhead_tokens, tokens_per_word }) => {
                let wanted = content.tokens().saturating_sub(*overhead_tokens);
                let count = (f64::from(wanted) / tokens_per_word).round().max(1.0) as usize;
                let words: Vec<&str> =
                    self.draws(segments).take(count).map(|at| words[at].as_str()).collect();
                words.join(" ")
            }
            (Content::Random(segments), Pool::Ids(ids)) => {
                // Reached only if text is asked of a pool without words; the numbers stand for themselves.
                self.draws(segments).map(|at| ids[at].to_string()).collect::<Vec<_>>().join(" ")
            }
        }
    }

    /// The token ids of a prompt, for an engine that is asked without text.
    pub fn ids(&self, segments: &[Segment]) -> Vec<u32> {
        let Pool::Ids(pool) = &self.pool else { return Vec::new() };
        let count = segments.iter().map(|segment| segment.tokens as usize).sum();
        let mut ids = Vec::with_capacity(count);
        // One by one, since the length of each is known: the simulated fleet makes millions of prompts.
        for segment in segments {
            ids.extend(self.draws_of(segment).map(|at| pool[at]));
        }
        ids
    }

    /// Indices into the pool.
    fn draws<'a>(&'a self, segments: &'a [Segment]) -> impl Iterator<Item = usize> + 'a {
        segments.iter().flat_map(|segment| self.draws_of(segment))
    }

    fn draws_of(&self, segment: &Segment) -> impl Iterator<Item = usize> + use<> {
        let size = self.pool.len().max(1) as u64;
        let stream = mix(self.key ^ mix(segment.stream)).wrapping_add(segment.start.into());
        // The high bits, scaled: a remainder would favour low indices.
        let index = move |random: u64| ((u128::from(random) * u128::from(size)) >> 64) as usize;
        (0..segment.tokens).map(move |at| index(mix(stream.wrapping_add(at.into()))))
    }
}

/// The key of a run's prompts.
pub fn key(seed: u64, salt: u64) -> u64 {
    mix(seed ^ mix(salt))
}

/// A step of SplitMix64 (Steele et al. 2014).
pub fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(endpoint: Endpoint, pool: Pool, key: u64) -> Writer {
        Writer {
            endpoint,
            model: "m".into(),
            pool,
            key,
            salt_text: None,
            ignore_eos: true,
            temperature: Some(0.0),
            extra_body: Map::new(),
        }
    }

    fn words(overhead_tokens: u32) -> Pool {
        let words = ["one", "two", "three", "four"].map(str::to_owned);
        Pool::Words { words: words.into(), overhead_tokens, tokens_per_word: 1.0 }
    }

    fn body(outgoing: &Outgoing) -> Value {
        serde_json::from_slice(&outgoing.body).unwrap()
    }

    #[test]
    fn prompts_share_the_stretches_that_they_name_and_nothing_else() {
        let ids: Arc<[u32]> = (1000..3000).collect();
        let writer = writer(Endpoint::Completions, Pool::Ids(ids), 7);
        let whole = writer.ids(&[Segment::of(1, 50), Segment::of(2, 50)]);
        assert_eq!(whole.len(), 100);
        assert!(whole.iter().all(|id| (1000..3000).contains(id)));
        let other = writer.ids(&[Segment::of(1, 50), Segment::of(3, 50)]);
        assert_eq!(whole[..50], other[..50]);
        let same = whole[50..].iter().zip(&other[50..]).filter(|(a, b)| a == b).count();
        assert!(same < 5, "{same} of 50 tokens of two streams agree");
        assert_eq!(writer.ids(&[Segment { stream: 1, start: 10, tokens: 40 }]), whole[10..50]);
    }

    #[test]
    fn another_salt_gives_other_prompts_and_the_same_one_the_same() {
        let write = |salt| {
            let ids: Arc<[u32]> = (0..100).collect();
            writer(Endpoint::Completions, Pool::Ids(ids), key(1, salt)).ids(&[Segment::of(1, 40)])
        };
        assert_eq!(write(5), write(5));
        assert_ne!(write(5), write(6));
    }

    #[test]
    fn a_completion_carries_ids_and_asks_for_usage() {
        let ids: Arc<[u32]> = (10..20).collect();
        let job = Job::single(Content::Random(vec![Segment::of(1, 3)]), 9);
        let outgoing = writer(Endpoint::Completions, Pool::Ids(ids), 1).write(&job.turns, &[]);
        let body = body(&outgoing);
        assert_eq!(body["prompt"].as_array().unwrap().len(), 3);
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(9), &json!(true)));
        assert_eq!(body["stream_options"]["include_usage"], json!(true));
        assert!(!outgoing.keep_text);
    }

    #[test]
    fn words_make_room_for_what_the_server_puts_around_them() {
        let job = Job::single(Content::Random(vec![Segment::of(1, 20)]), 9);
        let outgoing = writer(Endpoint::Chat, words(8), 1).write(&job.turns, &[]);
        let body = body(&outgoing);
        let text = body["messages"][0]["content"].as_str().unwrap();
        assert_eq!(text.split(' ').count(), 12, "{text}");
    }

    #[test]
    fn a_later_turn_repeats_what_was_said() {
        let turn = |stream| Turn {
            content: Content::Random(vec![Segment::of(stream, 2)]),
            output_tokens: 4,
            think: Duration::ZERO,
        };
        let turns = [turn(1), turn(2)];
        let writer = writer(Endpoint::Chat, words(0), 1);
        let first = body(&writer.write(&turns[..1], &[]));
        let second = body(&writer.write(&turns, &["yes".into()]));
        let messages = second["messages"].as_array().unwrap();
        assert_eq!(messages.len(), 3);
        assert_eq!(messages[0], first["messages"][0]);
        assert_eq!(messages[1], json!({"role": "assistant", "content": "yes"}));
    }

    #[test]
    fn given_text_is_sent_as_it_is_behind_the_salt() {
        let job = Job::single(Content::Given("What is it?".into()), 9);
        let mut writer = writer(Endpoint::Completions, words(0), 1);
        assert_eq!(body(&writer.write(&job.turns, &[]))["prompt"], "What is it?");
        writer.salt_text = Some("[run 1] ".into());
        writer.extra_body.insert("top_k".into(), json!(5));
        let body = body(&writer.write(&job.turns, &[]));
        assert_eq!((&body["prompt"], &body["top_k"]), (&json!("[run 1] What is it?"), &json!(5)));
    }
}
