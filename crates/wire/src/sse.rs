//! Server-sent events, as far as OpenAI's streams use them: one `data:` line an event.

use serde::Serialize;

/// The frame that ends a stream.
pub const DONE: &str = "data: [DONE]\n\n";

/// A comment, which readers skip.
pub const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// One event that carries `data` as JSON.
///
/// # Errors
/// If `data` cannot be written as JSON.
pub fn frame<T: Serialize>(data: &T) -> Result<Vec<u8>, serde_json::Error> {
    /// Room for a token with all that is said of it.
    const USUAL_BYTES: usize = 384;
    let mut frame = Vec::with_capacity(USUAL_BYTES);
    frame.extend_from_slice(b"data: ");
    // JSON text holds no raw line break, so that one `data:` line carries it all.
    serde_json::to_writer(&mut frame, data)?;
    frame.extend_from_slice(b"\n\n");
    Ok(frame)
}

/// Splits a byte stream into the `data` of its events, wherever the network cut it.
/// Events, comments and fields other than `data` are skipped.
#[derive(Debug)]
pub struct SseReader {
    /// A line whose end has not come yet.
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    max_event_bytes: usize,
}

/// An event is longer than the reader allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is longer than {0} bytes")]
pub struct EventTooLong(pub usize);

impl Default for SseReader {
    fn default() -> Self {
        Self::bounded(usize::MAX)
    }
}

impl SseReader {
    /// A reader that holds no more than about twice `max_event_bytes`, whatever comes.
    pub fn bounded(max_event_bytes: usize) -> Self {
        Self { line: Vec::new(), data: Vec::new(), has_data: false, max_event_bytes }
    }

    /// Takes the next bytes and gives the data of every event that they complete. For a reader without a bound.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        // Without a bound there is no error.
        let _ = self.read(bytes, |data| events.push(data.to_owned()));
        events
    }

    /// Takes the next bytes and calls `take` with the data of every event that they complete. Copies each event
    /// once and allocates nothing once its buffers have grown to the longest event. What is no UTF-8 becomes
    /// U+FFFD.
    ///
    /// # Errors
    /// If an event is longer than the bound. The reader is of no use then.
    pub fn read(&mut self, mut bytes: &[u8], mut take: impl FnMut(&str)) -> Result<(), EventTooLong> {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            if self.line.is_empty() {
                self.line_ended(&bytes[..end], &mut take)?;
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&bytes[..end]);
                self.line_ended(&line, &mut take)?;
                line.clear();
                self.line = line;
            }
            bytes = &bytes[end + 1..];
        }
        self.line.extend_from_slice(bytes);
        self.check(self.line.len())
    }

    fn check(&self, bytes: usize) -> Result<(), EventTooLong> {
        if bytes > self.max_event_bytes { Err(EventTooLong(self.max_event_bytes)) } else { Ok(()) }
    }

    fn line_ended(&mut self, line: &[u8], take: &mut impl FnMut(&str)) -> Result<(), EventTooLong> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                take(&String::from_utf8_lossy(&self.data));
            }
            self.data.clear();
        } else if let Some(data) = line.strip_prefix(b"data:") {
            let data = data.strip_prefix(b" ").unwrap_or(data);
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data);
            self.has_data = true;
            return self.check(self.data.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_does_not_mind_where_the_network_cuts() {
        let stream = ": hello\r\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\n\nid: 7\n\ndata: \u{e4}\n\ndata: open";
        let expected = ["{\"a\":1}", "two\nlines", "\u{e4}"];
        for piece in 1..stream.len() {
            let mut reader = SseReader::default();
            let events: Vec<String> =
                stream.as_bytes().chunks(piece).flat_map(|bytes| reader.push(bytes)).collect();
            assert_eq!(events, expected, "cut every {piece} bytes");
        }
    }

    #[test]
    fn an_endless_event_is_an_error_and_not_memory() {
        for line in ["data: 0123456789012345\n", "0123456789012345678901234567890"] {
            let mut reader = SseReader::bounded(30);
            let fed = (0..100).find(|_| reader.read(line.as_bytes(), |_| ()).is_err());
            assert!(fed.is_some_and(|at| at < 3), "{fed:?}");
        }
    }

    #[test]
    fn what_is_no_text_is_marked() {
        assert_eq!(SseReader::default().push(b"data: \xff\n\n"), ["\u{fffd}"]);
    }
}
