//! Keys and values of all layers in fixed-size blocks, and the pass that writes them.
//!
//! Within a block a head's keys stand transposed, in groups of 16 tokens, `[group][head_dim][16]`, so that the
//! scores of 16 keys are one vector; its values stand by token, `[token][head_dim]`, padded to whole
//! vectors. (vLLM splits its key cache for the same reason: Kwon et al. 2023, PagedAttention.)
#![allow(unsafe_code)]

use half::bf16;
use servelab_engine::BlockId;

use super::buffer::{Buffer, SharedMut};
use super::elementwise::{RopeTable, rms_scale, rotate};
use super::level::Kernels;
use super::simd::{Operation, Simd};

/// Tokens of a group; see the module's description.
pub(super) const GROUP: usize = 16;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    BF16,
}

impl KvDtype {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 => 2,
        }
    }
}

/// The KV memory of a model: `num_blocks` blocks of `block_size` token slots in each of `layers` layers.
#[derive(Debug)]
pub struct KvCache {
    layers: usize,
    num_blocks: usize,
    pub(super) layout: Layout,
    keys: Buffer,
    values: Buffer,
}

/// Where things stand within a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// `head_dim`, padded to whole vectors; the length of a value in the cache.
    pub value_dim: usize,
    pub dtype: KvDtype,
}

impl Layout {
    /// Tokens whose keys stand side by side.
    fn key_group(&self) -> usize {
        if self.block_size.is_multiple_of(GROUP) { GROUP } else { self.block_size }
    }

    /// Element of dimension 0 of a key within its layer; the next dimension is
    /// [`Layout::key_stride`] further.
    fn key(&self, block: usize, head: usize, offset: usize) -> usize {
        let group = self.key_group();
        let first = (block * self.kv_heads + head) * self.block_size * self.head_dim;
        first + offset / group * group * self.head_dim + offset % group
    }

    fn key_stride(&self) -> usize {
        self.key_group()
    }

    /// Element of dimension 0 of a value within its layer; the next dimension follows.
    fn value(&self, block: usize, head: usize, offset: usize) -> usize {
        ((block * self.kv_heads + head) * self.block_size + offset) * self.value_dim
    }

    fn key_block(&self) -> usize {
        self.kv_heads * self.block_size * self.head_dim
    }

    fn value_block(&self) -> usize {
        self.kv_heads * self.block_size * self.value_dim
    }
}

