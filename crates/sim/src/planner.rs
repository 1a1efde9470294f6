//! From daily users to GPUs: the back-of-the-envelope chain with every assumption in view.
//!
//! users -> sessions -> requests -> requests/s -> tokens/s; weights and KV -> GPUs a replica, requests a
//! replica (F1, F4); step and prefill floors -> GPU-seconds a request (F2, F3, F5, F6); GPUs, requests in
//! flight (F7), price (F10). Floors become estimates by two shares of the peak, `mfu` and
//! `decode_efficiency`; nothing else is fitted.

use serde::Serialize;

use crate::formulas::{self, DecodeBatch, DecodeModel, Gpus, MeanResidence, PromptAttention, ReplicaMemory};
use crate::hardware::{HardwareError, HardwareProfile};
use crate::roofline::{Limit, possible_gpus};
use crate::shape::{ModelShape, ShapeError};
use crate::shortcuts::{self, Warning};

/// All that a plan takes for granted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Assumptions {
    pub daily_users: f64,
    pub sessions_per_user: f64,
    pub requests_per_session: f64,
    /// Mean prompt (ISL).
    pub input_tokens: u64,
    /// Share of the input that the prefix cache holds already.
    pub cached_share: f64,
    /// Mean answer (OSL).
    pub output_tokens: u64,
    /// Rate of the busiest minutes over the mean. `None`: nobody knows, [`ASSUMED_PEAK_FACTOR`].
    pub peak_factor: Option<f64>,
    /// Share of the GPU's memory that the engine may use; vLLM's `gpu-memory-utilization`.
    pub memory_utilisation: f64,
    /// Activations, graphs and workspaces.
    pub activation_bytes_per_gpu: f64,
    /// Share of the peak FLOP/s that prefill reaches.
    pub mfu: f64,
    /// Floor of a decode step over what it really takes.
    pub decode_efficiency: f64,
    /// GPUs beyond those that the peak keeps busy: queueing, failures, deployments.
    pub headroom: f64,
    /// `None`: the fewest that hold the model and one request.
    pub gpus_per_replica: Option<u32>,
    /// Most requests that run at once on a replica. `None`: what its memory holds.
    pub max_running: Option<u32>,
    /// `None`: that of the hardware profile.
    pub dollars_per_gpu_hour: Option<f64>,
}

/// The peak factor where nobody knows a better one; three to five are usually quoted.
pub const ASSUMED_PEAK_FACTOR: f64 = 3.0;

impl Assumptions {
    /// A million users, five sessions of ten requests, 2,000 tokens in and 300 out.
    ///
    /// `mfu` and `decode_efficiency`: at low load, TPOT of the 8B and the 70B on H100 is 1.6 to 2.0 times its
    /// floor measured, and 1.4 times as NVIDIA's AIConfigurator predicts; the tests hold the two shares against
    /// its throughputs. 0.9 of the memory is vLLM's old default, 1.25 GB of activations a usual value.
    pub const DEFAULT: Self = Self {
        daily_users: 1e6,
        sessions_per_user: 5.0,
        requests_per_session: 10.0,
        input_tokens: 2000,
        cached_share: 0.0,
        output_tokens: 300,
        peak_factor: None,
        memory_utilisation: 0.9,
        activation_bytes_per_gpu: 1.25e9,
        mfu: 0.5,
        decode_efficiency: 0.6,
        headroom: 1.3,
        gpus_per_replica: None,
        max_running: None,
        dollars_per_gpu_hour: None,
    };

    pub fn requests_per_day(&self) -> f64 {
        self.daily_users * self.sessions_per_user * self.requests_per_session
    }

    pub fn peak_factor(&self) -> f64 {
        self.peak_factor.unwrap_or(ASSUMED_PEAK_FACTOR)
    }

    /// Prompt tokens that are computed: even a full hit computes one.
    pub fn uncached_tokens(&self) -> f64 {
        let input = self.input_tokens as f64;
        (input * (1.0 - self.cached_share)).round().max(1.0)
    }

    /// ISL + OSL: what a request takes in the KV cache in the end.
    pub fn tokens_per_request(&self) -> u64 {
        self.input_tokens + self.output_tokens
    }

