//! The decoder of the Llama family, written in [`Ops`]: Llama, Mistral, Qwen 2 and Qwen 3 differ
//! only in which biases, norms and windows they have.

use servelab_engine::{RunnerError, Step, StepOutput};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Ops, Pass};
use crate::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, projections};

/// The weights of a model on a device, and the buffers of a step.
pub struct Decoder<O: Ops> {
    config: ModelConfig,
    embedding: O::Matrix,
    layers: Vec<Layer<O>>,
    final_norm: O::Vector,
    /// `None`: the embedding serves as head too.
    head: Option<O::Matrix>,
    buffers: Buffers<O>,
}

struct Layer<O: Ops> {
    attention_norm: O::Vector,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`
    qkv: O::Matrix,
    /// Of each query head and each key head.
    head_norms: Option<(O::Vector, O::Vector)>,
    /// `[hidden, heads * head_dim]`
    output: O::Matrix,
    mlp_norm: O::Vector,
    /// `[2 * inner, hidden]`
    gate_up: O::Matrix,
    /// `[hidden, inner]`
    down: O::Matrix,
}

/// Activations of the largest step, T tokens.
struct Buffers<O: Ops> {
    /// The residual stream. `[T, hidden]`
    hidden: O::Buffer,
    /// What the last part of a layer adds to it. `[T, hidden]`
    delta: O::Buffer,
    /// `[T, hidden]`
    normed: O::Buffer,
    /// `[T, (heads + 2 * kv_heads) * head_dim]`
    qkv: O::Buffer,
    /// `[T, heads * head_dim]`
    queries: O::Buffer,
    /// `[T, heads * head_dim]`
    attended: O::Buffer,
    /// `[T, 2 * inner]`
    gate_up: O::Buffer,
    /// `[T, inner]`
    activated: O::Buffer,
    /// `[logits_rows, hidden]`
    picked: O::Buffer,
    /// `[logits_rows, vocabulary]`
    logits: O::Buffer,
}

impl<O: Ops> Buffers<O> {
    fn new(ops: &mut O, config: &ModelConfig, tokens: usize) -> Result<Self, ModelError> {
        let picked = ops.logits_rows().min(tokens);
        Ok(Self {
            hidden: ops.buffer(tokens, config.hidden_size)?,
            delta: ops.buffer(tokens, config.hidden_size)?,
            normed: ops.buffer(tokens, config.hidden_size)?,
            qkv: ops.buffer(tokens, config.qkv_width())?,
            queries: ops.buffer(tokens, config.query_width())?,
            attended: ops.buffer(tokens, config.query_width())?,
            gate_up: ops.buffer(tokens, 2 * config.intermediate_size)?,
            activated: ops.buffer(tokens, config.intermediate_size)?,
            picked: ops.buffer(picked, config.hidden_size)?,
            logits: ops.logits_buffer(picked, config.vocab_size)?,
        })
    }
}

/// Numbers that the buffers of a decoder hold for steps of up to `tokens` tokens and `logits_rows` rows of logits
/// at once.
pub fn activation_values(config: &ModelConfig, tokens: usize, logits_rows: usize) -> u64 {
    let per_token =
        3 * config.hidden_size + config.qkv_width() + 2 * config.query_width() + 3 * config.intermediate_size;
    let per_row = config.hidden_size + config.vocab_size;
    tokens as u64 * per_token as u64 + logits_rows.min(tokens) as u64 * per_row as u64
}

impl<O: Ops> Decoder<O> {
    /// Moves the weights to the device and makes buffers for steps of up to `max_batched_tokens` tokens.
    ///
    /// # Errors
    /// What [`Weights::tensor`] and the device's memory can fail with.
    pub fn load(
        ops: &mut O,
        config: &ModelConfig,
        weights: &Weights,
        max_batched_tokens: usize,
    ) -> Result<Self, ModelError> {
        let mut loader = Loader { ops, config, weights };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = loader.table(EMBEDDING, table)?;
        let layers = (0..config.num_layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = loader.vector(FINAL_NORM, config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.table(HEAD, table)?),
        };
        let buffers = Buffers::new(ops, config, max_batched_tokens)?;
        Ok(Self { config: config.clone(), embedding, layers, final_norm, head, buffers })
    }

    /// Computes one step and waits for it.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if the step is malformed or its logits hold no usable number.
    pub fn run(&mut self, ops: &mut O, step: &Step) -> Result<StepOutput, RunnerError> {
        let passes = Pass::split(&step.rows, ops.logits_rows());
        ops.begin(step, &passes)?;
        if step.tokens.is_empty() {
            return Ok(StepOutput::default());
        }
        self.compute(ops, step, &passes)?;
        ops.answers()
    }

    /// What comes after [`Ops::begin`]: embed, layers, final norm, logits of the rows asked for, answers.
    ///
    /// # Errors
    /// Those of the operations.
    pub fn compute(&mut self, ops: &mut O, step: &Step, passes: &[Pass]) -> Result<(), RunnerError> {
        ops.embed(&self.embedding, step, &mut self.buffers.hidden)?;
        for index in 0..self.layers.len() {
            self.layer(ops, index, step)?;
        }
        let eps = self.config.rms_norm_eps;
        let b = &mut self.buffers;
        ops.add_rms_norm(&mut b.hidden, &b.delta, &self.final_norm, eps, &mut b.normed)?;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        for (index, pass) in passes.iter().enumerate() {
            ops.gather_rows(&b.normed, index, pass, &mut b.picked)?;
            ops.linear(head, &b.picked, &mut b.logits)?;
            ops.sample(&b.logits, step, index, pass)?;
        }
        Ok(())
    }

    fn layer(&mut self, ops: &mut O, index: usize, step: &Step) -> Result<(), RunnerError> {
        let (layer, b) = (&self.layers[index], &mut self.buffers);
        let eps = self.config.rms_norm_eps;
        if index == 0 {
            ops.rms_norm(&b.hidden, &layer.attention_norm, eps, &mut b.normed)?;
        } else {
            ops.add_rms_norm(&mut b.hidden, &b.delta, &layer.attention_norm, eps, &mut b.normed)?;
        }
        ops.linear(&layer.qkv, &b.normed, &mut b.qkv)?;
        let norms = layer.head_norms.as_ref().map(|(query, key)| (query, key));
        ops.rope_and_cache(index, &b.qkv, norms, eps, &mut b.queries)?;
        ops.attention(index, self.config.windows[index], step, &b.queries, &mut b.attended)?;
        ops.linear(&layer.output, &b.attended, &mut b.delta)?;

        ops.add_rms_norm(&mut b.hidden, &b.delta, &layer.mlp_norm, eps, &mut b.normed)?;
        ops.linear(&layer.gate_up, &b.normed, &mut b.gate_up)?;
        ops.silu_mul(&b.gate_up, &mut b.activated)?;
        ops.linear(&layer.down, &b.activated, &mut b.delta)
    }
}

/// Moves weights to a device.
struct Loader<'a, O: Ops> {
    ops: &'a mut O,
    config: &'a ModelConfig,
    weights: &'a Weights,
}

impl<O: Ops> Loader<'_, O> {
    fn layer(&mut self, layer: usize) -> Result<Layer<O>, ModelError> {
        let hidden = self.config.hidden_size;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let [query, key, value, output, gate, up, down] = projections(self.config);
        let head_norms = match self.config.qk_norm {
            false => None,
            true => Some((
                self.vector(&name("self_attn.q_norm.weight"), self.config.head_dim)?,
                self.vector(&name("self_attn.k_norm.weight"), self.config.head_dim)?,
            )),
        };
        Ok(Layer {
            attention_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: self.fused(layer, &[query, key, value])?,
            head_norms,
            output: self.fused(layer, &[output])?,
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.fused(layer, &[gate, up])?,
            down: self.fused(layer, &[down])?,
        })
    }

    /// Several projections of the same input as one matrix.
    fn fused(
        &mut self,
        layer: usize,
        parts: &[(&'static str, usize, usize, bool)],
    ) -> Result<O::Matrix, ModelError> {
        let mut tensors = Vec::with_capacity(parts.len());
        let mut bias: Option<Vec<f32>> = None;
        for (part, outputs, inputs, has_bias) in parts {
            let name = format!("model.layers.{layer}.{part}");
            tensors.push(self.weights.tensor(&format!("{name}.weight"), &[*outputs, *inputs])?);
            if *has_bias {
                let values = self.weights.tensor(&format!("{name}.bias"), &[*outputs])?.to_f32();
                bias.get_or_insert_default().extend(values);
            }
        }
        self.ops.matrix(tensors, bias)
    }

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<O::Matrix, ModelError> {
        self.ops.table(self.weights.tensor(name, &shape)?)
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<O::Vector, ModelError> {
        let values = self.weights.tensor(name, &[width])?.to_f32();
        self.ops.vector(values)
    }
}
