//! One request and its answer.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use servelab_telemetry::RequestTrace;
use servelab_wire::sse::SseReader;

use super::connection::Connection;
use super::deadline::Deadline;
use super::events::{DONE, Event};
use super::{Client, Failure, spans};
use crate::live::Live;
use crate::result::{Endpoint, FailureClass, UsageCounts};

/// Longest event; a token has some hundred bytes.
const MAX_EVENT_BYTES: usize = 1 << 20;
/// Longest answer that is not streamed, and longest text of an error.
const MAX_BODY_BYTES: usize = 16 << 20;
const MAX_MESSAGE_CHARS: usize = 300;
/// A stream may carry more deltas than tokens (a character in pieces), but not any number of them.
const DELTAS_PER_TOKEN: u32 = 4;
const MORE_DELTAS: u32 = 1024;
/// How long the last bytes of a body may take after its last event, so that the connection can be used again.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// A request, ready to be sent.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub endpoint: Endpoint,
    pub body: Bytes,
    /// Most tokens that were asked for.
    pub output_tokens: u32,
    /// Whether the answer's text is wanted: the next turn of the conversation repeats it.
    pub keep_text: bool,
}

/// What was seen of a request and its answer. Points in time are on the client's clock.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// When the request should have been sent; what is shown live counts from there.
    pub scheduled: Duration,
    /// When the client began to send, before it opened a connection.
    pub sent: Option<Duration>,
    /// How long that took, if it had to.
    pub connect: Option<Duration>,
    pub first_byte: Option<Duration>,
    pub first_token: Option<Duration>,
    pub last_token: Option<Duration>,
    last_delta: Option<Duration>,
    pub gaps_micros: Vec<u32>,
    pub deltas: u32,
    pub usage: Option<UsageCounts>,
    pub finish_reason: Option<String>,
    pub text: String,
    /// When the last event came.
    pub end: Option<Duration>,
    /// If the request was recorded.
    pub trace_id: Option<String>,
}

/// The answer to a request that is not streamed.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub body: Bytes,
}

impl Reply {
    /// What an error says, in one line.
    pub fn message(&self) -> String {
        error_message(&String::from_utf8_lossy(&self.body))
    }
}

impl Client {
    /// Sends a streaming request and reads the answer to its end. `observed` holds what was seen, also if the
    /// future is dropped.
    ///
    /// # Errors
    /// The one way in which it failed.
    pub async fn stream(
        &self,
        outgoing: &Outgoing,
        observed: &mut Observed,
        live: &Live,
    ) -> Result<(), Failure> {
        observed.sent = Some(self.clock.now());
        let trace = spans::begin(&self.traces, self.target(), outgoing.endpoint);
        observed.trace_id = trace.recorded_id().map(str::to_owned);
        let outcome = self.send(outgoing, observed, live, &trace).await;
        spans::tell(&trace, observed, &outcome);
        outcome
    }

    async fn send(
        &self,
        outgoing: &Outgoing,
        observed: &mut Observed,
        live: &Live,
        trace: &RequestTrace,
    ) -> Result<(), Failure> {
        let mut deadline = Deadline::new(self.timeouts);
        if let Some(mut connection) = self.idle_connection().await {
            let bytes_before = connection.traffic().bytes();
            let outcome =
                self.exchange(&mut connection, outgoing, observed, &mut deadline, live, trace).await;
            let unheard = connection.traffic().bytes() == bytes_before;
            match outcome {
                // The server hung up on the idle connection just as it was taken: no failure of this request.
                Err(failure) if failure.class == FailureClass::Dropped && unheard => {}
                outcome => return self.finish(connection, outcome).await,
            }
        }
        let started = self.clock.now();
        let mut connection = self.connect().await?;
        observed.connect = Some(self.clock.now() - started);
        let outcome = self.exchange(&mut connection, outgoing, observed, &mut deadline, live, trace).await;
        self.finish(connection, outcome).await
    }

    async fn finish(&self, connection: Connection, outcome: Result<(), Failure>) -> Result<(), Failure> {
        if outcome.is_ok() {
            self.keep(connection).await;
        }
        outcome
    }

