//! `x-request-id`: the client's if it is sane, else one made here; on every answer and in every log line. And the trace
//! of a request that generates something.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue, Method};
use servelab_telemetry::traces::{KeyValue, SpanKind};
use servelab_telemetry::{RequestTrace, Traces};
use tracing::Instrument;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");
const MAX_BYTES: usize = 128;

/// The id of the HTTP request at hand; an extension of the request.
#[derive(Clone, Debug)]
pub struct HttpRequestId(pub std::sync::Arc<str>);

/// Whether a request makes a model generate.
pub fn generates(method: &Method, path: &str) -> bool {
    *method == Method::POST && matches!(path, "/v1/chat/completions" | "/v1/completions")
}

/// Gives the request its id and its trace, runs it in a log span that carries both ids, and puts the former on the
/// answer. The trace is an extension of the request.
pub async fn with_request_id(State(traces): State<Traces>, mut request: Request, next: Next) -> Response {
    let id = request.headers().get(HEADER).filter(|value| sane(value)).cloned().unwrap_or_else(made);
    let text: std::sync::Arc<str> = id.to_str().unwrap_or_default().into();
    request.extensions_mut().insert(HttpRequestId(text.clone()));
    let trace = begin_trace(&traces, &request, &text);
    request.extensions_mut().insert(trace.clone());
    let span = servelab_telemetry::request_span(&text, trace.id());
    let mut response = next.run(request).instrument(span).await;
    tell_status(&trace, response.status().as_u16());
    response.headers_mut().insert(HEADER, id);
    response
}

fn begin_trace(traces: &Traces, request: &Request, id: &str) -> RequestTrace {
    let (method, path) = (request.method(), request.uri().path());
    if !generates(method, path) {
        return RequestTrace::default();
    }
    let trace = traces.request(|| format!("{method} {path}"), SpanKind::Server, request.headers());
    if trace.is_recorded() {
        let operation = if path.contains("chat") { "chat" } else { "text_completion" };
        trace.set([
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("http.route", path.to_owned()),
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "servelab"),
            KeyValue::new("gen_ai.request.id", id.to_owned()),
        ]);
    }
    trace
}

/// Of a stream, the status that it began with.
fn tell_status(trace: &RequestTrace, status: u16) {
    trace.set([KeyValue::new("http.response.status_code", i64::from(status))]);
    match status {
        500.. => trace.fail("server_error"),
        // The fault is the client's: the span is none that failed.
        400.. => trace.set_error_type(status.to_string()),
        _ => {}
    }
}

/// Visible ASCII of a bounded length: nothing that could break a log line.
fn sane(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes();
    (1..=MAX_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

fn made() -> HeaderValue {
    let id = uuid::Uuid::new_v4().simple().to_string();
    HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("unknown"))
}
