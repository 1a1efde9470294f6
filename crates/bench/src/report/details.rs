//! What a report needs of the single requests, gathered while their records pass by: distributions in bounded memory,
//! and the first measured requests of each repeat for the picture of who ran when.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::histogram::Histogram;
use crate::result::{Outcome, Phase, RequestRecord};

/// Requests in a timeline.
pub const TIMELINE_REQUESTS: usize = 200;
/// Pauses kept of each.
const MAX_PAUSES: usize = 24;
/// A gap of at least that many times the request's mean is a pause.
const PAUSE: f64 = 3.0;
/// Shorter ones could not be seen.
const MIN_PAUSE_SECONDS: f64 = 0.005;
/// Points and repeats of which details are kept; more than anybody looks at.
const MAX_POINTS: usize = 256;
const MAX_REPEATS: usize = 1024;
/// Longest line of `requests.jsonl` that is read: an answer of some million tokens.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// See the module.
#[derive(Debug, Default)]
pub struct Details {
    samples: BTreeMap<u32, Samples>,
    timelines: BTreeMap<(u32, u32), BTreeMap<u64, Span>>,
}

/// Latencies of the completed measured requests of a point, all repeats pooled.
#[derive(Debug, Default)]
pub struct Samples {
    pub ttft: Histogram,
    pub itl: Histogram,
}

/// One request in a timeline. Points in time are seconds since the start of its repeat.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub index: u64,
    pub scheduled: f64,
    pub sent: Option<f64>,
    /// When its first step began, where that is known.
    pub started: Option<f64>,
    pub first_token: Option<f64>,
    pub end: f64,
    /// Long gaps between two of its tokens: where they began, and how long they were.
    pub pauses: Vec<(f64, f64)>,
    pub input_tokens: u32,
    pub output_tokens: u32,
    /// Of a request that failed.
    pub failure: Option<&'static str>,
    pub is_cut: bool,
}

/// Records that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DetailsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("line {line} of {} is no record of a request: {source}; was it written by another version?", path.display())]
    Record { path: PathBuf, line: usize, source: serde_json::Error },
    #[error("line {line} of {} is longer than {MAX_LINE_BYTES} bytes; leave it out", path.display())]
    TooLong { path: PathBuf, line: usize },
}

impl Details {
    /// Reads `requests.jsonl`.
    ///
    /// # Errors
    /// If it cannot be read, or a line is no record.
    pub fn read(path: &Path) -> Result<Self, DetailsError> {
        let failed = |source| DetailsError::Read { path: path.to_owned(), source };
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let (mut details, mut text) = (Self::default(), Vec::new());
        for line in 1.. {
            text.clear();
            let bytes = (&mut file).take(MAX_LINE_BYTES).read_until(b'\n', &mut text).map_err(failed)?;
            if bytes == 0 {
                break;
            }
            if bytes as u64 == MAX_LINE_BYTES {
                return Err(DetailsError::TooLong { path: path.to_owned(), line });
            }
            let record = serde_json::from_slice(&text);
            details.add(&record.map_err(|source| DetailsError::Record {
                path: path.to_owned(),
                line,
                source,
            })?);
        }
        Ok(details)
    }

    /// Takes in a request.
    pub fn add(&mut self, record: &RequestRecord) {
        if record.phase != Phase::Measured {
            return;
        }
        if record.is_completed()
            && (self.samples.len() < MAX_POINTS || self.samples.contains_key(&record.point))
        {
            self.samples.entry(record.point).or_default().add(record);
        }
        let key = (record.point, record.repeat);
        if self.timelines.len() < MAX_REPEATS || self.timelines.contains_key(&key) {
            let timeline = self.timelines.entry(key).or_default();
            let is_wanted = timeline.len() < TIMELINE_REQUESTS
                || timeline.last_key_value().is_some_and(|(last, _)| record.index < *last);
            if is_wanted {
                timeline.insert(record.index, Span::of(record));
                if timeline.len() > TIMELINE_REQUESTS {
                    timeline.pop_last();
                }
            }
        }
    }

    pub fn samples(&self, point: usize) -> Option<&Samples> {
        self.samples.get(&u32::try_from(point).ok()?)
    }

    /// The first measured requests of a repeat, in the order of the schedule.
    pub fn timeline(&self, point: usize, repeat: u32) -> Vec<&Span> {
        let point = u32::try_from(point).unwrap_or(u32::MAX);
        self.timelines.get(&(point, repeat)).into_iter().flat_map(BTreeMap::values).collect()
    }
}

