//! The decoder's operations on a GPU: each puts a kernel or a product on one stream and returns.
//!
//! A step is one upload ([`super::upload`]), its operations, and one download of the tokens it chose. Two steps
//! may be under way: their page-locked buffers take turns. The tokens also stay on the GPU, where the next step's
//! embedding finds them. All memory is made before the first step.

use std::collections::VecDeque;
use std::sync::Arc;

use servelab_engine::{RunnerError, Step, StepOutput};

use super::draws::{DrawWords, LOGPROB_WORDS, read_answer};
use super::geometry::{DecodeItem, DecodeTile, DecodeWorkspace, PrefillTile, decode_capacity};
use super::gpu::{Format, Gpu, GpuError, Memory, Pinned, Product, Span};
use super::kernels::{Element, KvElement, Specialisation};
use super::launch::{
    Attention, CopyBlocks, DecodeCall, Embed, GatherRows, Kernels, KvScales, PrefillCall, QuantiseRows,
    RmsNorm, RopeAndCache, Sample, ScaleProduct,
};
use super::transfer::Transfer;
use super::upload::{Limits, PackedStep, Packing, SampleLaunch, StepSize};
use super::words::bytes_of;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::load::Progress;
use crate::ops::{Ops, Pass, StepLimits};
use crate::rope::Rope;
use crate::weights::TensorData;

/// Steps that may be under way at once.
pub const STEPS_AT_ONCE: usize = 2;
/// Most rows whose logits are computed at once: 512 rows of a vocabulary of 128,256 are 250 MiB.
const MOST_LOGITS_ROWS: usize = 512;
/// Draws of one launch whose logits are changed (penalties, biases, bans): each needs a copy of its row.
const SCRATCH_ROWS: usize = 64;
/// Rows of an 8-bit product that are scaled back at once; bounds its f32 result.
const NARROW_ROWS: usize = 1024;

/// How a model is computed on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaOptions {
    /// Format of weights and activations.
    pub element: Element,
    /// Keep the layers' weights in 8 bits with a scale for each output, and multiply in 8 bits.
    pub fp8_weights: bool,
    pub kv: KvElement,
    /// Tokens per block: 16, 32 or 64.
    pub block_size: u32,
    pub max_batched_tokens: usize,
    /// Sequences of a step.
    pub max_sequences: usize,
    pub max_model_len: u32,
}

/// The numbers of a model that operations need.
#[derive(Clone, Copy, Debug)]
struct Shape {
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    vocabulary: usize,
    /// Largest width of an input of a matrix, and of an output, of the layers.
    widest_input: usize,
    widest_output: usize,
}

/// The operations and the memory that they work on.
pub struct CudaOps<G: Gpu> {
    gpu: Arc<G>,
    stream: Arc<G::Stream>,
    kernels: Kernels<G>,
    options: CudaOptions,
    shape: Shape,
    /// The windows that layers have, each once, and which one each layer has.
    windows: Vec<Option<u32>>,
    window_of_layer: Vec<usize>,
    frequencies: G::Memory,
    amplitude: f32,
    scales: KvScales,
    /// While weights are loaded.
    transfer: Option<Transfer<G>>,
    progress: Option<Progress>,
    /// Of all weights, 16 bits each, as they cross the bus.
    transfer_bytes: u64,
    narrow: Option<Narrow<G>>,
    sampling: Sampling<G>,
    pool: Option<Pool<G>>,
    packed: PackedStep,
    /// Of each pass: its first picked row, and how many.
    picked: Vec<(usize, usize)>,
    /// Whether a step was begun and its download is not yet on the stream.
    is_open: bool,
    turn: usize,
    last_answers: usize,
    /// The step that was begun.
    begun: Option<G::Event>,
    under_way: VecDeque<UnderWay<G>>,
    /// The end of the last step whose answers were asked for.
    last_done: Option<G::Event>,
    time: GpuTime,
    weight_bytes: u64,
    activation_bytes: u64,
}

/// What 8-bit products need.
struct Narrow<G: Gpu> {
    /// `[max_batched_tokens, widest_input]`, e4m3
    codes: G::Memory,
    /// `[max_batched_tokens]`, f32
    scales: G::Memory,
    /// `[NARROW_ROWS, widest_output]`, f32
    product: G::Memory,
}

/// What sampling needs.
struct Sampling<G: Gpu> {
    /// The tokens, then the statuses of a step's answers, u32.
    answers: G::Memory,
    /// `[answers, LOGPROB_WORDS]`
    logprobs: G::Memory,
    /// `[SCRATCH_ROWS, vocabulary]`, f32
    scratch: G::Memory,
    /// Where both come to the host.
    results: [G::Pinned; STEPS_AT_ONCE],
    logprob_results: [G::Pinned; STEPS_AT_ONCE],
}

