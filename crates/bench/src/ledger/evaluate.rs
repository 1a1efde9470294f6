//! Puts numbers into a calculation. All arithmetic is that of `servelab_sim`; what is added here is which inputs
//! it gets, and the line that shows them.

use std::collections::BTreeMap;

use servelab_sim::formulas::{
    self, ColdStart, DecodeBatch, DecodeModel, Gpus, KvLayout, MeanResidence, PromptAttention, ReplicaMemory,
    RequestCost,
};
use servelab_sim::numbers::{
    bandwidth, bytes, dollars, flops, given, grouped, parameters, plural, seconds, short, whole,
};
use servelab_sim::roofline::possible_gpus;
use servelab_sim::{Assumptions, HardwareError, HardwareProfile, ModelShape, PlanError, planner};

use super::calculation::{Calculation, On};
use super::unit::{Unit, percent};

/// What of a GPU's memory is there for weights and KV where nobody says.
const DEFAULT: Assumptions = Assumptions::DEFAULT;
/// Length of the request that a replica must hold at least, where a calculation names none.
const USUAL_REQUEST_TOKENS: u64 = 2500;

/// The model and the hardware that a reader wants the limits for.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub model: ModelShape,
    pub hardware: HardwareProfile,
}

/// The names that calculations use.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    pub models: &'a BTreeMap<String, ModelShape>,
    pub chosen: &'a Chosen,
}

/// A calculation carried out.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    pub value: f64,
    pub unit: Unit,
    /// Its number among the closed forms; empty for plain bookkeeping.
    pub formula: &'static str,
    /// The circumstances in short: `TP4, B = 32, L = 2,250`. May be empty.
    pub at: String,
    pub general: &'static str,
    /// The general form with its numbers put in.
    pub substituted: String,
}

/// A calculation that cannot be carried out.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum EvaluationError {
    #[error("the ledger has no model {0}")]
    NoModel(String),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error("{model} does not fit {most} x {hardware}")]
    DoesNotFit { model: String, hardware: String, most: u32 },
    #[error("{0}")]
    Plan(#[from] PlanError),
    #[error("no price is known for {0}")]
    NoPrice(String),
}

