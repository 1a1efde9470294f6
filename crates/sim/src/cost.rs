//! How long a step takes: estimated from the data sheet, or as it was measured.
//!
//! The roofline says what no step can beat. An estimate says what a good engine reaches: the same bytes and
//! operations over the shares of the peaks in [`Shares`], and what the roofline leaves out, which is the traffic of
//! activations, the sampler, the sums over the GPUs with their latency, and the launches. A [`Calibration`] knows
//! nothing of bytes: it is six coefficients that were fitted to measured points.

use crate::calibration::Calibration;
use crate::dtype::Dtype;
use crate::hardware::HardwareProfile;
use crate::roofline::{Roofline, RooflineError, SequenceWork, Sum};
use crate::shape::ModelShape;

/// What the devices of the table reach of their data sheets, and what a step costs besides.
///
/// One set for all of them. The shares of bandwidth and arithmetic are what tuned kernels are known to reach; the
/// others are usual sizes. They were set against the published figures that `tests/sim/published.rs` prints the errors
/// of, all of H100 and H200: for other GPUs they are a guess.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// Of the bandwidth, where weights are streamed.
    pub weights: f64,
    /// Of the bandwidth, where keys and values are gathered from blocks.
    pub keys_and_values: f64,
    /// Of the bandwidth, between the products: norms, rotation, activation, sampling.
    pub elementwise: f64,
    /// Of the arithmetic, in large products of 16-bit and of 8-bit numbers.
    pub products: f64,
    pub products_fp8: f64,
    /// Tokens of a step at which products reach half of that.
    pub half_tokens: f64,
    /// Of the 16-bit arithmetic, in attention over a prompt.
    pub attention: f64,
    /// Of the links' bandwidth, in a sum over the GPUs.
    pub links: f64,
    /// Least time of one sum over the GPUs.
    pub sum_seconds: f64,
    /// Of a step: preparing it, launching it, reading its answers.
    pub step_seconds: f64,
    /// Of each layer's launches.
    pub layer_seconds: f64,
}

impl Shares {
    pub const DEFAULT: Self = Self {
        weights: 0.85,
        keys_and_values: 0.85,
        elementwise: 0.8,
        products: 0.7,
        products_fp8: 0.6,
        half_tokens: 32.0,
        attention: 0.5,
        links: 0.7,
        sum_seconds: 10e-6,
        step_seconds: 0.5e-3,
        layer_seconds: 10e-6,
    };
}

/// Bytes of an activation, whatever the weights have.
const ACTIVATION_BYTES: f64 = 2.0;
/// How often a hidden state, and a value of the feed-forward part, is read or written between the products of a layer:
/// two norms with their residuals, rotation, gate.
const HIDDEN_PASSES: f64 = 10.0;
const INTERMEDIATE_PASSES: f64 = 3.0;
/// How often the sampler passes over a row of f32 logits.
const LOGITS_PASSES: f64 = 4.0;
/// Sums over the GPUs in each layer.
const SUMS_PER_LAYER: f64 = 2.0;

/// How long a step takes.
#[derive(Clone, Debug)]
pub enum CostModel {
    Estimate(Box<Estimate>),
    Calibrated(Calibration),
    /// No time at all: what remains is the time of everything around the device.
    Nothing,
}

impl CostModel {
    /// As the profile was calibrated, else as its data sheet lets expect.
    ///
    /// # Errors
    /// If the hardware cannot compute with these weights, or the model does not split over that many GPUs.
    pub fn new(shape: &ModelShape, hardware: &HardwareProfile, gpus: u32) -> Result<Self, RooflineError> {
        Ok(match &hardware.calibration {
            Some(calibration) => Self::Calibrated(calibration.clone()),
            None => Self::Estimate(Box::new(Estimate::new(shape, hardware, gpus)?)),
        })
    }

    /// Of a step over these sequences; 0 for none.
    pub fn step_seconds(&self, sequences: impl Iterator<Item = SequenceWork>) -> f64 {
        self.seconds(&self.sums(sequences))
    }

    /// What a client waits for besides the steps, if that was measured.
    pub fn request_seconds(&self) -> f64 {
        match self {
            Self::Calibrated(calibration) => calibration.request_seconds,
            Self::Estimate(_) | Self::Nothing => 0.0,
        }
    }

    /// All that the time of a step depends on. Whole numbers: the order of the sequences changes nothing.
    pub fn sums(&self, sequences: impl Iterator<Item = SequenceWork>) -> StepSums {
        let mut sums = StepSums::default();
        for work in sequences.filter(|work| work.new_tokens > 0) {
            let sum = if work.new_tokens == 1 { &mut sums.decode } else { &mut sums.prefill };
            match self {
                Self::Estimate(estimate) => sum.add(&estimate.shape, work),
                Self::Calibrated(_) | Self::Nothing => sum.count(work),
            }
        }
        sums
    }

    /// Of a step that these are the sums of.
    pub fn seconds(&self, sums: &StepSums) -> f64 {
        match self {
            Self::Estimate(estimate) => estimate.seconds(sums),
            Self::Calibrated(calibration) => calibration.seconds(sums),
            Self::Nothing => 0.0,
        }
    }

