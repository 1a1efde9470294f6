//! Weights on their way from a file to the GPU.
//!
//! A mapped file's pages are copied, and converted where their format differs, into one of two page-locked
//! buffers while the GPU fetches the other: so reading, converting and the bus overlap, and no weight is in
//! host memory twice.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;

use super::gpu::{Gpu, GpuError, Pinned, Span};
use super::kernels::Element;
use crate::config::WeightDtype;
use crate::weights::TensorData;

/// Numbers of one buffer.
const CHUNK: usize = 8 << 20;
/// Numbers that one thread copies or converts.
const SHARE: usize = 1 << 18;

impl Element {
    pub fn dtype(self) -> WeightDtype {
        match self {
            Self::BF16 => WeightDtype::BF16,
            Self::F16 => WeightDtype::F16,
        }
    }

    /// The bits of a number, rounded to nearest even.
    pub fn rounded(self, value: f32) -> u16 {
        match self {
            Self::BF16 => bf16::from_f32(value).to_bits(),
            Self::F16 => f16::from_f32(value).to_bits(),
        }
    }
}

/// Two buffers that take turns.
pub struct Transfer<G: Gpu> {
    buffers: [G::Pinned; 2],
    turn: usize,
    pub bytes: u64,
}

impl<G: Gpu> Transfer<G> {
    /// # Errors
    /// If the host gives no page-locked memory.
    pub fn new(gpu: &G) -> Result<Self, GpuError> {
        Ok(Self { buffers: [gpu.pinned(2 * CHUNK)?, gpu.pinned(2 * CHUNK)?], turn: 0, bytes: 0 })
    }

    /// Puts a tensor's numbers on the GPU as `element`. They are there when the stream is done.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if `to` has another size; [`GpuError::Lost`].
    pub fn put(
        &mut self,
        gpu: &G,
        stream: &G::Stream,
        tensor: &TensorData<'_>,
        element: Element,
        to: Span<'_>,
    ) -> Result<(), GpuError> {
        let numbers = tensor.bytes.len() / tensor.dtype.bytes();
        if to.bytes() != 2 * numbers {
            let reason = format!("{} bytes for {numbers} numbers", to.bytes());
            return Err(GpuError::Refused { what: "weights".to_owned(), reason });
        }
        for first in (0..numbers).step_by(CHUNK) {
            let count = CHUNK.min(numbers - first);
            let from = &tensor.bytes[first * tensor.dtype.bytes()..(first + count) * tensor.dtype.bytes()];
            let buffer = &mut self.buffers[self.turn];
            // Waits for the copy that this buffer was used for before.
            convert(from, tensor.dtype, &mut buffer.bytes_mut()[..2 * count], element);
            gpu.upload_pinned(stream, buffer, 0..2 * count, to.part(2 * first..2 * (first + count)))?;
            self.turn = 1 - self.turn;
        }
        self.bytes += to.bytes() as u64;
        Ok(())
    }
}

/// `to` has two bytes for each number of `from`.
fn convert(from: &[u8], dtype: WeightDtype, to: &mut [u8], element: Element) {
    let width = dtype.bytes();
    from.par_chunks(SHARE * width).zip(to.par_chunks_mut(SHARE * 2)).for_each(|(from, to)| {
        if dtype == element.dtype() {
            to.copy_from_slice(from);
        } else {
            convert_share(from, dtype, to, element);
        }
    });
}

fn convert_share(from: &[u8], dtype: WeightDtype, to: &mut [u8], element: Element) {
    const AT_ONCE: usize = 256;
    let (mut values, mut bits) = ([0.0f32; AT_ONCE], [0u16; AT_ONCE]);
    let width = dtype.bytes();
    for (from, to) in from.chunks(AT_ONCE * width).zip(to.chunks_mut(AT_ONCE * 2)) {
        let count = from.len() / width;
        let (values, bits) = (&mut values[..count], &mut bits[..count]);
        if dtype == WeightDtype::F32 {
            for (value, bytes) in values.iter_mut().zip(from.chunks_exact(4)) {
                *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        } else {
            for (bits, bytes) in bits.iter_mut().zip(from.chunks_exact(2)) {
                *bits = u16::from_le_bytes([bytes[0], bytes[1]]);
            }
            match dtype {
                WeightDtype::BF16 => bits.reinterpret_cast::<bf16>().convert_to_f32_slice(values),
                WeightDtype::F16 | WeightDtype::F32 => {
                    bits.reinterpret_cast::<f16>().convert_to_f32_slice(values);
                }
            }
        }
        match element {
            Element::BF16 => bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
            Element::F16 => bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
        }
        for (bytes, bits) in to.chunks_exact_mut(2).zip(bits.iter()) {
            bytes.copy_from_slice(&bits.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    #[test]
    fn numbers_are_rounded_as_the_cpu_rounds_them() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.0137).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = TensorData { dtype: WeightDtype::F32, shape: vec![1000], bytes: Cow::Owned(bytes) };
        for dtype in [WeightDtype::F32, WeightDtype::F16, WeightDtype::BF16] {
            let stored = tensor.clone().convert(dtype);
            for element in [Element::BF16, Element::F16] {
                let mut found = vec![0; 2000];
                convert(&stored.bytes, dtype, &mut found, element);
                assert_eq!(
                    found,
                    stored.clone().convert(element.dtype()).bytes.as_ref(),
                    "{dtype:?} {element:?}"
                );
            }
        }
    }
}
