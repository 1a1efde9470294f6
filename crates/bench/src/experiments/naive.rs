//! What continuous batching and a paged KV cache buy: the same closed loop against the naive engine, which takes one
//! request at a time, and against the paged one with one client and with several.

use std::time::Duration;

use servelab_sim::numbers::short;

use super::ExperimentError;
use super::expect::Curve;
use super::lab::{Lab, Shape};
use super::measurement::PredictionKind;
use crate::ledger::Unit;
use crate::measure::Tally;
use crate::phases::{Extent, PhasePlan};
use crate::run::LoadShape;

pub const CLIENTS: u32 = 8;
pub const INPUT_TOKENS: u32 = 64;
/// How long one request alone should decode.
const REQUEST_SECONDS: f64 = 0.25;
const SECONDS: f64 = 3.0;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let shape = shape(lab).await?;
    let context_tokens = f64::from(INPUT_TOKENS) + f64::from(shape.output_tokens) / 2.0;
    let curve = Curve { model: lab.decode_model(), gpus: lab.gpus()?, context_tokens };
    let pace = lab.pace().await?;
    let prefill = pace.mfu.prefill_seconds(lab.prefill()?, 0, INPUT_TOKENS);
    let rate = |clients| curve.output_rate(clients, prefill, shape.output_tokens);
    let gain = rate(CLIENTS) / rate(1);
    let because = format!(
        "F6 with F3 at B={CLIENTS} over B=1: {} / {} tok/s, prompts of {INPUT_TOKENS} at an MFU of {} included",
        short(rate(CLIENTS)),
        short(rate(1)),
        pace.mfu
    );
    let kind = PredictionKind::Equal;
    let label = format!("paged, {CLIENTS} clients over 1");
    let batching = lab.predict("batching_gain", label, Unit::Factor, kind, gain, because);
    let single = output_rate(lab, 1, shape).await?;
    let paged = output_rate(lab, CLIENTS, shape).await?;
    lab.replica(&["--engine", "naive"]).await?;
    let naive = output_rate(lab, CLIENTS, shape).await?;
    lab.found(batching, paged / single, None, None);
    // What the kernels are worth beside that, no formula says.
    let said = Lab::unpredicted("total_gain", format!("paged over naive, {CLIENTS} clients"), Unit::Factor);
    let note = "the naive engine takes one request at a time, and its kernels are candle's".to_owned();
    lab.found(said, paged / naive, None, Some(note));
    for (key, label, rate) in
        [("paged_tokens_per_second", "paged", paged), ("naive_tokens_per_second", "naive", naive)]
    {
        let said = Lab::unpredicted(key, format!("{label}, {CLIENTS} clients"), Unit::TokensPerSecond);
        lab.found(said, rate, None, None);
    }
    Ok(())
}

/// A request that takes some tenths of a second alone.
pub async fn shape(lab: &mut Lab<'_>) -> Result<Shape, ExperimentError> {
    let pace = lab.pace().await?;
    let room = lab.max_model_len().saturating_sub(INPUT_TOKENS).max(2);
    let output_tokens = Lab::fitting(REQUEST_SECONDS, pace.step_seconds, 16, 128).min(room);
    Ok(Shape { input_tokens: INPUT_TOKENS, output_tokens })
}

/// Output tokens a second of a closed loop, prefill and queueing included.
pub async fn output_rate(lab: &mut Lab<'_>, clients: u32, shape: Shape) -> Result<f64, ExperimentError> {
    let flags = lab.running()?.flags.join(" ");
    lab.progress(&format!("closed loop of {clients} {flags}"));
    let load = LoadShape::Closed { concurrency: clients, think_time: Duration::ZERO };
    let phases = PhasePlan {
        warm_up: Extent::Requests(u64::from(clients)),
        measured: Extent::Time(Duration::from_secs_f64(SECONDS)),
        cool_down: true,
    };
    let log = lab.load(load, phases, shape).await?;
    let metrics = Tally::of(&log.records, None).metrics();
    match metrics.output_throughput {
        rate if metrics.completed > 0 && rate > 0.0 => Ok(rate),
        _ => Err(ExperimentError::DoesNotStand("no request completed".to_owned())),
    }
}
