//! A few coefficients in place of a data sheet, fitted to measured points of a server: [`fit`].
//!
//! A step takes `alpha + beta * B + gamma * context` and, if it computes prompts, `zeta`, `delta` a token and `epsilon` a
//! pair of tokens (the curve of prefill). B is the number of decoding sequences, context the sum of theirs. What the
//! tokens take, `beta * B + delta * P` with P tokens of prompts, is at least `omega`: the weights are read meanwhile, and
//! until there are enough tokens that takes longer (the roofline; Williams, Waterman and Patterson 2009).

use serde::{Deserialize, Serialize};

use crate::cost::StepSums;

/// How long steps of one model on one device take.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The model that was measured. The coefficients hold for no other.
    pub model: String,
    /// GPUs of the replica that was measured.
    pub gpus: u32,
    /// alpha: of every step.
    pub step_seconds: f64,
    /// omega: of reading the weights, behind which tokens are hidden until they take longer.
    #[serde(default)]
    pub weights_seconds: f64,
    /// beta: of each sequence that decodes.
    pub decode_seconds: f64,
    /// gamma: of each token of context of those sequences.
    pub context_token_seconds: f64,
    /// zeta: of a step that computes prompts, however long they are. Kernels for many rows differ from those for a few.
    #[serde(default)]
    pub prefill_step_seconds: f64,
    /// delta: of each token of a prompt.
    pub prefill_token_seconds: f64,
    /// epsilon: of each pair of a token of a prompt and one that it attends to.
    pub prefill_pair_seconds: f64,
    /// tau: of a request before and after the engine: HTTP, tokenizer. The simulated fleet adds it to what a client sees;
    /// a server with a simulated device takes its own time for that.
    #[serde(default)]
    pub request_seconds: f64,
}

/// A coefficient that no device can have.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("calibration.{field} is {value}; it must be {rule}")]
pub struct CalibrationError {
    field: &'static str,
    value: f64,
    rule: &'static str,
}

impl Calibration {
    /// # Errors
    /// The first coefficient that no device can have.
    pub fn validate(&self) -> Result<(), CalibrationError> {
        let seconds = [
            ("step_seconds", self.step_seconds),
            ("weights_seconds", self.weights_seconds),
            ("decode_seconds", self.decode_seconds),
            ("context_token_seconds", self.context_token_seconds),
            ("prefill_step_seconds", self.prefill_step_seconds),
            ("prefill_token_seconds", self.prefill_token_seconds),
            ("prefill_pair_seconds", self.prefill_pair_seconds),
            ("request_seconds", self.request_seconds),
        ];
        let wrong = seconds.into_iter().find(|(_, value)| !(0.0..=1e3).contains(value));
        if let Some((field, value)) = wrong {
            return Err(CalibrationError { field, value, rule: "from 0 to 1000 seconds" });
        }
        match self.gpus {
            1..=1024 => Ok(()),
            gpus => Err(CalibrationError { field: "gpus", value: f64::from(gpus), rule: "from 1 to 1024" }),
        }
    }

    /// Of a step that these are the sums of; 0 for an empty one.
    pub(crate) fn seconds(&self, StepSums { decode, prefill }: &StepSums) -> f64 {
        if decode.new_tokens + prefill.new_tokens == 0 {
            return 0.0;
        }
        let prompts = if prefill.new_tokens > 0 { self.prefill_step_seconds } else { 0.0 };
        let tokens = decode.new_tokens as f64 * self.decode_seconds
            + prefill.new_tokens as f64 * self.prefill_token_seconds;
        self.step_seconds
            + prompts
            + tokens.max(self.weights_seconds)
            + decode.context_tokens as f64 * self.context_token_seconds
            + prefill.pairs * self.prefill_pair_seconds
    }
}
