//! Plain numbers as the bytes that are uploaded, and back.
#![allow(unsafe_code)]

/// Types without padding whose every bit pattern is a value: they go to the GPU and come back as they stand
/// in memory.
///
/// # Safety
/// The type has no padding, no references, and no bit pattern that is not a value.
pub unsafe trait Words: Copy + Default {}

// SAFETY: plain numbers.
unsafe impl Words for u8 {}
// SAFETY: as above.
unsafe impl Words for u16 {}
// SAFETY: as above.
unsafe impl Words for u32 {}
// SAFETY: as above.
unsafe impl Words for f32 {}
// SAFETY: `repr(transparent)` around a u16.
unsafe impl Words for half::bf16 {}
// SAFETY: as above.
unsafe impl Words for half::f16 {}
// SAFETY: an array of u32 has no padding.
unsafe impl Words for [u32; 2] {}

/// The bytes of some numbers.
pub fn bytes_of<T: Words>(values: &[T]) -> &[u8] {
    // SAFETY: no padding, so that all bytes are initialised; bytes have no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of some numbers, to be overwritten.
pub fn bytes_of_mut<T: Words>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is a value.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_way() {
        let values = [1.5f32, -2.0, 0.25];
        let mut back = [0.0f32; 3];
        bytes_of_mut(&mut back).copy_from_slice(bytes_of(&values));
        assert_eq!(back, values);
        assert_eq!(bytes_of(&[1u32, 2]).len(), 8);
    }
}
