//! Attention over the paged KV cache, decodes and prompt chunks in one batch.
//!
//! Keys are visited in segments of 256 positions. Within a segment the scores of a tile of queries are
//! computed, their softmax taken, and the values summed; segments are then joined by the online softmax
//! (Milakov and Gimelshein 2018; in tiles as in FlashAttention, Dao et al. 2022). The queries of a tile are
//! neighbouring tokens and all heads that share a key head, so that each key is loaded once for them all.
//! A long context may be split over the threads by segment (as Flash-Decoding does, Dao et al. 2023).
//!
//! Segments are bounded by absolute position and joined in ascending order, masked keys count exactly
//! nothing, so that a query's result is the same to the bit in whatever chunk, batch or split.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;
use servelab_engine::{BlockId, Step};

use super::buffer::SharedMut;
use super::kv_cache::{GROUP, KvCache, KvDtype, Reader};
use super::level::{Kernels, Level};
use super::simd::{Operation, Simd, exp};

/// Positions of a segment.
const SEGMENT: usize = 256;
const GROUPS: usize = SEGMENT / GROUP;
/// Stands for "no score yet": finite, so that the difference of two of them is 0 and not NaN.
const LOWEST: f32 = -1e30;
/// Rows of a tile at most, on any level.
const MOST_ROWS: usize = 12;

/// What attention depends on besides queries and cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads, a multiple of the cache's key heads.
    pub heads: usize,
    /// Multiplies the scores; usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// A token sees itself and the tokens before it, that many in all.
    pub sliding_window: Option<u32>,
}

/// Causal attention of the step's tokens: `q` and `out` are `[tokens, heads, head_dim]`. The keys and values of
/// the step's own tokens must have been written to the cache.
///
/// # Panics
/// If a length does not fit, or a sequence names blocks that do not exist or hold its context.
pub fn paged_attention(
    kernels: &Kernels,
    attention: Attention,
    q: &[f32],
    step: &Step,
    cache: &KvCache,
    layer: usize,
    out: &mut [f32],
) {
    let width = attention.heads * cache.head_dim();
    assert_eq!(q.len(), step.tokens.len() * width, "q must be [tokens, heads, head_dim]");
    assert_eq!(out.len(), q.len(), "out must be as long as q");
    assert!(attention.heads.is_multiple_of(cache.kv_heads()), "query heads must be a multiple of key heads");
    assert!(attention.sliding_window != Some(0), "a sliding window of 0 tokens sees nothing");
    check(step, cache);
    let call = Call {
        attention,
        group: attention.heads / cache.kv_heads(),
        q,
        step,
        cache: cache.reader(layer),
        level: kernels.level(),
        out: SharedMut::new(out),
    };
    let tiles = call.tiles();
    let enough = kernels.pool().threads() * 4;
    if tiles.len() < enough && tiles.iter().any(|tile| tile.segments.len() > 1) {
        call.run_split(kernels, &tiles);
    } else {
        kernels.pool().run(tiles.len(), &|index| call.whole_tile(&tiles[index]));
    }
}

/// That every block a sequence names exists and that they hold its context.
fn check(step: &Step, cache: &KvCache) {
    for sequence in &step.sequences {
        let blocks = &step.blocks[sequence.blocks.clone()];
        let (context, tokens) = (sequence.context_len as usize, sequence.tokens.len());
        assert!(sequence.tokens.end <= step.tokens.len(), "{:?} has tokens outside the step", sequence.id);
        assert!(tokens <= context, "{:?} has {tokens} tokens in a context of {context}", sequence.id);
        assert!(context <= blocks.len() * cache.block_size(), "{:?} lacks blocks for {context}", sequence.id);
        let exist = blocks.iter().all(|block| (block.0 as usize) < cache.num_blocks());
        assert!(exist, "{:?} names blocks beyond the cache's {}", sequence.id, cache.num_blocks());
    }
}

