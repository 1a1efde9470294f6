//! The least time of one step: what it must read, multiply and send, each over the peak of the hardware.
//!
//! Unlike F2 and F5 of [`crate::formulas`] it takes any mix of prefill and decode, counts attention, the rows
//! of logits that are wanted, sliding windows, and the traffic between the GPUs. A measurement below it is
//! wrong, or is not of this model on this hardware. (Activations and their memory traffic are left out, and
//! the three limits may overlap perfectly: this is a floor, not a prediction.)

use serde::Serialize;
use servelab_engine::Step;

use crate::hardware::{HardwareError, HardwareProfile};
use crate::shape::ModelShape;

/// Bytes of an activation on the links between GPUs. FP8 models too exchange 16-bit sums.
const ACTIVATION_BYTES: f64 = 2.0;
/// Sums over all GPUs in each layer: after attention and after the feed-forward part (Shoeybi et al.,
/// "Megatron-LM", 2019).
const ALL_REDUCES_PER_LAYER: f64 = 2.0;

/// A model on the GPUs of one replica.
#[derive(Clone, Debug)]
pub struct Roofline {
    shape: ModelShape,
    gpus: f64,
    kv_copies: f64,
    bandwidth_bytes_per_second: f64,
    flops_per_second: f64,
    /// Of one GPU; none if there is one only.
    link_bytes_per_second: Option<f64>,
}

/// A number of GPUs that a model cannot be spread over.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RooflineError {
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error(
        "{model} does not split over {gpus} GPUs of {hardware}; it splits over {}",
        allowed.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    Gpus { model: String, hardware: String, gpus: u32, allowed: Vec<u32> },
}

/// What a step computes for one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceWork {
    /// Tokens whose keys and values are in the cache already.
    pub cached_tokens: u64,
    /// Tokens computed in this step.
    pub new_tokens: u64,
    /// Tokens whose logits are wanted: 1 when something is sampled, 0 for a chunk that does not end the prompt.
    pub logits_rows: u64,
}

impl SequenceWork {
    /// One token at a context of `context_tokens`, itself included.
    pub fn decode(context_tokens: u64) -> Self {
        Self { cached_tokens: context_tokens.saturating_sub(1), new_tokens: 1, logits_rows: 1 }
    }

    /// The rest of a prompt, after which the first token is sampled.
    pub fn prefill(cached_tokens: u64, new_tokens: u64) -> Self {
        Self { cached_tokens, new_tokens, logits_rows: 1 }
    }

    /// What each sequence of a step computes.
    pub fn of(step: &Step) -> impl Iterator<Item = Self> {
        step.sequences.iter().map(|sequence| {
            let new_tokens = sequence.tokens.len() as u64;
            // Rows ascend: whoever has the last token of a sequence wants its logits.
            let last = sequence.tokens.end.saturating_sub(1);
            let wanted = step.rows.binary_search_by_key(&last, |row| row.row).is_ok();
            Self {
                cached_tokens: u64::from(sequence.context_len).saturating_sub(new_tokens),
                new_tokens,
                logits_rows: u64::from(wanted),
            }
        })
    }

    /// A part of a prompt that does not end it.
    pub fn chunk(cached_tokens: u64, new_tokens: u64) -> Self {
        Self { cached_tokens, new_tokens, logits_rows: 0 }
    }
}

/// What bounds a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    Memory,
    Compute,
    Interconnect,
}

impl Limit {
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
            Self::Interconnect => "interconnect",
        }
    }
}

/// What a step costs at least. Bytes and operations are of all GPUs together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepCost {
    pub new_tokens: u64,
    /// Weights once, keys and values of every sequence.
    pub memory_bytes: f64,
    pub flops: f64,
    /// That each GPU sends to the others.
    pub link_bytes: f64,
    pub memory_seconds: f64,
    pub compute_seconds: f64,
    pub link_seconds: f64,
}

impl StepCost {
    /// No step is faster.
    pub fn floor_seconds(&self) -> f64 {
        self.memory_seconds.max(self.compute_seconds).max(self.link_seconds)
    }

    /// Which of the three it is; memory for an empty step.
    pub fn limit(&self) -> Limit {
        let floor = self.floor_seconds();
        match () {
            () if self.memory_seconds >= floor => Limit::Memory,
            () if self.compute_seconds >= floor => Limit::Compute,
            () => Limit::Interconnect,
        }
    }
}

impl Roofline {
    /// `shape` over `gpus` GPUs of `hardware`, both valid.
    ///
    /// # Errors
    /// If the hardware cannot compute with these weights, or the model does not split over that many GPUs.
    pub fn new(shape: &ModelShape, hardware: &HardwareProfile, gpus: u32) -> Result<Self, RooflineError> {
        let allowed = possible_gpus(shape, hardware);
        if !allowed.contains(&gpus) {
            let (model, hardware) = (shape.name.clone(), hardware.name.clone());
            return Err(RooflineError::Gpus { model, hardware, gpus, allowed });
        }
        let (_, flops_per_second) = hardware.arithmetic(shape.weight_dtype)?;
        let link = hardware.interconnect.as_ref().filter(|_| gpus > 1);
        Ok(Self {
            shape: shape.clone(),
            gpus: f64::from(gpus),
            kv_copies: shape.kv_copies(gpus) as f64,
            bandwidth_bytes_per_second: hardware.bandwidth_bytes_per_second,
            flops_per_second,
            link_bytes_per_second: link.map(|link| link.bytes_per_second),
        })
    }

