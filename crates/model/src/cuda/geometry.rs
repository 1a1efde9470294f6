//! Grids, blocks, shared memory, workspaces and work lists of the kernels: pure functions of sizes.
//!
//! Attention takes its work from lists, because a grid that fits every batch would be mostly empty: a
//! long sequence becomes many items, a short one a single item, and blocks of threads take items in
//! turn. So the grid of a decode step does not depend on the batch at all and can be recorded in a graph;
//! the list is uploaded with the rest of the step. (FlashInfer plans its batches in the same way: Ye et al.
//! 2025, section 3.3.)
#![allow(unsafe_code)]

use std::ops::Range;

use super::gpu::{GpuInfo, Launch};
use super::kernels::{KvElement, Specialisation};
use super::words::Words;

/// Numbers that a thread loads at once: 16 bytes of 16-bit floats.
const VECTOR: u32 = 8;
/// Tokens of a tile of the matrix instructions, and the least block size.
pub const TILE_TOKENS: u32 = 16;
/// Query heads that one block of threads of the decode kernel serves at most: a side of the matrix
/// instruction. Larger groups read their keys once for each 8 heads.
pub const TILE_HEADS: u32 = 8;
/// Positions of one item of the decode kernel: few, so that a short context keeps many multiprocessors busy, and
/// enough that the result of an item (4 bytes a dimension and query head) is little beside its keys and values.
pub const SPLIT_TOKENS: u32 = 256;
/// Most items of one sequence, whatever its length: the last block to finish reads the results of all.
const MOST_SPLITS: u32 = 64;
/// Threads of the sampling kernel.
pub const SAMPLE_THREADS: u32 = 512;
/// Most alternatives that the sampling kernel reports.
pub const MOST_LOGPROBS: u32 = 20;

/// Embedding and row gather: a block a row.
pub fn rows_launch(rows: u32) -> Launch {
    Launch { grid: [rows, 1, 1], block: 128, shared_bytes: 0 }
}

/// Copies of whole blocks, `block_bytes` in each of `layers` layers.
pub fn copy_blocks_launch(copies: u32, layers: u32, block_bytes: u64) -> Launch {
    let vectors = block_bytes / 16;
    let chunks = vectors.div_ceil(4 * 256).clamp(1, 64) as u32;
    Launch { grid: [copies, layers, chunks], block: 256, shared_bytes: 0 }
}

/// Threads that share a row of a norm: one vector each, up to the largest block.
pub fn norm_threads(width: u32) -> u32 {
    width.div_ceil(VECTOR).next_multiple_of(32).min(1024)
}

/// A norm: a block a row.
pub fn norm_launch(rows: u32, width: u32) -> Launch {
    Launch { grid: [rows, 1, 1], block: norm_threads(width), shared_bytes: 0 }
}

/// Rotation and cache write: a block a token, warps take heads in turn. With few tokens a warp for each head,
/// so that all are loaded at once; with many, fewer blocks that compute the same angles.
pub fn rope_launch(tokens: u32, heads: u32, kv_heads: u32) -> Launch {
    let all = heads + 2 * kv_heads;
    let warps = all.min(8);
    let parts = if tokens < 512 { all.div_ceil(warps) } else { 1 };
    Launch { grid: [tokens, parts, 1], block: 32 * warps, shared_bytes: 0 }
}

/// The gate of the feed-forward: blocks of 256 vectors.
pub fn silu_launch(rows: u32, inner: u32) -> Launch {
    Launch { grid: [rows, (inner / VECTOR).div_ceil(256), 1], block: 256, shared_bytes: 0 }
}

/// Sampling: a block an answer.
pub fn sample_launch(answers: u32) -> Launch {
    Launch { grid: [answers, 1, 1], block: SAMPLE_THREADS, shared_bytes: 0 }
}

/// Quantisation of rows: a block a row.
pub fn quantise_launch(rows: u32) -> Launch {
    Launch { grid: [rows, 1, 1], block: 256, shared_bytes: 0 }
}

/// Scaling of an 8-bit product: blocks of 256 vectors.
pub fn scale_product_launch(rows: u32, columns: u32) -> Launch {
    Launch { grid: [rows, columns.div_ceil(VECTOR * 256), 1], block: 256, shared_bytes: 0 }
}

