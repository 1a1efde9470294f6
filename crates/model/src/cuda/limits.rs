//! What a GPU can do at most, measured, so that a report can stand a figure beside its limit.

use super::gpu::{Format, Gpu, GpuError, Memory, Product, Span};
use super::words::bytes_of;
use crate::cpu::random::Random;

/// Limits of one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes a second of a copy within device memory: those read and those written.
    pub copy_bytes_per_second: f64,
    /// Operations a second of a large bf16 product with f32 sums, two for each number that is added.
    pub bf16_flops_per_second: f64,
}

/// How large the things are that are measured.
#[derive(Clone, Copy, Debug)]
pub struct LimitSizes {
    /// Of the copy; several times the caches. Less where less than four times as much is free, but no less than
    /// [`CACHES`].
    pub bytes: usize,
    /// Rows, columns and depth of the product.
    pub width: usize,
}

impl LimitSizes {
    /// On a real GPU.
    pub const FULL: Self = Self { bytes: 2 << 30, width: 8192 };
    /// On an emulator.
    pub const SMALL: Self = Self { bytes: 1 << 20, width: 64 };
}

/// Times the last cache, which a copy has to be larger than or it measures the cache.
const CACHES: u64 = 8;
/// Runs of each; the median counts, so that one that was disturbed does not.
const RUNS: usize = 9;

/// Measures both. Takes twice the copy's bytes, and less than a second.
///
/// # Errors
/// What the GPU fails with; [`GpuError::OutOfMemory`] on one that has too little free.
pub fn measure<G: Gpu>(gpu: &G, sizes: LimitSizes) -> Result<Limits, GpuError> {
    let stream = gpu.stream()?;
    let (free_bytes, least) = (gpu.free_bytes()?, CACHES * gpu.info().l2_bytes);
    let bytes = sizes.bytes.min(free_bytes as usize / 4);
    if (bytes as u64) < least.min(sizes.bytes as u64) {
        return Err(GpuError::OutOfMemory { wanted_bytes: 4 * least, free_bytes });
    }
    let copy = {
        let (from, to) = (gpu.allocate(bytes)?, gpu.allocate(bytes)?);
        // Not zeros: some hardware is faster with them.
        gpu.fill(&stream, from.span(), 0x5a)?;
        median_seconds(gpu, &stream, || gpu.copy(&stream, from.span(), to.span()))?
    };
    let product = product_seconds(gpu, &stream, sizes.width)?;
    Ok(Limits {
        copy_bytes_per_second: 2.0 * bytes as f64 / copy,
        bf16_flops_per_second: 2.0 * (sizes.width as f64).powi(3) / product,
    })
}

#[allow(unsafe_code)]
fn product_seconds<G: Gpu>(gpu: &G, stream: &G::Stream, width: usize) -> Result<f64, GpuError> {
    let mut random = Random::new(1);
    let numbers: Vec<half::bf16> = (0..width * width).map(|_| half::bf16::from_f32(random.value())).collect();
    let [x, weights, out] = [(); 3].map(|()| gpu.allocate(2 * width * width));
    let (x, weights, out) = (x?, weights?, out?);
    gpu.upload(stream, bytes_of(&numbers), x.span())?;
    gpu.copy(stream, x.span(), weights.span())?;
    let product = Product {
        rows: width,
        inputs: width,
        outputs: width,
        x: x.span(),
        weights: weights.span(),
        bias: Span::NONE,
        out: out.span(),
        format: Format::BF16,
        out_format: Format::BF16,
    };
    // SAFETY: the memory lives until the times have been taken, which waits for all runs.
    median_seconds(gpu, stream, || unsafe { gpu.multiply(stream, &product) })
}

fn median_seconds<G: Gpu>(
    gpu: &G,
    stream: &G::Stream,
    mut work: impl FnMut() -> Result<(), GpuError>,
) -> Result<f64, GpuError> {
    work()?;
    let mut seconds = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = gpu.record(stream)?;
        work()?;
        let end = gpu.record(stream)?;
        seconds.push(gpu.seconds_between(&start, &end)?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}
