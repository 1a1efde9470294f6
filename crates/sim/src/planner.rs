//! From daily users to GPUs: the back-of-the-envelope chain with every assumption in view.
//!
//! users -> sessions -> requests -> requests/s -> tokens/s; weights and KV -> GPUs a replica, requests a
//! replica (F1, F4); step and prefill floors -> GPU-seconds a request (F2, F3, F5, F6); GPUs, requests in
//! flight (F7), price (F10). Floors become estimates by two shares of the peak, `mfu` and
//! `decode_efficiency`; nothing else is fitted.

use serde::Serialize;

use crate::assumptions::Assumptions;
use crate::formulas::{self, ReplicaMemory};
use crate::hardware::{HardwareError, HardwareProfile};
use crate::pace::Pace;
use crate::roofline::{Limit, possible_gpus};
use crate::shape::{ModelShape, ShapeError};
use crate::shortcuts::{self, Warning};

/// Why there is no plan.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// `field` is one of [`Assumptions`], or `requests_per_day`, their product.
    #[error("{field} is {value}; it must be {rule}")]
    Range { field: &'static str, value: f64, rule: &'static str },
    #[error(
        "{input_tokens} input and {output_tokens} output tokens exceed the {max_tokens} tokens of {model}'s {limit}; \
         lower them to that together, or choose another model"
    )]
    TooLong { model: String, input_tokens: u64, output_tokens: u64, max_tokens: u64, limit: &'static str },
    #[error(
        "{model} does not split over {gpus} GPUs of {hardware}; it splits over {}",
        allowed.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    Split { model: String, hardware: String, gpus: u32, allowed: Vec<u32> },
    #[error(
        "{model} with one request of {tokens} tokens needs {:.1} GB and {gpus} x {hardware} offer {:.1} GB; choose \
         a narrower number format, shorter requests, or GPUs with more memory",
        needed_bytes / 1e9, usable_bytes / 1e9
    )]
    DoesNotFit {
        model: String,
        hardware: String,
        gpus: u32,
        tokens: u64,
        needed_bytes: f64,
        usable_bytes: f64,
    },
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

/// The answer, with all that it was made of.
#[derive(Clone, Debug, Serialize)]
pub struct CapacityPlan {
    pub model: ModelShape,
    pub hardware: HardwareProfile,
    pub assumptions: Assumptions,
    pub load: Load,
    pub memory: Memory,
    pub speed: Speed,
    pub fleet: Fleet,
    /// Where a usual shortcut would have gone wrong.
    pub warnings: Vec<Warning>,
}

/// What arrives.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    pub requests_per_day: f64,
    pub mean_requests_per_second: f64,
    pub peak_requests_per_second: f64,
    pub peak_input_tokens_per_second: f64,
    pub mean_output_tokens_per_second: f64,
    pub peak_output_tokens_per_second: f64,
}

/// What one replica holds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    pub gpus_per_replica: u32,
    pub weight_bytes: f64,
    pub usable_bytes_per_gpu: f64,
    /// F1, each head once.
    pub kv_bytes_per_token: f64,
    /// How often each head is stored.
    pub kv_copies: u64,
    pub kv_pool_bytes: f64,
    pub kv_pool_tokens: f64,
    /// F4, rounded down.
    pub capacity_requests: u64,
}

/// How fast one replica is with a full batch.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Speed {
    /// B: requests that run at once.
    pub batch: u64,
    /// Mean over the life of a request.
    pub context_tokens: f64,
    /// F2.
    pub step_floor_seconds: f64,
    pub step_limit: Limit,
    /// The floor over the assumed efficiency.
    pub step_seconds: f64,
    pub decode_tokens_per_second_per_gpu: f64,
    pub half_batch: f64,
    pub ridge_batch: f64,
    pub flops_per_second_per_gpu: f64,
    pub prefill_gpu_seconds_per_token: f64,
    pub prefill_attention_gpu_seconds: f64,
    /// F5 for the uncached part of one prompt.
    pub prefill_floor_gpu_seconds: f64,
    /// F6.
    pub gpu_seconds_per_request: f64,
    /// Share of F6 that is prefill.
    pub prefill_share: f64,
    /// Of one replica, with the assumed MFU.
    pub prefill_seconds: f64,
    /// With nobody waiting in front. A short prompt takes a decode step: the weights have to be read.
    pub ttft_seconds: f64,
    /// With the prefill of the other requests in between.
    pub full_batch_tpot_seconds: f64,
}

