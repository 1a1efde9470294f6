//! Reads what an answer says about its tokens while it passes by.

use serde_json::Value;
use servelab_wire::sse::SseReader;

/// Longest event of a stream that is read; a longer one ends the reading and not the stream.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Tokens of one request, by the replica's own count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

/// Of a whole answer. `None` if it does not tell.
pub fn of_answer(body: &[u8]) -> Option<Used> {
    used(&serde_json::from_slice(body).ok()?)
}

fn used(answer: &Value) -> Option<Used> {
    let usage = answer.get("usage")?;
    let number = |value: &Value, name: &str| u32::try_from(value.get(name)?.as_u64()?).ok();
    let details = usage.get("prompt_tokens_details");
    Some(Used {
        prompt_tokens: number(usage, "prompt_tokens")?,
        completion_tokens: number(usage, "completion_tokens").unwrap_or(0),
        cached_tokens: details.and_then(|details| number(details, "cached_tokens")).unwrap_or(0),
    })
}

/// Of a stream.
#[derive(Debug)]
pub struct StreamUsage {
    /// `None` after an event that is too long.
    reader: Option<SseReader>,
    last: Option<Used>,
    events: u32,
}

impl Default for StreamUsage {
    fn default() -> Self {
        Self { reader: Some(SseReader::bounded(MAX_EVENT_BYTES)), last: None, events: 0 }
    }
}

impl StreamUsage {
    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let Some(reader) = &mut self.reader else { return };
        let (last, events) = (&mut self.last, &mut self.events);
        let read = reader.read(bytes, |data| {
            *events = events.saturating_add(1);
            // Most events carry none, and need not be parsed.
            if data.contains("\"prompt_tokens\"")
                && let Some(used) = serde_json::from_str(data).ok().as_ref().and_then(used)
            {
                *last = Some(used);
            }
        });
        if read.is_err() {
            self.reader = None;
        }
    }

    /// What the stream told last.
    pub fn used(&self) -> Option<Used> {
        self.last
    }

    /// Events so far: about as many as tokens.
    pub fn events(&self) -> u32 {
        self.events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":50,"completion_tokens":7,"total_tokens":57,"prompt_tokens_details":{"cached_tokens":48}}}"#;
    const USED: Used = Used { prompt_tokens: 50, cached_tokens: 48, completion_tokens: 7 };

    #[test]
    fn an_answer_tells_its_tokens() {
        assert_eq!(of_answer(USAGE.as_bytes()), Some(USED));
        for silent in [
            "",
            "{}",
            "{\"usage\":null}",
            "{\"usage\":{\"prompt_tokens\":-1}}",
            "{\"usage\":{\"prompt_tokens\":1e99}}",
        ] {
            assert_eq!(of_answer(silent.as_bytes()), None, "{silent}");
        }
    }

    #[test]
    fn a_stream_tells_them_at_its_end_wherever_it_was_cut() {
        let stream =
            format!("data: {{\"choices\":[{{}}],\"usage\":null}}\n\ndata: {USAGE}\n\ndata: [DONE]\n\n");
        for piece in [1, 7, 10_000] {
            let mut usage = StreamUsage::default();
            stream.as_bytes().chunks(piece).for_each(|bytes| usage.push(bytes));
            assert_eq!((usage.used(), usage.events()), (Some(USED), 3));
        }
    }

    #[test]
    fn an_endless_event_is_not_kept() {
        let mut usage = StreamUsage::default();
        (0..40).for_each(|_| usage.push(&[b'x'; 100_000]));
        assert!(usage.reader.is_none());
    }
}