impl KvCache {
    /// Zeroed memory, resident as it is used.
    ///
    /// # Panics
    /// If a size is 0 or the whole exceeds the address space.
    pub fn new(
        layers: usize,
        num_blocks: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Self {
        let sizes = [layers, num_blocks, block_size, kv_heads, head_dim];
        assert!(!sizes.contains(&0), "a KV cache without {sizes:?} layers, blocks, slots, heads, dimensions");
        let value_dim = head_dim.next_multiple_of(GROUP);
        let layout = Layout { block_size, kv_heads, head_dim, value_dim, dtype };
        let bytes = |block: usize| {
            let blocks = layers.checked_mul(num_blocks);
            let elements = blocks.and_then(|blocks| blocks.checked_mul(block));
            elements
                .and_then(|elements| elements.checked_mul(dtype.bytes()))
                .expect("a KV cache below 2^64 bytes")
        };
        let (keys, values) = (bytes(layout.key_block()), bytes(layout.value_block()));
        Self { layers, num_blocks, layout, keys: Buffer::zeroed(keys), values: Buffer::zeroed(values) }
    }

    /// Memory that one block takes in all layers.
    pub fn block_bytes(
        layers: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> usize {
        layers * block_size * kv_heads * (head_dim + head_dim.next_multiple_of(GROUP)) * dtype.bytes()
    }

    /// Memory of the whole cache.
    pub fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    pub fn layers(&self) -> usize {
        self.layers
    }

    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    pub fn block_size(&self) -> usize {
        self.layout.block_size
    }

    pub fn kv_heads(&self) -> usize {
        self.layout.kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    pub fn dtype(&self) -> KvDtype {
        self.layout.dtype
    }

    /// Stores one token's key and value, each `[kv_heads, head_dim]`, at `slot` (block times block size plus
    /// offset).
    ///
    /// # Panics
    /// If layer, slot or lengths do not fit.
    pub fn write(&mut self, layer: usize, slot: u32, key: &[f32], value: &[f32]) {
        let Layout { kv_heads, head_dim, .. } = self.layout;
        assert!(key.len() == kv_heads * head_dim && value.len() == key.len(), "one key and value a head");
        let writer = self.writer(layer);
        writer.check(slot);
        for head in 0..kv_heads {
            let range = head * head_dim..(head + 1) * head_dim;
            // SAFETY: the slot was checked, and `self` is borrowed exclusively.
            unsafe {
                writer.key(slot, head, &key[range.clone()]);
                writer.value(slot, head, &value[range]);
            }
        }
    }

    /// Copies the content of a block in all layers.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let (from, to) = (from.0 as usize, to.0 as usize);
        assert!(from.max(to) < self.num_blocks, "blocks {from}, {to} of {}", self.num_blocks);
        let dtype = self.layout.dtype.bytes();
        for layer in 0..self.layers {
            let key = (self.layout.key_block() * dtype, self.keys.as_mut_ptr());
            let value = (self.layout.value_block() * dtype, self.values.as_mut_ptr());
            for (bytes, base) in [key, value] {
                let first = layer * self.num_blocks;
                // SAFETY: both blocks are within the buffer; `copy` allows them to be the same.
                unsafe {
                    std::ptr::copy(base.add((first + from) * bytes), base.add((first + to) * bytes), bytes)
                };
            }
        }
    }

    /// The key and the value at a slot, as stored, each `[kv_heads, head_dim]`.
    ///
    /// # Panics
    /// If there is no such layer or slot.
    pub fn read(&self, layer: usize, slot: u32) -> (Vec<f32>, Vec<f32>) {
        let Layout { kv_heads, head_dim, block_size, .. } = self.layout;
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        assert!(layer < self.layers && block < self.num_blocks, "layer {layer}, block {block} do not exist");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..kv_heads {
            let key =
                layer * self.num_blocks * self.layout.key_block() + self.layout.key(block, head, offset);
            let value =
                layer * self.num_blocks * self.layout.value_block() + self.layout.value(block, head, offset);
            for dim in 0..head_dim {
                // SAFETY: layer and block exist.
                unsafe {
                    keys.push(self.element(&self.keys, key + dim * self.layout.key_stride()));
                    values.push(self.element(&self.values, value + dim));
                }
            }
        }
        (keys, values)
    }

    /// # Safety
    /// `index` is within the buffer.
    unsafe fn element(&self, buffer: &Buffer, index: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            match self.layout.dtype {
                KvDtype::F32 => *buffer.as_ptr().cast::<f32>().add(index),
                KvDtype::BF16 => (*buffer.as_ptr().cast::<bf16>().add(index)).to_f32(),
            }
        }
    }

    /// Keys and values of a layer, for reading.
    pub(super) fn reader(&self, layer: usize) -> Reader {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        let dtype = self.layout.dtype.bytes();
        let first = layer * self.num_blocks;
        Reader {
            layout: self.layout,
            // SAFETY: the layer exists.
            keys: unsafe { self.keys.as_ptr().add(first * self.layout.key_block() * dtype) },
            // SAFETY: as above.
            values: unsafe { self.values.as_ptr().add(first * self.layout.value_block() * dtype) },
        }
    }

    fn writer(&mut self, layer: usize) -> Writer {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        let dtype = self.layout.dtype.bytes();
        let first = layer * self.num_blocks;
        Writer {
            layout: self.layout,
            slots: self.num_blocks * self.layout.block_size,
            // SAFETY: the layer exists.
            keys: SharedMut::from_ptr(unsafe {
                self.keys.as_mut_ptr().add(first * self.layout.key_block() * dtype)
            }),
            // SAFETY: as above.
            values: SharedMut::from_ptr(unsafe {
                self.values.as_mut_ptr().add(first * self.layout.value_block() * dtype)
            }),
        }
    }
}

/// The memory of one layer as attention reads it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    pub layout: Layout,
    keys: *const u8,
    values: *const u8,
}

