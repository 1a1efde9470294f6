//! What 80 ms at the 99th percentile and 99.9 % can mean: the tails of TTFT, TPOT and whole answers of the 8B at a
//! moderate load, and what crashes break off.

use servelab_sim::numbers::{grouped, seconds};

use super::{Outcome, expect, on, simulate_one};
use crate::experiments::ExperimentError;
use crate::experiments::lab::{Lab, Shape};
use crate::experiments::measurement::PredictionKind;
use crate::ledger::Unit;
use crate::ledger::calculation::Calculation;

const SHAPE: Shape = Shape { input_tokens: 200, output_tokens: 300 };
const REPLICAS: u32 = 4;
const REQUESTS_PER_SECOND: f64 = 20.0;
const CRASHES_PER_HOUR: f64 = 4.0;
/// The lost ones are told of so many.
const OF_REQUESTS: f64 = 100_000.0;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let (on, tokens) = (on(1), f64::from(SHAPE.output_tokens));
    let step = Calculation::DecodeStep { on: on.clone(), sequences: 1.0, context_tokens: 0.0 };
    let prefill = Calculation::Prefill { on: on.clone(), tokens: SHAPE.input_tokens.into() };
    let answer = Calculation::AnswerFloor { on, tokens };
    let label = format!("p99 TTFT, prompts of {} tokens", SHAPE.input_tokens);
    let ttft = expect(lab, "ttft_p99_seconds", label, PredictionKind::Floor, &prefill)?;
    let tpot = expect(lab, "tpot_p99_seconds", "p99 TPOT", PredictionKind::Floor, &step)?;
    let label = format!("p99 of answers of {tokens} tokens");
    let e2e = expect(lab, "e2e_p99_seconds", label, PredictionKind::Floor, &answer)?;
    let outcome = load(lab, "0").await?;
    let p99 = |found| Outcome::percentiles(found).map(|percentiles| percentiles.p99);
    let note = format!("{REPLICAS} replicas, {REQUESTS_PER_SECOND} requests/s");
    lab.found(ttft, p99(outcome.ttft_seconds)?, None, Some(note));
    lab.found(tpot, p99(outcome.tpot_seconds)?, None, None);
    let e2e_seconds = Outcome::percentiles(outcome.e2e_seconds)?;
    lab.found(e2e, e2e_seconds.p99, None, None);
    crashes(lab, e2e_seconds.p50).await
}

/// A crash breaks off what its replica answers at that moment.
async fn crashes(lab: &mut Lab<'_>, residence_seconds: f64) -> Result<(), ExperimentError> {
    let broken_an_hour = CRASHES_PER_HOUR * REQUESTS_PER_SECOND * residence_seconds / f64::from(REPLICAS);
    let of_requests = broken_an_hour / (REQUESTS_PER_SECOND * 3600.0) * OF_REQUESTS;
    let said = lab.predict(
        "lost_requests",
        format!(
            "broken off of {} requests, with {CRASHES_PER_HOUR} crashes an hour of {REPLICAS} replicas",
            grouped(OF_REQUESTS)
        ),
        Unit::Requests,
        PredictionKind::Equal,
        of_requests,
        format!(
            "F7: a replica has {REQUESTS_PER_SECOND}/s x {} / {REPLICAS} in flight at each crash",
            seconds(residence_seconds)
        ),
    );
    let rate = CRASHES_PER_HOUR.to_string();
    let outcome = load(lab, &rate).await?;
    let lost = (outcome.requests - outcome.completed) as f64 / outcome.requests as f64 * OF_REQUESTS;
    let note = "99.9 % allows 100; a request without a first token goes to another replica, and is not lost";
    lab.found(said, lost, None, Some(note.to_owned()));
    Ok(())
}

async fn load(lab: &mut Lab<'_>, crashes_per_hour: &str) -> Result<Outcome, ExperimentError> {
    lab.progress(&format!("{crashes_per_hour} crashes an hour"));
    let (input, output) = (SHAPE.input_tokens.to_string(), SHAPE.output_tokens.to_string());
    let (replicas, rate) = (REPLICAS.to_string(), REQUESTS_PER_SECOND.to_string());
    let lengths = ["--input-tokens", &input, "--output-tokens", &output];
    let load = ["--replicas", &replicas, "--rate", &rate, "--duration", "2h"];
    let faults = ["--crashes-per-hour", crashes_per_hour];
    simulate_one(lab, &[&load[..], &lengths, &faults].concat()).await
}
