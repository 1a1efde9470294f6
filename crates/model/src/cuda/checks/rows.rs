//! Embedding, row gather, block copies, norms and the gate.

use super::numbers::{Stored, compared, difference, exactly, from_bits, to_bits, tolerance, values_of};
use super::{Check, Checker, Report, Shape, Size};
use crate::cpu::random::Random;
use crate::cuda::gpu::{Gpu, GpuError, Memory};
use crate::cuda::kernels::{Element, KvElement};
use crate::cuda::launch::{CopyBlocks, Embed, GatherRows, Kernels, RmsNorm};

const PLAIN: Shape =
    Shape { element: Element::BF16, kv: KvElement::Same, head_dim: 64, group: 1, block_size: 16 };

/// Numbers of an output that are compared, in whole rows.
const COMPARED: usize = 4 << 20;

/// Copies have to be exact, so their error is 0 or infinite.
///
/// # Errors
/// What the GPU fails with.
pub fn copies<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    let kernels = Kernels::load(gpu, checker.specialisation(PLAIN))?;
    let shapes: &[(usize, usize)] = match size {
        Size::Small => &[(1, 8), (5, 64), (9, 1160)],
        Size::Full => &[(1, 8), (3, 1160), (8192, 4096)],
    };
    for (rows, width) in shapes {
        report(checker.embed(&kernels, *rows, *width)?);
        report(checker.gather(&kernels, *rows, *width)?);
    }
    let shapes: &[(usize, usize, usize)] = match size {
        Size::Small => &[(1, 1, 16), (3, 2, 4096 + 48)],
        Size::Full => &[(1, 1, 16), (64, 32, 65_536)],
    };
    for (copies, layers, block_bytes) in shapes {
        report(checker.copy_blocks(&kernels, *copies, *layers, *block_bytes)?);
    }
    Ok(())
}

impl<G: Gpu> Checker<'_, G> {
    fn embed(&self, kernels: &Kernels<G>, rows: usize, width: usize) -> Result<Check, GpuError> {
        let mut random = Random::new(rows as u64);
        let vocabulary = 100 + rows;
        let table: Vec<u16> = (0..vocabulary * width).map(|_| random.next() as u16).collect();
        let ids: Vec<u32> = (0..rows).map(|_| (random.next() % vocabulary as u64) as u32).collect();
        // Every third token is named through the answers of the last step.
        let chosen: Vec<u32> = ids.iter().rev().copied().collect();
        let through = |(row, id): (usize, &u32)| {
            if row % 3 == 1 { 1 << 31 | (rows - 1 - row) as u32 } else { *id }
        };
        let tokens: Vec<u32> = ids.iter().enumerate().map(through).collect();
        let (table_memory, tokens, chosen) =
            (self.upload(&table)?, self.upload(&tokens)?, self.upload(&chosen)?);
        let out = self.poisoned(rows * width * 2)?;
        let call = Embed {
            out: out.span(),
            table: table_memory.span(),
            tokens: tokens.span(),
            chosen: chosen.span(),
            rows,
            width,
        };
        let seconds = self.run(|| kernels.embed(self.gpu, &self.stream, call))?;
        let found: Vec<u16> = self.download(out.span())?;
        let wanted: Vec<u16> =
            ids.iter().flat_map(|id| table[*id as usize * width..][..width].to_vec()).collect();
        Ok(copied("embed", rows, width, found == wanted, seconds))
    }

    fn gather(&self, kernels: &Kernels<G>, rows: usize, width: usize) -> Result<Check, GpuError> {
        let mut random = Random::new(rows as u64 + 1);
        let x: Vec<u16> = (0..rows * width).map(|_| random.next() as u16).collect();
        // Row 0 of the output is padding and stays as it is.
        let indices: Vec<u32> = (0..rows + 1)
            .map(|i| if i == 0 { u32::MAX } else { (random.next() % rows as u64) as u32 })
            .collect();
        let (x_memory, index_memory) = (self.upload(&x)?, self.upload(&indices)?);
        let out = self.poisoned((rows + 1) * width * 2)?;
        let call = GatherRows {
            out: out.span(),
            x: x_memory.span(),
            indices: index_memory.span(),
            rows: rows + 1,
            width,
        };
        let seconds = self.run(|| kernels.gather_rows(self.gpu, &self.stream, call))?;
        let found: Vec<u16> = self.download(out.span())?;
        let mut wanted = vec![u16::MAX; width];
        indices[1..].iter().for_each(|row| wanted.extend(&x[*row as usize * width..][..width]));
        Ok(copied("gather_rows", rows, width, found == wanted, seconds))
    }

    fn copy_blocks(
        &self,
        kernels: &Kernels<G>,
        count: usize,
        layers: usize,
        block_bytes: usize,
    ) -> Result<Check, GpuError> {
        let mut random = Random::new(count as u64 + 2);
        let blocks = 2 * count + 1;
        let mut cache: Vec<u8> = (0..layers * blocks * block_bytes).map(|_| random.next() as u8).collect();
        let copies: Vec<[u32; 2]> = (0..count as u32).map(|i| [2 * i, 2 * i + 1]).collect();
        let (memory, pairs) = (self.upload(&cache)?, self.upload(&copies)?);
        let call = CopyBlocks {
            cache: memory.span(),
            copies: pairs.span(),
            count,
            layers,
            layer_bytes: blocks * block_bytes,
            block_bytes,
        };
        let seconds = self.run(|| kernels.copy_blocks(self.gpu, &self.stream, call))?;
        for layer in cache.chunks_exact_mut(blocks * block_bytes) {
            for [from, to] in &copies {
                let from = *from as usize * block_bytes;
                layer.copy_within(from..from + block_bytes, *to as usize * block_bytes);
            }
        }
        let found: Vec<u8> = self.download(memory.span())?;
        Ok(Check {
            kernel: "copy_blocks",
            case: format!("{count} blocks of {block_bytes} bytes in {layers} layers"),
            error: exactly(found == cache),
            tolerance: 0.0,
            bytes: 2 * (count * layers * block_bytes) as u64,
            flops: 0,
            seconds,
        })
    }

    /// Launches once, and then again for the time.
    pub(super) fn run(
        &self,
        mut launch: impl FnMut() -> Result<(), GpuError>,
    ) -> Result<Option<f64>, GpuError> {
        launch()?;
        self.gpu.synchronise(&self.stream)?;
        self.time(launch)
    }
}

