//! The way of a request through the router: read it, let it in, choose a replica, send it, try another one if nothing
//! has come back yet, pass the answer on.

pub mod attempt;
pub mod budget;
pub mod flight;
pub mod headers;
pub mod hedge;
pub mod hold;
mod spans;
pub mod stream;
mod turn;
pub mod unread;
pub mod whole_events;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, request, response};
use rand::Rng;
use serde_json::Value;
use servelab_front::request_id;
use servelab_telemetry::RequestTrace;

use self::attempt::{Attempt, Beginning, Begun, Choice, Failed, Outgoing, attempt};
use self::flight::{Admission, Expected, Flight, Sent, Visit};
use self::stream::AnswerBody;
use crate::app::App;
use crate::choice::fleet::{Hashing, TokeniserId};
use crate::choice::replica_set::ReplicaSet;
use crate::decisions::{Explained, Noted, Purpose};
use crate::errors::RouterError;
use crate::limits::queue::Full;
use crate::limits::{Levels, Reservation};
use crate::metrics::{Fault, Outcome};
use crate::prompt::{self, Asked};
use crate::replicas::registry::Chosen;
use crate::usage;

/// A request with this header gets the same one back, with the replica and what decided.
pub const DECISION_HEADER: &str = "x-servelab-decision";

/// The pause before the first retry; the second one waits twice as long, and each up to that much more by lot.
const BACKOFF: Duration = Duration::from_millis(20);
/// Larger bodies are read off the async threads.
const READ_INLINE_BYTES: usize = 256 * 1024;

/// A request that has passed the door.
pub struct Incoming {
    pub parts: request::Parts,
    pub body: Bytes,
    /// Whose limits count.
    pub key: usize,
}

/// What a client gets, its body still on the way or not.
pub struct Answer {
    pub parts: response::Parts,
    pub body: AnswerOf,
}

pub enum AnswerOf {
    Whole(Bytes),
    Stream(Box<AnswerBody>),
}

impl Answer {
    pub fn into_response(self) -> Response {
        let body = match self.body {
            AnswerOf::Whole(bytes) => Body::from(bytes),
            AnswerOf::Stream(body) => Body::new(*body),
        };
        Response::from_parts(self.parts, body)
    }
}

/// Whether a request makes a replica generate.
pub fn generates(parts: &request::Parts) -> bool {
    request_id::generates(&parts.method, parts.uri.path())
}

/// Reads what the choice needs of a request, and tokenises it if replicas have parity; nothing of one that generates
/// nothing.
pub async fn asked(app: &App, incoming: &Incoming) -> Asked {
    let Incoming { parts, body, .. } = incoming;
    if !generates(parts) {
        return Asked::default();
    }
    let read = |body: &[u8], headers: &HeaderMap| {
        let value: Value = serde_json::from_slice(body).unwrap_or_default();
        (prompt::read(&value, headers), value)
    };
    let (mut asked, value) = if body.len() <= READ_INLINE_BYTES {
        read(body, &parts.headers)
    } else {
        let (body, headers) = (body.clone(), parts.headers.clone());
        tokio::task::spawn_blocking(move || read(&body, &headers)).await.unwrap_or_default()
    };
    asked.set_exact(app.desk.exact(value, body.len(), app.registry.tokenisers()).await);
    asked
}

/// The answer of some replica, or why there is none.
///
/// # Errors
/// If a limit is reached, no replica is there in time, or none gives an answer.
pub async fn forward(app: &Arc<App>, incoming: Incoming, asked: Asked) -> Result<Answer, RouterError> {
    let trace = incoming.parts.extensions.get::<RequestTrace>().cloned().unwrap_or_default();
    spans::tell_request(&trace, &asked);
    let mut visit = Visit::new(app, trace);
    match forward_counted(app, incoming, asked, visit.trace().clone()).await {
        Ok((begun, admission, estimate, noted)) => {
            Ok(answer(app, begun, visit, admission, estimate, noted).await)
        }
        Err(error) => {
            let refused = error.status().is_client_error();
            visit.set(if refused { Outcome::Refused } else { Outcome::Failed });
            spans::tell_error(visit.trace(), &error);
            Err(error)
        }
    }
}

/// The router's estimates of a request, and when its answer must be there.
struct Estimate {
    prompt_tokens: u32,
    exact: Vec<(TokeniserId, u32)>,
    end: tokio::time::Instant,
}

impl Estimate {
    /// What is expected of the replica that was chosen.
    fn of(&self, chosen: &Choice) -> Expected {
        let exact = self.exact.iter().find(|(tokeniser, _)| chosen.hashing == Hashing::Tokens(*tokeniser));
        Expected {
            prompt_tokens: self.prompt_tokens,
            hit_tokens: chosen.decision.terms().map_or(0, |terms| terms.matched_tokens),
            exact_tokens: exact.map(|(_, tokens)| *tokens),
        }
    }
}

