//! Norms of heads, rotation, and the write to the KV cache.

use super::numbers::{
    Stored, compared, difference, exactly, from_bits, from_e4m3, to_e4m3, tolerance, values_of,
};
use super::{Check, Checker, Report, Shape, Size};
use crate::cpu::random::Random;
use crate::cuda::gpu::{Gpu, GpuError, Memory};
use crate::cuda::kernels::KvElement;
use crate::cuda::launch::{Kernels, KvScales, RopeAndCache};

const EPS: f32 = 1e-6;
const AMPLITUDE: f32 = 1.25;

/// Queries and what stands in the cache, for every shape with and without norms.
///
/// # Errors
/// What the GPU fails with.
pub fn rope<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    for (index, shape) in checker.shapes().into_iter().enumerate() {
        let mut specialisation = checker.specialisation(shape);
        specialisation.head_norms = index % 2 == 1;
        let kernels = Kernels::load(gpu, specialisation)?;
        for (tokens, kv_heads) in [(1, 1), (5, 2)] {
            report(checker.rope(&kernels, shape, tokens, kv_heads)?);
        }
        if size == Size::Full && shape.head_dim == 128 {
            report(checker.rope(&kernels, shape, 8192, 8)?);
        }
    }
    Ok(())
}

/// What goes in and what should come out.
struct Case {
    shape: Shape,
    norms: bool,
    tokens: usize,
    kv_heads: usize,
    heads: usize,
    qkv: Stored,
    positions: Vec<u32>,
    /// The first token is padding.
    slots: Vec<u32>,
    frequencies: Vec<f32>,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    scales: KvScales,
}

impl Case {
    fn new(shape: Shape, norms: bool, tokens: usize, kv_heads: usize) -> Self {
        let mut random = Random::new((tokens * kv_heads) as u64 + u64::from(shape.head_dim));
        let (head_dim, heads) = (shape.head_dim as usize, kv_heads * shape.group as usize);
        let half = head_dim / 2;
        let slot = |token: usize| if token == 0 { u32::MAX } else { (token * 3 + 1) as u32 };
        Self {
            shape,
            norms,
            tokens: tokens + 1,
            kv_heads,
            heads,
            qkv: Stored::random(
                &mut random,
                shape.element,
                (tokens + 1) * (heads + 2 * kv_heads) * head_dim,
                2.0,
            ),
            positions: (0..=tokens as u32)
                .map(|token| if token == 2 { 131_071 } else { token * 977 })
                .collect(),
            slots: (0..=tokens).map(slot).collect(),
            frequencies: (0..half).map(|i| 500_000f32.powf(-(i as f32) / half as f32)).collect(),
            query_norm: random.vec(head_dim),
            key_norm: random.vec(head_dim),
            scales: match shape.kv {
                KvElement::Same => KvScales::default(),
                KvElement::E4M3 => KvScales { key: 0.03, value: 0.02 },
            },
        }
    }

    fn blocks(&self) -> usize {
        (self.tokens * 3 + 1).div_ceil(self.shape.block_size as usize)
    }

    /// Numbers of the cache: `[blocks, 2, kv_heads, block_size, head_dim]`.
    fn cache_len(&self) -> usize {
        self.blocks() * 2 * self.kv_heads * (self.shape.block_size * self.shape.head_dim) as usize
    }

    fn cache_index(&self, slot: u32, key_or_value: usize, head: usize) -> usize {
        let (size, dim) = (self.shape.block_size as usize, self.shape.head_dim as usize);
        let (block, offset) = (slot as usize / size, slot as usize % size);
        (((block * 2 + key_or_value) * self.kv_heads + head) * size + offset) * dim
    }

    /// One head of one token, before anything is done to it.
    fn head(&self, token: usize, head: usize) -> Vec<f64> {
        let dim = self.shape.head_dim as usize;
        let row = (self.heads + 2 * self.kv_heads) * dim;
        let first = token * row + head * dim;
        self.qkv.values(first..first + dim)
    }

    fn norm_and_rotate(&self, mut x: Vec<f64>, weight: &[f32], position: u32) -> Vec<f64> {
        if self.norms {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * f64::from(*weight));
        }
        let half = x.len() / 2;
        for (i, frequency) in self.frequencies.iter().enumerate() {
            // The product is rounded to f32, as transformers rounds it.
            let angle = f64::from(position as f32 * frequency);
            let amplitude = f64::from(AMPLITUDE);
            let (sine, cosine) = (angle.sin() * amplitude, angle.cos() * amplitude);
            let (a, b) = (x[i], x[i + half]);
            x[i] = a * cosine - b * sine;
            x[i + half] = b * cosine + a * sine;
        }
        x
    }
}

