//! From the engine's events to pieces of text: detokenizer, stop strings, finish reasons.

use std::collections::VecDeque;
use std::sync::Arc;

use servelab_engine::{FinishReason, RequestId, TokenId, TokenLogprobs};
use servelab_telemetry::RequestTrace;
use servelab_text::{Detokenizer, Fed, StopStrings, Tokenizer};
use servelab_wire::{CommonFields, StopReason, Usage};
use tokio::sync::mpsc::{OwnedPermit, Receiver, Sender};
use tokio_util::sync::CancellationToken;

use crate::engine_thread::{Command, RequestEvent};
use crate::errors::ApiError;
use crate::spans;

/// A piece of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Index among all choices of the HTTP request.
    pub choice: u32,
    /// Text that will not change any more; may be empty.
    pub text: String,
    /// The token behind it; absent if only held-back text came free.
    pub token: Option<(TokenId, Option<TokenLogprobs>)>,
    /// Set on the last delta of the choice.
    pub finish: Option<Finish>,
    /// Usage of the whole HTTP request up to here.
    pub usage: Usage,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    pub reason: servelab_wire::FinishReason,
    pub stop_reason: Option<StopReason>,
}

/// The answer to one HTTP request while it is made. Dropping it gives up what is not finished.
pub struct Generation {
    events: Receiver<(usize, RequestEvent)>,
    parts: Vec<Part>,
    commands: Sender<Command>,
    cut: CancellationToken,
    ready: VecDeque<Delta>,
    usage: Usage,
    trace: RequestTrace,
    /// Of the choices that have ended; only of a request that is traced.
    reasons: Vec<servelab_wire::FinishReason>,
}

/// What an event gives.
#[derive(Default)]
struct Applied {
    delta: Option<Delta>,
    /// The choice that a stop string ended, of which the engine does not know yet.
    stopped: Option<(RequestId, u32)>,
}

/// One prompt of it, which is one request of the engine.
pub struct Part {
    id: RequestId,
    accepted: bool,
    prompt_tokens: u32,
    cached_tokens: u32,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    choices: Vec<ChoiceText>,
    /// Choices of which the engine has not said, nor been told, that they ended.
    open: u32,
    /// Room in the command channel for the abort, taken before the request was added: a guard that drops
    /// cannot wait.
    abort: Option<OwnedPermit<Command>>,
}

impl Part {
    pub fn new(
        id: RequestId,
        prompt_tokens: u32,
        choices: Vec<ChoiceText>,
        abort: OwnedPermit<Command>,
    ) -> Self {
        Self {
            id,
            accepted: false,
            prompt_tokens,
            cached_tokens: 0,
            prompt_logprobs: None,
            open: choices.len() as u32,
            choices,
            abort: Some(abort),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.open > 0
            && let Some(room) = self.abort.take()
        {
            room.send(Command::Abort(self.id));
        }
    }
}

impl Generation {
    pub fn new(
        events: Receiver<(usize, RequestEvent)>,
        parts: Vec<Part>,
        commands: Sender<Command>,
        cut: CancellationToken,
        trace: RequestTrace,
    ) -> Self {
        let prompt_tokens = parts.iter().map(|part| part.prompt_tokens).sum();
        let usage = Usage::new(prompt_tokens, 0, 0);
        let (ready, reasons) = (VecDeque::new(), Vec::new());
        Self { events, parts, commands, cut, ready, usage, trace, reasons }
    }

    /// Returns once the engine has taken every part.
    ///
    /// # Errors
    /// Why it refused one.
    pub async fn accepted(&mut self) -> Result<(), ApiError> {
        while self.parts.iter().any(|part| !part.accepted) {
            self.take_event().await?;
        }
        Ok(())
    }

    /// The next piece; `None` when all choices have finished. Nothing may be asked for after an error.
    ///
    /// # Errors
    /// If the model failed, or the server shuts down before the end.
    pub async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        loop {
            if let Some(delta) = self.ready.pop_front() {
                return Ok(Some(delta));
            }
            if self.parts.iter().all(|part| part.choices.iter().all(|choice| choice.finished)) {
                return Ok(None);
            }
            self.take_event().await?;
        }
    }

    /// Tokens up to here.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Bounds how many deltas there can be, as the events behind them are bounded.
    pub fn most_deltas(&self) -> usize {
        self.events.max_capacity()
    }

    /// What the engine said about the prompt of a part; there once its first token is.
    pub fn prompt_logprobs(&self, part: usize) -> Option<&[Option<TokenLogprobs>]> {
        self.parts.get(part)?.prompt_logprobs.as_deref()
    }

    async fn take_event(&mut self) -> Result<(), ApiError> {
        let taken = self.take_next_event().await;
        taken.inspect_err(|error| spans::tell_error(&self.trace, error))
    }

    async fn take_next_event(&mut self) -> Result<(), ApiError> {
        let event = tokio::select! {
            biased;
            event = self.events.recv() => event,
            () = self.cut.cancelled() => return Err(ApiError::Drained),
        };
        // The engine drops the channel without an end only when it is lost.
        let (part, event) = event.ok_or(ApiError::Down)?;
        let Applied { delta, stopped } = self.apply(part, event)?;
        if let Some(mut delta) = delta {
            delta.usage = self.usage;
            if let Some(finish) = delta.finish.as_ref().filter(|_| self.trace.is_recorded()) {
                self.reasons.push(finish.reason);
            }
            self.ready.push_back(delta);
        }
        if let Some((request, choice)) = stopped {
            // An engine that is gone has nothing left to finish.
            let _ = self.commands.send(Command::FinishChoice { request, choice }).await;
            self.parts[part].open -= 1;
        }
        Ok(())
    }

