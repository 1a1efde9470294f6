//! The model as the HTTP side sees it: names, text, limits, and the way to the engine.

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use servelab_engine::{EngineConfig, Request, RequestId, SamplingParams, StopConditions, Timestamp, TokenId};
use servelab_front::prompts::{PromptError, Prompter, TextFiles, TokenisedPrompt};
use servelab_telemetry::RequestTrace;
use servelab_text::Tokenizer;
use servelab_wire::{CommonFields, DeviceState, FieldError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::admission::{Admission, Place};
use crate::blocking::Blocking;
use crate::clock::Clock;
use crate::engine_thread::{Command, EventSender, RequestEvent, Submission};
use crate::errors::ApiError;
use crate::generation::{ChoiceText, Generation, Part};
use crate::kv_events::log::KvLog;
use crate::options::SamplingDefaults;

/// A loaded model. One per server, shared by all requests.
pub struct Model {
    pub tokenizer: Arc<Tokenizer>,
    pub prompter: Arc<Prompter>,
    pub text_files: TextFiles,
    /// See [`TextFiles::revision`].
    pub text_revision: u128,
    pub eos_token_ids: Arc<[TokenId]>,
    pub vocab_size: u32,
    pub root: String,
    pub device: DeviceState,
    pub defaults: SamplingDefaults,
    /// As the engine runs it.
    pub engine: EngineConfig,
    pub commands: mpsc::Sender<Command>,
    pub kv: Arc<KvLog>,
    pub admission: Arc<Admission>,
    pub blocking: Blocking,
    pub clock: Clock,
    /// Cancelled when the time to drain is over.
    pub cut: CancellationToken,
    /// Requests so far: their ids, and the numbers from which seeds are drawn.
    pub requests: AtomicU64,
    pub seed: u64,
}

/// What all prompts of an HTTP request have in common.
pub struct Ask<'a> {
    pub common: &'a CommonFields,
    /// Log-probabilities per generated token.
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    /// When the HTTP request reached the server.
    pub arrived: Timestamp,
    pub http_request_id: Arc<str>,
    pub trace: RequestTrace,
}

impl Model {
    /// Makes a prompt of what a request says, off the async threads.
    ///
    /// # Errors
    /// If the template or the tokenizer refuses it.
    pub async fn prompt(
        &self,
        make: impl FnOnce(&Prompter) -> Result<TokenisedPrompt, PromptError> + Send + 'static,
    ) -> Result<TokenisedPrompt, ApiError> {
        let prompter = self.prompter.clone();
        self.blocking.run(move || Ok(make(&prompter)?)).await
    }

    /// Turns token ids back into text, off the async threads.
    ///
    /// # Errors
    /// If an id is outside the vocabulary; `param` names the field.
    pub async fn detokenise(&self, tokens: Vec<TokenId>, param: &str) -> Result<TokenisedPrompt, ApiError> {
        self.check_token_ids(&tokens, param)?;
        let tokenizer = self.tokenizer.clone();
        self.blocking
            .run(move || {
                let text = tokenizer.decode(&tokens, false)?;
                Ok(TokenisedPrompt { tokens: tokens.into(), text })
            })
            .await
    }

    /// # Errors
    /// If an id is outside the model's vocabulary.
    pub fn check_token_ids(&self, tokens: &[TokenId], param: &str) -> Result<(), ApiError> {
        match tokens.iter().find(|id| **id >= self.vocab_size) {
            None => Ok(()),
            Some(id) => {
                let most = self.vocab_size - 1;
                let message = format!("{param} holds the token id {id}; the vocabulary ends at {most}");
                Err(FieldError::new(param, message).into())
            }
        }
    }

