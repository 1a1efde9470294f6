//! Traces as a collector gets them: one trace from the client through the router to the replica.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::bench::{bench, result};
use crate::collector::{Collector, Span};
use crate::util::{Server, chat, events, greedy, prose, servelab};

const CLIENTS_TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENTS_SPAN: &str = "00f067aa0ba902b7";

/// What `traceparent` says of a client that records.
fn traceparent(flags: &str) -> String {
    format!("00-{CLIENTS_TRACE}-{CLIENTS_SPAN}-{flags}")
}

async fn replica(collector: &Collector, flags: &[&str]) -> Server {
    let small = ["--threads", "1", "--kv-blocks", "256"];
    Server::start(&[&small, &collector.flags()[..], flags].concat()).await
}

async fn router(replica: &Server, collector: &Collector, flags: &[&str]) -> Server {
    let mut command = servelab(&["route", "--port", "0", "--health-interval", "100ms"]);
    command.args(["--replica", &replica.base]).args(collector.flags()).args(flags);
    let router = Server::spawn(command);
    router.wait_until_ready().await;
    // Else the request is held first, and its choice finds nobody, or only some of them.
    let all = format!("\"replicas_ready\":{}", 1 + flags.iter().filter(|flag| **flag == "--replica").count());
    let is_ready = async || router.get("/health").await.1.contains(&all);
    router.until("all replicas are ready", is_ready).await;
    router
}

/// The only span of that service and name.
fn only<'a>(spans: &'a [Span], service: &str, name: &str) -> &'a Span {
    let found: Vec<&Span> =
        spans.iter().filter(|span| span.service == service && span.name == name).collect();
    let [span] = found.as_slice() else { panic!("{} of {service} {name}: {spans:#?}", found.len()) };
    span
}

/// Whether both services have sent the spans of their requests, which end last.
fn both_ended(spans: &[Span]) -> bool {
    let ended = |service: &str| spans.iter().any(|span| span.service == service && span.kind == 2);
    ended("servelab-router") && ended("servelab-replica")
}

async fn one_routed_stream(collector: &Collector) -> Vec<Span> {
    let replica = replica(collector, &[]).await;
    let router = router(&replica, collector, &[]).await;
    let mut body = chat("What is a xylophone of blocks?", 12);
    body["stream"] = json!(true);
    body["seed"] = json!(7);
    let request = router.client.post(router.url("/v1/chat/completions")).json(&body);
    let request = request.header("traceparent", traceparent("01")).header("tracestate", "lab=1");
    let answer = request.header("x-request-id", "r-1").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(events(answer).await.last().unwrap(), "[DONE]");
    collector.until("whole", both_ended).await
}

fn assert_routed_tree(spans: &[Span]) {
    let at = |service, name| only(spans, service, name);
    let (route, wait) = (at("servelab-router", "POST /v1/chat/completions"), at("servelab-router", "wait"));
    let (choose, attempt) = (at("servelab-router", "choose"), at("servelab-router", "attempt"));
    let served = at("servelab-replica", "chat demo");
    let parts = ["prepare", "queue", "prefill", "decode"].map(|name| at("servelab-replica", name));

    let ids: BTreeSet<&str> = spans.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "an id is there twice");
    assert!(spans.iter().all(|span| span.trace_id == CLIENTS_TRACE), "{spans:#?}");
    assert_eq!((route.parent.as_str(), route.kind), (CLIENTS_SPAN, 2));
    for child in [wait, choose, attempt] {
        assert!(child.is_child_of(route) && child.is_within(route), "{child:#?} of {route:#?}");
    }
    assert!(wait.end <= choose.start && choose.end <= attempt.start, "{spans:#?}");
    assert_eq!(attempt.kind, 3);
    assert!(served.is_child_of(attempt) && served.kind == 2, "{served:#?} of {attempt:#?}");
    assert!(served.start >= attempt.start);
    for child in parts {
        assert!(child.is_child_of(served) && child.is_within(served), "{child:#?} of {served:#?}");
    }
    assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "a gap between parts: {parts:#?}");
    assert_eq!(attempt.events[0].0, "first_byte");
    assert_eq!(choose.attribute("servelab.reason"), "only");
}