/// Keys and values, and what grows with them.
struct Pool<G: Gpu> {
    /// `[layers, blocks, 2, kv_heads, block_size, head_dim]`
    cache: G::Memory,
    blocks: usize,
    /// Decode items of a list.
    items: usize,
    partial_values: G::Memory,
    partial_sums: G::Memory,
    arrivals: G::Memory,
    /// A packed step.
    words: G::Memory,
    staging: [G::Pinned; STEPS_AT_ONCE],
}

/// How the GPU spent its time, by its own clock.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuTime {
    pub steps: u64,
    pub busy_seconds: f64,
    /// Between a step and the next, where that came soon enough for the GPU to have waited for the host and not
    /// for work.
    pub idle_seconds: f64,
}

/// Longest time between two steps that counts as the host's.
const MOST_IDLE_SECONDS: f64 = 0.1;

/// A step whose answers were not yet asked for.
struct UnderWay<G: Gpu> {
    turn: usize,
    draws: Vec<DrawWords>,
    /// Answers with padding: where the statuses begin.
    places: usize,
    any_logprobs: bool,
    begun: Option<G::Event>,
    done: G::Event,
}

/// Activations, `[rows, width]`.
pub struct Buffer<G: Gpu> {
    memory: G::Memory,
    width: usize,
    rows: usize,
    format: Format,
}

impl<G: Gpu> Buffer<G> {
    fn span(&self) -> Span<'_> {
        self.memory.span()
    }
}

/// A weight matrix `[outputs, inputs]` and its bias.
pub struct Matrix<G: Gpu> {
    outputs: usize,
    inputs: usize,
    weights: G::Memory,
    /// In 8 bits: of each output, f32.
    scales: Option<G::Memory>,
    bias: Option<G::Memory>,
}

impl<G: Gpu> Matrix<G> {
    fn bias(&self) -> Span<'_> {
        self.bias.as_ref().map_or(Span::NONE, Memory::span)
    }
}

impl From<GpuError> for RunnerError {
    fn from(error: GpuError) -> Self {
        match error.is_sticky() {
            true => Self::Fatal(error.to_string()),
            false => Self::Step(error.to_string()),
        }
    }
}

/// What the kernels of a model are compiled for.
///
/// # Errors
/// [`GpuError::Refused`] if there are none for this model or this GPU.
pub fn specialisation<G: Gpu>(
    gpu: &G,
    config: &ModelConfig,
    options: &CudaOptions,
) -> Result<Specialisation, GpuError> {
    let head_dim = config.head_dim as u32;
    let specialisation = Specialisation {
        element: options.element,
        kv: options.kv,
        hidden: config.hidden_size as u32,
        head_dim,
        group: (config.num_heads / config.num_kv_heads) as u32,
        block_size: options.block_size,
        head_norms: config.qk_norm,
        decode: DecodeTile::choose(gpu.info(), head_dim, options.kv),
        prefill: PrefillTile::choose(head_dim),
    };
    specialisation.check(gpu.info())?;
    let refused = |reason| Err(GpuError::Refused { what: "CUDA".to_owned(), reason });
    if !config.intermediate_size.is_multiple_of(8) {
        return refused(format!("intermediate_size {}; a multiple of 8", config.intermediate_size));
    }
    if options.fp8_weights {
        if !gpu.info().arch.has_fp8() {
            let arch = gpu.info().arch;
            return refused(format!("fp8 weights on compute capability {arch}; 8.9 or later"));
        }
        let widths = [config.hidden_size, config.query_width(), config.qkv_width(), config.intermediate_size];
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(16)) {
            return refused(format!("fp8 weights of a layer that is {width} wide; a multiple of 16"));
        }
    }
    Ok(specialisation)
}

/// Bytes of one block of the KV cache, keys and values of all layers.
pub fn kv_bytes_per_block(config: &ModelConfig, block_size: u32, kv: KvElement) -> u64 {
    config.kv_values_per_token() * u64::from(block_size) * kv.bytes() as u64
}

