//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use servelab_wire::{DetokenizeRequest, Detokenized, TokenizeInput, TokenizeRequest, Tokenized};

use crate::app::App;
use crate::body;
use crate::errors::ApiError;
use crate::model::{Conversation, Model};

pub async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json<Tokenized>, ApiError> {
    let model = app.model()?.clone();
    let (head, body) = request.into_parts();
    let body = body::json(&head.headers, body, app.max_body_bytes, &model.blocking).await?;
    let request = TokenizeRequest::read(body)?;
    app.check_name(request.model.as_deref())?;
    let tokens = tokens(&model, request.input, request.add_special_tokens).await?;
    let texts = |tokens: &[u32]| tokens.iter().map(|token| model.tokenizer.token_text(*token)).collect();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: model.engine.max_model_len,
        token_strs: request.return_token_strs.then(|| texts(&tokens)),
        tokens,
    }))
}

async fn tokens(model: &Model, input: TokenizeInput, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    let prompt = match input {
        TokenizeInput::Prompt(text) => model.tokenise(text, add_special_tokens).await?,
        TokenizeInput::Messages {
            messages,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs: kwargs,
        } => {
            let chat = Conversation {
                messages,
                add_generation_prompt,
                continue_final_message,
                kwargs,
                add_special_tokens,
            };
            model.tokenise_chat(chat).await?
        }
    };
    Ok(prompt.tokens.to_vec())
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
