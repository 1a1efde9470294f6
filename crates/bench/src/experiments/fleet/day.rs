//! A day's curve: how far its busiest part is above the mean, and what a fleet that follows it saves.

use servelab_sim::numbers::seconds;

use super::{Outcome, simulate_one};
use crate::experiments::ExperimentError;
use crate::experiments::lab::Lab;
use crate::experiments::measurement::PredictionKind;
use crate::ledger::Unit;

/// 1M daily users with 30 requests each, a tenth of them.
const PART: f64 = 10.0;
const REQUESTS_PER_SECOND: f64 = 1e6 * 30.0 / 86_400.0 / PART;
const PEAK: f64 = 1.8;
/// The day is as short as that, so that it can be waited for.
const DAY: &str = "2h";
/// What is promised at its peak.
const P95_TTFT_SECONDS: f64 = 1.0;
const MOST_REPLICAS: u32 = 16;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let peak = lab.predict(
        "peak_factor",
        "busiest part of the day over its mean",
        Unit::Factor,
        PredictionKind::Equal,
        PEAK,
        "the curve's own peak; what arrives is random around it".to_owned(),
    );
    let gpus = Lab::unpredicted("gpus_at_peak", "8B on as many H100, at the peak all the time", Unit::Gpus);
    let share = lab.predict(
        "gpu_hours_share",
        "GPU-hours of a fleet that follows the day, over those of this one",
        Unit::Share,
        PredictionKind::Equal,
        1.0 / PEAK,
        format!("mean / peak = 1 / {PEAK}: at every moment as many as are needed"),
    );
    let fixed = fleet_for_the_peak(lab).await?;
    let day = follow(lab).await?;
    let note = format!("of {} parts of {}", day.rows.len(), seconds(day.seconds / day.rows.len() as f64));
    lab.found(peak, busiest_over_mean(&day), None, Some(note));
    let note = format!("{fixed} of them simulated, taken {PART} times; p95 TTFT below {P95_TTFT_SECONDS} s");
    lab.found(gpus, f64::from(fixed) * PART, None, Some(note));
    let note = format!(
        "scaled on requests in flight; the day is {DAY} long, so that its load changes 12 times as fast as that of a \
         real one; p95 TTFT {}",
        seconds(Outcome::percentiles(day.ttft_seconds)?.p95)
    );
    lab.found(share, day.mean_ready / f64::from(fixed), None, Some(note));
    Ok(())
}

/// The fewest replicas that keep the promise while the load is always that of the peak.
async fn fleet_for_the_peak(lab: &mut Lab<'_>) -> Result<u32, ExperimentError> {
    let rate = format!("{:.2}", REQUESTS_PER_SECOND * PEAK);
    for replicas in 1..=MOST_REPLICAS {
        lab.progress(&format!("the peak on {replicas} replicas"));
        let load = ["--rate", &rate, "--duration", "10m", "--workload", "azure-chat"];
        let fleet = ["--replicas", &replicas.to_string()];
        let outcome = simulate_one(lab, &[&load[..], &fleet].concat()).await?;
        let is_whole = outcome.completed == outcome.requests;
        if is_whole && Outcome::percentiles(outcome.ttft_seconds)?.p95 <= P95_TTFT_SECONDS {
            return Ok(replicas);
        }
    }
    Err(ExperimentError::DoesNotStand(format!("{MOST_REPLICAS} replicas are too few for the peak")))
}

async fn follow(lab: &mut Lab<'_>) -> Result<Outcome, ExperimentError> {
    lab.progress("a day with an autoscaler");
    let (rate, peak) = (format!("{REQUESTS_PER_SECOND:.2}"), PEAK.to_string());
    let curve = ["--shape", "diurnal", "--rate", &rate, "--peak", &peak, "--period", DAY, "--duration", DAY];
    let load = ["--workload", "azure-chat", "--scaler", "concurrency"];
    simulate_one(lab, &[&curve[..], &load].concat()).await
}

fn busiest_over_mean(outcome: &Outcome) -> f64 {
    let rates = outcome.rows.iter().map(|row| row.offered_per_second);
    let most = rates.clone().fold(0.0, f64::max);
    most * outcome.rows.len() as f64 / rates.sum::<f64>()
}