// SAFETY: only reads, while the cache is borrowed.
unsafe impl Send for Reader {}
// SAFETY: as above.
unsafe impl Sync for Reader {}

impl Reader {
    /// A token's key of element type `T`: dimension 0; the next is [`Reader::key_stride`] further.
    ///
    /// # Safety
    /// The block exists, and `T` is the cache's type.
    #[inline(always)]
    pub unsafe fn key<T>(&self, block: BlockId, head: usize, offset: usize) -> *const T {
        // SAFETY: the caller's.
        unsafe { self.keys.cast::<T>().add(self.layout.key(block.0 as usize, head, offset)) }
    }

    /// A token's value: `value_dim` elements.
    ///
    /// # Safety
    /// The block exists, and `T` is the cache's type.
    #[inline(always)]
    pub unsafe fn value<T>(&self, block: BlockId, head: usize, offset: usize) -> *const T {
        // SAFETY: the caller's.
        unsafe { self.values.cast::<T>().add(self.layout.value(block.0 as usize, head, offset)) }
    }

    #[inline(always)]
    pub fn key_stride(&self) -> usize {
        self.layout.key_stride()
    }
}

/// The memory of one layer as it is written.
#[derive(Clone, Copy, Debug)]
struct Writer {
    layout: Layout,
    slots: usize,
    keys: SharedMut<u8>,
    values: SharedMut<u8>,
}

impl Writer {
    fn check(&self, slot: u32) {
        assert!((slot as usize) < self.slots, "slot {slot} of {}", self.slots);
    }

    /// # Safety
    /// The slot was checked, and no other thread touches this head.
    #[inline(always)]
    unsafe fn key(&self, slot: u32, head: usize, key: &[f32]) {
        let (block, offset) = self.place(slot);
        let (first, stride) = (self.layout.key(block, head, offset), self.layout.key_stride());
        // SAFETY: the caller's.
        unsafe {
            match self.layout.dtype {
                KvDtype::F32 => put(self.keys.get().cast::<f32>().add(first), stride, key, |value| value),
                KvDtype::BF16 => put(self.keys.get().cast::<bf16>().add(first), stride, key, bf16::from_f32),
            }
        }
    }

    /// # Safety
    /// As [`Writer::key`].
    #[inline(always)]
    unsafe fn value(&self, slot: u32, head: usize, value: &[f32]) {
        let (block, offset) = self.place(slot);
        let first = self.layout.value(block, head, offset);
        // SAFETY: the caller's.
        unsafe {
            match self.layout.dtype {
                KvDtype::F32 => put(self.values.get().cast::<f32>().add(first), 1, value, |value| value),
                KvDtype::BF16 => put(self.values.get().cast::<bf16>().add(first), 1, value, bf16::from_f32),
            }
        }
    }

    #[inline(always)]
    fn place(&self, slot: u32) -> (usize, usize) {
        let slot = slot as usize;
        (slot / self.layout.block_size, slot % self.layout.block_size)
    }
}

/// # Safety
/// `target` has room for the values at that stride.
#[inline(always)]
unsafe fn put<T>(target: *mut T, stride: usize, values: &[f32], convert: impl Fn(f32) -> T) {
    for (index, value) in values.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { target.add(index * stride).write(convert(*value)) };
    }
}

/// The rows that come out of the fused QKV product, and what is done to them.
#[derive(Clone, Copy, Debug)]
pub struct QkvRows<'a> {
    /// `[tokens, (heads + 2 * kv_heads) * head_dim]`: queries, keys, values.
    pub qkv: &'a [f32],
    /// Query heads; key heads and head size are the cache's.
    pub heads: usize,
    /// Position of each token.
    pub positions: &'a [u32],
    /// Where each token's key and value go.
    pub slots: &'a [u32],
    pub rope: RopeTable<'a>,
    /// Weights `[head_dim]` of the per-head norms of queries and keys, before the rotation (Qwen3).
    pub q_norm: Option<&'a [f32]>,
    pub k_norm: Option<&'a [f32]>,
    pub norm_eps: f32,
}

