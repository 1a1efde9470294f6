//! TTFT of prompts whose first part is in the prefix cache, against that of the same lengths without, and F8.

use servelab_sim::numbers::seconds;

use super::ExperimentError;
use super::lab::{Lab, Pace, Said};
use super::measurement::{Interval, PredictionKind};
use super::pace::{median, ttft};
use crate::client::Observed;
use crate::ledger::Unit;
use crate::prompt::Segment;
use crate::stats;

const PAIRS: usize = 15;
/// A multiple of every usual block size.
const CACHED_TOKENS: u32 = 768;
const OWN_TOKENS: u32 = 128;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let wanted = CACHED_TOKENS + OWN_TOKENS + 1;
    if lab.max_model_len() < wanted {
        return Err(ExperimentError::ShortContext { max_model_len: lab.max_model_len(), wanted });
    }
    let pace = lab.pace().await?;
    let said = predict(lab, pace)?;
    let hit_said = Lab::unpredicted("hit_seconds", "TTFT of a hit", Unit::Seconds);
    let miss_said = Lab::unpredicted("miss_seconds", "TTFT of a miss", Unit::Seconds);
    let (mut hits, mut misses, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 1..=PAIRS {
        lab.progress(&format!("pair {pair} of {PAIRS}"));
        let shared = lab.fresh(CACHED_TOKENS);
        let miss = first_token(lab, shared, 0).await?;
        let hit = first_token(lab, shared, CACHED_TOKENS).await?;
        ratios.push(hit / miss);
        hits.push(hit);
        misses.push(miss);
    }
    let ratio = median(&mut ratios);
    let interval = stats::median_interval(&ratios).map(|(low, high)| Interval { low, high: Some(high) });
    lab.found(said, ratio, interval, Some(format!("median of {PAIRS} pairs")));
    lab.found(miss_said, median(&mut misses), None, None);
    lab.found(hit_said, median(&mut hits), None, None);
    Ok(())
}

fn predict(lab: &mut Lab<'_>, pace: Pace) -> Result<Said, ExperimentError> {
    let total = CACHED_TOKENS + OWN_TOKENS;
    let prefill = lab.prefill()?;
    // F8 with the attention of F5: the tokens of a hit attend to those in the cache.
    let ttft = |cached, uncached| pace.overhead_seconds + pace.mfu.prefill_seconds(prefill, cached, uncached);
    let (hit, miss) = (ttft(CACHED_TOKENS, OWN_TOKENS), ttft(0, total));
    Ok(lab.predict(
        "hit_ratio",
        format!("TTFT(hit) / TTFT(miss), {CACHED_TOKENS} of {total} tokens cached"),
        Unit::Factor,
        PredictionKind::Equal,
        hit / miss,
        format!(
            "F8: {} / {}, each an overhead of {} and F5 at an MFU of {}",
            seconds(hit),
            seconds(miss),
            seconds(pace.overhead_seconds),
            pace.mfu
        ),
    ))
}

/// Of the shared part and one of its own, of which the server says that it had so many.
async fn first_token(lab: &mut Lab<'_>, shared: Segment, cached: u32) -> Result<f64, ExperimentError> {
    let own = lab.fresh(OWN_TOKENS);
    let outgoing = lab.write(vec![shared, own], 1)?;
    let observed: Observed = lab.ask(&outgoing).await?;
    match observed.usage.map(|usage| usage.cached_tokens) {
        Some(found) if found == cached => Ok(ttft(&observed)),
        found => Err(ExperimentError::DoesNotStand(format!(
            "the prefix cache found {found:?} tokens of a prompt, and {cached} were there"
        ))),
    }
}