impl<G: Gpu> CudaOps<G> {
    /// Compiles and loads the kernels, and makes the memory that does not depend on the pool.
    ///
    /// # Errors
    /// If the GPU or the model is not supported, or there is no memory.
    pub fn new(gpu: Arc<G>, config: &ModelConfig, options: CudaOptions) -> Result<Self, ModelError> {
        let specialisation = specialisation(&*gpu, config, &options)?;
        let kernels = Kernels::load(&*gpu, specialisation)?;
        let stream = gpu.stream()?;
        let shape = Shape {
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            layers: config.num_layers,
            vocabulary: config.vocab_size,
            widest_input: config.hidden_size.max(config.query_width()).max(config.intermediate_size),
            widest_output: config.hidden_size.max(config.qkv_width()).max(2 * config.intermediate_size),
        };
        let rope = Rope::new(&config.rope, config.head_dim);
        let frequencies = gpu.allocate(rope.frequencies.len() * 4)?;
        gpu.upload(&stream, bytes_of(&rope.frequencies), frequencies.span())?;
        // A window beyond 2^32 tokens is longer than any sequence.
        let window = |window: &Option<usize>| window.and_then(|window| u32::try_from(window).ok());
        let of_layers: Vec<Option<u32>> = config.windows.iter().map(window).collect();
        let mut windows = of_layers.clone();
        windows.sort_unstable();
        windows.dedup();
        let place = |window| windows.iter().position(|other| *other == window).unwrap_or(0);
        let window_of_layer = of_layers.into_iter().map(place).collect();
        let narrow = options.fp8_weights.then(|| Narrow::new(&*gpu, &shape, &options)).transpose()?;
        let sampling = Sampling::new(&*gpu, &shape, &options)?;
        let transfer = Some(Transfer::new(&*gpu)?);
        let mut ops = Self {
            gpu,
            stream: Arc::new(stream),
            kernels,
            options,
            shape,
            windows,
            window_of_layer,
            frequencies,
            amplitude: rope.amplitude,
            scales: KvScales::default(),
            transfer,
            progress: None,
            transfer_bytes: 2 * config.num_parameters(),
            narrow,
            sampling,
            pool: None,
            packed: PackedStep::default(),
            picked: Vec::new(),
            is_open: false,
            turn: 0,
            last_answers: 0,
            begun: None,
            under_way: VecDeque::new(),
            last_done: None,
            time: GpuTime::default(),
            weight_bytes: 0,
            activation_bytes: 0,
        };
        ops.activation_bytes = ops.sampling.bytes() + ops.narrow.as_ref().map_or(0, Narrow::bytes);
        Ok(ops)
    }

    pub fn gpu(&self) -> &Arc<G> {
        &self.gpu
    }

    pub fn stream(&self) -> &Arc<G::Stream> {
        &self.stream
    }

    pub fn options(&self) -> &CudaOptions {
        &self.options
    }

    pub fn specialisation(&self) -> &Specialisation {
        self.kernels.specialisation()
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of activations and of what sampling needs.
    pub fn activation_bytes(&self) -> u64 {
        self.activation_bytes
    }

    /// Since [`CudaOps::restart_clock`].
    pub fn time(&self) -> GpuTime {
        self.time
    }

    pub fn restart_clock(&mut self) {
        (self.time, self.last_done) = (GpuTime::default(), None);
    }

    /// Takes the time of a step that has ended.
    fn clock(&mut self, begun: Option<G::Event>, done: G::Event) -> Result<(), GpuError> {
        if let Some(begun) = begun {
            self.time.steps += 1;
            self.time.busy_seconds += self.gpu.seconds_between(&begun, &done)?;
            let gap =
                self.last_done.as_ref().map(|last| self.gpu.seconds_between(last, &begun)).transpose()?;
            self.time.idle_seconds += gap.filter(|gap| *gap <= MOST_IDLE_SECONDS).unwrap_or(0.0).max(0.0);
        }
        self.last_done = Some(done);
        Ok(())
    }

    pub fn kv_heads(&self) -> u32 {
        self.shape.kv_heads as u32
    }

    /// Bytes of one block of the pool.
    pub fn block_bytes(&self) -> usize {
        let Shape { kv_heads, head_dim, layers, .. } = self.shape;
        let tokens = self.options.block_size as usize;
        layers * 2 * kv_heads * tokens * head_dim * self.options.kv.bytes()
    }

    /// Waits for the weights, and gives back what loading them took.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    pub fn loaded(&mut self) -> Result<(), GpuError> {
        self.gpu.synchronise(&self.stream)?;
        (self.transfer, self.progress) = (None, None);
        Ok(())
    }

    /// Has somebody told how far the weights are.
    pub fn watch(&mut self, progress: Progress) {
        self.progress = Some(progress);
    }

    /// Bytes of everything in a pool of `blocks` blocks but the blocks.
    pub fn bytes_beside_pool(&self, blocks: usize) -> usize {
        let (workspace, limits) = self.pool_sizes(blocks);
        workspace.partial_values
            + workspace.partial_sums
            + workspace.arrivals
            + limits.bytes(self.windows.len(), self.specialisation().prefill)
    }

    fn pool_sizes(&self, blocks: usize) -> (DecodeWorkspace, Limits) {
        let options = &self.options;
        let items = decode_capacity(options.max_sequences, blocks * options.block_size as usize);
        let (rows, kv_heads) = (options.max_batched_tokens, self.kv_heads());
        let workspace = DecodeWorkspace::new(self.specialisation(), kv_heads, rows, items);
        (workspace, self.limits(items))
    }

    fn limits(&self, items: usize) -> Limits {
        let options = &self.options;
        Limits {
            tokens: options.max_batched_tokens,
            sequences: options.max_sequences,
            answers: most_answers(options),
            blocks_per_sequence: options.max_model_len.div_ceil(options.block_size) as usize,
            items,
            vocabulary: self.shape.vocabulary,
            group: self.specialisation().group as usize,
            scratch_rows: SCRATCH_ROWS,
        }
    }