impl Calculation {
    /// # Errors
    /// If a name is unknown, or the model does not fit the hardware.
    pub fn evaluate(&self, inputs: Inputs<'_>) -> Result<Computed, EvaluationError> {
        match self {
            Self::KvBytes { on } => inputs.subject(on).map(|subject| subject.kv_bytes()),
            Self::KvWithoutGqa { on } => inputs.subject(on).map(|subject| subject.kv_without_gqa()),
            Self::Weights { on } => inputs.subject(on).map(|subject| subject.weights()),
            Self::DecodeStep { on, sequences, context_tokens } => {
                inputs.replica(on).map(|replica| replica.decode_step(*sequences, *context_tokens))
            }
            Self::DecodeThroughput { on, sequences, context_tokens } => {
                inputs.replica(on).map(|replica| replica.decode_throughput(*sequences, *context_tokens))
            }
            Self::DecodeCeiling { on, input_tokens, output_tokens } => {
                inputs.replica(on).map(|replica| replica.decode_ceiling(*input_tokens, *output_tokens))
            }
            Self::Asymptote { on, context_tokens } => {
                inputs.replica(on).map(|replica| replica.asymptote(*context_tokens))
            }
            Self::HalfBatch { on, context_tokens } => {
                inputs.replica(on).map(|replica| replica.half_batch(*context_tokens))
            }
            Self::Ridge { on } => inputs.replica(on).map(|replica| replica.ridge()),
            Self::BatchingGain { on, sequences, context_tokens } => {
                inputs.replica(on).map(|replica| replica.batching_gain(*sequences, *context_tokens))
            }
            Self::HalvingGain { on, sequences, context_tokens } => {
                inputs.replica(on).map(|replica| replica.halving_gain(*sequences, *context_tokens))
            }
            Self::WeightRatio { on, than } => {
                Ok(weight_ratio(&inputs.subject(on)?, &inputs.model(Some(than))?))
            }
            Self::KvRatio { on, than } => Ok(kv_ratio(&inputs.subject(on)?, &inputs.model(Some(than))?)),
            Self::Room { gpus, memory_bytes_per_gpu, weight_bytes } => {
                Ok(room(*gpus, *memory_bytes_per_gpu, *weight_bytes))
            }
            Self::PoolTokens { on, utilisation, activation_bytes_per_gpu } => {
                inputs.replica(on).map(|replica| replica.pool_tokens(*utilisation, *activation_bytes_per_gpu))
            }
            Self::Capacity { on, utilisation, activation_bytes_per_gpu, tokens_per_request } => {
                inputs.replica(on).map(|replica| {
                    replica.capacity(*utilisation, *activation_bytes_per_gpu, *tokens_per_request)
                })
            }
            Self::GpusToHold { on, requests, tokens_per_request } => {
                inputs.gpus_to_hold(on, *requests, *tokens_per_request)
            }
            Self::Prefill { on, tokens } => inputs.replica(on).map(|replica| replica.prefill(*tokens)),
            Self::PrefillFactor {
                on,
                input_tokens,
                output_tokens,
                mfu,
                decode_tokens_per_second_per_gpu,
            } => {
                let replica = inputs.replica(on)?;
                Ok(replica.prefill_factor(
                    *input_tokens,
                    *output_tokens,
                    *mfu,
                    *decode_tokens_per_second_per_gpu,
                ))
            }
            Self::Plan { on } => inputs.plan(on),
            Self::InFlight { arrivals_per_second, residence_seconds } => {
                Ok(in_flight(*arrivals_per_second, *residence_seconds))
            }
            Self::Residence { ttft_seconds, output_tokens, tpot_seconds } => {
                Ok(residence(*ttft_seconds, *output_tokens, *tpot_seconds))
            }
            Self::AnswerFloor { on, tokens } => {
                inputs.replica(on).map(|replica| replica.answer_floor(*tokens))
            }
            Self::HitGain { on, uncached_tokens, total_tokens } => {
                inputs.replica(on).map(|replica| replica.hit_gain(*uncached_tokens, *total_tokens))
            }
            Self::WeightsFromStorage { on, storage_bytes_per_second } => {
                inputs.subject(on).map(|subject| subject.weights_from_storage(*storage_bytes_per_second))
            }
            Self::Price { dollars_per_gpu_hour, tokens_per_second_per_gpu } => {
                Ok(price(*dollars_per_gpu_hour, *tokens_per_second_per_gpu))
            }
            Self::PriceFloor { on, input_tokens, output_tokens } => {
                inputs.replica(on)?.price_floor(*input_tokens, *output_tokens)
            }
            Self::TokenRate { users, tokens_per_user, peak_factor } => {
                Ok(rate(Unit::TokensPerSecond, *users, *tokens_per_user, *peak_factor))
            }
            Self::RequestRate { users, requests_per_user, peak_factor } => {
                Ok(rate(Unit::RequestsPerSecond, *users, *requests_per_user, *peak_factor))
            }
            Self::GpusForRate {
                users,
                tokens_per_user,
                peak_factor,
                tokens_per_second_per_gpu,
                headroom,
            } => {
                let rate = rate(Unit::TokensPerSecond, *users, *tokens_per_user, *peak_factor);
                Ok(gpus_for_rate(&rate, *tokens_per_second_per_gpu, *headroom))
            }
            Self::HitsForSaving { saved_share, lookup_share } => {
                Ok(hits_for_saving(*saved_share, *lookup_share))
            }
            Self::Deviation { quoted, from } => Ok(deviation(*quoted, from.evaluate(inputs)?)),
        }
    }
}

