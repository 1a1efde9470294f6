use std::collections::BTreeMap;

use futures::future::join_all;
use serde_json::json;
use servelab_telemetry::names::{self, Kind};

use crate::collector::Collector;
use crate::util::{Server, greedy, prose};

/// All series of `/metrics` with their values.
async fn series(server: &Server) -> BTreeMap<String, f64> {
    let (status, text) = server.get("/metrics").await;
    assert_eq!(status, 200);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let parsed = lines.map(|line| line.rsplit_once(' ').unwrap());
    parsed.map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect()
}

/// The sum over all series of a metric: of a histogram the count of its observations.
fn total(all: &BTreeMap<String, f64>, name: &str, kind: Kind) -> f64 {
    let name = match kind {
        Kind::Histogram(_) => format!("servelab_{name}_count{{"),
        Kind::Gauge | Kind::Counter => format!("servelab_{name}{{"),
    };
    all.iter().filter(|(series, _)| series.starts_with(&name)).map(|(_, value)| value).sum()
}

/// Every kind of thing that can happen to a request on this server.
async fn let_everything_happen(server: &Server) {
    let prompts: Vec<String> = (0..6).map(|at| prose(at, 24)).collect();
    join_all(prompts.iter().map(|prompt| server.complete(prompt, 64))).await;
    for _ in 0..2 {
        server.complete(&prose(9, 40), 4).await;
    }
    let (status, _) = server.post("/v1/completions", &greedy("Hello", 500)).await;
    assert_eq!(status, 400, "too large for the pool");
}

#[tokio::test]
async fn every_metric_of_the_table_is_there_from_the_start_and_moves_when_it_should() {
    let collector = Collector::http().await;
    // Some spans are lost and some are not.
    collector.refuse(1);
    let flags = [&["--kv-blocks", "20", "--max-model-len", "512"], &collector.flags()[..]].concat();
    let server = Server::start(&flags).await;
    let fresh = series(&server).await;
    for metric in names::ALL {
        let prefix = format!("servelab_{}", metric.name);
        assert!(fresh.keys().any(|series| series.starts_with(&prefix)), "{prefix} is not exported");
    }
    let_everything_happen(&server).await;
    let exported = "servelab_trace_spans_exported_total{model_name=\"demo\"}";
    let some_spans_are = async || {
        server.complete("Hello", 2).await;
        server.metric(exported).await > Some(0.0)
    };
    server.until("spans are exported", some_spans_are).await;
    server.until_idle().await;
    let busy = series(&server).await;
    for metric in names::ALL.iter().filter(|metric| metric.kind != Kind::Gauge) {
        let (before, after) =
            (total(&fresh, metric.name, metric.kind), total(&busy, metric.name, metric.kind));
        assert!(after > before, "{} did not move: {before}", metric.name);
    }
    for name in ["cache_config_info", "build_info", "device_info"] {
        assert_eq!(total(&fresh, name, Kind::Gauge), 1.0, "{name}");
    }
    assert!(total(&fresh, "model_load_seconds", Kind::Gauge) > 0.0);
}

#[tokio::test]
async fn gauges_follow_what_runs_and_waits() {
    let server = Server::start(&["--max-running", "1"]).await;
    let body = greedy("The queue", 1500);
    let streams = join_all((0..3).map(|_| server.open_stream("/v1/completions", &body))).await;
    let waiting = "servelab_num_requests_waiting{model_name=\"demo\"}";
    let running = "servelab_num_requests_running{model_name=\"demo\"}";
    server.until("two waiting", async || server.metric(waiting).await == Some(2.0)).await;
    assert_eq!(server.metric(running).await, Some(1.0));
    let usage = "servelab_kv_cache_usage_perc{model_name=\"demo\"}";
    let share = server.metric(usage).await.unwrap();
    assert!(share > 0.0 && share <= 1.0, "{share}");
    drop(streams);
    for gauge in [waiting, running, usage] {
        server.until("back at 0", async || server.metric(gauge).await == Some(0.0)).await;
    }
}

#[tokio::test]
async fn tokens_are_counted_exactly() {
    let server = Server::start(&[]).await;
    let prompt = json!((100..140).collect::<Vec<u32>>());
    let mut body = greedy("", 10);
    body["prompt"] = prompt;
    for _ in 0..3 {
        server.ok("/v1/completions", &body).await;
    }
    server.until_idle().await;
    let all = series(&server).await;
    let value = |name: &str| all[&format!("servelab_{name}{{model_name=\"demo\"}}")];
    assert_eq!(value("prompt_tokens_total"), 120.0);
    assert_eq!(value("prompt_tokens_cached_total"), 64.0, "two full blocks of 16, twice");
    assert_eq!(value("prefix_cache_hits_total"), 64.0);
    assert_eq!(value("generation_tokens_total"), 30.0);
    assert_eq!(value("request_generation_tokens_sum"), 30.0);
    assert_eq!(value("inter_token_latency_seconds_count"), 27.0);
    assert_eq!(value("time_to_first_token_seconds_count"), 3.0);
    assert_eq!(all["servelab_request_success_total{finished_reason=\"length\",model_name=\"demo\"}"], 3.0);
}

#[tokio::test]
async fn intervals_add_up() {
    let server = Server::start(&[]).await;
    server.complete("The queue", 20).await;
    server.until_idle().await;
    let all = series(&server).await;
    let sum = |name: &str| all[&format!("servelab_{name}_sum{{model_name=\"demo\"}}")];
    let inference = sum("request_prefill_time_seconds") + sum("request_decode_time_seconds");
    assert!((inference - sum("request_inference_time_seconds")).abs() < 1e-6);
    assert!((sum("inter_token_latency_seconds") - sum("request_decode_time_seconds")).abs() < 1e-6);
    let inside = sum("request_queue_time_seconds") + inference;
    assert!(inside <= sum("e2e_request_latency_seconds") + 1e-6, "{inside}");
    assert!(sum("request_prefill_time_seconds") > 0.0, "the prompt's step is prefill, not queue");
    let to_first = sum("request_queue_time_seconds") + sum("request_prefill_time_seconds");
    assert!(to_first <= sum("time_to_first_token_seconds") + 1e-6);
}

#[tokio::test]
async fn another_prefix_gives_vllms_names() {
    let server = Server::start(&["--metrics-prefix", "vllm:", "--served-model-name", "lab"]).await;
    server.complete("Hello", 2).await;
    let answer = server.client.get(server.url("/metrics")).send().await.unwrap();
    assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    assert_eq!(server.metric("vllm:num_requests_waiting{model_name=\"lab\"}").await, Some(0.0));
    server
        .until("counted", async || {
            server.metric("vllm:generation_tokens_total{model_name=\"lab\"}").await == Some(2.0)
        })
        .await;
    assert!(!server.get("/metrics").await.1.contains("servelab_"));
}

#[tokio::test]
async fn resetting_the_prefix_cache_frees_cached_blocks() {
    let server = Server::start(&[]).await;
    server.complete(&prose(1, 60), 4).await;
    server.until_idle().await;
    assert!(server.engine_state().await["blocks"]["cached"].as_u64().unwrap() > 0);
    let (status, _) = server.post("/reset_prefix_cache", &json!({})).await;
    assert_eq!(status, 200);
    let blocks = server.engine_state().await["blocks"].clone();
    assert_eq!(blocks["cached"], 0);
    assert_eq!(blocks["free"], blocks["total"]);
}