    /// # Errors
    /// [`PlanError::Range`] for the first assumption that cannot be.
    pub fn validate(&self) -> Result<(), PlanError> {
        let tokens = "from 1 to 1e9";
        within("daily_users", self.daily_users, 1.0, 1e10, "from 1 to 1e10")?;
        within("sessions_per_user", self.sessions_per_user, 1e-3, 1000.0, "from 0.001 to 1000")?;
        within("requests_per_session", self.requests_per_session, 1e-3, 1000.0, "from 0.001 to 1000")?;
        // A thousand for everybody on earth.
        within("requests_per_day", self.requests_per_day(), 0.0, 1e13, "at most 1e13")?;
        within("input_tokens", self.input_tokens as f64, 1.0, 1e9, tokens)?;
        within("output_tokens", self.output_tokens as f64, 1.0, 1e9, tokens)?;
        within("cached_share", self.cached_share, 0.0, 1.0, "from 0 to 1")?;
        within("peak_factor", self.peak_factor(), 1.0, 100.0, "from 1 to 100")?;
        within("memory_utilisation", self.memory_utilisation, 0.01, 1.0, "from 0.01 to 1")?;
        within("activation_bytes_per_gpu", self.activation_bytes_per_gpu, 0.0, 1e15, "from 0 to 1e15 bytes")?;
        within("mfu", self.mfu, 0.01, 1.0, "from 0.01 to 1")?;
        within("decode_efficiency", self.decode_efficiency, 0.01, 1.0, "from 0.01 to 1")?;
        within("headroom", self.headroom, 1.0, 10.0, "from 1 to 10")?;
        let gpus = self.gpus_per_replica.map_or(1.0, f64::from);
        within("gpus_per_replica", gpus, 1.0, 1024.0, "from 1 to 1024")?;
        let running = self.max_running.map_or(1.0, f64::from);
        within("max_running", running, 1.0, 1e9, "from 1 to 1e9")?;
        within(
            "dollars_per_gpu_hour",
            self.dollars_per_gpu_hour.unwrap_or(0.0),
            0.0,
            1e5,
            "from 0 to 100000 dollars",
        )
    }
}

impl Default for Assumptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

fn within(
    field: &'static str,
    value: f64,
    least: f64,
    most: f64,
    rule: &'static str,
) -> Result<(), PlanError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(PlanError::Range { field, value, rule }) }
}

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
    let pace = pace(model, hardware, assumptions, &memory)?;
    let speed = replica_speed(model, assumptions, &memory, &pace);
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

/// How long one replica takes for what it does.
#[derive(Clone, Copy)]
struct Pace {
    decode: DecodeModel,
    gpus: Gpus,
    context_tokens: f64,
    decode_efficiency: f64,
    output_tokens: f64,
    /// The arithmetic of one prompt.
    prefill_seconds: f64,
}

impl Pace {
    fn step_floor_seconds(&self, sequences: f64) -> f64 {
        formulas::decode_step_floor_seconds(self.decode, self.batch(sequences), self.gpus)
    }

    fn step_seconds(&self, sequences: f64) -> f64 {
        self.step_floor_seconds(sequences) / self.decode_efficiency
    }

    fn limit(&self, sequences: f64) -> Limit {
        let batch = self.batch(sequences);
        let memory = formulas::decode_memory_seconds(self.decode, batch, self.gpus);
        let compute = formulas::decode_compute_seconds(self.decode, batch, self.gpus);
        if memory >= compute { Limit::Memory } else { Limit::Compute }
    }

    fn batch(&self, sequences: f64) -> DecodeBatch {
        DecodeBatch { sequences, context_tokens: self.context_tokens }
    }

    fn ttft_seconds(&self) -> f64 {
        self.prefill_seconds.max(self.step_seconds(1.0))
    }

    /// While a request decodes, the prompt of each of the others is computed once. With that, Little's law over
    /// a replica that is just full gives its batch again.
    fn tpot_seconds(&self, sequences: f64) -> f64 {
        self.step_seconds(sequences) + (sequences - 1.0) * self.prefill_seconds / self.output_tokens
    }

