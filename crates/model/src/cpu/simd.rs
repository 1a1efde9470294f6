//! One vocabulary of vector operations over the instruction sets, so that each kernel is written once.
//!
//! A value of a [`Simd`] type is the proof that the CPU has the instructions: [`Level::run`] makes one
//! after detection, inside a function compiled with those instructions enabled, and every kernel is
//! inlined into such a function. Both AVX levels and aarch64 use fused multiply-add, so a chain of
//! them gives the same bits at all three.
//!
//! [`Level::run`]: super::level::Level::run
#![allow(unsafe_code)]

/// A kernel, generic over the vector instructions. `run` must be `#[inline(always)]`, and so must
/// everything that it calls with `S`.
pub(super) trait Operation {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vectors of `LANES` f32. Loads and stores are unaligned.
pub(super) trait Simd: Copy {
    type V: Copy;
    const LANES: usize;
    /// Rows of the register tile of a product; with two vectors a row its sums fill most registers.
    const TILE_ROWS: usize;

    /// Asks for the cache line at `p`, which need not be a valid address.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        let _ = p;
    }
    fn splat(self, value: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once (except on x86 without FMA).
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// 2 to the power of `a`, an integer in -126..=127.
    fn exp2_integer(self, a: Self::V) -> Self::V;
    /// 0 where `test < bound`, else `a` (also where `test` is NaN).
    fn keep_from(self, test: Self::V, bound: f32, a: Self::V) -> Self::V;

    /// # Safety
    /// `LANES` f32 can be read at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` f32 can be written at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// # Safety
    /// `LANES` f16 can be read at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// `LANES` bf16 can be read at `p`.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// The low (first) bf16 of each of `LANES` pairs.
    /// # Safety
    /// `LANES` pairs of bf16 can be read at `p`.
    unsafe fn load_bf16_first(self, p: *const u32) -> Self::V;
    /// The high (second) bf16 of each of `LANES` pairs.
    /// # Safety
    /// `LANES` pairs of bf16 can be read at `p`.
    unsafe fn load_bf16_second(self, p: *const u32) -> Self::V;

    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Writes `LANES` columns of `rows` rows, `stride` apart, as `[LANES][rows]`; `rows` is at most
    /// `LANES`.
    ///
    /// # Safety
    /// `LANES` f32 can be read in each row, and `LANES * rows` written at `out`.
    #[inline(always)]
    unsafe fn transpose(self, source: *const f32, stride: usize, rows: usize, out: *mut f32) {
        for row in 0..rows {
            for lane in 0..Self::LANES {
                // SAFETY: the caller's.
                unsafe { *out.add(lane * rows + row) = *source.add(row * stride + lane) };
            }
        }
    }

    /// Sum of the lanes, in a fixed order: halves are folded onto each other.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = self.to_array(v);
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// The greatest lane.
    #[inline(always)]
    fn maximum(self, v: Self::V) -> f32 {
        self.to_array(v)[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; 16] {
        const { assert!(Self::LANES <= 16) };
        let mut lanes = [0.0; 16];
        // SAFETY: at most 16 lanes are written.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes
    }
}

/// e to the power of `x`, within 2 units in the last place; 0 below -87.3 (so that a masked score
/// counts exactly nothing). Cody-Waite reduction and the polynomial of Cephes' `expf`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "the constants are quoted as published")]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.376_26;
    const COEFFICIENTS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // The variable stands second in both, so that NaN goes through.
    let raised = s.max(s.splat(LOWEST), x);
    let bounded = s.sub(s.zero(), s.max(s.splat(-HIGHEST), s.sub(s.zero(), raised)));
    let n = s.round(s.mul(bounded, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_375), bounded);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut polynomial = s.splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        polynomial = s.fma(polynomial, r, s.splat(*coefficient));
    }
    let value = s.add(s.fma(polynomial, s.mul(r, r), r), s.splat(1.0));
    s.keep_from(x, LOWEST, s.mul(value, s.exp2_integer(n)))
}

/// Plain Rust, for any CPU: arrays that the compiler may vectorise with what the target always has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain;

impl Plain {
    #[inline(always)]
    fn zip(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
        std::array::from_fn(|lane| f(a[lane], b[lane]))
    }
}

