//! One attempt at one replica, up to the first byte of its answer. Until then another replica may be tried, after it
//! never.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header, request, response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use servelab_front::request_id::HttpRequestId;
use servelab_telemetry::RequestTrace;
use servelab_telemetry::traces::OpenSpan;
use tokio::time::Instant;

use super::headers::remove_hop_by_hop;
use super::spans;
use super::stream::Causes;
use crate::app::App;
use crate::choice::fleet::Hashing;
use crate::choice::load::Dispatch;
use crate::choice::picker::Decision;
use crate::errors::RouterError;
use crate::metrics::Fault;
use crate::prompt::Asked;
use crate::replicas::registry::{Chosen, Replica, Ticket};

/// An answer that says how long it is, and is no longer, is read whole before any of it passes, so that a replica
/// that dies while it writes can still be replaced.
const WHOLE_BYTES: u64 = 1 << 20;
/// The longest that an estimate is waited for.
const FAR: Duration = Duration::from_secs(86_400);
/// Of an answer that another attempt replaces, and how long it is waited for.
const ERROR_BYTES: usize = 64 << 10;
const ERROR_TIME: Duration = Duration::from_secs(2);

/// What is sent, to whichever replica.
pub struct Outgoing {
    pub parts: request::Parts,
    pub body: Bytes,
    pub asked: Asked,
    /// When the whole answer must be there.
    pub end: Instant,
    pub trace: RequestTrace,
}

/// Which attempt of a request it is.
#[derive(Clone, Copy)]
pub struct Attempt {
    /// 1 for the first.
    pub number: u32,
    /// Beside another one that is slow.
    pub is_hedge: bool,
}

/// Who was chosen, and why.
pub struct Choice {
    pub replica: Arc<Replica>,
    pub decision: Decision,
    pub hashing: Hashing,
}

/// An answer that has begun.
pub struct Begun {
    pub chosen: Choice,
    pub dispatch: Dispatch,
    pub ticket: Ticket,
    pub parts: response::Parts,
    pub body: Beginning,
    /// Of the attempt, which ends with the answer.
    pub span: OpenSpan,
}

pub enum Beginning {
    Whole(Bytes),
    Streams { is_events: bool, first: Option<Frame<Bytes>>, rest: Incoming },
}

/// Nothing came, or an answer that says that it should be tried elsewhere.
pub struct Failed {
    pub fault: Fault,
    pub error: RouterError,
    /// What the replica said, for the case that no other says better.
    pub answer: Option<Box<(response::Parts, Bytes)>>,
}

impl Failed {
    fn new(fault: Fault, error: RouterError) -> Self {
        Self { fault, error, answer: None }
    }
}

/// Sends the request to the replica chosen and waits for the first byte.
///
/// # Errors
/// If another replica may do better.
pub async fn attempt(
    app: &App,
    outgoing: &Outgoing,
    chosen: Chosen,
    which: Attempt,
) -> Result<Begun, Failed> {
    let Chosen { replica, decision, hashing, mut dispatch, mut ticket } = chosen;
    let chosen = Choice { replica, decision, hashing };
    let mut span = spans::of_attempt(&outgoing.trace, &chosen.replica.address, which);
    let began = Instant::now();
    let outcome = {
        let exchange = exchange(app, outgoing, &chosen, &span);
        tokio::pin!(exchange);
        if outgoing.asked.streams {
            exchange.await
        } else {
            // An answer that comes whole does not show when its prompt was computed; then the estimate has to do.
            match tokio::time::timeout(prefill_time(&chosen), &mut exchange).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    dispatch.first_token();
                    exchange.await
                }
            }
        }
    };
    match outcome {
        Ok((parts, body)) => {
            let time = began.elapsed();
            app.registry.answered(&chosen.replica, time.as_secs_f64());
            app.metrics.time_to_first_byte_seconds.observe(time.as_secs_f64());
            app.first_bytes.observe(time);
            spans::tell_first_byte(&mut span, parts.status);
            Ok(Begun { chosen, dispatch, ticket, parts, body, span })
        }
        Err(failed) => {
            tell(app, &chosen, &mut ticket, &failed);
            spans::tell_failed(&mut span, &failed);
            Err(failed)
        }
    }
}

/// How long the replica is expected to be busy before the first token.
fn prefill_time(chosen: &Choice) -> Duration {
    let seconds = chosen.decision.terms().map_or(0.0, |terms| terms.prefill_seconds + terms.queue_seconds);
    Duration::try_from_secs_f64(seconds).unwrap_or(FAR).min(FAR)
}

