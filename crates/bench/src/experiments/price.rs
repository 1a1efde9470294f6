//! F10 at the throughput of a closed loop.

use servelab_sim::formulas::dollars_per_million_tokens;
use servelab_sim::numbers::{dollars, short};

use super::ExperimentError;
use super::expect::Curve;
use super::lab::Lab;
use super::measurement::PredictionKind;
use super::naive::{INPUT_TOKENS, output_rate, shape};
use crate::ledger::Unit;

const CLIENTS: u32 = 16;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let shape = shape(lab).await?;
    let context_tokens = f64::from(INPUT_TOKENS) + f64::from(shape.output_tokens) / 2.0;
    let curve = Curve { model: lab.decode_model(), gpus: lab.gpus()?, context_tokens };
    let prefill = lab.prefill()?.floor_seconds(0, INPUT_TOKENS);
    let limit = curve.output_rate(CLIENTS, prefill, shape.output_tokens);
    let hourly = lab.subject.dollars_per_hour;
    let said = lab.predict(
        "dollars_per_million_tokens",
        format!("output at {}/h, {CLIENTS} clients", dollars(hourly)),
        Unit::DollarsPerMillionTokens,
        PredictionKind::Floor,
        dollars_per_million_tokens(hourly, limit),
        format!(
            "F10: {} / ({} tok/s x 3600) x 1M, with F6 at every FLOP and F3 at B={CLIENTS}",
            dollars(hourly),
            short(limit)
        ),
    );
    let rate = output_rate(lab, CLIENTS, shape).await?;
    let note = format!("at {} tok/s; the price of an hour is an assumption", short(rate));
    lab.found(said, dollars_per_million_tokens(hourly, rate), None, Some(note));
    Ok(())
}
