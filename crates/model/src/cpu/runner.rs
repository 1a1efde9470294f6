//! The decoder on the CPU: its operations as calls of the kernels, and the runner that the engine
//! drives.
#![allow(unsafe_code)]

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use servelab_engine::{ModelRunner, RowOutput, RunnerError, Step, StepOutput};

use super::attention::{Attention, paged_attention};
use super::elementwise::{self, RopeTable};
use super::kv_cache::{KvCache, KvDtype, QkvRows, rope_and_cache};
use super::level::Kernels;
use super::matmul::{PackedMatrix, WeightRows};
use crate::config::{ModelConfig, WeightDtype};
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::ops::{Ops, Pass, StepLimits};
use crate::rope::Rope;
use crate::sampler::Sampler;
use crate::weights::{TensorData, Weights};

/// Sizes of a [`CpuRunner`], which are those of the engine that drives it.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    pub num_blocks: usize,
    pub block_size: usize,
    pub max_batched_tokens: usize,
    /// Threads that compute; 0: as many as the machine has cores.
    pub threads: usize,
    pub kv_dtype: KvDtype,
}

/// Runs steps on the CPU.
pub struct CpuRunner {
    ops: CpuOps,
    decoder: Decoder<CpuOps>,
}

impl CpuRunner {
    /// Packs the weights, kept in the format `dtype`, and allocates the KV cache and all buffers.
    ///
    /// # Errors
    /// What [`Weights::tensor`] can fail with.
    pub fn new(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        options: CpuOptions,
    ) -> Result<Self, ModelError> {
        let mut ops = CpuOps::new(config, dtype, options);
        let decoder = Decoder::load(&mut ops, config, weights, options.max_batched_tokens)?;
        Ok(Self { ops, decoder })
    }

    /// The kernels in use, to measure limits with the same threads and instructions.
    pub fn kernels(&self) -> &Kernels {
        &self.ops.kernels
    }

    /// Memory of all packed weights.
    pub fn weight_bytes(&self) -> u64 {
        self.ops.weight_bytes
    }

    /// Memory of the KV cache.
    pub fn kv_cache_bytes(&self) -> u64 {
        self.ops.cache.bytes() as u64
    }
}

impl ModelRunner for CpuRunner {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.decoder.run(&mut self.ops, step)
    }
}

/// Bytes of one block of the KV cache, keys and values of all layers.
pub fn kv_bytes_per_block(config: &ModelConfig, block_size: u32, dtype: KvDtype) -> u64 {
    let (layers, heads) = (config.num_layers, config.num_kv_heads);
    KvCache::block_bytes(layers, block_size as usize, heads, config.head_dim, dtype) as u64
}

impl KvDtype {
    /// The format that loses nothing against weights of `dtype`: keys and values of a bf16 model carry
    /// bf16's errors already. f16 has three bits more than bf16, so that f32 keeps them.
    pub fn suiting(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::BF16 => Self::BF16,
            WeightDtype::F32 | WeightDtype::F16 => Self::F32,
        }
    }

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
        }
    }
}

/// Activations, `[rows, width]` in f32.
pub struct Activations {
    data: Vec<f32>,
    width: usize,
    rows: usize,
}

impl Activations {
    fn filled(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    /// The part that `rows` rows take, now the filled one.
    fn resize(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        &mut self.data[..rows * self.width]
    }
}

/// A packed matrix and its bias.
pub struct Linear {
    matrix: PackedMatrix,
    bias: Option<Vec<f32>>,
}

/// The kernels with the KV cache and what they need to know of the current step.
pub struct CpuOps {
    kernels: Kernels,
    cache: KvCache,
    heads: usize,
    vocab_size: usize,
    max_batched_tokens: usize,
    rope: Rope,
    /// Angles of the step's tokens, so that a long context needs no table of all its positions.
    /// `[tokens, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Row of each token in `cos` and `sin`.
    angle_rows: Vec<u32>,
    slots: Vec<u32>,
    /// Format in which weights are kept.
    dtype: WeightDtype,
    weight_bytes: u64,
    samplers: Mutex<Vec<Sampler>>,
    answers: Vec<RowOutput>,
}

impl CpuOps {
    fn new(config: &ModelConfig, dtype: WeightDtype, options: CpuOptions) -> Self {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let (kernels, passed_over) = Kernels::select(threads);
        for reason in passed_over {
            tracing::warn!("{reason}");
        }
        tracing::info!(kernels = kernels.level().name(), threads, "computing on the CPU");
        let (layers, kv_heads, head_dim) = (config.num_layers, config.num_kv_heads, config.head_dim);
        let (blocks, size) = (options.num_blocks, options.block_size);
        let angles = vec![0.0; options.max_batched_tokens * head_dim / 2];
        Self {
            kernels,
            cache: KvCache::new(layers, blocks, size, kv_heads, head_dim, options.kv_dtype),
            heads: config.num_heads,
            vocab_size: config.vocab_size,
            max_batched_tokens: options.max_batched_tokens,
            rope: Rope::new(&config.rope, head_dim),
            cos: angles.clone(),
            sin: angles,
            angle_rows: (0..options.max_batched_tokens as u32).collect(),
            slots: Vec::with_capacity(options.max_batched_tokens),
            dtype,
            weight_bytes: 0,
            samplers: Mutex::default(),
            answers: Vec::new(),
        }
    }

