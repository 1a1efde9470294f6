//! Both attention kernels over a paged cache whose unused slots are NaN.

use super::numbers::{
    Stored, compared, difference, exactly, from_bits, from_e4m3, to_bits, to_e4m3, tolerance, values_of,
};
use super::{Check, Checker, Report, Shape, Size};
use crate::cpu::random::Random;
use crate::cuda::geometry::{
    DecodeSequence, DecodeWorkspace, PrefillChunk, decode_capacity, plan_decode, plan_prefill,
};
use crate::cuda::gpu::{Gpu, GpuError, Memory};
use crate::cuda::kernels::{Element, KvElement};
use crate::cuda::launch::{Attention, DecodeCall, Kernels, KvScales, PrefillCall};

/// Tokens in the step, and tokens in the cache afterwards.
type Chunk = (u32, u32);

/// What a Llama 3.1 8B asks of a layer.
const TIMED: Shape =
    Shape { element: Element::BF16, kv: KvElement::Same, head_dim: 128, group: 4, block_size: 16 };

/// Single tokens over contexts of many lengths.
///
/// # Errors
/// What the GPU fails with.
pub fn decode<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    for shape in checker.shapes() {
        let kernels = Kernels::load(gpu, checker.specialisation(shape))?;
        let batches: &[(&[u32], Option<u32>)] = match size {
            Size::Small => &[(&[1, 16, 33], None), (&[300, 257], None), (&[7, 290], Some(40))],
            Size::Full => &[
                (&[1, 2, 15, 16, 17, 255, 256, 257, 1000], None),
                (&[65_536, 8191], None),
                (&[1, 5000, 700], Some(512)),
            ],
        };
        for (contexts, window) in batches {
            let batch = Batch::new(shape, 2, &single_tokens(contexts), *window, size);
            report(checker.decode(&kernels, &batch, usize::MAX)?);
        }
        // So little room that splits have to be longer.
        let batch = Batch::new(shape, 1, &single_tokens(&[600, 3]), None, size);
        report(checker.decode(&kernels, &batch, 3)?);
    }
    // One item of more tiles than the 32 a warp whose blocks are looked up at once.
    let kernels = Kernels::load(gpu, checker.specialisation(TIMED))?;
    let batch = Batch::new(TIMED, 1, &single_tokens(&[2300]), None, size);
    report(checker.decode(&kernels, &batch, 1)?);
    if size == Size::Full {
        for (rows, context) in [(1, 1024), (64, 1024), (64, 8192), (1, 65_536)] {
            let batch = Batch::new(TIMED, 8, &vec![(1, context); rows], None, size);
            report(checker.decode(&kernels, &batch, usize::MAX)?);
        }
    }
    Ok(())
}

fn single_tokens(contexts: &[u32]) -> Vec<Chunk> {
    contexts.iter().map(|context| (1, *context)).collect()
}

/// Prompt chunks of several sequences in one launch.
///
/// # Errors
/// What the GPU fails with.
pub fn prefill<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    for shape in checker.shapes() {
        let kernels = Kernels::load(gpu, checker.specialisation(shape))?;
        let batches: &[(&[Chunk], Option<u32>)] = match size {
            Size::Small => &[(&[(1, 1), (1, 70), (19, 40)], None), (&[(33, 33), (5, 90)], Some(20))],
            Size::Full => &[
                (&[(1, 1), (1, 4097), (63, 63), (64, 500), (65, 129), (300, 300)], None),
                (&[(200, 65_536)], None),
                (&[(1, 9), (300, 1500), (33, 33)], Some(100)),
            ],
        };
        for (chunks, window) in batches {
            report(checker.prefill(&kernels, &Batch::new(shape, 2, chunks, *window, size))?);
        }
    }
    if size == Size::Full {
        let kernels = Kernels::load(gpu, checker.specialisation(TIMED))?;
        for (tokens, context) in [(2048, 2048), (8192, 8192), (512, 32_768)] {
            report(checker.prefill(&kernels, &Batch::new(TIMED, 8, &[(tokens, context)], None, size))?);
        }
    }
    Ok(())
}

