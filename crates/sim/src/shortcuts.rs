//! Where a shortcut that is often quoted would have gone wrong for this plan, with the numbers of both.

use serde::Serialize;

use crate::assumptions::ASSUMED_PEAK_FACTOR;
use crate::numbers::{bandwidth, bytes, given, grouped, plural, seconds, short, whole};
use crate::planner::CapacityPlan;
use crate::roofline::{Limit, Roofline, SequenceWork};

/// One shortcut and what is true instead.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Warning {
    /// One word.
    pub id: &'static str,
    pub text: String,
}

/// The warnings for `plan`, the weightiest first. `others` are the plans with other numbers of GPUs for each
/// replica.
pub fn warnings(plan: &CapacityPlan, others: &[CapacityPlan]) -> Vec<Warning> {
    let found = [
        ("fit", does_not_fit(plan)),
        ("tp", cheaper_replica(plan, others)),
        ("quoted", quoted_throughput(plan)),
        ("prefill", prefill_forgotten(plan)),
        ("gqa", head_count(plan)),
        ("knee", knee(plan)),
        ("little", percentile_in_littles_law(plan)),
        ("peak", peak_assumed(plan)),
        ("compute", compute_bound(plan)),
        ("fp8", narrow_weights(plan)),
        ("links", slow_links(plan)),
        ("copies", kv_copies(plan)),
        ("spare", no_spare(plan)),
    ];
    found.into_iter().filter_map(|(id, text)| Some(Warning { id, text: text? })).collect()
}

/// The model was wanted on fewer GPUs than hold it.
fn does_not_fit(plan: &CapacityPlan) -> Option<String> {
    let memory = &plan.memory;
    let wanted = plan.assumptions.gpus_per_replica.unwrap_or(1);
    if wanted == memory.gpus_per_replica {
        return None;
    }
    let usable = f64::from(wanted) * memory.usable_bytes_per_gpu;
    let problem = match memory.weight_bytes > usable {
        true => "do not fit into",
        false => "leave no room for one request on",
    };
    Some(format!(
        "{} of weights {problem} {wanted} x {} ({} usable); {} GPUs a replica do",
        bytes(memory.weight_bytes),
        plan.hardware.name,
        bytes(usable),
        memory.gpus_per_replica
    ))
}

/// More GPUs a replica share the weights and leave more of the memory to the batch.
fn cheaper_replica(plan: &CapacityPlan, others: &[CapacityPlan]) -> Option<String> {
    let best = others.iter().min_by_key(|other| (other.fleet.gpus, other.memory.gpus_per_replica))?;
    // Less than a tenth is within the error of the assumptions.
    if best.fleet.gpus as f64 > 0.9 * plan.fleet.gpus as f64 {
        return None;
    }
    Some(format!(
        "{} a replica need {} in all, not {}, links not counted: batch {}, TPOT {}",
        plural(best.memory.gpus_per_replica.into(), "GPU"),
        whole(best.fleet.gpus),
        whole(plan.fleet.gpus),
        whole(best.speed.batch),
        seconds(best.fleet.peak_tpot_seconds)
    ))
}

/// Tokens a second that people quote for one H100: size class in parameters, and the figure.
const QUOTED: [(std::ops::Range<u64>, f64); 2] =
    [(6_000_000_000..9_000_000_000, 8000.0), (60_000_000_000..80_000_000_000, 1000.0)];

fn quoted_throughput(plan: &CapacityPlan) -> Option<String> {
    let (_, quoted) = QUOTED.iter().find(|(sizes, _)| sizes.contains(&plan.model.parameters))?;
    let rate = plan.fleet.output_tokens_per_second_per_gpu;
    if plan.hardware.name != "H100 SXM" || (0.8..1.25).contains(&(rate / quoted)) {
        return None;
    }
    let gpus = plan.load.peak_output_tokens_per_second / quoted * plan.assumptions.headroom;
    Some(format!(
        "\"{} tok/s per H100\" would say {}; with prompts and this batch it is {} tok/s",
        given(*quoted),
        plural(gpus.round() as u64, "GPU"),
        short(rate)
    ))
}

fn prefill_forgotten(plan: &CapacityPlan) -> Option<String> {
    let share = plan.speed.prefill_share;
    if share < 0.1 {
        return None;
    }
    let gpus = plan.fleet.gpus as f64 * (1.0 - share);
    Some(format!(
        "output tokens alone would say {}: {:.0} % of the GPU time goes into the prompts",
        plural(gpus.ceil() as u64, "GPU"),
        share * 100.0
    ))
}