/// Bytes from one row of a tile in shared memory to the next: an odd number of 16-byte units, so that the
/// 8 rows that a matrix load reads together lie in different banks.
fn row_stride(row_bytes: u32) -> u32 {
    let units = row_bytes.div_ceil(16);
    16 * (units | 1)
}

/// How a block of threads of the decode kernel is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeTile {
    /// Each warp takes every `warps`th tile of 16 tokens.
    pub warps: u32,
    /// Tiles that each warp holds or has asked for.
    pub stages: u32,
}

impl DecodeTile {
    /// The most stages, up to 3, with which two blocks fit a multiprocessor; else as many as fit one.
    ///
    /// What has to be under way to keep the memory busy is its bandwidth times its latency, on an H100 about
    /// 3.35e12 B/s * 1e-6 s / 132, or 25 KiB a multiprocessor; two blocks of two stages of a
    /// 128-wide head have 128 KiB.
    pub fn choose(info: &GpuInfo, head_dim: u32, kv: KvElement) -> Self {
        let fits = |blocks: u32, tile: &Self| {
            let bytes = tile.shared_bytes(head_dim, kv);
            bytes <= info.shared_bytes_per_block
                && blocks * (bytes + RESERVED_BYTES) <= info.shared_bytes_per_multiprocessor
        };
        let tiles = [3, 2].map(|stages| Self { warps: 4, stages });
        let best = tiles.iter().find(|tile| fits(2, tile)).or(tiles.iter().find(|tile| fits(1, tile)));
        best.copied().unwrap_or(Self { warps: 2, stages: 2 })
    }

    /// Dynamic shared memory of a block: keys and values of all stages of all warps.
    pub fn shared_bytes(&self, head_dim: u32, kv: KvElement) -> u32 {
        let row = row_stride(head_dim * kv.bytes() as u32);
        // Afterwards the same memory takes each warp's result, in f32, and its maxima and sums.
        let result = ((head_dim + 4) * TILE_HEADS + 2 * TILE_HEADS) * 4;
        self.warps * (self.stages * 2 * TILE_TOKENS * row).max(result)
    }
}

/// Shared memory of each resident block that belongs to the system.
const RESERVED_BYTES: u32 = 1024;

/// The decode kernel: as many blocks as the GPU holds at once, each taking items in turn.
pub fn decode_launch(info: &GpuInfo, specialisation: &Specialisation) -> Launch {
    let tile = specialisation.decode;
    let shared_bytes = tile.shared_bytes(specialisation.head_dim, specialisation.kv);
    let resident = info.shared_bytes_per_multiprocessor / (shared_bytes + RESERVED_BYTES);
    let blocks = info.multiprocessors * resident.clamp(1, decode_most_resident(specialisation.head_dim));
    Launch { grid: [blocks, 1, 1], block: 32 * tile.warps, shared_bytes }
}

/// Blocks of a multiprocessor that the decode kernel's registers leave room for (its launch bounds).
fn decode_most_resident(head_dim: u32) -> u32 {
    if head_dim <= 128 { 3 } else { 2 }
}

/// Tiles of query heads that share a key head.
pub fn head_tiles(group: u32) -> u32 {
    group.div_ceil(TILE_HEADS)
}

/// One item of the decode kernel: positions `begin..end` of one sequence. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DecodeItem {
    /// Of the sequence's token in queries and output.
    pub row: u32,
    /// Row of the block table.
    pub table: u32,
    pub begin: u32,
    pub end: u32,
    /// Which of the sequence's `splits` items this is; they stand one after the other.
    pub split: u32,
    pub splits: u32,
    pub reserved: [u32; 2],
}

// SAFETY: 8 words of 4 bytes each.
unsafe impl Words for DecodeItem {}
const _: () = assert!(size_of::<DecodeItem>() == 32);

/// A sequence that decodes: one token at position `context_len - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeSequence {
    pub row: u32,
    pub table: u32,
    /// Tokens in the cache, this one included; at least 1.
    pub context_len: u32,
}

