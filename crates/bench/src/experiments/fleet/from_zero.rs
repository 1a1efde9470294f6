//! A fleet that sleeps while nobody asks: scaled on what the router holds, and on a gauge of replicas that are not
//! there.

use super::{Outcome, simulate};
use crate::experiments::ExperimentError;
use crate::experiments::lab::Lab;
use crate::experiments::measurement::PredictionKind;
use crate::ledger::Unit;

/// The scaler that is quoted comes first.
const SCALERS: [(&str, &str, &str, f64, &str); 2] = [
    (
        "never-wakes",
        "answered_quoted",
        "answered, scaled on the replicas' own queue",
        0.0,
        "at 0 replicas the sum is empty, empty is 0 for KEDA, and 0 is not above the activation threshold",
    ),
    (
        "from-zero",
        "answered_right",
        "answered, scaled on what the router has in flight",
        1.0,
        "the router is there at 0 replicas, and holds what arrives until one is ready",
    ),
];

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let all = SCALERS.map(|(scaler, key, label, share, because)| {
        let kind = PredictionKind::Equal;
        (scaler, lab.predict(key, label, Unit::Share, kind, share, because.to_owned()))
    });
    let wait = Lab::unpredicted("wait_seconds", "p99 TTFT of the one that wakes", Unit::Seconds);
    let shape = ["--shape", "from-zero", "--rate", "10", "--workload", "azure-chat", "--duration", "30m"];
    let scalers = ["--scaler", SCALERS[0].0, "--scaler", SCALERS[1].0];
    let outcomes = simulate(lab, &[&shape[..], &scalers].concat()).await?;
    if outcomes.len() != SCALERS.len() {
        return Err(ExperimentError::NotUnderstood("an outcome for each scaler"));
    }
    let mut last = None;
    for (outcome, (scaler, said)) in outcomes.into_iter().zip(all) {
        let share = outcome.completed as f64 / outcome.requests as f64;
        let note = format!("{scaler}: {} of {} requests", outcome.completed, outcome.requests);
        lab.found(said, share, None, Some(note));
        last = outcome.ttft_seconds;
    }
    let note = "the first ones wait for image, weights and warm-up".to_owned();
    lab.found(wait, Outcome::percentiles(last)?.p99, None, Some(note));
    Ok(())
}
