//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use servelab_engine::{TokenId, TokenLogprobs};
use servelab_telemetry::RequestTrace;
use servelab_wire::{
    Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt, StreamOptions, Usage,
};

use crate::app::{App, Arrived, Heading};
use crate::body;
use crate::errors::ApiError;
use crate::generation::{Delta, Finish, Generation};
use crate::logprobs::{self, CompletionColumns};
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
    let request = CompletionRequest::read(body)?;
    app.check_name(request.common.model.as_deref())?;
    spans::tell_request(&trace, &app, &model, "text_completion", &request.common);
    spans::tell_prompts(&trace, &request.prompts);
    let places = app.places(&model, request.prompts.len(), request.common.n)?;
    let prompts = tokenised(&model, &request).await?;
    let ask = Ask {
        common: &request.common,
        logprobs: request.logprobs,
        prompt_logprobs: prompt_logprobs_wanted(&request),
        arrived,
        http_request_id,
        trace,
    };
    let generation = model.submit(&ask, &prompts, places).await?;
    let heading = Heading::new(&app, "cmpl", &request.common);
    spans::tell_heading(&ask.trace, &heading);
    match request.common.stream {
        None => Ok(Json(whole(heading, &request, &model, &prompts, generation).await?).into_response()),
        Some(options) => {
            let deltas = deltas(generation, !request.common.stop.is_empty());
            let choices = opening_texts(&request, &prompts);
            let writer = ChunkWriter { heading, options, logprobs: request.logprobs };
            Ok(sse::respond(chunks(writer, model, choices, deltas)))
        }
    }
}

async fn tokenised(model: &Model, request: &CompletionRequest) -> Result<Vec<TokenisedPrompt>, ApiError> {
    let add_special = request.common.add_special_tokens.unwrap_or(true);
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in &request.prompts {
        prompts.push(match prompt {
            Prompt::Text(text) => {
                let text = text.clone();
                model.prompt(move |prompter| prompter.text(text, add_special)).await?
            }
            Prompt::Tokens(tokens) if request.echo => model.detokenise(tokens.clone(), "prompt").await?,
            Prompt::Tokens(tokens) => {
                model.check_token_ids(tokens, "prompt")?;
                TokenisedPrompt { tokens: tokens.as_slice().into(), text: String::new() }
            }
        });
    }
    Ok(prompts)
}

/// `echo` with `logprobs` reports those of the prompt too.
fn prompt_logprobs_wanted(request: &CompletionRequest) -> Option<u32> {
    let echoed = request.logprobs.filter(|_| request.echo);
    request.common.prompt_logprobs.max(echoed)
}

/// What each choice begins with before the model has said anything.
fn opening_texts(request: &CompletionRequest, prompts: &[TokenisedPrompt]) -> Vec<String> {
    let text = |prompt: &TokenisedPrompt| if request.echo { prompt.text.clone() } else { String::new() };
    prompts.iter().flat_map(|prompt| (0..request.common.n).map(move |_| text(prompt))).collect()
}

/// A choice of an answer that is given as a whole.
struct Gathered {
    text: String,
    tokens: Vec<(TokenId, Option<TokenLogprobs>)>,
    finish: Option<Finish>,
}

async fn whole(
    heading: Heading,
    request: &CompletionRequest,
    model: &Model,
    prompts: &[TokenisedPrompt],
    mut generation: Generation,
) -> Result<Completion, ApiError> {
    let opening = opening_texts(request, prompts).into_iter();
    let mut gathered: Vec<Gathered> =
        opening.map(|text| Gathered { text, tokens: Vec::new(), finish: None }).collect();
    while let Some(delta) = generation.next().await? {
        let Some(choice) = gathered.get_mut(delta.choice as usize) else { continue };
        choice.text.push_str(&delta.text);
        if request.logprobs.is_some() {
            choice.tokens.extend(delta.token);
        }
        choice.finish = delta.finish.or(choice.finish.take());
    }
    let writer = ChoiceWriter { request, model, prompts, generation: &generation };
    let choices: Result<Vec<CompletionChoice>, ApiError> =
        gathered.into_iter().zip(0..).map(|(gathered, index)| writer.choice(gathered, index)).collect();
    Ok(Completion {
        id: heading.id,
        object: "text_completion".into(),
        created: heading.created,
        model: heading.model,
        choices: choices?,
        system_fingerprint: heading.system_fingerprint,
        usage: Some(Some(generation.usage())),
    })
}

struct ChoiceWriter<'a> {
    request: &'a CompletionRequest,
    model: &'a Model,
    prompts: &'a [TokenisedPrompt],
    generation: &'a Generation,
}

