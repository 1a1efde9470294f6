//! How fast a server is with one request alone, and what each further one costs it.

use std::time::Duration;

use super::ExperimentError;
use super::lab::{Lab, Pace, Shape};
use super::mfu::{Growth, Mfu};
use super::window::steady;
use crate::client::Observed;
use crate::stats;

const REPEATS: u32 = 7;
const SHORT_PROMPT: u32 = 32;
const LONG_PROMPT: u32 = 256;
/// Whose attention shows.
const LONGER_PROMPT: u32 = 1024;
const LONGER_REPEATS: u32 = 3;
const OUTPUT: u32 = 32;
/// Sequences that decode together.
const FEW: u32 = 4;
const FEW_OUTPUT: u32 = 96;
const FEW_REPEATS: u32 = 3;

/// First tokens of short and of longer prompts, and the gaps of an answer.
pub async fn measure(lab: &mut Lab<'_>) -> Result<Pace, ExperimentError> {
    let wanted = SHORT_PROMPT + OUTPUT;
    if lab.max_model_len() < 2 * wanted {
        return Err(ExperimentError::ShortContext { max_model_len: lab.max_model_len(), wanted: 2 * wanted });
    }
    let long = LONG_PROMPT.min(lab.max_model_len() / 2);
    answer(lab, SHORT_PROMPT, OUTPUT).await?;
    let (mut short_seconds, mut long_seconds, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let observed = answer(lab, SHORT_PROMPT, OUTPUT).await?;
        short_seconds.push(ttft(&observed));
        steps.push(tpot(&observed));
        long_seconds.push(ttft(&answer(lab, long, 1).await?));
    }
    let (short, step) = (median(&mut short_seconds), median(&mut steps));
    let more_seconds = median(&mut long_seconds) - short;
    if more_seconds <= 0.0 {
        let told = format!("prompts of {long} tokens take no longer than those of {SHORT_PROMPT}");
        return Err(ExperimentError::DoesNotStand(told));
    }
    let per_token = more_seconds / f64::from(long - SHORT_PROMPT);
    let longer = LONGER_PROMPT.min(lab.max_model_len() - 1).max(long);
    let mut longer_seconds = Vec::new();
    for _ in 0..LONGER_REPEATS {
        longer_seconds.push(ttft(&answer(lab, longer, 1).await?));
    }
    let near = Growth { from_tokens: SHORT_PROMPT, to_tokens: long, more_seconds };
    let far_seconds = median(&mut longer_seconds) - short - more_seconds;
    let far = Growth { from_tokens: long, to_tokens: longer, more_seconds: far_seconds };
    let far = if longer > long && far_seconds > 0.0 { far } else { near };
    let mfu = Mfu::fitted(lab.prefill()?, near, far);
    Ok(Pace {
        step_seconds: step,
        step_more_seconds: ((few_step(lab).await? - step) / f64::from(FEW - 1)).max(0.0),
        overhead_seconds: (short - f64::from(SHORT_PROMPT) * per_token).max(0.0),
        prefill_seconds_per_token: per_token,
        mfu,
    })
}

/// Seconds of a step of a few sequences.
async fn few_step(lab: &mut Lab<'_>) -> Result<f64, ExperimentError> {
    let output_tokens = FEW_OUTPUT.min(lab.max_model_len() - SHORT_PROMPT);
    let mut steps = Vec::new();
    for _ in 0..FEW_REPEATS {
        let records = lab.together(FEW, Shape { input_tokens: SHORT_PROMPT, output_tokens }).await?;
        let together = steady(&records)
            .ok_or_else(|| ExperimentError::DoesNotStand(format!("{FEW} requests never decoded at once")))?;
        steps.push(f64::from(FEW) / together.tokens_per_second);
    }
    Ok(median(&mut steps))
}

async fn answer(lab: &mut Lab<'_>, input: u32, output: u32) -> Result<Observed, ExperimentError> {
    let prompt = lab.fresh(input);
    let outgoing = lab.write(vec![prompt], output)?;
    lab.ask(&outgoing).await
}

/// From sending to the first token.
pub fn ttft(observed: &Observed) -> f64 {
    let at = |time: Option<Duration>| time.unwrap_or_default();
    at(observed.first_token).saturating_sub(at(observed.sent)).as_secs_f64()
}

/// Mean time between two tokens. Single gaps tell less: tokens may come in pairs.
fn tpot(observed: &Observed) -> f64 {
    let at = |time: Option<Duration>| time.unwrap_or_default();
    let decoding = at(observed.last_token).saturating_sub(at(observed.first_token));
    decoding.as_secs_f64() / f64::from(OUTPUT - 1)
}

pub fn median(sample: &mut [f64]) -> f64 {
    sample.sort_unstable_by(f64::total_cmp);
    stats::percentile(sample, 50.0)
}