/// One call of [`paged_attention`], shared by the threads.
struct Call<'a> {
    attention: Attention,
    /// Query heads that share a key head.
    group: usize,
    q: &'a [f32],
    step: &'a Step,
    cache: Reader,
    level: Level,
    out: SharedMut<f32>,
}

/// Some rows of one sequence and key head; row `i` is head `i % group` of token `i / group`.
#[derive(Clone, Debug)]
struct RowTile {
    sequence: usize,
    kv_head: usize,
    rows: Range<usize>,
    /// Segments that any of the rows sees.
    segments: Range<usize>,
    /// First partial result of this tile where tiles are split.
    partial: usize,
}

impl Call<'_> {
    /// All tiles; the longest of a prompt first, since the last to be taken decide when all is done.
    fn tiles(&self) -> Vec<RowTile> {
        let most = self.level.tile_rows();
        let mut tiles = Vec::new();
        let mut partial = 0;
        for (index, sequence) in self.step.sequences.iter().enumerate().rev() {
            let mut end = sequence.tokens.len() * self.group;
            while end > 0 {
                let fits = |height: &usize| *height <= most && *height <= end;
                let start = end - HEIGHTS.into_iter().find(fits).unwrap_or(1);
                let first = self.visible(index, start).start / SEGMENT;
                let last = (self.visible(index, end - 1).end - 1) / SEGMENT;
                for kv_head in 0..self.cache.layout.kv_heads {
                    let segments = first..last + 1;
                    tiles.push(RowTile { sequence: index, kv_head, rows: start..end, segments, partial });
                    partial += last + 1 - first;
                }
                end = start;
            }
        }
        tiles
    }

    /// Positions that a row sees.
    #[inline(always)]
    fn visible(&self, sequence: usize, row: usize) -> Range<usize> {
        let sequence = &self.step.sequences[sequence];
        let end = sequence.context_len as usize - sequence.tokens.len() + row / self.group + 1;
        let window = self.attention.sliding_window.map_or(end, |window| end.min(window as usize));
        end - window..end
    }

    /// First element of a row in `q` and `out`.
    #[inline(always)]
    fn row_start(&self, tile: &RowTile, row: usize) -> usize {
        let token = self.step.sequences[tile.sequence].tokens.start + row / self.group;
        let head = tile.kv_head * self.group + row % self.group;
        (token * self.attention.heads + head) * self.cache.layout.head_dim
    }

    /// Few tiles with long contexts: one task a segment, and then the segments of each tile are joined.
    fn run_split(&self, kernels: &Kernels, tiles: &[RowTile]) {
        let size = MOST_ROWS * (self.cache.layout.value_dim + 2);
        let tasks: Vec<_> =
            tiles.iter().flat_map(|tile| tile.segments.clone().map(move |segment| (tile, segment))).collect();
        kernels.with_scratch(tasks.len() * size * size_of::<f32>(), |scratch| {
            let partials = SharedMut::from_ptr(scratch.cast::<f32>());
            // SAFETY: the scratch holds `size` values for each segment of each tile, and a task uses its own.
            let partial = |index: usize| unsafe {
                std::slice::from_raw_parts_mut(partials.get().add(index * size), size)
            };
            kernels.pool().run(tasks.len(), &|index| {
                let (tile, segment) = tasks[index];
                let out = partial(tile.partial + segment - tile.segments.start);
                self.one_segment(tile, segment, out);
            });
            for tile in tiles {
                let segments = (0..tile.segments.len()).map(|index| &*partial(tile.partial + index));
                self.join_segments(tile, segments);
            }
        });
    }
}

/// Heights of tiles: those that have kernels.
const HEIGHTS: [usize; 7] = [12, 8, 6, 4, 3, 2, 1];

