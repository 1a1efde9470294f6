//! What a replica counts, under the names and with the buckets that the real one exports.

use std::time::Duration;

use servelab_router::choice::rates;
use servelab_telemetry::names::{self, Kind, Metric};

/// A histogram as Prometheus has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bounds in nanoseconds, so that no sum depends on its order.
    bounds: Vec<u64>,
    /// One more than bounds; not added up.
    counts: Vec<u64>,
    sum_nanos: u64,
}

impl Histogram {
    fn of(metric: Metric) -> Self {
        let bounds = match metric.kind {
            Kind::Histogram(buckets) => buckets.bounds(u32::MAX),
            Kind::Gauge | Kind::Counter => Vec::new(),
        };
        let bounds: Vec<u64> = bounds.iter().map(|bound| (bound * 1e9).round() as u64).collect();
        Self { counts: vec![0; bounds.len() + 1], bounds, sum_nanos: 0 }
    }

    pub fn observe(&mut self, value: Duration, times: u64) {
        let nanos = nanos(value);
        let bucket = self.bounds.partition_point(|bound| *bound < nanos);
        self.counts[bucket] += times;
        self.sum_nanos += nanos * times;
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub fn sum_seconds(&self) -> f64 {
        self.sum_nanos as f64 / 1e9
    }

    /// Upper bounds in seconds as text, and how many were no larger; the last is `+Inf`.
    pub fn buckets(&self) -> impl Iterator<Item = (String, u64)> {
        let bounds = self.bounds.iter().map(|bound| (*bound as f64 / 1e9).to_string());
        bounds.chain(["+Inf".to_owned()]).zip(self.counts.iter()).scan(0, |sum, (bound, count)| {
            *sum += count;
            Some((bound, *sum))
        })
    }
}

/// Since the replica's start.
#[derive(Clone, Debug, PartialEq)]
pub struct Counters {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    pub succeeded: u64,
    pub aborted: u64,
    pub busy_nanos: u64,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub queue_time: Histogram,
    pub prefill_time: Histogram,
    pub latency: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            succeeded: 0,
            aborted: 0,
            busy_nanos: 0,
            time_to_first_token: Histogram::of(names::TIME_TO_FIRST_TOKEN_SECONDS),
            inter_token_latency: Histogram::of(names::INTER_TOKEN_LATENCY_SECONDS),
            queue_time: Histogram::of(names::REQUEST_QUEUE_TIME_SECONDS),
            prefill_time: Histogram::of(names::REQUEST_PREFILL_TIME_SECONDS),
            latency: Histogram::of(names::E2E_REQUEST_LATENCY_SECONDS),
        }
    }
}

/// A request's times at one replica.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub arrived: Duration,
    pub scheduled: Duration,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
}

impl Counters {
    pub fn first_token(&mut self, now: Duration, times: Times) {
        self.prompt_tokens += u64::from(times.prompt_tokens);
        self.cached_tokens += u64::from(times.cached_tokens);
        self.time_to_first_token.observe(now.saturating_sub(times.arrived), 1);
        self.queue_time.observe(times.scheduled.saturating_sub(times.arrived), 1);
        self.prefill_time.observe(now.saturating_sub(times.scheduled), 1);
    }

    pub fn ended(&mut self, now: Duration, arrived: Duration) {
        self.succeeded += 1;
        self.latency.observe(now.saturating_sub(arrived), 1);
    }

    pub fn rates(&self, at: Duration) -> rates::Counters {
        rates::Counters {
            at,
            computed_prompt_tokens: (self.prompt_tokens - self.cached_tokens) as f64,
            prefill_seconds: self.prefill_time.sum_seconds(),
            token_gap_seconds: self.inter_token_latency.sum_seconds(),
            token_gaps: self.inter_token_latency.count() as f64,
        }
    }
}

pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up_and_hold_their_upper_bound() {
        let mut histogram = Histogram::of(names::TIME_TO_FIRST_TOKEN_SECONDS);
        histogram.observe(Duration::from_millis(1), 2);
        histogram.observe(Duration::from_secs(9999), 1);
        let buckets: Vec<(String, u64)> = histogram.buckets().collect();
        assert_eq!(buckets.first(), Some(&("0.001".to_owned(), 2)));
        assert_eq!(buckets.last(), Some(&("+Inf".to_owned(), 3)));
        assert_eq!((histogram.count(), histogram.sum_seconds()), (3, 9999.002));
    }
}
