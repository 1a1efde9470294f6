//! The stages of a start, from the process to the first token: F9, one below the other. The page cache is warm:
//! what was read a moment ago is read from memory.

use servelab_sim::formulas::{ColdStart, cold_start_seconds};
use servelab_sim::numbers::{bandwidth, bytes, seconds};

use super::ExperimentError;
use super::lab::Lab;
use super::measurement::PredictionKind;
use super::pace::{median, ttft};
use crate::ledger::Unit;

const STARTS: usize = 5;
const PROMPT_TOKENS: u32 = 16;

/// Seconds of each stage.
#[derive(Clone, Copy, Debug, Default)]
struct Stages {
    process: f64,
    read: f64,
    compile: f64,
    convert: f64,
    warm_up: f64,
    record: f64,
    first_request: f64,
    all: f64,
}

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let (weights, rate) = (lab.subject.model.weight_bytes(), lab.subject.hardware.bandwidth_bytes_per_second);
    let floor = cold_start_seconds(ColdStart {
        image_pull_seconds: 0.0,
        weight_bytes: weights,
        storage_bytes_per_second: rate,
        init_seconds: 0.0,
        compile_seconds: 0.0,
        graph_capture_seconds: 0.0,
        first_request_seconds: 0.0,
    });
    let because = format!("F9 with the bytes alone: {} / {} of memory", bytes(weights), bandwidth(rate));
    let kind = PredictionKind::Floor;
    let label = "from the process to the first token";
    let all = lab.predict("first_token_seconds", label, Unit::Seconds, kind, floor, because.clone());
    let label = "of that, reading and packing the weights";
    let bytes = lab.predict("weights_seconds", label, Unit::Seconds, kind, floor, because);
    let share = Lab::unpredicted("weights_share", "share of the weights in the start", Unit::Share);
    let mut starts = Vec::new();
    for start in 1..=STARTS {
        lab.progress(&format!("start {start} of {STARTS}"));
        lab.stop().await;
        starts.push(one(lab).await?);
    }
    let of = |stage: fn(&Stages) -> f64| median(&mut starts.iter().map(stage).collect::<Vec<_>>());
    let (read, convert) = (of(|stages| stages.read), of(|stages| stages.convert));
    let stages = [
        ("process", of(|stages| stages.process)),
        ("read", read),
        ("compile", of(|stages| stages.compile)),
        ("convert", convert),
        ("warm-up", of(|stages| stages.warm_up)),
        ("record graphs", of(|stages| stages.record)),
        ("first request", of(|stages| stages.first_request)),
    ];
    let shown = stages.into_iter().filter(|(_, taken)| *taken > 0.0);
    let shown: Vec<String> = shown.map(|(name, taken)| format!("{name} {}", seconds(taken))).collect();
    let note = format!("median of {STARTS}, page cache warm: {}", shown.join(", "));
    let total = of(|stages| stages.all);
    lab.found(all, total, None, Some(note));
    lab.found(bytes, read + convert, None, None);
    lab.found(share, (read + convert) / total, None, None);
    Ok(())
}

async fn one(lab: &mut Lab<'_>) -> Result<Stages, ExperimentError> {
    lab.replica(&[]).await?;
    let prompt = lab.fresh(PROMPT_TOKENS);
    let outgoing = lab.write(vec![prompt], 1)?;
    let first_request = ttft(&lab.ask(&outgoing).await?);
    let replica = lab.running()?;
    let metrics = replica.metrics().await?;
    let stage = |label| metrics.value("servelab_model_load_seconds", label);
    let ready = replica.start.ready.as_secs_f64();
    let (read, convert) = (stage("stage=\"read\"")?, stage("stage=\"convert\"")?);
    let warm_up = stage("stage=\"warm_up\"")?;
    // Of GPUs only.
    let (compile, record) =
        (stage("stage=\"compile\"").unwrap_or(0.0), stage("stage=\"record\"").unwrap_or(0.0));
    Ok(Stages {
        process: (ready - read - compile - convert - warm_up - record).max(0.0),
        read,
        compile,
        convert,
        warm_up,
        record,
        first_request,
        all: ready + first_request,
    })
}
