//! What is measured about one request, from its arrival to its end.
//!
//! ```text
//! arrived   queued      scheduled   first token            last token  finished
//!    |---------|------------|------------|----------------------|---------|
//!              |-- queue ---|-- prefill -|------- decode -------|
//!                           |------------- inference -----------|
//!    |---------------- TTFT -------------|
//!    |------------------------------- e2e --------------------------------|
//! ```

use std::sync::Arc;
use std::time::Duration;

use crate::labels::{FinishedReason, Label};
use crate::metrics::Metrics;
use crate::traces::{Child, KeyValue, RequestTrace};

/// Preemptions of which the trace tells when they were; the metrics count all.
const MAX_PREEMPTION_EVENTS: usize = 64;

/// Collects the points in time of one request and records its intervals. All times are counted from
/// one origin, whichever the caller likes. A request that is dropped unfinished counts as aborted
/// at the last time that was seen, so that no way out of the server loses a request.
pub struct RequestTimings {
    metrics: Arc<Metrics>,
    arrived: Duration,
    queued: Duration,
    /// The last time before the first token; a preemption later than that is part of the decode.
    scheduled: Option<Duration>,
    first_token: Option<Duration>,
    latest: Duration,
    prompt_tokens: u32,
    cached_tokens: u32,
    preemptions: u32,
    /// Of a request that is traced, when the first of them were.
    preempted: Vec<Duration>,
    choices: Vec<Choice>,
    recorded: bool,
    trace: RequestTrace,
    is_alone: bool,
}

#[derive(Clone, Copy, Default)]
struct Choice {
    tokens: u32,
    first_token: Duration,
    last_token: Duration,
}

impl RequestTimings {
    /// A request of `prompt_tokens` tokens and `n` choices that reached the HTTP front at `arrived` and
    /// the engine's queue at `queued`.
    pub fn new(
        metrics: Arc<Metrics>,
        arrived: Duration,
        queued: Duration,
        prompt_tokens: u32,
        n: u32,
    ) -> Self {
        Self {
            metrics,
            arrived,
            queued,
            scheduled: None,
            first_token: None,
            latest: queued,
            prompt_tokens,
            cached_tokens: 0,
            preemptions: 0,
            preempted: Vec::new(),
            choices: vec![Choice::default(); n as usize],
            recorded: false,
            trace: RequestTrace::default(),
            is_alone: true,
        }
    }

    /// Its parts become spans of `trace`, which began with the request. `is_alone`: the HTTP request has no other
    /// prompt, so that its latencies and its end are those of this one.
    pub fn traced(mut self, trace: RequestTrace, is_alone: bool) -> Self {
        (self.trace, self.is_alone) = (trace, is_alone);
        self
    }

    /// The request left the queue with `cached_tokens` of its prompt in the cache. After a preemption
    /// it does so again; the tokens that a recomputation finds in the cache are no saving.
    pub fn scheduled(&mut self, now: Duration, cached_tokens: u32) {
        self.latest = now;
        if self.first_token.is_some() {
            return;
        }
        if self.scheduled.is_none() {
            self.cached_tokens = cached_tokens;
        }
        self.scheduled = Some(now);
    }

    /// One of its sequences lost its blocks.
    pub fn preempted(&mut self, now: Duration) {
        self.latest = now;
        self.preemptions += 1;
        if self.trace.is_recorded() && self.preempted.len() < MAX_PREEMPTION_EVENTS {
            self.preempted.push(now);
        }
    }

    /// A choice got its next token. A choice that was not announced is ignored.
    pub fn token(&mut self, now: Duration, choice: u32) {
        self.latest = now;
        if self.first_token.is_none() {
            self.record_first_token(now);
        }
        let Some(choice) = self.choices.get_mut(choice as usize) else { return };
        if choice.tokens == 0 {
            choice.first_token = now;
        } else {
            let gap = now.saturating_sub(choice.last_token);
            self.metrics.inter_token_latency_seconds.observe(gap.as_secs_f64());
        }
        choice.tokens += 1;
        choice.last_token = now;
        self.metrics.generation_tokens.inc();
    }

