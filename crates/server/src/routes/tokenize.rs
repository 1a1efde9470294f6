//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use servelab_wire::{DetokenizeRequest, Detokenized, TokenizeRequest, Tokenized};

use crate::app::App;
use crate::body;
use crate::errors::ApiError;

pub async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Tokenized>, ApiError> {
    let model = app.model()?.clone();
    let (head, body) = request.into_parts();
    let body = body::json(&head.headers, body, app.max_body_bytes, &model.blocking).await?;
    let request = TokenizeRequest::read(body)?;
    app.check_name(request.model.as_deref())?;
    let return_token_strs = request.return_token_strs;
    let tokens = model.prompt(|prompter| prompter.tokenize(request)).await?.tokens.to_vec();
    let texts = |tokens: &[u32]| tokens.iter().map(|token| model.tokenizer.token_text(*token)).collect();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: model.engine.max_model_len,
        token_strs: return_token_strs.then(|| texts(&tokens)),
        tokens,
    }))
}

pub async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Detokenized>, ApiError> {
    let model = app.model()?.clone();
    let (head, body) = request.into_parts();
    let body = body::json(&head.headers, body, app.max_body_bytes, &model.blocking).await?;
    let request = DetokenizeRequest::read(body)?;
    app.check_name(request.model.as_deref())?;
    let prompt = model.detokenise(request.tokens, "tokens").await?.text;
    Ok(Json(Detokenized { prompt }))
}
