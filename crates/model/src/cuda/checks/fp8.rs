//! 8-bit weights and activations: quantisation of rows, and a whole product through them.

use super::numbers::{Stored, compared, difference, exactly, from_e4m3, to_e4m3, tolerance, values_of};
use super::{Check, Checker, Report, Shape, Size};
use crate::cpu::random::Random;
use crate::cuda::gpu::{Format, Gpu, GpuError, Memory, Product, Span};
use crate::cuda::kernels::{Element, KvElement};
use crate::cuda::launch::{Kernels, QuantiseRows, ScaleProduct};

/// Both kernels, and the product between them.
///
/// # Errors
/// What the GPU fails with.
pub fn fp8<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    for element in [Element::BF16, Element::F16] {
        let shape = Shape { element, kv: KvElement::Same, head_dim: 64, group: 1, block_size: 16 };
        let kernels = Kernels::load(gpu, checker.specialisation(shape))?;
        let shapes: &[(usize, usize, usize)] = match size {
            Size::Small => &[(3, 64, 24), (2, 2064, 16)],
            Size::Full => &[(3, 64, 24), (2, 2064, 16), (64, 4096, 6144), (4096, 4096, 4096)],
        };
        for (rows, inputs, outputs) in shapes {
            report(checker.quantise(&kernels, element, *rows, *inputs)?);
            report(checker.fp8_product(&kernels, element, *rows, *inputs, *outputs)?);
        }
    }
    Ok(())
}

/// A matrix in 8 bits with a scale a row, on the device and as numbers.
struct Quantised<M> {
    bits: M,
    scales: M,
    values: Vec<f64>,
}

impl<G: Gpu> Checker<'_, G> {
    fn quantise(
        &self,
        kernels: &Kernels<G>,
        element: Element,
        rows: usize,
        width: usize,
    ) -> Result<Check, GpuError> {
        let mut x = Stored::random(&mut Random::new(width as u64), element, rows * width, 5.0);
        // A row of zeros has no largest number.
        x.bits[..width].fill(0);
        let memory = self.upload(&x.bits)?;
        let (bits, scales) = (self.poisoned(rows * width)?, self.poisoned(rows * 4)?);
        let call = QuantiseRows { out: bits.span(), scales: scales.span(), x: memory.span(), rows, width };
        let seconds = self.run(|| kernels.quantise_rows(self.gpu, &self.stream, call))?;
        let found: Vec<u8> = self.download(bits.span())?;
        let found_scales: Vec<f32> = self.download(scales.span())?;
        let mut same = true;
        for row in compared(rows, (4 << 20) / width).chain([0]) {
            let x = x.values(row * width..(row + 1) * width);
            let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs() as f32));
            let scale = if largest > 0.0 { largest / 448.0 } else { 1.0 };
            let wanted = x.iter().map(|x| to_e4m3(f64::from(*x as f32 / scale)));
            same &= found_scales[row] == scale;
            same &= wanted.eq(found[row * width..(row + 1) * width].iter().copied());
        }
        Ok(Check {
            kernel: "quantise_rows",
            case: format!("{element:?}, {rows} rows of {width}"),
            error: exactly(same),
            tolerance: 0.0,
            bytes: (rows * width * 3) as u64,
            flops: 0,
            seconds,
        })
    }

    fn quantised(
        &self,
        kernels: &Kernels<G>,
        element: Element,
        rows: usize,
        width: usize,
        seed: u64,
    ) -> Result<Quantised<G::Memory>, GpuError> {
        let x = Stored::random(&mut Random::new(seed), element, rows * width, 1.0);
        let memory = self.upload(&x.bits)?;
        let (bits, scales) = (self.poisoned(rows * width)?, self.poisoned(rows * 4)?);
        let call = QuantiseRows { out: bits.span(), scales: scales.span(), x: memory.span(), rows, width };
        kernels.quantise_rows(self.gpu, &self.stream, call)?;
        let stored: Vec<u8> = self.download(bits.span())?;
        let row_scales: Vec<f32> = self.download(scales.span())?;
        let value = |(at, bits): (usize, &u8)| from_e4m3(*bits) * f64::from(row_scales[at / width]);
        let values = stored.iter().enumerate().map(value).collect();
        Ok(Quantised { bits, scales, values })
    }

    /// x * weights^T + bias through 8 bits, against the same product of the rounded numbers.
    #[allow(unsafe_code)]
    fn fp8_product(
        &self,
        kernels: &Kernels<G>,
        element: Element,
        rows: usize,
        inputs: usize,
        outputs: usize,
    ) -> Result<Check, GpuError> {
        // 8-bit products of cuBLASLt take any number of rows, and inputs and outputs in whole groups of 16.
        let x = self.quantised(kernels, element, rows, inputs, 1)?;
        let weights = self.quantised(kernels, element, outputs.next_multiple_of(16), inputs, 2)?;
        let outputs = outputs.next_multiple_of(16);
        let bias = Stored::random(&mut Random::new(3), element, outputs, 1.0);
        let bias_memory = self.upload(&bias.bits)?;
        let wide = self.poisoned(rows * outputs * 4)?;
        let out = self.poisoned(rows * outputs * 2)?;
        let product = Product {
            rows,
            inputs,
            outputs,
            x: x.bits.span(),
            weights: weights.bits.span(),
            bias: Span::NONE,
            out: wide.span(),
            format: Format::E4M3,
            out_format: Format::F32,
        };
        let scale = ScaleProduct {
            out: out.span(),
            product: wide.span(),
            row_scales: x.scales.span(),
            column_scales: weights.scales.span(),
            bias: bias_memory.span(),
            rows,
            columns: outputs,
        };
        let seconds = self.run(|| {
            // SAFETY: the memory lives until the result has been downloaded and the time taken.
            unsafe { self.gpu.multiply(&self.stream, &product)? };
            kernels.scale_product(self.gpu, &self.stream, scale)
        })?;
        let found = values_of(element, &self.download::<u16>(out.span())?);
        let mut error: f64 = 0.0;
        let bias = bias.values(0..outputs);
        for row in compared(rows, 4) {
            let x = &x.values[row * inputs..(row + 1) * inputs];
            let dot = |weights: &[f64]| x.iter().zip(weights).map(|(x, weight)| x * weight).sum::<f64>();
            let sums = weights.values.chunks_exact(inputs).map(dot);
            let wanted: Vec<f64> = sums.zip(&bias).map(|(sum, bias)| sum + bias).collect();
            error = error.max(difference(&found[row * outputs..(row + 1) * outputs], &wanted));
        }
        Ok(Check {
            kernel: "scale_product",
            case: format!("{element:?} through e4m3, {rows} x {inputs} x {outputs}"),
            error,
            tolerance: tolerance(element),
            bytes: (rows * inputs + outputs * inputs + rows * outputs * 10) as u64,
            flops: 2 * (rows * inputs * outputs) as u64,
            seconds,
        })
    }
}
