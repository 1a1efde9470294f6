//! The register tile with `vdpbf16ps`: two inputs of 16 outputs per instruction, activations in bf16.
//!
//! The instruction adds the second product of a pair, then the first, each rounded to nearest even with
//! denormals flushed (Intel SDM, VDPBF16PS), so that a sum is again one chain in a fixed order.

use std::arch::x86_64::*;

use super::PANEL;
use super::micro::Block;

/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL and BF16; the block's addresses are valid for its shapes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn tile(block: &Block) {
    macro_rules! rows {
        ($panel:expr, $($rows:literal)*) => {
            match block.rows {
                // SAFETY: the caller's.
                $($rows => unsafe { panel::<$rows>(block, $panel) },)*
                rows => unreachable!("no tile of {rows} rows"),
            }
        };
    }
    for index in 0..block.panels {
        rows!(index, 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// Operations of one round of [`rate`].
pub(in crate::cpu) const ROUND_FLOPS: usize = CHAINS * 16 * 4;
/// Independent sums: more than latency times ports, and no more than the registers hold.
const CHAINS: usize = 12;

/// Nothing but `vdpbf16ps` on registers, to measure how many the CPU does.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::cpu) unsafe fn rate(rounds: usize) -> f32 {
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    // SAFETY: any bits are bf16 numbers; these are small ones.
    let factor = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3c00)) };
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}

/// `R` rows by one panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn panel<const R: usize>(block: &Block, panel: usize) {
    // SAFETY: `Block` promises valid addresses; the CPU has the instructions.
    unsafe {
        let mut weights = block.weights.add(panel * block.panel_bytes);
        let mut x = block.x.cast::<i32>();
        let out = block.out.add(panel * PANEL);
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (r, row) in sums.iter_mut().enumerate() {
            for (v, sum) in row.iter_mut().enumerate() {
                if !block.first {
                    *sum = _mm512_loadu_ps(out.add(r * block.out_stride + v * 16));
                } else if !block.bias.is_null() {
                    *sum = _mm512_loadu_ps(block.bias.add(panel * PANEL + v * 16));
                }
            }
        }
        for _ in 0..block.inputs / 2 {
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(block.prefetch.even).cast());
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(block.prefetch.odd).cast());
            let pair = [_mm512_loadu_si512(weights.cast()), _mm512_loadu_si512(weights.add(64).cast())];
            for (r, row) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_epi32(*x.add(r));
                for (sum, weight) in row.iter_mut().zip(&pair) {
                    *sum = _mm512_dpbf16_ps(
                        *sum,
                        std::mem::transmute::<__m512i, __m512bh>(value),
                        std::mem::transmute::<__m512i, __m512bh>(*weight),
                    );
                }
            }
            weights = weights.add(PANEL * 4);
            x = x.add(R);
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(out.add(r * block.out_stride + v * 16), *sum);
            }
        }
    }
}