fn assert_says_what_was_asked(served: &Span) {
    for (name, value) in [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.provider.name", json!("servelab")),
        ("gen_ai.request.model", json!("demo")),
        ("gen_ai.request.id", json!("r-1")),
        ("gen_ai.request.max_tokens", json!(12)),
        ("gen_ai.request.temperature", json!(0.0)),
        ("gen_ai.request.seed", json!(7)),
        ("gen_ai.request.stream", json!(true)),
        ("gen_ai.response.model", json!("demo")),
        ("gen_ai.response.finish_reasons", json!(["length"])),
        ("gen_ai.usage.output_tokens", json!(12)),
        ("gen_ai.usage.cache_read.input_tokens", json!(0)),
        ("http.response.status_code", json!(200)),
        ("servelab.finished_reason", json!("length")),
        ("servelab.preemptions", json!(0)),
    ] {
        assert_eq!(served.attribute(name), &value, "{name} of {served:#?}");
    }
    assert!(served.attribute("gen_ai.usage.input_tokens").as_u64().unwrap() > 0);
    assert!(served.attribute("gen_ai.response.id").as_str().unwrap().starts_with("chatcmpl-"));
    let seconds = |name: &str| served.attribute(&format!("gen_ai.latency.{name}")).as_f64().unwrap();
    let model = seconds("time_in_model_prefill") + seconds("time_in_model_decode");
    assert!((model - seconds("time_in_model_inference")).abs() < 1e-9);
    assert!(seconds("time_in_queue") + model <= seconds("e2e") + 1e-9);
    assert!(seconds("time_to_first_token") <= seconds("e2e"));
    assert_eq!(served.status, 0);
}

#[tokio::test]
async fn a_routed_stream_is_one_trace_over_http() {
    let collector = Collector::http().await;
    let spans = one_routed_stream(&collector).await;
    assert_routed_tree(&spans);
    assert_says_what_was_asked(only(&spans, "servelab-replica", "chat demo"));
    let all: String = spans.iter().map(|span| span.debug.as_str()).collect();
    assert!(!all.contains("xylophone"), "the prompt is in the trace: {all}");
    assert!(all.contains("lab=1"), "tracestate did not come along: {all}");
}

