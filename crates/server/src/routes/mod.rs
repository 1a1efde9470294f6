//! The routes, and what every request passes on its way to them.

mod chat;
mod completions;
mod health;
mod kv_events;
mod models;
mod operate;
mod tokenize;
mod tokenizer;

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{Method, Uri};
use servelab_front::panics;
use servelab_front::request_id::with_request_id;
use tower_http::catch_panic::CatchPanicLayer;

use crate::app::{App, Arrived};
use crate::errors::ApiError;

/// Every route, as the metrics name it.
pub const ROUTES: &[&str] = &[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{id}",
    "/tokenize",
    "/detokenize",
    "/tokenizer",
    "/tokenizer/{file}",
    "/reset_prefix_cache",
    "/kv/events",
    "/live",
    "/ready",
    "/health",
    "/metrics",
    "/version",
    "/state",
];

/// The replica's HTTP interface. Probes, metrics and the version are open to everybody; all else asks for
/// a key if there are keys.
pub fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer", get(tokenizer::manifest))
        .route("/tokenizer/{file}", get(tokenizer::file))
        .route("/reset_prefix_cache", post(operate::reset_prefix_cache))
        .route("/state", get(operate::state))
        .route("/kv/events", get(kv_events::stream))
        .route_layer(middleware::from_fn_with_state(app.clone(), check_key));
    Router::new()
        .route("/live", get(health::live))
        .route("/ready", get(health::ready))
        .route("/health", get(health::ready))
        .route("/metrics", get(operate::metrics))
        .route("/version", get(operate::version))
        .merge(guarded)
        .fallback(no_such_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), observed))
        .layer(middleware::from_fn_with_state(app.traces.clone(), with_request_id))
        .with_state(app)
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, ApiError> {
    app.api_keys.check(request.headers())?;
    Ok(next.run(request).await)
}

/// Notes when the request came and counts its answer.
async fn observed(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Arrived(app.clock.now()));
    let route = request.extensions().get::<MatchedPath>().cloned();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let (status, route) = (response.status().as_u16(), route.as_ref().map(MatchedPath::as_str));
    let route = route.map(|route| if route == "/v1/models/{*id}" { "/v1/models/{id}" } else { route });
    app.metrics.observe_http(route, status);
    tracing::debug!(%method, path, status, "answered");
    response
}

async fn no_such_route(uri: Uri) -> ApiError {
    ApiError::NoSuchRoute { path: uri.path().chars().take(200).collect() }
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let advice = if method == Method::GET { "use POST" } else { "use GET or POST, see the Allow header" };
    ApiError::WrongMethod { method: method.to_string(), path: uri.path().chars().take(200).collect(), advice }
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    ApiError::Internal(panics::describe(&*panic)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn broken() -> &'static str {
        panic!("as the test wants it")
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_an_answer_in_shape_and_the_server_lives() {
        let router = Router::new().route("/broken", get(broken)).layer(CatchPanicLayer::custom(panicked));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/broken", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, router).into_future());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        for _ in 0..2 {
            let answer = client.get(&url).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), 500);
            let body: serde_json::Value = answer.json().await.unwrap();
            assert_eq!(body["error"]["type"], "server_error");
            assert!(!body.to_string().contains("as the test wants it"), "the panic's words are for the log");
        }
    }
}
