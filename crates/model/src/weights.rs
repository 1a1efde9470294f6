//! The tensors that a checkpoint of a given configuration holds, whoever provides them.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, WeightDtype};
use crate::dummy::DummyWeights;
use crate::error::ModelError;

/// A tensor that the decoder needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: String, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec() }
    }

    /// Numbers in the tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One tensor's numbers, little endian, row after row; borrowed from a mapped file where possible.
#[derive(Clone, Debug)]
pub struct TensorData<'a> {
    pub dtype: WeightDtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

impl TensorData<'_> {
    /// Rows of a matrix; entries of a vector.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Width of a row; 1 for a vector.
    pub fn columns(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// All numbers as f32, which holds each of the formats exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            WeightDtype::F32 => {
                self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            WeightDtype::F16 => pairs().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            WeightDtype::BF16 => pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        }
    }

    /// The same numbers in another format, rounded to nearest even where it is narrower.
    pub fn convert(self, dtype: WeightDtype) -> Self {
        if dtype == self.dtype {
            return self;
        }
        let values = self.to_f32();
        let bytes: Vec<u8> = match dtype {
            WeightDtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            WeightDtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            WeightDtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        };
        Self { dtype, shape: self.shape, bytes: Cow::Owned(bytes) }
    }
}

/// Where the numbers come from.
pub enum Weights {
    Checkpoint(Checkpoint),
    Dummy(DummyWeights),
}

impl Weights {
    /// One tensor by the name that checkpoints give it.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`] or [`ModelError::TensorDtype`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorData<'_>, ModelError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor(name, shape),
            Self::Dummy(dummy) => Ok(dummy.tensor(name, shape)),
        }
    }

    /// The number format that most of the bytes are stored in.
    pub fn dtype(&self) -> WeightDtype {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.dtype(),
            Self::Dummy(_) => WeightDtype::BF16,
        }
    }
}

/// Every tensor that the decoder needs, in the order of computation.
pub fn expected_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = vec![TensorSpec::new(EMBEDDING.to_owned(), &[config.vocab_size, config.hidden_size])];
    for layer in 0..config.num_layers {
        specs.extend(layer_tensors(config, layer));
    }
    specs.push(TensorSpec::new(FINAL_NORM.to_owned(), &[config.hidden_size]));
    if !config.tie_word_embeddings {
        specs.push(TensorSpec::new(HEAD.to_owned(), &[config.vocab_size, config.hidden_size]));
    }
    specs
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A linear projection of a layer: its name within the layer, its output and input width and
/// whether it has a bias.
pub(crate) fn projections(config: &ModelConfig) -> [(&'static str, usize, usize, bool); 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.query_width(), config.kv_width());
    [
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
}

fn layer_tensors(config: &ModelConfig, layer: usize) -> Vec<TensorSpec> {
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    let mut specs = vec![
        TensorSpec::new(name("input_layernorm.weight"), &[config.hidden_size]),
        TensorSpec::new(name("post_attention_layernorm.weight"), &[config.hidden_size]),
    ];
    for (part, rows, columns, bias) in projections(config) {
        specs.push(TensorSpec::new(name(&format!("{part}.weight")), &[rows, columns]));
        if bias {
            specs.push(TensorSpec::new(name(&format!("{part}.bias")), &[rows]));
        }
    }
    if config.qk_norm {
        specs.push(TensorSpec::new(name("self_attn.q_norm.weight"), &[config.head_dim]));
        specs.push(TensorSpec::new(name("self_attn.k_norm.weight"), &[config.head_dim]));
    }
    specs
}