    async fn exchange(
        &self,
        connection: &mut Connection,
        outgoing: &Outgoing,
        observed: &mut Observed,
        deadline: &mut Deadline,
        live: &Live,
        trace: &RequestTrace,
    ) -> Result<(), Failure> {
        let path = outgoing.endpoint.path();
        let mut request = self.request(Method::POST, path, "text/event-stream", outgoing.body.clone());
        trace.inject(request.headers_mut());
        let answer = connection.send(request);
        let mut response = head(connection, answer, deadline).await?;
        observed.first_byte = Some(connection.traffic().arrival());
        deadline.heard();
        if !response.status().is_success() {
            return Err(refused(connection, response, deadline).await);
        }
        check_content_type(response.headers())?;
        let mut reading = Reading::new(observed, outgoing);
        let whole = poll_fn(|cx| reading.poll(cx, connection, response.body_mut(), deadline, live)).await;
        whole.and_then(|()| observed.check())?;
        drain(connection, response.body_mut()).await;
        Ok(())
    }

    /// Sends a question that is not streamed and returns its answer, whatever its status.
    ///
    /// # Errors
    /// If there was no whole answer within the time-outs of questions.
    pub async fn call(&self, method: Method, path: &str, body: Bytes) -> Result<Reply, Failure> {
        let mut deadline = Deadline::new(self.timeouts.of_questions());
        let mut connection = match self.idle_connection().await {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let request = self.request(method, path, "*/*", body);
        let answer = connection.send(request);
        let response = head(&mut connection, answer, &mut deadline).await?;
        deadline.heard();
        let status = response.status();
        let body = collect(&mut connection, response, &mut deadline).await?;
        self.keep(connection).await;
        Ok(Reply { status, body })
    }
}

/// With the reasons behind it, which hyper's errors do not show by themselves.
fn dropped(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    let error = error.into();
    let mut message = format!("the connection broke off: {error}");
    let mut source = error.source();
    while let Some(inner) = source {
        message += &format!(": {inner}");
        source = inner.source();
    }
    Failure::new(FailureClass::Dropped, message)
}

/// Drives the connection until the answer's head is there.
async fn head(
    connection: &mut Connection,
    answer: impl Future<Output = hyper::Result<Response<Incoming>>>,
    deadline: &mut Deadline,
) -> Result<Response<Incoming>, Failure> {
    let mut answer = pin!(answer);
    poll_fn(|cx| {
        connection.drive(cx);
        if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
            return Poll::Ready(answer.map_err(dropped));
        }
        deadline.poll(cx).map_or(Poll::Pending, |failure| Poll::Ready(Err(failure)))
    })
    .await
}

async fn collect(
    connection: &mut Connection,
    response: Response<Incoming>,
    deadline: &mut Deadline,
) -> Result<Bytes, Failure> {
    let mut body = pin!(http_body_util::Limited::new(response.into_body(), MAX_BODY_BYTES).collect());
    poll_fn(|cx| {
        connection.drive(cx);
        if let Poll::Ready(body) = body.as_mut().poll(cx) {
            return Poll::Ready(body.map(|body| body.to_bytes()).map_err(dropped));
        }
        deadline.poll(cx).map_or(Poll::Pending, |failure| Poll::Ready(Err(failure)))
    })
    .await
}