/// Fills `items` with the work of the decode kernel. Splits are [`SPLIT_TOKENS`] long, twice as long or four
/// times ... for long contexts, counted from the start of the sequence: it is split alike whatever the batch is,
/// so that its result is the same. Only where more than `capacity` items would come out all are longer.
///
/// # Panics
/// If there are more sequences than `capacity`.
pub fn plan_decode(
    sequences: &[DecodeSequence],
    window: Option<u32>,
    capacity: usize,
    items: &mut Vec<DecodeItem>,
) {
    assert!(sequences.len() <= capacity, "{} sequences for {capacity} items", sequences.len());
    let mut longer = 0;
    let count = |longer: u32| -> usize {
        sequences.iter().map(|sequence| Splits::new(sequence, window, longer).indices().len()).sum()
    };
    while count(longer) > capacity {
        longer += 1;
    }
    items.clear();
    for sequence in sequences {
        let splits = Splits::new(sequence, window, longer);
        let indices = splits.indices();
        let (first, count) = (indices.start, indices.len() as u32);
        items.extend(indices.map(|index| DecodeItem {
            row: sequence.row,
            table: sequence.table,
            begin: u64::from(splits.seen.start).max(u64::from(index) << splits.shift) as u32,
            end: u64::from(splits.seen.end).min(u64::from(index + 1) << splits.shift) as u32,
            split: index - first,
            splits: count,
            reserved: [0; 2],
        }));
    }
}

/// How one sequence is split.
struct Splits {
    /// Positions that its token sees.
    seen: Range<u32>,
    /// Splits are 2^shift positions long.
    shift: u32,
}

impl Splits {
    fn new(sequence: &DecodeSequence, window: Option<u32>, longer: u32) -> Self {
        let end = sequence.context_len;
        let seen = window.map_or(0, |window| end.saturating_sub(window))..end;
        let mut shift = SPLIT_TOKENS.ilog2();
        while Self::between(&seen, shift).len() as u32 > MOST_SPLITS {
            shift += 1;
        }
        // With 32 every sequence is one item.
        Self { seen, shift: (shift + longer).min(32) }
    }

    fn between(seen: &Range<u32>, shift: u32) -> Range<u32> {
        let (start, end) = (u64::from(seen.start), u64::from(seen.end));
        (start >> shift) as u32..end.div_ceil(1 << shift) as u32
    }

    /// Those that hold a position that is seen.
    fn indices(&self) -> Range<u32> {
        Self::between(&self.seen, self.shift)
    }
}

/// Items that a decode step of up to `rows` sequences may need, with `pool_tokens` slots in the KV cache:
/// exactly enough as long as sequences share no blocks, and with longer splits where they share many.
pub fn decode_capacity(rows: usize, pool_tokens: usize) -> usize {
    2 * rows + pool_tokens / SPLIT_TOKENS as usize
}

/// Bytes of the decode kernel's workspaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeWorkspace {
    pub items: usize,
    /// Of each item and head: the weighted sum of its values, f32.
    pub partial_values: usize,
    /// Its largest score and the sum of its weights, f32.
    pub partial_sums: usize,
    /// Of each row and head tile: items that are done. Zeroed once; every launch leaves it zero.
    pub arrivals: usize,
}

impl DecodeWorkspace {
    /// For up to `rows` rows and `capacity` items.
    pub fn new(specialisation: &Specialisation, kv_heads: u32, rows: usize, capacity: usize) -> Self {
        let tiles = (kv_heads * head_tiles(specialisation.group)) as usize;
        let heads = specialisation.group.div_ceil(head_tiles(specialisation.group)) as usize;
        Self {
            items: capacity * size_of::<DecodeItem>(),
            partial_values: capacity * tiles * heads * specialisation.head_dim as usize * 4,
            partial_sums: capacity * tiles * heads * 2 * 4,
            arrivals: rows * tiles * 4,
        }
    }
}

/// How a block of threads of the prefill kernel is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillTile {
    /// Queries: tokens times the heads that share a key head. 16 or 32 for each warp.
    pub rows: u32,
    /// Keys that are visited at once.
    pub keys: u32,
    pub warps: u32,
}