/// Products of numbers that are compared with plain loops; all of a large batch would take minutes.
const COMPARED: u64 = 500_000_000;

impl Size {
    /// Bytes of a cache after which it repeats: what is larger would take the CPU too long to make.
    fn pattern_bytes(self) -> usize {
        match self {
            Self::Small => 1 << 20,
            Self::Full => 32 << 20,
        }
    }
}

/// Sequences with their blocks, in random order, and the whole cache of one layer.
struct Batch {
    shape: Shape,
    kv_heads: usize,
    window: Option<u32>,
    sequences: Vec<Chunk>,
    table_width: usize,
    tables: Vec<u32>,
    cache_bytes: usize,
    /// The cache, up to where it repeats. `[blocks, 2, kv_heads, block_size, head_dim]`
    pattern: Vec<u8>,
    queries: Stored,
    scales: KvScales,
}

impl Batch {
    fn new(shape: Shape, kv_heads: usize, sequences: &[Chunk], window: Option<u32>, size: Size) -> Self {
        let mut random = Random::new(sequences.len() as u64 * 31 + u64::from(shape.head_dim));
        let needed = |context: u32| context.div_ceil(shape.block_size) as usize;
        let table_width = sequences.iter().map(|(_, context)| needed(*context)).max().unwrap_or(1) + 1;
        let blocks: usize = sequences.iter().map(|(_, context)| needed(*context)).sum::<usize>() + 1;
        let mut order: Vec<u32> = (0..blocks as u32).collect();
        (1..blocks).rev().for_each(|last| order.swap(last, (random.next() % (last as u64 + 1)) as usize));
        // Entries that no context reaches name a block that does not exist.
        let mut tables = vec![u32::MAX; sequences.len() * table_width];
        let mut free = order.into_iter();
        for (table, (_, context)) in tables.chunks_exact_mut(table_width).zip(sequences) {
            table
                .iter_mut()
                .zip(free.by_ref().take(needed(*context)))
                .for_each(|(entry, block)| *entry = block);
        }
        let rows: u32 = sequences.iter().map(|(tokens, _)| tokens).sum();
        let width = kv_heads * (shape.group * shape.head_dim) as usize;
        let block_bytes = 2 * kv_heads * (shape.block_size * shape.head_dim) as usize * shape.kv.bytes();
        let mut batch = Self {
            shape,
            kv_heads,
            window,
            sequences: sequences.to_vec(),
            table_width,
            tables,
            cache_bytes: blocks * block_bytes,
            pattern: vec![0xff; blocks.min(size.pattern_bytes() / block_bytes) * block_bytes],
            queries: Stored::random(&mut random, shape.element, rows as usize * width, 2.0),
            scales: match shape.kv {
                KvElement::Same => KvScales::default(),
                KvElement::E4M3 => KvScales { key: 0.5, value: 0.25 },
            },
        };
        batch.fill(&mut random);
        batch
    }

    /// Writes keys and values of every position, or the whole pattern where the cache repeats.
    fn fill(&mut self, random: &mut Random) {
        let (bytes, dim) = (self.shape.kv.bytes(), self.shape.head_dim as usize);
        let mut write = |pattern: &mut [u8]| match self.shape.kv {
            KvElement::Same => pattern.chunks_exact_mut(2).for_each(|pair| {
                pair.copy_from_slice(&to_bits(self.shape.element, f64::from(random.value())).to_le_bytes());
            }),
            KvElement::E4M3 => {
                pattern.iter_mut().for_each(|byte| *byte = to_e4m3(f64::from(random.value()) * 3.0));
            }
        };
        if self.pattern.len() < self.cache_bytes {
            write(&mut self.pattern);
            return;
        }
        for (sequence, (_, context)) in self.sequences.iter().enumerate() {
            for position in 0..*context {
                for head in 0..2 * self.kv_heads {
                    let at = self.place(sequence, position, head);
                    write(&mut self.pattern[at..at + dim * bytes]);
                }
            }
        }
    }

