//! `/metrics` as text: what people and scrapers see.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use servelab_telemetry::{
    BuildInfo, CacheConfig, Device, EngineSample, FinishedReason, LoadStage, Metrics, MetricsConfig,
    MetricsError, RejectionReason, RequestTimings, names,
};

fn metrics(prefix: &str) -> Metrics {
    let build = BuildInfo { version: "0.1.0", commit: Some("abc1234") };
    let routes = &["/v1/completions", "/metrics"];
    let config = MetricsConfig { prefix, model_name: "demo", max_model_len: 512, routes, build };
    let metrics = Metrics::new(&config).unwrap();
    let cache =
        CacheConfig { block_size: 16, num_blocks: 64, max_model_len: 500, dtype: "f32", prefix_cache: true };
    metrics.set_cache_config(cache).unwrap();
    metrics.max_running.set(8);
    metrics.set_device(Device { kind: "sim", name: "4 x H100 SXM", gpus: 4, speed: "10" }).unwrap();
    metrics.set_model_load(|stage| Duration::from_millis(250 * (stage as u64 + 1))).unwrap();
    metrics.set_model_memory(|part| 1 << (20 + part as u64)).unwrap();
    metrics
}

/// The exposition without what the operating system says about the process.
fn without_process(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.contains("process_"));
    lines.map(|line| format!("{line}\n")).collect()
}

/// A sample: name with labels, and the value.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let mut samples = BTreeMap::new();
    for line in lines {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let earlier = samples.insert(series.to_owned(), value.parse().unwrap());
        assert_eq!(earlier, None, "{series} is there twice");
    }
    samples
}

fn record_a_little(metrics: &Arc<Metrics>) {
    let at = Duration::from_millis;
    let mut timings = RequestTimings::new(metrics.clone(), at(0), at(1), 20, 1);
    timings.scheduled(at(2), 16);
    timings.token(at(9), 0);
    timings.token(at(12), 0);
    timings.finish(at(12), FinishedReason::Length);
    metrics.observe_step(24);
    metrics.observe_step(0);
    metrics.admission_rejections.of(RejectionReason::QueueFull).inc();
    metrics.observe_http(Some("/v1/completions"), 200);
    metrics.observe_http(Some("/not/announced"), 404);
    let sample = EngineSample {
        running: 3,
        waiting: 2,
        blocks_held: 16,
        blocks_total: 64,
        prefix_query_tokens: 20,
        prefix_hit_tokens: 16,
        preemptions: 1,
    };
    metrics.observe_engine(&sample);
    metrics.observe_engine(&sample);
}

#[test]
fn the_text_is_as_reviewed() {
    let metrics = Arc::new(metrics("servelab_"));
    record_a_little(&metrics);
    insta::assert_snapshot!(without_process(&metrics.encode().unwrap()));
}

#[test]
fn every_metric_of_the_table_is_exported_before_its_first_use() {
    let text = metrics("servelab_").encode().unwrap();
    for metric in names::ALL {
        let name = format!("servelab_{}", metric.name);
        let kind = match metric.kind {
            names::Kind::Gauge => "gauge",
            names::Kind::Counter => "counter",
            names::Kind::Histogram(_) => "histogram",
        };
        assert!(text.contains(&format!("# HELP {name} {}\n", metric.help)), "{name} has no help");
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind}");
        let has_sample = samples(&text).keys().any(|series| series.starts_with(&name));
        assert!(has_sample, "{name} has no sample");
    }
}

#[test]
fn families_are_announced_once_and_counters_end_in_total() {
    let text = metrics("vllm:").encode().unwrap();
    let mut families = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        assert!(families.insert(name), "{name} is announced twice");
        assert!(kind != "counter" || name.ends_with("_total"), "{name}");
    }
    let bare = |series: &str| series.split('{').next().unwrap_or(series).to_owned();
    for series in samples(&text).keys().map(|series| bare(series)) {
        let announced =
            |suffix: &str| series.strip_suffix(suffix).is_some_and(|name| families.contains(name));
        assert!(["", "_bucket", "_sum", "_count"].into_iter().any(announced), "{series} is not announced");
    }
}

#[test]
fn engine_counters_advance_by_what_is_new() {
    let metrics = Arc::new(metrics("servelab_"));
    record_a_little(&metrics);
    let all = samples(&metrics.encode().unwrap());
    let value = |name: &str| all[&format!("servelab_{name}{{model_name=\"demo\"}}")];
    assert_eq!(value("prefix_cache_hits_total"), 16.0);
    assert_eq!(value("num_preemptions_total"), 1.0);
    assert_eq!(value("kv_cache_usage_perc"), 0.25);
    assert_eq!(value("iteration_tokens_total_count"), 1.0, "an empty step is no step");
}

#[test]
fn the_prefix_gives_vllms_names_and_must_be_one() {
    let text = metrics("vllm:").encode().unwrap();
    assert!(text.contains("\nvllm:num_requests_running{model_name=\"demo\"} 0\n"), "{text}");
    assert!(!text.contains("servelab"), "{text}");
    for wrong in ["7up_", "serve-lab_", "a b", "é"] {
        let build = BuildInfo { version: "0", commit: None };
        let config = MetricsConfig { prefix: wrong, model_name: "m", max_model_len: 1, routes: &[], build };
        let error = Metrics::new(&config).err().unwrap();
        assert!(matches!(error, MetricsError::Prefix(_)), "{error}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_reports_on_itself() {
    let all = samples(&metrics("servelab_").encode().unwrap());
    for name in ["resident_memory_bytes", "cpu_seconds_total", "open_fds", "start_time_seconds"] {
        let value = all.get(&format!("process_{name}")).copied();
        assert!(value.is_some(), "process_{name}");
    }
    assert!(all["process_resident_memory_bytes"] > 0.0);
}

#[test]
fn load_stages_are_told_apart() {
    let all = samples(&metrics("servelab_").encode().unwrap());
    let seconds =
        |stage: &str| all[&format!("servelab_model_load_seconds{{model_name=\"demo\",stage=\"{stage}\"}}")];
    let stages = ["read", "compile", "convert", "warm_up", "record"];
    assert_eq!(stages.map(seconds), [0.25, 0.5, 0.75, 1.0, 1.25]);
    assert_eq!(LoadStage::Read as usize, 0);
}
