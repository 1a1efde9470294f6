//! The key names of `vllm bench serve` (`vllm/benchmarks/serve.py` of vLLM 0.33), so that scripts that read its
//! results read ours.
//!
//! Where the definitions differ ours stands under the name: `ttft` and `e2el` count from the scheduled arrival, as a
//! user would; the ones that count from sending have names of their own.

use serde_json::{Map, Value, json};

use crate::result::{
    BenchResult, Distribution, Endpoint, Header, Load, Metrics, Outcome, Point, RequestRecord, TargetInfo,
};

/// The result of one point as vLLM would have written it.
pub fn keys(header: &Header, point: &Point) -> Map<String, Value> {
    let backend = match &header.target {
        TargetInfo::Http { endpoint: Endpoint::Chat, .. } => "openai-chat",
        TargetInfo::Http { .. } => "openai",
        TargetInfo::Offline { .. } => "offline",
    };
    let (rate, burstiness, concurrency) = match &point.load {
        Load::Closed { concurrency, .. } => (json!("inf"), json!(1.0), json!(concurrency)),
        Load::Open { rate, burstiness, max_concurrency, .. } => {
            (rate.map_or(json!("inf"), |rate| json!(rate)), json!(burstiness), json!(max_concurrency))
        }
    };
    let mut keys = Map::new();
    let mut put = |name: &str, value: Value| keys.insert(name.to_owned(), value);
    put("date", json!(date(header.started_unix_seconds)));
    put("endpoint_type", json!(backend));
    put("backend", json!(backend));
    put("label", json!(header.label.as_deref().unwrap_or(backend)));
    put("model_id", json!(header.model.id));
    put("tokenizer_id", json!(header.model.root.as_ref().unwrap_or(&header.model.id)));
    put("num_prompts", json!(point.metrics.requests));
    put("request_rate", rate);
    put("burstiness", burstiness);
    put("max_concurrency", concurrency);
    for (name, value) in &header.metadata {
        put(name, json!(value));
    }
    keys.extend(metric_keys(&point.metrics));
    keys
}

/// vLLM's `%Y%m%d-%H%M%S`, in UTC.
fn date(unix_seconds: u64) -> String {
    let seconds = i64::try_from(unix_seconds).unwrap_or_default();
    jiff::Timestamp::from_second(seconds).unwrap_or_default().strftime("%Y%m%d-%H%M%S").to_string()
}

/// The figures alone.
pub fn metric_keys(metrics: &Metrics) -> Map<String, Value> {
    let mut keys = Map::new();
    let mut put = |name: &str, value: Value| keys.insert(name.to_owned(), value);
    put("duration", json!(metrics.duration_seconds));
    put("completed", json!(metrics.completed));
    put("failed", json!(metrics.failed));
    put("total_input_tokens", json!(metrics.total_input_tokens));
    put("total_output_tokens", json!(metrics.total_output_tokens));
    put("request_throughput", json!(metrics.request_throughput));
    put("request_goodput", json!(metrics.request_goodput));
    put("output_throughput", json!(metrics.output_throughput));
    put("total_token_throughput", json!(metrics.total_token_throughput));
    put("max_output_tokens_per_s", json!(metrics.peak_output_tokens_per_second));
    put("max_concurrent_requests", json!(metrics.peak_in_flight));
    put("mean_concurrent_requests", json!(metrics.mean_in_flight));
    for (name, distribution) in [
        ("ttft", &metrics.ttft_ms),
        ("ttft_from_send", &metrics.ttft_from_send_ms),
        ("tpot", &metrics.tpot_ms),
        ("itl", &metrics.itl_ms),
        ("e2el", &metrics.e2el_ms),
        ("client_queue_time", &metrics.client_queue_ms),
        ("send_lag", &metrics.send_lag_ms),
    ] {
        put_distribution(&mut keys, name, distribution);
    }
    keys
}