    /// Hands one request per prompt to the engine and waits until it has taken them all.
    /// `places` has one place per prompt.
    ///
    /// # Errors
    /// If a field does not fit the model, or the engine refuses one of them; the others are given up.
    pub async fn submit(
        &self,
        ask: &Ask<'_>,
        prompts: &[TokenisedPrompt],
        places: Vec<Place>,
    ) -> Result<Generation, ApiError> {
        let mut requests = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            requests.push(self.request(ask, prompt)?);
        }
        let events = requests.iter().map(|request| RequestEvent::most(request.n, request.stop.max_tokens));
        let (sender, receiver) = mpsc::channel(events.sum());
        let mut parts = Vec::with_capacity(prompts.len());
        for (request, place) in requests.into_iter().zip(places) {
            let events = EventSender { part: parts.len(), sender: sender.clone() };
            parts.push(self.add(ask, request, events, place, prompts.len() == 1).await?);
        }
        let mut generation =
            Generation::new(receiver, parts, self.commands.clone(), self.cut.clone(), ask.trace.clone());
        drop(sender);
        generation.accepted().await?;
        Ok(generation)
    }

    async fn add(
        &self,
        ask: &Ask<'_>,
        request: Request,
        events: EventSender,
        place: Place,
        is_alone: bool,
    ) -> Result<Part, ApiError> {
        let down = |_| ApiError::Down;
        // Kept from here to the request's end, so that giving it up never waits for room: see Part.
        let abort = self.commands.clone().reserve_owned().await.map_err(|_| ApiError::Down)?;
        let room = self.commands.reserve().await.map_err(down)?;
        let choices = (0..request.n).map(|_| self.choice(ask.common, &request)).collect::<Result<_, _>>()?;
        let part = Part::new(request.id, request.prompt.len() as u32, choices, abort);
        room.send(Command::Add(Box::new(Submission {
            request,
            events,
            arrived: ask.arrived,
            http_request_id: ask.http_request_id.clone(),
            trace: ask.trace.clone(),
            is_alone,
            place,
        })));
        Ok(part)
    }

    fn choice(&self, common: &CommonFields, request: &Request) -> Result<ChoiceText, ApiError> {
        ChoiceText::new(
            self.tokenizer.clone(),
            &request.prompt,
            common,
            request.stop.stop_token_ids.clone(),
            self.eos_token_ids.clone(),
        )
    }

    fn request(&self, ask: &Ask<'_>, prompt: &TokenisedPrompt) -> Result<Request, ApiError> {
        let common = ask.common;
        if self.device.simulated {
            refuse_logits(ask)?;
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let prompt_tokens = u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX);
        let max_tokens = common.max_tokens.unwrap_or_else(|| self.room(prompt_tokens, common.n));
        if common.min_tokens > max_tokens {
            let message =
                format!("min_tokens {} exceeds the {max_tokens} that can be generated", common.min_tokens);
            return Err(FieldError::new("min_tokens", message).into());
        }
        Ok(Request {
            id: RequestId(number),
            prompt: prompt.tokens.clone(),
            n: common.n,
            sampling: Arc::new(self.sampling(ask, number)?),
            stop: StopConditions {
                max_tokens,
                min_tokens: common.min_tokens,
                stop_token_ids: self.stop_token_ids(common)?,
            },
            priority: common.priority,
            cache_salt: common.cache_salt.as_deref().map_or(0, salt),
            arrival: self.clock.now(),
        })
    }

    /// The longest answer that prompt, context and pool have room for; at least 1, so that a prompt that
    /// is too long is refused as such.
    fn room(&self, prompt_tokens: u32, n: u32) -> u32 {
        let engine = &self.engine;
        let context = engine.max_model_len.saturating_sub(prompt_tokens);
        // Choices share the prompt's full blocks; the last token of each needs no slot.
        let shared = prompt_tokens / engine.block_size;
        let own = engine.num_blocks.saturating_sub(shared) / n.max(1);
        let slots = u64::from(shared + own) * u64::from(engine.block_size);
        let pool = (slots + 1).saturating_sub(u64::from(prompt_tokens));
        context.min(u32::try_from(pool).unwrap_or(u32::MAX)).max(1)
    }

    fn sampling(&self, ask: &Ask<'_>, number: u64) -> Result<SamplingParams, ApiError> {
        /// Below it, logits divided by the temperature would overflow; vLLM draws the same line.
        const GREEDY: f32 = 1e-5;
        let (common, defaults) = (ask.common, &self.defaults);
        let temperature = common.temperature.or(defaults.temperature).unwrap_or(1.0);
        for (token, _) in &common.logit_bias {
            self.check_token_ids(&[*token], "logit_bias")?;
        }
        Ok(SamplingParams {
            temperature: if temperature < GREEDY { 0.0 } else { temperature },
            top_k: common.top_k.or(defaults.top_k).filter(|k| *k > 0),
            top_p: common.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: common.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: common.presence_penalty,
            frequency_penalty: common.frequency_penalty,
            repetition_penalty: common.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias: common.logit_bias.clone(),
            seed: common.seed.map_or_else(|| mix(self.seed, number), i64::cast_unsigned),
            logprobs: ask.logprobs,
            prompt_logprobs: ask.prompt_logprobs,
        })
    }

    fn stop_token_ids(&self, common: &CommonFields) -> Result<Arc<[TokenId]>, ApiError> {
        self.check_token_ids(&common.stop_token_ids, "stop_token_ids")?;
        let own = if common.ignore_eos { &[] } else { &self.eos_token_ids[..] };
        Ok(own.iter().chain(&common.stop_token_ids).copied().collect())
    }
}

/// What a simulated device cannot give.
fn refuse_logits(ask: &Ask<'_>) -> Result<(), FieldError> {
    let wanted = [
        ("logprobs", ask.logprobs.is_some()),
        ("prompt_logprobs", ask.prompt_logprobs.is_some()),
        ("logit_bias", !ask.common.logit_bias.is_empty()),
    ];
    match wanted.iter().find(|(_, wanted)| *wanted) {
        Some((field, _)) => Err(FieldError::new(
            *field,
            format!(
                "{field} needs logits, and the device of this server is simulated and has none; leave it out"
            ),
        )),
        None => Ok(()),
    }
}

/// The salt of the block hashes; 0 is the salt of requests that name none.
fn salt(text: &str) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.write(text.as_bytes());
    hasher.finish().max(1)
}

/// A seed for a request that gives none (SplitMix64, Steele, Lea and Flood 2014).
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