impl Inputs<'_> {
    fn model(&self, name: Option<&str>) -> Result<ModelShape, EvaluationError> {
        match name {
            None => Ok(self.chosen.model.clone()),
            Some(name) => {
                self.models.get(name).cloned().ok_or_else(|| EvaluationError::NoModel(name.to_owned()))
            }
        }
    }

    fn hardware(&self, name: Option<&str>) -> Result<HardwareProfile, EvaluationError> {
        name.map_or_else(|| Ok(self.chosen.hardware.clone()), |name| Ok(HardwareProfile::named(name)?))
    }

    fn subject(&self, on: &On) -> Result<Subject, EvaluationError> {
        let mut shape = self.model(on.model.as_deref())?;
        shape.weight_dtype = on.weight_dtype.unwrap_or(shape.weight_dtype);
        shape.kv_dtype = on.kv_dtype.unwrap_or(shape.kv_dtype);
        Ok(Subject { shape })
    }

    fn replica(&self, on: &On) -> Result<Replica, EvaluationError> {
        let shape = self.subject(on)?.shape;
        let hardware = self.hardware(on.hardware.as_deref())?;
        let gpus = match on.gpus {
            Some(gpus) => gpus,
            None => fewest_gpus(&shape, &hardware)?,
        };
        Replica::new(shape, hardware, gpus)
    }

    fn gpus_to_hold(
        &self,
        on: &On,
        requests: u64,
        tokens_per_request: u64,
    ) -> Result<Computed, EvaluationError> {
        let shape = self.subject(on)?.shape;
        let hardware = self.hardware(on.hardware.as_deref())?;
        let most = hardware.most_gpus();
        let mut best: Option<(u64, Replica, u64)> = None;
        for gpus in possible_gpus(&shape, &hardware) {
            let replica = Replica::new(shape.clone(), hardware.clone(), gpus)?;
            let held = replica.held_requests(tokens_per_request).floor().max(0.0) as u64;
            if held > 0 {
                let all = requests.div_ceil(held) * u64::from(gpus);
                if best.as_ref().is_none_or(|(fewest, ..)| all < *fewest) {
                    best = Some((all, replica, held));
                }
            }
        }
        let Some((all, replica, held)) = best else {
            return Err(EvaluationError::DoesNotFit { model: shape.name, hardware: hardware.name, most });
        };
        let tokens = replica.fitting(tokens_per_request);
        Ok(Computed {
            value: all as f64,
            unit: Unit::Gpus,
            formula: "F4",
            at: format!(
                "{} in memory at once, {}",
                plural(requests, "request"),
                replicas(replica.gpus.count)
            ),
            general: "requests / B_cap x TP, with the TP that needs the fewest",
            substituted: format!(
                "{} / {} of {} tokens x {}",
                whole(requests),
                whole(held),
                whole(tokens),
                replica.gpus.count
            ),
        })
    }

    fn plan(&self, on: &On) -> Result<Computed, EvaluationError> {
        let shape = self.subject(on)?.shape;
        let hardware = self.hardware(on.hardware.as_deref())?;
        let room = shape.max_context_tokens.saturating_sub(DEFAULT.output_tokens).max(1);
        let assumptions = Assumptions {
            input_tokens: DEFAULT.input_tokens.min(room),
            gpus_per_replica: on.gpus,
            ..DEFAULT
        };
        let plan = planner::plan(&shape, &hardware, &assumptions)?;
        Ok(Computed {
            value: plan.fleet.gpus as f64,
            unit: Unit::Gpus,
            formula: "F6",
            at: format!(
                "prompts of {} tokens counted, {}",
                grouped(assumptions.input_tokens as f64),
                replicas(plan.memory.gpus_per_replica)
            ),
            general: "peak requests/s x GPU-seconds of a request x headroom, as servelab plan",
            substituted: format!(
                "{}/s x {} GPU-s x {}",
                short(plan.load.peak_requests_per_second),
                short(plan.speed.gpu_seconds_per_request),
                given(assumptions.headroom)
            ),
        })
    }
}

/// The fewest GPUs that hold the model and one request.
fn fewest_gpus(shape: &ModelShape, hardware: &HardwareProfile) -> Result<u32, EvaluationError> {
    for gpus in possible_gpus(shape, hardware) {
        let replica = Replica::new(shape.clone(), hardware.clone(), gpus)?;
        if replica.held_requests(USUAL_REQUEST_TOKENS) >= 1.0 {
            return Ok(gpus);
        }
    }
    Err(EvaluationError::DoesNotFit {
        model: shape.name.clone(),
        hardware: hardware.name.clone(),
        most: hardware.most_gpus(),
    })
}

fn tp(gpus: u32) -> String {
    if gpus == 1 { "one GPU".to_owned() } else { format!("TP{gpus}") }
}

fn replicas(gpus: u32) -> String {
    format!("replicas of {}", plural(u64::from(gpus), "GPU"))
}

/// A model.
struct Subject {
    shape: ModelShape,
}

impl Subject {
    fn kv_bytes(&self) -> Computed {
        let shape = &self.shape;
        Computed {
            value: shape.kv_bytes_per_token(),
            unit: Unit::BytesPerToken,
            formula: "F1",
            at: format!("{} KV", shape.kv_dtype),
            general: "2 x layers x kv heads x head_dim x bytes",
            substituted: format!(
                "2 x {} x {} x {} x {} B",
                shape.layers,
                shape.kv_heads,
                shape.head_dim,
                shape.kv_dtype.bytes()
            ),
        }
    }

    fn kv_without_gqa(&self) -> Computed {
        let shape = &self.shape;
        let bytes_per_element = shape.kv_dtype.bytes();
        let layout =
            KvLayout { layers: shape.layers, kv_heads: 1, head_dim: shape.hidden, bytes_per_element };
        let wrong = formulas::kv_bytes_per_token(layout);
        Computed {
            value: wrong / shape.kv_bytes_per_token(),
            unit: Unit::Factor,
            formula: "F1",
            at: String::new(),
            general: "(2 x layers x hidden x bytes) / F1",
            substituted: format!(
                "(2 x {} x {} x {bytes_per_element} B) / {} B",
                shape.layers,
                grouped(shape.hidden as f64),
                grouped(shape.kv_bytes_per_token())
            ),
        }
    }

