//! What the arithmetic needs of a model: sizes, counts of parameters, number formats.

use serde::{Deserialize, Serialize};

use crate::dtype::Dtype;
use crate::formulas::{self, KvLayout};

/// A decoder of the Llama family: dense, grouped-query attention, a gated feed-forward part.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    pub name: String,
    pub layers: u64,
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub intermediate: u64,
    pub vocabulary: u64,
    /// The input embedding is also the matrix that makes the logits.
    pub tied_embeddings: bool,
    /// Longest context, in tokens.
    pub max_context_tokens: u64,
    /// Layers that look back over a limited number of tokens.
    pub sliding_window: Option<SlidingWindow>,
    /// All weights, each tensor once.
    pub parameters: u64,
    pub weight_dtype: Dtype,
    pub kv_dtype: Dtype,
}

/// Some layers attend to the latest tokens only.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// How many of the layers.
    pub layers: u64,
    /// How many of the latest tokens, the current one included.
    pub tokens: u64,
}

/// A shape that no model can have.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum ShapeError {
    #[error("{field} of model {model} is {value}; it must be {rule}")]
    Range { model: String, field: &'static str, value: u64, rule: String },
}

impl ModelShape {
    /// # Errors
    /// The first size that is zero, too large, or does not go with another.
    pub fn validate(&self) -> Result<(), ShapeError> {
        let embedding = self.vocabulary.saturating_mul(self.hidden);
        let least = embedding.saturating_mul(if self.tied_embeddings { 1 } else { 2 }).saturating_add(1);
        self.within("layers", self.layers, 1, 1 << 12)?;
        self.within("hidden", self.hidden, 1, 1 << 20)?;
        self.within("heads", self.heads, 1, 1 << 12)?;
        self.within("kv_heads", self.kv_heads, 1, self.heads)?;
        self.within("head_dim", self.head_dim, 1, 1 << 12)?;
        self.within("intermediate", self.intermediate, 1, 1 << 24)?;
        self.within("vocabulary", self.vocabulary, 1, 1 << 24)?;
        self.within("max_context_tokens", self.max_context_tokens, 2, 1 << 32)?;
        self.within("parameters", self.parameters, least, 1 << 50)?;
        if let Some(window) = self.sliding_window {
            self.within("sliding_window.layers", window.layers, 1, self.layers)?;
            self.within("sliding_window.tokens", window.tokens, 1, 1 << 40)?;
        }
        match self.heads.is_multiple_of(self.kv_heads) {
            true => Ok(()),
            false => Err(self.wrong("kv_heads", self.kv_heads, format!("a divisor of heads {}", self.heads))),
        }
    }

    fn within(&self, field: &'static str, value: u64, least: u64, most: u64) -> Result<(), ShapeError> {
        if (least..=most).contains(&value) {
            return Ok(());
        }
        Err(self.wrong(field, value, format!("from {least} to {most}")))
    }

    fn wrong(&self, field: &'static str, value: u64, rule: String) -> ShapeError {
        ShapeError::Range { model: self.name.clone(), field, value, rule }
    }

    /// Parameters that every step reads and multiplies: all but the input embedding, of which a token takes
    /// one row. A tied embedding is read as a whole, for the logits.
    pub fn streamed_parameters(&self) -> u64 {
        let looked_up = if self.tied_embeddings { 0 } else { self.vocabulary * self.hidden };
        self.parameters.saturating_sub(looked_up)
    }

    /// Parameters of the matrix that makes the logits, needed only for tokens that are sampled from.
    pub fn logits_parameters(&self) -> u64 {
        self.vocabulary * self.hidden
    }

    /// Memory of all weights.
    pub fn weight_bytes(&self) -> f64 {
        self.parameters as f64 * self.weight_dtype.bytes() as f64
    }

    /// Bytes of weights that one decode step reads.
    pub fn streamed_bytes(&self) -> f64 {
        self.streamed_parameters() as f64 * self.weight_dtype.bytes() as f64
    }

    /// F1, over all layers and all GPUs, each head stored once.
    pub fn kv_bytes_per_token(&self) -> f64 {
        formulas::kv_bytes_per_token(KvLayout {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            bytes_per_element: self.kv_dtype.bytes(),
        })
    }

    /// Whether the heads and the feed-forward part divide evenly over that many GPUs.
    pub fn splits_over(&self, gpus: u32) -> bool {
        let gpus = u64::from(gpus);
        let kv_heads_divide = match gpus <= self.kv_heads {
            true => self.kv_heads.is_multiple_of(gpus),
            false => gpus.is_multiple_of(self.kv_heads),
        };
        gpus > 0
            && self.heads.is_multiple_of(gpus)
            && self.intermediate.is_multiple_of(gpus)
            && kv_heads_divide
    }

    /// How often each key and value is stored when that many GPUs share the model: with more GPUs than kv
    /// heads, several GPUs hold the same head.
    pub fn kv_copies(&self, gpus: u32) -> u64 {
        u64::from(gpus).div_ceil(self.kv_heads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen_like() -> ModelShape {
        ModelShape {
            name: "qwen-like".to_owned(),
            layers: 28,
            hidden: 3584,
            heads: 28,
            kv_heads: 4,
            head_dim: 128,
            intermediate: 18_944,
            vocabulary: 152_064,
            tied_embeddings: false,
            max_context_tokens: 131_072,
            sliding_window: None,
            parameters: 7_615_616_512,
            weight_dtype: Dtype::Bf16,
            kv_dtype: Dtype::Fp8,
        }
    }

    #[test]
    fn an_untied_input_embedding_is_not_streamed() {
        let untied = qwen_like();
        assert_eq!(untied.streamed_parameters(), 7_615_616_512 - 152_064 * 3584);
        let tied = ModelShape { tied_embeddings: true, ..qwen_like() };
        assert_eq!(tied.streamed_parameters(), 7_615_616_512);
    }

    #[test]
    fn bytes_follow_the_number_formats() {
        let shape = qwen_like();
        assert_eq!(shape.weight_bytes(), 2.0 * 7_615_616_512.0);
        assert_eq!(shape.kv_bytes_per_token(), 2.0 * 28.0 * 4.0 * 128.0);
    }

    #[test]
    fn heads_decide_over_how_many_gpus_a_model_splits() {
        let shape = qwen_like();
        let splits: Vec<u32> = (0..=8).filter(|gpus| shape.splits_over(*gpus)).collect();
        assert_eq!(splits, [1, 2, 4]);
        let wide = ModelShape { heads: 32, kv_heads: 4, ..qwen_like() };
        assert!(wide.splits_over(8));
        assert_eq!([1, 2, 4, 8].map(|gpus| wide.kv_copies(gpus)), [1, 1, 1, 2]);
    }

    #[test]
    fn impossible_shapes_are_refused_by_name() {
        assert_eq!(qwen_like().validate(), Ok(()));
        let window = Some(SlidingWindow { layers: 29, tokens: 4096 });
        for (shape, part) in [
            (ModelShape { layers: 0, ..qwen_like() }, "layers of model qwen-like is 0"),
            (
                ModelShape { kv_heads: 5, ..qwen_like() },
                "kv_heads of model qwen-like is 5; it must be a divisor",
            ),
            (ModelShape { kv_heads: 29, ..qwen_like() }, "from 1 to 28"),
            (ModelShape { parameters: 1_000_000, ..qwen_like() }, "parameters of model qwen-like is 1000000"),
            (ModelShape { hidden: u64::MAX, ..qwen_like() }, "hidden"),
            (ModelShape { sliding_window: window, ..qwen_like() }, "sliding_window.layers"),
        ] {
            let message = shape.validate().unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
