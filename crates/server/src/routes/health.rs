//! `GET /live`, `GET /ready` and its alias `GET /health`.
//!
//! A replica with a full queue is ready: it does what it can, and a restart would lose it all. One whose
//! engine has had work for too long without a step is neither ready nor alive: it answers HTTP and will
//! never answer a request.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use crate::app::{App, Phase};

pub async fn live(State(app): State<Arc<App>>) -> Response {
    answer(&app, true)
}

pub async fn ready(State(app): State<Arc<App>>) -> Response {
    answer(&app, app.phase() == Phase::Ready)
}

fn answer(app: &App, good: bool) -> Response {
    let stalled = app.stalled();
    let status = if good && !stalled { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let state = if stalled { "stalled" } else { app.phase().name() };
    (status, Json(json!({"status": state}))).into_response()
}