    fn weights(&self) -> Computed {
        let shape = &self.shape;
        Computed {
            value: shape.weight_bytes(),
            unit: Unit::Bytes,
            formula: "",
            at: format!("{} weights", shape.weight_dtype),
            general: "parameters x bytes",
            substituted: format!("{} x {} B", parameters(shape.parameters), shape.weight_dtype.bytes()),
        }
    }

    fn weights_from_storage(&self, storage_bytes_per_second: f64) -> Computed {
        let weight_bytes = self.shape.weight_bytes();
        let start = ColdStart {
            image_pull_seconds: 0.0,
            weight_bytes,
            storage_bytes_per_second,
            init_seconds: 0.0,
            compile_seconds: 0.0,
            graph_capture_seconds: 0.0,
            first_request_seconds: 0.0,
        };
        Computed {
            value: formulas::cold_start_seconds(start),
            unit: Unit::Seconds,
            formula: "F9",
            at: format!("bytes alone at {}", bandwidth(storage_bytes_per_second)),
            general: "bytes / storage bandwidth",
            substituted: format!("{} / {}", bytes(weight_bytes), bandwidth(storage_bytes_per_second)),
        }
    }
}

/// A model on the GPUs of one replica.
struct Replica {
    shape: ModelShape,
    hardware: HardwareProfile,
    decode: DecodeModel,
    gpus: Gpus,
}

impl Replica {
    fn new(shape: ModelShape, hardware: HardwareProfile, count: u32) -> Result<Self, EvaluationError> {
        let (_, flops_per_second) = hardware.arithmetic(shape.weight_dtype)?;
        let decode = DecodeModel {
            streamed_parameters: shape.streamed_parameters() as f64,
            streamed_bytes: shape.streamed_bytes(),
            kv_bytes_per_token: shape.kv_bytes_per_token() * shape.kv_copies(count) as f64,
        };
        let bandwidth_bytes_per_second = hardware.bandwidth_bytes_per_second;
        let gpus = Gpus { count, bandwidth_bytes_per_second, flops_per_second };
        Ok(Self { shape, hardware, decode, gpus })
    }

    /// The longest context in which every token attends to all before it.
    fn longest(&self) -> u64 {
        let window = self.shape.sliding_window.map_or(u64::MAX, |window| window.tokens);
        self.shape.max_context_tokens.min(window)
    }

    fn fitting(&self, tokens: u64) -> u64 {
        tokens.min(self.longest())
    }

    fn context(&self, tokens: f64) -> f64 {
        tokens.min(self.longest() as f64)
    }

    /// A prompt and an answer cut to the context: the answer to half of it, the prompt to the rest.
    fn lengths(&self, input_tokens: u64, output_tokens: u64) -> (u64, u64) {
        let longest = self.longest();
        let output = output_tokens.min(longest / 2);
        (input_tokens.min(longest - output), output)
    }

    fn per_gpu(&self, rate: f64) -> f64 {
        rate / f64::from(self.gpus.count)
    }

    fn batch(&self, sequences: f64, context_tokens: f64) -> DecodeBatch {
        DecodeBatch { sequences, context_tokens: self.context(context_tokens) }
    }

    fn bandwidths(&self) -> String {
        times(self.gpus.count, &bandwidth(self.gpus.bandwidth_bytes_per_second))
    }

    /// The term of F2 that binds, with its numbers.
    fn step_substituted(&self, batch: DecodeBatch) -> String {
        let memory = formulas::decode_memory_seconds(self.decode, batch, self.gpus);
        let compute = formulas::decode_compute_seconds(self.decode, batch, self.gpus);
        if compute > memory {
            return format!(
                "2 x {} x {} / {} (arithmetic binds)",
                parameters(self.decode.streamed_parameters as u64),
                given(batch.sequences),
                times(self.gpus.count, &flops(self.gpus.flops_per_second))
            );
        }
        format!(
            "({} + {} x {} x {} B) / {}",
            bytes(self.decode.streamed_bytes),
            given(batch.sequences),
            grouped(batch.context_tokens),
            grouped(self.decode.kv_bytes_per_token),
            self.bandwidths()
        )
    }

