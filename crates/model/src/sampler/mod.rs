//! From a row of logits to a token, the same token in whatever batch the row was computed.
//!
//! The order of the modifications is vLLM's: logit bias and banned tokens, penalties, temperature,
//! min_p, top_k, top_p. Log-probabilities are taken from the logits before all of that.

mod exp;
mod philox;
mod select;

use std::collections::HashMap;

use servelab_engine::{
    Draw, History, LogitsRow, RowOutput, RunnerError, SamplingParams, TokenId, TokenLogprobs, Want,
};

use exp::exp_nonpositive;
pub use philox::{philox4x32, uniform};
use select::{Candidate, argmax, keep_first, keep_nucleus, top_k};

/// Answers rows of logits; keeps its buffers from row to row.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    /// Probability of each token relative to the likeliest. `[vocabulary]`
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    counts: HashMap<TokenId, u32>,
}

impl Sampler {
    /// Answers one row. `logits` are the model's, `[vocabulary]`.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if the logits hold NaN or infinity, or if every token is banned.
    pub fn answer(&mut self, logits: &[f32], row: &LogitsRow) -> Result<RowOutput, RunnerError> {
        let (likeliest, largest) = argmax(logits);
        check(logits, largest)?;
        match &row.want {
            Want::Score { target, top } => {
                let logprobs = self.logprobs(logits, largest, *target, *top)?;
                Ok(RowOutput { token: *target, logprobs: Some(logprobs) })
            }
            Want::Sample(draw) => {
                let token = if is_plain_greedy(draw) { likeliest } else { self.draw(logits, draw)? };
                let logprobs = match draw.sampling.logprobs {
                    Some(top) => Some(self.logprobs(logits, largest, token, top)?),
                    None => None,
                };
                Ok(RowOutput { token, logprobs })
            }
        }
    }

    /// Natural-log probabilities of `token` and of the `top` likeliest tokens.
    fn logprobs(
        &mut self,
        logits: &[f32],
        largest: f32,
        token: TokenId,
        top: u32,
    ) -> Result<TokenLogprobs, RunnerError> {
        let Some(logit) = logits.get(token as usize).copied() else {
            let size = logits.len();
            return Err(RunnerError::Step(format!("token {token} is not in the vocabulary of {size}")));
        };
        let ln_sum = ln_of_sum(logits, largest);
        let logprob = |logit: f32| (f64::from(logit) - f64::from(largest) - ln_sum) as f32;
        top_k(logits, top as usize, &mut self.candidates);
        Ok(TokenLogprobs {
            logprob: logprob(logit),
            rank: 1 + logits.iter().filter(|other| **other > logit).count() as u32,
            top: self.candidates.iter().map(|(token, logit)| (*token, logprob(*logit))).collect(),
        })
    }

