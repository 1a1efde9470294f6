//! The router's series. Label values are closed enums, or addresses of replicas, of which there are 256 at most; those
//! of a replica that is gone are dropped.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry as Series, TextEncoder,
};
use servelab_telemetry::names::{Kind, Metric, router as names};
use servelab_telemetry::traces::SpanCounters;
use servelab_telemetry::{Label, SpanDrop};

use crate::choice::policy::{Policy, Reason};
use crate::replicas::registry::ReplicaView;

/// Why the series cannot be made or shown.
#[derive(Debug, thiserror::Error)]
#[error("the metrics cannot be set up or written: {0}")]
pub struct MetricsError(#[from] prometheus::Error);

/// How a request ended, as seen from its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A whole answer of a replica, whatever its status.
    Answered,
    /// The router refused it.
    Refused,
    /// No replica gave a whole answer.
    Failed,
    /// The client left.
    Left,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Answered, Self::Refused, Self::Failed, Self::Left];

    pub fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Left => "left",
        }
    }
}

/// Why an attempt at a replica gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Unreachable,
    BrokenOff,
    FirstByte,
    /// It answered with a status that says: not here, not now.
    Status,
}

impl Fault {
    const ALL: [Self; 4] = [Self::Unreachable, Self::BrokenOff, Self::FirstByte, Self::Status];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::BrokenOff => "broken_off",
            Self::FirstByte => "first_byte",
            Self::Status => "status",
        }
    }
}

/// What became of a prompt that was to be tokenised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokenising {
    Done,
    /// It took too long: the request went on without.
    Late,
    /// The request is wrong, or one that only the replica can read.
    Unreadable,
}

impl Tokenising {
    const ALL: [Self; 3] = [Self::Done, Self::Late, Self::Unreadable];

    fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Late => "late",
            Self::Unreadable => "unreadable",
        }
    }
}

/// All series of one router.
pub struct RouterMetrics {
    series: Series,
    requests: IntCounterVec,
    faults: IntCounterVec,
    choices: IntCounterVec,
    pub retries: IntCounter,
    pub retries_over_budget: IntCounter,
    pub hedges: IntCounter,
    pub hedges_won: IntCounter,
    pub requests_held: IntGauge,
    pub requests_waiting: IntGauge,
    pub requests_in_flight: IntGauge,
    pub held_seconds: Histogram,
    pub tokenise_seconds: Histogram,
    tokenised: IntCounterVec,
    pub token_count_mismatches: IntCounter,
    token_parity: IntGaugeVec,
    pub decision_seconds: Histogram,
    pub added_latency_seconds: Histogram,
    pub time_to_first_byte_seconds: Histogram,
    pub prompt_tokens: IntCounter,
    pub predicted_hit_tokens: IntCounter,
    pub confirmed_hit_tokens: IntCounter,
    limited: IntCounterVec,
    pub limits_redis_seconds: Histogram,
    pub limits_redis_away: IntCounter,
    pub limits_redis_unsettled: IntCounter,
    pub idempotent_answers: IntCounter,
    pub index_bytes: IntGauge,
    replicas: IntGaugeVec,
    replica_in_flight: IntGaugeVec,
    breaker_state: IntGaugeVec,
    imbalance: Gauge,
    replica_index_blocks: IntGaugeVec,
    trace_spans_exported: IntCounter,
    trace_spans_dropped: IntCounterVec,
    kv_events_state: IntGaugeVec,
    kv_event_batches: IntCounterVec,
    kv_event_gaps: IntCounterVec,
    kv_event_resyncs: IntCounterVec,
}