    fn circumstances(&self, batch: DecodeBatch) -> String {
        format!("{}, B={}, L={}", tp(self.gpus.count), given(batch.sequences), grouped(batch.context_tokens))
    }

    fn decode_step(&self, sequences: f64, context_tokens: f64) -> Computed {
        let batch = self.batch(sequences, context_tokens);
        Computed {
            value: formulas::decode_step_floor_seconds(self.decode, batch, self.gpus),
            unit: Unit::Seconds,
            formula: "F2",
            at: self.circumstances(batch),
            general: "max((W + B x L x kv) / (TP x BW), 2 x P x B / (TP x FLOP/s))",
            substituted: self.step_substituted(batch),
        }
    }

    fn decode_throughput(&self, sequences: f64, context_tokens: f64) -> Computed {
        let batch = self.batch(sequences, context_tokens);
        let rate = formulas::decode_tokens_per_second(self.decode, batch, self.gpus);
        let shared = if self.gpus.count == 1 { String::new() } else { format!(" / {}", self.gpus.count) };
        Computed {
            value: self.per_gpu(rate),
            unit: Unit::TokensPerSecondPerGpu,
            formula: "F3",
            at: self.circumstances(batch),
            general: "B / max((W + B x L x kv) / (TP x BW), 2 x P x B / (TP x FLOP/s)) / TP",
            substituted: format!("{} / [{}]{shared}", given(sequences), self.step_substituted(batch)),
        }
    }

    fn decode_ceiling(&self, input_tokens: u64, output_tokens: u64) -> Computed {
        let (input, output) = self.lengths(input_tokens, output_tokens);
        let held = self.held_requests(input + output).floor().max(1.0);
        let throughput = self.decode_throughput(held, input as f64 + output as f64 / 2.0);
        let lengths = format!("{}/{} tokens", whole(input), whole(output));
        Computed { at: format!("{lengths}, {}", throughput.at), formula: "F3, F4", ..throughput }
    }

    fn asymptote(&self, context_tokens: f64) -> Computed {
        let context = self.context(context_tokens);
        let rate = formulas::asymptotic_tokens_per_second(self.decode, context, self.gpus);
        Computed {
            value: self.per_gpu(rate),
            unit: Unit::TokensPerSecondPerGpu,
            formula: "F3",
            at: format!("B without end, L={}", grouped(context)),
            general: "BW / (L x kv)",
            substituted: format!(
                "{} / ({} x {} B)",
                bandwidth(self.gpus.bandwidth_bytes_per_second),
                grouped(context),
                grouped(self.decode.kv_bytes_per_token)
            ),
        }
    }

    fn half_batch(&self, context_tokens: f64) -> Computed {
        let context = self.context(context_tokens);
        Computed {
            value: formulas::half_batch(self.decode, context),
            unit: Unit::Sequences,
            formula: "F3",
            at: format!("B_half at L={}", grouped(context)),
            general: "B_half = W / (L x kv)",
            substituted: format!(
                "{} / ({} x {} B)",
                bytes(self.decode.streamed_bytes),
                grouped(context),
                grouped(self.decode.kv_bytes_per_token)
            ),
        }
    }

    fn ridge(&self) -> Computed {
        Computed {
            value: formulas::ridge_batch(self.decode, self.gpus),
            unit: Unit::Sequences,
            formula: "F3",
            at: format!("ridge of {}", self.hardware.name),
            general: "FLOP/s / BW x (W / P) / 2",
            substituted: format!(
                "{} / {} x {} B / 2",
                flops(self.gpus.flops_per_second),
                bandwidth(self.gpus.bandwidth_bytes_per_second),
                given(self.decode.streamed_bytes / self.decode.streamed_parameters)
            ),
        }
    }

    fn batching_gain(&self, sequences: f64, context_tokens: f64) -> Computed {
        let rate = |sequences| {
            let batch = self.batch(sequences, context_tokens);
            formulas::decode_tokens_per_second(self.decode, batch, self.gpus)
        };
        let batch = self.batch(sequences, context_tokens);
        Computed {
            value: rate(sequences) / rate(1.0),
            unit: Unit::Factor,
            formula: "F3",
            at: format!("B={}, L={}", given(sequences), grouped(batch.context_tokens)),
            general: "throughput(B) / throughput(1)",
            substituted: format!("{} tok/s / {} tok/s", short(rate(sequences)), short(rate(1.0))),
        }
    }