    /// All its choices have ended; `reason` is the greatest of theirs.
    pub fn finish(mut self, now: Duration, reason: FinishedReason) {
        self.latest = now;
        self.record_end(reason);
    }

    fn record_first_token(&mut self, now: Duration) {
        self.first_token = Some(now);
        let ttft = seconds(self.arrived, now);
        self.metrics.time_to_first_token_seconds.observe(ttft);
        if let Some(id) = self.trace.recorded_id() {
            self.metrics.first_token_exemplars.note(ttft, id);
        }
        self.metrics.prompt_tokens.inc_by(u64::from(self.prompt_tokens));
        self.metrics.prompt_tokens_cached.inc_by(u64::from(self.cached_tokens));
    }

    fn record_end(&mut self, reason: FinishedReason) {
        self.recorded = true;
        let metrics = &self.metrics;
        metrics.request_success.of(reason).inc();
        let e2e = seconds(self.arrived, self.latest);
        metrics.e2e_request_latency_seconds.observe(e2e);
        if let Some(id) = self.trace.recorded_id() {
            metrics.e2e_exemplars.note(e2e, id);
        }
        metrics.request_prompt_tokens.observe(f64::from(self.prompt_tokens));
        let generated: u32 = self.choices.iter().map(|choice| choice.tokens).sum();
        metrics.request_generation_tokens.observe(f64::from(generated));
        metrics.request_num_preemptions.observe(f64::from(self.preemptions));
        self.record_intervals();
        if self.trace.is_recorded() {
            self.record_spans(reason);
        }
    }

    /// Records the intervals that the request got to: one that was never scheduled has none.
    fn record_intervals(&self) {
        let metrics = &self.metrics;
        let Some(scheduled) = self.scheduled else { return };
        metrics.request_queue_time_seconds.observe(seconds(self.queued, scheduled));
        let (Some(first_token), Some(last_token)) = (self.first_token, self.last_token()) else { return };
        metrics.request_prefill_time_seconds.observe(seconds(scheduled, first_token));
        metrics.request_decode_time_seconds.observe(seconds(first_token, last_token));
        metrics.request_inference_time_seconds.observe(seconds(scheduled, last_token));
        if let Some(mean) = self.seconds_per_output_token() {
            metrics.request_time_per_output_token_seconds.observe(mean);
        }
    }

    fn last_token(&self) -> Option<Duration> {
        self.first_token
            .and_then(|first| self.choices.iter().map(|choice| choice.last_token).max().or(Some(first)))
    }

    /// The parts that the request got to; the one in which it ended is as long as it was by then.
    fn record_spans(&self, reason: FinishedReason) {
        let scheduled = self.scheduled.unwrap_or(self.latest);
        self.record_span("prepare", self.arrived, self.queued, Vec::new(), Vec::new());
        let queue = self.preemptions_within(Duration::ZERO, scheduled);
        self.record_span("queue", self.queued, scheduled, Vec::new(), queue);
        if self.scheduled.is_some() {
            self.record_prefill(scheduled);
        }
        if let (Some(first), Some(last)) = (self.first_token, self.last_token()) {
            let tokens: u32 = self.choices.iter().map(|choice| choice.tokens).sum();
            let attributes = vec![KeyValue::new("gen_ai.usage.output_tokens", i64::from(tokens))];
            self.record_span(
                "decode",
                first,
                last,
                attributes,
                self.preemptions_within(first, Duration::MAX),
            );
        }
        if self.is_alone {
            self.trace.set(self.latencies());
            self.trace.set([
                KeyValue::new("servelab.finished_reason", reason.value()),
                KeyValue::new("servelab.preemptions", i64::from(self.preemptions)),
            ]);
        }
    }

