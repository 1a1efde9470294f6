//! The router's series. Label values are closed enums, or addresses of replicas, of which there are 256 at most; those
//! of a replica that is gone are dropped.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry as Series, TextEncoder,
};

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

    fn name(self) -> &'static str {
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

    fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::BrokenOff => "broken_off",
            Self::FirstByte => "first_byte",
            Self::Status => "status",
        }
    }
}

/// Seconds; the router adds microseconds, and waiting takes minutes.
const FINE: &[f64] =
    &[1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0];
const COARSE: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

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
    pub decision_seconds: Histogram,
    pub added_latency_seconds: Histogram,
    pub time_to_first_byte_seconds: Histogram,
    pub prompt_tokens: IntCounter,
    pub predicted_hit_tokens: IntCounter,
    pub confirmed_hit_tokens: IntCounter,
    limited: IntCounterVec,
    pub idempotent_answers: IntCounter,
    pub index_bytes: IntGauge,
    replicas: IntGaugeVec,
    replica_in_flight: IntGaugeVec,
    breaker_state: IntGaugeVec,
    imbalance: Gauge,
    replica_index_blocks: GaugeVec,
}

impl RouterMetrics {
    /// # Errors
    /// If `prefix` cannot begin a metric's name.
    pub fn new(prefix: &str, policy: Policy) -> Result<Self, MetricsError> {
        let make = Make { series: Series::new(), prefix };
        let metrics = Self {
            requests: make.counters("router_requests_total", "Requests, by how they ended.", &["outcome"])?,
            faults: make.counters(
                "router_faults_total",
                "Attempts at a replica that gave no answer.",
                &["fault"],
            )?,
            choices: make.counters(
                "router_choices_total",
                "Choices, by policy and reason.",
                &["policy", "reason"],
            )?,
            retries: make.counter("router_retries_total", "Attempts after the first.")?,
            retries_over_budget: make.counter(
                "router_retries_over_budget_total",
                "Attempts that were not made since too many were.",
            )?,
            hedges: make.counter("router_hedges_total", "Second attempts beside a slow first one.")?,
            hedges_won: make.counter("router_hedges_won_total", "Such attempts that answered first.")?,
            requests_held: make
                .gauge("router_requests_held", "Requests that wait because no replica is ready.")?,
            requests_waiting: make
                .gauge("router_requests_waiting", "Requests that wait in the router, for whatever reason.")?,
            requests_in_flight: make.gauge("router_requests_in_flight", "Requests inside the router.")?,
            held_seconds: make.histogram("router_held_seconds", COARSE, "How long requests were held.")?,
            decision_seconds: make.histogram(
                "router_decision_seconds",
                FINE,
                "Reading the prompt and choosing a replica.",
            )?,
            added_latency_seconds: make.histogram(
                "router_added_latency_seconds",
                FINE,
                "From the last byte of a request to its first attempt, without waiting.",
            )?,
            time_to_first_byte_seconds: make.histogram(
                "router_time_to_first_byte_seconds",
                COARSE,
                "From sending a request to the first byte of its answer's body.",
            )?,
            prompt_tokens: make
                .counter("router_prompt_tokens_total", "Prompt tokens of answers that told their usage.")?,
            predicted_hit_tokens: make.counter(
                "router_predicted_hit_tokens_total",
                "Prompt tokens that the replicas were expected to hold, by the router's count.",
            )?,
            confirmed_hit_tokens: make.counter(
                "router_confirmed_hit_tokens_total",
                "Prompt tokens that the replicas say they held.",
            )?,
            limited: make.counters("router_limited_total", "Requests refused by a limit.", &["limit"])?,
            idempotent_answers: make.counter(
                "router_idempotent_answers_total",
                "Requests that got the answer of an earlier one.",
            )?,
            index_bytes: make.gauge("router_index_bytes", "Bytes that the index of prefixes takes.")?,
            replicas: make.gauges("router_replicas", "Replicas, by health.", &["health"])?,
            replica_in_flight: make.gauges(
                "router_replica_in_flight",
                "Requests in flight at a replica.",
                &["replica"],
            )?,
            breaker_state: make.gauges(
                "router_breaker_state",
                "Circuit breaker of a replica: 0 closed, 1 half open, 2 open.",
                &["replica"],
            )?,
            imbalance: make
                .float("router_imbalance", "Most requests in flight at a replica over the mean.")?,
            replica_index_blocks: make.floats(
                "router_replica_index_blocks",
                "Blocks that a replica is believed to hold.",
                &["replica"],
            )?,
            series: make.series,
        };
        metrics.touch(policy);
        Ok(metrics)
    }