impl RouterMetrics {
    /// # Errors
    /// If `prefix` cannot begin a metric's name.
    pub fn new(prefix: &str, policy: Policy) -> Result<Self, MetricsError> {
        let make = Make { series: Series::new(), prefix };
        let metrics = Self {
            requests: make.counters(&names::REQUESTS, &["outcome"])?,
            faults: make.counters(&names::FAULTS, &["fault"])?,
            choices: make.counters(&names::CHOICES, &["policy", "reason"])?,
            retries: make.counter(&names::RETRIES)?,
            retries_over_budget: make.counter(&names::RETRIES_OVER_BUDGET)?,
            hedges: make.counter(&names::HEDGES)?,
            hedges_won: make.counter(&names::HEDGES_WON)?,
            requests_held: make.gauge(&names::REQUESTS_HELD)?,
            requests_waiting: make.gauge(&names::REQUESTS_WAITING)?,
            requests_in_flight: make.gauge(&names::REQUESTS_IN_FLIGHT)?,
            held_seconds: make.histogram(&names::HELD_SECONDS)?,
            tokenise_seconds: make.histogram(&names::TOKENISE_SECONDS)?,
            tokenised: make.counters(&names::TOKENISED, &["outcome"])?,
            token_count_mismatches: make.counter(&names::TOKEN_COUNT_MISMATCHES)?,
            token_parity: make.gauges(&names::TOKEN_PARITY, &["replica"])?,
            decision_seconds: make.histogram(&names::DECISION_SECONDS)?,
            added_latency_seconds: make.histogram(&names::ADDED_LATENCY_SECONDS)?,
            time_to_first_byte_seconds: make.histogram(&names::TIME_TO_FIRST_BYTE_SECONDS)?,
            prompt_tokens: make.counter(&names::PROMPT_TOKENS)?,
            predicted_hit_tokens: make.counter(&names::PREDICTED_HIT_TOKENS)?,
            confirmed_hit_tokens: make.counter(&names::CONFIRMED_HIT_TOKENS)?,
            limited: make.counters(&names::LIMITED, &["limit"])?,
            limits_redis_seconds: make.histogram(&names::LIMITS_REDIS_SECONDS)?,
            limits_redis_away: make.counter(&names::LIMITS_REDIS_AWAY)?,
            limits_redis_unsettled: make.counter(&names::LIMITS_REDIS_UNSETTLED)?,
            idempotent_answers: make.counter(&names::IDEMPOTENT_ANSWERS)?,
            index_bytes: make.gauge(&names::INDEX_BYTES)?,
            replicas: make.gauges(&names::REPLICAS, &["health"])?,
            replica_in_flight: make.gauges(&names::REPLICA_IN_FLIGHT, &["replica"])?,
            breaker_state: make.gauges(&names::BREAKER_STATE, &["replica"])?,
            imbalance: make.float(&names::IMBALANCE)?,
            replica_index_blocks: make.gauges(&names::REPLICA_INDEX_BLOCKS, &["replica"])?,
            trace_spans_exported: make.counter(&names::TRACE_SPANS_EXPORTED)?,
            trace_spans_dropped: make.counters(&names::TRACE_SPANS_DROPPED, &[SpanDrop::NAME])?,
            kv_events_state: make.gauges(&names::KV_EVENTS_STATE, &["replica"])?,
            kv_event_batches: make.counters(&names::KV_EVENT_BATCHES, &["replica"])?,
            kv_event_gaps: make.counters(&names::KV_EVENT_GAPS, &["replica"])?,
            kv_event_resyncs: make.counters(&names::KV_EVENT_RESYNCS, &["replica"])?,
            series: make.series,
        };
        metrics.touch(policy);
        Ok(metrics)
    }

    /// Series that have not moved are shown at zero.
    fn touch(&self, policy: Policy) {
        Outcome::ALL.iter().for_each(|outcome| self.requests.with_label_values(&[outcome.name()]).inc_by(0));
        Tokenising::ALL
            .iter()
            .for_each(|outcome| self.tokenised.with_label_values(&[outcome.name()]).inc_by(0));
        Fault::ALL.iter().for_each(|fault| self.faults.with_label_values(&[fault.name()]).inc_by(0));
        SpanDrop::ALL.iter().for_each(|reason| self.spans_dropped(*reason).inc_by(0));
        ["requests", "tokens", "away"]
            .iter()
            .for_each(|limit| self.limited.with_label_values(&[limit]).inc_by(0));
        for reason in [Reason::Only, Reason::Prefix, Reason::Spill, Reason::Load, Reason::Hash, Reason::Turn]
        {
            self.choices.with_label_values(&[policy.name(), reason.name()]).inc_by(0);
        }
    }