    /// The cost of a step over these sequences. Nothing to compute costs nothing.
    pub fn step(&self, sequences: impl IntoIterator<Item = SequenceWork>) -> StepCost {
        let mut sum = Sum::default();
        sequences.into_iter().for_each(|work| sum.add(&self.shape, work));
        let memory_bytes = self.memory_bytes(&sum);
        let flops = self.flops(&sum);
        let link_bytes = self.link_bytes(sum.new_tokens);
        StepCost {
            new_tokens: sum.new_tokens,
            memory_bytes,
            flops,
            link_bytes,
            memory_seconds: memory_bytes / (self.gpus * self.bandwidth_bytes_per_second),
            compute_seconds: flops / (self.gpus * self.flops_per_second),
            link_seconds: self.link_bytes_per_second.map_or(0.0, |rate| link_bytes / rate),
        }
    }

    fn memory_bytes(&self, sum: &Sum) -> f64 {
        if sum.new_tokens == 0 {
            return 0.0;
        }
        let unused = if sum.logits_rows == 0 { self.shape.logits_parameters() } else { 0 };
        // A tied embedding is then read row by row, like an untied one.
        let parameters = self.shape.streamed_parameters().saturating_sub(unused);
        let kv_bytes_per_layer_token = self.shape.kv_bytes_per_token() / self.shape.layers as f64;
        parameters as f64 * self.shape.weight_dtype.bytes() as f64
            + sum.kv_layer_tokens * kv_bytes_per_layer_token * self.kv_copies
    }

    fn flops(&self, sum: &Sum) -> f64 {
        let logits = self.shape.logits_parameters();
        let body = self.shape.streamed_parameters().saturating_sub(logits);
        let products = 2.0 * (body as f64 * sum.new_tokens as f64 + logits as f64 * sum.logits_rows as f64);
        // Scores and weighted values: two products of head_dim for each pair of tokens and each head.
        products + 4.0 * (self.shape.heads * self.shape.head_dim) as f64 * sum.layer_pairs
    }

    /// Every GPU sends its share of each sum at least once. A ring sends up to twice that; switches that add
    /// on the way (NVLink SHARP) come down to it.
    fn link_bytes(&self, new_tokens: u64) -> f64 {
        if self.link_bytes_per_second.is_none() {
            return 0.0;
        }
        let per_token = ALL_REDUCES_PER_LAYER * (self.shape.layers * self.shape.hidden) as f64;
        per_token * ACTIVATION_BYTES * new_tokens as f64
    }
}

/// The numbers of GPUs that `shape` can be spread over within one machine of `hardware`.
pub fn possible_gpus(shape: &ModelShape, hardware: &HardwareProfile) -> Vec<u32> {
    (1..=hardware.most_gpus()).filter(|gpus| shape.splits_over(*gpus)).collect()
}

/// What a step is made of, whatever computes it. All are whole numbers, so that no order of adding up changes one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sum {
    pub new_tokens: u64,
    pub logits_rows: u64,
    /// Tokens in the cache when the step is done, over all its sequences.
    pub context_tokens: u64,
    /// Pairs of a new token and one that it attends to, whatever the layers' windows.
    pub pairs: f64,
    /// Tokens whose keys and values are read or written, over all layers.
    pub kv_layer_tokens: f64,
    /// Pairs of a new token and one that it attends to, over all layers.
    pub layer_pairs: f64,
}

impl Sum {
    /// Counts what does not depend on the model.
    pub fn count(&mut self, work: SequenceWork) {
        self.new_tokens += work.new_tokens;
        self.logits_rows += work.logits_rows;
        self.context_tokens += work.cached_tokens + work.new_tokens;
        self.pairs += attended_pairs(work, None);
    }

    /// After a step of one token for each sequence, the next such step.
    pub fn grow(&mut self, layers: f64) {
        let sequences = self.new_tokens as f64;
        self.context_tokens += self.new_tokens;
        self.pairs += sequences;
        self.kv_layer_tokens += layers * sequences;
        self.layer_pairs += layers * sequences;
    }

    pub fn add(&mut self, shape: &ModelShape, work: SequenceWork) {
        if work.new_tokens == 0 {
            return;
        }
        self.count(work);
        let sliding = shape.sliding_window.map_or(0, |window| window.layers);
        let full = (shape.layers - sliding) as f64;
        self.kv_layer_tokens += full * touched_tokens(work, None);
        self.layer_pairs += full * attended_pairs(work, None);
        if let Some(window) = shape.sliding_window {
            self.kv_layer_tokens += sliding as f64 * touched_tokens(work, Some(window.tokens));
            self.layer_pairs += sliding as f64 * attended_pairs(work, Some(window.tokens));
        }
    }
}

/// Cached tokens that some new token attends to, which are read, and the new ones, which are written.
fn touched_tokens(work: SequenceWork, window: Option<u64>) -> f64 {
    let read = match window {
        Some(window) => work.cached_tokens.min(window.saturating_sub(1)),
        None => work.cached_tokens,
    };
    (read + work.new_tokens) as f64
}

/// The sum over the new tokens of how many tokens each attends to, itself included.
fn attended_pairs(work: SequenceWork, window: Option<u64>) -> f64 {
    let up_to = |tokens: u64| {
        let tokens = tokens as f64;
        let ramp = window.map_or(tokens, |window| tokens.min(window as f64));
        ramp * (ramp + 1.0) / 2.0 + (tokens - ramp) * window.map_or(0.0, |window| window as f64)
    };
    up_to(work.cached_tokens + work.new_tokens) - up_to(work.cached_tokens)
}
