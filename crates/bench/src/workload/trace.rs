//! Traces: what somebody else's users did, to be done again.
//!
//! Two forms, told apart by the names of the columns. Mooncake's JSON lines have `timestamp` in milliseconds,
//! `input_length`, `output_length` and `hash_ids`, one for each block of 512 tokens: equal ids are equal content.
//! Azure's have `TIMESTAMP` (date and time, or seconds), `ContextTokens` and `GeneratedTokens`, as JSON lines or, as
//! published, CSV.

use std::io::BufRead;
use std::time::Duration;

use serde::Deserialize;

use super::WorkloadError;
use super::lengths::MAX_TOKENS;
use crate::phases::MAX_REQUESTS;
use crate::prompt::{Content, Job, Segment};

/// Tokens behind one of Mooncake's hash ids.
const BLOCK_TOKENS: u32 = 512;
/// A context of that length has some hundred thousand tokens' worth of ids in its line.
const MAX_LINE_BYTES: usize = 4 << 20;
const AZURE_HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";

/// Requests with their times since the first, ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    pub times: Vec<Duration>,
    pub jobs: Vec<Job>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Mooncake(Mooncake),
    Azure(Azure),
}

#[derive(Deserialize)]
struct Mooncake {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Option<Vec<u64>>,
}

#[derive(Deserialize)]
struct Azure {
    #[serde(rename = "TIMESTAMP")]
    timestamp: Moment,
    #[serde(rename = "ContextTokens")]
    input: u32,
    #[serde(rename = "GeneratedTokens")]
    output: u32,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Moment {
    Seconds(f64),
    Written(String),
}

/// One request of a trace.
struct Row {
    seconds: f64,
    input: u32,
    output: u32,
    hash_ids: Vec<u64>,
}

/// Reads a trace. `name` is how errors call it.
///
/// # Errors
/// The first line that is in neither form, or has no sensible values.
pub fn read(reader: impl BufRead, name: &str) -> Result<Trace, WorkloadError> {
    let mut rows = Vec::new();
    for (at, line) in lines(reader, name).enumerate() {
        let line = line?;
        let text = line.trim();
        if text.is_empty() || (at == 0 && text == AZURE_HEADER) {
            continue;
        }
        let row = row(text).map_err(|reason| WorkloadError::line(name, at, reason))?;
        rows.push(row);
        if rows.len() as u64 > MAX_REQUESTS {
            let reason =
                format!("more than the {MAX_REQUESTS} requests that one run may have; shorten the file");
            return Err(WorkloadError::line(name, at, reason));
        }
    }
    if rows.is_empty() {
        return Err(WorkloadError::line(name, 0, "the file has no requests".into()));
    }
    rows.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let start = rows[0].seconds;
    let times =
        rows.iter().map(|row| Duration::try_from_secs_f64(row.seconds - start).unwrap_or(Duration::MAX));
    let times = times.collect();
    let jobs = rows.into_iter().enumerate().map(|(at, row)| job(at as u64, &row)).collect();
    Ok(Trace { times, jobs })
}

/// The lines of a file, none of them longer than is bearable.
pub(super) fn lines<'a>(
    mut reader: impl BufRead + 'a,
    name: &'a str,
) -> impl Iterator<Item = Result<String, WorkloadError>> + 'a {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        let mut bounded = std::io::Read::take(&mut reader, MAX_LINE_BYTES as u64 + 1);
        let read = bounded.read_until(b'\n', &mut line);
        at += 1;
        match read {
            Err(error) => Some(Err(WorkloadError::line(name, at - 1, error.to_string()))),
            Ok(0) => None,
            Ok(_) if line.len() > MAX_LINE_BYTES => {
                Some(Err(WorkloadError::line(name, at - 1, format!("longer than {MAX_LINE_BYTES} bytes"))))
            }
            Ok(_) => Some(
                String::from_utf8(line).map_err(|_| WorkloadError::line(name, at - 1, "no UTF-8".into())),
            ),
        }
    })
}

fn row(text: &str) -> Result<Row, String> {
    let row = if text.starts_with('{') { json(text)? } else { csv(text)? };
    if !row.seconds.is_finite() {
        return Err("the time is no number".into());
    }
    for (name, tokens) in [("input", row.input), ("output", row.output)] {
        if !(1..=MAX_TOKENS).contains(&tokens) {
            return Err(format!(
                "an {name} of {tokens} tokens is out of range; 1 to {MAX_TOKENS} are allowed"
            ));
        }
    }
    let most = u64::from(row.input.div_ceil(BLOCK_TOKENS));
    if row.hash_ids.len() as u64 > most {
        return Err(format!("{} hash_ids for {most} blocks of {BLOCK_TOKENS} tokens", row.hash_ids.len()));
    }
    Ok(row)
}