/// Runs the kernel of the tile's height; the tall ones exist only where registers allow them.
macro_rules! for_rows {
    ($level:expr, $rows:expr, $kernel:ident { $($field:ident $(: $value:expr)?),* }) => {
        match $rows {
            1 => $level.run($kernel::<_, 1> { $($field $(: $value)?),* }),
            2 => $level.run($kernel::<_, 2> { $($field $(: $value)?),* }),
            3 => $level.run($kernel::<_, 3> { $($field $(: $value)?),* }),
            4 => $level.run($kernel::<_, 4> { $($field $(: $value)?),* }),
            6 => $level.run_avx($kernel::<_, 6> { $($field $(: $value)?),* }),
            8 => $level.run_avx512($kernel::<_, 8> { $($field $(: $value)?),* }),
            12 => $level.run_avx512($kernel::<_, 12> { $($field $(: $value)?),* }),
            rows => unreachable!("no tile of {rows} rows"),
        }
    };
}

thread_local! {
    /// Working memory of a tile, kept from call to call.
    static WORKSPACE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The parts of the working memory.
struct Workspace<'a> {
    /// Scaled queries, `[head_dim][rows]`.
    queries: &'a mut [f32],
    /// Scores, then probabilities, `[rows][SEGMENT]`.
    scores: &'a mut [f32],
    /// Result of one segment and of the segments so far; see [`Partial`].
    segment: &'a mut [f32],
    total: &'a mut [f32],
    /// Where keys and values are gathered if blocks are no whole groups.
    gathered: &'a mut [f32],
}

fn with_workspace<R>(call: &Call<'_>, body: impl FnOnce(Workspace<'_>) -> R) -> R {
    let layout = call.cache.layout;
    let partial = MOST_ROWS * (layout.value_dim + 2);
    let gathered = if layout.block_size.is_multiple_of(GROUP) {
        0
    } else {
        SEGMENT * (layout.head_dim + layout.value_dim)
    };
    let sizes = [layout.head_dim * MOST_ROWS, MOST_ROWS * SEGMENT, partial, partial, gathered];
    WORKSPACE.with_borrow_mut(|workspace| {
        let needed = sizes.iter().sum();
        if workspace.len() < needed {
            workspace.resize(needed, 0.0);
        }
        let (queries, rest) = workspace.split_at_mut(sizes[0]);
        let (scores, rest) = rest.split_at_mut(sizes[1]);
        let (segment, rest) = rest.split_at_mut(sizes[2]);
        let (total, rest) = rest.split_at_mut(sizes[3]);
        body(Workspace { queries, scores, segment, total, gathered: &mut rest[..sizes[4]] })
    })
}

/// A view of a partial result: the greatest score and the sum of the weights of each row, and the
/// weighted sum of the values, `[rows][value_dim]`.
struct Partial<'a> {
    greatest: &'a mut [f32],
    sum: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    #[inline(always)]
    fn of(memory: &'a mut [f32]) -> Self {
        let (greatest, rest) = memory.split_at_mut(MOST_ROWS);
        let (sum, values) = rest.split_at_mut(MOST_ROWS);
        Self { greatest, sum, values }
    }

    #[inline(always)]
    fn clear(&mut self, used: usize) {
        self.greatest.fill(LOWEST);
        self.sum.fill(0.0);
        self.values[..used].fill(0.0);
    }
}

