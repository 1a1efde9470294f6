//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use servelab_wire::{ModelCard, ModelList};

use crate::app::App;
use crate::errors::ApiError;

pub async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let cards = app.served_model_names.iter().map(|name| card(&app, name));
    Ok(Json(ModelList::new(cards.collect::<Result<_, _>>()?)))
}

/// A name may hold slashes, as hub ids do.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    // A path that is no UTF-8 names no model.
    let Path(name) = name.unwrap_or_else(|_| Path(char::REPLACEMENT_CHARACTER.to_string()));
    app.check_name(Some(&name))?;
    Ok(Json(card(&app, &name)?))
}

/// # Errors
/// Until the model is loaded: its root and its context length are not known before.
fn card(app: &App, name: &str) -> Result<ModelCard, ApiError> {
    let model = match app.loaded_model() {
        Some(model) => model,
        None => app.model()?,
    };
    Ok(ModelCard {
        id: name.to_owned(),
        object: "model".into(),
        created: app.clock.started_unix(),
        owned_by: "servelab".into(),
        root: model.root.clone(),
        parent: None,
        max_model_len: model.engine.max_model_len,
    })
}