    /// First byte of a key head (or, from `kv_heads` on, a value head) of a position.
    fn place(&self, sequence: usize, position: u32, head: usize) -> usize {
        let Shape { block_size, head_dim, kv, .. } = self.shape;
        let block = self.tables[sequence * self.table_width + (position / block_size) as usize] as usize;
        let row = (block * 2 * self.kv_heads + head) * block_size as usize + (position % block_size) as usize;
        row * head_dim as usize * kv.bytes()
    }

    fn cached(&self, sequence: usize, position: u32, head: usize) -> Vec<f64> {
        let bytes = self.shape.head_dim as usize * self.shape.kv.bytes();
        let at = self.place(sequence, position, head) % self.pattern.len();
        let stored = &self.pattern[at..at + bytes];
        match self.shape.kv {
            KvElement::Same => {
                let pairs = stored.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
                pairs.map(|bits| from_bits(self.shape.element, bits)).collect()
            }
            KvElement::E4M3 => {
                let scale = if head < self.kv_heads { self.scales.key } else { self.scales.value };
                stored.iter().map(|bits| from_e4m3(*bits) * f64::from(scale)).collect()
            }
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|(tokens, _)| *tokens as usize).sum()
    }

    /// Numbers of a row of queries.
    fn width(&self) -> usize {
        self.kv_heads * (self.shape.group * self.shape.head_dim) as usize
    }

    /// Sequence and position of a row.
    fn row(&self, row: usize) -> (usize, u32) {
        let mut first = 0;
        for (sequence, (tokens, context)) in self.sequences.iter().enumerate() {
            if row < first + *tokens as usize {
                return (sequence, context - tokens + (row - first) as u32);
            }
            first += *tokens as usize;
        }
        unreachable!("row {row} of {first}")
    }

    /// Largest difference over the rows that are compared; `found` has a row of padding behind the batch, which
    /// must be untouched.
    fn error(&self, found: &[u16]) -> f64 {
        let (rows, width) = (self.rows(), self.width());
        let per_row = self.pairs() * 2 * u64::from(self.shape.head_dim) / rows as u64;
        let mut error = exactly(found[rows * width..].iter().all(|bits| *bits == u16::MAX));
        for row in compared(rows, (COMPARED / per_row.max(1)) as usize) {
            let stored = values_of(self.shape.element, &found[row * width..(row + 1) * width]);
            error = error.max(difference(&stored, &self.attend(row)));
        }
        error
    }