    fn halving_gain(&self, sequences: f64, context_tokens: f64) -> Computed {
        let batch = self.batch(sequences, context_tokens);
        let half = DecodeModel {
            streamed_parameters: self.decode.streamed_parameters / 2.0,
            streamed_bytes: self.decode.streamed_bytes / 2.0,
            ..self.decode
        };
        let rate = |model| formulas::decode_tokens_per_second(model, batch, self.gpus);
        Computed {
            value: rate(half) / rate(self.decode),
            unit: Unit::Factor,
            formula: "F3",
            at: format!("half the weights, same KV, {}", self.circumstances(batch)),
            general: "throughput(B) with W/2 and P/2 / throughput(B)",
            substituted: format!("{} tok/s / {} tok/s", short(rate(half)), short(rate(self.decode))),
        }
    }

    /// First half of F4.
    fn pool_bytes(&self, utilisation: f64, activation_bytes_per_gpu: f64) -> f64 {
        formulas::kv_pool_bytes(ReplicaMemory {
            gpus: self.gpus.count,
            memory_bytes_per_gpu: self.hardware.memory_bytes,
            utilisation,
            weight_bytes: self.shape.weight_bytes(),
            activation_bytes_per_gpu,
        })
    }

    /// F4 with the usual share of the memory and the usual activations.
    fn held_requests(&self, tokens_per_request: u64) -> f64 {
        let pool = self.pool_bytes(DEFAULT.memory_utilisation, DEFAULT.activation_bytes_per_gpu);
        let tokens = self.fitting(tokens_per_request) as f64;
        formulas::batch_capacity(pool, tokens, self.decode.kv_bytes_per_token)
    }

    fn pool_substituted(&self, utilisation: f64, activation_bytes_per_gpu: f64) -> String {
        let replicas = if self.gpus.count == 1 { String::new() } else { format!("{} x ", self.gpus.count) };
        format!(
            "[{replicas}({} x {} - {} GB) - {}]",
            bytes(self.hardware.memory_bytes),
            given(utilisation),
            given(activation_bytes_per_gpu / 1e9),
            bytes(self.shape.weight_bytes())
        )
    }

    fn pool_tokens(&self, utilisation: f64, activation_bytes_per_gpu: f64) -> Computed {
        let pool = self.pool_bytes(utilisation, activation_bytes_per_gpu);
        Computed {
            value: pool / self.decode.kv_bytes_per_token,
            unit: Unit::Tokens,
            formula: "F4",
            at: format!("{}, {} of the memory", tp(self.gpus.count), percent(utilisation)),
            general: "(TP x (memory x utilisation - activations) - W) / kv",
            substituted: format!(
                "{} / {} B",
                self.pool_substituted(utilisation, activation_bytes_per_gpu),
                grouped(self.decode.kv_bytes_per_token)
            ),
        }
    }

    fn capacity(&self, utilisation: f64, activation_bytes_per_gpu: f64, tokens_per_request: u64) -> Computed {
        let tokens = self.fitting(tokens_per_request);
        let pool = self.pool_bytes(utilisation, activation_bytes_per_gpu);
        Computed {
            value: formulas::batch_capacity(pool, tokens as f64, self.decode.kv_bytes_per_token),
            unit: Unit::Requests,
            formula: "F4",
            at: format!("{}, {} tokens each", tp(self.gpus.count), whole(tokens)),
            general: "(TP x (memory x utilisation - activations) - W) / ((ISL + OSL) x kv)",
            substituted: format!(
                "{} / ({} x {} B)",
                self.pool_substituted(utilisation, activation_bytes_per_gpu),
                whole(tokens),
                grouped(self.decode.kv_bytes_per_token)
            ),
        }
    }

    /// F5 in GPU-seconds, attention included.
    fn prefill_gpu_seconds(&self, cached_tokens: u64, uncached_tokens: u64) -> f64 {
        let attention = PromptAttention {
            layers: self.shape.layers,
            heads: self.shape.heads,
            head_dim: self.shape.head_dim,
            cached_tokens: cached_tokens as f64,
            uncached_tokens: uncached_tokens as f64,
        };
        let flops = self.gpus.flops_per_second;
        let per_token = formulas::prefill_gpu_seconds_per_token(self.decode.streamed_parameters, flops);
        uncached_tokens as f64 * per_token + formulas::causal_attention_gpu_seconds(attention, flops)
    }

