//! What router and replicas export, under the names of the real ones (`servelab_telemetry::names`, the router's
//! `metrics.rs`), and what the DCGM exporter beside each replica does.

use servelab_telemetry::names::{self, Metric};

use crate::counters::Histogram;
use crate::gateway::Gateway;
use crate::replica::Replica;

/// Takes a sample: the series' name, its labels, its value.
pub type Sink<'a> = dyn FnMut(&str, &[(&str, &str)], f64) + 'a;

/// In front of every name of servelab's.
pub const PREFIX: &str = "servelab_";
/// Share of the time in which the GPU did anything, in percent.
pub const GPU_UTIL: &str = "DCGM_FI_DEV_GPU_UTIL";

/// Which series are looked at: whoever names none of a metric has no use for it.
pub struct Wanted {
    text: String,
}

impl Wanted {
    /// Those that this text names, such as the queries of a manifest.
    pub fn by(text: String) -> Self {
        Self { text }
    }

    fn has(&self, name: &str) -> bool {
        self.text.contains(name)
    }
}

/// The series of one replica. `busy` is the share of the time since the last scrape in which it computed.
pub fn replica(replica: &Replica, model_name: &str, busy: f64, wanted: &Wanted, sink: &mut Sink<'_>) {
    let labels = [("model_name", model_name)];
    let mut plain = |metric: Metric, value: f64| {
        if wanted.has(metric.name) {
            sink(&format!("{PREFIX}{}", metric.name), &labels, value);
        }
    };
    let (gauges, counters) = (replica.gauges(), replica.counters());
    plain(names::NUM_REQUESTS_RUNNING, f64::from(gauges.running));
    plain(names::NUM_REQUESTS_WAITING, f64::from(gauges.waiting));
    plain(names::KV_CACHE_USAGE_PERC, gauges.kv_usage);
    plain(names::NUM_PREEMPTIONS, gauges.preemptions as f64);
    plain(names::PROMPT_TOKENS, counters.prompt_tokens as f64);
    plain(names::PROMPT_TOKENS_CACHED, counters.cached_tokens as f64);
    plain(names::GENERATION_TOKENS, counters.generated_tokens as f64);
    if wanted.has(names::REQUEST_SUCCESS.name) {
        let labels = [("model_name", model_name), ("finished_reason", "length")];
        sink(&format!("{PREFIX}{}", names::REQUEST_SUCCESS.name), &labels, counters.succeeded as f64);
    }
    for (metric, of) in [
        (names::TIME_TO_FIRST_TOKEN_SECONDS, &counters.time_to_first_token),
        (names::INTER_TOKEN_LATENCY_SECONDS, &counters.inter_token_latency),
        (names::REQUEST_QUEUE_TIME_SECONDS, &counters.queue_time),
        (names::REQUEST_PREFILL_TIME_SECONDS, &counters.prefill_time),
        (names::E2E_REQUEST_LATENCY_SECONDS, &counters.latency),
    ] {
        if wanted.has(metric.name) {
            histogram(metric, of, model_name, sink);
        }
    }
    if wanted.has(GPU_UTIL) {
        sink(GPU_UTIL, &[("gpu", "0")], (100.0 * busy).round());
    }
}

fn histogram(metric: Metric, of: &Histogram, model_name: &str, sink: &mut Sink<'_>) {
    let name = format!("{PREFIX}{}", metric.name);
    let mut count = 0;
    for (bound, below) in of.buckets() {
        let labels = [("model_name", model_name), ("le", bound.as_str())];
        sink(&format!("{name}_bucket"), &labels, below as f64);
        count = below;
    }
    let labels = [("model_name", model_name)];
    sink(&format!("{name}_sum"), &labels, of.sum_seconds());
    sink(&format!("{name}_count"), &labels, count as f64);
}

/// The series of the routers, which are one target.
pub fn router(gateway: &Gateway, sink: &mut Sink<'_>) {
    for (name, value) in [
        ("router_requests_held", gateway.held()),
        ("router_requests_waiting", gateway.waiting()),
        ("router_requests_in_flight", gateway.in_flight()),
    ] {
        sink(&format!("{PREFIX}{name}"), &[], value as f64);
    }
}