impl Call<'_> {
    /// A tile over all its segments, and into `out`.
    fn whole_tile(&self, tile: &RowTile) {
        with_workspace(self, |mut work| {
            pack_queries(self, tile, work.queries);
            let rows = tile.rows.len();
            Partial::of(work.total).clear(rows * self.cache.layout.value_dim);
            for segment in tile.segments.clone() {
                self.segment(tile, segment, &mut work);
                self.join(rows, work.total, work.segment);
            }
            self.finish(tile, work.total);
        });
    }

    /// A tile over one segment, into `out`, a partial result.
    fn one_segment(&self, tile: &RowTile, segment: usize, out: &mut [f32]) {
        with_workspace(self, |mut work| {
            pack_queries(self, tile, work.queries);
            self.segment(tile, segment, &mut work);
            out.copy_from_slice(work.segment);
        });
    }

    /// Joins the segments of a tile and writes its result to `out`.
    fn join_segments<'p>(&self, tile: &RowTile, segments: impl Iterator<Item = &'p [f32]>) {
        let rows = tile.rows.len();
        with_workspace(self, |work| {
            Partial::of(work.total).clear(rows * self.cache.layout.value_dim);
            for segment in segments {
                work.segment.copy_from_slice(segment);
                self.join(rows, work.total, work.segment);
            }
            self.finish(tile, work.total);
        });
    }

    fn join(&self, rows: usize, total: &mut [f32], segment: &mut [f32]) {
        let width = self.cache.layout.value_dim;
        self.level.run(Join { rows, width, total: Partial::of(total), segment: Partial::of(segment) });
    }

    /// Divides by the sums and writes the rows to `out`.
    fn finish(&self, tile: &RowTile, total: &mut [f32]) {
        let layout = self.cache.layout;
        let total = Partial::of(total);
        for (index, row) in tile.rows.clone().enumerate() {
            let at = self.row_start(tile, row);
            // SAFETY: `out` is `[tokens, heads, head_dim]`, and each token and head belongs to one tile.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.get().add(at), layout.head_dim) };
            let factor = 1.0 / total.sum[index];
            for (out, value) in out.iter_mut().zip(&total.values[index * layout.value_dim..]) {
                *out = value * factor;
            }
        }
    }

    /// Scores, softmax and weighted values of one segment, into `work.segment`.
    fn segment(&self, tile: &RowTile, segment: usize, work: &mut Workspace<'_>) {
        match self.cache.layout.dtype {
            KvDtype::F32 => self.typed_segment::<f32>(tile, segment, work),
            KvDtype::BF16 => self.typed_segment::<bf16>(tile, segment, work),
        }
    }

    fn typed_segment<T: Element>(&self, tile: &RowTile, segment: usize, work: &mut Workspace<'_>) {
        let first = segment * SEGMENT;
        let bound = |position: usize| position.clamp(first, first + SEGMENT) - first;
        let lowest = bound(self.visible(tile.sequence, tile.rows.start).start);
        let highest = bound(self.visible(tile.sequence, tile.rows.end - 1).end);
        let keys = locate::<T>(self, tile, first, lowest..highest, work.gathered);
        for_rows!(
            self.level,
            tile.rows.len(),
            Scores { keys: &keys, queries: work.queries, scores: work.scores }
        );
        let computed = lowest / GROUP * GROUP..highest.next_multiple_of(GROUP);
        let partial = Partial::of(work.segment);
        for (index, row) in tile.rows.clone().enumerate() {
            let seen = self.visible(tile.sequence, row);
            let scores = &mut work.scores[index * SEGMENT..][computed.clone()];
            let hidden =
                |position: usize| bound(position).clamp(computed.start, computed.end) - computed.start;
            scores[..hidden(seen.start)].fill(f32::NEG_INFINITY);
            scores[hidden(seen.end)..].fill(f32::NEG_INFINITY);
            (partial.greatest[index], partial.sum[index]) = self.level.run(Softmax { scores });
        }
        let (weights, out) = (&*work.scores, partial.values);
        for_rows!(self.level, tile.rows.len(), Values { keys: &keys, weights, out });
    }
}

/// `[rows][head_dim]` to `[head_dim][rows]`, scaled.
fn pack_queries(call: &Call<'_>, tile: &RowTile, packed: &mut [f32]) {
    let rows = tile.rows.len();
    let head_dim = call.cache.layout.head_dim;
    for (index, row) in tile.rows.clone().enumerate() {
        let source = &call.q[call.row_start(tile, row)..][..head_dim];
        for (target, value) in packed.chunks_exact_mut(rows).zip(source) {
            target[index] = value * call.attention.scale;
        }
    }
}

/// Adds a later segment to the total: both are brought to the greater of their greatest scores.
struct Join<'a> {
    rows: usize,
    width: usize,
    total: Partial<'a>,
    segment: Partial<'a>,
}

