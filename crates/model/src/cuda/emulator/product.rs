//! Matrix products, as plainly as can be.

use half::{bf16, f16};

use super::super::gpu::{Format, Product};

/// The product as work for a stream. The addresses were checked, and live as [`super::Gpu`] asks for.
pub fn prepare(product: &Product<'_>) -> Box<dyn Fn() + Send + Sync> {
    let (rows, inputs, outputs) = (product.rows, product.inputs, product.outputs);
    let (format, out_format) = (product.format, product.out_format);
    let [x, weights, bias, out] =
        [product.x, product.weights, product.bias, product.out].map(|span| span.address());
    Box::new(move || {
        let x = read(x, rows * inputs, format);
        let weights = read(weights, outputs * inputs, format);
        let bias = if bias == 0 { vec![0.0; outputs] } else { read(bias, outputs, out_format) };
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            for (column, (weights, bias)) in weights.chunks_exact(inputs).zip(&bias).enumerate() {
                let sum: f32 = x.iter().zip(weights).map(|(x, weight)| x * weight).sum();
                write(out, row * outputs + column, out_format, sum + bias);
            }
        }
    })
}

fn read(address: u64, count: usize, format: Format) -> Vec<f32> {
    // SAFETY: see `prepare`; formats with 2 and 4 bytes are aligned as the allocation is.
    unsafe {
        match format {
            Format::BF16 => slice::<bf16>(address, count).iter().map(|x| x.to_f32()).collect(),
            Format::F16 => slice::<f16>(address, count).iter().map(|x| x.to_f32()).collect(),
            Format::F32 => slice::<f32>(address, count).to_vec(),
            Format::E4M3 => slice::<u8>(address, count).iter().map(|x| e4m3(*x)).collect(),
        }
    }
}

unsafe fn slice<'a, T>(address: u64, count: usize) -> &'a [T] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts(address as *const T, count) }
}

fn write(address: u64, index: usize, format: Format, value: f32) {
    // SAFETY: see `prepare`.
    unsafe {
        match format {
            Format::BF16 => *(address as *mut bf16).add(index) = bf16::from_f32(value),
            Format::F16 => *(address as *mut f16).add(index) = f16::from_f32(value),
            Format::F32 => *(address as *mut f32).add(index) = value,
            Format::E4M3 => unreachable!("products give no 8-bit numbers"),
        }
    }
}

/// 4 bits of exponent with bias 7, 3 of mantissa, no infinity.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}
