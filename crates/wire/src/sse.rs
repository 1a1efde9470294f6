//! Server-sent events, as far as OpenAI's streams use them: one `data:` line an event.

use serde::Serialize;

/// The frame that ends a stream.
pub const DONE: &str = "data: [DONE]\n\n";

/// One event that carries `data` as JSON.
///
/// # Errors
/// If `data` cannot be written as JSON.
pub fn frame<T: Serialize>(data: &T) -> Result<String, serde_json::Error> {
    // JSON text holds no raw line break, so that one `data:` line carries it all.
    serde_json::to_string(data).map(|json| format!("data: {json}\n\n"))
}

/// Splits a byte stream into the `data` of its events, wherever the network cut it.
/// Events, comments and fields other than `data` are skipped.
#[derive(Debug, Default)]
pub struct SseReader {
    line: Vec<u8>,
    data: Option<String>,
}

impl SseReader {
    /// Takes the next bytes and gives the data of every event that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line)).into_owned();
            events.extend(self.line_ended(&line));
        }
        events
    }

    fn line_ended(&mut self, line: &str) -> Option<String> {
        if line.is_empty() {
            return self.data.take();
        }
        if let Some(data) = line.strip_prefix("data:") {
            let data = data.strip_prefix(' ').unwrap_or(data);
            match &mut self.data {
                Some(earlier) => {
                    earlier.push('\n');
                    earlier.push_str(data);
                }
                None => self.data = Some(data.to_owned()),
            }
        }
        None
    }
}