/// What the peak needs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Fleet {
    pub replicas: u64,
    pub gpus: u64,
    /// Requests that run beside each other on a replica at the peak, on average. Fewer than a full batch, since
    /// there is headroom: the batch settles where as many leave as arrive.
    pub peak_batch: f64,
    /// What a decode step takes then.
    pub peak_step_seconds: f64,
    pub peak_tpot_seconds: f64,
    /// F7 at the peak.
    pub in_flight: f64,
    /// Replicas times batch.
    pub slots: u64,
    /// Output tokens over all GPU-seconds, prefill included.
    pub output_tokens_per_second_per_gpu: f64,
    pub dollars_per_gpu_hour: Option<f64>,
    /// F10: GPUs that are always busy.
    pub dollars_per_million_busy: Option<f64>,
    /// The fleet of the peak, paid all day.
    pub dollars_per_million_fixed: Option<f64>,
    /// Of the GPUs alone, at their thermal design power.
    pub watts: Option<f64>,
}

/// Makes the plan.
///
/// # Errors
/// If an input is impossible, the requests are longer than the model's context, or the model does not fit
/// into one machine.
pub fn plan(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
) -> Result<CapacityPlan, PlanError> {
    check(model, hardware, assumptions)?;
    let gpus = gpus_per_replica(model, hardware, assumptions)?;
    let mut plan = plan_with(model, hardware, assumptions, gpus)?;
    let mut others = Vec::new();
    for other in possible_gpus(model, hardware) {
        if other != gpus && replica_memory(model, hardware, assumptions, other).capacity_requests > 0 {
            others.push(plan_with(model, hardware, assumptions, other)?);
        }
    }
    plan.warnings = shortcuts::warnings(&plan, &others);
    Ok(plan)
}

fn check(model: &ModelShape, hardware: &HardwareProfile, assumptions: &Assumptions) -> Result<(), PlanError> {
    model.validate()?;
    hardware.validate()?;
    assumptions.validate()?;
    let too_long = |max_tokens, limit| PlanError::TooLong {
        model: model.name.clone(),
        input_tokens: assumptions.input_tokens,
        output_tokens: assumptions.output_tokens,
        max_tokens,
        limit,
    };
    let tokens = assumptions.tokens_per_request();
    if tokens > model.max_context_tokens {
        return Err(too_long(model.max_context_tokens, "context"));
    }
    // Within the window a sliding model is a plain one. Beyond it F1 and F2 would count too much.
    match model.sliding_window {
        Some(window) if tokens > window.tokens => Err(too_long(window.tokens, "sliding window")),
        _ => Ok(()),
    }
}

/// The number asked for, or the smallest one above it that holds the model and one request.
fn gpus_per_replica(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
) -> Result<u32, PlanError> {
    let allowed = possible_gpus(model, hardware);
    let least = assumptions.gpus_per_replica.unwrap_or(1);
    if !allowed.contains(&least) {
        let (model, hardware) = (model.name.clone(), hardware.name.clone());
        return Err(PlanError::Split { model, hardware, gpus: least, allowed });
    }
    let fits = |gpus: u32| replica_memory(model, hardware, assumptions, gpus).capacity_requests > 0;
    let found = allowed.iter().copied().find(|gpus| *gpus >= least && fits(*gpus));
    found.ok_or_else(|| does_not_fit(model, hardware, assumptions, allowed.last().copied().unwrap_or(1)))
}

fn does_not_fit(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
    gpus: u32,
) -> PlanError {
    let memory = replica_memory(model, hardware, assumptions, gpus);
    let kv_bytes =
        assumptions.tokens_per_request() as f64 * memory.kv_bytes_per_token * memory.kv_copies as f64;
    let activations = f64::from(gpus) * assumptions.activation_bytes_per_gpu;
    PlanError::DoesNotFit {
        model: model.name.clone(),
        hardware: hardware.name.clone(),
        gpus,
        tokens: assumptions.tokens_per_request(),
        needed_bytes: memory.weight_bytes + kv_bytes + activations,
        usable_bytes: f64::from(gpus) * memory.usable_bytes_per_gpu,
    }
}

fn plan_with(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
    gpus: u32,
) -> Result<CapacityPlan, PlanError> {
    let load = load(assumptions);
    let memory = replica_memory(model, hardware, assumptions, gpus);
    let pace = Pace::new(model, hardware, assumptions, &memory)?;
    let speed = replica_speed(assumptions, &memory, &pace);
    let fleet = fleet(hardware, assumptions, &load, &speed, &pace);
    Ok(CapacityPlan {
        model: model.clone(),
        hardware: hardware.clone(),
        assumptions: *assumptions,
        load,
        memory,
        speed,
        fleet,
        warnings: Vec::new(),
    })
}