impl Operation for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, width, total, segment } = self;
        for row in 0..rows {
            let greatest = total.greatest[row].max(segment.greatest[row]);
            let before = (total.greatest[row] - greatest).exp();
            let after = (segment.greatest[row] - greatest).exp();
            total.greatest[row] = greatest;
            total.sum[row] = total.sum[row] * before + segment.sum[row] * after;
            let (factor, more) = (s.splat(before), s.splat(after));
            for at in (row * width..(row + 1) * width).step_by(S::LANES) {
                // SAFETY: the widths are whole vectors.
                unsafe {
                    let sum = s.mul(s.load(total.values.as_ptr().add(at)), factor);
                    let sum = s.fma(s.load(segment.values.as_ptr().add(at)), more, sum);
                    s.store(total.values.as_mut_ptr().add(at), sum);
                }
            }
        }
    }
}

/// An element type of the cache.
trait Element: Copy {
    /// # Safety
    /// `LANES` elements can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load(p) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_bf16(p.cast()) }
    }
}

/// The keys and values of a segment: where each group of 16 starts.
struct Keys<T> {
    keys: [*const T; GROUPS],
    key_stride: usize,
    values: [*const T; GROUPS],
    value_stride: usize,
    head_dim: usize,
    /// Positions within the segment that any row of the tile sees.
    seen: Range<usize>,
}

/// Replaces scores, a whole number of groups, by `e^(score - greatest)`; gives the greatest and the sum.
struct Softmax<'a> {
    scores: &'a mut [f32],
}

impl Operation for Softmax<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let scores = self.scores;
        let mut greatest = s.splat(LOWEST);
        for at in (0..scores.len()).step_by(S::LANES) {
            // SAFETY: groups are whole vectors. A NaN in the second operand is passed on.
            greatest = s.max(greatest, unsafe { s.load(scores.as_ptr().add(at)) });
        }
        let greatest = s.maximum(greatest);
        let mut sum = s.zero();
        for at in (0..scores.len()).step_by(S::LANES) {
            // SAFETY: as above.
            unsafe {
                let p = scores.as_mut_ptr().add(at);
                let weight = exp(s, s.sub(s.load(p), s.splat(greatest)));
                sum = s.add(sum, weight);
                s.store(p, weight);
            }
        }
        (greatest, s.sum(sum))
    }
}

/// Where the keys and values of a segment are; gathered first if blocks are no whole groups.
fn locate<T: Element>(
    call: &Call<'_>,
    tile: &RowTile,
    first: usize,
    seen: Range<usize>,
    gathered: &mut [f32],
) -> Keys<T> {
    let layout = call.cache.layout;
    let sequence = &call.step.sequences[tile.sequence];
    let blocks = &call.step.blocks[sequence.blocks.clone()];
    let mut keys = Keys {
        keys: [std::ptr::null(); GROUPS],
        key_stride: GROUP,
        values: [std::ptr::null(); GROUPS],
        value_stride: layout.value_dim,
        head_dim: layout.head_dim,
        seen: seen.clone(),
    };
    let place = |position: usize| (blocks[position / layout.block_size], position % layout.block_size);
    if gathered.is_empty() {
        for group in seen.start / GROUP..seen.end.div_ceil(GROUP) {
            let (block, offset) = place(first + group * GROUP);
            // SAFETY: `check` saw that the block exists; the type is the cache's.
            unsafe {
                keys.keys[group] = call.cache.key(block, tile.kv_head, offset);
                keys.values[group] = call.cache.value(block, tile.kv_head, offset);
            }
        }
        return keys;
    }
    // SAFETY: the memory holds SEGMENT keys and values of up to 4 bytes an element.
    unsafe {
        gather(call.cache, tile.kv_head, |at| place(first + at), &mut keys, gathered.as_mut_ptr().cast())
    };
    keys
}

