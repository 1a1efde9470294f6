//! The batch ladder: B requests at once, and the throughput while all of them decode, for growing B. The hyperbola
//! of F3 is fitted to it.

use servelab_sim::numbers::{grouped, short};

use super::ExperimentError;
use super::expect::Curve;
use super::fit::hyperbola;
use super::lab::{Lab, Shape};
use super::measurement::{Ladder, LadderPoint, PredictionKind};
use super::window::steady;
use crate::ledger::Unit;

const BATCHES: [u32; 6] = [1, 2, 4, 8, 16, 32];
const REPEATS: u32 = 3;
const INPUT_TOKENS: u32 = 32;
/// How long one sequence alone should decode.
const SECONDS: f64 = 0.4;

pub async fn run(lab: &mut Lab<'_>) -> Result<Ladder, ExperimentError> {
    // Prompts come in one step or two, and nothing is found in the cache.
    lab.replica(&["--max-running", "64"]).await?;
    let pace = lab.pace().await?;
    let room = lab.max_model_len().saturating_sub(INPUT_TOKENS).max(2);
    let output_tokens = Lab::fitting(SECONDS, pace.step_seconds, 32, 256).min(room);
    let shape = Shape { input_tokens: INPUT_TOKENS, output_tokens };
    let context_tokens = f64::from(INPUT_TOKENS) + f64::from(output_tokens) / 2.0;
    let curve = Curve { model: lab.decode_model(), gpus: lab.gpus()?, context_tokens };
    let most = BATCHES[BATCHES.len() - 1];
    let half = lab.predict(
        "half_batch",
        format!("B_half at L={}", grouped(context_tokens)),
        Unit::Sequences,
        PredictionKind::Equal,
        curve.half_batch(),
        curve.because(),
    );
    let asymptote =
        ceiling(lab, "asymptote_tokens_per_second", "asymptote".to_owned(), curve.most_tokens_per_second());
    let single = ceiling(lab, "single_tokens_per_second", "B=1".to_owned(), curve.tokens_per_second(1.0));
    let best_limit = curve.tokens_per_second(f64::from(most));
    let best = ceiling(lab, "best_tokens_per_second", format!("B={most}"), best_limit);
    let (points, contexts) = measure(lab, shape).await?;
    let fit = hyperbola(&points).map_err(|error| ExperimentError::DoesNotStand(error.to_string()))?;
    let note = format!("{} points at up to {most} sequences, 95 % interval after Fieller", points.len());
    lab.found(half, fit.half_batch, Some(fit.half_interval), Some(note));
    // What keeps it from the limit.
    let shared = "choosing tokens, text, HTTP and the load generator take the same processors as the model";
    let note = (!lab.subject.is_gpu).then(|| shared.to_owned());
    lab.found(asymptote, fit.most_tokens_per_second, Some(fit.most_interval), note);
    lab.found(single, mean_at(&points, 1.0), None, None);
    lab.found(best, mean_at(&points, f64::from(most)), None, None);
    Ok(Ladder {
        context_tokens: contexts,
        half_batch: fit.half_batch,
        most_tokens_per_second: fit.most_tokens_per_second,
        predicted: BATCHES.map(f64::from).map(|batch| (batch, curve.tokens_per_second(batch))).to_vec(),
        points,
    })
}

fn ceiling(lab: &mut Lab<'_>, key: &'static str, label: String, value: f64) -> super::lab::Said {
    let because = "F3: B / max((W + B x L x kv) / BW, 2 x P x B / FLOP/s)".to_owned();
    lab.predict(key, label, Unit::TokensPerSecond, PredictionKind::Ceiling, value, because)
}

/// All points, and their mean context.
async fn measure(lab: &mut Lab<'_>, shape: Shape) -> Result<(Vec<LadderPoint>, f64), ExperimentError> {
    let (mut points, mut contexts) = (Vec::new(), Vec::new());
    let preemptions = lab.running()?.state().await?.preemptions;
    for repeat in 1..=REPEATS {
        for batch in BATCHES {
            lab.progress(&format!("B={batch}, repeat {repeat} of {REPEATS}"));
            let records = lab.together(batch, shape).await?;
            let steady = steady(&records).ok_or_else(|| {
                ExperimentError::DoesNotStand(format!("{batch} requests never decoded all at once"))
            })?;
            points.push(LadderPoint {
                sequences: f64::from(batch),
                tokens_per_second: steady.tokens_per_second,
            });
            contexts.push(steady.context_tokens);
        }
    }
    match lab.running()?.state().await?.preemptions - preemptions {
        0 => Ok((points, contexts.iter().sum::<f64>() / contexts.len() as f64)),
        preempted => Err(ExperimentError::DoesNotStand(format!(
            "{} sequences were preempted: the KV pool is too small for the ladder",
            short(preempted as f64)
        ))),
    }
}

fn mean_at(points: &[LadderPoint], batch: f64) -> f64 {
    let rates: Vec<f64> =
        points.iter().filter(|point| point.sequences == batch).map(|point| point.tokens_per_second).collect();
    crate::stats::mean(&rates)
}