fn load(assumptions: &Assumptions) -> Load {
    let requests_per_day = assumptions.requests_per_day();
    let mean = formulas::mean_per_second(requests_per_day);
    let peak = mean * assumptions.peak_factor();
    Load {
        requests_per_day,
        mean_requests_per_second: mean,
        peak_requests_per_second: peak,
        peak_input_tokens_per_second: peak * assumptions.input_tokens as f64,
        mean_output_tokens_per_second: mean * assumptions.output_tokens as f64,
        peak_output_tokens_per_second: peak * assumptions.output_tokens as f64,
    }
}

fn replica_memory(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
    gpus: u32,
) -> Memory {
    let pool = formulas::kv_pool_bytes(ReplicaMemory {
        gpus,
        memory_bytes_per_gpu: hardware.memory_bytes,
        utilisation: assumptions.memory_utilisation,
        weight_bytes: model.weight_bytes(),
        activation_bytes_per_gpu: assumptions.activation_bytes_per_gpu,
    });
    let kv_copies = model.kv_copies(gpus);
    let stored = model.kv_bytes_per_token() * kv_copies as f64;
    let capacity = formulas::batch_capacity(pool, assumptions.tokens_per_request() as f64, stored);
    Memory {
        gpus_per_replica: gpus,
        weight_bytes: model.weight_bytes(),
        usable_bytes_per_gpu: hardware.memory_bytes * assumptions.memory_utilisation,
        kv_bytes_per_token: model.kv_bytes_per_token(),
        kv_copies,
        kv_pool_bytes: pool,
        kv_pool_tokens: pool / stored,
        capacity_requests: capacity.max(0.0).floor() as u64,
    }
}

fn replica_speed(assumptions: &Assumptions, memory: &Memory, pace: &Pace) -> Speed {
    let batch = assumptions.max_running.map_or(u64::MAX, u64::from).min(memory.capacity_requests);
    let sequences = batch as f64;
    let step_seconds = pace.step_seconds(sequences);
    let per_gpu = sequences / step_seconds / f64::from(memory.gpus_per_replica);
    let prefill = pace.prefill;
    let gpu_seconds = formulas::gpu_seconds_per_request(formulas::RequestCost {
        prefill_floor_gpu_seconds: prefill.floor,
        mfu: assumptions.mfu,
        output_tokens: pace.output_tokens,
        decode_tokens_per_second_per_gpu: per_gpu,
    });
    Speed {
        batch,
        context_tokens: pace.context_tokens,
        step_floor_seconds: pace.step_floor_seconds(sequences),
        step_limit: pace.limit(sequences),
        step_seconds,
        decode_tokens_per_second_per_gpu: per_gpu,
        half_batch: formulas::half_batch(pace.decode, pace.context_tokens),
        ridge_batch: formulas::ridge_batch(pace.decode, pace.gpus),
        flops_per_second_per_gpu: pace.gpus.flops_per_second,
        prefill_gpu_seconds_per_token: prefill.per_token,
        prefill_attention_gpu_seconds: prefill.attention,
        prefill_floor_gpu_seconds: prefill.floor,
        gpu_seconds_per_request: gpu_seconds,
        prefill_share: prefill.floor / assumptions.mfu / gpu_seconds,
        prefill_seconds: pace.prefill_seconds(),
        ttft_seconds: pace.ttft_seconds(),
        full_batch_tpot_seconds: pace.tpot_seconds(sequences),
    }
}

fn fleet(
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
    load: &Load,
    speed: &Speed,
    pace: &Pace,
) -> Fleet {
    let per_replica = f64::from(pace.gpus.count);
    let busy_gpus = load.peak_requests_per_second * speed.gpu_seconds_per_request;
    let replicas = (busy_gpus * assumptions.headroom / per_replica).ceil().max(1.0);
    let gpus = replicas * per_replica;
    let peak_batch = pace.batch_at(load.peak_requests_per_second / replicas, speed.batch as f64);
    let per_gpu = assumptions.output_tokens as f64 / speed.gpu_seconds_per_request;
    let price = assumptions.dollars_per_gpu_hour.or(hardware.dollars_per_hour);
    let million = |rate| price.map(|price| formulas::dollars_per_million_tokens(price, rate));
    Fleet {
        replicas: replicas as u64,
        gpus: gpus as u64,
        peak_batch,
        peak_step_seconds: pace.step_seconds(peak_batch),
        peak_tpot_seconds: pace.tpot_seconds(peak_batch),
        in_flight: formulas::in_flight(load.peak_requests_per_second, pace.residence(peak_batch)),
        slots: (replicas as u64).saturating_mul(speed.batch),
        output_tokens_per_second_per_gpu: per_gpu,
        dollars_per_gpu_hour: price,
        dollars_per_million_busy: million(per_gpu),
        dollars_per_million_fixed: million(load.mean_output_tokens_per_second / gpus),
        watts: hardware.tdp_watts.map(|watts| watts * gpus),
    }
}
