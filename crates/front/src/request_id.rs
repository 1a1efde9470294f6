//! `x-request-id`: the client's if it is sane, else one made here; on every answer and in every log line.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue};
use tracing::Instrument;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");
const MAX_BYTES: usize = 128;

/// The id of the HTTP request at hand; an extension of the request.
#[derive(Clone, Debug)]
pub struct HttpRequestId(pub std::sync::Arc<str>);

/// Gives the request its id, runs it in a span that carries it, and puts it on the answer.
pub async fn with_request_id(mut request: Request, next: Next) -> Response {
    let id = request.headers().get(HEADER).filter(|value| sane(value)).cloned().unwrap_or_else(made);
    let text: std::sync::Arc<str> = id.to_str().unwrap_or_default().into();
    request.extensions_mut().insert(HttpRequestId(text.clone()));
    let mut response = next.run(request).instrument(servelab_telemetry::request_span(&text)).await;
    response.headers_mut().insert(HEADER, id);
    response
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