fn put_distribution(keys: &mut Map<String, Value>, name: &str, distribution: &Distribution) {
    let Distribution { mean, median, std, p25, p75, p90, p95, p99, p99_9, .. } = distribution;
    for (statistic, value) in [
        ("mean", mean),
        ("median", median),
        ("std", std),
        ("p25", p25),
        ("p50", median),
        ("p75", p75),
        ("p90", p90),
        ("p95", p95),
        ("p99", p99),
        ("p99.9", p99_9),
    ] {
        keys.insert(format!("{statistic}_{name}_ms"), json!(value));
    }
}

/// What vLLM adds with `--save-detailed`: one entry a measured request, in the order of the schedule. Seconds.
pub fn detailed_keys(records: &[&RequestRecord]) -> Map<String, Value> {
    let list = |of: &dyn Fn(&RequestRecord) -> Value| {
        Value::Array(records.iter().map(|record| of(record)).collect())
    };
    let seconds =
        |of: fn(&RequestRecord) -> Option<f64>| list(&move |record| json!(of(record).unwrap_or(0.0)));
    let usage = |record: &RequestRecord| record.usage.unwrap_or_default();
    let mut keys = Map::new();
    let mut put = |name: &str, value: Value| keys.insert(name.to_owned(), value);
    put("input_lens", list(&|record| json!(usage(record).prompt_tokens)));
    put("output_lens", list(&|record| json!(usage(record).completion_tokens)));
    put("ttfts", seconds(RequestRecord::ttft_seconds));
    put("latencies", seconds(RequestRecord::e2el_seconds));
    put("start_times", seconds(|record| record.sent_seconds));
    put("queue_times", seconds(|record| Some(record.due_seconds - record.scheduled_seconds)));
    put("itls", list(&|record| record.gaps_micros.iter().map(|micros| f64::from(*micros) / 1e6).collect()));
    put(
        "errors",
        list(&|record| match &record.outcome {
            Outcome::Failed { class, message, .. } => json!(format!("{}: {message}", class.name())),
            Outcome::Completed => json!(""),
            Outcome::Cut => json!("given up"),
        }),
    );
    keys
}

/// `result.json`: everything of the result, and at the top level the keys of the point that stands for it, the
/// `detailed` ones among them.
///
/// # Errors
/// None that is known: all of it has a JSON form.
pub fn document(result: &BenchResult, detailed: &Map<String, Value>) -> Result<Value, serde_json::Error> {
    let mut document = serde_json::to_value(result)?;
    if let (Value::Object(document), Some(point)) = (&mut document, result.best_point()) {
        document.insert("summarised_point".into(), json!(point.load.to_string()));
        let keys = keys(&result.header, point).into_iter().chain(detailed.clone());
        for (name, value) in keys {
            document.entry(name).or_insert(value);
        }
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_written_as_vllm_writes_it() {
        assert_eq!(date(1_700_000_000), "20231114-221320");
    }

    /// The keys that vLLM's own sweeps and plots read.
    #[test]
    fn every_key_of_vllm_is_there() {
        let keys = metric_keys(&Metrics::default());
        for name in [
            "duration",
            "completed",
            "failed",
            "total_input_tokens",
            "total_output_tokens",
            "request_throughput",
            "request_goodput",
            "output_throughput",
            "total_token_throughput",
            "max_output_tokens_per_s",
            "max_concurrent_requests",
            "mean_ttft_ms",
            "median_ttft_ms",
            "std_ttft_ms",
            "p99_ttft_ms",
            "mean_tpot_ms",
            "median_tpot_ms",
            "std_tpot_ms",
            "p99_tpot_ms",
            "mean_itl_ms",
            "median_itl_ms",
            "std_itl_ms",
            "p99_itl_ms",
            "mean_e2el_ms",
            "median_e2el_ms",
            "std_e2el_ms",
            "p99_e2el_ms",
        ] {
            assert!(keys.contains_key(name), "{name}");
        }
    }
}
