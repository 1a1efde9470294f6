//! Log-probabilities of the engine in the shapes of the API.

use serde_json::{Map, Value};
use servelab_engine::{TokenId, TokenLogprobs};
use servelab_text::Tokenizer;
use servelab_wire::{
    ChatLogprobs, CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob,
};

/// JSON has no infinity; this is what OpenAI reports for a token of no probability.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST }
}

fn bytes(tokenizer: &Tokenizer, token: TokenId) -> Vec<u8> {
    tokenizer.token_bytes(token).unwrap_or_else(|| tokenizer.token_text(token).into_bytes())
}

/// One generated token of a chat.
pub fn chat(tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs) -> TokenLogprob {
    let top = logprobs.top.iter().map(|(token, logprob)| TopLogprob {
        token: tokenizer.token_text(*token),
        logprob: finite(*logprob),
        bytes: bytes(tokenizer, *token),
    });
    TokenLogprob {
        token: tokenizer.token_text(token),
        logprob: finite(logprobs.logprob),
        bytes: bytes(tokenizer, token),
        top_logprobs: top.collect(),
    }
}

/// Those of one delta, or none.
pub fn of_delta(
    tokenizer: &Tokenizer,
    token: Option<&(TokenId, Option<TokenLogprobs>)>,
) -> Option<ChatLogprobs> {
    let (token, logprobs) = token?;
    Some(ChatLogprobs { content: vec![chat(tokenizer, *token, logprobs.as_ref()?)] })
}

/// Grows the parallel lists of a text completion.
pub struct CompletionColumns<'a> {
    tokenizer: &'a Tokenizer,
    columns: CompletionLogprobs,
    /// Characters before the next token.
    offset: usize,
    /// Alternatives to report.
    top: usize,
}

impl<'a> CompletionColumns<'a> {
    pub fn new(tokenizer: &'a Tokenizer, offset: usize, top: u32) -> Self {
        Self { tokenizer, columns: CompletionLogprobs::default(), offset, top: top as usize }
    }

    /// Adds a token; the first of a prompt has no probability.
    pub fn push(&mut self, token: TokenId, logprobs: Option<&TokenLogprobs>) {
        let text = self.tokenizer.token_text(token);
        self.columns.text_offset.push(self.offset);
        self.offset += text.chars().count();
        self.columns.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        self.columns.top_logprobs.push(logprobs.map(|logprobs| self.top(token, &text, logprobs)));
        self.columns.tokens.push(text);
    }

    /// The likeliest tokens and, as at OpenAI, the token itself even if it is none of them.
    fn top(&self, token: TokenId, text: &str, logprobs: &TokenLogprobs) -> Map<String, Value> {
        let likeliest = logprobs.top.iter().take(self.top);
        let mut top: Map<String, Value> = likeliest
            .map(|(token, logprob)| (self.tokenizer.token_text(*token), finite(*logprob).into()))
            .collect();
        if !logprobs.top.iter().take(self.top).any(|(other, _)| *other == token) {
            top.insert(text.to_owned(), finite(logprobs.logprob).into());
        }
        top
    }

    pub fn finish(self) -> CompletionLogprobs {
        self.columns
    }

    /// Characters up to here.
    pub fn offset(&self) -> usize {
        self.offset
    }
}

/// vLLM's `prompt_logprobs`: the likeliest `top` tokens and the prompt's own.
pub fn prompt(
    tokenizer: &Tokenizer,
    tokens: &[TokenId],
    logprobs: &[Option<TokenLogprobs>],
    top: u32,
) -> PromptLogprobs {
    let entry = |token: TokenId, logprob: f32, rank: u32| {
        (token, PromptLogprob { logprob: finite(logprob), rank, decoded_token: tokenizer.token_text(token) })
    };
    let position = |(token, logprobs): (&TokenId, &Option<TokenLogprobs>)| {
        let logprobs = logprobs.as_ref()?;
        let likeliest = logprobs.top.iter().take(top as usize).zip(1..);
        let likeliest = likeliest.map(|((token, logprob), rank)| entry(*token, *logprob, rank));
        Some(likeliest.chain([entry(*token, logprobs.logprob, logprobs.rank)]).collect())
    };
    tokens.iter().zip(logprobs).map(position).collect()
}
