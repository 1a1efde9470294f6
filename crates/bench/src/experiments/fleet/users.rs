//! The smallest fleet of the 70B with p95 TTFT below a second for a thousand users: all of them active, and users
//! who read for half a minute before they ask again.

use servelab_sim::numbers::{grouped, seconds};

use super::{LARGE_MODEL_GPUS, expect, on, smallest_fleet};
use crate::experiments::ExperimentError;
use crate::experiments::expect::Curve;
use crate::experiments::lab::{Lab, Shape};
use crate::experiments::measurement::PredictionKind;
use crate::ledger::calculation::Calculation;

const USERS: u32 = 1000;
const SHAPE: Shape = Shape { input_tokens: 2000, output_tokens: 300 };
const THINK_SECONDS: f64 = 30.0;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let label = "GPUs for 1,000 users who all wait for an answer, held in memory at once";
    let active = expect(lab, "gpus_active", label, PredictionKind::Floor, &held(USERS.into()))?;
    let waiting = least_waiting(lab)?;
    let residence = seconds(waiting.residence_seconds);
    let label = format!(
        "GPUs for 1,000 users who read for {THINK_SECONDS} s between two requests: answers take {residence} at least, \
         and {} of them wait for one",
        grouped(waiting.users)
    );
    let thinking =
        expect(lab, "gpus_thinking", label, PredictionKind::Floor, &held(waiting.users.ceil() as u64))?;
    for (said, think, progress) in [
        (active, "0".to_owned(), "all of them active"),
        (thinking, format!("{THINK_SECONDS}s"), "with think time"),
    ] {
        lab.progress(progress);
        let (input, output) = (SHAPE.input_tokens.to_string(), SHAPE.output_tokens.to_string());
        let lengths = ["--input-tokens", &input, "--output-tokens", &output, "--slo", "ttft=1s@p95"];
        let users = USERS.to_string();
        let load = ["--users", &users, "--think-time", &think];
        let gpus = smallest_fleet(lab, &[&load[..], &lengths].concat()).await?;
        let note = format!("{} replicas of {LARGE_MODEL_GPUS} GPUs", gpus / u64::from(LARGE_MODEL_GPUS));
        lab.found(said, gpus as f64, None, Some(note));
    }
    Ok(())
}

fn held(requests: u64) -> Calculation {
    let tokens_per_request = (SHAPE.input_tokens + SHAPE.output_tokens).into();
    Calculation::GpusToHold { on: on(LARGE_MODEL_GPUS), requests, tokens_per_request }
}

struct Waiting {
    residence_seconds: f64,
    users: f64,
}

/// Little's law for users who wait and think in turn: `users * W / (W + think)` wait. W is at least the prompt and
/// the steps at the roofline, for one request alone.
fn least_waiting(lab: &Lab<'_>) -> Result<Waiting, ExperimentError> {
    let gpus = servelab_sim::formulas::Gpus { count: LARGE_MODEL_GPUS, ..lab.gpus()? };
    let context_tokens = f64::from(SHAPE.input_tokens) + f64::from(SHAPE.output_tokens) / 2.0;
    let curve = Curve { model: lab.decode_model(), gpus, context_tokens };
    let prompt = lab.prefill()?.floor_seconds(0, SHAPE.input_tokens) / f64::from(LARGE_MODEL_GPUS);
    let residence_seconds = prompt + f64::from(SHAPE.output_tokens - 1) / curve.tokens_per_second(1.0);
    let users = f64::from(USERS) * residence_seconds / (residence_seconds + THINK_SECONDS);
    Ok(Waiting { residence_seconds, users })
}