fn json(text: &str) -> Result<Row, String> {
    let wrong = |_| {
        "neither timestamp, input_length, output_length (Mooncake) nor TIMESTAMP, ContextTokens, GeneratedTokens (Azure)"
            .to_owned()
    };
    Ok(match serde_json::from_str(text).map_err(wrong)? {
        Line::Mooncake(line) => Row {
            seconds: line.timestamp / 1000.0,
            input: line.input_length,
            output: line.output_length,
            hash_ids: line.hash_ids.unwrap_or_default(),
        },
        Line::Azure(line) => {
            let seconds = match line.timestamp {
                Moment::Seconds(seconds) => seconds,
                Moment::Written(text) => written(&text)?,
            };
            Row { seconds, input: line.input, output: line.output, hash_ids: Vec::new() }
        }
    })
}

fn csv(text: &str) -> Result<Row, String> {
    let fields: Vec<&str> = text.split(',').map(str::trim).collect();
    let [time, input, output] = fields[..] else {
        return Err(format!("{} columns; the three of {AZURE_HEADER} are expected", fields.len()));
    };
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number of tokens"));
    Ok(Row { seconds: written(time)?, input: number(input)?, output: number(output)?, hash_ids: Vec::new() })
}

/// `2023-11-16 18:15:46.6805900`, or a number of seconds.
fn written(text: &str) -> Result<f64, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let moment: jiff::civil::DateTime = text
        .trim_end_matches("+00:00")
        .parse()
        .map_err(|_| format!("{text:?} is no time; give one such as 2023-11-16 18:15:46.68, or seconds"))?;
    let utc = moment.to_zoned(jiff::tz::TimeZone::UTC).map_err(|error| error.to_string())?;
    Ok(utc.timestamp().as_duration().as_secs_f64())
}

/// Blocks with an id are shared between all requests that name it; the rest is the request's own.
fn job(number: u64, row: &Row) -> Job {
    let mut left = row.input;
    let mut segments: Vec<Segment> = Vec::new();
    for id in &row.hash_ids {
        let tokens = left.min(BLOCK_TOKENS);
        left -= tokens;
        // Even streams are blocks, odd ones are requests' own.
        segments.push(Segment::of(2 * id, tokens));
    }
    if left > 0 {
        segments.push(Segment::of(2 * number + 1, left));
    }
    Job::single(Content::Random(segments), row.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(text: &str) -> Result<Trace, WorkloadError> {
        read(text.as_bytes(), "t.jsonl")
    }

    #[test]
    fn mooncakes_blocks_are_shared_by_their_ids() {
        let trace = trace(
            r#"{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 9]}
               {"timestamp": 0, "input_length": 600, "output_length": 52, "hash_ids": [0, 8]}

               {"timestamp": 3000.5, "input_length": 10, "output_length": 1}"#,
        )
        .unwrap();
        assert_eq!(
            trace.times,
            [0, 3000, 3000]
                .map(Duration::from_millis)
                .map(|t| t)
                .into_iter()
                .zip([0, 0, 500])
                .map(|(t, us)| t + Duration::from_micros(us))
                .collect::<Vec<_>>()
        );
        let segments = |at: usize| match &trace.jobs[at].turns[0].content {
            Content::Random(segments) => segments.clone(),
            Content::Given(_) => panic!("given"),
        };
        assert_eq!(segments(0), [Segment::of(0, 512), Segment::of(16, 88)]);
        assert_eq!(segments(1), [Segment::of(0, 512), Segment::of(14, 512), Segment::of(18, 76)]);
        assert_eq!(segments(2), [Segment::of(5, 10)]);
        assert_eq!(trace.jobs[0].turns[0].output_tokens, 52);
    }

    #[test]
    fn azures_columns_are_read_from_csv_and_json() {
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n";
        let json = r#"{"TIMESTAMP": "2023-11-16 18:15:46.6805900", "ContextTokens": 374, "GeneratedTokens": 44}
                      {"TIMESTAMP": "2023-11-16 18:15:50.9951690+00:00", "ContextTokens": 396, "GeneratedTokens": 109}"#;
        let from_csv = trace(csv).unwrap();
        assert_eq!(from_csv, trace(json).unwrap());
        assert!((from_csv.times[1].as_secs_f64() - 4.314579).abs() < 1e-6, "{:?}", from_csv.times);
        assert_eq!(from_csv.jobs[1].turns[0].content.tokens(), 396);
    }

    #[test]
    fn a_bad_line_is_named() {
        for (text, part) in [
            ("", "no requests"),
            ("{}", "line 1: neither timestamp"),
            ("\n1,2\n", "line 2: 2 columns"),
            ("1,5,x", "\"x\" is no number"),
            ("today,5,5", "\"today\" is no time"),
            ("1,0,5", "an input of 0 tokens"),
            ("1,5,99999999", "an output of 99999999"),
            ("NaN,5,5", "no number"),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1, 2]}"#,
                "2 hash_ids for 1 blocks",
            ),
        ] {
            let error = trace(text).unwrap_err().to_string();
            assert!(error.contains(part) && error.starts_with("t.jsonl"), "{error}");
        }
    }

    #[test]
    fn an_endless_line_is_not_read_to_its_end() {
        let endless = std::io::BufReader::new(std::io::repeat(b'x'));
        let error = read(endless, "zero").unwrap_err().to_string();
        assert!(error.contains("longer than"), "{error}");
    }
}
