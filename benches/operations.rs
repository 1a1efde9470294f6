//! What the decoder's operations cost on this CPU, beside what the machine allows.
//!
//! `cargo bench -p servelab-benches --bench operations` (`-- decode` for some of it). Two threads, bf16
//! weights and cache, in the shape of SmolLM2-135M. `limits` first: a decode cannot be faster than all
//! weights take to be read, a prefill not faster than its multiply-adds.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use servelab_engine::{BlockId, SequenceId, Step, StepSequence};
use servelab_model::cpu::{
    Attention, Kernels, KvCache, KvDtype, PackedMatrix, QkvRows, RopeTable, WeightRows, add_rms_norm, limits,
    paged_attention, rope_and_cache, silu_mul,
};

const THREADS: usize = 2;
const HIDDEN: usize = 576;
const LAYERS: usize = 30;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const INTER: usize = 1536;
const VOCAB: usize = 49_152;
const BLOCK_SIZE: usize = 16;
const QKV: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
const POSITIONS: usize = 4096;

/// The products of one layer.
struct Layer {
    qkv: PackedMatrix,
    output: PackedMatrix,
    gate_up: PackedMatrix,
    down: PackedMatrix,
}

/// All weights of the model, their values of no matter.
struct Model {
    kernels: Kernels,
    layers: Vec<Layer>,
    head: PackedMatrix,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

fn matrix(kernels: &Kernels, inputs: usize, outputs: usize) -> PackedMatrix {
    let weights: Vec<_> =
        (0..inputs * outputs).map(|at| bf16::from_f32((at * 37 % 101) as f32 / 2000.0 - 0.025)).collect();
    PackedMatrix::pack(kernels, &[WeightRows::BF16(&weights)], inputs)
}

impl Model {
    fn new() -> Self {
        let (kernels, _) = Kernels::select(THREADS);
        let layer = |_| Layer {
            qkv: matrix(&kernels, HIDDEN, QKV),
            output: matrix(&kernels, HEADS * HEAD_DIM, HIDDEN),
            gate_up: matrix(&kernels, HIDDEN, 2 * INTER),
            down: matrix(&kernels, INTER, HIDDEN),
        };
        let layers = (0..LAYERS).map(layer).collect();
        let head = matrix(&kernels, HIDDEN, VOCAB);
        let angle = |at: usize| (at / 32) as f32 * 0.9f32.powi((at % 32) as i32);
        let cos = (0..POSITIONS * HEAD_DIM / 2).map(|at| angle(at).cos()).collect();
        let sin = (0..POSITIONS * HEAD_DIM / 2).map(|at| angle(at).sin()).collect();
        Self { kernels, layers, head, cos, sin }
    }
}

/// Sequences that each compute `tokens` tokens up to a context of `context`.
fn step(sequences: usize, tokens: usize, context: usize) -> Step {
    let mut step = Step::default();
    let blocks = context.div_ceil(BLOCK_SIZE);
    for sequence in 0..sequences {
        let first = step.tokens.len();
        // Strided, as tables are after some time of service.
        step.blocks.extend((0..blocks).map(|block| BlockId((block * sequences + sequence) as u32)));
        for position in context - tokens..context {
            let block = step.blocks[sequence * blocks + position / BLOCK_SIZE].0;
            step.tokens.push(1);
            step.positions.push(position as u32);
            step.slots.push(block * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
        }
        step.sequences.push(StepSequence {
            id: SequenceId(sequence as u64),
            tokens: first..step.tokens.len(),
            blocks: sequence * blocks..(sequence + 1) * blocks,
            context_len: context as u32,
        });
    }
    step
}

/// The buffers of a step, and its operations in the decoder's order.
struct Run<'a> {
    model: &'a Model,
    step: Step,
    cache: KvCache,
    hidden: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    q: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    delta: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> Run<'a> {
    fn new(model: &'a Model, sequences: usize, tokens: usize, context: usize) -> Self {
        let step = step(sequences, tokens, context);
        let rows = step.tokens.len();
        let buffer = |width: usize| vec![0.01; rows * width];
        let blocks = sequences * context.div_ceil(BLOCK_SIZE);
        Self {
            model,
            step,
            cache: KvCache::new(LAYERS, blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, KvDtype::BF16),
            hidden: buffer(HIDDEN),
            normed: buffer(HIDDEN),
            qkv: buffer(QKV),
            q: buffer(HEADS * HEAD_DIM),
            attended: buffer(HEADS * HEAD_DIM),
            gate_up: buffer(2 * INTER),
            gated: buffer(INTER),
            delta: buffer(HIDDEN),
            logits: vec![0.0; sequences * VOCAB],
        }
    }

    fn whole(&mut self) {
        for layer in 0..LAYERS {
            self.norm();
            self.qkv(layer);
            self.rope_and_cache(layer);
            self.attention(layer);
            self.output(layer);
            self.norm();
            self.feed_forward(layer);
        }
        self.norm();
        let (model, rows) = (self.model, self.step.sequences.len());
        model.head.matmul(&model.kernels, &self.normed[..rows * HIDDEN], rows, None, &mut self.logits);
    }

    fn rows(&self) -> usize {
        self.step.tokens.len()
    }

    fn norm(&mut self) {
        let weight = [1.0; HIDDEN];
        add_rms_norm(&self.model.kernels, &mut self.hidden, &self.delta, &weight, 1e-5, &mut self.normed);
    }

    fn qkv(&mut self, layer: usize) {
        let (model, rows) = (self.model, self.rows());
        model.layers[layer].qkv.matmul(&model.kernels, &self.normed, rows, None, &mut self.qkv);
    }

    fn rope_and_cache(&mut self, layer: usize) {
        let rows = QkvRows {
            qkv: &self.qkv,
            heads: HEADS,
            positions: &self.step.positions,
            slots: &self.step.slots,
            rope: RopeTable { cos: &self.model.cos, sin: &self.model.sin },
            q_norm: None,
            k_norm: None,
            norm_eps: 1e-5,
        };
        rope_and_cache(&self.model.kernels, &rows, &mut self.cache, layer, &mut self.q);
    }

    fn attention(&mut self, layer: usize) {
        let attention = Attention { heads: HEADS, scale: 0.125, sliding_window: None };
        let (kernels, out) = (&self.model.kernels, &mut self.attended);
        paged_attention(kernels, attention, &self.q, &self.step, &self.cache, layer, out);
    }

    fn output(&mut self, layer: usize) {
        let (model, rows) = (self.model, self.rows());
        model.layers[layer].output.matmul(&model.kernels, &self.attended, rows, None, &mut self.delta);
    }

    fn feed_forward(&mut self, layer: usize) {
        let (model, rows) = (self.model, self.rows());
        let kernels = &model.kernels;
        model.layers[layer].gate_up.matmul(kernels, &self.normed, rows, None, &mut self.gate_up);
        silu_mul(kernels, &self.gate_up, INTER, &mut self.gated);
        model.layers[layer].down.matmul(kernels, &self.gated, rows, None, &mut self.delta);
    }
}

/// How fast this machine reads and multiplies.
fn limits(c: &mut Criterion) {
    const BYTES: u64 = 256 << 20;
    let (kernels, _) = Kernels::select(THREADS);
    let mut group = c.benchmark_group("limits");
    group.sample_size(10);
    let scaled = |seconds: f64, iterations: u64| Duration::from_secs_f64(seconds * iterations as f64);
    group.throughput(Throughput::Bytes(BYTES));
    group.bench_function("read", |b| {
        b.iter_custom(|iterations| {
            let limits = limits::measure(&kernels, BYTES as usize);
            scaled(BYTES as f64 / limits.read_bytes_per_second, iterations)
        });
    });
    group.throughput(Throughput::Elements(1_000_000_000));
    group.bench_function("f32_operations", |b| {
        b.iter_custom(|iterations| {
            scaled(1e9 / limits::measure(&kernels, 1 << 20).f32_flops_per_second, iterations)
        });
    });
    group.finish();
}

/// What a parallel region costs that does nothing.
fn region(c: &mut Criterion) {
    let (kernels, _) = Kernels::select(THREADS);
    c.bench_function("region/empty", |b| b.iter(|| kernels.pool().run(THREADS, &|task| _ = black_box(task))));
}

/// Steps of the whole model, without embedding and sampling; elements are tokens.
fn steps(c: &mut Criterion) {
    let model = Model::new();
    let mut group = c.benchmark_group("step");
    group.sample_size(20);
    for (name, sequences, tokens, context) in [
        ("decode_1", 1, 1, 256),
        ("decode_4", 4, 1, 256),
        ("decode_16", 16, 1, 256),
        ("decode_32", 32, 1, 256),
        ("prefill_512", 1, 512, 512),
    ] {
        let mut run = Run::new(&model, sequences, tokens, context);
        group.throughput(Throughput::Elements((sequences * tokens) as u64));
        group.bench_function(name, |b| b.iter(|| run.whole()));
    }
    group.finish();
}

/// Each operation of one layer; layers take turns, so that weights come from memory as in a step.
fn operations(c: &mut Criterion) {
    let model = Model::new();
    for (name, sequences, tokens, context) in
        [("decode_1_of_2048", 1, 1, 2048), ("decode_16_of_512", 16, 1, 512), ("prefill_512", 1, 512, 512)]
    {
        let mut run = Run::new(&model, sequences, tokens, context);
        let mut group = c.benchmark_group(format!("layer/{name}"));
        let mut layer = (0..LAYERS).cycle();
        let mut next = || layer.next().unwrap_or(0);
        group.bench_function("norm", |b| b.iter(|| run.norm()));
        group.bench_function("qkv", |b| b.iter(|| run.qkv(next())));
        group.bench_function("rope_and_cache", |b| b.iter(|| run.rope_and_cache(next())));
        group.bench_function("attention", |b| b.iter(|| run.attention(next())));
        group.bench_function("output", |b| b.iter(|| run.output(next())));
        group.bench_function("feed_forward", |b| b.iter(|| run.feed_forward(next())));
        group.finish();
    }
}

fn config() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3))
}

criterion_group!(name = benches; config = config(); targets = limits, region, steps, operations);
criterion_main!(benches);
