//! A collector of traces, made of OpenTelemetry's own messages: over HTTP and over gRPC, with what it was sent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1 as proto;
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::util::PATIENCE;

/// Listens on a free port of this machine until the test ends.
pub struct Collector {
    /// As `--otlp-endpoint` wants it.
    pub url: String,
    pub protocol: &'static str,
    received: Arc<Received>,
}

#[derive(Default)]
struct Received {
    spans: Mutex<Vec<Span>>,
    headers: Mutex<Vec<HeaderMap>>,
    /// Exports that are still to be refused.
    refusals: AtomicUsize,
}

/// A span, in values that are easy to compare.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of whoever made it.
    pub service: String,
    pub resource: HashMap<String, Value>,
    pub name: String,
    /// 1 internal, 2 server, 3 client.
    pub kind: i32,
    pub trace_id: String,
    pub id: String,
    /// Empty: the first of its trace.
    pub parent: String,
    pub start: u64,
    pub end: u64,
    pub attributes: HashMap<String, Value>,
    /// In order: name, time, attributes.
    pub events: Vec<(String, u64, HashMap<String, Value>)>,
    /// 2 is an error.
    pub status: i32,
    /// The whole of it, to look for what must not be there.
    pub debug: String,
}

impl Collector {
    pub async fn http() -> Self {
        let received = Arc::new(Received::default());
        let app = Router::new().route("/v1/traces", post(take)).with_state(received.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, protocol: "http", received }
    }

    pub async fn grpc() -> Self {
        let received = Arc::new(Received::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let service = TraceServiceServer::new(Grpc(received.clone()));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(incoming));
        Self { url, protocol: "grpc", received }
    }

    /// The flags that send traces here.
    pub fn flags(&self) -> [&str; 4] {
        ["--otlp-endpoint", &self.url, "--otlp-protocol", self.protocol]
    }

    /// The next exports are refused, in a way that nobody tries again.
    pub fn refuse(&self, exports: usize) {
        self.received.refusals.store(exports, Ordering::SeqCst);
    }

    pub fn spans(&self) -> Vec<Span> {
        self.received.spans.lock().unwrap().clone()
    }

    pub fn headers(&self) -> Vec<HeaderMap> {
        self.received.headers.lock().unwrap().clone()
    }

    /// All spans, once they are as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let start = Instant::now();
        loop {
            let spans = self.spans();
            if wanted(&spans) {
                return spans;
            }
            assert!(start.elapsed() < PATIENCE, "never {what}: {spans:#?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

impl Span {
    pub fn is_child_of(&self, parent: &Self) -> bool {
        self.trace_id == parent.trace_id && self.parent == parent.id
    }

    pub fn is_within(&self, outer: &Self) -> bool {
        outer.start <= self.start && self.start <= self.end && self.end <= outer.end
    }

    pub fn attribute(&self, name: &str) -> &Value {
        self.attributes.get(name).unwrap_or(&Value::Null)
    }
}

async fn take(State(received): State<Arc<Received>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    match received.take(headers, ExportTraceServiceRequest::decode(body).unwrap()) {
        true => StatusCode::OK,
        false => StatusCode::BAD_REQUEST,
    }
}

struct Grpc(Arc<Received>);

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let (metadata, _, export) = request.into_parts();
        match self.0.take(metadata.into_headers(), export) {
            true => Ok(tonic::Response::new(ExportTraceServiceResponse::default())),
            false => Err(tonic::Status::invalid_argument("refused, as the test wants it")),
        }
    }
}

impl Received {
    fn take(&self, headers: HeaderMap, export: ExportTraceServiceRequest) -> bool {
        self.headers.lock().unwrap().push(headers);
        let refuse = |left: usize| left.checked_sub(1);
        if self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuse).is_ok() {
            return false;
        }
        for resource_spans in export.resource_spans {
            let resource = attributes(&resource_spans.resource.unwrap_or_default().attributes);
            let spans = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| read(span, &resource)));
        }
        true
    }
}

fn read(span: proto::Span, resource: &HashMap<String, Value>) -> Span {
    let event = |event: &proto::span::Event| {
        (event.name.clone(), event.time_unix_nano, attributes(&event.attributes))
    };
    Span {
        service: resource["service.name"].as_str().unwrap().to_owned(),
        resource: resource.clone(),
        debug: format!("{span:?}"),
        events: span.events.iter().map(event).collect(),
        attributes: attributes(&span.attributes),
        name: span.name,
        kind: span.kind,
        trace_id: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
        status: span.status.map_or(0, |status| status.code),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A name that is there twice is a fault of whoever made the span.
fn attributes(list: &[KeyValue]) -> HashMap<String, Value> {
    let mut map = HashMap::new();
    for KeyValue { key, value, .. } in list {
        let earlier = map.insert(key.clone(), plain(value.as_ref().unwrap()));
        assert_eq!(earlier, None, "{key} is there twice: {list:?}");
    }
    map
}

fn plain(value: &AnyValue) -> Value {
    match value.value.as_ref().unwrap() {
        Any::StringValue(text) => json!(text),
        Any::BoolValue(is) => json!(is),
        Any::IntValue(number) => json!(number),
        Any::DoubleValue(number) => json!(number),
        Any::ArrayValue(array) => Value::Array(array.values.iter().map(plain).collect()),
        other => panic!("no attribute has such a value: {other:?}"),
    }
}