/// Norms and rotates queries into `q` `[tokens, heads, head_dim]`, norms and rotates keys into the cache, and
/// copies values into the cache: one pass over the rows. Tasks are heads, so that even two tokens
/// that name one slot are written one after the other.
///
/// # Panics
/// If a length, slot or position does not fit.
pub fn rope_and_cache(
    kernels: &Kernels,
    rows: &QkvRows<'_>,
    cache: &mut KvCache,
    layer: usize,
    q: &mut [f32],
) {
    let Layout { kv_heads, head_dim, .. } = cache.layout;
    let tokens = rows.positions.len();
    let width = (rows.heads + 2 * kv_heads) * head_dim;
    assert!(head_dim.is_multiple_of(2), "rotary positions need an even head size, not {head_dim}");
    assert_eq!(rows.qkv.len(), tokens * width, "qkv must be [tokens, (heads + 2 kv_heads) * head_dim]");
    assert_eq!(rows.slots.len(), tokens, "one slot a token");
    assert_eq!(q.len(), tokens * rows.heads * head_dim, "q must be [tokens, heads, head_dim]");
    let writer = cache.writer(layer);
    rows.slots.iter().for_each(|slot| writer.check(*slot));
    let pass = Pass { rows, writer, q: SharedMut::new(q), width };
    let heads = rows.heads + 2 * kv_heads;
    if tokens < 8 {
        kernels.level().run(Heads { pass: &pass, heads: 0..heads });
    } else {
        kernels.pool().run(heads, &|head| kernels.level().run(Heads { pass: &pass, heads: head..head + 1 }));
    }
}

struct Pass<'a> {
    rows: &'a QkvRows<'a>,
    writer: Writer,
    q: SharedMut<f32>,
    width: usize,
}

/// The pass over some of the heads: query heads, then key heads, then value heads.
struct Heads<'a> {
    pass: &'a Pass<'a>,
    heads: std::ops::Range<usize>,
}

impl Operation for Heads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Pass { rows, writer, q, width } = self.pass;
        let Layout { kv_heads, head_dim, .. } = writer.layout;
        let mut scratch = vec![0.0; head_dim];
        for head in self.heads {
            for (token, row) in rows.qkv.chunks_exact(*width).enumerate() {
                let source = &row[head * head_dim..(head + 1) * head_dim];
                let slot = rows.slots[token];
                let angles = rows.rope.at(rows.positions[token], head_dim / 2);
                if head < rows.heads {
                    let at = (token * rows.heads + head) * head_dim;
                    // SAFETY: `q` is `[tokens, heads, head_dim]`, and each head belongs to one task.
                    let target = unsafe { std::slice::from_raw_parts_mut(q.get().add(at), head_dim) };
                    norm_and_rotate(s, source, rows.q_norm, rows.norm_eps, angles, target);
                } else if head < rows.heads + kv_heads {
                    norm_and_rotate(s, source, rows.k_norm, rows.norm_eps, angles, &mut scratch);
                    // SAFETY: slots were checked, and each head belongs to one task.
                    unsafe { writer.key(slot, head - rows.heads, &scratch) };
                } else {
                    // SAFETY: as above.
                    unsafe { writer.value(slot, head - rows.heads - kv_heads, source) };
                }
            }
        }
    }
}

