//! The register tile: some rows by 32 outputs, over one block of inputs, weights widened to f32.

use std::marker::PhantomData;

use super::{Format, PANEL, Prefetch};
use crate::cpu::level::Level;
use crate::cpu::simd::{Operation, Simd};

/// One tile of rows, some panels, one block of inputs: what every product kernel gets. All addresses
/// are valid for the shapes given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// The first panel, at the first input of the block.
    pub weights: *const u8,
    pub panel_bytes: usize,
    pub panels: usize,
    /// Packed activations of the tile, at the first input of the block.
    pub x: *const u8,
    pub rows: usize,
    /// Even.
    pub inputs: usize,
    /// The tile's first row, the first panel's first column.
    pub out: *mut f32,
    pub out_stride: usize,
    /// Of the first panel; null for none.
    pub bias: *const f32,
    /// Whether sums start from the bias, or from what `out` holds.
    pub first: bool,
    pub prefetch: Prefetch,
}

/// How two consecutive inputs of a panel are read.
trait Pairs {
    /// Bytes of two inputs times 32 outputs.
    const BYTES: usize;
    /// Inputs `2k` and `2k + 1` of the outputs from `column` on.
    ///
    /// # Safety
    /// `p` points at a pair of a panel; `column + LANES <= 32`.
    unsafe fn first<S: Simd>(s: S, p: *const u8, column: usize) -> S::V;
    /// # Safety
    /// As `first`.
    unsafe fn second<S: Simd>(s: S, p: *const u8, column: usize) -> S::V;
}

struct F32;
struct F16;
struct Bf16;

impl Pairs for F32 {
    const BYTES: usize = 2 * PANEL * 4;
    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load(p.cast::<f32>().add(column)) }
    }
    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load(p.cast::<f32>().add(PANEL + column)) }
    }
}

impl Pairs for F16 {
    const BYTES: usize = 2 * PANEL * 2;
    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_f16(p.cast::<u16>().add(column)) }
    }
    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_f16(p.cast::<u16>().add(PANEL + column)) }
    }
}

impl Pairs for Bf16 {
    const BYTES: usize = 2 * PANEL * 2;
    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_first(p.cast::<u32>().add(column)) }
    }
    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, p: *const u8, column: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_second(p.cast::<u32>().add(column)) }
    }
}

/// The product of one block, with the vectors of the level.
pub(super) fn tile(level: Level, block: &Block, format: Format) {
    match format {
        Format::F32 => all_panels::<F32>(level, block),
        Format::F16 => all_panels::<F16>(level, block),
        Format::Bf16 => all_panels::<Bf16>(level, block),
    }
}

fn all_panels<W: Pairs>(level: Level, block: &Block) {
    macro_rules! panels {
        ($run:ident, $rows:literal) => {
            (0..block.panels).for_each(|panel| level.$run(Tile::<W, $rows, 1>::new(block, panel)))
        };
    }
    match block.rows {
        1 => one_row::<W>(level, block),
        2 => panels!(run, 2),
        3 => panels!(run, 3),
        4 => panels!(run, 4),
        5 => panels!(run_avx, 5),
        6 => panels!(run_avx, 6),
        7 => panels!(run_avx512, 7),
        8 => panels!(run_avx512, 8),
        9 => panels!(run_avx512, 9),
        10 => panels!(run_avx512, 10),
        11 => panels!(run_avx512, 11),
        12 => panels!(run_avx512, 12),
        rows => unreachable!("no tile of {rows} rows"),
    }
}

/// With one row several panels go side by side, so that enough chains of additions are in flight.
fn one_row<W: Pairs>(level: Level, block: &Block) {
    let mut panel = 0;
    while panel < block.panels {
        match block.panels - panel {
            1 => level.run(Tile::<W, 1, 1>::new(block, panel)),
            2 | 3 => level.run(Tile::<W, 1, 2>::new(block, panel)),
            _ => level.run(Tile::<W, 1, 4>::new(block, panel)),
        }
        panel += match block.panels - panel {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
    }
}

/// `R` rows by `P` panels, from `panel` on.
struct Tile<'a, W, const R: usize, const P: usize> {
    block: &'a Block,
    panel: usize,
    weights: PhantomData<W>,
}

