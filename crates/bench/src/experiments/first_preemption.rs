//! How many requests a pool of known size holds at their full length: the largest number that run at once without
//! one of them losing its blocks, against F4.

use servelab_sim::formulas::batch_capacity;
use servelab_sim::numbers::{bytes, grouped, short};

use super::ExperimentError;
use super::lab::{Lab, Shape};
use super::measurement::PredictionKind;
use crate::ledger::Unit;

const INPUT_TOKENS: u32 = 32;
/// About how many requests the pool is made for.
const REQUESTS: f64 = 16.5;
/// How long one request alone should take.
const SECONDS: f64 = 0.5;
const MAX_RUNNING: u32 = 64;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let pace = lab.pace().await?;
    let output_tokens = Lab::fitting(SECONDS, pace.step_seconds, 48, 224);
    let shape = Shape { input_tokens: INPUT_TOKENS, output_tokens };
    let tokens = f64::from(INPUT_TOKENS + output_tokens);
    let kv = lab.subject.model.kv_bytes_per_token();
    let pool_bytes = (REQUESTS * tokens * kv).round();
    let (memory, running) = (format!("{pool_bytes:.0}"), MAX_RUNNING.to_string());
    lab.replica(&["--kv-memory", &memory, "--max-running", &running]).await?;
    let capacity = batch_capacity(pool_bytes, tokens, kv);
    let said = lab.predict(
        "capacity_requests",
        format!("requests of {} tokens in {} of KV", grouped(tokens), bytes(pool_bytes)),
        Unit::Requests,
        PredictionKind::Equal,
        capacity.floor(),
        format!(
            "F4: {} / ({} x {} B) = {}, of which the whole ones run",
            bytes(pool_bytes),
            grouped(tokens),
            grouped(kv),
            short(capacity)
        ),
    );
    let most = search(lab, shape).await?;
    let state = lab.running()?.state().await?;
    let block_size = f64::from(state.config.block_size);
    // The last token is given out and never computed.
    let blocks = ((tokens - 1.0) / block_size).ceil();
    let note = format!(
        "{} requests met the first preemption; whole blocks of {block_size} tokens are {} slots a request, of which \
         {} fit",
        most + 1,
        grouped(blocks * block_size),
        grouped((f64::from(state.blocks.total) / blocks).floor())
    );
    lab.found(said, f64::from(most), None, Some(note));
    Ok(())
}

/// The largest batch without a preemption: one request always fits, and far too many never do.
async fn search(lab: &mut Lab<'_>, shape: Shape) -> Result<u32, ExperimentError> {
    let (mut fits, mut preempts) = (1, MAX_RUNNING);
    if !preempted(lab, shape, preempts).await? {
        return Err(ExperimentError::DoesNotStand(format!("{preempts} requests ran without a preemption")));
    }
    while preempts - fits > 1 {
        let middle = u32::midpoint(fits, preempts);
        if preempted(lab, shape, middle).await? { preempts = middle } else { fits = middle }
    }
    Ok(fits)
}

async fn preempted(lab: &mut Lab<'_>, shape: Shape, count: u32) -> Result<bool, ExperimentError> {
    lab.progress(&format!("{count} sequences at once"));
    let before = lab.running()?.state().await?.preemptions;
    lab.in_one_request(count, shape).await?;
    Ok(lab.running()?.state().await?.preemptions > before)
}
