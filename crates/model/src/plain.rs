//! The operations in plain loops.

use servelab_engine::{LogitsRow, RowOutput, RunnerError, Step};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::Ops;
use crate::rope::Rope;
use crate::sampler::Sampler;
use crate::weights::TensorData;

pub struct Buffer {
    data: Vec<f32>,
    width: usize,
    rows: usize,
}

pub struct Matrix {
    data: Vec<f32>,
    inputs: usize,
    bias: Option<Vec<f32>>,
}

pub struct PlainOps {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    num_blocks: usize,
    vocab: usize,
    rope: Rope,
    /// [layer][slot][kv_width]
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    sampler: Sampler,
}

impl PlainOps {
    pub fn new(config: &ModelConfig, num_blocks: usize, block_size: usize) -> Self {
        let layer = vec![0.0; num_blocks * block_size * config.kv_width()];
        Self {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            block_size,
            num_blocks,
            vocab: config.vocab_size,
            rope: Rope::new(&config.rope, config.head_dim),
            keys: vec![layer.clone(); config.num_layers],
            values: vec![layer; config.num_layers],
            positions: Vec::new(),
            slots: Vec::new(),
            sampler: Sampler::default(),
        }
    }
}

fn norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

impl Ops for PlainOps {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, parts: Vec<TensorData<'_>>, bias: Option<Vec<f32>>) -> Result<Matrix, ModelError> {
        let inputs = parts[0].columns();
        Ok(Matrix { data: parts.iter().flat_map(|p| p.to_f32()).collect(), inputs, bias })
    }
    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        Ok(values)
    }
    fn buffer(&mut self, rows: usize, width: usize) -> Result<Buffer, ModelError> {
        Ok(Buffer { data: vec![0.0; rows * width], width, rows: 0 })
    }
    fn begin(&mut self, step: &Step) -> Result<(), RunnerError> {
        let bad = |what: String| Err(RunnerError::Step(what));
        if let Some(token) = step.tokens.iter().find(|t| **t as usize >= self.vocab) {
            return bad(format!("token {token} is not in the vocabulary of {}", self.vocab));
        }
        if step.slots.iter().any(|s| *s as usize >= self.num_blocks * self.block_size) {
            return bad("a slot lies outside the KV cache".to_owned());
        }
        let width = self.block_size * self.kv_heads * self.head_dim;
        for (from, to) in &step.copies {
            for cache in self.keys.iter_mut().chain(&mut self.values) {
                let from = from.0 as usize * width;
                cache.copy_within(from..from + width, to.0 as usize * width);
            }
        }
        self.positions.clone_from(&step.positions);
        self.slots.clone_from(&step.slots);
        Ok(())
    }
    fn embed(&mut self, table: &Matrix, step: &Step, out: &mut Buffer) {
        out.rows = step.tokens.len();
        for (row, token) in out.data.chunks_mut(out.width).zip(&step.tokens) {
            row.copy_from_slice(&table.data[*token as usize * table.inputs..][..table.inputs]);
        }
    }
    fn rms_norm(&mut self, x: &Buffer, weight: &Vec<f32>, eps: f32, out: &mut Buffer) {
        out.rows = x.rows;
        let count = x.rows * x.width;
        out.data[..count].copy_from_slice(&x.data[..count]);
        out.data[..count].chunks_mut(x.width).for_each(|row| norm(row, weight, eps));
    }
    fn add_rms_norm(&mut self, x: &mut Buffer, delta: &Buffer, w: &Vec<f32>, eps: f32, out: &mut Buffer) {
        let count = x.rows * x.width;
        x.data[..count].iter_mut().zip(&delta.data).for_each(|(x, d)| *x += d);
        self.rms_norm(x, w, eps, out);
    }
    fn linear(&mut self, matrix: &Matrix, x: &Buffer, out: &mut Buffer) {
        out.rows = x.rows;
        for (row, out) in x.data.chunks(x.width).zip(out.data.chunks_mut(out.width)).take(x.rows) {
            for (index, (weights, out)) in matrix.data.chunks(matrix.inputs).zip(out).enumerate() {
                *out = dot(weights, row) + matrix.bias.as_ref().map_or(0.0, |b| b[index]);
            }
        }
    }
    fn rope_and_cache(
        &mut self,
        layer: usize,
        qkv: &mut Buffer,
        norms: Option<(&Vec<f32>, &Vec<f32>)>,
        eps: f32,
    ) {
        let (d, half) = (self.head_dim, self.head_dim / 2);
        let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
        for (t, row) in qkv.data.chunks_mut(qkv.width).take(qkv.rows).enumerate() {
            self.rope.fill(self.positions[t], &mut cos, &mut sin);
            for (h, head) in row.chunks_mut(d).take(self.heads + self.kv_heads).enumerate() {
                if let Some((q, k)) = norms {
                    norm(head, if h < self.heads { q } else { k }, eps);
                }
                for i in 0..half {
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * cos[i] - b * sin[i];
                    head[i + half] = b * cos[i] + a * sin[i];
                }
            }
            let width = self.kv_heads * d;
            let slot = self.slots[t] as usize * width;
            let (k, v) = row[self.heads * d..].split_at(width);
            self.keys[layer][slot..slot + width].copy_from_slice(k);
            self.values[layer][slot..slot + width].copy_from_slice(v);
        }
    }
    fn attention(
        &mut self,
        layer: usize,
        window: Option<usize>,
        step: &Step,
        qkv: &Buffer,
        out: &mut Buffer,
    ) {
        let (d, width) = (self.head_dim, self.kv_heads * self.head_dim);
        out.rows = qkv.rows;
        for sequence in &step.sequences {
            let blocks = &step.blocks[sequence.blocks.clone()];
            let place = |p: usize| {
                (blocks[p / self.block_size].0 as usize * self.block_size + p % self.block_size) * width
            };
            for t in sequence.tokens.clone() {
                let last = step.positions[t] as usize;
                let first = window.map_or(0, |w| (last + 1).saturating_sub(w));
                for h in 0..self.heads {
                    let query = &qkv.data[t * qkv.width + h * d..][..d];
                    let kv = h / (self.heads / self.kv_heads) * d;
                    let scale = 1.0 / (d as f32).sqrt();
                    let mut scores: Vec<f32> = (first..=last)
                        .map(|p| dot(query, &self.keys[layer][place(p) + kv..][..d]) * scale)
                        .collect();
                    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores.iter_mut().for_each(|s| *s = (*s - most).exp());
                    let total: f32 = scores.iter().sum();
                    let target = &mut out.data[t * out.width + h * d..][..d];
                    target.fill(0.0);
                    for (p, s) in (first..=last).zip(&scores) {
                        let value = &self.values[layer][place(p) + kv..][..d];
                        target.iter_mut().zip(value).for_each(|(t, v)| *t += s / total * v);
                    }
                }
            }
        }
    }
    fn silu_mul(&mut self, gate_up: &Buffer, out: &mut Buffer) {
        out.rows = gate_up.rows;
        for (row, out) in
            gate_up.data.chunks(gate_up.width).zip(out.data.chunks_mut(out.width)).take(gate_up.rows)
        {
            let (gate, up) = row.split_at(row.len() / 2);
            for ((g, u), o) in gate.iter().zip(up).zip(out) {
                *o = g / (1.0 + (-g).exp()) * u;
            }
        }
    }
    fn gather_rows(&mut self, x: &Buffer, rows: &[usize], out: &mut Buffer) {
        out.rows = rows.len();
        for (row, out) in rows.iter().zip(out.data.chunks_mut(out.width)) {
            out.copy_from_slice(&x.data[row * x.width..][..x.width]);
        }
    }
    fn sample(
        &mut self,
        logits: &Buffer,
        wants: &[(usize, &LogitsRow)],
        out: &mut Vec<RowOutput>,
    ) -> Result<(), RunnerError> {
        for (row, want) in wants {
            let logits = &logits.data[row * logits.width..][..logits.width];
            out.push(self.sampler.answer(logits, want)?);
        }
        Ok(())
    }
}
