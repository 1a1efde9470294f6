//! Bytes of keys and values a token: from a pool of known memory and its token slots, and, on a CPU, from how the
//! process grows while the pool fills.

use servelab_sim::formulas::{KvLayout, kv_bytes_per_token};
use servelab_sim::numbers::{bytes, grouped};
use servelab_sim::{Dtype, ModelShape};

use super::ExperimentError;
use super::lab::{Lab, Shape};
use super::measurement::PredictionKind;
use crate::ledger::Unit;
use crate::phases::{Extent, PhasePlan};
use crate::run::LoadShape;

/// The process grows in huge pages where it can: pools are whole numbers of them, for keys and for values.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const LEAST_POOL_BYTES: u64 = 32 << 20;
const BLOCK_TOKENS: u64 = 16;
/// Of the pool beside which the growth is seen.
const SMALL_BLOCKS: u64 = 64;
const PROMPT_TOKENS: u32 = 480;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let shape = lab.subject.model.clone();
    let small = (SMALL_BLOCKS * BLOCK_TOKENS) as f64 * shape.kv_bytes_per_token();
    start(lab, small).await?;
    let dtype = told_dtype(lab).await?;
    let predicted = kv_bytes_per_token(layout(&shape, dtype));
    let pool_bytes = pool_bytes(predicted);
    let because = format!(
        "F1: 2 x {} layers x {} kv heads x {} x {} B, {dtype} as /metrics tells",
        shape.layers,
        shape.kv_heads,
        shape.head_dim,
        dtype.bytes()
    );
    let (unit, kind) = (Unit::BytesPerToken, PredictionKind::Equal);
    let label = format!("a pool of {} over its slots", bytes(pool_bytes));
    let pool = lab.predict("pool_bytes_per_token", label, unit, kind, predicted, because.clone());
    let label = "memory of the process, full pool against a small one";
    let resident = (!lab.subject.is_gpu)
        .then(|| lab.predict("resident_bytes_per_token", label, unit, kind, predicted, because));
    let before = if resident.is_some() { Some(fill(lab).await?) } else { None };
    start(lab, pool_bytes).await?;
    let state = lab.running()?.state().await?;
    let slots = f64::from(state.blocks.total) * f64::from(state.config.block_size);
    let note = format!("{} blocks of {} tokens, from /state", state.blocks.total, state.config.block_size);
    lab.found(pool, pool_bytes / slots, None, Some(note));
    if let (Some(resident), Some(before)) = (resident, before) {
        let after = fill(lab).await?;
        let (grown, tokens) = (after.bytes - before.bytes, after.tokens - before.tokens);
        let note = format!("{} more for {} more tokens", bytes(grown), grouped(tokens));
        lab.found(resident, grown / tokens, None, Some(note));
    }
    Ok(())
}

/// The least pool of some size whose keys and whose values fill huge pages.
fn pool_bytes(kv_bytes_per_token: f64) -> f64 {
    let half_block = (kv_bytes_per_token as u64 / 2 * BLOCK_TOKENS).max(1);
    let pages = half_block << (HUGE_PAGE_BYTES.trailing_zeros().saturating_sub(half_block.trailing_zeros()));
    let unit = 2 * pages.max(half_block);
    (LEAST_POOL_BYTES.div_ceil(unit) * unit) as f64
}

async fn start(lab: &mut Lab<'_>, pool_bytes: f64) -> Result<(), ExperimentError> {
    let (memory, block) = (format!("{pool_bytes:.0}"), BLOCK_TOKENS.to_string());
    lab.replica(&["--kv-memory", &memory, "--block-size", &block]).await.map(drop)
}

fn layout(shape: &ModelShape, dtype: Dtype) -> KvLayout {
    KvLayout {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        bytes_per_element: dtype.bytes(),
    }
}

async fn told_dtype(lab: &Lab<'_>) -> Result<Dtype, ExperimentError> {
    let metrics = lab.running()?.metrics().await?;
    let told = metrics.label("servelab_cache_config_info", "cache_dtype").and_then(|name| name.parse().ok());
    told.ok_or(ExperimentError::NotUnderstood("cache_dtype of servelab_cache_config_info"))
}

/// A process whose pool is full.
#[derive(Clone, Copy)]
struct Full {
    /// Resident, all of it.
    bytes: f64,
    /// Written into the pool.
    tokens: f64,
}

/// Writes into every block of the pool.
async fn fill(lab: &mut Lab<'_>) -> Result<Full, ExperimentError> {
    let state = lab.running()?.state().await?;
    let slots = u64::from(state.blocks.total) * u64::from(state.config.block_size);
    lab.progress(&format!("filling {} token slots", grouped(slots as f64)));
    let input_tokens = PROMPT_TOKENS.min(lab.max_model_len().saturating_sub(1));
    let requests = slots.div_ceil(u64::from(input_tokens)) + 8;
    let load = LoadShape::Closed { concurrency: 2, think_time: std::time::Duration::ZERO };
    let phases =
        PhasePlan { warm_up: Extent::Requests(0), measured: Extent::Requests(requests), cool_down: false };
    lab.load(load, phases, Shape { input_tokens, output_tokens: 1 }).await?;
    let blocks = lab.running()?.state().await?.blocks;
    let bytes = lab.running()?.metrics().await?.value("process_resident_memory_bytes", "")?;
    let share = 1.0 - f64::from(blocks.free) / f64::from(blocks.total);
    if share < 0.95 {
        let share = crate::ledger::unit::percent(share);
        return Err(ExperimentError::DoesNotStand(format!("only {share} of the pool could be filled")));
    }
    Ok(Full { bytes, tokens: share * slots as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the demo, SmolLM2-135M and an 8B.
    #[test]
    fn pools_fill_huge_pages() {
        for kv in [1280.0, 23_040.0, 131_072.0] {
            let bytes = pool_bytes(kv);
            assert!(bytes >= LEAST_POOL_BYTES as f64 && bytes < 8.0 * LEAST_POOL_BYTES as f64, "{bytes}");
            assert_eq!(bytes / 2.0 % HUGE_PAGE_BYTES as f64, 0.0);
            assert_eq!(bytes % (kv * BLOCK_TOKENS as f64), 0.0);
        }
    }
}
