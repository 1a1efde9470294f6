//! Throughput of one replica of the 70B for batches and lengths that people quote, against F3.

use super::{LARGE_MODEL_GPUS, Outcome, expect, on, simulate_one};
use crate::experiments::ExperimentError;
use crate::experiments::lab::{Lab, Said, Shape};
use crate::experiments::measurement::PredictionKind;
use crate::ledger::calculation::Calculation;

/// Requests that run at once, and their lengths.
const POINTS: [(&str, u32, Shape); 4] = [
    ("tokens_per_second_32", 32, Shape { input_tokens: 2000, output_tokens: 500 }),
    ("tokens_per_second_64", 64, Shape { input_tokens: 2000, output_tokens: 500 }),
    ("tokens_per_second_128", 128, Shape { input_tokens: 2000, output_tokens: 500 }),
    ("tokens_per_second_short", 256, Shape { input_tokens: 1000, output_tokens: 1000 }),
];
const SINGLE: Shape = Shape { input_tokens: 2000, output_tokens: 500 };

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let single = Calculation::DecodeStep {
        on: on(LARGE_MODEL_GPUS),
        sequences: 1.0,
        context_tokens: context_tokens(SINGLE),
    };
    let said = expect(lab, "single_tpot_seconds", "TPOT of one request", PredictionKind::Floor, &single)?;
    let mut all = Vec::new();
    for (key, batch, shape) in POINTS {
        all.push((ceiling(lab, key, batch, shape)?, batch, shape));
    }
    let alone = full(lab, 1, SINGLE).await?;
    lab.found(said, Outcome::percentiles(alone.tpot_seconds)?.p50, None, None);
    for (said, batch, shape) in all {
        let outcome = full(lab, batch, shape).await?;
        let rate = outcome.output_tokens as f64 / outcome.seconds / f64::from(LARGE_MODEL_GPUS);
        let note = "the prompts of those that follow take their time in between".to_owned();
        lab.found(said, rate, None, Some(note));
    }
    Ok(())
}

fn ceiling(lab: &mut Lab<'_>, key: &'static str, batch: u32, shape: Shape) -> Result<Said, ExperimentError> {
    let label =
        format!("TP{LARGE_MODEL_GPUS}, {}/{} tokens, B={batch}", shape.input_tokens, shape.output_tokens);
    let calculation = Calculation::DecodeThroughput {
        on: on(LARGE_MODEL_GPUS),
        sequences: f64::from(batch),
        context_tokens: context_tokens(shape),
    };
    expect(lab, key, label, PredictionKind::Ceiling, &calculation)
}

/// One replica with always so many requests.
async fn full(lab: &mut Lab<'_>, batch: u32, shape: Shape) -> Result<Outcome, ExperimentError> {
    lab.progress(&format!("{batch} requests at once"));
    let gpus = LARGE_MODEL_GPUS.to_string();
    let (users, input, output) =
        (batch.to_string(), shape.input_tokens.to_string(), shape.output_tokens.to_string());
    let lengths = ["--input-tokens", &input, "--output-tokens", &output, "--duration", "10m"];
    let load = ["--replicas", "1", "--tp", &gpus, "--users", &users, "--think-time", "0"];
    simulate_one(lab, &[&load[..], &lengths].concat()).await
}

/// The mean over the life of a request.
fn context_tokens(shape: Shape) -> f64 {
    f64::from(shape.input_tokens) + f64::from(shape.output_tokens) / 2.0
}