impl<G: Gpu> Checker<'_, G> {
    fn rope(
        &self,
        kernels: &Kernels<G>,
        shape: Shape,
        tokens: usize,
        kv_heads: usize,
    ) -> Result<Check, GpuError> {
        let case = Case::new(shape, kernels.specialisation().head_norms, tokens, kv_heads);
        let qkv = self.upload(&case.qkv.bits)?;
        let (positions, slots) = (self.upload(&case.positions)?, self.upload(&case.slots)?);
        let frequencies = self.upload(&case.frequencies)?;
        let (query_norm, key_norm) = (self.upload(&case.query_norm)?, self.upload(&case.key_norm)?);
        let query_len = case.tokens * case.heads * shape.head_dim as usize;
        let queries = self.poisoned(query_len * 2)?;
        let cache = self.poisoned(case.cache_len() * shape.kv.bytes())?;
        let call = RopeAndCache {
            queries: queries.span(),
            cache: cache.span(),
            qkv: qkv.span(),
            positions: positions.span(),
            slots: slots.span(),
            frequencies: frequencies.span(),
            norms: case.norms.then(|| (query_norm.span(), key_norm.span())),
            tokens: case.tokens,
            kv_heads,
            amplitude: AMPLITUDE,
            eps: EPS,
            scales: case.scales,
        };
        let seconds = self.run(|| kernels.rope_and_cache(self.gpu, &self.stream, call))?;
        let queries: Vec<u16> = self.download(queries.span())?;
        let cache: Vec<u8> = self.download(cache.span())?;
        let error = query_error(&case, &queries).max(cache_error(&case, &cache));
        let row = (case.heads + 2 * kv_heads) * shape.head_dim as usize;
        let kv_bytes = 2 * kv_heads * shape.head_dim as usize * shape.kv.bytes();
        Ok(Check {
            kernel: "rope_and_cache",
            case: format!(
                "{}, {tokens} tokens, {kv_heads} key heads{}",
                shape.name(),
                if case.norms { ", head norms" } else { "" }
            ),
            error,
            tolerance: tolerance(shape.element),
            bytes: (tokens * (row * 2 + case.heads * shape.head_dim as usize * 2 + kv_bytes)) as u64,
            flops: 0,
            seconds,
        })
    }
}

fn query_error(case: &Case, found: &[u16]) -> f64 {
    let row = case.heads * case.shape.head_dim as usize;
    let mut error = exactly(found[..row].iter().all(|bits| *bits == u16::MAX));
    for token in compared(case.tokens - 1, 256).map(|token| token + 1) {
        let rotated =
            |head| case.norm_and_rotate(case.head(token, head), &case.query_norm, case.positions[token]);
        let wanted: Vec<f64> = (0..case.heads).flat_map(rotated).collect();
        let found = values_of(case.shape.element, &found[token * row..(token + 1) * row]);
        error = error.max(difference(&found, &wanted));
    }
    error
}

/// Keys within rounding, values exactly, and nothing else touched.
fn cache_error(case: &Case, found: &[u8]) -> f64 {
    let (bytes, dim) = (case.shape.kv.bytes(), case.shape.head_dim as usize);
    let mut untouched = vec![true; found.len()];
    let mut error: f64 = 0.0;
    for token in 1..case.tokens {
        for head in 0..case.kv_heads {
            for key_or_value in 0..2 {
                let at = case.cache_index(case.slots[token], key_or_value, head) * bytes;
                let stored = &found[at..at + dim * bytes];
                untouched[at..at + dim * bytes].fill(false);
                let x = case.head(token, case.heads + key_or_value * case.kv_heads + head);
                error = error.max(match key_or_value {
                    0 => key_error(
                        case,
                        stored,
                        &case.norm_and_rotate(x, &case.key_norm, case.positions[token]),
                    ),
                    _ => value_error(case, stored, &x),
                });
            }
        }
    }
    let clean = found.iter().zip(&untouched).all(|(byte, untouched)| !untouched || *byte == 0xff);
    error.max(exactly(clean))
}

fn key_error(case: &Case, stored: &[u8], wanted: &[f64]) -> f64 {
    match case.shape.kv {
        KvElement::Same => difference(&wide(case, stored), wanted),
        KvElement::E4M3 => {
            let scale = f64::from(case.scales.key);
            // The kernel's key is rounded to f32 before it is rounded to 8 bits, so that a tie may fall to the other
            // side: no further than a unit of 3 bits of mantissa.
            let close = stored.iter().zip(wanted).all(|(bits, wanted)| {
                let wanted = (wanted / scale).clamp(-448.0, 448.0);
                (from_e4m3(*bits) - wanted).abs() <= (wanted.abs() / 16.0).max(2f64.powi(-10)) * 1.01
            });
            exactly(close)
        }
    }
}

fn value_error(case: &Case, stored: &[u8], wanted: &[f64]) -> f64 {
    match case.shape.kv {
        KvElement::Same => exactly(wide(case, stored) == wanted),
        KvElement::E4M3 => {
            let inverse = 1.0 / case.scales.value;
            let wanted = wanted.iter().map(|value| to_e4m3(f64::from(*value as f32 * inverse)));
            exactly(wanted.eq(stored.iter().copied()))
        }
    }
}

fn wide(case: &Case, stored: &[u8]) -> Vec<f64> {
    let numbers = stored.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    numbers.map(|bits| from_bits(case.shape.element, bits)).collect()
}