    /// For whoever exports spans.
    pub fn span_counters(&self) -> SpanCounters {
        SpanCounters {
            exported: self.trace_spans_exported.clone(),
            queue_full: self.spans_dropped(SpanDrop::QueueFull),
            export_failed: self.spans_dropped(SpanDrop::ExportFailed),
            shutdown: self.spans_dropped(SpanDrop::Shutdown),
        }
    }

    fn spans_dropped(&self, reason: SpanDrop) -> IntCounter {
        self.trace_spans_dropped.with_label_values(&[reason.value()])
    }

    pub fn ended(&self, outcome: Outcome) {
        self.requests.with_label_values(&[outcome.name()]).inc();
    }

    pub fn tokenised(&self, outcome: Tokenising) {
        self.tokenised.with_label_values(&[outcome.name()]).inc();
    }

    pub fn fault(&self, fault: Fault) {
        self.faults.with_label_values(&[fault.name()]).inc();
    }

    pub fn chose(&self, policy: Policy, reason: Reason) {
        self.choices.with_label_values(&[policy.name(), reason.name()]).inc();
    }

    /// `limit` is `requests`, `tokens`, or `away` where it could not be asked.
    pub fn limited(&self, limit: &'static str) {
        self.limited.with_label_values(&[limit]).inc();
    }

    /// Takes over what the list of replicas says now.
    pub fn observe_replicas(&self, replicas: &[ReplicaView]) {
        self.replica_in_flight.reset();
        self.breaker_state.reset();
        self.token_parity.reset();
        self.replica_index_blocks.reset();
        self.kv_events_state.reset();
        self.kv_event_batches.reset();
        self.kv_event_gaps.reset();
        self.kv_event_resyncs.reset();
        for health in ["unknown", "ready", "not_ready"] {
            let count = replicas.iter().filter(|replica| replica.health == health).count();
            self.replicas.with_label_values(&[health]).set(count as i64);
        }
        for replica in replicas {
            let labels = [replica.url.as_str()];
            self.replica_in_flight.with_label_values(&labels).set(replica.in_flight.into());
            self.replica_index_blocks.with_label_values(&labels).set(replica.index_blocks.into());
            self.kv_events_state.with_label_values(&labels).set(replica.kv_events as i64);
            self.kv_event_batches.with_label_values(&labels).inc_by(replica.kv_batches);
            self.kv_event_gaps.with_label_values(&labels).inc_by(replica.kv_gaps);
            self.kv_event_resyncs.with_label_values(&labels).inc_by(replica.kv_resyncs);
            let parity = match replica.parity {
                "kept" => 1,
                "lost" => 0,
                _ => -1,
            };
            self.token_parity.with_label_values(&labels).set(parity);
            let state = match replica.breaker {
                "closed" => 0,
                "half_open" => 1,
                _ => 2,
            };
            self.breaker_state.with_label_values(&labels).set(state);
        }
        self.imbalance.set(imbalance(replicas));
    }

    /// Counts a request as waiting until the guard is dropped.
    pub fn waiting(&self) -> Waiting<'_> {
        self.requests_waiting.inc();
        Waiting(&self.requests_waiting)
    }

    pub fn held(&self, time: Duration) {
        self.held_seconds.observe(time.as_secs_f64());
    }

    /// All series as text.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn encode(&self) -> Result<String, MetricsError> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.series.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// See [`RouterMetrics::waiting`].
pub struct Waiting<'a>(&'a IntGauge);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

struct Make<'a> {
    series: Series,
    prefix: &'a str,
}

