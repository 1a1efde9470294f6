//! The router's own routes, and the one behind which all others are the replicas'.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::middleware;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use servelab_front::request_id::with_request_id;
use servelab_front::{body, panics};
use tower_http::catch_panic::CatchPanicLayer;

use crate::app::App;
use crate::errors::RouterError;
use crate::idempotency::{Claim, First, Key, MAX_KEY_BYTES, Stored};
use crate::prompt::{self, Asked};
use crate::proxy::{self, AnswerOf, Incoming};
use crate::replicas::address::Address;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Tells an answer that was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/live", get(async || Json(json!({"status": "live"}))))
        .route("/ready", get(ready))
        .route("/health", get(ready))
        .route("/metrics", get(metrics))
        .route("/decisions", get(decisions))
        .route("/replicas", get(replicas).post(add_replica).delete(remove_replica))
        .fallback(forward)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.traces.clone(), with_request_id))
        .with_state(app)
}

/// The fleet, live: a page that asks the routes below once a second. It holds nothing itself, so it needs no key.
async fn page() -> impl IntoResponse {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("../assets/fleet.html")))
}

/// The router can take requests, whether a replica is ready or not: it holds them.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let status = if app.is_draining() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let body = json!({
        "status": if app.is_draining() { "draining" } else { "ready" },
        "replicas": app.registry.len(),
        "replicas_ready": app.registry.ready(),
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, RouterError> {
    app.metrics.observe_replicas(&app.registry.view());
    app.metrics.index_bytes.set(app.registry.index_bytes() as i64);
    let text = app.metrics.encode().map_err(|error| RouterError::Internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, servelab_telemetry::CONTENT_TYPE)], text).into_response())
}

#[derive(Deserialize)]
struct Count {
    limit: Option<usize>,
}

async fn decisions(
    State(app): State<Arc<App>>,
    Query(count): Query<Count>,
    headers: HeaderMap,
) -> Result<Json<Value>, RouterError> {
    app.key(&headers)?;
    Ok(Json(json!({"decisions": app.decisions.newest(count.limit.unwrap_or(usize::MAX))})))
}

async fn replicas(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Json<Value>, RouterError> {
    app.key(&headers)?;
    Ok(Json(json!({"policy": app.policy.name(), "replicas": app.registry.view()})))
}

async fn add_replica(State(app): State<Arc<App>>, request: Request) -> Result<Response, RouterError> {
    let address = named(&app, request).await?;
    let added =
        app.members.add(address.clone()).map_err(|error| RouterError::BadRequest(error.to_string()))?;
    let status = if added { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(json!({"url": address.to_string(), "added": added}))).into_response())
}

/// It gets no new request; those that it has end as they would have.
async fn remove_replica(State(app): State<Arc<App>>, request: Request) -> Result<Response, RouterError> {
    let address = named(&app, request).await?;
    let removed = app.members.remove(&address);
    let status = if removed { StatusCode::OK } else { StatusCode::NOT_FOUND };
    Ok((status, Json(json!({"url": address.to_string(), "removed": removed}))).into_response())
}

/// The replica that an administrator names: `{"url": "http://HOST:PORT"}`.
async fn named(app: &App, request: Request) -> Result<Address, RouterError> {
    let (parts, body) = request.into_parts();
    app.check_admin(&parts.headers)?;
    let body = body::read(&parts.headers, body, 64 << 10).await?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let wanted = || RouterError::BadRequest("send {\"url\": \"http://HOST:PORT\"}".to_owned());
    let url = body.get("url").and_then(Value::as_str).ok_or_else(wanted)?;
    url.parse()
        .map_err(|error: crate::replicas::address::BadAddress| RouterError::BadRequest(error.to_string()))
}

/// Everything that is the replicas'.
async fn forward(State(app): State<Arc<App>>, request: Request) -> Result<Response, RouterError> {
    if app.is_draining() {
        return Err(RouterError::Draining);
    }
    let (parts, body) = request.into_parts();
    let key = app.key(&parts.headers)?;
    let body = body::read(&parts.headers, body, app.max_body_bytes).await?;
    let began = Instant::now();
    let incoming = Incoming { parts, body, key };
    let asked = proxy::asked(&app, &incoming).await;
    app.metrics.added_latency_seconds.observe(began.elapsed().as_secs_f64());
    if asked.streams || !proxy::generates(&incoming.parts) {
        return Ok(proxy::forward(&app, incoming, asked).await?.into_response());
    }
    match idempotency_key(&incoming.parts.headers)? {
        Some(name) => once(&app, incoming, asked, name).await,
        None => Ok(proxy::forward(&app, incoming, asked).await?.into_response()),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, RouterError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let sane = |text: &&str| {
        (1..=MAX_KEY_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    let text = value.to_str().ok().filter(sane).ok_or(RouterError::BadIdempotencyKey(MAX_KEY_BYTES))?;
    Ok(Some(text.to_owned()))
}

/// The answer of the first request with that key.
async fn once(
    app: &Arc<App>,
    incoming: Incoming,
    asked: Asked,
    name: String,
) -> Result<Response, RouterError> {
    let key: Key = (incoming.key, name);
    let fingerprint = prompt::fingerprint(incoming.parts.uri.path(), &incoming.body);
    loop {
        match app.answers.claim(key.clone(), fingerprint, app.registry.now()) {
            Claim::First(first) => return run_first(app, incoming, asked, first).await,
            Claim::Same(stored) => return Ok(replay(app, &stored)),
            Claim::Wait(mut running) => {
                let waiting = app.metrics.waiting();
                let told = running.wait_for(Option::is_some).await.ok().and_then(|stored| stored.clone());
                drop(waiting);
                if let Some(stored) = told {
                    return Ok(replay(app, &stored));
                }
            }
            Claim::OtherBody => return Err(RouterError::OtherBody),
            Claim::TooManyWait => return Err(RouterError::StillRunning),
            Claim::NoRoom => return Ok(proxy::forward(app, incoming, asked).await?.into_response()),
        }
    }
}

/// Keeps the answer, unless it is one that trying again may better.
async fn run_first(
    app: &Arc<App>,
    incoming: Incoming,
    asked: Asked,
    first: First,
) -> Result<Response, RouterError> {
    let answer = proxy::forward(app, incoming, asked).await?;
    let status = answer.parts.status;
    if let AnswerOf::Whole(body) = &answer.body
        && !status.is_server_error()
        && status != StatusCode::TOO_MANY_REQUESTS
    {
        let stored = Stored { status, headers: answer.parts.headers.clone(), body: body.clone() };
        first.answered(stored, app.registry.now());
    }
    Ok(answer.into_response())
}

fn replay(app: &App, stored: &Stored) -> Response {
    app.metrics.idempotent_answers.inc();
    let mut response = Response::new(Body::from(stored.body.clone()));
    *response.status_mut() = stored.status;
    *response.headers_mut() = stored.headers.clone();
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    response
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    RouterError::Internal(panics::describe(&*panic)).into_response()
}
