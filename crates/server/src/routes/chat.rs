//! `POST /v1/chat/completions`.

use std::collections::HashSet;
use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Body};
use futures::{Stream, StreamExt};
use servelab_engine::TokenId;
use servelab_telemetry::RequestTrace;
use servelab_wire::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs, ChatReply, ChatRequest,
    StreamOptions, Usage,
};

use crate::app::{App, Arrived, Heading};
use crate::body;
use crate::errors::ApiError;
use crate::generation::{Delta, Generation};
use crate::logprobs;
use crate::model::{Ask, Model};
use crate::run_ahead::deltas;
use crate::spans;
use crate::sse;
use servelab_front::prompts::TokenisedPrompt;
use servelab_front::request_id::HttpRequestId;

pub async fn create(
    State(app): State<Arc<App>>,
    Extension(Arrived(arrived)): Extension<Arrived>,
    Extension(HttpRequestId(http_request_id)): Extension<HttpRequestId>,
    Extension(trace): Extension<RequestTrace>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let model = app.model()?.clone();
    let (head, body) = request.into_parts();
    let body = body::json(&head.headers, body, app.max_body_bytes, &model.blocking).await?;
    let request = ChatRequest::read(body)?;
    app.check_name(request.common.model.as_deref())?;
    spans::tell_request(&trace, &app, &model, "chat", &request.common);
    spans::tell_messages(&trace, &request.conversation.messages);
    let places = app.places(&model, 1, request.common.n)?;
    let conversation = request.conversation.clone();
    // The template has written the special tokens itself.
    let add_special = request.common.add_special_tokens.unwrap_or(false);
    let prompt = model.prompt(move |prompter| prompter.chat(&conversation, None, add_special)).await?;
    let ask = Ask {
        common: &request.common,
        logprobs: request.logprobs,
        prompt_logprobs: request.common.prompt_logprobs,
        arrived,
        http_request_id,
        trace,
    };
    let generation = model.submit(&ask, std::slice::from_ref(&prompt), places).await?;
    let heading = Heading::new(&app, "chatcmpl", &request.common);
    spans::tell_heading(&ask.trace, &heading);
    match request.common.stream {
        None => Ok(Json(whole(heading, &request, &model, &prompt, generation).await?).into_response()),
        Some(options) => {
            let deltas = deltas(generation, !request.common.stop.is_empty());
            Ok(sse::respond(chunks(heading, options, model, deltas)))
        }
    }
}

/// A choice of an answer that is given as a whole.
struct Gathered {
    text: String,
    logprobs: Option<ChatLogprobs>,
    finish: Option<crate::generation::Finish>,
}

async fn whole(
    heading: Heading,
    request: &ChatRequest,
    model: &Model,
    prompt: &TokenisedPrompt,
    mut generation: Generation,
) -> Result<ChatCompletion, ApiError> {
    let empty = |_| Gathered {
        text: String::new(),
        logprobs: request.logprobs.map(|_| ChatLogprobs::default()),
        finish: None,
    };
    let mut gathered: Vec<Gathered> = (0..request.common.n).map(empty).collect();
    while let Some(delta) = generation.next().await? {
        let Some(choice) = gathered.get_mut(delta.choice as usize) else { continue };
        choice.text.push_str(&delta.text);
        if let (Some(all), Some((token, Some(logprobs)))) = (&mut choice.logprobs, &delta.token) {
            all.content.push(logprobs::chat(&model.tokenizer, *token, logprobs));
        }
        choice.finish = delta.finish.or(choice.finish.take());
    }
    let choices: Result<Vec<ChatChoice>, ApiError> = gathered.into_iter().zip(0..).map(choice).collect();
    Ok(ChatCompletion {
        id: heading.id,
        object: "chat.completion".into(),
        created: heading.created,
        model: heading.model,
        choices: choices?,
        usage: generation.usage(),
        system_fingerprint: heading.system_fingerprint,
        prompt_logprobs: prompt_logprobs(request, model, &prompt.tokens, &generation),
    })
}