/// What the attempt says about the replica.
fn tell(app: &App, chosen: &Choice, ticket: &mut Ticket, failed: &Failed) {
    app.metrics.fault(failed.fault);
    let status = failed.answer.as_ref().map(|answer| answer.0.status);
    tracing::debug!(replica = %chosen.replica.address, error = %failed.error, "an attempt failed");
    match status {
        // Full, and well.
        Some(StatusCode::TOO_MANY_REQUESTS) => ticket.succeeded(),
        _ => ticket.failed(),
    }
    // Not there, or leaving: the next health check that it passes brings it back.
    if failed.fault == Fault::Unreachable || status == Some(StatusCode::SERVICE_UNAVAILABLE) {
        app.registry.set_ready(&chosen.replica, false);
    }
}

type Answer = (response::Parts, Beginning);

async fn exchange(
    app: &App,
    outgoing: &Outgoing,
    chosen: &Choice,
    span: &OpenSpan,
) -> Result<Answer, Failed> {
    let timeouts = app.timeouts;
    let first_byte = Instant::now() + timeouts.first_byte;
    let deadline = if outgoing.asked.streams { first_byte.min(outgoing.end) } else { outgoing.end };
    let late = |_| {
        let error = if Instant::now() >= outgoing.end {
            RouterError::Total(timeouts.total)
        } else {
            RouterError::FirstByte(timeouts.first_byte)
        };
        Failed::new(Fault::FirstByte, error)
    };
    let answer = tokio::time::timeout_at(deadline, send(app, outgoing, chosen, span));
    tokio::select! {
        answer = answer => answer.map_err(late)?,
        () = chosen.replica.until_lost() => Err(Failed::new(Fault::FirstByte, RouterError::Lost)),
    }
}

async fn send(app: &App, outgoing: &Outgoing, chosen: &Choice, span: &OpenSpan) -> Result<Answer, Failed> {
    let mut request = request(app, outgoing, chosen)?;
    span.inject(request.headers_mut());
    let answer = app.client.request(request).await.map_err(|error| {
        tracing::info!(replica = %chosen.replica.address, error = %Causes(&error), "a replica did not answer");
        if error.is_connect() {
            Failed::new(Fault::Unreachable, RouterError::Unreachable)
        } else {
            Failed::new(Fault::BrokenOff, RouterError::BrokenOff)
        }
    })?;
    let broken = |error: &dyn std::error::Error| {
        tracing::info!(replica = %chosen.replica.address, error = %Causes(error), "a replica broke off");
        Failed::new(Fault::BrokenOff, RouterError::BrokenOff)
    };
    let (mut parts, mut body) = answer.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    if elsewhere(parts.status) {
        return Err(refused(parts, body).await);
    }
    // No request asks for another protocol.
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Failed::new(Fault::BrokenOff, RouterError::BrokenOff));
    }
    let is_events = is_events(&parts);
    let length = http_body::Body::size_hint(&body).exact();
    if !is_events && length.is_some_and(|length| length <= WHOLE_BYTES) {
        let whole = body.collect().await.map_err(|error| broken(&error))?;
        return Ok((parts, Beginning::Whole(whole.to_bytes())));
    }
    let first = body.frame().await.transpose().map_err(|error| broken(&error))?;
    Ok((parts, Beginning::Streams { is_events, first, rest: body }))
}

/// Keeps what the replica says, if it comes to its end.
async fn refused(parts: response::Parts, body: Incoming) -> Failed {
    let whole = tokio::time::timeout(ERROR_TIME, Limited::new(body, ERROR_BYTES).collect());
    match whole.await {
        Ok(Ok(whole)) => {
            let answer = Some(Box::new((parts, whole.to_bytes())));
            Failed { fault: Fault::Status, error: RouterError::Unreachable, answer }
        }
        _ => Failed::new(Fault::Status, RouterError::BrokenOff),
    }
}

/// Answers that say: not here, or not now.
fn elsewhere(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

fn is_events(parts: &response::Parts) -> bool {
    let given = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    given.trim_start().to_ascii_lowercase().starts_with("text/event-stream")
}

/// The client's request as the replica gets it.
fn request(app: &App, outgoing: &Outgoing, chosen: &Choice) -> Result<Request<Full<Bytes>>, Failed> {
    let parts = &outgoing.parts;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let unusable = || Failed::new(Fault::Unreachable, RouterError::Internal("no URL for the replica".into()));
    let uri = chosen.replica.address.uri(path).ok_or_else(unusable)?;
    let mut request = Request::new(Full::new(outgoing.body.clone()));
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    *headers = parts.headers.clone();
    remove_hop_by_hop(headers);
    // The client library sets both as they are for this connection and this body.
    headers.remove(header::HOST);
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::EXPECT);
    if let Some(key) = &app.replica_key {
        headers.insert(header::AUTHORIZATION, key.clone());
    }
    if let Ok(id) = HeaderValue::from_str(&request_id(parts)) {
        headers.insert("x-request-id", id);
    }
    Ok(request)
}

/// The id that the request has or was given.
pub fn request_id(parts: &request::Parts) -> Arc<str> {
    parts.extensions.get::<HttpRequestId>().map_or_else(|| "unknown".into(), |id| id.0.clone())
}
