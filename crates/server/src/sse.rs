//! A stream of chunks as server-sent events. Dropping the body drops the generation behind it, which
//! gives up what is not finished: that is how a client that goes away becomes an abort.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures::{Stream, StreamExt};
use http::{HeaderValue, header};
use serde::Serialize;
use servelab_wire::sse;

use crate::errors::ApiError;

/// A stream that has nothing to tell for that long, because its request waits, sends a comment.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Answers with the chunks and `[DONE]`. An error ends the stream with an event in OpenAI's shape, and
/// without `[DONE]`: the answer is not whole.
pub fn respond<T, S>(chunks: S) -> Response
where
    T: Serialize + Send + 'static,
    S: Stream<Item = Result<T, ApiError>> + Send + 'static,
{
    // The body is polled outside the request's span; what is logged then belongs to it all the same.
    let span = tracing::Span::current();
    // A panic in the making of a chunk is this request's end and nobody else's.
    let chunks = AssertUnwindSafe(chunks).catch_unwind();
    let frames = async_stream::stream! {
        tokio::pin!(chunks);
        loop {
            // A proxy between here and the client gives up on a stream that says nothing.
            let Ok(chunk) = tokio::time::timeout(KEEP_ALIVE, chunks.next()).await else {
                yield Bytes::from_static(sse::KEEP_ALIVE.as_bytes());
                continue;
            };
            let Some(chunk) = chunk else { break };
            match chunk.unwrap_or_else(|_| Err(ApiError::Internal("a stream panicked".into()))) {
                Ok(chunk) => match sse::frame(&chunk) {
                    Ok(frame) => yield Bytes::from(frame),
                    Err(error) => {
                        yield error_frame(&span, &ApiError::Internal(error.to_string()));
                        return;
                    }
                },
                Err(error) => {
                    yield error_frame(&span, &error);
                    return;
                }
            }
        }
        yield Bytes::from_static(sse::DONE.as_bytes());
    };
    let mut response = Response::new(Body::from_stream(frames.map(Ok::<Bytes, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx and those who follow it to pass each event on at once.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn error_frame(span: &tracing::Span, error: &ApiError) -> Bytes {
    span.in_scope(|| match error.log_detail() {
        Some(detail) => tracing::error!(detail, "a stream failed"),
        None => tracing::warn!(%error, "a stream was cut"),
    });
    sse::frame(&error.envelope()).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The clock is the test's: it jumps to the next timer whenever everybody waits.
    #[tokio::test(start_paused = true)]
    async fn a_stream_that_waits_says_that_it_is_alive() {
        let chunks = async_stream::stream! {
            tokio::time::sleep(2 * KEEP_ALIVE + Duration::from_secs(1)).await;
            yield Ok(1);
        };
        let body = respond(chunks).into_body();
        let text = axum::body::to_bytes(body, 1024).await.unwrap();
        let expected = [sse::KEEP_ALIVE, sse::KEEP_ALIVE, "data: 1\n\n", sse::DONE].concat();
        assert_eq!(String::from_utf8_lossy(&text), expected);
        assert_eq!(sse::SseReader::default().push(&text), ["1", "[DONE]"]);
    }
}
