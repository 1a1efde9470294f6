//! Stop strings over a stream of text pieces.

use crate::error::TextError;

/// What may be emitted after one more piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fed {
    /// No stop string yet. `text` may be emitted; more may be held back.
    Continue {
        /// Text that can no longer become part of a stop string.
        text: String,
    },
    /// A stop string is complete: emit `text` and end the sequence.
    Stopped {
        /// The last text to emit; ends with the stop string if `include_stop` was asked for.
        text: String,
        /// The stop string that was found.
        stop: String,
    },
}

/// Finds the first stop string in a text that arrives in pieces.
///
/// The first is the one that is complete first; of several that end at the same place, the longest. This is the
/// only choice that does not depend on how the text was cut into pieces. Each stop string is matched with
/// Knuth, Morris and Pratt's automaton (SIAM J. Comput. 6(2), 1977), so a byte costs O(number of stop strings)
/// amortised whatever their length, and the automaton's state is at the same time the number of bytes that must
/// be held back.
#[derive(Debug, Clone)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    include_stop: bool,
    held: String,
    stopped: Option<String>,
}

impl StopStrings {
    /// `stops` may be empty: then all text passes at once.
    ///
    /// `include_stop`: whether the stop string itself is part of the text.
    ///
    /// Fails with [`TextError::EmptyStop`] if one of them is empty.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Result<StopStrings, TextError> {
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(TextError::EmptyStop { index });
        }
        let patterns = stops.into_iter().map(Pattern::new).collect();
        Ok(StopStrings { patterns, include_stop, held: String::new(), stopped: None })
    }

    /// Takes the next piece. After the first [`Fed::Stopped`] every further piece is dropped.
    pub fn feed(&mut self, delta: &str) -> Fed {
        if let Some(stop) = &self.stopped {
            return Fed::Stopped { text: String::new(), stop: stop.clone() };
        }
        let start = self.held.len();
        self.held.push_str(delta);
        for (offset, &byte) in delta.as_bytes().iter().enumerate() {
            if let Some(index) = self.advance(byte) {
                return self.stop_at(start + offset + 1, index);
            }
        }
        let keep = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Fed::Continue { text: std::mem::replace(&mut self.held, rest) }
    }

    /// The text still held back, now that no more will come.
    pub fn finish(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.matched = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// The stop string that was found, if any.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Advances every automaton by one byte; the longest pattern that is now complete.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut found: Option<usize> = None;
        for index in 0..self.patterns.len() {
            let complete = self.patterns[index].advance(byte);
            let longer = found.is_none_or(|best| self.patterns[best].len() < self.patterns[index].len());
            if complete && longer {
                found = Some(index);
            }
        }
        found
    }

    fn stop_at(&mut self, end: usize, index: usize) -> Fed {
        let stop = self.patterns[index].text.clone();
        let keep = if self.include_stop { end } else { end - stop.len() };
        let mut text = std::mem::take(&mut self.held);
        text.truncate(keep);
        self.stopped = Some(stop.clone());
        Fed::Stopped { text, stop }
    }
}