/// Copies the keys and values seen into `memory`, in the layout that whole groups have.
///
/// # Safety
/// Blocks exist, `T` is the cache's type, and `memory` holds `SEGMENT * (head_dim + value_dim)` elements.
unsafe fn gather<T: Element>(
    cache: Reader,
    head: usize,
    place: impl Fn(usize) -> (BlockId, usize),
    keys: &mut Keys<T>,
    memory: *mut T,
) {
    let layout = cache.layout;
    // SAFETY: the caller's; a position is within the segment, a dimension within the head.
    unsafe {
        let values = memory.add(SEGMENT * layout.head_dim);
        for group in 0..GROUPS {
            keys.keys[group] = memory.add(group * GROUP * layout.head_dim);
            keys.values[group] = values.add(group * GROUP * layout.value_dim);
        }
        for at in keys.seen.clone() {
            let (block, offset) = place(at);
            let key: *const T = cache.key(block, head, offset);
            let target = keys.keys[at / GROUP].cast_mut().add(at % GROUP);
            for dim in 0..layout.head_dim {
                *target.add(dim * GROUP) = *key.add(dim * cache.key_stride());
            }
            let value: *const T = cache.value(block, head, offset);
            std::ptr::copy_nonoverlapping(value, values.add(at * layout.value_dim), layout.value_dim);
        }
    }
}

/// Scores of all groups seen, `[R][SEGMENT]`.
struct Scores<'a, T, const R: usize> {
    keys: &'a Keys<T>,
    queries: &'a [f32],
    scores: &'a mut [f32],
}

impl<T: Element, const R: usize> Operation for Scores<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { keys, queries, scores } = self;
        let mut vector = keys.seen.start / GROUP * GROUP / S::LANES;
        let end = keys.seen.end.div_ceil(GROUP) * GROUP / S::LANES;
        while vector < end {
            // SAFETY: the vectors are within groups that were located.
            unsafe {
                if many_vectors::<S, R>() && end - vector >= 4 {
                    scores_tile::<S, T, R, 4>(s, keys, vector, queries, scores);
                    vector += 4;
                } else if !many_vectors::<S, R>() && end - vector >= 2 {
                    scores_tile::<S, T, R, 2>(s, keys, vector, queries, scores);
                    vector += 2;
                } else {
                    scores_tile::<S, T, R, 1>(s, keys, vector, queries, scores);
                    vector += 1;
                }
            }
        }
    }
}

/// With few rows more vectors go side by side, so that enough chains of additions are in flight.
#[inline(always)]
const fn many_vectors<S: Simd, const R: usize>() -> bool {
    R + 2 <= S::TILE_ROWS / 2
}