    fn record_prefill(&self, scheduled: Duration) {
        let end = self.first_token.unwrap_or(self.latest);
        let cached = KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(self.cached_tokens));
        let prompt = KeyValue::new("gen_ai.usage.input_tokens", i64::from(self.prompt_tokens));
        let mut events = self.preemptions_within(scheduled, end);
        if self.cached_tokens > 0 {
            events.insert(0, (self.since(scheduled), "cache_hit", vec![cached.clone(), prompt.clone()]));
        }
        self.record_span("prefill", scheduled, end, vec![prompt, cached], events);
    }

    fn record_span(
        &self,
        name: &'static str,
        from: Duration,
        to: Duration,
        attributes: Vec<KeyValue>,
        events: Vec<(Duration, &'static str, Vec<KeyValue>)>,
    ) {
        self.trace.child(Child { name, from: self.since(from), to: self.since(to), attributes, events });
    }

    fn preemptions_within(
        &self,
        from: Duration,
        to: Duration,
    ) -> Vec<(Duration, &'static str, Vec<KeyValue>)> {
        let within = self.preempted.iter().filter(|when| (from..to).contains(when));
        within.map(|when| (self.since(*when), "preempted", Vec::new())).collect()
    }

    /// As vLLM names them, in seconds.
    fn latencies(&self) -> Vec<KeyValue> {
        let mut latencies = vec![KeyValue::new("gen_ai.latency.e2e", seconds(self.arrived, self.latest))];
        let mut add = |name, from, to| latencies.push(KeyValue::new(name, seconds(from, to)));
        if let Some(scheduled) = self.scheduled {
            add("gen_ai.latency.time_in_queue", self.queued, scheduled);
            if let (Some(first), Some(last)) = (self.first_token, self.last_token()) {
                add("gen_ai.latency.time_to_first_token", self.arrived, first);
                add("gen_ai.latency.time_in_model_prefill", scheduled, first);
                add("gen_ai.latency.time_in_model_decode", first, last);
                add("gen_ai.latency.time_in_model_inference", scheduled, last);
            }
        }
        latencies
    }

    /// On the trace's clock.
    fn since(&self, time: Duration) -> Duration {
        time.saturating_sub(self.arrived)
    }

    /// Mean over all tokens after the first of each choice; `None` if there are no such tokens.
    fn seconds_per_output_token(&self) -> Option<f64> {
        let gaps: u32 = self.choices.iter().map(|choice| choice.tokens.saturating_sub(1)).sum();
        let decoding: f64 =
            self.choices.iter().map(|choice| seconds(choice.first_token, choice.last_token)).sum();
        (gaps > 0).then(|| decoding / f64::from(gaps))
    }
}

impl Drop for RequestTimings {
    fn drop(&mut self) {
        if !self.recorded {
            self.record_end(FinishedReason::Abort);
        }
    }
}

