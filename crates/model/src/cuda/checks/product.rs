//! Matrix products as the GPU's library computes them.

use super::numbers::{Stored, compared, difference, tolerance, values_of};
use super::{Check, Checker, Report, Size};
use crate::cpu::random::Random;
use crate::cuda::gpu::{Format, Gpu, GpuError, Memory, Product, Span};
use crate::cuda::kernels::Element;

/// Products with and without bias, with 16-bit and 32-bit results.
///
/// # Errors
/// What the GPU fails with.
pub fn products<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    let shapes: &[(usize, usize, usize)] = match size {
        Size::Small => &[(1, 64, 24), (5, 40, 64)],
        Size::Full => &[(1, 64, 24), (5, 40, 64), (64, 4096, 6144), (1, 4096, 28_672), (8192, 4096, 4096)],
    };
    for element in [Element::BF16, Element::F16] {
        for (index, (rows, inputs, outputs)) in shapes.iter().enumerate() {
            report(checker.product(element, *rows, *inputs, *outputs, index % 2 == 1)?);
        }
    }
    Ok(())
}

impl<G: Gpu> Checker<'_, G> {
    /// With `wide` the result is f32 and has no bias, as logits are; else there is one.
    #[allow(unsafe_code)]
    fn product(
        &self,
        element: Element,
        rows: usize,
        inputs: usize,
        outputs: usize,
        wide: bool,
    ) -> Result<Check, GpuError> {
        let mut random = Random::new((rows + inputs) as u64);
        let x = Stored::random(&mut random, element, rows * inputs, 1.0);
        let weights = Stored::random(&mut random, element, outputs * inputs, 1.0);
        let bias = Stored::random(&mut random, element, outputs, 1.0);
        let format = if element == Element::BF16 { Format::BF16 } else { Format::F16 };
        let out_format = if wide { Format::F32 } else { format };
        let memories = [self.upload(&x.bits)?, self.upload(&weights.bits)?, self.upload(&bias.bits)?];
        let out = self.poisoned(rows * outputs * out_format.bytes())?;
        let product = Product {
            rows,
            inputs,
            outputs,
            x: memories[0].span(),
            weights: memories[1].span(),
            bias: if wide { Span::NONE } else { memories[2].span() },
            out: out.span(),
            format,
            out_format,
        };
        // SAFETY: the memory lives until the result has been downloaded and the time taken.
        let seconds = self.run(|| unsafe { self.gpu.multiply(&self.stream, &product) })?;
        let found: Vec<f64> = match wide {
            true => self.download::<f32>(out.span())?.into_iter().map(f64::from).collect(),
            false => values_of(element, &self.download::<u16>(out.span())?),
        };
        let error = product_error(&found, &x, &weights, (!wide).then_some(&bias), [rows, inputs, outputs]);
        Ok(Check {
            kernel: "matrix product",
            case: format!("{element:?} to {out_format:?}, {rows} x {inputs} x {outputs}"),
            error,
            tolerance: if wide { 1e-4 } else { tolerance(element) },
            bytes: ((rows * inputs + outputs * inputs) * 2 + rows * outputs * out_format.bytes()) as u64,
            flops: 2 * (rows * inputs * outputs) as u64,
            seconds,
        })
    }
}

/// The largest difference of some rows of `x * weights^T + bias`.
fn product_error(
    found: &[f64],
    x: &Stored,
    weights: &Stored,
    bias: Option<&Stored>,
    [rows, inputs, outputs]: [usize; 3],
) -> f64 {
    let rows: Vec<usize> = compared(rows, 4).collect();
    let left: Vec<_> = rows.iter().map(|row| x.values(row * inputs..(row + 1) * inputs)).collect();
    let mut wanted = vec![Vec::with_capacity(outputs); rows.len()];
    for output in 0..outputs {
        let weights = weights.values(output * inputs..(output + 1) * inputs);
        let shift = bias.map_or(0.0, |bias| bias.values(output..output + 1)[0]);
        for (wanted, left) in wanted.iter_mut().zip(&left) {
            wanted.push(left.iter().zip(&weights).map(|(x, weight)| x * weight).sum::<f64>() + shift);
        }
    }
    let of_row =
        |(row, wanted): (&usize, &Vec<f64>)| difference(&found[row * outputs..(row + 1) * outputs], wanted);
    rows.iter().zip(&wanted).map(of_row).fold(0.0, f64::max)
}