impl<'a, W, const R: usize, const P: usize> Tile<'a, W, R, P> {
    fn new(block: &'a Block, panel: usize) -> Self {
        Self { block, panel, weights: PhantomData }
    }
}

impl<W: Pairs, const R: usize, const P: usize> Operation for Tile<'_, W, R, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut column = 0;
        while column < PANEL {
            // SAFETY: the block's addresses are valid for its shapes; the columns are within the panel.
            unsafe { columns::<S, W, R, P, 2>(s, self.block, self.panel, column) };
            column += 2 * S::LANES;
        }
    }
}

/// `R` rows by `P` panels by `V` vectors, the sums in registers.
#[inline(always)]
unsafe fn columns<S: Simd, W: Pairs, const R: usize, const P: usize, const V: usize>(
    s: S,
    block: &Block,
    panel: usize,
    column: usize,
) {
    // SAFETY: `Block` promises valid addresses; panels, rows and columns stay within its shapes.
    unsafe {
        let mut weights = block.weights.add(panel * block.panel_bytes);
        let mut x = block.x.cast::<f32>();
        let out = block.out.add(panel * PANEL + column);
        let mut sums = [[[s.zero(); V]; P]; R];
        for (r, row) in sums.iter_mut().enumerate() {
            for (p, sums) in row.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    let offset = p * PANEL + v * S::LANES;
                    if !block.first {
                        *sum = s.load(out.add(r * block.out_stride + offset));
                    } else if !block.bias.is_null() {
                        *sum = s.load(block.bias.add(panel * PANEL + column + offset));
                    }
                }
            }
        }
        for _ in 0..block.inputs / 2 {
            for p in 0..P {
                let line = weights.wrapping_add(p * block.panel_bytes);
                for pair_line in 0..W::BYTES / 128 {
                    s.prefetch(line.wrapping_add(block.prefetch.even + pair_line * 128));
                    s.prefetch(line.wrapping_add(block.prefetch.odd + pair_line * 128));
                }
            }
            multiply_add::<S, W, R, P, V, 0>(s, &mut sums, x, weights, block.panel_bytes, column);
            multiply_add::<S, W, R, P, V, 1>(s, &mut sums, x, weights, block.panel_bytes, column);
            weights = weights.add(W::BYTES);
            x = x.add(2 * R);
        }
        for (r, row) in sums.iter().enumerate() {
            for (p, sums) in row.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    s.store(out.add(r * block.out_stride + p * PANEL + v * S::LANES), *sum);
                }
            }
        }
    }
}

/// Input `I` of a pair, of all rows, times that input of all outputs.
#[inline(always)]
unsafe fn multiply_add<S: Simd, W: Pairs, const R: usize, const P: usize, const V: usize, const I: usize>(
    s: S,
    sums: &mut [[[S::V; V]; P]; R],
    x: *const f32,
    weights: *const u8,
    panel_bytes: usize,
    column: usize,
) {
    let mut wide = [[s.zero(); V]; P];
    for (p, wide) in wide.iter_mut().enumerate() {
        for (v, wide) in wide.iter_mut().enumerate() {
            // SAFETY: the caller's: panel and column are within the block.
            *wide = unsafe {
                let pair = weights.add(p * panel_bytes);
                let column = column + v * S::LANES;
                if I == 0 { W::first(s, pair, column) } else { W::second(s, pair, column) }
            };
        }
    }
    for (r, row) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's: `x` holds a pair of inputs of R rows.
        let value = s.splat(unsafe { *x.add(I * R + r) });
        for (sums, wide) in row.iter_mut().zip(&wide) {
            for (sum, weight) in sums.iter_mut().zip(wide) {
                *sum = s.fma(value, *weight, *sum);
            }
        }
    }
}