fn seconds(from: Duration, to: Duration) -> f64 {
    to.saturating_sub(from).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{BuildInfo, MetricsConfig};

    fn metrics() -> Arc<Metrics> {
        let build = BuildInfo { version: "0", commit: None };
        let config =
            MetricsConfig { prefix: "servelab_", model_name: "m", max_model_len: 512, routes: &[], build };
        Arc::new(Metrics::new(&config).unwrap())
    }

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn sum(histogram: &prometheus::Histogram) -> (u64, u64) {
        (histogram.get_sample_count(), (histogram.get_sample_sum() * 1000.0).round() as u64)
    }

    #[test]
    fn intervals_follow_their_definitions() {
        let metrics = metrics();
        let mut timings = RequestTimings::new(metrics.clone(), at(100), at(110), 7, 1);
        timings.scheduled(at(200), 4);
        for now in [300, 320, 360] {
            timings.token(at(now), 0);
        }
        timings.finish(at(400), FinishedReason::Stop);
        assert_eq!(sum(&metrics.time_to_first_token_seconds), (1, 200));
        assert_eq!(sum(&metrics.request_queue_time_seconds), (1, 90));
        assert_eq!(sum(&metrics.request_prefill_time_seconds), (1, 100));
        assert_eq!(sum(&metrics.request_decode_time_seconds), (1, 60));
        assert_eq!(sum(&metrics.request_inference_time_seconds), (1, 160));
        assert_eq!(sum(&metrics.e2e_request_latency_seconds), (1, 300));
        assert_eq!(sum(&metrics.inter_token_latency_seconds), (2, 60));
        assert_eq!(sum(&metrics.request_time_per_output_token_seconds), (1, 30));
        assert_eq!(sum(&metrics.request_prompt_tokens), (1, 7000));
        assert_eq!(sum(&metrics.request_generation_tokens), (1, 3000));
        assert_eq!(metrics.prompt_tokens.get(), 7);
        assert_eq!(metrics.prompt_tokens_cached.get(), 4);
        assert_eq!(metrics.generation_tokens.get(), 3);
        assert_eq!(metrics.request_success.of(FinishedReason::Stop).get(), 1);
        assert_eq!(metrics.request_success.of(FinishedReason::Abort).get(), 0);
    }

    #[test]
    fn a_preemption_before_the_first_token_prolongs_the_queue() {
        let metrics = metrics();
        let mut timings = RequestTimings::new(metrics.clone(), at(0), at(0), 7, 1);
        timings.scheduled(at(10), 0);
        timings.preempted(at(30));
        timings.scheduled(at(50), 6);
        timings.token(at(70), 0);
        timings.finish(at(70), FinishedReason::Length);
        assert_eq!(sum(&metrics.request_queue_time_seconds), (1, 50));
        assert_eq!(sum(&metrics.request_prefill_time_seconds), (1, 20));
        assert_eq!(sum(&metrics.request_num_preemptions), (1, 1000));
        assert_eq!(metrics.prompt_tokens_cached.get(), 0, "recomputed tokens are no saving");
    }

    #[test]
    fn a_preemption_after_the_first_token_counts_into_decode_and_gap() {
        let metrics = metrics();
        let mut timings = RequestTimings::new(metrics.clone(), at(0), at(0), 7, 1);
        timings.scheduled(at(10), 0);
        timings.token(at(20), 0);
        timings.preempted(at(30));
        timings.scheduled(at(500), 0);
        timings.token(at(520), 0);
        timings.finish(at(520), FinishedReason::Length);
        assert_eq!(sum(&metrics.request_queue_time_seconds), (1, 10));
        assert_eq!(sum(&metrics.request_decode_time_seconds), (1, 500));
        assert_eq!(sum(&metrics.inter_token_latency_seconds), (1, 500));
    }

    #[test]
    fn choices_have_their_own_gaps() {
        let metrics = metrics();
        let mut timings = RequestTimings::new(metrics.clone(), at(0), at(0), 1, 2);
        timings.scheduled(at(0), 0);
        for (now, choice) in [(10, 0), (10, 1), (20, 0), (40, 1)] {
            timings.token(at(now), choice);
        }
        timings.finish(at(40), FinishedReason::Length);
        assert_eq!(sum(&metrics.inter_token_latency_seconds), (2, 40));
        assert_eq!(sum(&metrics.request_time_per_output_token_seconds), (1, 20));
        assert_eq!(sum(&metrics.request_generation_tokens), (1, 4000));
    }

    #[test]
    fn a_request_dropped_in_the_queue_counts_as_aborted() {
        let metrics = metrics();
        drop(RequestTimings::new(metrics.clone(), at(0), at(3), 1, 1));
        assert_eq!(metrics.request_success.of(FinishedReason::Abort).get(), 1);
        assert_eq!(sum(&metrics.e2e_request_latency_seconds), (1, 3));
        assert_eq!(sum(&metrics.request_queue_time_seconds), (0, 0), "it was never scheduled");
        assert_eq!(metrics.prompt_tokens.get(), 0);
    }

    #[test]
    fn one_token_has_no_time_per_output_token() {
        let metrics = metrics();
        let mut timings = RequestTimings::new(metrics.clone(), at(0), at(0), 1, 1);
        timings.scheduled(at(0), 0);
        timings.token(at(10), 0);
        timings.finish(at(10), FinishedReason::Length);
        assert_eq!(sum(&metrics.request_time_per_output_token_seconds), (0, 0));
        assert_eq!(sum(&metrics.request_decode_time_seconds), (1, 0));
    }
}
