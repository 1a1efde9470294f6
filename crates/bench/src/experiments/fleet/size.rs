//! GPUs for a million daily users of the 70B: the plan's closed form against the smallest simulated fleet that keeps
//! its promise.

use servelab_sim::Assumptions;
use servelab_sim::numbers::{given, short};
use servelab_sim::planner::plan;

use super::{LARGE_MODEL_GPUS, smallest_fleet};
use crate::experiments::ExperimentError;
use crate::experiments::lab::Lab;
use crate::experiments::measurement::PredictionKind;
use crate::ledger::Unit;

/// A part of the fleet stands for the whole: so many times fewer users.
const PART: f64 = 20.0;
/// The search has no GPUs to spare, so that the plan is to have none either.
const ASSUMPTIONS: Assumptions =
    Assumptions { gpus_per_replica: Some(LARGE_MODEL_GPUS), headroom: 1.0, ..Assumptions::DEFAULT };

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let plan = plan(&lab.subject.model, &lab.subject.hardware, &ASSUMPTIONS)?;
    let said = lab.predict(
        "gpus",
        format!("GPUs for 1M daily users at the peak, TP{LARGE_MODEL_GPUS}, none to spare"),
        Unit::Gpus,
        PredictionKind::Equal,
        plan.fleet.gpus as f64,
        format!(
            "F6: {}/s x {} GPU-s, as servelab plan --headroom 1",
            short(plan.load.peak_requests_per_second),
            short(plan.speed.gpu_seconds_per_request)
        ),
    );
    lab.progress("searching the smallest fleet");
    let users = ASSUMPTIONS.daily_users / PART;
    let gpus = smallest_fleet(lab, &["--dau", &users.to_string(), "--slo", "ttft=1s@p95"]).await?;
    let note = format!(
        "{gpus} GPUs keep p95 TTFT below 1 s for {} users, taken {PART} times; with the plan's headroom of {} they are {}",
        short(users),
        given(Assumptions::DEFAULT.headroom),
        short(gpus as f64 * PART * Assumptions::DEFAULT.headroom)
    );
    lab.found(said, gpus as f64 * PART, None, Some(note));
    Ok(())
}
