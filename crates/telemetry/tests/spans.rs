//! What becomes of spans, whatever the collector does.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::net::TcpListener;
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use servelab_telemetry::Traces;
use servelab_telemetry::traces::{
    Child, KeyValue, OtlpProtocol, Sampling, SpanCounters, SpanKind, TraceOptions,
};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn options(endpoint: &str, ratio: f64) -> TraceOptions {
    TraceOptions {
        endpoint: endpoint.parse().unwrap(),
        protocol: OtlpProtocol::Http,
        sampling: Sampling { ratio, follows_parent: false },
        prompts: false,
        service_name: "test",
        version: "0",
    }
}

/// Nobody answers there, though connections are made.
fn silence() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    (listener, endpoint)
}

fn one_request(traces: &Traces, children: usize) {
    let trace = traces.request(|| "test".to_owned(), SpanKind::Server, &HeaderMap::new());
    for _ in 0..children {
        let (from, to) = (Duration::ZERO, Duration::from_millis(1));
        trace.child(Child { name: "part", from, to, attributes: Vec::new(), events: Vec::new() });
    }
    trace.set([KeyValue::new("a", 1)]);
}

#[test]
fn a_collector_that_says_nothing_costs_spans_and_nothing_else_and_all_are_counted() {
    const REQUESTS: u64 = 3000;
    let (_listener, endpoint) = silence();
    let counters = SpanCounters::unregistered().unwrap();
    let traces = Traces::start(&options(&endpoint, 1.0), counters.clone()).unwrap();
    for _ in 0..REQUESTS {
        one_request(&traces, 4);
    }
    assert!(counters.queue_full.get() > 0, "a queue without bound");
    traces.shut_down(Duration::from_millis(100));
    assert_eq!(counters.exported.get(), 0);
    assert!(counters.shutdown.get() > 0);
    assert_eq!(counters.dropped(), REQUESTS * 5);
    one_request(&traces, 1);
}

#[test]
fn what_is_not_sampled_makes_no_span_and_passes_that_on() {
    let (_listener, endpoint) = silence();
    let counters = SpanCounters::unregistered().unwrap();
    let traces = Traces::start(&options(&endpoint, 0.0), counters.clone()).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::from_static(PARENT));
    let trace = traces.request(|| "test".to_owned(), SpanKind::Server, &headers);
    assert_eq!(trace.id(), Some("4bf92f3577b34da6a3ce929d0e0e4736"), "for the log");
    assert!(!trace.is_recorded());
    trace.open("part", SpanKind::Client, Vec::new()).inject(&mut headers);
    let passed = headers["traceparent"].to_str().unwrap();
    assert!(
        passed.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && passed.ends_with("-00"),
        "{passed}"
    );
    assert_eq!(headers.len(), 1, "no empty tracestate");
    drop(trace);
    traces.shut_down(Duration::from_secs(60));
    assert_eq!(counters.dropped(), 0);
}

#[test]
fn switched_off_the_context_passes_as_it_came() {
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::from_static(PARENT));
    let trace = Traces::off().request(|| unreachable!(), SpanKind::Server, &headers);
    assert_eq!(trace.id(), None);
    trace.open("part", SpanKind::Client, Vec::new()).inject(&mut headers);
    assert_eq!(headers["traceparent"], PARENT);
    Traces::off().shut_down(Duration::ZERO);
}