    fn residence(&self, sequences: f64) -> MeanResidence {
        MeanResidence {
            ttft_seconds: self.ttft_seconds(),
            output_tokens: self.output_tokens,
            tpot_seconds: self.tpot_seconds(sequences),
        }
    }

    /// The batch that a request is part of when `arrivals_per_second` come to this replica: itself and the N
    /// that are there on average, where N follows from how long each stays in that batch (F7). Up to `full`.
    ///
    /// The residence grows with the batch along a convex curve, so there is one N at most below a full batch.
    fn batch_at(&self, arrivals_per_second: f64, full: f64) -> f64 {
        let surplus =
            |others: f64| formulas::in_flight(arrivals_per_second, self.residence(others + 1.0)) - others;
        let (mut low, mut high) = (0.0, full - 1.0);
        if surplus(high) > 0.0 {
            return full;
        }
        for _ in 0..100 {
            let middle = (low + high) / 2.0;
            if surplus(middle) > 0.0 { low = middle } else { high = middle }
        }
        high + 1.0
    }
}

fn pace(
    model: &ModelShape,
    hardware: &HardwareProfile,
    assumptions: &Assumptions,
    memory: &Memory,
) -> Result<Pace, PlanError> {
    let (_, flops_per_second) = hardware.arithmetic(model.weight_dtype)?;
    let prefill = prefill(model, assumptions, flops_per_second);
    Ok(Pace {
        decode: DecodeModel {
            streamed_parameters: model.streamed_parameters() as f64,
            streamed_bytes: model.streamed_bytes(),
            kv_bytes_per_token: memory.kv_bytes_per_token * memory.kv_copies as f64,
        },
        gpus: Gpus {
            count: memory.gpus_per_replica,
            bandwidth_bytes_per_second: hardware.bandwidth_bytes_per_second,
            flops_per_second,
        },
        context_tokens: assumptions.input_tokens as f64 + assumptions.output_tokens as f64 / 2.0,
        decode_efficiency: assumptions.decode_efficiency,
        output_tokens: assumptions.output_tokens as f64,
        prefill_seconds: prefill.floor / assumptions.mfu / f64::from(memory.gpus_per_replica),
    })
}

fn replica_speed(model: &ModelShape, assumptions: &Assumptions, memory: &Memory, pace: &Pace) -> Speed {
    let batch = assumptions.max_running.map_or(u64::MAX, u64::from).min(memory.capacity_requests);
    let sequences = batch as f64;
    let step_seconds = pace.step_seconds(sequences);
    let per_gpu = sequences / step_seconds / f64::from(memory.gpus_per_replica);
    let flops_per_second = pace.gpus.flops_per_second;
    let prefill = prefill(model, assumptions, flops_per_second);
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
        flops_per_second_per_gpu: flops_per_second,
        prefill_gpu_seconds_per_token: prefill.per_token,
        prefill_attention_gpu_seconds: prefill.attention,
        prefill_floor_gpu_seconds: prefill.floor,
        gpu_seconds_per_request: gpu_seconds,
        prefill_share: prefill.floor / assumptions.mfu / gpu_seconds,
        prefill_seconds: pace.prefill_seconds,
        ttft_seconds: pace.ttft_seconds(),
        full_batch_tpot_seconds: pace.tpot_seconds(sequences),
    }
}

/// F5 of one prompt, in GPU-seconds.
struct Prefill {
    per_token: f64,
    attention: f64,
    floor: f64,
}

fn prefill(model: &ModelShape, assumptions: &Assumptions, flops_per_second: f64) -> Prefill {
    let uncached_tokens = assumptions.uncached_tokens();
    let attention = PromptAttention {
        layers: model.layers,
        heads: model.heads,
        head_dim: model.head_dim,
        cached_tokens: assumptions.input_tokens as f64 - uncached_tokens,
        uncached_tokens,
    };
    let per_token =
        formulas::prefill_gpu_seconds_per_token(model.streamed_parameters() as f64, flops_per_second);
    let attention = formulas::causal_attention_gpu_seconds(attention, flops_per_second);
    Prefill { per_token, attention, floor: per_token * uncached_tokens + attention }
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
