//! What the roofline says before anything is measured.

use servelab_sim::ModelShape;
use servelab_sim::formulas::{
    DecodeBatch, DecodeModel, Gpus, PromptAttention, RequestCost, asymptotic_tokens_per_second,
    causal_attention_gpu_seconds, decode_compute_seconds, decode_tokens_per_second, gpu_seconds_per_request,
    half_batch, prefill_gpu_seconds_per_token,
};
use servelab_sim::numbers::{bytes, grouped, short};

/// The hyperbola of F3, cut off where arithmetic binds.
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    pub model: DecodeModel,
    pub gpus: Gpus,
    pub context_tokens: f64,
}

impl Curve {
    pub fn tokens_per_second(self, sequences: f64) -> f64 {
        let batch = DecodeBatch { sequences, context_tokens: self.context_tokens };
        decode_tokens_per_second(self.model, batch, self.gpus)
    }

    /// What no batch exceeds: reading keys and values, or arithmetic.
    pub fn most_tokens_per_second(self) -> f64 {
        self.arithmetic_tokens_per_second().min(self.reading_tokens_per_second())
    }

    fn reading_tokens_per_second(self) -> f64 {
        asymptotic_tokens_per_second(self.model, self.context_tokens, self.gpus)
    }

    fn arithmetic_tokens_per_second(self) -> f64 {
        let one = DecodeBatch { sequences: 1.0, context_tokens: self.context_tokens };
        1.0 / decode_compute_seconds(self.model, one, self.gpus)
    }

    /// The batch with half of that. Throughput grows with the batch, so that it can be closed in on.
    pub fn half_batch(self) -> f64 {
        let half = self.most_tokens_per_second() / 2.0;
        let (mut low, mut high) = (0.0_f64, 1.0_f64);
        while self.tokens_per_second(high) < half {
            high *= 2.0;
        }
        for _ in 0..80 {
            let middle = f64::midpoint(low, high);
            if self.tokens_per_second(middle) < half { low = middle } else { high = middle }
        }
        high
    }

    /// F6 turned around: output tokens a second of requests that follow one another in a batch of `sequences`,
    /// when the prefill of each takes the whole machine for `prefill_seconds`.
    pub fn output_rate(self, sequences: u32, prefill_seconds: f64, output_tokens: u32) -> f64 {
        let cost = RequestCost {
            prefill_floor_gpu_seconds: prefill_seconds,
            mfu: 1.0,
            output_tokens: f64::from(output_tokens),
            decode_tokens_per_second_per_gpu: self.tokens_per_second(f64::from(sequences)),
        };
        f64::from(output_tokens) / gpu_seconds_per_request(cost)
    }

    /// Where [`Curve::half_batch`] comes from.
    pub fn because(self) -> String {
        let memory = format!(
            "W / (L x kv) = {} / ({} x {} B) = {}",
            bytes(self.model.streamed_bytes),
            grouped(self.context_tokens),
            grouped(self.model.kv_bytes_per_token),
            short(half_batch(self.model, self.context_tokens))
        );
        if self.arithmetic_tokens_per_second() >= self.reading_tokens_per_second() {
            return format!("F3: {memory}");
        }
        format!(
            "F3: {memory} if reading bound; arithmetic ends at {} tok/s before, and half of that is reached sooner",
            short(self.arithmetic_tokens_per_second())
        )
    }
}

/// F5, for prompts of which a part may be in the cache.
#[derive(Clone, Copy, Debug)]
pub struct Prefill<'a> {
    pub shape: &'a ModelShape,
    pub flops_per_second: f64,
}

impl Prefill<'_> {
    /// Seconds at every FLOP, attention included.
    pub fn floor_seconds(self, cached_tokens: u32, uncached_tokens: u32) -> f64 {
        self.products_seconds(uncached_tokens) + self.attention_seconds(cached_tokens, uncached_tokens)
    }

    /// The part that grows with the tokens.
    pub fn products_seconds(self, uncached_tokens: u32) -> f64 {
        let parameters = self.shape.streamed_parameters() as f64;
        f64::from(uncached_tokens) * prefill_gpu_seconds_per_token(parameters, self.flops_per_second)
    }

    /// The part that grows with their square.
    pub fn attention_seconds(self, cached_tokens: u32, uncached_tokens: u32) -> f64 {
        let attention = PromptAttention {
            layers: self.shape.layers,
            heads: self.shape.heads,
            head_dim: self.shape.head_dim,
            cached_tokens: f64::from(cached_tokens),
            uncached_tokens: f64::from(uncached_tokens),
        };
        causal_attention_gpu_seconds(attention, self.flops_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    /// The ledger's 4.2 s for 100k tokens of an 8B; computed in two parts it takes as long.
    #[test]
    fn prefill_is_f5() {
        let ledger = Ledger::load().unwrap();
        let prefill = Prefill { shape: &ledger.models["llama-3.1-8b"], flops_per_second: 989e12 };
        let whole = prefill.floor_seconds(0, 100_000);
        assert!((whole - 4.2).abs() < 0.05, "{whole}");
        let parts = prefill.floor_seconds(0, 60_000) + prefill.floor_seconds(60_000, 40_000);
        assert!((parts / whole - 1.0).abs() < 1e-9);
    }

    fn curve(context_tokens: f64, flops_per_second: f64) -> Curve {
        let model =
            DecodeModel { streamed_parameters: 7.5e9, streamed_bytes: 15e9, kv_bytes_per_token: 131_072.0 };
        let gpus = Gpus { count: 1, bandwidth_bytes_per_second: 3.35e12, flops_per_second };
        Curve { model, gpus, context_tokens }
    }

    #[test]
    fn while_reading_binds_it_is_f3() {
        let curve = curve(2250.0, 989e12);
        assert!((curve.half_batch() - 15e9 / (2250.0 * 131_072.0)).abs() < 1e-6);
        assert!(!curve.because().contains("arithmetic"));
    }

    /// Where the prefill of a request takes as long as its decoding, half of the output is left.
    #[test]
    fn prefill_takes_its_share_of_the_output() {
        let curve = curve(2250.0, 989e12);
        let decoding = 100.0 / curve.tokens_per_second(64.0);
        assert!((curve.output_rate(64, 0.0, 100) / curve.tokens_per_second(64.0) - 1.0).abs() < 1e-9);
        assert!((curve.output_rate(64, decoding, 100) / curve.tokens_per_second(64.0) - 0.5).abs() < 1e-9);
    }

    /// 15 GB read in 4.48 ms, 15 GFLOP a sequence at 100 TFLOP/s: at most 6,667 tok/s, half of it at 3,333, which
    /// takes 3,333 x (15 GB + B x L x kv) / 3.35 TB/s sequences.
    #[test]
    fn where_arithmetic_binds_half_is_reached_sooner() {
        let curve = curve(240.0, 100e12);
        let most = 100e12 / 15e9;
        assert!((curve.most_tokens_per_second() - most).abs() < 1e-6);
        let kv = 240.0 * 131_072.0;
        let half = 15e9 / (2.0 * 3.35e12 / most - kv);
        assert!((curve.half_batch() / half - 1.0).abs() < 1e-9, "{} {half}", curve.half_batch());
        assert!(curve.because().contains("6,667 tok/s"), "{}", curve.because());
    }
}
