//! Service level objectives: what was promised, and whether it was kept.

use crate::result::{RequestRecord, Slo, SloLimit, SloMetric};

/// A limit that is none.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "{text:?} is no limit: {reason}; give METRIC=TIME[@pNN] with ttft, tpot or e2el, such as ttft=500ms@p95"
)]
pub struct SloError {
    text: String,
    reason: String,
}

impl std::str::FromStr for SloLimit {
    type Err = SloError;

    /// Reads `ttft=500ms@p95`. Without a percentile it is the 99th.
    fn from_str(text: &str) -> Result<Self, SloError> {
        let wrong = |reason: &str| SloError { text: text.into(), reason: reason.into() };
        let (metric, limit) = text.split_once('=').ok_or_else(|| wrong("it has no ="))?;
        let (limit, percentile) = match limit.split_once("@p") {
            Some((limit, percentile)) => {
                let percentile = percentile.parse().map_err(|_| wrong("the percentile is no number"))?;
                (limit, percentile)
            }
            None => (limit, 99.0),
        };
        if !(percentile > 0.0 && percentile <= 100.0) {
            return Err(wrong("the percentile is not above 0 and at most 100"));
        }
        let metric = match metric.trim() {
            "ttft" => SloMetric::Ttft,
            "tpot" => SloMetric::Tpot,
            "e2el" | "e2e" => SloMetric::E2el,
            _ => return Err(wrong("there is no such metric")),
        };
        let limit_ms =
            milliseconds(limit.trim()).ok_or_else(|| wrong("the time is no number with ms or s"))?;
        Ok(Self { metric, limit_ms, percentile })
    }
}

/// `500ms`, `2s`, or, as in vLLM's `--goodput`, a bare number of milliseconds.
fn milliseconds(text: &str) -> Option<f64> {
    let (number, factor) = match text.strip_suffix("ms") {
        Some(number) => (number, 1.0),
        None => text.strip_suffix('s').map_or((text, 1.0), |number| (number, 1000.0)),
    };
    let value: f64 = number.trim().parse().ok()?;
    (value > 0.0 && value < 1e12).then_some(value * factor)
}

impl SloMetric {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::E2el => "e2el",
        }
    }
}

impl std::fmt::Display for SloLimit {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "p{} {} <= {} ms", self.percentile, self.metric.name(), self.limit_ms)
    }
}

impl std::fmt::Display for Slo {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let limits: Vec<String> = self.limits.iter().map(ToString::to_string).collect();
        out.write_str(&limits.join(" and "))
    }
}

impl SloLimit {
    /// Whether a request kept it. One that failed did not; an answer of one token has no time between tokens, and
    /// counts as 0 as at vLLM.
    pub fn is_kept_by(&self, record: &RequestRecord) -> bool {
        self.is_kept_without(record, 0.0)
    }

    /// Whether it would have been kept, had the client sent the request `lag` seconds earlier.
    fn is_kept_without(&self, record: &RequestRecord, lag: f64) -> bool {
        let seconds = match self.metric {
            SloMetric::Ttft => record.ttft_seconds().map(|seconds| seconds - lag),
            SloMetric::Tpot => record.tpot_seconds().or(Some(0.0)),
            SloMetric::E2el => record.e2el_seconds().map(|seconds| seconds - lag),
        };
        record.is_completed() && seconds.is_some_and(|seconds| seconds * 1000.0 <= self.limit_ms)
    }
}

impl Slo {
    /// Whether a request kept every limit: what counts into goodput.
    pub fn is_kept_by(&self, record: &RequestRecord) -> bool {
        self.limits.iter().all(|limit| limit.is_kept_by(record))
    }