fn choice((gathered, index): (Gathered, u32)) -> Result<ChatChoice, ApiError> {
    let finish = gathered.finish.ok_or_else(|| ApiError::Internal("a choice has no end".into()))?;
    Ok(ChatChoice {
        index,
        message: ChatReply { role: "assistant".into(), content: gathered.text, refusal: None },
        logprobs: gathered.logprobs,
        finish_reason: finish.reason,
        stop_reason: finish.stop_reason,
    })
}

fn prompt_logprobs(
    request: &ChatRequest,
    model: &Model,
    tokens: &[TokenId],
    generation: &Generation,
) -> Option<servelab_wire::PromptLogprobs> {
    let top = request.common.prompt_logprobs?;
    Some(logprobs::prompt(&model.tokenizer, tokens, generation.prompt_logprobs(0)?, top))
}

/// What goes over the wire while an answer is made: per choice the role, the pieces, the finish reason;
/// at the end, if wanted, the usage.
fn chunks(
    heading: Heading,
    options: StreamOptions,
    model: Arc<Model>,
    deltas: impl Stream<Item = Result<Delta, ApiError>> + Send,
) -> impl Stream<Item = Result<ChatChunk, ApiError>> + Send {
    let writer = ChunkWriter { heading, options };
    async_stream::stream! {
        tokio::pin!(deltas);
        let mut begun = HashSet::new();
        let mut usage = Usage::default();
        while let Some(delta) = deltas.next().await {
            let delta = match delta {
                Ok(delta) => delta,
                Err(error) => {
                    yield Err(error);
                    return;
                }
            };
            usage = delta.usage;
            // The role comes with the first token and not before: whoever measures the time to the first
            // chunk measures the model.
            if begun.insert(delta.choice) {
                yield Ok(writer.role(delta.choice, usage));
            }
            if let Some(chunk) = writer.piece(&model, delta) {
                yield Ok(chunk);
            }
        }
        if options.include_usage {
            yield Ok(writer.usage(usage));
        }
    }
}

struct ChunkWriter {
    heading: Heading,
    options: StreamOptions,
}

impl ChunkWriter {
    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>) -> ChatChunk {
        ChatChunk {
            id: self.heading.id.clone(),
            object: "chat.completion.chunk".into(),
            created: self.heading.created,
            model: self.heading.model.clone(),
            system_fingerprint: self.heading.system_fingerprint.clone(),
            choices,
            usage,
        }
    }

    fn running_usage(&self, usage: Usage) -> Option<Option<Usage>> {
        match self.options {
            StreamOptions { continuous_usage_stats: true, .. } => Some(Some(usage)),
            StreamOptions { include_usage: true, .. } => Some(None),
            StreamOptions { .. } => None,
        }
    }

    fn role(&self, index: u32, usage: Usage) -> ChatChunk {
        let delta = ChatDelta { role: Some("assistant".into()), content: Some(String::new()) };
        let choice = ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None };
        self.chunk(vec![choice], self.running_usage(usage))
    }

    /// `None` for a token that gives no text yet and says nothing else.
    fn piece(&self, model: &Model, delta: Delta) -> Option<ChatChunk> {
        let logprobs = logprobs::of_delta(&model.tokenizer, delta.token.as_ref());
        if delta.text.is_empty() && logprobs.is_none() && delta.finish.is_none() {
            return None;
        }
        let content = (!delta.text.is_empty()).then_some(delta.text);
        let (finish_reason, stop_reason) = match delta.finish {
            Some(finish) => (Some(finish.reason), finish.stop_reason),
            None => (None, None),
        };
        let choice = ChatChunkChoice {
            index: delta.choice,
            delta: ChatDelta { role: None, content },
            logprobs,
            finish_reason,
            stop_reason,
        };
        Some(self.chunk(vec![choice], self.running_usage(delta.usage)))
    }

    fn usage(&self, usage: Usage) -> ChatChunk {
        self.chunk(Vec::new(), Some(Some(usage)))
    }
}