fn copied(kernel: &'static str, rows: usize, width: usize, same: bool, seconds: Option<f64>) -> Check {
    Check {
        kernel,
        case: format!("{rows} rows of {width}"),
        error: exactly(same),
        tolerance: 0.0,
        bytes: (rows * width * 4) as u64,
        flops: 0,
        seconds,
    }
}

/// Both norms.
///
/// # Errors
/// What the GPU fails with.
pub fn norms<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    let shapes: &[(Element, usize, usize)] = match size {
        Size::Small => &[
            (Element::BF16, 3, 8),
            (Element::F16, 2, 576),
            (Element::BF16, 1, 4096),
            (Element::F16, 1, 8200),
        ],
        Size::Full => &[
            (Element::BF16, 3, 8),
            (Element::F16, 7, 576),
            (Element::F16, 2, 8200),
            (Element::BF16, 1, 4096),
            (Element::BF16, 16_384, 4096),
        ],
    };
    for (element, rows, hidden) in shapes {
        let shape = Shape { element: *element, ..PLAIN };
        let mut specialisation = checker.specialisation(shape);
        specialisation.hidden = *hidden as u32;
        let kernels = Kernels::load(gpu, specialisation)?;
        report(checker.norm(&kernels, *element, *rows, *hidden, false)?);
        report(checker.norm(&kernels, *element, *rows, *hidden, true)?);
    }
    Ok(())
}

