use servelab_engine::{BlockId, SequenceId, Step, StepSequence};

use super::*;
use crate::cpu::test_support::{Random, assert_close, kernels_of_all_levels};

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    window: Option<u32>,
    dtype: KvDtype,
}

impl Shape {
    fn attention(self) -> Attention {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        Attention { heads: self.heads, scale, sliding_window: self.window }
    }

    fn width(self) -> usize {
        self.heads * self.head_dim
    }
}

/// A sequence with all its queries, keys and values.
struct Sequence {
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    blocks: Vec<BlockId>,
}

/// Some sequences whose keys and values are in a cache, in shuffled blocks, every other slot poisoned.
struct World {
    shape: Shape,
    sequences: Vec<Sequence>,
    cache: KvCache,
}

impl World {
    fn new(shape: Shape, lengths: &[usize]) -> Self {
        let mut random = Random::new(lengths.len() as u64);
        let blocks = lengths.iter().map(|length| length.div_ceil(shape.block_size)).sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        let mut cache =
            KvCache::new(2, blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype);
        let row = shape.kv_heads * shape.head_dim;
        for slot in 0..(blocks * shape.block_size) as u32 {
            cache.write(1, slot, &vec![f32::NAN; row], &vec![f32::NAN; row]);
        }
        let mut sequences = Vec::new();
        for length in lengths {
            let mut take = || BlockId(free.swap_remove(random.next() as usize % free.len()));
            let blocks: Vec<_> = (0..length.div_ceil(shape.block_size)).map(|_| take()).collect();
            let (keys, values) = (random.bf16_vec(length * row), random.bf16_vec(length * row));
            for (position, (key, value)) in keys.chunks(row).zip(values.chunks(row)).enumerate() {
                let block = blocks[position / shape.block_size].0 as usize;
                let slot = block * shape.block_size + position % shape.block_size;
                cache.write(1, slot as u32, key, value);
            }
            let q = random.vec(length * shape.width()).iter().map(|value| value * 3.0).collect();
            sequences.push(Sequence { q, keys, values, blocks });
        }
        Self { shape, sequences, cache }
    }

    /// Attention of the given positions of the given sequences, in one step.
    fn run(&self, kernels: &Kernels, parts: &[(usize, Range<usize>)]) -> Vec<Vec<f32>> {
        let (mut step, mut q) = (Step::default(), Vec::new());
        for (index, positions) in parts {
            let sequence = &self.sequences[*index];
            let (tokens, blocks) = (step.tokens.len(), step.blocks.len());
            step.tokens.extend(positions.clone().map(|_| 0));
            step.blocks.extend(&sequence.blocks);
            step.sequences.push(StepSequence {
                id: SequenceId(*index as u64),
                tokens: tokens..step.tokens.len(),
                blocks: blocks..step.blocks.len(),
                context_len: positions.end as u32,
            });
            let width = self.shape.width();
            q.extend_from_slice(&sequence.q[positions.start * width..positions.end * width]);
        }
        let mut out = vec![f32::NAN; q.len()];
        paged_attention(kernels, self.shape.attention(), &q, &step, &self.cache, 1, &mut out);
        let mut rest = &out[..];
        let mut results = Vec::new();
        for (_, positions) in parts {
            let (part, after) = rest.split_at(positions.len() * self.shape.width());
            results.push(part.to_vec());
            rest = after;
        }
        results
    }

    fn plain(&self, index: usize, position: usize) -> Vec<f32> {
        let Shape { heads, kv_heads, head_dim, window, .. } = self.shape;
        let sequence = &self.sequences[index];
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
        let mut out = Vec::new();
        for head in 0..heads {
            let row = |values: &'_ [f32], position: usize, head: usize, heads: usize| -> Vec<f64> {
                let at = (position * heads + head) * head_dim;
                values[at..at + head_dim].iter().copied().map(f64::from).collect()
            };
            let kv_head = head / (heads / kv_heads);
            let q = row(&sequence.q, position, head, heads);
            let score = |key: usize| {
                let key = row(&sequence.keys, key, kv_head, kv_heads);
                let dot = q.iter().zip(&key).map(|(q, key)| q * key).sum::<f64>();
                (dot * f64::from(self.shape.attention().scale)).exp()
            };
            let weights: Vec<f64> = (first..=position).map(score).collect();
            let total = weights.iter().sum::<f64>();
            let mut sum = vec![0.0; head_dim];
            for (key, weight) in (first..).zip(&weights) {
                for (sum, value) in sum.iter_mut().zip(row(&sequence.values, key, kv_head, kv_heads)) {
                    *sum += weight / total * value;
                }
            }
            out.extend(sum.into_iter().map(|value| value as f32));
        }
        out
    }
}