    fn prefill(&self, tokens: u64) -> Computed {
        let tokens = self.fitting(tokens);
        Computed {
            value: self.per_gpu(self.prefill_gpu_seconds(0, tokens)),
            unit: Unit::Seconds,
            formula: "F5",
            at: format!("{} tokens of prompt, {}, every FLOP used", whole(tokens), tp(self.gpus.count)),
            general: "(L x 2 x P + 2 x layers x heads x d x L^2) / (TP x FLOP/s)",
            substituted: format!(
                "({} x 2 x {} + 2 x {} x {} x {} x {}^2) / {}",
                whole(tokens),
                parameters(self.decode.streamed_parameters as u64),
                self.shape.layers,
                self.shape.heads,
                self.shape.head_dim,
                whole(tokens),
                times(self.gpus.count, &flops(self.gpus.flops_per_second))
            ),
        }
    }

    fn prefill_factor(&self, input: u64, output: u64, mfu: f64, decode_rate: f64) -> Computed {
        let (input, output) = self.lengths(input, output);
        let cost = RequestCost {
            prefill_floor_gpu_seconds: self.prefill_gpu_seconds(0, input),
            mfu,
            output_tokens: output as f64,
            decode_tokens_per_second_per_gpu: decode_rate,
        };
        let decoding = output as f64 / decode_rate;
        Computed {
            value: formulas::gpu_seconds_per_request(cost) / decoding,
            unit: Unit::Factor,
            formula: "F6",
            at: format!("{} in, {} out, MFU {}", whole(input), whole(output), given(mfu)),
            general: "(ISL x F5 / MFU + OSL / throughput) / (OSL / throughput)",
            substituted: format!(
                "({} / {} + {} / {}) / ({} / {})",
                seconds(cost.prefill_floor_gpu_seconds),
                given(mfu),
                whole(output),
                short(decode_rate),
                whole(output),
                short(decode_rate)
            ),
        }
    }

    fn answer_floor(&self, tokens: f64) -> Computed {
        let step = formulas::decode_step_floor_seconds(self.decode, self.batch(1.0, 0.0), self.gpus);
        let residence = MeanResidence { ttft_seconds: step, output_tokens: tokens - 1.0, tpot_seconds: step };
        Computed {
            value: residence.seconds(),
            unit: Unit::Seconds,
            formula: "F2",
            at: format!("{} tokens out, alone, {}", given(tokens), tp(self.gpus.count)),
            general: "OSL x W / (TP x BW)",
            substituted: format!(
                "{} x {} / {}",
                given(tokens),
                bytes(self.decode.streamed_bytes),
                self.bandwidths()
            ),
        }
    }

    fn hit_gain(&self, uncached_tokens: u64, total_tokens: u64) -> Computed {
        let total = self.fitting(total_tokens);
        // The same share of it.
        let uncached = (uncached_tokens * total).div_ceil(total_tokens).max(1);
        let (hit, miss) =
            (self.prefill_gpu_seconds(total - uncached, uncached), self.prefill_gpu_seconds(0, total));
        Computed {
            value: miss / hit,
            unit: Unit::Factor,
            formula: "F8",
            at: format!("{} of {} tokens to compute, no queue", whole(uncached), whole(total)),
            general: "total x F5 / (uncached x F5), attention included",
            substituted: format!("{} / {}", seconds(miss), seconds(hit)),
        }
    }

    fn price_floor(&self, input_tokens: u64, output_tokens: u64) -> Result<Computed, EvaluationError> {
        let hourly = self.hardware.dollars_per_hour;
        let hourly = hourly.ok_or_else(|| EvaluationError::NoPrice(self.hardware.name.clone()))?;
        let ceiling = self.decode_ceiling(input_tokens, output_tokens);
        let price = price(hourly, ceiling.value);
        Ok(Computed { at: format!("{}/h, {}", dollars(hourly), ceiling.at), ..price })
    }
}

fn times(count: u32, text: &str) -> String {
    if count == 1 { text.to_owned() } else { format!("({count} x {text})") }
}

fn weight_ratio(subject: &Subject, than: &ModelShape) -> Computed {
    let (own, other) = (subject.shape.streamed_bytes(), than.streamed_bytes());
    Computed {
        value: own / other,
        unit: Unit::Factor,
        formula: "F2",
        at: "while reading weights binds".to_owned(),
        general: "W / W'",
        substituted: format!("{} / {}", bytes(own), bytes(other)),
    }
}

fn kv_ratio(subject: &Subject, than: &ModelShape) -> Computed {
    let (own, other) = (subject.shape.kv_bytes_per_token(), than.kv_bytes_per_token());
    Computed {
        value: own / other,
        unit: Unit::Factor,
        formula: "F3",
        at: "while reading KV binds".to_owned(),
        general: "kv / kv'",
        substituted: format!("{} B / {} B", grouped(own), grouped(other)),
    }
}