    /// Makes the pool; the one before is freed first.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`].
    pub fn make_pool(&mut self, blocks: usize) -> Result<(), GpuError> {
        self.gpu.synchronise(&self.stream)?;
        self.pool = None;
        let (workspace, limits) = self.pool_sizes(blocks);
        let words = limits.bytes(self.windows.len(), self.specialisation().prefill);
        let gpu = &*self.gpu;
        let arrivals = gpu.allocate(workspace.arrivals)?;
        gpu.fill(&self.stream, arrivals.span(), 0)?;
        self.pool = Some(Pool {
            cache: gpu.allocate(blocks * self.block_bytes())?,
            blocks,
            items: limits.items,
            partial_values: gpu.allocate(workspace.partial_values)?,
            partial_sums: gpu.allocate(workspace.partial_sums)?,
            arrivals,
            words: gpu.allocate(words)?,
            staging: [gpu.pinned(words)?, gpu.pinned(words)?],
        });
        self.last_answers = 0;
        Ok(())
    }

    /// Frees the pool.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    pub fn drop_pool(&mut self) -> Result<(), GpuError> {
        self.gpu.synchronise(&self.stream)?;
        self.pool = None;
        Ok(())
    }

    pub fn pool_bytes(&self) -> u64 {
        self.pool.as_ref().map_or(0, |pool| pool.cache.bytes() as u64)
    }

    /// The size under which a step can run as a recorded one, before padding: as many answers as tokens, each
    /// sequence one.
    pub fn decode_rows(&self, step: &Step, passes: &[Pass]) -> Option<usize> {
        let rows = step.tokens.len();
        let [pass] = passes else { return None };
        let is_decode = step.sequences.len() == rows
            && step.rows.len() == rows
            && pass.rows.iter().copied().eq(0..rows)
            && pass.places.iter().copied().eq(0..rows)
            && step.sequences.iter().enumerate().all(|(row, sequence)| sequence.tokens == (row..row + 1));
        is_decode.then_some(rows)
    }

    /// Whether the step that was begun can be answered by one launch, as recorded ones are.
    pub fn samples_at_once(&self) -> bool {
        self.packed.launches.len() <= 1
    }

    /// [`Ops::begin`] for a step that is padded to `size`.
    ///
    /// # Errors
    /// As [`Ops::begin`].
    pub fn begin_padded(&mut self, step: &Step, passes: &[Pass], size: StepSize) -> Result<(), RunnerError> {
        if self.under_way.len() >= STEPS_AT_ONCE {
            return Err(RunnerError::Step(
                "two steps are under way; ask for the answers of one first".into(),
            ));
        }
        let Some(pool) = &mut self.pool else {
            return Err(RunnerError::Step("the KV pool was not made yet".into()));
        };
        let limits = StepLimits {
            tokens: self.options.max_batched_tokens,
            vocabulary: self.shape.vocabulary,
            blocks: pool.blocks,
            block_size: self.options.block_size as usize,
        };
        limits.check(step)?;
        if step.from_last.iter().any(|token| token.answer >= self.last_answers) {
            return Err(RunnerError::Step("a token stands for an answer that the last step has not".into()));
        }
        let items = pool.items;
        let packing = Packing {
            limits: Limits { items, ..self.limits(items) },
            group: self.specialisation().group,
            tile: self.specialisation().prefill,
            windows: &self.windows,
        };
        let mut packed = std::mem::take(&mut self.packed);
        let outcome = packed.pack(step, passes, size, &packing);
        self.packed = packed;
        outcome?;
        self.picked.clear();
        let mut first = 0;
        for pass in passes {
            self.picked.push((first, pass.rows.len()));
            first += pass.rows.len();
        }
        if let [(_, count)] = &mut self.picked[..] {
            *count = size.picked;
        }
        self.begun = Some(self.gpu.record(&self.stream)?);
        self.upload()?;
        self.last_answers = step.rows.len();
        self.is_open = true;
        Ok(())
    }

    fn upload(&mut self) -> Result<(), GpuError> {
        let Some(pool) = &mut self.pool else { return Ok(()) };
        let bytes = self.packed.bytes().len();
        pool.staging[self.turn].bytes_mut()[..bytes].copy_from_slice(self.packed.bytes());
        let to = pool.words.span().part(0..bytes);
        self.gpu.upload_pinned(&self.stream, &pool.staging[self.turn], 0..bytes, to)?;
        if self.packed.copy_count == 0 {
            return Ok(());
        }
        let layers = self.shape.layers;
        let call = CopyBlocks {
            cache: pool.cache.span(),
            copies: pool.words.span().part(self.packed.copies.clone()),
            count: self.packed.copy_count,
            layers,
            layer_bytes: pool.cache.bytes() / layers,
            block_bytes: pool.cache.bytes() / layers / pool.blocks,
        };
        self.kernels.copy_blocks(&self.gpu, &self.stream, call)
    }

    /// Forgets the step that was begun: its answers will not be asked for, and no token may refer to them.
    pub fn abandon(&mut self) {
        self.is_open = false;
        self.last_answers = 0;
    }

    /// Puts the download of the answers on the stream. The step that was begun has been computed by then.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    pub fn finish(&mut self) -> Result<(), RunnerError> {
        self.is_open = false;
        let places = self.packed.size.answers;
        let any_logprobs = self.packed.launches.iter().any(|launch| launch.any_logprobs);
        let (gpu, stream, sampling, turn) = (&*self.gpu, &*self.stream, &self.sampling, self.turn);
        gpu.download_pinned(stream, sampling.answers.span().part(0..8 * places), &sampling.results[turn])?;
        if any_logprobs {
            let bytes = self.packed.draws.draws.len() * LOGPROB_WORDS * 4;
            let from = sampling.logprobs.span().part(0..bytes);
            gpu.download_pinned(stream, from, &sampling.logprob_results[turn])?;
        }
        let done = gpu.record(stream)?;
        let draws = self.packed.draws.draws.clone();
        let begun = self.begun.take();
        self.under_way.push_back(UnderWay { turn, draws, places, any_logprobs, begun, done });
        self.turn = (turn + 1) % STEPS_AT_ONCE;
        Ok(())
    }

    /// Where the parts of the packed step lie.
    fn words(&self) -> Result<(&Pool<G>, Span<'_>), RunnerError> {
        let pool = self.pool.as_ref();
        let pool = pool.ok_or_else(|| RunnerError::Step("the KV pool was not made yet".into()))?;
        Ok((pool, pool.words.span()))
    }

    fn layer_of_cache<'p>(&self, pool: &'p Pool<G>, layer: usize) -> Span<'p> {
        let bytes = pool.cache.bytes() / self.shape.layers;
        pool.cache.span().part(layer * bytes..(layer + 1) * bytes)
    }

    fn allocate(&mut self, bytes: usize) -> Result<G::Memory, GpuError> {
        self.weight_bytes += bytes as u64;
        self.gpu.allocate(bytes)
    }

    /// The parts of a matrix one after the other, 16 bits a number.
    fn put_parts(&mut self, parts: &[TensorData<'_>], to: Span<'_>) -> Result<(), GpuError> {
        if self.transfer.is_none() {
            self.transfer = Some(Transfer::new(&*self.gpu)?);
        }
        let Some(transfer) = &mut self.transfer else { return Ok(()) };
        let mut start = 0;
        for part in parts {
            let bytes = 2 * part.rows() * part.columns();
            let to = to.part(start..start + bytes);
            transfer.put(&self.gpu, &self.stream, part, self.options.element, to)?;
            start += bytes;
        }
        if let Some(progress) = &mut self.progress {
            progress(transfer.bytes, self.transfer_bytes);
        }
        Ok(())
    }

    fn put_bias(&mut self, values: &[f32]) -> Result<G::Memory, GpuError> {
        let bits: Vec<u16> = values.iter().map(|value| self.options.element.rounded(*value)).collect();
        let memory = self.allocate(2 * bits.len())?;
        self.gpu.upload(&self.stream, bytes_of(&bits), memory.span())?;
        Ok(memory)
    }

    fn wide_matrix(&mut self, parts: &[TensorData<'_>]) -> Result<Matrix<G>, GpuError> {
        let (outputs, inputs) = (parts.iter().map(TensorData::rows).sum(), parts[0].columns());
        let weights = self.allocate(2 * outputs * inputs)?;
        self.put_parts(parts, weights.span())?;
        Ok(Matrix { outputs, inputs, weights, scales: None, bias: None })
    }

    /// The same in 8 bits, with a scale for each output.
    fn narrow_matrix(&mut self, parts: &[TensorData<'_>]) -> Result<Matrix<G>, GpuError> {
        let (outputs, inputs) = (parts.iter().map(TensorData::rows).sum::<usize>(), parts[0].columns());
        let wide = self.gpu.allocate(2 * outputs * inputs)?;
        self.put_parts(parts, wide.span())?;
        let (weights, scales) = (self.allocate(outputs * inputs)?, self.allocate(4 * outputs)?);
        let call = QuantiseRows {
            out: weights.span(),
            scales: scales.span(),
            x: wide.span(),
            rows: outputs,
            width: inputs,
        };
        self.kernels.quantise_rows(&self.gpu, &self.stream, call)?;
        // Before the wide one is freed.
        self.gpu.synchronise(&self.stream)?;
        Ok(Matrix { outputs, inputs, weights, scales: Some(scales), bias: None })
    }

    fn make_buffer(&mut self, rows: usize, width: usize, format: Format) -> Result<Buffer<G>, ModelError> {
        let bytes = rows * width * format.bytes();
        self.activation_bytes += bytes as u64;
        Ok(Buffer { memory: self.gpu.allocate(bytes)?, width, rows: 0, format })
    }

    fn format(&self) -> Format {
        match self.options.element {
            Element::BF16 => Format::BF16,
            Element::F16 => Format::F16,
        }
    }

    #[allow(unsafe_code)]
    fn multiply(&self, product: &Product<'_>) -> Result<(), GpuError> {
        // SAFETY: weights and buffers live as long as the decoder, which waits for the stream before it goes.
        unsafe { self.gpu.multiply(&self.stream, product) }
    }

    fn narrow_linear(
        &self,
        matrix: &Matrix<G>,
        scales: &G::Memory,
        x: &Buffer<G>,
        out: &Buffer<G>,
    ) -> Result<(), GpuError> {
        let Some(narrow) = &self.narrow else { return Ok(()) };
        let Matrix { outputs, inputs, .. } = *matrix;
        let call = QuantiseRows {
            out: narrow.codes.span(),
            scales: narrow.scales.span(),
            x: x.span(),
            rows: x.rows,
            width: inputs,
        };
        self.kernels.quantise_rows(&self.gpu, &self.stream, call)?;
        for first in (0..x.rows).step_by(NARROW_ROWS) {
            let rows = NARROW_ROWS.min(x.rows - first);
            self.multiply(&Product {
                rows,
                inputs,
                outputs,
                x: narrow.codes.span().part(first * inputs..(first + rows) * inputs),
                weights: matrix.weights.span(),
                bias: Span::NONE,
                out: narrow.product.span(),
                format: Format::E4M3,
                out_format: Format::F32,
            })?;
            let call = ScaleProduct {
                out: out.span().part(2 * first * outputs..2 * (first + rows) * outputs),
                product: narrow.product.span(),
                row_scales: narrow.scales.span().part(4 * first..4 * (first + rows)),
                column_scales: scales.span(),
                bias: matrix.bias(),
                rows,
                columns: outputs,
            };
            self.kernels.scale_product(&self.gpu, &self.stream, call)?;
        }
        Ok(())
    }

    fn attention_of<'a>(
        &self,
        pool: &'a Pool<G>,
        layer: usize,
        queries: &'a Buffer<G>,
        out: &'a Buffer<G>,
    ) -> Attention<'a> {
        let words = pool.words.span();
        Attention {
            out: out.span(),
            queries: queries.span(),
            cache: self.layer_of_cache(pool, layer),
            // Tables are found by words from here, each as long as it is.
            block_tables: words.part(self.packed.layout.tail..words.bytes()),
            table_width: 1,
            rows: queries.rows,
            kv_heads: self.shape.kv_heads,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            scales: self.scales,
        }
    }

    fn decode(&self, pool: &Pool<G>, attention: Attention<'_>, list: usize) -> Result<(), GpuError> {
        let words = pool.words.span();
        let layout = &self.packed.layout;
        let items = layout.tail + PackedStep::items_at(list, pool.items);
        let count = layout.counts.start + 4 * list;
        let call = DecodeCall {
            attention,
            items: words.part(items..items + pool.items * size_of::<DecodeItem>()),
            item_count: words.part(count..count + 4),
            partial_values: pool.partial_values.span(),
            partial_sums: pool.partial_sums.span(),
            arrivals: pool.arrivals.span(),
        };
        self.kernels.decode_attention(&self.gpu, &self.stream, call)
    }

    fn launch_sample(
        &self,
        logits: &Buffer<G>,
        pool: &Pool<G>,
        launch: SampleLaunch,
    ) -> Result<(), GpuError> {
        let (words, layout, sampling) = (pool.words.span(), &self.packed.layout, &self.sampling);
        let places = self.packed.size.answers;
        // The only launch of a padded step answers the padding too.
        let count = if self.packed.launches.len() == 1 { places } else { launch.count };
        let SampleLaunch { first, .. } = launch;
        let draw_bytes = size_of::<DrawWords>();
        let answers =
            |start: usize| sampling.answers.span().part(4 * (start + first)..4 * (start + first + count));
        let draws = layout.draws.start + first * draw_bytes;
        let logprob_bytes = 4 * LOGPROB_WORDS;
        let call = Sample {
            chosen: answers(0),
            statuses: answers(places),
            logprobs: sampling.logprobs.span().part(first * logprob_bytes..(first + count) * logprob_bytes),
            logits: logits.span(),
            scratch: sampling.scratch.span(),
            draws: words.part(draws..draws + count * draw_bytes),
            changes: words.part(layout.tail..words.bytes()),
            answers: count,
            rows: logits.rows,
            vocabulary: self.shape.vocabulary,
            logits_stride: logits.width,
            scratch_rows: launch.scratch_rows,
            change_count: self.packed.draws.changes.len(),
            any_logprobs: launch.any_logprobs,
        };
        self.kernels.sample(&self.gpu, &self.stream, call)
    }
}