impl ChoiceWriter<'_> {
    fn choice(&self, gathered: Gathered, index: u32) -> Result<CompletionChoice, ApiError> {
        let part = (index / self.request.common.n) as usize;
        let logprobs = self.request.logprobs.map(|top| self.logprobs(part, &gathered, top));
        let finish = gathered.finish.ok_or_else(|| ApiError::Internal("a choice has no end".into()))?;
        Ok(CompletionChoice {
            index,
            text: gathered.text,
            logprobs,
            finish_reason: Some(finish.reason),
            stop_reason: finish.stop_reason,
            prompt_logprobs: self.prompt_logprobs(part),
        })
    }

    fn logprobs(&self, part: usize, gathered: &Gathered, top: u32) -> CompletionLogprobs {
        let mut columns = CompletionColumns::new(&self.model.tokenizer, 0, top);
        if self.request.echo {
            let prompt = self.generation.prompt_logprobs(part).unwrap_or_default();
            for (token, logprobs) in self.prompts[part].tokens.iter().zip(prompt) {
                columns.push(*token, logprobs.as_ref());
            }
        }
        for (token, logprobs) in &gathered.tokens {
            columns.push(*token, logprobs.as_ref());
        }
        columns.finish()
    }

    fn prompt_logprobs(&self, part: usize) -> Option<servelab_wire::PromptLogprobs> {
        let top = self.request.common.prompt_logprobs?;
        let logprobs = self.generation.prompt_logprobs(part)?;
        Some(logprobs::prompt(&self.model.tokenizer, &self.prompts[part].tokens, logprobs, top))
    }
}

/// What goes over the wire while an answer is made. `openings` has the text that each choice begins with.
fn chunks(
    writer: ChunkWriter,
    model: Arc<Model>,
    openings: Vec<String>,
    deltas: impl Stream<Item = Result<Delta, ApiError>> + Send,
) -> impl Stream<Item = Result<Completion, ApiError>> + Send {
    async_stream::stream! {
        tokio::pin!(deltas);
        let mut offsets: Vec<usize> = vec![0; openings.len()];
        let mut openings: Vec<Option<String>> = openings.into_iter().map(Some).collect();
        let mut usage = Usage::default();
        while let Some(delta) = deltas.next().await {
            let mut delta = match delta {
                Ok(delta) => delta,
                Err(error) => {
                    yield Err(error);
                    return;
                }
            };
            usage = delta.usage;
            let choice = delta.choice as usize;
            if let Some(opening) = openings.get_mut(choice).and_then(Option::take) {
                delta.text.insert_str(0, &opening);
            }
            let offset = offsets.get_mut(choice);
            if let Some(chunk) = offset.and_then(|offset| writer.piece(&model, delta, offset)) {
                yield Ok(chunk);
            }
        }
        if writer.options.include_usage {
            yield Ok(writer.chunk(Vec::new(), Some(Some(usage))));
        }
    }
}

struct ChunkWriter {
    heading: Heading,
    options: StreamOptions,
    logprobs: Option<u32>,
}

impl ChunkWriter {
    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion {
        Completion {
            id: self.heading.id.clone(),
            object: "text_completion".into(),
            created: self.heading.created,
            model: self.heading.model.clone(),
            choices,
            system_fingerprint: self.heading.system_fingerprint.clone(),
            usage,
        }
    }

    /// `None` for a token that gives no text yet and says nothing else. `offset`: characters of the
    /// choice's tokens before this one.
    fn piece(&self, model: &Model, delta: Delta, offset: &mut usize) -> Option<Completion> {
        let logprobs = delta.token.as_ref().zip(self.logprobs).map(|((token, logprobs), top)| {
            let mut columns = CompletionColumns::new(&model.tokenizer, *offset, top);
            columns.push(*token, logprobs.as_ref());
            *offset = columns.offset();
            columns.finish()
        });
        if delta.text.is_empty() && logprobs.is_none() && delta.finish.is_none() {
            return None;
        }
        let (finish_reason, stop_reason) = match delta.finish {
            Some(finish) => (Some(finish.reason), finish.stop_reason),
            None => (None, None),
        };
        let choice = CompletionChoice {
            index: delta.choice,
            text: delta.text,
            logprobs,
            finish_reason,
            stop_reason,
            prompt_logprobs: None,
        };
        let usage = match self.options {
            StreamOptions { continuous_usage_stats: true, .. } => Some(Some(delta.usage)),
            StreamOptions { include_usage: true, .. } => Some(None),
            StreamOptions { .. } => None,
        };
        Some(self.chunk(vec![choice], usage))
    }
}