    /// Whether the requests together would have kept it, had the client not been late.
    pub fn is_kept_without_lag<'a>(&self, ended: impl Iterator<Item = &'a RequestRecord> + Clone) -> bool {
        let total = ended.clone().count() as f64;
        self.limits.iter().all(|limit| {
            let good = ended.clone().filter(|record| {
                limit.is_kept_without(record, record.send_lag_seconds().unwrap_or_default())
            });
            100.0 * good.count() as f64 >= limit.percentile * total
        })
    }

    /// Whether the requests together kept it: of each limit, at least its percentile of them. In words, what was
    /// broken, or how much room was left.
    ///
    /// # Errors
    /// The limits that were broken.
    pub fn judge<'a>(
        &self,
        ended: impl Iterator<Item = &'a RequestRecord> + Clone,
    ) -> Result<String, String> {
        let total = ended.clone().count();
        if total == 0 {
            return Err("no measured request ended".into());
        }
        let (mut broken, mut kept) = (Vec::new(), Vec::new());
        for limit in &self.limits {
            let good = ended.clone().filter(|record| limit.is_kept_by(record)).count();
            let share = 100.0 * good as f64 / total as f64;
            let line =
                format!("{share:.2} % of {total} within {} = {} ms", limit.metric.name(), limit.limit_ms);
            if share >= limit.percentile { kept.push(line) } else { broken.push(line) }
        }
        if broken.is_empty() { Ok(kept.join("; ")) } else { Err(broken.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::result::{FailureClass, Outcome, Phase, UsageCounts};

    fn record(ttft: f64, tpot: f64, failed: bool) -> RequestRecord {
        let mut record = crate::run::blank(0, Phase::Measured, Duration::from_secs(1));
        record.first_token_seconds = Some(1.0 + ttft);
        record.last_token_seconds = Some(1.0 + ttft + 10.0 * tpot);
        record.usage = Some(UsageCounts { completion_tokens: 11, ..UsageCounts::default() });
        record.outcome = Outcome::Completed;
        if failed {
            record.outcome =
                Outcome::Failed { class: FailureClass::Stall, status: None, message: String::new() };
        }
        record
    }

    #[test]
    fn limits_are_read_as_people_type_them() {
        let read = |text: &str| text.parse::<SloLimit>().unwrap();
        assert_eq!(
            read("ttft=500ms@p95"),
            SloLimit { metric: SloMetric::Ttft, limit_ms: 500.0, percentile: 95.0 }
        );
        assert_eq!(read("e2e=2s"), SloLimit { metric: SloMetric::E2el, limit_ms: 2000.0, percentile: 99.0 });
        assert_eq!(read("tpot=50@p99.9").percentile, 99.9);
        for (text, part) in [
            ("ttft", "no ="),
            ("itl=5ms", "no such metric"),
            ("ttft=fast", "no number"),
            ("ttft=-1ms", "no number"),
            ("ttft=1ms@p0", "percentile"),
            ("ttft=1ms@p101", "percentile"),
            ("ttft=1ms@px", "percentile"),
        ] {
            let error = text.parse::<SloLimit>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_failure_keeps_no_promise() {
        let slo = Slo { limits: vec!["ttft=100ms".parse().unwrap(), "tpot=20ms".parse().unwrap()] };
        assert!(slo.is_kept_by(&record(0.09, 0.019, false)));
        assert!(!slo.is_kept_by(&record(0.09, 0.021, false)));
        assert!(!slo.is_kept_by(&record(0.09, 0.019, true)));
    }

    #[test]
    fn the_percentile_says_how_many_may_break_it() {
        let slo = Slo { limits: vec!["ttft=100ms@p90".parse().unwrap()] };
        let mut records: Vec<_> = (0..9).map(|_| record(0.05, 0.0, false)).collect();
        records.push(record(0.5, 0.0, false));
        assert_eq!(slo.judge(records.iter()).unwrap(), "90.00 % of 10 within ttft = 100 ms");
        records.push(record(0.05, 0.0, true));
        assert!(
            slo.judge(records.iter()).unwrap_err().starts_with("81.82 % of 11"),
            "a failure counts against it"
        );
        assert!(slo.judge([].iter()).is_err());
    }

    #[test]
    fn what_a_late_client_broke_is_told_apart() {
        let slo = Slo { limits: vec!["ttft=100ms@p50".parse().unwrap()] };
        let sent_after = |lag: f64| {
            let mut record = record(0.15, 0.0, false);
            record.sent_seconds = Some(1.0 + lag);
            [record]
        };
        assert!(
            slo.judge(sent_after(0.06).iter()).is_err() && slo.is_kept_without_lag(sent_after(0.06).iter())
        );
        assert!(!slo.is_kept_without_lag(sent_after(0.04).iter()));
    }
}