/// Answers of the largest step: every prompt token scored, and every sequence's next token.
fn most_answers(options: &CudaOptions) -> usize {
    options.max_batched_tokens + options.max_sequences
}

impl<G: Gpu> Narrow<G> {
    fn new(gpu: &G, shape: &Shape, options: &CudaOptions) -> Result<Self, GpuError> {
        let tokens = options.max_batched_tokens;
        Ok(Self {
            codes: gpu.allocate(tokens * shape.widest_input)?,
            scales: gpu.allocate(4 * tokens)?,
            product: gpu.allocate(4 * NARROW_ROWS.min(tokens) * shape.widest_output)?,
        })
    }

    fn bytes(&self) -> u64 {
        [&self.codes, &self.scales, &self.product].iter().map(|memory| memory.bytes() as u64).sum()
    }
}

impl<G: Gpu> Sampling<G> {
    fn new(gpu: &G, shape: &Shape, options: &CudaOptions) -> Result<Self, GpuError> {
        let answers = most_answers(options);
        let (result_bytes, logprob_bytes) = (8 * answers, answers * LOGPROB_WORDS * 4);
        Ok(Self {
            answers: gpu.allocate(result_bytes)?,
            logprobs: gpu.allocate(logprob_bytes)?,
            scratch: gpu.allocate(4 * SCRATCH_ROWS * shape.vocabulary)?,
            results: [gpu.pinned(result_bytes)?, gpu.pinned(result_bytes)?],
            logprob_results: [gpu.pinned(logprob_bytes)?, gpu.pinned(logprob_bytes)?],
        })
    }