    /// Attention of one row, by the book.
    fn attend(&self, row: usize) -> Vec<f64> {
        let (sequence, position) = self.row(row);
        let (dim, group) = (self.shape.head_dim as usize, self.shape.group as usize);
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut out = Vec::with_capacity(self.width());
        for kv_head in 0..self.kv_heads {
            let keys: Vec<_> = (first..=position).map(|at| self.cached(sequence, at, kv_head)).collect();
            let values: Vec<_> =
                (first..=position).map(|at| self.cached(sequence, at, self.kv_heads + kv_head)).collect();
            for head in 0..group {
                let first = row * self.width() + (kv_head * group + head) * dim;
                let query = self.queries.values(first..first + dim);
                let dot = |key: &Vec<f64>| key.iter().zip(&query).map(|(k, q)| k * q).sum::<f64>();
                let scores: Vec<f64> = keys.iter().map(|key| dot(key) * f64::from(self.scale())).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sums = vec![0.0; dim];
                for (weight, value) in weights.iter().zip(&values) {
                    sums.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight / total * value);
                }
                out.extend(sums);
            }
        }
        out
    }

    /// Pairs of a query head and a key that are multiplied.
    fn pairs(&self) -> u64 {
        let seen = |row| {
            let (_, position) = self.row(row);
            u64::from(self.window.map_or(position + 1, |window| (position + 1).min(window)))
        };
        (0..self.rows()).map(seen).sum::<u64>() * self.kv_heads as u64 * u64::from(self.shape.group)
    }

    /// Keys and values of all contexts once, queries and output once.
    fn bytes(&self) -> u64 {
        let seen = |(tokens, context): &Chunk| {
            u64::from(self.window.map_or(*context, |window| (*context).min(window + tokens - 1)))
        };
        let tokens: u64 = self.sequences.iter().map(seen).sum();
        let token = 2 * self.kv_heads * self.shape.head_dim as usize * self.shape.kv.bytes();
        tokens * token as u64 + (self.rows() * self.width() * 4) as u64
    }

    fn check(&self, kernel: &'static str, error: f64, seconds: Option<f64>) -> Check {
        let sequences: Vec<_> = self
            .sequences
            .iter()
            .take(6)
            .map(|(tokens, context)| match tokens {
                1 => context.to_string(),
                tokens => format!("{tokens} of {context}"),
            })
            .collect();
        let window = self.window.map_or(String::new(), |window| format!(", window {window}"));
        Check {
            kernel,
            case: format!(
                "{}, {} key heads, {} sequences ({}{}){window}",
                self.shape.name(),
                self.kv_heads,
                self.sequences.len(),
                sequences.join(", "),
                if self.sequences.len() > 6 { ", ..." } else { "" },
            ),
            error,
            tolerance: tolerance(self.shape.element),
            bytes: self.bytes(),
            flops: self.pairs() * 4 * u64::from(self.shape.head_dim),
            seconds,
        }
    }
}

/// A batch in device memory.
struct OnDevice<M> {
    out: M,
    queries: M,
    cache: M,
    tables: M,
}

impl<M: Memory> OnDevice<M> {
    fn attention(&self, batch: &Batch) -> Attention<'_> {
        Attention {
            out: self.out.span(),
            queries: self.queries.span(),
            cache: self.cache.span(),
            block_tables: self.tables.span(),
            table_width: batch.table_width,
            rows: batch.rows(),
            kv_heads: batch.kv_heads,
            scale: batch.scale(),
            scales: batch.scales,
        }
    }
}

