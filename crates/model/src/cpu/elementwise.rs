//! Norms, rotary positions, the gate of the feed-forward, argmax: one pass over the rows each.
#![allow(unsafe_code)]

use super::buffer::SharedMut;
use super::level::Kernels;
use super::simd::{Operation, Simd, exp};

/// Elements below which a second thread costs more than it saves.
const GRAIN: usize = 16 << 10;

/// Cosines and sines of the rotary embedding (Su et al. 2021, RoFormer), each
/// `[positions, head_dim / 2]`, attention scaling included.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

impl RopeTable<'_> {
    /// Cosines and sines of one position.
    ///
    /// # Panics
    /// If the table is shorter.
    #[inline(always)]
    pub(super) fn at(&self, position: u32, half: usize) -> (&[f32], &[f32]) {
        let range = position as usize * half..(position as usize + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()` values (Zhang and Sennrich
/// 2019). With the head size as row length this is the per-head norm.
///
/// # Panics
/// If `x` and `out` differ in length or are not whole rows.
pub fn rms_norm(kernels: &Kernels, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "x and out must be [rows, width]");
    assert!(x.len().is_multiple_of(weight.len()), "x must be whole rows of the weight's length");
    let width = weight.len();
    let out = SharedMut::new(out);
    kernels.pool().run_ranges(x.len() / width, GRAIN.div_ceil(width), &|rows| {
        let range = rows.start * width..rows.end * width;
        // SAFETY: tasks have disjoint rows.
        let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(range.start), range.len()) };
        kernels.level().run(RmsNorm { x: &x[range], weight, eps, out });
    });
}

/// `residual += delta`, then `out = rms_norm(residual)`, in one pass.
///
/// # Panics
/// If lengths differ or are not whole rows.
pub fn add_rms_norm(
    kernels: &Kernels,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert_eq!(residual.len(), delta.len(), "residual and delta must be [rows, width]");
    assert_eq!(residual.len(), out.len(), "residual and out must be [rows, width]");
    assert!(delta.len().is_multiple_of(weight.len()), "delta must be whole rows of the weight's length");
    let width = weight.len();
    let (residual, out) = (SharedMut::new(residual), SharedMut::new(out));
    kernels.pool().run_ranges(delta.len() / width, GRAIN.div_ceil(width), &|rows| {
        let range = rows.start * width..rows.end * width;
        // SAFETY: tasks have disjoint rows, and the two buffers are distinct.
        let (residual, out) = unsafe {
            (
                std::slice::from_raw_parts_mut(residual.get().add(range.start), range.len()),
                std::slice::from_raw_parts_mut(out.get().add(range.start), range.len()),
            )
        };
        kernels.level().run(Add { target: residual, delta: &delta[range] });
        kernels.level().run(RmsNorm { x: residual, weight, eps, out });
    });
}

/// `target += delta`.
///
/// # Panics
/// If the lengths differ.
pub fn add(kernels: &Kernels, target: &mut [f32], delta: &[f32]) {
    assert_eq!(target.len(), delta.len(), "target and delta must be equally long");
    let target = SharedMut::new(target);
    kernels.pool().run_ranges(delta.len(), GRAIN, &|range| {
        // SAFETY: tasks have disjoint ranges.
        let target = unsafe { std::slice::from_raw_parts_mut(target.get().add(range.start), range.len()) };
        kernels.level().run(Add { target, delta: &delta[range] });
    });
}

/// `out = silu(gate) * up`, with gate and up side by side: `gate_up` `[rows, 2 * inter]`, `out`
/// `[rows, inter]`; silu(x) = x / (1 + e^-x) (Elfwing et al. 2017; Shazeer 2020, SwiGLU).
///
/// # Panics
/// If the lengths do not fit.
pub fn silu_mul(kernels: &Kernels, gate_up: &[f32], inter: usize, out: &mut [f32]) {
    assert!(out.len().is_multiple_of(inter.max(1)), "out must be [rows, inter]");
    assert_eq!(gate_up.len(), 2 * out.len(), "gate_up must be [rows, 2 * inter]");
    let rows = out.len() / inter.max(1);
    let out = SharedMut::new(out);
    kernels.pool().run_ranges(rows, (GRAIN / 4).div_ceil(inter.max(1)), &|rows| {
        // SAFETY: tasks have disjoint rows.
        let out =
            unsafe { std::slice::from_raw_parts_mut(out.get().add(rows.start * inter), rows.len() * inter) };
        kernels.level().run(SiluMul { gate_up: &gate_up[rows.start * 2 * inter..], inter, out });
    });
}

/// Rotates each head of `x` `[tokens, heads, head_dim]` in place by its token's position: the first half
/// of a head is paired with the second (as Hugging Face lays rotary weights out).
///
/// # Panics
/// If the lengths do not fit or a position lies beyond the table.
pub fn rope(
    kernels: &Kernels,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    positions: &[u32],
    table: RopeTable<'_>,
) {
    assert!(head_dim.is_multiple_of(2), "rotary positions need an even head size");
    assert_eq!(x.len(), positions.len() * heads * head_dim, "x must be [tokens, heads, head_dim]");
    let width = heads * head_dim;
    let x = SharedMut::new(x);
    kernels.pool().run_ranges(positions.len(), GRAIN.div_ceil(width), &|tokens| {
        for token in tokens {
            let (cos, sin) = table.at(positions[token], head_dim / 2);
            // SAFETY: tasks have disjoint tokens.
            let row = unsafe { std::slice::from_raw_parts_mut(x.get().add(token * width), width) };
            for head in row.chunks_exact_mut(head_dim) {
                kernels.level().run(Rotate { head, cos, sin });
            }
        }
    });
}

/// Index of the greatest value, the first among equals; NaN counts as the least. `None` if empty.
pub fn argmax(kernels: &Kernels, values: &[f32]) -> Option<usize> {
    let greatest = kernels.level().run(Maximum { values });
    values.iter().position(|value| *value == greatest).or(if values.is_empty() { None } else { Some(0) })
}

/// See [`rms_norm`]; the rows of one task.
pub(super) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [f32],
}

impl Operation for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            rms_norm_row(s, x, self.weight, self.eps, out);
        }
    }
}

#[inline(always)]
fn rms_norm_row<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(s, x, eps);
    let factor = s.splat(scale);
    let whole = x.len() - x.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within all three rows, which are equally long.
        unsafe {
            let value = s.mul(s.load(x.as_ptr().add(at)), factor);
            s.store(out.as_mut_ptr().add(at), s.mul(value, s.load(weight.as_ptr().add(at))));
        }
    }
    for at in whole..x.len() {
        out[at] = x[at] * scale * weight[at];
    }
}

/// 1 / sqrt(mean(x^2) + eps), the squares summed lane by lane.
#[inline(always)]
pub(super) fn rms_scale<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sums = [s.zero(); 2];
    let whole = x.len() - x.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within the row.
        let value = unsafe { s.load(x.as_ptr().add(at)) };
        let sum = &mut sums[at / S::LANES % 2];
        *sum = s.fma(value, value, *sum);
    }
    let mut total = s.sum(s.add(sums[0], sums[1]));
    for value in &x[whole..] {
        total += value * value;
    }
    1.0 / (total / x.len() as f32 + eps).sqrt()
}

struct Add<'a> {
    target: &'a mut [f32],
    delta: &'a [f32],
}

impl Operation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (target, delta) in self.target.iter_mut().zip(self.delta) {
            *target += delta;
        }
    }
}

struct SiluMul<'a> {
    gate_up: &'a [f32],
    inter: usize,
    out: &'a mut [f32],
}

impl Operation for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.gate_up.chunks_exact(2 * self.inter);
        for (gate_up, out) in rows.zip(self.out.chunks_exact_mut(self.inter)) {
            let (gate, up) = gate_up.split_at(self.inter);
            silu_mul_row(s, gate, up, out);
        }
    }
}

#[inline(always)]
fn silu_mul_row<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let whole = out.len() - out.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within all three rows, which are equally long.
        unsafe {
            let value = silu(s, s.load(gate.as_ptr().add(at)));
            s.store(out.as_mut_ptr().add(at), s.mul(value, s.load(up.as_ptr().add(at))));
        }
    }
    // The rest through a full vector, so that every element is computed alike.
    let rest = out.len() - whole;
    let mut lanes = [0.0; 16];
    lanes[..rest].copy_from_slice(&gate[whole..]);
    // SAFETY: the array has 16 lanes.
    let values = s.to_array(silu(s, unsafe { s.load(lanes.as_ptr()) }));
    for lane in 0..rest {
        out[whole + lane] = values[lane] * up[whole + lane];
    }
}

#[inline(always)]
fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.zero(), x))))
}

/// See [`rope`]; one head.
pub(super) struct Rotate<'a> {
    pub head: &'a mut [f32],
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

impl Operation for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        rotate(s, self.head, self.cos, self.sin);
    }
}

/// `(a, b)` becomes `(a cos - b sin, b cos + a sin)`, each product rounded.
#[inline(always)]
pub(super) fn rotate<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    assert!(cos.len() == half && sin.len() == half, "one angle for each pair");
    let (first, second) = head.split_at_mut(half);
    let whole = half - half % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within all four, which have `half` values.
        unsafe {
            let (a, b) = (s.load(first.as_ptr().add(at)), s.load(second.as_ptr().add(at)));
            let (c, d) = (s.load(cos.as_ptr().add(at)), s.load(sin.as_ptr().add(at)));
            s.store(first.as_mut_ptr().add(at), s.sub(s.mul(a, c), s.mul(b, d)));
            s.store(second.as_mut_ptr().add(at), s.add(s.mul(b, c), s.mul(a, d)));
        }
    }
    for at in whole..half {
        let (a, b) = (first[at], second[at]);
        first[at] = a * cos[at] - b * sin[at];
        second[at] = b * cos[at] + a * sin[at];
    }
}

struct Maximum<'a> {
    values: &'a [f32],
}

impl Operation for Maximum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut greatest = s.splat(f32::NEG_INFINITY);
        let whole = self.values.len() - self.values.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES` is within the values. The second operand is kept where the first is NaN.
            greatest = s.max(unsafe { s.load(self.values.as_ptr().add(at)) }, greatest);
        }
        self.values[whole..].iter().copied().fold(s.maximum(greatest), f32::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_support::{Random, assert_close, kernels_of_all_levels};

    #[test]
    fn exp_is_close_and_masks_exactly() {
        struct Exp<'a>(&'a [f32], &'a mut [f32]);
        impl Operation for Exp<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                for (x, out) in self.0.iter().zip(self.1) {
                    *out = s.to_array(exp(s, s.splat(*x)))[0];
                }
            }
        }
        for kernels in kernels_of_all_levels(1) {
            let x: Vec<f32> = (-8_700..8_800).map(|step| step as f32 * 0.01).collect();
            let mut out = vec![f32::NAN; x.len()];
            kernels.level().run(Exp(&x, &mut out));
            for (x, out) in x.iter().zip(&out) {
                let want = f64::from(*x).exp();
                assert!((f64::from(*out) - want).abs() <= want * 3e-7, "exp({x}) = {out}, not {want}");
            }
            let special = [f32::NEG_INFINITY, -1e30, -88.0, f32::NAN, f32::INFINITY];
            let mut out = [1.0; 5];
            kernels.level().run(Exp(&special, &mut out));
            assert_eq!(out[..3], [0.0; 3]);
            assert!(out[3].is_nan());
            assert!(out[4] > 2e38);
        }
    }

    #[test]
    fn rms_norm_matches_the_plain_loop() {
        for kernels in kernels_of_all_levels(2) {
            for (rows, width) in [(1, 1), (1, 7), (3, 16), (5, 33), (2, 576), (300, 64)] {
                let mut random = Random::new(width as u64);
                let (x, delta, weight) =
                    (random.vec(rows * width), random.vec(rows * width), random.vec(width));
                let mut out = vec![f32::NAN; rows * width];
                rms_norm(&kernels, &x, &weight, 1e-5, &mut out);
                assert_close(&out, &plain_norm(&x, &weight), 1e-5);

                let mut residual = x.clone();
                let mut fused = vec![f32::NAN; rows * width];
                add_rms_norm(&kernels, &mut residual, &delta, &weight, 1e-5, &mut fused);
                let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
                assert_eq!(residual, sum);
                rms_norm(&kernels, &sum, &weight, 1e-5, &mut out);
                assert_eq!(fused, out);
                let mut added = x.clone();
                add(&kernels, &mut added, &delta);
                assert_eq!(added, sum);
            }
        }
    }

    fn plain_norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
        let norm = |row: &[f32]| {
            let square = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (square + 1e-5).sqrt();
            row.iter()
                .zip(weight)
                .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
                .collect::<Vec<_>>()
        };
        x.chunks(weight.len()).flat_map(norm).collect()
    }

    #[test]
    fn silu_mul_matches_the_plain_loop() {
        for kernels in kernels_of_all_levels(2) {
            for (rows, inter) in [(1, 1), (2, 19), (3, 64), (40, 1536)] {
                let gate_up: Vec<f32> =
                    Random::new(3).vec(rows * 2 * inter).iter().map(|value| value * 20.0).collect();
                let mut out = vec![f32::NAN; rows * inter];
                silu_mul(&kernels, &gate_up, inter, &mut out);
                let want: Vec<f32> = gate_up
                    .chunks(2 * inter)
                    .flat_map(|row| {
                        (0..inter).map(|i| {
                            let gate = f64::from(row[i]);
                            (gate / (1.0 + (-gate).exp()) * f64::from(row[inter + i])) as f32
                        })
                    })
                    .collect();
                assert_close(&out, &want, 1e-5);
            }
        }
    }

    #[test]
    fn rope_matches_the_plain_loop() {
        for kernels in kernels_of_all_levels(2) {
            for (heads, head_dim) in [(1, 2), (3, 24), (2, 64), (2, 80)] {
                let positions = [0, 5, 2, 31];
                let mut random = Random::new(9);
                let half = head_dim / 2;
                let (cos, sin) = (random.vec(32 * half), random.vec(32 * half));
                let x = random.vec(positions.len() * heads * head_dim);
                let mut out = x.clone();
                rope(&kernels, &mut out, heads, head_dim, &positions, RopeTable { cos: &cos, sin: &sin });
                let mut want = Vec::new();
                for (row, head) in x.chunks(head_dim).enumerate() {
                    let base = positions[row / heads] as usize * half;
                    let angle = |i: usize| (cos[base + i % half], sin[base + i % half]);
                    want.extend((0..head_dim).map(|i| {
                        let partner = if i < half { -head[i + half] } else { head[i - half] };
                        head[i] * angle(i).0 + partner * angle(i).1
                    }));
                }
                assert_close(&out, &want, 1e-6);
            }
        }
    }

    #[test]
    fn argmax_takes_the_first_of_equals_and_ignores_nan() {
        for kernels in kernels_of_all_levels(1) {
            assert_eq!(argmax(&kernels, &[]), None);
            assert_eq!(argmax(&kernels, &[f32::NAN; 40]), Some(0));
            assert_eq!(argmax(&kernels, &[f32::NEG_INFINITY; 3]), Some(0));
            let mut values = vec![-1.0; 1000];
            for index in [999, 500, 17] {
                values[index] = 3.0;
                assert_eq!(argmax(&kernels, &values), Some(index));
            }
            values[3] = f32::NAN;
            assert_eq!(argmax(&kernels, &values), Some(17));
        }
    }
}
