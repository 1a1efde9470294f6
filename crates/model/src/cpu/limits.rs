//! What this machine can do at most, measured, so that a report can stand a figure beside its limit.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use super::buffer::Buffer;
use super::level::{Kernels, Level};
use super::simd::{Operation, Simd};

/// Limits of the machine with the threads and the level of the [`Kernels`] that measured them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes a second that all threads together read from memory in a stream.
    pub read_bytes_per_second: f64,
    /// f32 operations a second of multiply-adds on registers, two each, all threads together.
    pub f32_flops_per_second: f64,
    /// The same for products of bf16 numbers, where the level has instructions for them.
    pub bf16_flops_per_second: Option<f64>,
}

/// Measures all of them; takes some tenths of a second and `bytes` of memory, which should be several times
/// the last-level cache (256 MiB serves).
pub fn measure(kernels: &Kernels, bytes: usize) -> Limits {
    Limits {
        read_bytes_per_second: read_rate(kernels, bytes),
        f32_flops_per_second: multiply_add_rate(kernels, ROUNDS),
        bf16_flops_per_second: bf16_rate(kernels, ROUNDS),
    }
}

/// Rounds of one pass of a rate: some milliseconds.
const ROUNDS: usize = 300_000;

/// Whether `vdpbf16ps` does clearly more products a second than f32 multiply-adds, on a CPU that has it. On the EPYC that
/// was measured it does twice as many, on the Xeon half as many: there f32 is faster for many rows, and no slower for one,
/// whose time goes into reading the weights. Measured once, since all kernels of a process should give the same answers,
/// and far from both figures, since those of two processes should.
pub(super) fn bf16_dots_pay(threads: usize) -> bool {
    const FEW_ROUNDS: usize = 10_000;
    const LEAST_RATIO: f64 = 1.2;
    static PAYS: OnceLock<bool> = OnceLock::new();
    *PAYS.get_or_init(|| {
        let Ok(kernels) = Kernels::with_level(Level::Avx512Bf16, threads) else { return false };
        let dots = bf16_rate(&kernels, FEW_ROUNDS).unwrap_or(0.0);
        dots > LEAST_RATIO * multiply_add_rate(&kernels, FEW_ROUNDS)
    })
}

/// The best rate over windows of a buffer: short, so that some of them go undisturbed on a machine that
/// is shared, and visited in turn, so that none is in a cache when its turn comes again.
fn read_rate(kernels: &Kernels, bytes: usize) -> f64 {
    const PART: usize = 256 << 10;
    const WINDOW: usize = 64;
    let windows = (bytes / (PART * WINDOW)).max(1);
    let mut buffer = Buffer::zeroed(windows * WINDOW * PART);
    // SAFETY: the whole buffer; written so that it is backed by memory of its own.
    unsafe { buffer.as_mut_ptr().write_bytes(1, buffer.len()) };
    let read = |window: usize| {
        kernels.pool().run(WINDOW, &|part| {
            let first = (window * WINDOW + part) * PART;
            // SAFETY: within the buffer, which is aligned, and any bits are an f32.
            let part =
                unsafe { std::slice::from_raw_parts(buffer.as_ptr().add(first).cast::<f32>(), PART / 4) };
            black_box(kernels.level().run(Read(part)));
        });
    };
    let seconds = (0..8 * windows).map(|turn| seconds(|| read(turn % windows))).fold(f64::INFINITY, f64::min);
    (WINDOW * PART) as f64 / seconds
}

fn multiply_add_rate(kernels: &Kernels, rounds: usize) -> f64 {
    struct Lanes;
    impl Operation for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::LANES
        }
    }
    let lanes = kernels.level().run(Lanes);
    let flops = rounds * CHAINS * lanes * 2;
    rate(kernels, flops, &|| kernels.level().run(MultiplyAdd(black_box(rounds))))
}

#[cfg(target_arch = "x86_64")]
fn bf16_rate(kernels: &Kernels, rounds: usize) -> Option<f64> {
    use super::matmul::{amx, bf16_dot};
    match kernels.level() {
        Level::Plain | Level::Avx2 | Level::Avx512 => None,
        Level::Avx512Bf16 => {
            // SAFETY: `Kernels` holds only levels that were detected.
            let work = || unsafe { bf16_dot::rate(black_box(rounds)) };
            Some(rate(kernels, rounds * bf16_dot::ROUND_FLOPS, &work))
        }
        Level::Amx => {
            // SAFETY: as above.
            let work = || unsafe { amx::rate(black_box(rounds)) };
            Some(rate(kernels, rounds * amx::ROUND_FLOPS, &work))
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16_rate(_: &Kernels, _: usize) -> Option<f64> {
    None
}

/// The best of several passes in which every thread does `work` of `flops` operations.
fn rate(kernels: &Kernels, flops: usize, work: &(dyn Fn() -> f32 + Sync)) -> f64 {
    let threads = kernels.pool().threads();
    let pass = || {
        kernels.pool().run(threads, &|_| {
            black_box(work());
        });
    };
    let seconds = (0..16).map(|_| seconds(pass)).fold(f64::INFINITY, f64::min);
    (threads * flops) as f64 / seconds
}

fn seconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64()
}

/// Reads all of it, asking for lines ahead as the products do.
struct Read<'a>(&'a [f32]);

impl Operation for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 8];
        for chunk in self.0.chunks_exact(8 * S::LANES) {
            for line in (0..8 * S::LANES * 4).step_by(64) {
                s.prefetch(chunk.as_ptr().cast::<u8>().wrapping_add(4096 + line));
            }
            for (index, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the chunk is 8 vectors long.
                *sum = s.add(*sum, unsafe { s.load(chunk.as_ptr().add(index * S::LANES)) });
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}

/// Independent chains: more than latency times ports, and no more than the registers hold.
const CHAINS: usize = 12;

struct MultiplyAdd(usize);

impl Operation for MultiplyAdd {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(1.0); CHAINS];
        let factor = s.splat(black_box(0.999));
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(*sum, factor, factor);
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_support::kernels_of_all_levels;

    #[test]
    fn limits_are_positive_and_finite() {
        for kernels in kernels_of_all_levels(2) {
            let limits = measure(&kernels, 4 << 20);
            assert!(limits.read_bytes_per_second.is_normal() && limits.read_bytes_per_second > 0.0);
            assert!(limits.f32_flops_per_second.is_normal() && limits.f32_flops_per_second > 0.0);
            let has_bf16 = kernels.level() >= Level::Avx512Bf16;
            assert_eq!(limits.bf16_flops_per_second.is_some_and(f64::is_normal), has_bf16);
        }
    }
}