impl PrefillTile {
    /// As many queries and keys as the registers hold: a thread has up to 255, of which the sums take
    /// `rows / warps / 16 * head_dim / 2` and the scores `rows / warps / 16 * keys / 2`.
    pub fn choose(head_dim: u32) -> Self {
        match head_dim {
            0..=64 => Self { rows: 128, keys: 64, warps: 4 },
            65..=128 => Self { rows: 128, keys: 32, warps: 4 },
            _ => Self { rows: 64, keys: 32, warps: 4 },
        }
    }

    /// Dynamic shared memory of a block: queries, and two stages of keys and values.
    pub fn shared_bytes(&self, head_dim: u32, kv: KvElement) -> u32 {
        let queries = self.rows * row_stride(2 * head_dim);
        let keys = self.keys * row_stride(head_dim * kv.bytes() as u32);
        queries + 4 * keys
    }
}

/// One item of the prefill kernel: a tile of the queries of one sequence. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PrefillItem {
    /// Row of the chunk's first token in queries and output.
    pub first_row: u32,
    /// Tokens of the chunk.
    pub tokens: u32,
    /// Tokens in the cache, the chunk included; its last token has position `context_len - 1`.
    pub context_len: u32,
    /// Row of the block table.
    pub table: u32,
    /// Which tile of the chunk's queries.
    pub tile: u32,
    pub reserved: [u32; 3],
}

// SAFETY: 8 words of 4 bytes each.
unsafe impl Words for PrefillItem {}
const _: () = assert!(size_of::<PrefillItem>() == 32);

/// A chunk of a sequence's prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillChunk {
    pub first_row: u32,
    pub tokens: u32,
    pub context_len: u32,
    pub table: u32,
}

/// Fills `items` with the tiles of all chunks, those that see most keys first: what starts last
/// should be short.
pub fn plan_prefill(chunks: &[PrefillChunk], group: u32, tile: PrefillTile, items: &mut Vec<PrefillItem>) {
    items.clear();
    for chunk in chunks {
        let tiles = (chunk.tokens * group).div_ceil(tile.rows);
        items.extend((0..tiles).map(|index| PrefillItem {
            first_row: chunk.first_row,
            tokens: chunk.tokens,
            context_len: chunk.context_len,
            table: chunk.table,
            tile: index,
            reserved: [0; 3],
        }));
    }
    let keys = |item: &PrefillItem| {
        let last = ((item.tile + 1) * tile.rows - 1) / group;
        item.context_len - item.tokens + last.min(item.tokens - 1) + 1
    };
    items.sort_by_key(|item| std::cmp::Reverse(keys(item)));
}

/// The prefill kernel: a block an item and key head.
pub fn prefill_launch(items: u32, kv_heads: u32, specialisation: &Specialisation) -> Launch {
    let tile = specialisation.prefill;
    let shared_bytes = tile.shared_bytes(specialisation.head_dim, specialisation.kv);
    Launch { grid: [items, kv_heads, 1], block: 32 * tile.warps, shared_bytes }
}

