//! `GET /tokenizer` and `GET /tokenizer/{file}`: what a router needs to cut prompts as this replica does.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use bytes::Bytes;
use servelab_wire::{TokenizerFile, TokenizerManifest};

use crate::app::App;
use crate::errors::ApiError;

pub async fn manifest(State(app): State<Arc<App>>) -> Result<Json<TokenizerManifest>, ApiError> {
    let model = app.model()?;
    let files = model.text_files.list();
    let files = files.map(|(name, content)| TokenizerFile { name: name.into(), bytes: content.len() as u64 });
    Ok(Json(TokenizerManifest {
        model: app.model_name().to_owned(),
        revision: format!("{:032x}", model.text_revision),
        block_size: model.engine.block_size,
        files: files.collect(),
    }))
}

pub async fn file(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Bytes, ApiError> {
    // A path that is no UTF-8 names no file.
    let Path(name) = name.unwrap_or_else(|_| Path(char::REPLACEMENT_CHARACTER.to_string()));
    let found = app.model()?.text_files.list().find(|(known, _)| *known == name);
    found.map(|(_, content)| content.clone()).ok_or_else(|| ApiError::NoSuchRoute {
        path: format!("/tokenizer/{}", name.chars().take(100).collect::<String>()),
    })
}