    fn bytes(&self) -> u64 {
        [&self.answers, &self.logprobs, &self.scratch].iter().map(|memory| memory.bytes() as u64).sum()
    }
}

impl<G: Gpu> Drop for CudaOps<G> {
    fn drop(&mut self) {
        // Memory goes after the work on it.
        let _ = self.gpu.synchronise(&self.stream);
    }
}

impl<G: Gpu> Ops for CudaOps<G> {
    type Buffer = Buffer<G>;
    type Matrix = Matrix<G>;
    /// f32
    type Vector = G::Memory;

    fn matrix(
        &mut self,
        parts: Vec<TensorData<'_>>,
        bias: Option<Vec<f32>>,
    ) -> Result<Matrix<G>, ModelError> {
        let mut matrix = match self.options.fp8_weights {
            true => self.narrow_matrix(&parts)?,
            false => self.wide_matrix(&parts)?,
        };
        matrix.bias = bias.map(|values| self.put_bias(&values)).transpose()?;
        Ok(matrix)
    }

    fn table(&mut self, tensor: TensorData<'_>) -> Result<Matrix<G>, ModelError> {
        Ok(self.wide_matrix(&[tensor])?)
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<G::Memory, ModelError> {
        let memory = self.allocate(4 * values.len())?;
        self.gpu.upload(&self.stream, bytes_of(&values), memory.span())?;
        Ok(memory)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Result<Buffer<G>, ModelError> {
        self.make_buffer(rows, width, self.format())
    }

    fn logits_buffer(&mut self, rows: usize, width: usize) -> Result<Buffer<G>, ModelError> {
        self.make_buffer(rows, width, Format::F32)
    }

    fn logits_rows(&self) -> usize {
        self.options.max_sequences.clamp(64, MOST_LOGITS_ROWS)
    }

    fn begin(&mut self, step: &Step, passes: &[Pass]) -> Result<(), RunnerError> {
        self.begin_padded(step, passes, StepSize::of(step, passes))
    }

    fn embed(&mut self, table: &Matrix<G>, _: &Step, out: &mut Buffer<G>) -> Result<(), RunnerError> {
        let (_, words) = self.words()?;
        out.rows = self.packed.size.tokens;
        let call = Embed {
            out: out.span(),
            table: table.weights.span(),
            tokens: words.part(self.packed.layout.tokens.clone()),
            chosen: self.sampling.answers.span(),
            rows: out.rows,
            width: out.width,
        };
        Ok(self.kernels.embed(&self.gpu, &self.stream, call)?)
    }

    fn rms_norm(
        &mut self,
        x: &Buffer<G>,
        weight: &G::Memory,
        eps: f32,
        out: &mut Buffer<G>,
    ) -> Result<(), RunnerError> {
        out.rows = x.rows;
        let call = RmsNorm { out: out.span(), x: x.span(), weight: weight.span(), rows: x.rows, eps };
        Ok(self.kernels.rms_norm(&self.gpu, &self.stream, call)?)
    }

    fn add_rms_norm(
        &mut self,
        x: &mut Buffer<G>,
        delta: &Buffer<G>,
        weight: &G::Memory,
        eps: f32,
        out: &mut Buffer<G>,
    ) -> Result<(), RunnerError> {
        out.rows = x.rows;
        let call = RmsNorm { out: out.span(), x: x.span(), weight: weight.span(), rows: x.rows, eps };
        Ok(self.kernels.add_rms_norm(&self.gpu, &self.stream, delta.span(), call)?)
    }

    fn linear(&mut self, matrix: &Matrix<G>, x: &Buffer<G>, out: &mut Buffer<G>) -> Result<(), RunnerError> {
        out.rows = x.rows;
        if let Some(scales) = &matrix.scales {
            return Ok(self.narrow_linear(matrix, scales, x, out)?);
        }
        let product = Product {
            rows: x.rows,
            inputs: matrix.inputs,
            outputs: matrix.outputs,
            x: x.span(),
            weights: matrix.weights.span(),
            bias: matrix.bias(),
            out: out.span(),
            format: x.format,
            out_format: out.format,
        };
        Ok(self.multiply(&product)?)
    }

    fn rope_and_cache(
        &mut self,
        layer: usize,
        qkv: &Buffer<G>,
        norms: Option<(&G::Memory, &G::Memory)>,
        eps: f32,
        queries: &mut Buffer<G>,
    ) -> Result<(), RunnerError> {
        let (pool, words) = self.words()?;
        queries.rows = qkv.rows;
        let call = RopeAndCache {
            queries: queries.span(),
            cache: self.layer_of_cache(pool, layer),
            qkv: qkv.span(),
            positions: words.part(self.packed.layout.positions.clone()),
            slots: words.part(self.packed.layout.slots.clone()),
            frequencies: self.frequencies.span(),
            norms: norms.map(|(query, key)| (query.span(), key.span())),
            tokens: qkv.rows,
            kv_heads: self.shape.kv_heads,
            amplitude: self.amplitude,
            eps,
            scales: self.scales,
        };
        Ok(self.kernels.rope_and_cache(&self.gpu, &self.stream, call)?)
    }

    fn attention(
        &mut self,
        layer: usize,
        window: Option<usize>,
        _: &Step,
        queries: &Buffer<G>,
        out: &mut Buffer<G>,
    ) -> Result<(), RunnerError> {
        let (pool, words) = self.words()?;
        out.rows = queries.rows;
        let attention = self.attention_of(pool, layer, queries, out);
        if self.packed.decodes {
            self.decode(pool, attention, self.window_of_layer[layer])?;
        }
        if self.packed.prefill_count > 0 {
            let call = PrefillCall {
                attention,
                items: words.part(self.packed.prefill_items.clone()),
                item_count: self.packed.prefill_count,
                window: window.and_then(|window| u32::try_from(window).ok()),
            };
            self.kernels.prefill_attention(&self.gpu, &self.stream, call)?;
        }
        Ok(())
    }

    fn silu_mul(&mut self, gate_up: &Buffer<G>, out: &mut Buffer<G>) -> Result<(), RunnerError> {
        out.rows = gate_up.rows;
        let (gpu, stream) = (&*self.gpu, &*self.stream);
        Ok(self.kernels.silu_mul(gpu, stream, gate_up.span(), out.span(), gate_up.rows, out.width)?)
    }

    fn gather_rows(
        &mut self,
        x: &Buffer<G>,
        index: usize,
        _: &Pass,
        out: &mut Buffer<G>,
    ) -> Result<(), RunnerError> {
        let (_, words) = self.words()?;
        let (first, count) = self.picked[index];
        out.rows = count;
        let start = self.packed.layout.picked.start + 4 * first;
        let call = GatherRows {
            out: out.span(),
            x: x.span(),
            indices: words.part(start..start + 4 * count),
            rows: count,
            width: out.width,
        };
        Ok(self.kernels.gather_rows(&self.gpu, &self.stream, call)?)
    }

    fn sample(&mut self, logits: &Buffer<G>, _: &Step, index: usize, _: &Pass) -> Result<(), RunnerError> {
        let (pool, _) = self.words()?;
        for launch in self.packed.launches.iter().filter(|launch| launch.pass == index) {
            self.launch_sample(logits, pool, *launch)?;
        }
        Ok(())
    }

    fn answers(&mut self) -> Result<StepOutput, RunnerError> {
        if self.is_open {
            self.finish()?;
        }
        let Some(step) = self.under_way.pop_front() else {
            return Err(RunnerError::Step("no step is under way".into()));
        };
        self.gpu.wait(&step.done)?;
        let results = self.sampling.results[step.turn].bytes();
        let (tokens, statuses) = results.split_at(4 * step.places);
        let (tokens, statuses) = (words_of(tokens), words_of(statuses));
        let logprobs = match step.any_logprobs {
            true => self.sampling.logprob_results[step.turn].bytes(),
            false => &[],
        };
        let logprobs: Vec<f32> = words_of(logprobs).map(f32::from_bits).collect();
        let mut logprobs = logprobs.chunks_exact(LOGPROB_WORDS);
        let mut output = StepOutput { rows: Vec::with_capacity(step.draws.len()) };
        for ((draw, token), status) in step.draws.iter().zip(tokens).zip(statuses) {
            let logprobs = logprobs.next().unwrap_or(&[]);
            output.rows.push(read_answer(draw, token, status, logprobs, self.shape.vocabulary)?);
        }
        self.clock(step.begun, step.done)?;
        Ok(output)
    }
}

fn words_of(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}
