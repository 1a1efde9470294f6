//! For operators: `GET /metrics`, `/version`, `/state`, and `POST /reset_prefix_cache`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, header};
use serde_json::{Value, json};
use servelab_engine::RequestId;
use servelab_telemetry::{OPEN_METRICS_CONTENT_TYPE, accepts_open_metrics};
use servelab_wire::{
    BlocksState, ConfigState, EngineState, PrefixCacheState, RunningState, StateSnapshot, WaitingState,
};
use tokio::sync::oneshot;

use crate::app::App;
use crate::engine_thread::{Command, EngineReport};
use crate::errors::ApiError;
use crate::model::Model;

/// In OpenMetrics' format for scrapers that take it, where there are traces to be told in it.
pub async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (text, content_type) = if app.traces.is_on() && accepts_open_metrics(accept) {
        (app.metrics.encode_open_metrics(), OPEN_METRICS_CONTENT_TYPE)
    } else {
        (app.metrics.encode(), servelab_telemetry::CONTENT_TYPE)
    };
    let text = text.map_err(|error| ApiError::Internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

/// Also tells what computes, and the sampling values of requests that name none.
pub async fn version(State(app): State<Arc<App>>) -> Json<Value> {
    let defaults = app.loaded_model().map(|model| {
        let defaults = model.defaults;
        json!({
            "temperature": defaults.temperature.unwrap_or(1.0),
            "top_p": defaults.top_p.unwrap_or(1.0),
            "top_k": defaults.top_k.unwrap_or(0),
            "min_p": defaults.min_p.unwrap_or(0.0),
            "repetition_penalty": defaults.repetition_penalty.unwrap_or(1.0),
        })
    });
    let device = app.loaded_model().map(|model| &model.device);
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": device,
        "default_sampling_params": defaults,
    }))
}

pub async fn reset_prefix_cache(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let forgot = ask(app.model()?, Command::ResetPrefixCache).await?;
    Ok(Json(json!({"reset": true, "had_content": forgot})))
}

pub async fn state(State(app): State<Arc<App>>) -> Result<Json<StateSnapshot>, ApiError> {
    let engine = match app.loaded_model() {
        None => None,
        Some(model) => {
            // A lost engine has no state; what the replica knows without it is still worth telling.
            let report = ask(model, Command::Snapshot).await.ok();
            report.map(|report| engine_state(&app, model, report))
        }
    };
    Ok(Json(StateSnapshot {
        model: app.model_name().to_owned(),
        phase: app.phase().name().to_owned(),
        uptime_seconds: app.clock.now().as_secs_f64(),
        device: app.loaded_model().map(|model| model.device.clone()),
        engine,
    }))
}

/// Sends a question to the engine and waits for the answer, which comes between two steps.
pub async fn ask<T>(
    model: &Model,
    question: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, ApiError> {
    let (sender, receiver) = oneshot::channel();
    model.commands.send(question(sender)).await.map_err(|_| ApiError::Down)?;
    receiver.await.map_err(|_| ApiError::Down)
}

fn engine_state(app: &App, model: &Model, report: EngineReport) -> EngineState {
    let EngineReport { snapshot, stats, now, http_request_ids } = report;
    let http_id = |id: &RequestId| http_request_ids.get(id).map_or_else(String::new, |id| id.to_string());
    let config = &model.engine;
    let running = snapshot.running.into_iter().map(|sequence| RunningState {
        request_id: http_id(&sequence.request),
        choice: sequence.choice,
        priority: sequence.priority,
        prompt_tokens: sequence.prompt_tokens,
        tokens: sequence.tokens,
        computed_tokens: sequence.computed,
        cached_tokens: sequence.cached,
        blocks: sequence.blocks.into_iter().map(|block| block.0).collect(),
    });
    let waiting = snapshot.waiting.into_iter().map(|sequence| WaitingState {
        request_id: http_id(&sequence.request),
        choice: sequence.choice,
        priority: sequence.priority,
        prompt_tokens: sequence.prompt_tokens,
        tokens: sequence.tokens,
        preempted: sequence.preempted,
        waited_seconds: now.saturating_sub(sequence.arrival).as_secs_f64(),
    });
    EngineState {
        steps: snapshot.steps,
        config: ConfigState {
            block_size: config.block_size,
            num_blocks: config.num_blocks,
            max_model_len: config.max_model_len,
            max_batched_tokens: config.max_batched_tokens,
            max_running: config.max_running,
            max_waiting: app.max_waiting,
            prefix_cache: config.prefix_cache,
        },
        blocks: BlocksState {
            total: stats.blocks_total,
            held: stats.blocks_held,
            cached: stats.blocks_cached,
            free: stats.blocks_free,
            map: snapshot.blocks,
        },
        prefix_cache: PrefixCacheState {
            query_tokens: stats.prefix_query_tokens,
            hit_tokens: stats.prefix_hit_tokens,
        },
        preemptions: stats.preemptions,
        running: running.collect(),
        waiting: waiting.collect(),
    }
}