type Passed = (Result<Begun, Box<(response::Parts, Bytes)>>, Admission, Estimate, Option<Arc<Noted>>);

async fn forward_counted(
    app: &Arc<App>,
    incoming: Incoming,
    asked: Asked,
    trace: RequestTrace,
) -> Result<Passed, RouterError> {
    let Incoming { parts, body, key } = incoming;
    let admission = spans::timed(&trace, "wait", admit(app, &parts, key, &asked)).await?;
    let end = tokio::time::Instant::now() + app.timeouts.total;
    let exact = asked.prompt.exact.iter().map(|exact| (exact.tokeniser, exact.tokens)).collect();
    let estimate = Estimate { prompt_tokens: asked.prompt.tokens, exact, end };
    let explains = parts.headers.contains_key(DECISION_HEADER);
    let outgoing = Outgoing { parts, body, asked, end, trace };
    app.budget.earn();
    match try_replicas(app, &outgoing).await {
        Ok((begun, noted)) => Ok((Ok(begun), admission, estimate, explains.then_some(noted))),
        Err(Failed { answer: Some(answer), .. }) => Ok((Err(answer), admission, estimate, None)),
        Err(Failed { error, .. }) => {
            if let Some(reservation) = admission.reservation {
                reservation.settle(app.registry.now(), 0);
            }
            Err(error)
        }
    }
}

/// The limits of the key, then a place among the requests that the replicas have.
async fn admit(
    app: &Arc<App>,
    parts: &request::Parts,
    key: usize,
    asked: &Asked,
) -> Result<Admission, RouterError> {
    if !generates(parts) {
        return Ok(Admission::default());
    }
    let tokens = u64::from(asked.prompt.tokens) + u64::from(asked.max_output_tokens);
    let reservation = app.limits.reserve(key, app.registry.now(), tokens).await.map_err(|denied| {
        app.metrics.limited(denied.name());
        RouterError::from(denied)
    })?;
    app.set_slots();
    let waiting = app.metrics.waiting();
    let entered = app.gate.enter(key, tokens).await;
    drop(waiting);
    match entered {
        Ok(inside) => Ok(Admission { reservation: Some(reservation), inside: Some(inside) }),
        Err(Full) => {
            reservation.settle(app.registry.now(), 0);
            Err(RouterError::QueueFull { limit: app.max_waiting, retry_after: Duration::from_secs(1) })
        }
    }
}

/// Tries one replica after the other until one begins to answer.
async fn try_replicas(app: &Arc<App>, outgoing: &Outgoing) -> Result<(Begun, Arc<Noted>), Failed> {
    let mut tried = ReplicaSet::EMPTY;
    let mut last: Option<Failed> = None;
    let (mut number, mut tries_again) = (0, false);
    loop {
        let chosen = match choose(app, outgoing, &tried) {
            Some(chosen) => chosen,
            None => {
                if let Some(failed) = last {
                    // One that broke off may be gone without anybody knowing yet, or back already: once more shows it.
                    let broke_off =
                        failed.fault == Fault::BrokenOff && !std::mem::replace(&mut tries_again, true);
                    // All that are ready were tried; if none is ready, they may have been lost since.
                    if app.registry.ready() > 0 && !broke_off {
                        return Err(failed);
                    }
                }
                tried = ReplicaSet::EMPTY;
                let chosen = spans::timed(&outgoing.trace, "hold", hold(app, outgoing)).await?;
                spans::tell_choice(&outgoing.trace, outgoing.trace.elapsed(), app.policy, Some(&chosen));
                chosen
            }
        };
        number += 1;
        let noted = note(app, outgoing, &chosen, number);
        tried.insert(chosen.replica.id);
        match attempt_or_hedge(app, outgoing, chosen, number, &mut tried).await {
            Ok(begun) => return Ok((begun, noted)),
            Err(failed) => {
                if !may_retry(app, &failed, number) {
                    return Err(failed);
                }
                last = Some(failed);
                backoff(number).await;
            }
        }
    }
}

fn choose(app: &Arc<App>, outgoing: &Outgoing, tried: &ReplicaSet) -> Option<Chosen> {
    let began = Instant::now();
    let since = outgoing.trace.elapsed();
    let chosen = app.registry.choose(&outgoing.asked.prompt, tried);
    app.metrics.decision_seconds.observe(began.elapsed().as_secs_f64());
    spans::tell_choice(&outgoing.trace, since, app.policy, chosen.as_ref());
    chosen
}

async fn hold(app: &Arc<App>, outgoing: &Outgoing) -> Result<Chosen, Failed> {
    let choose = || app.registry.choose(&outgoing.asked.prompt, &ReplicaSet::EMPTY);
    let held = app.hold.until_chosen(&app.registry, choose);
    let refused = |error| Failed { fault: Fault::Unreachable, error, answer: None };
    tokio::select! {
        held = held => held.map_err(refused),
        () = app.cut.cancelled() => Err(refused(RouterError::Drained)),
    }
}