    fn apply(&mut self, at: usize, event: RequestEvent) -> Result<Applied, ApiError> {
        let first_choice: u32 = self.parts[..at].iter().map(|part| part.choices.len() as u32).sum();
        let part = &mut self.parts[at];
        match event {
            RequestEvent::Refused(error) => {
                part.open = 0;
                return Err(ApiError::Admission(error));
            }
            RequestEvent::Accepted => part.accepted = true,
            RequestEvent::Started { cached_tokens } => {
                part.cached_tokens = cached_tokens;
                self.usage.prompt_tokens_details.cached_tokens += cached_tokens;
            }
            RequestEvent::PromptLogprobs(logprobs) => part.prompt_logprobs = Some(logprobs),
            RequestEvent::Token { choice, token, logprobs } => {
                let Some(text) = part.choices.get_mut(choice as usize) else { return Ok(Applied::default()) };
                let Some(mut delta) = text.token(token, logprobs) else { return Ok(Applied::default()) };
                delta.choice = first_choice + choice;
                self.usage.completion_tokens += 1;
                self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens;
                let stopped = delta.finish.is_some().then_some((part.id, choice));
                return Ok(Applied { delta: Some(delta), stopped });
            }
            RequestEvent::Finished { choice, reason } => {
                let Some(text) = part.choices.get_mut(choice as usize) else { return Ok(Applied::default()) };
                if text.finished {
                    return Ok(Applied::default());
                }
                part.open -= 1;
                let mut delta = text.finish(reason)?;
                delta.choice = first_choice + choice;
                return Ok(Applied { delta: Some(delta), stopped: None });
            }
        }
        Ok(Applied::default())
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        spans::tell_answer(&self.trace, &self.reasons, &self.usage);
    }
}

/// The text of one choice as it grows.
pub struct ChoiceText {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Tokens that end the choice, as the engine has them.
    stop_tokens: Arc<[TokenId]>,
    eos: Arc<[TokenId]>,
    include_stop: bool,
    finished: bool,
}

impl ChoiceText {
    /// # Errors
    /// If a stop string is empty.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        prompt: &[TokenId],
        common: &CommonFields,
        stop_tokens: Arc<[TokenId]>,
        eos: Arc<[TokenId]>,
    ) -> Result<Self, ApiError> {
        let include_stop = common.include_stop_str_in_output;
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer, prompt, common.skip_special_tokens),
            stops: StopStrings::new(common.stop.clone(), include_stop)?,
            stop_tokens,
            eos,
            include_stop,
            finished: false,
        })
    }

    /// `None` for tokens that the engine computed before it learned of a stop string.
    fn token(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) -> Option<Delta> {
        if self.finished {
            return None;
        }
        let mut delta = Delta { token: Some((token, logprobs)), ..Delta::default() };
        // The token that ends the answer is no part of its text, special or not, as in vLLM.
        if self.stop_tokens.contains(&token) && !self.include_stop {
            return Some(delta);
        }
        // A row of the logits without an entry in the vocabulary has no text.
        let text = self.detokenizer.push(token).unwrap_or_default();
        match self.stops.feed(&text) {
            Fed::Continue { text } => delta.text = text,
            Fed::Stopped { text, stop } => {
                delta.text = text;
                delta.finish = Some(self.stopped(StopReason::Text(stop)));
            }
        }
        Some(delta)
    }

    /// The text held back until now, and the reason.
    fn finish(&mut self, reason: FinishReason) -> Result<Delta, ApiError> {
        let finish = self.finish_reason(reason)?;
        let rest = self.detokenizer.finish();
        let mut delta = Delta::default();
        match self.stops.feed(&rest) {
            Fed::Continue { text } => {
                delta.text = text + &self.stops.finish();
                delta.finish = Some(finish);
            }
            Fed::Stopped { text, stop } => {
                delta.text = text;
                delta.finish = Some(self.stopped(StopReason::Text(stop)));
            }
        }
        self.finished = true;
        Ok(delta)
    }

    fn stopped(&mut self, stop_reason: StopReason) -> Finish {
        self.finished = true;
        Finish { reason: servelab_wire::FinishReason::Stop, stop_reason: Some(stop_reason) }
    }

    fn finish_reason(&self, reason: FinishReason) -> Result<Finish, ApiError> {
        let (reason, token) = match reason {
            FinishReason::Stop(token) => (servelab_wire::FinishReason::Stop, token),
            FinishReason::Length => (servelab_wire::FinishReason::Length, None),
            // Only the server itself aborts a request that somebody still reads.
            FinishReason::Abort => return Err(ApiError::Drained),
            FinishReason::Error(detail) => return Err(ApiError::Model(detail)),
        };
        let stop_reason = token.filter(|token| !self.eos.contains(token)).map(StopReason::Token);
        Ok(Finish { reason, stop_reason })
    }
}