/// Scores of `R` rows and `V` vectors of keys, from the given vector on.
///
/// # Safety
/// The vectors are within groups that were located; queries are `[head_dim][R]`.
#[inline(always)]
unsafe fn scores_tile<S: Simd, T: Element, const R: usize, const V: usize>(
    s: S,
    keys: &Keys<T>,
    vector: usize,
    queries: &[f32],
    scores: &mut [f32],
) {
    let mut pointers = [std::ptr::null::<T>(); V];
    for (v, pointer) in pointers.iter_mut().enumerate() {
        let position = (vector + v) * S::LANES;
        // SAFETY: within the group.
        *pointer = unsafe { keys.keys[position / GROUP].add(position % GROUP) };
    }
    // With few rows keys come from memory: those of the vectors after these are asked for meanwhile.
    let mut ahead = pointers;
    for (v, pointer) in ahead.iter_mut().enumerate() {
        let position = (vector + V + v) * S::LANES;
        if many_vectors::<S, R>() && position < keys.seen.end {
            // SAFETY: within the group, which was located since it is seen.
            *pointer = unsafe { keys.keys[position / GROUP].add(position % GROUP) };
        }
    }
    let mut sums = [[s.zero(); V]; R];
    let queries = &queries[..keys.head_dim * R];
    for (dim, query) in queries.chunks_exact(R).enumerate() {
        if many_vectors::<S, R>() {
            for pointer in &ahead {
                s.prefetch(pointer.wrapping_add(dim * keys.key_stride).cast());
            }
        }
        let mut key = [s.zero(); V];
        for (key, pointer) in key.iter_mut().zip(&pointers) {
            // SAFETY: dimension `dim` of the keys of this vector.
            *key = unsafe { T::load(s, pointer.add(dim * keys.key_stride)) };
        }
        for (sums, query) in sums.iter_mut().zip(query) {
            let query = s.splat(*query);
            for (sum, key) in sums.iter_mut().zip(&key) {
                *sum = s.fma(query, *key, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            let at = r * SEGMENT + (vector + v) * S::LANES;
            debug_assert!(at + S::LANES <= scores.len());
            // SAFETY: scores are `[rows][SEGMENT]`.
            unsafe { s.store(scores.as_mut_ptr().add(at), *sum) };
        }
    }
}

/// Values weighted by `weights` `[R][SEGMENT]` and summed over the keys seen: `[R][value_dim]`.
struct Values<'a, T, const R: usize> {
    keys: &'a Keys<T>,
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl<T: Element, const R: usize> Operation for Values<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { keys, weights, out } = self;
        let mut dim = 0;
        while dim < keys.value_stride {
            let left = (keys.value_stride - dim) / S::LANES;
            // SAFETY: the dimensions are within a value, which is a whole number of vectors.
            unsafe {
                if many_vectors::<S, R>() && left >= 4 {
                    values_tile::<S, T, R, 4>(s, keys, dim, weights, out);
                    dim += 4 * S::LANES;
                } else if !many_vectors::<S, R>() && left >= 2 {
                    values_tile::<S, T, R, 2>(s, keys, dim, weights, out);
                    dim += 2 * S::LANES;
                } else {
                    values_tile::<S, T, R, 1>(s, keys, dim, weights, out);
                    dim += S::LANES;
                }
            }
        }
    }
}

/// `V` vectors of dimensions of `R` rows, over the keys seen in ascending order.
///
/// # Safety
/// The dimensions are within a value; the groups seen were located; weights are `[R][SEGMENT]`.
#[inline(always)]
unsafe fn values_tile<S: Simd, T: Element, const R: usize, const V: usize>(
    s: S,
    keys: &Keys<T>,
    dim: usize,
    weights: &[f32],
    out: &mut [f32],
) {
    let mut sums = [[s.zero(); V]; R];
    debug_assert!(weights.len() >= R * SEGMENT && out.len() >= R * keys.value_stride);
    let mut at = keys.seen.start;
    while at < keys.seen.end {
        let end = keys.seen.end.min((at / GROUP + 1) * GROUP);
        // SAFETY: the caller's: this group was located.
        unsafe {
            let mut value_at = keys.values[at / GROUP].add(at % GROUP * keys.value_stride + dim);
            // As with keys: the values of the group after the next.
            let next = (at / GROUP + 2).min((keys.seen.end - 1) / GROUP);
            let mut ahead = keys.values[next].wrapping_add(at % GROUP * keys.value_stride + dim);
            for position in at..end {
                if many_vectors::<S, R>() {
                    s.prefetch(ahead.cast());
                    s.prefetch(ahead.wrapping_add(V * S::LANES / 2).cast());
                    ahead = ahead.wrapping_add(keys.value_stride);
                }
                let mut value = [s.zero(); V];
                for (v, value) in value.iter_mut().enumerate() {
                    *value = T::load(s, value_at.add(v * S::LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let weight = s.splat(*weights.as_ptr().add(r * SEGMENT + position));
                    for (sum, value) in sums.iter_mut().zip(&value) {
                        *sum = s.fma(weight, *value, *sum);
                    }
                }
                value_at = value_at.wrapping_add(keys.value_stride);
            }
        }
        at = end;
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: `out` is `[rows][value_dim]`.
            unsafe { s.store(out.as_mut_ptr().add(r * keys.value_stride + dim + v * S::LANES), *sum) };
        }
    }
}

#[cfg(test)]
mod tests;