impl Make<'_> {
    fn opts(&self, metric: &Metric) -> Opts {
        Opts::new(format!("{}{}", self.prefix, metric.name), metric.help)
    }

    fn add<C: Collector + Clone + 'static>(
        &self,
        made: Result<C, prometheus::Error>,
    ) -> Result<C, MetricsError> {
        let made = made?;
        self.series.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, metric: &Metric) -> Result<IntCounter, MetricsError> {
        self.add(IntCounter::with_opts(self.opts(metric)))
    }

    fn counters(&self, metric: &Metric, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.add(IntCounterVec::new(self.opts(metric), labels))
    }

    fn gauge(&self, metric: &Metric) -> Result<IntGauge, MetricsError> {
        self.add(IntGauge::with_opts(self.opts(metric)))
    }

    fn gauges(&self, metric: &Metric, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.add(IntGaugeVec::new(self.opts(metric), labels))
    }

    fn float(&self, metric: &Metric) -> Result<Gauge, MetricsError> {
        self.add(Gauge::with_opts(self.opts(metric)))
    }

    fn histogram(&self, metric: &Metric) -> Result<Histogram, MetricsError> {
        let mut opts = HistogramOpts::from(self.opts(metric));
        if let Kind::Histogram(buckets) = metric.kind {
            // None of the router's depends on a context length.
            opts = opts.buckets(buckets.bounds(0));
        }
        self.add(Histogram::with_opts(opts))
    }
}

/// Requests on the fullest of the replicas that are ready, over their mean. One that is dead has none, and says nothing
/// about the choice.
fn imbalance(replicas: &[ReplicaView]) -> f64 {
    let ready = || replicas.iter().filter(|replica| replica.health == "ready");
    let most = ready().map(|replica| replica.in_flight).max().unwrap_or(0);
    let sum: u64 = ready().map(|replica| u64::from(replica.in_flight)).sum();
    if sum == 0 { 1.0 } else { f64::from(most) * ready().count() as f64 / sum as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::StreamState;

    fn view(port: u32, in_flight: u32) -> ReplicaView {
        ReplicaView {
            url: format!("http://r:{port}"),
            health: "ready",
            breaker: "open",
            parity: "lost",
            parity_detail: Some("canary".into()),
            hashing: "text",
            in_flight,
            pending_prefill_tokens: 0,
            decoding: 0,
            kv_usage: 0.0,
            prefill_tokens_per_second: 1.0,
            step_seconds: 1.0,
            index_blocks: 5,
            kv_events: StreamState::Precise,
            kv_batches: 9,
            kv_gaps: 1,
            kv_resyncs: 2,
        }
    }

    #[test]
    fn every_metric_of_the_table_is_exported_with_its_help_and_type() {
        let metrics = RouterMetrics::new("servelab_", Policy::Cost).unwrap();
        metrics.observe_replicas(&[view(1, 0)]);
        let text = metrics.encode().unwrap();
        for metric in names::ALL {
            let name = format!("servelab_{}", metric.name);
            let kind = match metric.kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
                Kind::Histogram(_) => "histogram",
            };
            assert!(text.contains(&format!("# HELP {name} {}\n", metric.help)), "{name} has no help");
            assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind}");
        }
        let families = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(families, names::ALL.len(), "a series is not in the table");
    }

    #[test]
    fn a_replica_that_is_gone_leaves_no_series() {
        let metrics = RouterMetrics::new("servelab_", Policy::Cost).unwrap();
        let dead = ReplicaView { health: "not_ready", ..view(3, 0) };
        metrics.observe_replicas(&[view(1, 3), view(2, 1), dead]);
        let text = metrics.encode().unwrap();
        for line in [
            "servelab_router_replicas{health=\"ready\"} 2",
            "servelab_router_imbalance 1.5",
            "servelab_router_replicas{health=\"not_ready\"} 1",
            "servelab_router_token_parity{replica=\"http://r:1\"} 0",
            "servelab_router_breaker_state{replica=\"http://r:1\"} 2",
            "servelab_router_replica_in_flight{replica=\"http://r:1\"} 3",
            "servelab_router_requests_total{outcome=\"answered\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        metrics.observe_replicas(&[view(2, 1)]);
        assert!(!metrics.encode().unwrap().contains("http://r:1\""));
    }
}
