//! `/metrics` in OpenMetrics' format (version 1.0), which is Prometheus' text with three differences, of which the last
//! is the point: counters are announced without `_total`, the text says that it has ended, and a bucket can name the
//! trace of a request that fell into it. The library that keeps the metrics cannot write it.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// The content type of this format.
pub const OPEN_METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Of each bucket of a histogram, the last request whose trace was recorded.
pub(crate) struct Exemplars {
    /// Upper bounds without the last one, which is infinite.
    bounds: Vec<f64>,
    last: Mutex<Vec<Option<Exemplar>>>,
}

#[derive(Clone)]
struct Exemplar {
    trace_id: String,
    value: f64,
    at: SystemTime,
}

impl Exemplars {
    pub fn new(bounds: Vec<f64>) -> Self {
        let last = Mutex::new(vec![None; bounds.len() + 1]);
        Self { bounds, last }
    }

    pub fn note(&self, value: f64, trace_id: &str) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        let exemplar = Exemplar { trace_id: trace_id.to_owned(), value, at: SystemTime::now() };
        self.last.lock().unwrap_or_else(PoisonError::into_inner)[bucket] = Some(exemplar);
    }

    /// What stands behind the sample of a bucket; empty if nothing does.
    fn suffix(&self, bucket: usize) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Exemplar { trace_id, value, at }) = last.get(bucket).and_then(Option::as_ref) else {
            return String::new();
        };
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        format!(" # {{trace_id=\"{trace_id}\"}} {value} {at:.3}")
    }
}

/// Rewrites Prometheus' text. `exemplars`: by the full name of the histogram.
pub(crate) fn rewrite(text: &str, exemplars: &[(String, &Exemplars)]) -> String {
    let counters: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .filter(|name| name.ends_with("_total"))
        .collect();
    let mut rewritten = String::with_capacity(text.len());
    let mut bucket = 0;
    for line in text.lines() {
        let told = exemplars.iter().find_map(|(name, exemplars)| {
            line.strip_prefix(name.as_str())?.starts_with("_bucket{").then_some(*exemplars)
        });
        let suffix = told.map(|exemplars| exemplars.suffix(bucket)).unwrap_or_default();
        bucket = if told.is_some() { bucket + 1 } else { 0 };
        // Writing into a String cannot fail.
        let _ = match announced(line).filter(|(_, name, _)| counters.contains(name)) {
            Some((kind, name, rest)) => {
                writeln!(rewritten, "# {kind} {} {rest}", name.trim_end_matches("_total"))
            }
            None => writeln!(rewritten, "{line}{suffix}"),
        };
    }
    rewritten + "# EOF\n"
}

/// `# HELP name text` and `# TYPE name kind` in their parts.
fn announced(line: &str) -> Option<(&str, &str, &str)> {
    let (kind, rest) = line.strip_prefix("# ")?.split_once(' ')?;
    let (name, rest) = rest.split_once(' ')?;
    Some((kind, name, rest))
}

/// Whether a scraper with this `Accept` header takes OpenMetrics.
pub fn accepts_open_metrics(accept: &str) -> bool {
    accept.split(',').any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let is_wanted =
            parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"));
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f64>);
        is_wanted && weight.is_ok_and(|weight| weight > 0.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# HELP a_total Things.
# TYPE a_total counter
a_total{m=\"x\"} 3
# HELP t_seconds Time.
# TYPE t_seconds histogram
t_seconds_bucket{le=\"1\"} 1
t_seconds_bucket{le=\"+Inf\"} 2
t_seconds_sum 5
t_seconds_count 2
";

    #[test]
    fn counters_lose_their_ending_in_what_announces_them_and_buckets_get_their_trace() {
        let exemplars = Exemplars::new(vec![1.0]);
        exemplars.note(1.0, "first");
        exemplars.note(0.5, "second");
        let text = rewrite(TEXT, &[("t_seconds".to_owned(), &exemplars)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..3], ["# HELP a Things.", "# TYPE a counter", "a_total{m=\"x\"} 3"]);
        assert!(lines[5].starts_with("t_seconds_bucket{le=\"1\"} 1 # {trace_id=\"second\"} 0.5 "), "{text}");
        assert_eq!(lines[6], "t_seconds_bucket{le=\"+Inf\"} 2");
        assert!(text.ends_with("\n# EOF\n"));
        exemplars.note(7.0, "third");
        let text = rewrite(TEXT, &[("t_seconds".to_owned(), &exemplars)]);
        assert!(text.contains("{le=\"+Inf\"} 2 # {trace_id=\"third\"} 7 "), "{text}");
    }

    #[test]
    fn prometheus_asks_for_it_and_browsers_do_not() {
        for accept in [
            "application/openmetrics-text",
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "text/plain, Application/OpenMetrics-Text; version=0.0.1",
        ] {
            assert!(accepts_open_metrics(accept), "{accept}");
        }
        for accept in ["", "*/*", "text/plain;version=0.0.4", "application/openmetrics-text;q=0", "q=1"] {
            assert!(!accepts_open_metrics(accept), "{accept}");
        }
    }
}