impl Simd for Plain {
    type V = [f32; 8];
    const LANES: usize = 8;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; 8]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // As the x86 instruction: the second operand where either is NaN.
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Without hardware support `mul_add` is a slow library call.
        #[cfg(target_arch = "aarch64")]
        return std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]));
        #[cfg(not(target_arch = "aarch64"))]
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // Adding and subtracting 1.5 * 2^23 rounds to even; exact for |a| < 2^22.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|a| (a + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn exp2_integer(self, a: Self::V) -> Self::V {
        a.map(|a| f32::from_bits(((a as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn keep_from(self, test: Self::V, bound: f32, a: Self::V) -> Self::V {
        Self::zip(test, a, |test, a| if test < bound { 0.0 } else { a })
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u32) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }.map(|pair| f32::from_bits(pair << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_second(self, p: *const u32) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }.map(|pair| f32::from_bits(pair & 0xffff_0000))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// AVX2, FMA and F16C: 8 lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2(());

    impl Avx2 {
        /// # Safety
        /// The CPU has avx2, fma and f16c, and the caller is compiled with them.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }
    }

    macro_rules! vector_ops {
        ($($name:ident($($arg:ident: $kind:ty),*) -> $out:ty = $body:expr;)*) => {
            $(#[inline(always)]
            fn $name(self, $($arg: $kind),*) -> $out {
                // SAFETY: `self` proves that the CPU has the instructions.
                unsafe { $body }
            })*
        };
    }
    macro_rules! memory_ops {
        ($($name:ident($($arg:ident: $kind:ty),*) -> $out:ty = $body:expr;)*) => {
            $(#[inline(always)]
            unsafe fn $name(self, $($arg: $kind),*) -> $out {
                // SAFETY: `self` proves that the CPU has the instructions, the caller vouches for
                // the memory.
                unsafe { $body }
            })*
        };
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const TILE_ROWS: usize = 6;
        vector_ops! {
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            splat(value: f32) -> __m256 = _mm256_set1_ps(value);
            add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
            mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
            max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            round(a: __m256) -> __m256 =
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            exp2_integer(a: __m256) -> __m256 = {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            keep_from(test: __m256, bound: f32, a: __m256) -> __m256 =
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(test, _mm256_set1_ps(bound)), a);
        }
        memory_ops! {
            load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
            store(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
            load_f16(p: *const u16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            load_bf16(p: *const u16) -> __m256 = {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            load_bf16_first(p: *const u32) -> __m256 =
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(p.cast())));
            load_bf16_second(p: *const u32) -> __m256 = {
                let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(p.cast()), mask))
            };
        }
    }

    /// AVX-512 F, BW, DQ and VL: 16 lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512(());

    impl Avx512 {
        /// # Safety
        /// The CPU has avx512f, avx512bw, avx512dq and avx512vl, and the caller is compiled with them.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const TILE_ROWS: usize = 12;
        vector_ops! {
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            splat(value: f32) -> __m512 = _mm512_set1_ps(value);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            round(a: __m512) -> __m512 =
                _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            exp2_integer(a: __m512) -> __m512 = {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            };
            keep_from(test: __m512, bound: f32, a: __m512) -> __m512 =
                _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(test, _mm512_set1_ps(bound)), a);
        }
        memory_ops! {
            load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
            store(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
            load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
            load_bf16(p: *const u16) -> __m512 = {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            };
            load_bf16_first(p: *const u32) -> __m512 =
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(p.cast())));
            load_bf16_second(p: *const u32) -> __m512 = {
                let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p.cast()), mask))
            };
            transpose(source: *const f32, stride: usize, rows: usize, out: *mut f32) -> () = {
                let mut square = [_mm512_setzero_ps(); 16];
                for (row, vector) in square.iter_mut().enumerate() {
                    if row < rows {
                        *vector = _mm512_loadu_ps(source.add(row * stride));
                    }
                }
                let columns = transpose_16(square);
                let mask = u16::MAX >> (16 - rows);
                for (column, vector) in columns.iter().enumerate() {
                    _mm512_mask_storeu_ps(out.add(column * rows), mask, *vector);
                }
            };
        }
    }

    /// 16 rows of 16 become 16 columns: pairs, then fours within each 128-bit quarter, then quarters.
    #[inline(always)]
    unsafe fn transpose_16(rows: [__m512; 16]) -> [__m512; 16] {
        // SAFETY: the caller's: the CPU has AVX-512.
        unsafe {
            let mut pairs = rows;
            for at in (0..16).step_by(2) {
                pairs[at] = _mm512_unpacklo_ps(rows[at], rows[at + 1]);
                pairs[at + 1] = _mm512_unpackhi_ps(rows[at], rows[at + 1]);
            }
            let mut fours = pairs;
            for at in (0..16).step_by(4) {
                let (a, b) = (_mm512_castps_pd(pairs[at]), _mm512_castps_pd(pairs[at + 1]));
                let (c, d) = (_mm512_castps_pd(pairs[at + 2]), _mm512_castps_pd(pairs[at + 3]));
                fours[at] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                fours[at + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                fours[at + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                fours[at + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            let mut columns = fours;
            for at in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(fours[at], fours[4 + at]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(fours[at], fours[4 + at]);
                let more_even = _mm512_shuffle_f32x4::<0x88>(fours[8 + at], fours[12 + at]);
                let more_odd = _mm512_shuffle_f32x4::<0xdd>(fours[8 + at], fours[12 + at]);
                columns[at] = _mm512_shuffle_f32x4::<0x88>(even, more_even);
                columns[4 + at] = _mm512_shuffle_f32x4::<0x88>(odd, more_odd);
                columns[8 + at] = _mm512_shuffle_f32x4::<0xdd>(even, more_even);
                columns[12 + at] = _mm512_shuffle_f32x4::<0xdd>(odd, more_odd);
            }
            columns
        }
    }
}
