//! Passes a stream on in whole events, so that a replica that dies in the middle of one does not leave half of it
//! before the event that says so. Events that wait to pass become one piece: each piece is a call to the kernel, which
//! costs more than the copy.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Most bytes of an unfinished event that are kept back; more pass as they come.
const MAX_KEPT: usize = 256 * 1024;

#[derive(Debug, Default)]
pub struct WholeEvents {
    /// Of an event whose end has not come, in pieces.
    kept: VecDeque<Bytes>,
    kept_bytes: usize,
    /// What may pass.
    ready: VecDeque<Bytes>,
    ready_bytes: usize,
}

impl WholeEvents {
    pub fn push(&mut self, mut bytes: Bytes) {
        match end_of_last_event(&bytes) {
            Some(end) => {
                let rest = bytes.split_off(end);
                self.keep(bytes);
                self.pass_rest();
                self.keep(rest);
            }
            // The blank line may lie across two pieces.
            None if self.ends_event(&bytes) => {
                self.keep(bytes);
                self.pass_rest();
            }
            None => self.keep(bytes),
        }
        if self.kept_bytes > MAX_KEPT {
            self.pass_rest();
        }
    }

    /// The stream ended by itself: what is left passes too.
    pub fn pass_rest(&mut self) {
        self.ready.append(&mut self.kept);
        self.ready_bytes += std::mem::take(&mut self.kept_bytes);
    }

    /// Bytes that may pass.
    pub fn ready_bytes(&self) -> usize {
        self.ready_bytes
    }

    /// All that may pass.
    pub fn take(&mut self) -> Option<Bytes> {
        let bytes = std::mem::take(&mut self.ready_bytes);
        if self.ready.len() <= 1 {
            return self.ready.pop_front();
        }
        let mut all = BytesMut::with_capacity(bytes);
        self.ready.drain(..).for_each(|piece| all.extend_from_slice(&piece));
        Some(all.freeze())
    }

    fn keep(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.kept_bytes += bytes.len();
            self.kept.push_back(bytes);
        }
    }

    /// Whether a piece that holds no blank line ends one that the piece before began.
    fn ends_event(&self, bytes: &[u8]) -> bool {
        let before = self.kept.back().is_some_and(|kept| kept.ends_with(b"\n") || kept.ends_with(b"\n\r"));
        before && matches!(bytes, b"\n" | b"\r\n")
    }
}

/// One past the last blank line.
fn end_of_last_event(bytes: &[u8]) -> Option<usize> {
    (1..bytes.len())
        .rev()
        .find(|at| bytes[*at] == b'\n' && (bytes[at - 1] == b'\n' || bytes[..*at].ends_with(b"\n\r")))
        .map(|at| at + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn passed(events: &mut WholeEvents) -> Vec<u8> {
        let bytes = events.ready_bytes();
        let taken = events.take().unwrap_or_default();
        assert_eq!((taken.len(), events.ready_bytes()), (bytes, 0));
        taken.to_vec()
    }

    #[test]
    fn half_an_event_waits_for_its_end() {
        let mut events = WholeEvents::default();
        events.push(Bytes::from_static(b"data: 1\n\ndata: 2"));
        assert_eq!(passed(&mut events), b"data: 1\n\n");
        events.push(Bytes::from_static(b"2\n"));
        assert_eq!(passed(&mut events), b"");
        events.push(Bytes::from_static(b"\n"));
        assert_eq!(passed(&mut events), b"data: 22\n\n");
        events.push(Bytes::from_static(b"data: 3\r\n\r\ndata: "));
        assert_eq!(passed(&mut events), b"data: 3\r\n\r\n");
        events.pass_rest();
        assert_eq!(passed(&mut events), b"data: ");
    }

    #[test]
    fn an_endless_event_is_not_kept_for_ever() {
        let mut events = WholeEvents::default();
        (0..300).for_each(|_| events.push(Bytes::from(vec![b'x'; 1024])));
        assert!(events.kept_bytes <= MAX_KEPT);
        assert!(passed(&mut events).len() > 200 * 1024);
    }

    proptest! {
        #[test]
        fn all_bytes_pass_in_order(pieces in prop::collection::vec("[a\r\n]{0,6}", 0..40)) {
            let mut events = WholeEvents::default();
            let mut out = Vec::new();
            for piece in &pieces {
                events.push(Bytes::from(piece.clone()));
                out.extend(passed(&mut events));
            }
            events.pass_rest();
            out.extend(passed(&mut events));
            prop_assert_eq!(out, pieces.concat().into_bytes());
        }
    }
}