#[inline(always)]
fn norm_and_rotate<S: Simd>(
    s: S,
    source: &[f32],
    norm: Option<&[f32]>,
    eps: f32,
    (cos, sin): (&[f32], &[f32]),
    target: &mut [f32],
) {
    match norm {
        None => target.copy_from_slice(source),
        Some(weight) => {
            let scale = rms_scale(s, source, eps);
            for ((target, value), weight) in target.iter_mut().zip(source).zip(weight) {
                *target = value * scale * weight;
            }
        }
    }
    rotate(s, target, cos, sin);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::elementwise::{rms_norm, rope};
    use crate::cpu::test_support::{Random, kernels_of_all_levels};

    #[test]
    fn what_is_written_is_read_and_copied() {
        for dtype in [KvDtype::F32, KvDtype::BF16] {
            for (block_size, kv_heads, head_dim) in
                [(16, 2, 64), (4, 1, 8), (32, 3, 24), (1, 2, 16), (20, 1, 8)]
            {
                let mut cache = KvCache::new(2, 3, block_size, kv_heads, head_dim, dtype);
                let per_block = KvCache::block_bytes(2, block_size, kv_heads, head_dim, dtype);
                assert_eq!(cache.bytes(), 3 * per_block);
                let mut random = Random::new(1);
                let width = kv_heads * head_dim;
                let rows: Vec<_> =
                    (0..3 * block_size).map(|_| (random.bf16_vec(width), random.bf16_vec(width))).collect();
                for (slot, (key, value)) in rows.iter().enumerate() {
                    cache.write(1, slot as u32, key, value);
                }
                for (slot, row) in rows.iter().enumerate() {
                    assert_eq!(cache.read(1, slot as u32), *row);
                    assert_eq!(cache.read(0, slot as u32), (vec![0.0; width], vec![0.0; width]));
                }
                cache.copy_block(BlockId(2), BlockId(0));
                for offset in 0..block_size {
                    assert_eq!(cache.read(1, offset as u32), rows[2 * block_size + offset]);
                    assert_eq!(cache.read(1, (block_size + offset) as u32), rows[block_size + offset]);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "slot 48 of 48")]
    fn a_slot_outside_is_refused() {
        KvCache::new(1, 3, 16, 1, 8, KvDtype::F32).write(0, 48, &[0.0; 8], &[0.0; 8]);
    }

    #[test]
    fn the_fused_pass_equals_its_parts() {
        for kernels in kernels_of_all_levels(2) {
            for (tokens, heads, kv_heads, head_dim, norms) in
                [(1, 3, 1, 64, false), (3, 4, 2, 24, true), (20, 9, 3, 64, true), (9, 2, 2, 16, false)]
            {
                let mut random = Random::new(tokens as u64);
                let width = (heads + 2 * kv_heads) * head_dim;
                let qkv = random.vec(tokens * width);
                let (q_norm, k_norm) = (random.vec(head_dim), random.vec(head_dim));
                let (cos, sin) = (random.vec(64 * head_dim / 2), random.vec(64 * head_dim / 2));
                let table = RopeTable { cos: &cos, sin: &sin };
                let positions: Vec<u32> = (0..tokens as u32).map(|token| token + 7).collect();
                let slots: Vec<u32> = (0..tokens as u32).map(|token| token * 2 + 5).collect();
                let mut cache = KvCache::new(2, 4, 16, kv_heads, head_dim, KvDtype::F32);
                let mut q = vec![f32::NAN; tokens * heads * head_dim];
                let rows = QkvRows {
                    qkv: &qkv,
                    heads,
                    positions: &positions,
                    slots: &slots,
                    rope: table,
                    q_norm: norms.then_some(&q_norm),
                    k_norm: norms.then_some(&k_norm),
                    norm_eps: 1e-6,
                };
                rope_and_cache(&kernels, &rows, &mut cache, 1, &mut q);

                let part = |from: usize, count: usize| -> Vec<f32> {
                    let range = from * head_dim..(from + count) * head_dim;
                    qkv.chunks(width).flat_map(|row| row[range.clone()].to_vec()).collect()
                };
                let finish = |part: Vec<f32>, count: usize, norm: &[f32]| {
                    let mut out = part.clone();
                    if norms {
                        rms_norm(&kernels, &part, norm, 1e-6, &mut out);
                    }
                    rope(&kernels, &mut out, count, head_dim, &positions, table);
                    out
                };
                assert_eq!(q, finish(part(0, heads), heads, &q_norm));
                let keys = finish(part(heads, kv_heads), kv_heads, &k_norm);
                let values = part(heads + kv_heads, kv_heads);
                let row = kv_heads * head_dim;
                for (token, slot) in slots.iter().enumerate() {
                    let range = token * row..(token + 1) * row;
                    assert_eq!(cache.read(1, *slot), (keys[range.clone()].to_vec(), values[range].to_vec()));
                }
            }
        }
    }
}