fn room(gpus: u32, memory_bytes_per_gpu: f64, weight_bytes: f64) -> Computed {
    let pool = formulas::kv_pool_bytes(ReplicaMemory {
        gpus,
        memory_bytes_per_gpu,
        utilisation: 1.0,
        weight_bytes,
        activation_bytes_per_gpu: 0.0,
    });
    Computed {
        value: pool / f64::from(gpus),
        unit: Unit::Bytes,
        formula: "F4",
        at: "a GPU, from the quote's own figures".to_owned(),
        general: "memory - W / TP",
        substituted: format!("{} - {} / {gpus}", bytes(memory_bytes_per_gpu), bytes(weight_bytes)),
    }
}

fn in_flight(arrivals_per_second: f64, residence_seconds: f64) -> Computed {
    let residence = MeanResidence { ttft_seconds: residence_seconds, output_tokens: 0.0, tpot_seconds: 0.0 };
    Computed {
        value: formulas::in_flight(arrivals_per_second, residence),
        unit: Unit::Requests,
        formula: "F7",
        at: format!("mean residence {}", seconds(residence_seconds)),
        general: "arrival rate x mean residence",
        substituted: format!("{}/s x {}", given(arrivals_per_second), seconds(residence_seconds)),
    }
}

fn residence(ttft_seconds: f64, output_tokens: f64, tpot_seconds: f64) -> Computed {
    let residence = MeanResidence { ttft_seconds, output_tokens, tpot_seconds };
    Computed {
        value: residence.seconds(),
        unit: Unit::Seconds,
        formula: "F7",
        at: format!("after {} tokens", given(output_tokens)),
        general: "TTFT + OSL x TPOT",
        substituted: format!(
            "{} + {} x {}",
            seconds(ttft_seconds),
            given(output_tokens),
            seconds(tpot_seconds)
        ),
    }
}

fn price(dollars_per_gpu_hour: f64, tokens_per_second_per_gpu: f64) -> Computed {
    Computed {
        value: formulas::dollars_per_million_tokens(dollars_per_gpu_hour, tokens_per_second_per_gpu),
        unit: Unit::DollarsPerMillionTokens,
        formula: "F10",
        at: format!(
            "{}/h, {} tok/s",
            dollars(dollars_per_gpu_hour),
            given(tokens_per_second_per_gpu.round())
        ),
        general: "$/GPU-hour / (tok/s/GPU x 3600) x 1M",
        substituted: format!(
            "{} / ({} x 3600) x 1M",
            dollars(dollars_per_gpu_hour),
            short(tokens_per_second_per_gpu)
        ),
    }
}

fn rate(unit: Unit, users: f64, per_user: f64, peak_factor: f64) -> Computed {
    let mean = formulas::mean_per_second(users * per_user);
    let at = if peak_factor == 1.0 { "mean".to_owned() } else { format!("peak of {} x", given(peak_factor)) };
    let factor = if peak_factor == 1.0 { String::new() } else { format!(" x {}", given(peak_factor)) };
    Computed {
        value: mean * peak_factor,
        unit,
        formula: "",
        at,
        general: "users x each a day / 86,400 s x peak",
        substituted: format!("{} x {} / 86,400{factor}", given(users), given(per_user)),
    }
}

fn gpus_for_rate(rate: &Computed, tokens_per_second_per_gpu: f64, headroom: f64) -> Computed {
    Computed {
        value: rate.value / tokens_per_second_per_gpu * headroom,
        unit: Unit::Gpus,
        formula: "",
        at: format!("{} tok/s a GPU, x {} headroom", short(tokens_per_second_per_gpu), given(headroom)),
        general: "tok/s at the peak / tok/s/GPU x headroom",
        substituted: format!(
            "{} / {} x {}",
            short(rate.value),
            short(tokens_per_second_per_gpu),
            given(headroom)
        ),
    }
}

fn hits_for_saving(saved_share: f64, lookup_share: f64) -> Computed {
    Computed {
        value: saved_share + lookup_share,
        unit: Unit::Share,
        formula: "",
        at: format!("if a look-up costs {} of a request", percent(lookup_share)),
        general: "hits = saved + cost of a look-up",
        substituted: format!("{} + {}", percent(saved_share), percent(lookup_share)),
    }
}

fn deviation(quoted: f64, computed: Computed) -> Computed {
    Computed {
        value: quoted / computed.value - 1.0,
        unit: Unit::Deviation,
        formula: computed.formula,
        at: String::new(),
        general: "quoted / computed - 1",
        substituted: format!("{} / {} - 1", computed.unit.show(quoted), computed.unit.show(computed.value)),
    }
}
