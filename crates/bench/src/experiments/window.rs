//! The stretch of a run in which a whole batch decodes: from the moment at which the last request has its first
//! token to the one at which the first request has its last. Prefill and the ends are outside, so that what is
//! counted inside is what F3 is about.

use crate::result::RequestRecord;

/// What came in between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Steady {
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// Mean context of the sequences.
    pub context_tokens: f64,
}

/// `None` if the requests never all decode at once.
pub fn steady(records: &[RequestRecord]) -> Option<Steady> {
    let streams: Vec<Stream> = records.iter().map(Stream::new).collect::<Option<_>>()?;
    let start = streams.iter().map(|stream| stream.times[0]).fold(f64::NEG_INFINITY, f64::max);
    let end = streams.iter().filter_map(|stream| stream.times.last().copied()).fold(f64::INFINITY, f64::min);
    let seconds = end - start;
    if seconds <= 0.0 || !seconds.is_finite() {
        return None;
    }
    let tokens: f64 = streams.iter().map(|stream| stream.tokens_between(start, end)).sum();
    let contexts = streams.iter().map(|stream| stream.mean_context(start, end)).sum::<f64>();
    Some(Steady {
        seconds,
        tokens_per_second: tokens / seconds,
        context_tokens: contexts / streams.len() as f64,
    })
}

/// When the deltas of one answer came.
struct Stream {
    prompt_tokens: f64,
    times: Vec<f64>,
    /// A delta may hold several tokens, when a character has several; the usage tells how many there were.
    tokens_per_delta: f64,
}

impl Stream {
    fn new(record: &RequestRecord) -> Option<Self> {
        let usage = record.usage?;
        let first = record.first_token_seconds?;
        let mut times = vec![first];
        let mut at = first;
        for gap in &record.gaps_micros {
            at += f64::from(*gap) * 1e-6;
            times.push(at);
        }
        (times.len() > 1).then(|| Self {
            prompt_tokens: f64::from(usage.prompt_tokens),
            tokens_per_delta: f64::from(usage.completion_tokens) / times.len() as f64,
            times,
        })
    }

    fn tokens_between(&self, start: f64, end: f64) -> f64 {
        let inside = self.times.iter().filter(|time| start < **time && **time <= end);
        inside.count() as f64 * self.tokens_per_delta
    }

    /// In the middle of the stretch.
    fn mean_context(&self, start: f64, end: f64) -> f64 {
        let before = self.times.iter().filter(|time| **time <= start).count() as f64 * self.tokens_per_delta;
        self.prompt_tokens + before + self.tokens_between(start, end) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::result::{Outcome, Phase, UsageCounts};
    use crate::run::blank;

    fn record(first: f64, gaps: &[f64], completion_tokens: u32) -> RequestRecord {
        RequestRecord {
            first_token_seconds: Some(first),
            gaps_micros: gaps.iter().map(|gap| (gap * 1e6).round() as u32).collect(),
            usage: Some(UsageCounts { prompt_tokens: 100, completion_tokens, cached_tokens: 0 }),
            outcome: Outcome::Completed,
            ..blank(0, Phase::Measured, Duration::ZERO)
        }
    }

    /// Two sequences, 10 ms a step; the second joins after 50 ms, and a prefill of 30 ms lies before.
    #[test]
    fn only_the_part_that_is_common_to_all_counts() {
        let mut early = vec![0.01; 4];
        early.push(0.04);
        early.extend([0.01; 20]);
        let records = [record(1.0, &early, 26), record(1.08, &[0.01; 30], 31)];
        let steady = steady(&records).unwrap();
        assert!((steady.seconds - 0.2).abs() < 1e-9, "{steady:?}");
        assert!((steady.tokens_per_second - 200.0).abs() < 1e-6, "{steady:?}");
        // 6 and 1 tokens before it, 20 inside, of which 10 on average.
        assert!((steady.context_tokens - (116.0 + 111.0) / 2.0).abs() < 1e-9, "{steady:?}");
    }

    #[test]
    fn a_delta_of_several_tokens_counts_as_several() {
        let steady = steady(&[record(0.0, &[0.02; 9], 20)]).unwrap();
        assert!((steady.tokens_per_second - 100.0).abs() < 1e-6, "{steady:?}");
    }

    #[test]
    fn requests_that_never_meet_have_no_such_stretch() {
        assert_eq!(steady(&[record(0.0, &[0.01; 5], 6), record(1.0, &[0.01; 5], 6)]), None);
        assert_eq!(steady(&[record(0.0, &[], 1)]), None);
        assert_eq!(steady(&[]), None);
    }
}