    /// Series that have not moved are shown at zero.
    fn touch(&self, policy: Policy) {
        Outcome::ALL.iter().for_each(|outcome| self.requests.with_label_values(&[outcome.name()]).inc_by(0));
        Fault::ALL.iter().for_each(|fault| self.faults.with_label_values(&[fault.name()]).inc_by(0));
        ["requests", "tokens"].iter().for_each(|limit| self.limited.with_label_values(&[limit]).inc_by(0));
        for reason in [Reason::Only, Reason::Prefix, Reason::Spill, Reason::Load, Reason::Hash, Reason::Turn]
        {
            self.choices.with_label_values(&[policy.name(), reason.name()]).inc_by(0);
        }
    }

    pub fn ended(&self, outcome: Outcome) {
        self.requests.with_label_values(&[outcome.name()]).inc();
    }

    pub fn fault(&self, fault: Fault) {
        self.faults.with_label_values(&[fault.name()]).inc();
    }

    pub fn chose(&self, policy: Policy, reason: Reason) {
        self.choices.with_label_values(&[policy.name(), reason.name()]).inc();
    }

    /// `limit` is `requests` or `tokens`.
    pub fn limited(&self, limit: &'static str) {
        self.limited.with_label_values(&[limit]).inc();
    }

    /// Takes over what the list of replicas says now.
    pub fn observe_replicas(&self, replicas: &[ReplicaView]) {
        self.replica_in_flight.reset();
        self.breaker_state.reset();
        self.replica_index_blocks.reset();
        for health in ["unknown", "ready", "not_ready"] {
            let count = replicas.iter().filter(|replica| replica.health == health).count();
            self.replicas.with_label_values(&[health]).set(count as i64);
        }
        for replica in replicas {
            let labels = [replica.url.as_str()];
            self.replica_in_flight.with_label_values(&labels).set(replica.in_flight.into());
            self.replica_index_blocks.with_label_values(&labels).set(replica.index_blocks.into());
            let state = match replica.breaker {
                "closed" => 0,
                "half_open" => 1,
                _ => 2,
            };
            self.breaker_state.with_label_values(&labels).set(state);
        }
        let (most, sum) = replicas.iter().fold((0, 0_u64), |(most, sum), replica| {
            (most.max(replica.in_flight), sum + u64::from(replica.in_flight))
        });
        let balanced = if sum == 0 { 1.0 } else { f64::from(most) * replicas.len() as f64 / sum as f64 };
        self.imbalance.set(balanced);
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
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("{}{name}", self.prefix), help)
    }

    fn add<C: Collector + Clone + 'static>(
        &self,
        made: Result<C, prometheus::Error>,
    ) -> Result<C, MetricsError> {
        let made = made?;
        self.series.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.add(IntCounterVec::new(self.opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.add(IntGaugeVec::new(self.opts(name, help), labels))
    }

    fn float(&self, name: &str, help: &str) -> Result<Gauge, MetricsError> {
        self.add(Gauge::with_opts(self.opts(name, help)))
    }

    fn floats(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, MetricsError> {
        self.add(GaugeVec::new(self.opts(name, help), labels))
    }

    fn histogram(&self, name: &str, buckets: &[f64], help: &str) -> Result<Histogram, MetricsError> {
        self.add(Histogram::with_opts(HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_is_gone_leaves_no_series() {
        let metrics = RouterMetrics::new("servelab_", Policy::Cost).unwrap();
        let view = |port: u32, in_flight| ReplicaView {
            url: format!("http://r:{port}"),
            health: "ready",
            breaker: "open",
            in_flight,
            pending_prefill_tokens: 0,
            decoding: 0,
            kv_usage: 0.0,
            prefill_tokens_per_second: 1.0,
            step_seconds: 1.0,
            index_blocks: 5,
        };
        metrics.observe_replicas(&[view(1, 3), view(2, 1)]);
        let text = metrics.encode().unwrap();
        for line in [
            "servelab_router_replicas{health=\"ready\"} 2",
            "servelab_router_imbalance 1.5",
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
