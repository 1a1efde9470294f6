//! The events of a stream, as far as a benchmark looks at them: is there a token, why did it end, what did it
//! cost. Read without building a tree: a hundred thousand come by in a second.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

use crate::result::UsageCounts;

/// What ends a stream.
pub const DONE: &str = "[DONE]";

/// What one event says.
#[derive(Debug, Default)]
pub struct Event<'a> {
    /// Content, reasoning or the arguments of a tool; never empty.
    pub delta: Option<Cow<'a, str>>,
    pub finish_reason: Option<Cow<'a, str>>,
    pub usage: Option<UsageCounts>,
    /// The server says that something went wrong.
    pub is_error: bool,
}

impl<'a> Event<'a> {
    /// # Errors
    /// If `data` is not the JSON of a chunk.
    pub fn parse(data: &'a str) -> Result<Self, serde_json::Error> {
        let chunk: Chunk<'a> = serde_json::from_str(data)?;
        let is_error = chunk.object.as_ref().is_some_and(|object| object.0 == "error");
        let choice = chunk.choices.unwrap_or_default().0.unwrap_or_default();
        let delta = choice.delta.unwrap_or_default();
        let texts = [choice.text, delta.content, delta.reasoning_content, delta.reasoning];
        let text = texts.into_iter().flatten().map(|text| text.0).find(|text| !text.is_empty());
        let tool = || delta.tool_calls.filter(|calls| calls.0).map(|_| Cow::Borrowed("tool call"));
        Ok(Self {
            delta: text.or_else(tool),
            finish_reason: choice.finish_reason.map(|reason| reason.0),
            usage: chunk.usage.map(Into::into),
            is_error: is_error || chunk.error.is_some(),
        })
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<First<'a>>,
    usage: Option<Usage>,
    error: Option<IgnoredAny>,
    #[serde(borrow)]
    object: Option<Text<'a>>,
}

/// Serde borrows from the input only where the text stands alone, not in an option.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Default, Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
}

#[derive(Default, Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
    /// vLLM's name and that of others.
    #[serde(borrow)]
    reasoning_content: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning: Option<Text<'a>>,
    tool_calls: Option<NotEmpty>,
}

/// The first choice: benchmarks ask for one.
#[derive(Default)]
struct First<'a>(Option<Choice<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for First<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Choices;
        impl<'de> Visitor<'de> for Choices {
            type Value = First<'de>;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("a list of choices")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut choices: A) -> Result<First<'de>, A::Error> {
                let first = choices.next_element()?;
                while choices.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first))
            }
        }
        deserializer.deserialize_seq(Choices)
    }
}

/// Whether a list has elements.
struct NotEmpty(bool);

impl<'de> Deserialize<'de> for NotEmpty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = NotEmpty;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<NotEmpty, A::Error> {
                let mut any = false;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(NotEmpty(any))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// Not `servelab_wire`'s: other servers leave out or null what ours always sends.
#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

impl From<Usage> for UsageCounts {
    fn from(usage: Usage) -> Self {
        let cached_tokens =
            usage.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0);
        let Usage { prompt_tokens, completion_tokens, .. } = usage;
        Self { prompt_tokens, completion_tokens, cached_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_content_reasoning_or_a_tool_and_not_empty() {
        for (data, delta) in [
            (r#"{"choices":[{"index":0,"text":" a","finish_reason":null}]}"#, Some(" a")),
            (r#"{"choices":[{"delta":{"content":"a\nb"}}]}"#, Some("a\nb")),
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, None),
            (r#"{"choices":[{"delta":{"content":null,"reasoning_content":"why"}}]}"#, Some("why")),
            (r#"{"choices":[{"delta":{"reasoning":"why"}}]}"#, Some("why")),
            (r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#, Some("tool call")),
            (r#"{"choices":[{"delta":{"tool_calls":[]}}]}"#, None),
            (r#"{"choices":[]}"#, None),
            (r#"{"choices":[{"text":"a"},{"text":"b"}],"more":{"x":[1]}}"#, Some("a")),
        ] {
            let event = Event::parse(data).unwrap();
            assert_eq!(event.delta.as_deref(), delta, "{data}");
            assert!(!event.is_error, "{data}");
        }
    }

    #[test]
    fn plain_text_is_not_copied() {
        let event = Event::parse(r#"{"choices":[{"delta":{"content":"hello"}}]}"#).unwrap();
        assert!(matches!(event.delta, Some(Cow::Borrowed("hello"))));
    }

    #[test]
    fn usage_is_read_from_servers_that_leave_things_out() {
        for (data, expected) in [
            (
                r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,
                "prompt_tokens_details":{"cached_tokens":4}}}"#,
                (5, 2, 4),
            ),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":null}}"#,
                (5, 2, 0),
            ),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":null}}}"#,
                (5, 0, 0),
            ),
        ] {
            let usage = Event::parse(data).unwrap().usage.unwrap();
            assert_eq!(
                (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
                expected,
                "{data}"
            );
        }
        assert_eq!(Event::parse(r#"{"choices":[],"usage":null}"#).unwrap().usage, None);
    }

    #[test]
    fn errors_are_told_from_chunks_and_broken_events_from_both() {
        for data in [r#"{"error":{"message":"lost"}}"#, r#"{"object":"error","message":"lost"}"#] {
            assert!(Event::parse(data).unwrap().is_error, "{data}");
        }
        assert!(!Event::parse(r#"{"error":null,"choices":[]}"#).unwrap().is_error);
        for data in ["", "{", "[]", r#"{"choices":7}"#, r#"{"choices":[{"text":7}]}"#, "plain text"] {
            assert!(Event::parse(data).is_err(), "{data}");
        }
    }
}