async fn refused(
    connection: &mut Connection,
    response: Response<Incoming>,
    deadline: &mut Deadline,
) -> Failure {
    let status = response.status();
    let body = collect(connection, response, deadline).await.unwrap_or_default();
    let message = error_message(&String::from_utf8_lossy(&body));
    let message = if message.is_empty() { status.to_string() } else { message };
    Failure { class: FailureClass::Status, status: Some(status.as_u16()), message }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Failure> {
    let value = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    match value {
        Some(value) if value.trim_start().to_ascii_lowercase().starts_with("text/event-stream") => Ok(()),
        value => Err(Failure::new(
            FailureClass::ContentType,
            format!("the answer is {} and not text/event-stream", value.as_deref().unwrap_or("of no type")),
        )),
    }
}

/// Takes the end of the body, so that the connection is free for the next request.
async fn drain(connection: &mut Connection, body: &mut Incoming) {
    let rest = poll_fn(|cx| {
        loop {
            connection.drive(cx);
            match std::pin::Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    // A body without an end makes a connection that is not usable, which is found when it is.
    let _ = tokio::time::timeout(LAST_BYTES, rest).await;
}

/// The message of an error in OpenAI's shape, or the text itself, in one line and shortened.
fn error_message(text: &str) -> String {
    let json: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let message = json.as_ref().and_then(|json| {
        [&json["error"]["message"], &json["message"], &json["error"], &json["detail"]]
            .into_iter()
            .find_map(|m| m.as_str())
    });
    let line = message.unwrap_or(text).split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_MESSAGE_CHARS).collect()
}

/// A stream while it is read.
struct Reading<'a> {
    observed: &'a mut Observed,
    events: SseReader,
    keep_text: bool,
    most_deltas: u32,
    is_done: bool,
}

impl<'a> Reading<'a> {
    fn new(observed: &'a mut Observed, outgoing: &Outgoing) -> Self {
        Self {
            observed,
            events: SseReader::bounded(MAX_EVENT_BYTES),
            keep_text: outgoing.keep_text,
            most_deltas: outgoing.output_tokens.saturating_mul(DELTAS_PER_TOKEN).saturating_add(MORE_DELTAS),
            is_done: false,
        }
    }

    /// Ready at `[DONE]`, at the end of the body, or at a failure.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &mut Connection,
        body: &mut Incoming,
        deadline: &mut Deadline,
        live: &Live,
    ) -> Poll<Result<(), Failure>> {
        loop {
            connection.drive(cx);
            let frame = match std::pin::Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(dropped(error))),
                Poll::Ready(Some(Ok(frame))) => frame,
            };
            deadline.heard();
            let Ok(bytes) = frame.into_data() else { continue };
            if let Err(failure) = self.take(&bytes, connection.traffic().arrival(), live) {
                return Poll::Ready(Err(failure));
            }
            if self.is_done {
                return Poll::Ready(Ok(()));
            }
        }
        deadline.poll(cx).map_or(Poll::Pending, |failure| Poll::Ready(Err(failure)))
    }

    fn take(&mut self, bytes: &[u8], at: Duration, live: &Live) -> Result<(), Failure> {
        let Self { observed, events, keep_text, most_deltas, is_done } = self;
        let mut outcome = Ok(());
        let read = events.read(bytes, |data| {
            if outcome.is_ok() && !*is_done {
                *is_done = data == DONE;
                observed.end = Some(at);
                if !*is_done {
                    outcome = observed.event(data, at, *keep_text, *most_deltas, live);
                }
            }
        });
        read.map_err(|error| Failure::new(FailureClass::BrokenSse, error.to_string()))?;
        outcome
    }
}

impl Observed {
    /// Nothing yet of a request that should be sent at `scheduled`.
    pub fn scheduled(scheduled: Duration) -> Self {
        Self { scheduled, ..Self::default() }
    }

    fn event(
        &mut self,
        data: &str,
        at: Duration,
        keep_text: bool,
        most_deltas: u32,
        live: &Live,
    ) -> Result<(), Failure> {
        let event = Event::parse(data).map_err(|error| {
            let shown: String = data.chars().take(80).collect();
            Failure::new(FailureClass::BrokenSse, format!("an event is no JSON of a chunk: {error}: {shown}"))
        })?;
        if event.is_error {
            return Err(Failure::new(FailureClass::ErrorEvent, error_message(data)));
        }
        if let Some(delta) = &event.delta {
            if self.deltas >= most_deltas {
                let message = format!("more than {most_deltas} deltas, for far fewer tokens");
                return Err(Failure::new(FailureClass::BrokenSse, message));
            }
            self.delta(at, live);
            if keep_text {
                self.text.push_str(delta);
            }
        }
        if let Some(reason) = event.finish_reason {
            self.finish_reason = Some(reason.chars().take(40).collect());
            self.last_token = Some(at);
        }
        self.usage = event.usage.or(self.usage);
        Ok(())
    }

    fn delta(&mut self, at: Duration, live: &Live) {
        self.deltas += 1;
        self.last_token = Some(at);
        match self.last_delta.replace(at) {
            None => {
                self.first_token = Some(at);
                live.first_token(at.saturating_sub(self.scheduled));
            }
            Some(last) => {
                let gap = at.saturating_sub(last);
                let micros = (gap + Duration::from_nanos(500)).as_micros();
                self.gaps_micros.push(u32::try_from(micros).unwrap_or(u32::MAX));
                live.gap(gap);
            }
        }
    }

    /// Whether the stream was whole.
    fn check(&self) -> Result<(), Failure> {
        let failure = |class, message: &str| Err(Failure::new(class, message));
        match self {
            Self { finish_reason: None, .. } => {
                failure(FailureClass::Dropped, "the stream ended without a reason to finish")
            }
            Self { usage: None, .. } => failure(
                FailureClass::NoUsage,
                "the stream carried no usage, though stream_options.include_usage was asked for",
            ),
            Self { first_token: None, .. } => failure(FailureClass::NoToken, "the stream carried no token"),
            _ => Ok(()),
        }
    }
}