/// `2 * layers * hidden * bytes` takes every query head for a kv head.
fn head_count(plan: &CapacityPlan) -> Option<String> {
    let model = &plan.model;
    if model.heads == model.kv_heads {
        return None;
    }
    let wrong = 2 * model.layers * model.hidden * model.kv_dtype.bytes();
    Some(format!(
        "KV as 2 x layers x hidden counts query heads as kv heads: {} B/token, {} x too much",
        grouped(wrong as f64),
        given(wrong as f64 / plan.memory.kv_bytes_per_token)
    ))
}

/// "Diminishing returns above a batch of about 32."
fn knee(plan: &CapacityPlan) -> Option<String> {
    let half = plan.speed.half_batch;
    if (24.0..43.0).contains(&half) {
        return None;
    }
    let batch = plan.speed.batch as f64;
    Some(format!(
        "the knee is at B_half = W / (L x kv) = {}, not at 32; B = {} gets {:.0} % of the asymptote",
        whole(half.round() as u64),
        whole(plan.speed.batch),
        100.0 * batch / (batch + half)
    ))
}

/// Half a second, as in "7k QPS x 500 ms p99".
const QUOTED_P99_SECONDS: f64 = 0.5;

fn percentile_in_littles_law(plan: &CapacityPlan) -> Option<String> {
    let rate = plan.load.peak_requests_per_second;
    let wrong = rate * QUOTED_P99_SECONDS;
    let right = plan.fleet.in_flight;
    if (0.5..2.0).contains(&(right / wrong)) {
        return None;
    }
    Some(format!(
        "Little's law takes the mean, {}: QPS x a p99 of {} would say {} in flight",
        seconds(right / rate),
        seconds(QUOTED_P99_SECONDS),
        short(wrong)
    ))
}

fn peak_assumed(plan: &CapacityPlan) -> Option<String> {
    plan.assumptions.peak_factor.is_none().then(|| {
        format!(
            "a peak of {} x the mean is assumed; Azure's busiest minutes were 1.5 x (chat), 4.2 x (code)",
            given(ASSUMED_PEAK_FACTOR)
        )
    })
}

/// Bandwidth alone does not tell the step.
fn compute_bound(plan: &CapacityPlan) -> Option<String> {
    (plan.speed.step_limit == Limit::Compute).then(|| {
        format!(
            "arithmetic binds at a batch of {} (ridge {}): bytes over bandwidth alone would be too fast",
            whole(plan.speed.batch),
            short(plan.speed.ridge_batch)
        )
    })
}

fn narrow_weights(plan: &CapacityPlan) -> Option<String> {
    let dtype = plan.model.weight_dtype;
    let (computed, _) = plan.hardware.arithmetic(dtype).ok()?;
    (computed != dtype).then(|| {
        format!(
            "{} has no {dtype} arithmetic: such weights save bytes, and multiply at the {computed} rate",
            plan.hardware.name
        )
    })
}

/// F5 and F2 leave out what the GPUs of a replica send each other.
fn slow_links(plan: &CapacityPlan) -> Option<String> {
    let gpus = plan.memory.gpus_per_replica;
    let link = plan.hardware.interconnect.as_ref()?;
    let roofline = Roofline::new(&plan.model, &plan.hardware, gpus).ok()?;
    let cost = roofline.step([SequenceWork::prefill(0, plan.assumptions.input_tokens)]);
    if cost.link_seconds < 0.5 * cost.compute_seconds {
        return None;
    }
    let tokens = plan.assumptions.input_tokens as f64;
    Some(format!(
        "F5 leaves out the links: {} a token over {} ({}) takes {} or more beside {} of arithmetic",
        bytes(cost.link_bytes / tokens),
        link.name,
        bandwidth(link.bytes_per_second),
        seconds(cost.link_seconds / tokens),
        seconds(cost.compute_seconds / tokens)
    ))
}

fn kv_copies(plan: &CapacityPlan) -> Option<String> {
    let (gpus, copies) = (plan.memory.gpus_per_replica, plan.memory.kv_copies);
    (copies > 1).then(|| {
        format!(
            "{gpus} GPUs share {} kv heads: each is stored {copies} times, KV per GPU no longer falls with TP",
            plan.model.kv_heads
        )
    })
}

fn no_spare(plan: &CapacityPlan) -> Option<String> {
    (plan.fleet.replicas == 1).then(|| {
        "one replica carries the peak; a second one is for failures and deployments, not for load".to_owned()
    })
}