/// A replica that was not there has done no work, so that trying another costs nobody anything.
fn may_retry(app: &App, failed: &Failed, number: u32) -> bool {
    if matches!(failed.error, RouterError::Total(_) | RouterError::Internal(_)) || number > app.max_retries {
        return false;
    }
    if !matches!(failed.error, RouterError::Unreachable) && !app.budget.spend() {
        app.metrics.retries_over_budget.inc();
        return false;
    }
    app.metrics.retries.inc();
    true
}

async fn backoff(number: u32) {
    let pause = BACKOFF * 2_u32.pow((number - 1).min(6));
    let jitter = rand::rng().random_range(0.5..1.5);
    tokio::time::sleep(pause.mul_f64(jitter)).await;
}

/// Keeps the decision for whoever asks.
fn note(app: &App, outgoing: &Outgoing, chosen: &Chosen, number: u32) -> Arc<Noted> {
    let policy = app.policy;
    app.metrics.chose(policy, chosen.decision.reason);
    let purpose = Purpose {
        request_id: attempt::request_id(&outgoing.parts),
        attempt: number,
        prompt_tokens: outgoing.asked.prompt.tokens,
    };
    let noted = Arc::new(Noted::new(
        &chosen.decision,
        policy.name(),
        chosen.hashing.name(),
        purpose,
        app.registry.now(),
        |replicas| app.registry.names(replicas),
    ));
    app.decisions.add(noted.clone());
    noted
}

/// One attempt, and beside it a second one if the first is slower than nearly all others were. The loser is dropped,
/// which cancels it.
async fn attempt_or_hedge(
    app: &Arc<App>,
    outgoing: &Outgoing,
    chosen: Chosen,
    number: u32,
    tried: &mut ReplicaSet,
) -> Result<Begun, Failed> {
    let first = attempt(app, outgoing, chosen, Attempt { number, is_hedge: false });
    let Some(delay) = app.hedge_quantile.and_then(|quantile| app.first_bytes.quantile(quantile)) else {
        return first.await;
    };
    tokio::pin!(first);
    tokio::select! {
        begun = &mut first => return begun,
        () = tokio::time::sleep(delay) => {}
    }
    let Some(second) = app.budget.spend().then(|| choose(app, outgoing, tried)).flatten() else {
        return first.await;
    };
    app.metrics.hedges.inc();
    tried.insert(second.replica.id);
    let second = attempt(app, outgoing, second, Attempt { number, is_hedge: true });
    tokio::pin!(second);
    tokio::select! {
        begun = &mut first => match begun {
            Ok(begun) => Ok(begun),
            Err(_) => second.await,
        },
        begun = &mut second => match begun {
            Ok(begun) => {
                app.metrics.hedges_won.inc();
                Ok(begun)
            }
            Err(_) => first.await,
        },
    }
}

/// The replica's answer as the client gets it: status, headers and body unchanged.
async fn answer(
    app: &Arc<App>,
    begun: Result<Begun, Box<(response::Parts, Bytes)>>,
    mut visit: Visit,
    admission: Admission,
    estimate: Estimate,
    noted: Option<Arc<Noted>>,
) -> Answer {
    let mut begun = match begun {
        Ok(begun) => begun,
        // No replica said anything better.
        Err(last) => {
            let (parts, body) = *last;
            visit.set(Outcome::Answered);
            if let Some(reservation) = admission.reservation {
                reservation.settle(app.registry.now(), 0);
            }
            return Answer { parts, body: AnswerOf::Whole(body) };
        }
    };
    add_headers(
        noted.as_deref(),
        admission.reservation.as_ref().map(Reservation::levels),
        &mut begun.parts.headers,
    );
    let Begun { chosen, dispatch, ticket, parts, body, span } = begun;
    let is_success = parts.status.is_success();
    let expected = estimate.of(&chosen);
    let sent = Sent { dispatch, ticket, span };
    let mut flight = Flight::new(visit, admission, sent, is_success, expected);
    let body = match body {
        Beginning::Whole(bytes) => {
            flight.answered(usage::of_answer(&bytes));
            AnswerOf::Whole(bytes)
        }
        Beginning::Streams { is_events, first, rest } => {
            let limits = stream::Limits { timeouts: app.timeouts, end: estimate.end, cut: app.cut.clone() };
            let body = AnswerBody::new(first, rest, is_events, flight, limits, &app.unread);
            body.gather().await;
            AnswerOf::Stream(Box::new(body))
        }
    };
    Answer { parts, body }
}

fn add_headers(noted: Option<&Noted>, levels: Option<&Levels>, headers: &mut HeaderMap) {
    let shown = noted.map(|noted| Explained::from(noted).header());
    if let Some(value) = shown.and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert(DECISION_HEADER, value);
    }
    if let Some(levels) = levels {
        levels.write_headers(headers);
    }
}