impl<G: Gpu> Checker<'_, G> {
    fn place(&self, batch: &Batch) -> Result<OnDevice<G::Memory>, GpuError> {
        let cache = self.gpu.allocate(batch.cache_bytes)?;
        let pattern = self.upload(&batch.pattern)?;
        for start in (0..batch.cache_bytes).step_by(batch.pattern.len()) {
            let bytes = batch.pattern.len().min(batch.cache_bytes - start);
            let to = cache.span().part(start..start + bytes);
            self.gpu.copy(&self.stream, pattern.span().part(0..bytes), to)?;
        }
        self.gpu.synchronise(&self.stream)?;
        Ok(OnDevice {
            out: self.poisoned((batch.rows() + 1) * batch.width() * 2)?,
            queries: self.upload(&batch.queries.bits)?,
            cache,
            tables: self.upload(&batch.tables)?,
        })
    }

    fn decode(&self, kernels: &Kernels<G>, batch: &Batch, most_items: usize) -> Result<Check, GpuError> {
        let sequence = |(row, (_, context)): (usize, &Chunk)| DecodeSequence {
            row: row as u32,
            table: row as u32,
            context_len: *context,
        };
        let sequences: Vec<_> = batch.sequences.iter().enumerate().map(sequence).collect();
        let tokens: usize = batch.sequences.iter().map(|(_, context)| *context as usize).sum();
        let capacity = decode_capacity(batch.rows(), tokens).min(most_items);
        let (all, all_count) = self.items(&sequences, batch.window, capacity)?;
        let (alone, alone_count) = self.items(&sequences[..1], batch.window, capacity)?;
        let specialisation = kernels.specialisation();
        let sizes = DecodeWorkspace::new(specialisation, batch.kv_heads as u32, batch.rows(), capacity);
        let (values, sums) = (self.poisoned(sizes.partial_values)?, self.poisoned(sizes.partial_sums)?);
        let arrivals = self.zeroed(sizes.arrivals)?;
        let device = self.place(batch)?;
        let launch = |items: &G::Memory, item_count: &G::Memory| {
            let call = DecodeCall {
                attention: device.attention(batch),
                items: items.span(),
                item_count: item_count.span(),
                partial_values: values.span(),
                partial_sums: sums.span(),
                arrivals: arrivals.span(),
            };
            kernels.decode_attention(self.gpu, &self.stream, call)
        };
        launch(&all, &all_count)?;
        let found: Vec<u16> = self.download(device.out.span())?;
        // Again, and then the first sequence alone: the same bits, and the workspace is as before.
        launch(&all, &all_count)?;
        let again: Vec<u16> = self.download(device.out.span())?;
        launch(&alone, &alone_count)?;
        let first: Vec<u16> = self.download(device.out.span().part(0..batch.width() * 2))?;
        let arrived: Vec<u32> = self.download(arrivals.span())?;
        let mut repeats = found == again && arrived.iter().all(|count| *count == 0);
        // Where room is short, splits depend on the batch.
        repeats &= most_items < usize::MAX || first == found[..batch.width()];
        // Recorded with the one sequence and replayed with all of them: grid and arguments stay, the work differs.
        let graph = self.gpu.capture(&self.stream, &mut || launch(&alone, &alone_count))?;
        self.gpu.copy(&self.stream, all.span(), alone.span())?;
        self.gpu.copy(&self.stream, all_count.span(), alone_count.span())?;
        self.gpu.fill(&self.stream, device.out.span(), 0xff)?;
        self.gpu.replay(&self.stream, &graph)?;
        let replayed: Vec<u16> = self.download(device.out.span())?;
        repeats &= replayed == found;
        let seconds = self.time(|| launch(&all, &all_count))?;
        Ok(batch.check("decode_attention", batch.error(&found).max(exactly(repeats)), seconds))
    }

    /// A work list with room for `capacity` items, and how many there are.
    fn items(
        &self,
        sequences: &[DecodeSequence],
        window: Option<u32>,
        capacity: usize,
    ) -> Result<(G::Memory, G::Memory), GpuError> {
        let mut items = Vec::new();
        plan_decode(sequences, window, capacity, &mut items);
        let count = self.upload(&[items.len() as u32])?;
        items.resize(capacity, Default::default());
        Ok((self.upload(&items)?, count))
    }

    fn prefill(&self, kernels: &Kernels<G>, batch: &Batch) -> Result<Check, GpuError> {
        let mut first_row = 0;
        let mut chunks = Vec::new();
        for (table, (tokens, context_len)) in batch.sequences.iter().enumerate() {
            let (tokens, context_len) = (*tokens, *context_len);
            chunks.push(PrefillChunk { first_row, tokens, context_len, table: table as u32 });
            first_row += tokens;
        }
        let specialisation = kernels.specialisation();
        let mut items = Vec::new();
        plan_prefill(&chunks, specialisation.group, specialisation.prefill, &mut items);
        let (item_count, items) = (items.len(), self.upload(&items)?);
        let device = self.place(batch)?;
        let call = PrefillCall {
            attention: device.attention(batch),
            items: items.span(),
            item_count,
            window: batch.window,
        };
        let seconds = self.run(|| kernels.prefill_attention(self.gpu, &self.stream, call))?;
        let found: Vec<u16> = self.download(device.out.span())?;
        Ok(batch.check("prefill_attention", batch.error(&found), seconds))
    }
}