    fn limits(&self) -> StepLimits {
        StepLimits {
            tokens: self.max_batched_tokens,
            vocabulary: self.vocab_size,
            blocks: self.cache.num_blocks(),
            block_size: self.cache.block_size(),
        }
    }
}

/// Most rows whose logits are computed at once: bounds the logits to 64 rows of the vocabulary.
pub const LOGITS_ROWS: usize = 64;

impl Ops for CpuOps {
    type Buffer = Activations;
    type Matrix = Linear;
    type Vector = Vec<f32>;

    fn matrix(&mut self, parts: Vec<TensorData<'_>>, bias: Option<Vec<f32>>) -> Result<Linear, ModelError> {
        let inputs = parts.first().map_or(1, TensorData::columns);
        let parts: Vec<_> = parts.into_iter().map(|part| part.convert(self.dtype)).collect();
        let aligned: Vec<Aligned<'_>> = parts.iter().map(Aligned::new).collect();
        let rows: Vec<WeightRows<'_>> = aligned.iter().map(Aligned::rows).collect();
        let matrix = PackedMatrix::pack(&self.kernels, &rows, inputs);
        self.weight_bytes += matrix.bytes() as u64;
        Ok(Linear { matrix, bias })
    }

    fn table(&mut self, tensor: TensorData<'_>) -> Result<Linear, ModelError> {
        self.matrix(vec![tensor], None)
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        self.weight_bytes += 4 * values.len() as u64;
        Ok(values)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Result<Activations, ModelError> {
        Ok(Activations { data: vec![0.0; rows * width], width, rows: 0 })
    }

    fn logits_buffer(&mut self, rows: usize, width: usize) -> Result<Activations, ModelError> {
        self.buffer(rows, width)
    }

    fn logits_rows(&self) -> usize {
        LOGITS_ROWS
    }

    fn begin(&mut self, step: &Step, _: &[Pass]) -> Result<(), RunnerError> {
        self.limits().check(step)?;
        self.answers.clear();
        for (from, to) in &step.copies {
            self.cache.copy_block(*from, *to);
        }
        let half = self.rope.frequencies.len();
        let angles = self.cos.chunks_exact_mut(half).zip(self.sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in step.positions.iter().zip(angles) {
            self.rope.fill(*position, cos, sin);
        }
        self.slots.clone_from(&step.slots);
        Ok(())
    }

    fn embed(&mut self, table: &Linear, step: &Step, out: &mut Activations) -> Result<(), RunnerError> {
        let width = out.width;
        let rows = out.resize(step.tokens.len()).chunks_exact_mut(width);
        for (token, row) in step.tokens.iter().zip(rows) {
            table.matrix.copy_row(*token as usize, row);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Activations,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Activations,
    ) -> Result<(), RunnerError> {
        elementwise::rms_norm(&self.kernels, x.filled(), weight, eps, out.resize(x.rows));
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        x: &mut Activations,
        delta: &Activations,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Activations,
    ) -> Result<(), RunnerError> {
        let out = out.resize(x.rows);
        elementwise::add_rms_norm(&self.kernels, x.resize(x.rows), delta.filled(), weight, eps, out);
        Ok(())
    }

    fn linear(&mut self, linear: &Linear, x: &Activations, out: &mut Activations) -> Result<(), RunnerError> {
        let out = out.resize(x.rows);
        linear.matrix.matmul(&self.kernels, x.filled(), x.rows, linear.bias.as_deref(), out);
        Ok(())
    }

    fn rope_and_cache(
        &mut self,
        layer: usize,
        qkv: &Activations,
        norms: Option<(&Vec<f32>, &Vec<f32>)>,
        eps: f32,
        queries: &mut Activations,
    ) -> Result<(), RunnerError> {
        let rows = QkvRows {
            qkv: qkv.filled(),
            heads: self.heads,
            positions: &self.angle_rows[..qkv.rows],
            slots: &self.slots,
            rope: RopeTable { cos: &self.cos, sin: &self.sin },
            q_norm: norms.map(|(query, _)| query.as_slice()),
            k_norm: norms.map(|(_, key)| key.as_slice()),
            norm_eps: eps,
        };
        rope_and_cache(&self.kernels, &rows, &mut self.cache, layer, queries.resize(qkv.rows));
        Ok(())
    }

    fn attention(
        &mut self,
        layer: usize,
        window: Option<usize>,
        step: &Step,
        queries: &Activations,
        out: &mut Activations,
    ) -> Result<(), RunnerError> {
        let attention = Attention {
            heads: self.heads,
            scale: 1.0 / (self.cache.head_dim() as f32).sqrt(),
            // A window beyond 2^32 tokens is longer than any sequence.
            sliding_window: window.and_then(|window| u32::try_from(window).ok()),
        };
        let out = out.resize(queries.rows);
        paged_attention(&self.kernels, attention, queries.filled(), step, &self.cache, layer, out);
        Ok(())
    }

    fn silu_mul(&mut self, gate_up: &Activations, out: &mut Activations) -> Result<(), RunnerError> {
        let width = out.width;
        elementwise::silu_mul(&self.kernels, gate_up.filled(), width, out.resize(gate_up.rows));
        Ok(())
    }

    fn gather_rows(
        &mut self,
        x: &Activations,
        _: usize,
        pass: &Pass,
        out: &mut Activations,
    ) -> Result<(), RunnerError> {
        let (rows, width) = (&pass.rows, out.width);
        for (row, out) in rows.iter().zip(out.resize(rows.len()).chunks_exact_mut(width)) {
            out.copy_from_slice(&x.data[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn sample(
        &mut self,
        logits: &Activations,
        step: &Step,
        _: usize,
        pass: &Pass,
    ) -> Result<(), RunnerError> {
        let wants: Vec<_> = pass.wants(step).collect();
        let answers: Vec<Mutex<Option<Result<RowOutput, RunnerError>>>> =
            wants.iter().map(|_| Mutex::new(None)).collect();
        self.kernels.pool().run(wants.len(), &|index| {
            let (row, want) = wants[index];
            let logits = &logits.filled()[row * logits.width..(row + 1) * logits.width];
            let mut sampler = lock(&self.samplers).pop().unwrap_or_default();
            *lock(&answers[index]) = Some(sampler.answer(logits, want));
            lock(&self.samplers).push(sampler);
        });
        for answer in answers {
            let answer = answer.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.answers.push(answer.expect("every row was answered")?);
        }
        Ok(())
    }

    fn answers(&mut self) -> Result<StepOutput, RunnerError> {
        Ok(StepOutput { rows: std::mem::take(&mut self.answers) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A tensor's bytes as numbers: borrowed where a file aligns them, else copied.
enum Aligned<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    BF16(Cow<'a, [bf16]>),
}

impl<'a> Aligned<'a> {
    fn new(tensor: &'a TensorData<'_>) -> Self {
        match tensor.dtype {
            WeightDtype::F32 => Self::F32(numbers(&tensor.bytes, f32::from_le_bytes)),
            WeightDtype::F16 => Self::F16(numbers(&tensor.bytes, f16::from_le_bytes)),
            WeightDtype::BF16 => Self::BF16(numbers(&tensor.bytes, bf16::from_le_bytes)),
        }
    }

    fn rows(&self) -> WeightRows<'_> {
        match self {
            Self::F32(values) => WeightRows::F32(values),
            Self::F16(values) => WeightRows::F16(values),
            Self::BF16(values) => WeightRows::BF16(values),
        }
    }
}

/// Formats whose every bit pattern is a number.
trait Number: Copy {}
impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}

fn numbers<T: Number, const N: usize>(bytes: &[u8], from_le_bytes: fn([u8; N]) -> T) -> Cow<'_, [T]> {
    // SAFETY: every bit pattern is a value of these types.
    let (before, middle, after) = unsafe { bytes.align_to::<T>() };
    if before.is_empty() && after.is_empty() && cfg!(target_endian = "little") {
        return Cow::Borrowed(middle);
    }
    let groups = bytes.chunks_exact(N).map(|group| group.try_into().expect("groups of N bytes"));
    Cow::Owned(groups.map(from_le_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misaligned_bytes_are_copied_and_aligned_ones_borrowed() {
        let values = [1.5f32, -2.0, 0.25];
        let mut bytes = vec![0u8; 16];
        let offset = bytes.as_ptr().align_offset(4);
        for shift in [0, 1] {
            let at = offset + shift;
            bytes.resize(at + 12, 0);
            for (target, value) in bytes[at..].chunks_exact_mut(4).zip(values) {
                target.copy_from_slice(&value.to_le_bytes());
            }
            assert_eq!(numbers(&bytes[at..at + 12], f32::from_le_bytes).as_ref(), values);
        }
    }
}