/// One stop string and how much of it the end of the text matches.
#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// `fallback[n]`: length of the longest proper prefix of `text[..=n]` that is also its suffix.
    fallback: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Pattern {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut matched = 0;
        for index in 1..bytes.len() {
            while matched > 0 && bytes[index] != bytes[matched] {
                matched = fallback[matched - 1];
            }
            matched += usize::from(bytes[index] == bytes[matched]);
            fallback[index] = matched;
        }
        Pattern { text, fallback, matched: 0 }
    }

    fn len(&self) -> usize {
        self.text.len()
    }

    /// True when the pattern is complete with this byte. The caller stops there.
    fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(list: &[&str], include: bool) -> StopStrings {
        StopStrings::new(list.iter().map(|s| s.to_string()).collect(), include).unwrap()
    }

    fn go(text: &str) -> Fed {
        Fed::Continue { text: text.into() }
    }

    fn stop(text: &str, stop: &str) -> Fed {
        Fed::Stopped { text: text.into(), stop: stop.into() }
    }

    #[test]
    fn a_stop_may_straddle_many_pieces() {
        let mut s = stops(&["\nUser:"], false);
        assert_eq!(s.feed("Hello"), go("Hello"));
        for piece in ["\n", "U", "s", "er"] {
            assert_eq!(s.feed(piece), go(""));
        }
        assert_eq!(s.feed(": next"), stop("", "\nUser:"));
        assert_eq!(s.feed("more"), stop("", "\nUser:"));
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn a_false_start_is_released() {
        let mut s = stops(&["aab"], false);
        assert_eq!(s.feed("aa"), go(""));
        assert_eq!(s.feed("a"), go("a"));
        assert_eq!(s.feed("c"), go("aac"));
        assert_eq!(s.feed("a"), go(""));
        assert_eq!(s.finish(), "a");
    }

    #[test]
    fn the_stop_is_kept_when_asked() {
        assert_eq!(stops(&["END"], true).feed("the END."), stop("the END", "END"));
    }

    #[test]
    fn the_first_complete_stop_wins_and_then_the_longest() {
        assert_eq!(stops(&["abcd", "bc"], false).feed("xabcd"), stop("xa", "bc"));
        assert_eq!(stops(&["cd", "bcd"], false).feed("abcd"), stop("a", "bcd"));
    }

    #[test]
    fn an_empty_stop_is_refused_by_place() {
        let error = StopStrings::new(vec!["a".into(), String::new()], false).unwrap_err();
        assert_eq!(error, TextError::EmptyStop { index: 1 });
    }

    #[test]
    fn a_self_overlapping_stop_holds_back_no_more_than_it_must() {
        let mut s = stops(&["🦀é🦀é!"], false);
        assert_eq!(s.feed("🦀é🦀é"), go(""));
        assert_eq!(s.feed("🦀"), go("🦀é"));
        assert_eq!(s.feed("é!"), stop("", "🦀é🦀é!"));
    }

    /// Earliest end, then the longest: searched naively over the whole text. (start, end) in bytes.
    fn oracle(text: &str, stops: &[String]) -> Option<(usize, usize)> {
        (1..=text.len()).find_map(|end| {
            let longest =
                stops.iter().filter(|s| text.as_bytes()[..end].ends_with(s.as_bytes())).map(String::len);
            longest.max().map(|len| (end - len, end))
        })
    }

    /// How much of the end of `text` may still become a stop.
    fn must_hold(text: &str, stops: &[String]) -> usize {
        let could =
            |n: &usize| stops.iter().any(|s| s.as_bytes().starts_with(&text.as_bytes()[text.len() - n..]));
        (0..=text.len()).rev().find(could).unwrap_or(0)
    }

    fn letters(max: usize) -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', '🦀']), 1..max)
            .prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_pieces_stop_where_a_search_over_the_whole_text_does(
            pieces in prop::collection::vec(letters(6), 0..12),
            list in prop::collection::vec(letters(5), 0..4),
            include in any::<bool>(),
        ) {
            let whole = pieces.concat();
            let expected = oracle(&whole, &list);
            let mut s = StopStrings::new(list.clone(), include).unwrap();
            let (mut out, mut seen, mut stopped) = (String::new(), String::new(), None);
            for piece in &pieces {
                match s.feed(piece) {
                    Fed::Continue { text } => {
                        out += &text;
                        seen += piece;
                        prop_assert_eq!(seen.len() - out.len(), must_hold(&seen, &list), "holds back what it must");
                    }
                    Fed::Stopped { text, stop } => {
                        out += &text;
                        stopped = Some(stop);
                        break;
                    }
                }
            }
            out += &s.finish();
            match expected {
                Some((start, end)) => {
                    prop_assert_eq!(stopped.as_deref(), Some(&whole[start..end]));
                    prop_assert_eq!(out, &whole[..if include { end } else { start }]);
                }
                None => {
                    prop_assert_eq!(stopped, None);
                    prop_assert_eq!(out, whole);
                }
            }
        }
    }
}