#[tokio::test]
async fn a_routed_stream_is_one_trace_over_grpc() {
    let collector = Collector::grpc().await;
    let spans = one_routed_stream(&collector).await;
    assert_routed_tree(&spans);
    let served = only(&spans, "servelab-replica", "chat demo");
    assert_says_what_was_asked(served);
    assert_eq!(served.resource["service.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(served.resource["telemetry.sdk.language"], "rust");
}

/// The spans that are the requests themselves, of a service.
fn requests(spans: &[Span]) -> Vec<&Span> {
    spans.iter().filter(|span| span.kind == 2).collect()
}

#[tokio::test]
async fn hits_and_preemptions_are_events() {
    let collector = Collector::http().await;
    let server =
        Server::start(&[&["--kv-blocks", "20", "--max-model-len", "512"], &collector.flags()[..]].concat())
            .await;
    let prompts: Vec<String> = (0..6).map(|at| prose(at, 24)).collect();
    futures::future::join_all(prompts.iter().map(|prompt| server.complete(prompt, 64))).await;
    for _ in 0..2 {
        server.complete(&prose(9, 40), 4).await;
    }
    let spans = collector.until("eight requests", |spans| requests(spans).len() == 8).await;
    let preemptions = |span: &&Span| span.attribute("servelab.preemptions").as_i64().unwrap();
    let counted: i64 = requests(&spans).iter().map(preemptions).sum();
    let told = spans.iter().flat_map(|span| &span.events).filter(|event| event.0 == "preempted").count();
    assert!(counted > 0 && counted == told as i64, "{counted} counted and {told} told");
    for span in &spans {
        assert!(span.events.iter().all(|event| (span.start..=span.end).contains(&event.1)), "{span:#?}");
    }
    let hit = spans.iter().flat_map(|span| &span.events).find(|event| event.0 == "cache_hit").unwrap();
    assert!(hit.2["gen_ai.usage.cache_read.input_tokens"].as_u64().unwrap() >= 16, "{hit:?}");
}

#[tokio::test]
async fn requests_that_come_to_nothing_are_traced_too() {
    let collector = Collector::http().await;
    let server = replica(&collector, &[]).await;
    assert_eq!(server.post("/v1/completions", &greedy("Hello", 1 << 20)).await.0, 400);
    let two =
        json!({"prompt": ["one", "two"], "max_tokens": 3, "n": 2, "temperature": 1, "ignore_eos": true});
    server.ok("/v1/completions", &two).await;
    let gone = server.open_stream("/v1/completions", &greedy("The queue", 1500)).await;
    drop(gone);
    let spans = collector.until("three requests", |spans| requests(spans).len() == 3).await;
    let by = |name: &str, value: Value| {
        *requests(&spans)
            .iter()
            .find(|span| span.attribute(name) == &value)
            .unwrap_or_else(|| panic!("{spans:#?}"))
    };
    let refused = by("error.type", json!("context_length_exceeded"));
    assert_eq!((refused.attribute("http.response.status_code"), refused.status), (&json!(400), 0));
    let several = by("gen_ai.request.choice.count", json!(2));
    assert_eq!(several.attribute("gen_ai.response.finish_reasons"), &json!(vec!["length"; 4]));
    assert_eq!(several.attribute("gen_ai.usage.output_tokens"), &json!(12));
    assert_eq!(spans.iter().filter(|span| span.is_child_of(several) && span.name == "decode").count(), 2);
    by("servelab.finished_reason", json!("abort"));
}

#[tokio::test]
async fn who_does_not_record_decides_for_all_behind_and_malformed_context_is_none() {
    let collector = Collector::http().await;
    let mut server = replica(&collector, &["--trace-sample-ratio", "0"]).await;
    let ask = async |traceparent: &str| {
        let request = server.client.post(server.url("/v1/completions")).json(&greedy("Hello", 2));
        assert_eq!(request.header("traceparent", traceparent).send().await.unwrap().status(), 200);
    };
    server.complete("Hello", 2).await;
    let long = format!("{}-{}", traceparent("01"), "x".repeat(2000));
    for malformed in
        ["", "00", "ff-1-2-01", "01", &long, "00-00000000000000000000000000000000-00f067aa0ba902b7-01"]
    {
        ask(malformed).await;
    }
    ask(&traceparent("00")).await;
    ask(&traceparent("01")).await;
    server.signal("TERM");
    assert!(server.ended().await.success());
    let spans = collector.spans();
    assert_eq!(requests(&spans).len(), 1, "{spans:#?}");
    assert!(spans.iter().all(|span| span.trace_id == CLIENTS_TRACE), "{spans:#?}");
}

#[tokio::test]
async fn malformed_context_begins_a_new_trace() {
    let collector = Collector::http().await;
    let server = replica(&collector, &[]).await;
    let request = server.client.post(server.url("/v1/completions")).json(&greedy("Hello", 2));
    let malformed = format!("00-{CLIENTS_TRACE}-zzzzzzzzzzzzzzzz-01");
    assert_eq!(request.header("traceparent", malformed).send().await.unwrap().status(), 200);
    let spans = collector.until("one request", |spans| requests(spans).len() == 1).await;
    let served = requests(&spans)[0];
    assert_eq!(served.parent, "");
    assert_ne!(served.trace_id, CLIENTS_TRACE);
}

#[tokio::test]
async fn prompts_are_recorded_for_who_asks_for_it() {
    let collector = Collector::http().await;
    let server = replica(&collector, &["--trace-prompts"]).await;
    server.ok("/v1/chat/completions", &chat("What is a xylophone?", 2)).await;
    let spans = collector.until("one request", |spans| requests(spans).len() == 1).await;
    let messages = requests(&spans)[0].attribute("gen_ai.input.messages").as_str().unwrap();
    let messages: Value = serde_json::from_str(messages).unwrap();
    let parts = json!([{"type": "text", "content": "What is a xylophone?"}]);
    assert_eq!(messages, json!([{"role": "user", "parts": parts}]));
}

#[tokio::test]
async fn answers_go_on_without_a_collector_and_what_is_lost_is_counted() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{nobody}");
    for protocol in ["http", "grpc"] {
        let mut server = Server::start(&["--otlp-endpoint", &endpoint, "--otlp-protocol", protocol]).await;
        for _ in 0..5 {
            server.complete("Hello", 2).await;
        }
        let series = r#"servelab_trace_spans_dropped_total{model_name="demo",reason="export_failed"}"#;
        server.until("all are counted", async || server.metric(series).await == Some(25.0)).await;
        server.complete("Hello", 2).await;
        let log = server.log();
        assert_eq!(log.matches("traces cannot be exported").count(), 1, "{log}");
        server.signal("TERM");
        assert!(server.ended().await.success(), "{}", server.log());
    }
}

#[tokio::test]
async fn what_is_left_is_exported_at_the_end_and_no_header_is_logged() {
    let collector = Collector::http().await;
    let mut command = servelab(&["serve", "--port", "0", "--log-level", "debug", "--log-format", "json"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url);
    command.env("OTEL_EXPORTER_OTLP_HEADERS", "x-lab-key=sk-very-secret");
    command.env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab");
    let mut server = Server::spawn(command);
    server.wait_until_ready().await;
    server.complete("Hello", 2).await;
    server.signal("TERM");
    assert!(server.ended().await.success());
    let spans = collector.spans();
    let served = requests(&spans)[0];
    assert_eq!(served.resource["deployment.environment.name"], "lab");
    assert_eq!(collector.headers()[0]["x-lab-key"], "sk-very-secret");
    let log = server.log();
    assert!(!log.contains("very-secret"), "{log}");
    let answered =
        log.lines().find(|line| line.contains(r#""message":"answered""#) && line.contains("completions"));
    let answered: Value = serde_json::from_str(answered.unwrap()).unwrap();
    assert_eq!(answered["span"]["trace_id"], json!(served.trace_id), "{answered}");
}

#[tokio::test]
async fn every_attempt_at_a_replica_is_a_span_with_what_the_replica_made_of_it() {
    let collector = Collector::http().await;
    // It computes a step in seconds, so that what is inside stays inside.
    let full = ["--device", "sim", "--speed", "0.001", "--max-running", "1", "--max-waiting", "1"];
    let full = Server::start(&[&full, &collector.flags()[..]].concat()).await;
    let free = replica(&collector, &[]).await;
    let long = greedy("The queue", 1500);
    let _inside =
        (full.open_stream("/v1/completions", &long).await, full.open_stream("/v1/completions", &long).await);
    let router = router(&full, &collector, &["--replica", &free.base, "--policy", "round_robin"]).await;
    // One of two in turn goes to the full one first.
    for _ in 0..2 {
        router.complete("Hello", 2).await;
    }
    let whole = |spans: &[Span]| {
        let routed = spans.iter().filter(|span| span.service == "servelab-router" && span.kind == 2);
        routed.count() == 2 && spans.iter().any(|span| span.attribute("error.type") == "429")
    };
    let spans = collector.until("two requests and a refusal", whole).await;
    let refused = spans.iter().find(|span| span.name == "attempt" && span.status == 2).unwrap();
    assert_eq!(refused.attribute("error.type"), "status");
    assert_eq!(refused.attribute("http.response.status_code"), 429);
    let port = |server: &Server| server.base.rsplit_once(':').unwrap().1.parse::<u64>().unwrap();
    assert_eq!(refused.attribute("server.port"), port(&full));
    let again =
        spans.iter().find(|span| span.name == "attempt" && span.parent == refused.parent && span.status == 0);
    let again = again.unwrap();
    assert!(refused.end <= again.start, "{again:#?} before {refused:#?}");
    assert_eq!(
        (again.attribute("http.request.resend_count"), again.attribute("server.port")),
        (&json!(1), &json!(port(&free)))
    );
    let at_full = spans.iter().find(|span| span.is_child_of(refused)).unwrap();
    assert_eq!((at_full.attribute("error.type"), at_full.status), (&json!("429"), 0));
}

#[tokio::test]
async fn a_hedge_is_an_attempt_beside_the_slow_one_which_ends_when_it_has_lost() {
    let collector = Collector::http().await;
    let fast = replica(&collector, &[]).await;
    let slow = ["--device", "sim", "--speed", "0.001"];
    let slow = Server::start(&[&slow, &collector.flags()[..]].concat()).await;
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("replicas");
    std::fs::write(&list, "").unwrap();
    let flags = ["--replicas-file", list.to_str().unwrap(), "--policy", "round_robin", "--hedge", "1.0"];
    let router = router(&fast, &collector, &flags).await;
    // So many show how long the first word usually takes.
    for _ in 0..32 {
        router.complete("Hello", 1).await;
    }
    std::fs::write(&list, format!("{}\n", slow.base)).unwrap();
    let both = async || router.get("/health").await.1.contains("\"replicas_ready\":2");
    router.until("both replicas are ready", both).await;
    // One of two in turn goes to the slow one first, unless the fast one was slow for once and the turn a hedge's.
    let has_won = async || router.get("/metrics").await.1.contains("router_hedges_won_total 1");
    for _ in 0..100 {
        router.complete("Hello", 1).await;
        if has_won().await {
            break;
        }
    }
    let is_hedge = |span: &Span| span.name == "attempt" && span.attribute("servelab.hedge") == true;
    let lost_to = |spans: &[Span], hedge: &Span| {
        spans
            .iter()
            .find(|span| span.parent == hedge.parent && span.name == "attempt" && !is_hedge(span))
            .cloned()
    };
    // Each program sends its spans when it likes, the replica perhaps last.
    let goes_on = |spans: &[Span], hedge: &Span| spans.iter().any(|span| span.is_child_of(hedge));
    let whole = |spans: &[Span]| {
        let won = |span: &&Span| is_hedge(span) && span.events.len() == 1;
        spans.iter().filter(won).any(|hedge| lost_to(spans, hedge).is_some() && goes_on(spans, hedge))
    };
    let spans = collector.until("a hedge, who lost to it, and what the replica made of it", whole).await;
    let hedge = spans.iter().find(|span| is_hedge(span) && span.events.len() == 1).unwrap();
    let slow_one = lost_to(&spans, hedge).unwrap();
    let port = |server: &Server| server.base.rsplit_once(':').unwrap().1.parse::<u64>().unwrap();
    assert_eq!(hedge.attribute("server.port"), port(&fast));
    assert_eq!(slow_one.attribute("server.port"), port(&slow));
    assert!(slow_one.start < hedge.start && hedge.start < slow_one.end, "{slow_one:#?} beside {hedge:#?}");
    assert!(slow_one.events.is_empty(), "it has lost before its first byte: {slow_one:#?}");
    assert!(goes_on(&spans, hedge), "the replica goes on below the hedge");
}

#[tokio::test]
async fn the_load_generators_requests_are_the_first_spans_of_their_traces() {
    let collector = Collector::grpc().await;
    let replica = replica(&collector, &[]).await;
    let router = router(&replica, &collector, &[]).await;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run").to_str().unwrap().to_owned();
    let load = "--concurrency 2 --requests 4 --repeats 1 --input-tokens 20 --output-tokens 4 --json";
    let mut flags: Vec<String> = load.split(' ').map(str::to_owned).collect();
    flags.extend(["--url", &router.base, "--out", &out].map(str::to_owned));
    flags.extend(collector.flags().map(str::to_owned));
    // Off this thread, which has to play the collector.
    let ran = move || bench(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    result(&tokio::task::spawn_blocking(ran).await.unwrap());
    let lines = std::fs::read_to_string(folder.path().join("run/requests.jsonl")).unwrap();
    let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    // Those that kept up the load to the end were cut off.
    let records = records.filter(|record| record["outcome"]["kind"] == "completed");
    let ids: Vec<String> = records.map(|record| record["trace_id"].as_str().unwrap().to_owned()).collect();
    assert!(ids.len() >= 4, "{ids:?}");
    let whole = |spans: &[Span]| {
        ids.iter()
            .all(|id| spans.iter().any(|span| span.trace_id == *id && span.name == "text_completion demo"))
    };
    let spans = collector.until("all traces are whole", whole).await;
    for id in ids {
        let trace: Vec<Span> = spans.iter().filter(|span| span.trace_id == id).cloned().collect();
        let sent = only(&trace, "servelab-bench", "POST /v1/completions");
        let routed = only(&trace, "servelab-router", "POST /v1/completions");
        assert_eq!((sent.parent.as_str(), sent.kind), ("", 3));
        assert!(routed.is_child_of(sent), "{trace:#?}");
        assert_eq!(sent.attribute("gen_ai.usage.output_tokens"), &json!(4));
        assert_eq!(sent.events.last().unwrap().0, "first_token");
    }
}

#[test]
fn settings_that_cannot_work_are_named() {
    for (arguments, part) in [
        (&["serve", "--otlp-endpoint", "collector:4317"][..], "--otlp-endpoint \"collector:4317\""),
        (&["serve", "--trace-sample-ratio", "0.1"], "--trace-sample-ratio says how"),
        (
            &["bench", "--concurrency", "1", "--offline", "--otlp-endpoint", "http://c:1"],
            "--offline and --otlp-endpoint",
        ),
        (
            &["route", "--replica", "http://a:1", "--otlp-endpoint", "http://u:sk-secret@c:1"],
            "holds a user name",
        ),
    ] {
        let (code, _, errors) = crate::util::run(servelab(arguments));
        assert_eq!(code, 2, "{errors}");
        assert!(errors.contains(part) && !errors.contains("sk-secret"), "{errors}");
    }
}