impl Samples {
    fn add(&mut self, record: &RequestRecord) {
        if let Some(ttft) = record.ttft_seconds() {
            self.ttft.record(Duration::try_from_secs_f64(ttft).unwrap_or_default());
        }
        for micros in &record.gaps_micros {
            self.itl.record(Duration::from_micros(u64::from(*micros)));
        }
    }
}

impl Span {
    fn of(record: &RequestRecord) -> Self {
        let usage = record.usage.unwrap_or_default();
        Self {
            index: record.index,
            scheduled: record.scheduled_seconds,
            sent: record.sent_seconds,
            started: record.started_seconds,
            first_token: record.first_token_seconds,
            end: record.last_token_seconds.filter(|_| record.is_completed()).unwrap_or(record.end_seconds),
            pauses: pauses(record),
            input_tokens: if record.usage.is_some() {
                usage.prompt_tokens
            } else {
                record.wanted_input_tokens
            },
            output_tokens: if record.usage.is_some() { usage.completion_tokens } else { record.chunks },
            failure: match &record.outcome {
                Outcome::Failed { class, .. } => Some(class.name()),
                Outcome::Completed | Outcome::Cut => None,
            },
            is_cut: record.outcome == Outcome::Cut,
        }
    }
}

/// The longest gaps between tokens that stand out from the request's own, in the order of time.
fn pauses(record: &RequestRecord) -> Vec<(f64, f64)> {
    let Some(mut at) = record.first_token_seconds else { return Vec::new() };
    let total: f64 = record.gaps_micros.iter().map(|micros| f64::from(*micros) / 1e6).sum();
    let least = (PAUSE * total / record.gaps_micros.len().max(1) as f64).max(MIN_PAUSE_SECONDS);
    let mut pauses = Vec::new();
    for micros in &record.gaps_micros {
        let gap = f64::from(*micros) / 1e6;
        if gap >= least {
            pauses.push((at, gap));
        }
        at += gap;
    }
    pauses.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
    pauses.truncate(MAX_PAUSES);
    pauses.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    pauses
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::result::UsageCounts;

    fn record(index: u64, phase: Phase) -> RequestRecord {
        let mut record = crate::run::blank(index, phase, Duration::from_secs(index));
        let start = record.scheduled_seconds;
        record.sent_seconds = Some(start);
        record.first_token_seconds = Some(start + 0.1);
        record.gaps_micros = vec![10_000, 10_000, 200_000, 10_000];
        record.last_token_seconds = Some(start + 0.33);
        record.end_seconds = start + 0.34;
        record.usage = Some(UsageCounts { prompt_tokens: 7, completion_tokens: 5, cached_tokens: 0 });
        record.outcome = Outcome::Completed;
        record
    }

    #[test]
    fn a_timeline_is_the_first_measured_requests_in_order() {
        let mut details = Details::default();
        details.add(&record(0, Phase::WarmUp));
        // In the order in which they ended.
        (1..=300).rev().for_each(|index| details.add(&record(index, Phase::Measured)));
        let indices: Vec<u64> = details.timeline(0, 0).iter().map(|span| span.index).collect();
        assert_eq!(indices, (1..=TIMELINE_REQUESTS as u64).collect::<Vec<_>>());
        assert_eq!(details.samples(0).unwrap().ttft.count(), 300);
        assert_eq!(details.samples(0).unwrap().itl.count(), 1200);
        assert!(details.timeline(1, 0).is_empty() && details.samples(1).is_none());
    }

    #[test]
    fn a_pause_is_a_gap_that_stands_out() {
        let pauses = pauses(&record(0, Phase::Measured));
        let [(at, length)] = pauses[..] else { panic!("{pauses:?}") };
        assert!((at - 0.12).abs() < 1e-9 && (length - 0.2).abs() < 1e-9, "{pauses:?}");
    }

    #[test]
    fn records_are_read_back_and_a_broken_line_is_named() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "{}", serde_json::to_string(&record(3, Phase::Measured)).unwrap()).unwrap();
        let details = Details::read(file.path()).unwrap();
        assert_eq!(details.timeline(0, 0).len(), 1);
        writeln!(file, "{{\"point\": 1}}").unwrap();
        let error = Details::read(file.path()).unwrap_err().to_string();
        assert!(error.starts_with("line 2 of "), "{error}");
    }
}