    /// Modifies a copy of the logits as the request asks and chooses.
    fn draw(&mut self, logits: &[f32], draw: &Draw) -> Result<TokenId, RunnerError> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let params = &*draw.sampling;
        for (token, bias) in &params.logit_bias {
            add(&mut self.logits, *token, *bias);
        }
        for token in draw.banned.iter() {
            add(&mut self.logits, *token, f32::NEG_INFINITY);
        }
        if let Some(history) = &draw.history {
            self.penalise(params, history);
        }
        let (likeliest, largest) = argmax(&self.logits);
        if !largest.is_finite() {
            return Err(RunnerError::Step(
                "logit bias and banned tokens leave no token to choose".to_owned(),
            ));
        }
        if params.temperature == 0.0 {
            return Ok(likeliest);
        }
        let point = uniform(draw.sampling.seed, draw.choice, draw.output_index);
        let weight = Weight { largest, temperature: params.temperature };
        if params.top_k.is_none() && params.top_p >= 1.0 && params.min_p <= 0.0 {
            self.weights.clear();
            self.weights.extend(self.logits.iter().map(|logit| weight.of(*logit)));
            let all = self.weights.iter().enumerate().map(|(token, weight)| (token as TokenId, *weight));
            return Ok(choose(all, point).unwrap_or(likeliest));
        }
        self.truncate(params, weight);
        let kept = self.candidates.iter().map(|(token, logit)| (*token, weight.of(*logit)));
        Ok(choose(kept, point).unwrap_or(likeliest))
    }

    fn penalise(&mut self, params: &SamplingParams, history: &History) {
        self.counts.clear();
        for token in &history.output {
            *self.counts.entry(*token).or_default() += 1;
        }
        // Tokens of the prompt count as seen for the repetition penalty only.
        for token in history.prompt.iter() {
            self.counts.entry(*token).or_default();
        }
        for (token, count) in &self.counts {
            let Some(logit) = self.logits.get_mut(*token as usize) else { continue };
            let repetition = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if *count > 0 {
                *logit -= params.frequency_penalty * *count as f32 + params.presence_penalty;
            }
        }
    }

    /// Leaves in `candidates` what min_p, top_k and top_p keep, each on what the one before kept.
    fn truncate(&mut self, params: &SamplingParams, weight: Weight) {
        let kept = |logit: f32| logit > f32::NEG_INFINITY && weight.of(logit) >= params.min_p;
        self.candidates.clear();
        let all = self.logits.iter().enumerate().map(|(token, logit)| (token as TokenId, *logit));
        self.candidates.extend(all.filter(|(_, logit)| kept(*logit)));
        if let Some(k) = params.top_k {
            keep_first(&mut self.candidates, k.max(1) as usize);
        }
        if params.top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(|(_, logit)| f64::from(weight.of(*logit))).sum();
            let target = f64::from(params.top_p) * total;
            keep_nucleus(&mut self.candidates, target, |logit| f64::from(weight.of(logit)));
        }
    }
}

fn is_plain_greedy(draw: &Draw) -> bool {
    let params = &draw.sampling;
    params.temperature == 0.0
        && params.logit_bias.is_empty()
        && draw.banned.is_empty()
        && draw.history.is_none()
}

fn add(logits: &mut [f32], token: TokenId, value: f32) {
    // A token outside the vocabulary can never be chosen anyway.
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit += value;
    }
}

/// The probability of a logit relative to the likeliest token's: 1 for that token itself.
#[derive(Clone, Copy)]
struct Weight {
    largest: f32,
    temperature: f32,
}

impl Weight {
    fn of(self, logit: f32) -> f32 {
        // 0 / 0 does not occur: the temperature of a draw is above 0.
        exp_nonpositive((logit - self.largest) / self.temperature)
    }
}

/// Inverts the cumulative distribution of `weights` at `point` of [0, 1). `None` if there is nothing to
/// choose from.
fn choose(weights: impl Iterator<Item = (TokenId, f32)> + Clone, point: f64) -> Option<TokenId> {
    let total: f64 = weights.clone().map(|(_, weight)| f64::from(weight)).sum();
    let (mut rest, mut last) = (point * total, None);
    for (token, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        last = Some(token);
        rest -= f64::from(weight);
        if rest < 0.0 {
            break;
        }
    }
    last
}

/// `ln(sum(exp(logit - largest)))`: with the largest taken off first nothing overflows, and nothing is
/// rounded away where all logits are large.
fn ln_of_sum(logits: &[f32], largest: f32) -> f64 {
    logits.iter().map(|logit| f64::from(exp_nonpositive(logit - largest))).sum::<f64>().ln()
}

/// Weights that are broken, or a value that overflowed, show as NaN or infinity.
fn check(logits: &[f32], largest: f32) -> Result<(), RunnerError> {
    let finite = largest.is_finite() && !logits.iter().any(|logit| logit.is_nan());
    if finite {
        return Ok(());
    }
    Err(RunnerError::Step("the model's logits are not finite numbers; its weights may be damaged".to_owned()))
}

#[cfg(test)]
mod tests;