fn shapes() -> Vec<Shape> {
    let shape = |heads, kv_heads, head_dim, block_size, window, dtype| Shape {
        heads,
        kv_heads,
        head_dim,
        block_size,
        window,
        dtype,
    };
    vec![
        shape(3, 1, 64, 16, None, KvDtype::F32),
        shape(4, 2, 16, 16, None, KvDtype::BF16),
        shape(2, 2, 8, 4, None, KvDtype::F32),
        shape(7, 1, 24, 5, Some(9), KvDtype::BF16),
        shape(14, 1, 32, 32, Some(300), KvDtype::F32),
        shape(2, 1, 80, 48, None, KvDtype::F32),
        shape(2, 2, 96, 16, Some(1), KvDtype::F32),
        shape(5, 1, 128, 16, Some(40), KvDtype::BF16),
        shape(1, 1, 256, 64, None, KvDtype::F32),
    ]
}

#[test]
fn every_position_matches_the_plain_loop() {
    for kernels in kernels_of_all_levels(2) {
        for shape in shapes() {
            let world = World::new(shape, &[530, 1, 37]);
            let results = world.run(&kernels, &[(0, 0..530), (1, 0..1), (2, 0..37)]);
            for (index, result) in results.iter().enumerate() {
                for (position, out) in result.chunks(shape.width()).enumerate() {
                    // The long one by samples, around the bounds of segments too.
                    if position % 29 == 0 || position % 256 < 2 || position % 256 == 255 {
                        assert_close(out, &world.plain(index, position), 2e-5);
                    }
                }
            }
        }
    }
}

/// The "same answer" contract: bits, not tolerances.
#[test]
fn a_token_is_the_same_to_the_bit_in_any_chunk_batch_split_and_on_any_number_of_threads() {
    let pools: Vec<_> = [1, 2, 3].into_iter().map(kernels_of_all_levels).collect();
    for (level, alone) in pools[0].iter().enumerate() {
        for shape in shapes() {
            let world = World::new(shape, &[530, 29, 300]);
            let whole: Vec<_> = [(0, 0..530), (1, 0..29), (2, 0..300)]
                .into_iter()
                .map(|part| world.run(alone, &[part]).remove(0))
                .collect();
            let expect = |index: usize, positions: Range<usize>, out: &[f32]| {
                let width = shape.width();
                let want = &whole[index][positions.start * width..positions.end * width];
                let equal = out.iter().zip(want).all(|(out, want)| out.to_bits() == want.to_bits());
                assert!(equal && out.len() == want.len(), "sequence {index}, positions {positions:?}");
            };
            for kernels in pools.iter().map(|pool| &pool[level]) {
                // Chunks of 7 beside a decode of another and a chunk of a third.
                for start in (0..525).step_by(if kernels.pool().threads() == 2 { 7 } else { 70 }) {
                    let parts = [(1, 28..29), (0, start..start + 7), (2, 200..300)];
                    for (part, out) in parts.iter().zip(world.run(kernels, &parts)) {
                        expect(part.0, part.1.clone(), &out);
                    }
                }
                // Decodes alone, which are split over the context, and together, which are not.
                for position in [0, 1, 15, 16, 255, 256, 257, 511, 512, 529] {
                    expect(0, position..position + 1, &world.run(kernels, &[(0, position..position + 1)])[0]);
                }
                let many: Vec<_> = (0..40).map(|_| (0, 529..530)).chain([(2, 299..300)]).collect();
                for (part, out) in many.iter().zip(world.run(kernels, &many)) {
                    expect(part.0, part.1.clone(), &out);
                }
            }
        }
    }
}

#[test]
fn a_step_without_tokens_is_nothing() {
    let world = World::new(shapes()[0], &[1]);
    let (kernels, _) = Kernels::select(2);
    assert!(world.run(&kernels, &[]).is_empty());
}

#[test]
#[should_panic(expected = "lacks blocks")]
fn a_context_beyond_its_blocks_is_refused() {
    let mut world = World::new(shapes()[0], &[20]);
    world.sequences[0].blocks.pop();
    let (kernels, _) = Kernels::select(1);
    world.run(&kernels, &[(0, 0..20)]);
}

#[test]
#[should_panic(expected = "names blocks beyond")]
fn a_block_that_does_not_exist_is_refused() {
    let mut world = World::new(shapes()[0], &[20]);
    world.sequences[0].blocks[1] = BlockId(99);
    let (kernels, _) = Kernels::select(1);
    world.run(&kernels, &[(0, 0..20)]);
}