impl<G: Gpu> Checker<'_, G> {
    fn norm(
        &self,
        kernels: &Kernels<G>,
        element: Element,
        rows: usize,
        hidden: usize,
        adds: bool,
    ) -> Result<Check, GpuError> {
        const EPS: f32 = 1e-5;
        let mut random = Random::new(hidden as u64);
        let x = Stored::random(&mut random, element, rows * hidden, 3.0);
        let delta = Stored::random(&mut random, element, rows * hidden, 1.0);
        let weight = random.vec(hidden);
        let (x_memory, delta_memory) = (self.upload(&x.bits)?, self.upload(&delta.bits)?);
        let weight_memory = self.upload(&weight)?;
        let out = self.poisoned(rows * hidden * 2)?;
        let call =
            RmsNorm { out: out.span(), x: x_memory.span(), weight: weight_memory.span(), rows, eps: EPS };
        let launch = || match adds {
            false => kernels.rms_norm(self.gpu, &self.stream, call),
            true => kernels.add_rms_norm(self.gpu, &self.stream, delta_memory.span(), call),
        };
        launch()?;
        let found: Vec<u16> = self.download(out.span())?;
        let residual: Vec<u16> = self.download(x_memory.span())?;
        let seconds = self.time(launch)?;

        let mut error: f64 = 0.0;
        for row in compared(rows, COMPARED / hidden) {
            let range = row * hidden..(row + 1) * hidden;
            let mut wanted = x.values(range.clone());
            if adds {
                // Rounded as it is stored; the norm is of the rounded sum.
                for (x, delta) in wanted.iter_mut().zip(delta.values(range.clone())) {
                    *x = from_bits(element, to_bits(element, f64::from((*x + delta) as f32)));
                }
            }
            error = error.max(exactly(values_of(element, &residual[range.clone()]) == wanted));
            let mean = wanted.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            wanted.iter_mut().zip(&weight).for_each(|(x, weight)| *x *= scale * f64::from(*weight));
            error = error.max(difference(&values_of(element, &found[range]), &wanted));
        }
        Ok(Check {
            kernel: if adds { "add_rms_norm" } else { "rms_norm" },
            case: format!("{element:?}, {rows} rows of {hidden}"),
            error,
            tolerance: tolerance(element),
            bytes: (rows * hidden * if adds { 8 } else { 4 }) as u64,
            flops: 0,
            seconds,
        })
    }
}

/// The gate of the feed-forward.
///
/// # Errors
/// What the GPU fails with.
pub fn silu<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    let shapes: &[(Element, usize, usize)] = match size {
        Size::Small => &[(Element::BF16, 1, 8), (Element::F16, 3, 2056)],
        Size::Full => &[(Element::BF16, 1, 8), (Element::F16, 3, 2056), (Element::BF16, 8192, 14_336)],
    };
    for (element, rows, inner) in shapes {
        let kernels = Kernels::load(gpu, checker.specialisation(Shape { element: *element, ..PLAIN }))?;
        report(checker.silu(&kernels, *element, *rows, *inner)?);
    }
    Ok(())
}

impl<G: Gpu> Checker<'_, G> {
    fn silu(
        &self,
        kernels: &Kernels<G>,
        element: Element,
        rows: usize,
        inner: usize,
    ) -> Result<Check, GpuError> {
        let mut random = Random::new(inner as u64);
        let mut gate_up = Stored::random(&mut random, element, rows * 2 * inner, 12.0);
        // Where e^-x overflows an f32, and where it vanishes.
        gate_up.set(0, -120.0);
        gate_up.set(1, 120.0);
        let memory = self.upload(&gate_up.bits)?;
        let out = self.poisoned(rows * inner * 2)?;
        let launch = || kernels.silu_mul(self.gpu, &self.stream, memory.span(), out.span(), rows, inner);
        let seconds = self.run(launch)?;
        let found: Vec<u16> = self.download(out.span())?;
        let mut error: f64 = 0.0;
        for row in compared(rows, COMPARED / inner) {
            let both = gate_up.values(row * 2 * inner..(row + 1) * 2 * inner);
            let (gate, up) = both.split_at(inner);
            let product = |(gate, up): (&f64, &f64)| gate / (1.0 + (-gate).exp()) * up;
            let wanted: Vec<f64> = gate.iter().zip(up).map(product).collect();
            let found = values_of(element, &found[row * inner..(row + 1) * inner]);
            error = error.max(difference(&found, &wanted));
        }
        Ok(Check {
            kernel: "silu_mul",
            case: format!("{element:?}, {rows} rows of {inner}"),
            error,
            tolerance: tolerance(element),
            bytes: (rows * inner * 6) as u64,
            flops: 0,
            seconds,
        })
    }
}