    /// From the sums of a step that only decodes to those of the next one over the same sequences, each of them longer
    /// by a token. False, and nothing changed, where layers look back so far and no further: then the sequences have to
    /// be added up anew.
    pub fn grow(&self, sums: &mut StepSums) -> bool {
        let layers = match self {
            Self::Estimate(estimate) if estimate.shape.sliding_window.is_some() => return false,
            Self::Estimate(estimate) => estimate.shape.layers as f64,
            Self::Calibrated(_) | Self::Nothing => 0.0,
        };
        sums.decode.grow(layers);
        true
    }
}

/// What one step computes, added up over its sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepSums {
    /// Of sequences with one new token.
    pub(crate) decode: Sum,
    pub(crate) prefill: Sum,
}

/// A model on the GPUs of one replica, as a good engine computes it.
#[derive(Clone, Debug)]
pub struct Estimate {
    shape: ModelShape,
    shares: Shares,
    gpus: f64,
    kv_bytes_per_layer_token: f64,
    bandwidth_bytes_per_second: f64,
    /// Of one GPU in large products, the share taken off.
    product_flops_per_second: f64,
    attention_flops_per_second: f64,
    link_bytes_per_second: Option<f64>,
}

impl Estimate {
    /// `shape` over `gpus` GPUs of `hardware`, both valid.
    ///
    /// # Errors
    /// As [`Roofline::new`].
    pub fn new(shape: &ModelShape, hardware: &HardwareProfile, gpus: u32) -> Result<Self, RooflineError> {
        // Refuses what cannot be.
        Roofline::new(shape, hardware, gpus)?;
        let shares = Shares::DEFAULT;
        let (arithmetic, flops) = hardware.arithmetic(shape.weight_dtype)?;
        let share = if arithmetic == Dtype::Fp8 { shares.products_fp8 } else { shares.products };
        // Attention multiplies in 16 bits, whatever the cache stores, where the device has them.
        let wide = hardware.arithmetic(Dtype::Bf16).map_or(flops, |(_, flops)| flops);
        let link = hardware.interconnect.as_ref().filter(|_| gpus > 1);
        Ok(Self {
            shares,
            gpus: f64::from(gpus),
            kv_bytes_per_layer_token: shape.kv_bytes_per_token() * shape.kv_copies(gpus) as f64
                / shape.layers as f64,
            bandwidth_bytes_per_second: hardware.bandwidth_bytes_per_second,
            product_flops_per_second: flops * share,
            attention_flops_per_second: wide * shares.attention,
            link_bytes_per_second: link.map(|link| link.bytes_per_second * shares.links),
            shape: shape.clone(),
        })
    }

    fn seconds(&self, StepSums { decode, prefill }: &StepSums) -> f64 {
        let tokens = (decode.new_tokens + prefill.new_tokens) as f64;
        if tokens == 0.0 {
            return 0.0;
        }
        let rows = (decode.logits_rows + prefill.logits_rows) as f64;
        self.product_seconds(tokens, rows)
            + self.attention_seconds(decode)
            + self.attention_seconds(prefill)
            + self.elementwise_seconds(tokens, rows)
            + self.link_seconds(tokens)
            + self.shares.step_seconds
            + self.shape.layers as f64 * self.shares.layer_seconds
    }

    /// Reading the weights or multiplying them, whichever takes longer.
    fn product_seconds(&self, tokens: f64, rows: f64) -> f64 {
        let logits = if rows > 0.0 { self.shape.logits_parameters() } else { 0 } as f64;
        let body = self.shape.streamed_parameters().saturating_sub(self.shape.logits_parameters()) as f64;
        let bytes = (body + logits) * self.shape.weight_dtype.bytes() as f64;
        let read = bytes / (self.gpus * self.bandwidth_bytes_per_second * self.shares.weights);
        let flops = 2.0 * (body * tokens + logits * rows);
        let reached = tokens / (tokens + self.shares.half_tokens);
        read.max(flops / (self.gpus * self.product_flops_per_second * reached))
    }

    fn attention_seconds(&self, sum: &Sum) -> f64 {
        let bytes = sum.kv_layer_tokens * self.kv_bytes_per_layer_token;
        let flops = 4.0 * (self.shape.heads * self.shape.head_dim) as f64 * sum.layer_pairs;
        let read = bytes / (self.bandwidth_bytes_per_second * self.shares.keys_and_values);
        read.max(flops / self.attention_flops_per_second) / self.gpus
    }

    fn elementwise_seconds(&self, tokens: f64, rows: f64) -> f64 {
        let shape = &self.shape;
        let passes =
            HIDDEN_PASSES * shape.hidden as f64 + INTERMEDIATE_PASSES * shape.intermediate as f64 / self.gpus;
        let bytes = tokens * shape.layers as f64 * passes * ACTIVATION_BYTES
            + rows * shape.vocabulary as f64 * 4.0 * LOGITS_PASSES / self.gpus;
        bytes / (self.bandwidth_bytes_per_second * self.shares.elementwise)
    }

    /// A ring sends each sum `2 (n - 1) / n` times.
    fn link_seconds(&self, tokens: f64) -> f64 {
        let Some(rate) = self.link_bytes_per_second else { return 0.0 };
        let sums = SUMS_PER_LAYER * self.shape.layers as f64;
        let bytes = tokens * self.shape.hidden as f64 * ACTIVATION_BYTES;
        let ring = 2.0 * (self.gpus - 1.0) / self.gpus;
        sums * (self.shares.sum_seconds + ring * bytes / rate)
    }
}
