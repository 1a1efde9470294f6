//! How fast one replica works, and the batch that it settles at under a given load.

use crate::assumptions::Assumptions;
use crate::formulas::{self, DecodeBatch, DecodeModel, Gpus, MeanResidence, PromptAttention};
use crate::hardware::{HardwareError, HardwareProfile};
use crate::planner::Memory;
use crate::roofline::Limit;
use crate::shape::ModelShape;

/// How long one replica takes for what it does.
#[derive(Clone, Copy)]
pub struct Pace {
    pub decode: DecodeModel,
    pub gpus: Gpus,
    /// Mean over the life of a request.
    pub context_tokens: f64,
    pub output_tokens: f64,
    pub prefill: Prefill,
    decode_efficiency: f64,
    mfu: f64,
}

impl Pace {
    /// The pace of `model` with what `memory` says of a replica.
    ///
    /// # Errors
    /// If the hardware cannot compute with these weights.
    pub fn new(
        model: &ModelShape,
        hardware: &HardwareProfile,
        assumptions: &Assumptions,
        memory: &Memory,
    ) -> Result<Self, HardwareError> {
        let (_, flops_per_second) = hardware.arithmetic(model.weight_dtype)?;
        Ok(Self {
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
            output_tokens: assumptions.output_tokens as f64,
            prefill: Prefill::new(model, assumptions, flops_per_second),
            decode_efficiency: assumptions.decode_efficiency,
            mfu: assumptions.mfu,
        })
    }

    pub fn step_floor_seconds(&self, sequences: f64) -> f64 {
        formulas::decode_step_floor_seconds(self.decode, self.batch(sequences), self.gpus)
    }

    pub fn step_seconds(&self, sequences: f64) -> f64 {
        self.step_floor_seconds(sequences) / self.decode_efficiency
    }

    pub fn limit(&self, sequences: f64) -> Limit {
        let batch = self.batch(sequences);
        let memory = formulas::decode_memory_seconds(self.decode, batch, self.gpus);
        let compute = formulas::decode_compute_seconds(self.decode, batch, self.gpus);
        if memory >= compute { Limit::Memory } else { Limit::Compute }
    }

    fn batch(&self, sequences: f64) -> DecodeBatch {
        DecodeBatch { sequences, context_tokens: self.context_tokens }
    }

    /// Of the arithmetic of one prompt.
    pub fn prefill_seconds(&self) -> f64 {
        self.prefill.floor / self.mfu / f64::from(self.gpus.count)
    }

    /// With nobody in front. A short prompt takes a step: the weights have to be read.
    pub fn ttft_seconds(&self) -> f64 {
        self.prefill_seconds().max(self.step_seconds(1.0))
    }

    /// While a request decodes, the prompt of each of the others is computed once. With that, Little's law over
    /// a replica that is just full gives its batch again.
    pub fn tpot_seconds(&self, sequences: f64) -> f64 {
        self.step_seconds(sequences) + (sequences - 1.0) * self.prefill_seconds() / self.output_tokens
    }

    pub fn residence(&self, sequences: f64) -> MeanResidence {
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
    pub fn batch_at(&self, arrivals_per_second: f64, full: f64) -> f64 {
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

/// F5 of the uncached part of one prompt, in GPU-seconds.
#[derive(Clone, Copy)]
pub struct Prefill {
    pub per_token: f64,
    pub attention: f64,
    /// All of it.
    pub floor: f64,
}

impl Prefill {
    fn new(model: &ModelShape, assumptions: &Assumptions, flops_per_second: f64) -> Self {
        let uncached_tokens = assumptions.uncached_tokens();
        let attention = PromptAttention {
            layers: model.layers,
            heads: model.heads,
            head_dim: model.head_dim,
            cached_tokens: assumptions.input_tokens as f64 - uncached_tokens,
            uncached_tokens,
        };
        let parameters = model.streamed_parameters() as f64;
        let per_token = formulas::prefill_gpu_seconds_per_token(parameters, flops_per_second);
        let attention = formulas::causal_attention_gpu_seconds(attention, flops_per_second);
        Self { per_token, attention, floor: per_token * uncached_tokens + attention }
    }
}