/// Batch sizes for which decode steps are recorded as graphs, up to `max_rows`: 1, 2, 4, then every 8 up
/// to 64, every 16 up to 256, every 32 beyond. A step runs in the smallest one that holds it.
pub fn graph_ladder(max_rows: u32) -> Vec<u32> {
    let mut sizes = vec![1, 2, 4];
    sizes.extend((8..64).step_by(8));
    sizes.extend((64..256).step_by(16));
    sizes.extend((256..=max_rows.max(256)).step_by(32));
    sizes.retain(|size| *size < max_rows);
    sizes.push(max_rows);
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::gpu::Arch;
    use crate::cuda::kernels::{BLOCK_SIZES, Element, HEAD_DIMS};

    /// Per block, per multiprocessor, as the CUDA C++ programming guide's table of compute capabilities says.
    fn gpu(arch: u32, per_block: u32, per_multiprocessor: u32) -> GpuInfo {
        GpuInfo {
            name: String::new(),
            arch: Arch(arch),
            multiprocessors: 132,
            shared_bytes_per_block: per_block << 10,
            shared_bytes_per_multiprocessor: per_multiprocessor << 10,
            l2_bytes: 50 << 20,
            memory_bytes: 80 << 30,
        }
    }

    fn gpus() -> [GpuInfo; 4] {
        [gpu(80, 163, 164), gpu(86, 99, 100), gpu(89, 99, 100), gpu(90, 227, 228)]
    }

    fn specialisation(head_dim: u32, kv: KvElement, group: u32, info: &GpuInfo) -> Specialisation {
        Specialisation {
            element: Element::BF16,
            kv,
            hidden: 4096,
            head_dim,
            group,
            block_size: 16,
            head_norms: false,
            decode: DecodeTile::choose(info, head_dim, kv),
            prefill: PrefillTile::choose(head_dim),
        }
    }

    #[test]
    fn every_launch_fits_every_gpu() {
        for info in gpus() {
            for head_dim in HEAD_DIMS {
                for kv in [KvElement::Same, KvElement::E4M3] {
                    let specialisation = specialisation(head_dim, kv, 4, &info);
                    let decode = decode_launch(&info, &specialisation);
                    let prefill = prefill_launch(3, 8, &specialisation);
                    for launch in [decode, prefill] {
                        let shape = format!("{head_dim} {kv:?} on {}: {launch:?}", info.arch);
                        assert!(launch.shared_bytes <= info.shared_bytes_per_block, "{shape}");
                        launch.check("attention").unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn hopper_keeps_enough_under_way() {
        let info = gpu(90, 227, 228);
        let specialisation = specialisation(128, KvElement::Same, 4, &info);
        assert_eq!(specialisation.decode, DecodeTile { warps: 4, stages: 3 });
        let launch = decode_launch(&info, &specialisation);
        assert_eq!((launch.grid, launch.block), ([2 * 132, 1, 1], 128));
    }

    #[test]
    fn rows_of_tiles_lie_in_different_banks() {
        for head_dim in HEAD_DIMS {
            for bytes in [1, 2] {
                let stride = row_stride(head_dim * bytes);
                assert!(stride >= head_dim * bytes && stride.is_multiple_of(16));
                let mut banks: Vec<u32> = (0..8).map(|row| row * stride / 16 % 8).collect();
                banks.sort_unstable();
                assert_eq!(banks, [0, 1, 2, 3, 4, 5, 6, 7]);
            }
        }
    }

    #[test]
    fn blocks_are_whole_tiles() {
        assert!(BLOCK_SIZES.iter().all(|size| size.is_multiple_of(TILE_TOKENS)));
        assert!(SPLIT_TOKENS.is_multiple_of(TILE_TOKENS));
    }

    fn decode_items(contexts: &[u32], window: Option<u32>, capacity: usize) -> Vec<DecodeItem> {
        let sequence = |(row, context_len): (usize, &u32)| DecodeSequence {
            row: row as u32,
            table: row as u32,
            context_len: *context_len,
        };
        let sequences: Vec<_> = contexts.iter().enumerate().map(sequence).collect();
        let mut items = Vec::new();
        plan_decode(&sequences, window, capacity, &mut items);
        items
    }

    #[test]
    fn decode_items_cover_each_context_once_and_in_order() {
        for window in [None, Some(1), Some(100), Some(256), Some(5000)] {
            for capacity in [4, 5, 9, 1000] {
                let contexts = [1, 256, 257, 40_000];
                let items = decode_items(&contexts, window, capacity);
                assert!(items.len() <= capacity);
                for (row, context) in contexts.iter().enumerate() {
                    let own: Vec<_> = items.iter().filter(|item| item.row == row as u32).collect();
                    let mut at = window.map_or(0, |window| context.saturating_sub(window));
                    for (index, item) in own.iter().enumerate() {
                        assert_eq!((item.begin, item.split), (at, index as u32));
                        assert_eq!(item.splits as usize, own.len());
                        assert!(item.end > item.begin);
                        at = item.end;
                    }
                    assert_eq!(at, *context, "window {window:?}, capacity {capacity}");
                }
                let starts = items.iter().enumerate().filter(|(_, item)| item.split == 0);
                for (index, first) in starts {
                    let run = &items[index..index + first.splits as usize];
                    assert!(run.iter().all(|item| item.row == first.row), "items of a row stand together");
                }
            }
        }
    }

    #[test]
    fn a_sequence_is_split_alike_in_every_batch() {
        let alone = decode_items(&[3000], None, 1000);
        let among: Vec<_> = decode_items(&[3000, 9, 70_000], None, 1000);
        assert_eq!(alone[..], among[..alone.len()]);
        assert_eq!(alone.len(), 12);
        assert_eq!(among.len(), 12 + 1 + 35, "70,000 positions in splits of 2,048");
    }

    #[test]
    fn the_longest_context_can_be_split() {
        let items = decode_items(&[u32::MAX], None, 1);
        assert_eq!((items.len(), items[0].begin, items[0].end), (1, 0, u32::MAX));
        assert_eq!(decode_items(&[u32::MAX], None, 1000).len(), 64);
    }

    #[test]
    fn the_usual_pool_never_needs_longer_splits() {
        let (rows, pool_tokens) = (64, 400_000);
        let capacity = decode_capacity(rows, pool_tokens);
        let context = (pool_tokens / rows) as u32;
        let items = decode_items(&vec![context; rows], None, capacity);
        assert!(items.iter().all(|item| item.end - item.begin <= SPLIT_TOKENS));
    }

    #[test]
    fn prefill_items_cover_all_rows_and_start_with_the_longest() {
        let chunks = [
            PrefillChunk { first_row: 0, tokens: 100, context_len: 100, table: 0 },
            PrefillChunk { first_row: 100, tokens: 1, context_len: 9000, table: 1 },
            PrefillChunk { first_row: 101, tokens: 513, context_len: 700, table: 2 },
        ];
        for group in [1, 3, 7, 8] {
            let tile = PrefillTile::choose(128);
            let mut items = Vec::new();
            plan_prefill(&chunks, group, tile, &mut items);
            for chunk in chunks {
                let mut tiles: Vec<u32> =
                    items.iter().filter(|item| item.table == chunk.table).map(|item| item.tile).collect();
                tiles.sort_unstable();
                let expected = (chunk.tokens * group).div_ceil(tile.rows);
                assert_eq!(tiles, (0..expected).collect::<Vec<_>>());
            }
            assert_eq!(items[0].table, 1);
            assert_eq!((items[1].table, items[1].tile), (2, (513 * group).div_ceil(tile.rows) - 1));
        }
    }

    #[test]
    fn the_graph_ladder_ends_at_the_largest_batch() {
        assert_eq!(graph_ladder(1), [1]);
        assert_eq!(graph_ladder(6), [1, 2, 4, 6]);
        assert_eq!(graph_ladder(64), [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]);
        let ladder = graph_ladder(300);
        assert_eq!(ladder[ladder.len() - 3..], [256, 288, 300]);
        assert!(ladder.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn workspaces_hold_every_item_of_every_head() {
        let specialisation = specialisation(128, KvElement::Same, 4, &gpu(90, 227, 228));
        let workspace = DecodeWorkspace::new(&specialisation, 8, 64, 1000);
        assert_eq!(workspace.items, 32_000);
        assert_eq!(workspace.partial_values, 1000 * 32 * 128 * 4);
        assert_eq!(workspace.partial_sums, 1000 * 32 * 8);
        assert_eq!(workspace.arrivals, 64 * 8 * 4);
        let wide = Specialisation { group: 12, ..specialisation };
        assert_eq!(head_tiles(wide.group), 2);
        assert_eq!(DecodeWorkspace::new(&wide, 1, 1, 1).partial_sums, 12 * 8);
    }

    #[test]
    fn simple_launches_are_possible() {
        for launch in [
            rows_launch(7),
            copy_blocks_launch(3, 32, 65_536),
            norm_launch(5, 576),
            norm_launch(5, 16_384),
            rope_launch(9, 2, 1),
            rope_launch(9, 32, 8),
            rope_launch(70_000, 32, 8),
            silu_launch(70_000, 14_336),
            sample_launch(64),
            quantise_launch(4096),
            scale_product_launch(8, 6144),
        ] {
            launch.check("kernel").unwrap();
        }
        assert_eq!(norm_launch(1, 4096).block, 512);
        assert_eq!((rope_launch(1, 32, 8).grid, rope_launch(512, 32, 8).grid), ([1, 6, 1], [512, 1, 1]));
        assert_eq!(silu_launch(2, 14_336).grid, [2, 7, 1]);
    }
}
