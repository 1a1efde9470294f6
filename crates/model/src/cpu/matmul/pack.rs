//! Packing: weights once at load, activations once per product.

use std::cell::RefCell;

use half::{bf16, f16};

use super::{Format, PANEL, PackedMatrix, Path, Tiles, WeightRows};
use crate::cpu::buffer::SharedMut;
use crate::cpu::level::{Kernels, Level};
use crate::cpu::simd::{Operation, Simd};

/// Activations below this many are packed by the caller's thread alone.
const ALONE: usize = 32 << 10;

/// Fills `matrix.data`, zeroed before, with `parts`.
pub(super) fn weights(kernels: &Kernels, parts: &[WeightRows<'_>], matrix: &mut PackedMatrix) {
    let rows = row_slices(parts, matrix.in_features);
    let format = matrix.format;
    let panel_bytes = matrix.panel_bytes();
    let data = SharedMut::from_ptr(matrix.data.as_mut_ptr());
    let panels: Vec<_> = rows.chunks(PANEL).collect();
    kernels.pool().run(panels.len(), &|index| {
        // SAFETY: each task has its own panel, and the buffer holds all panels.
        let panel = unsafe { data.get().add(index * panel_bytes) };
        for (column, row) in panels[index].iter().enumerate() {
            // SAFETY: as above; `depth` is at least the row's length.
            unsafe { weight_row(*row, format, panel, column) };
        }
    });
}

fn row_slices<'a>(parts: &[WeightRows<'a>], in_features: usize) -> Vec<WeightRows<'a>> {
    let mut rows = Vec::new();
    for part in parts {
        match part {
            WeightRows::F32(values) => rows.extend(values.chunks(in_features).map(WeightRows::F32)),
            WeightRows::F16(values) => rows.extend(values.chunks(in_features).map(WeightRows::F16)),
            WeightRows::BF16(values) => rows.extend(values.chunks(in_features).map(WeightRows::BF16)),
        }
    }
    rows
}

/// Writes one output's weights into its column of a panel.
///
/// # Safety
/// `panel` has room for the row's inputs, and `column < 32`.
unsafe fn weight_row(row: WeightRows<'_>, format: Format, panel: *mut u8, column: usize) {
    // SAFETY: the caller's.
    unsafe {
        match (row, format) {
            (WeightRows::BF16(row), Format::Bf16) => {
                for (input, value) in row.iter().enumerate() {
                    let at = (input / 2) * PANEL * 2 + column * 2 + input % 2;
                    panel.cast::<bf16>().add(at).write(*value);
                }
            }
            (WeightRows::F16(row), Format::F16) => {
                for (input, value) in row.iter().enumerate() {
                    panel.cast::<f16>().add(input * PANEL + column).write(*value);
                }
            }
            (WeightRows::F32(row), _) => f32_column(row.iter().copied(), panel, column),
            (WeightRows::F16(row), _) => f32_column(row.iter().map(|value| value.to_f32()), panel, column),
            (WeightRows::BF16(row), _) => f32_column(row.iter().map(|value| value.to_f32()), panel, column),
        }
    }
}

/// # Safety
/// As [`weight_row`].
unsafe fn f32_column(row: impl Iterator<Item = f32>, panel: *mut u8, column: usize) {
    for (input, value) in row.enumerate() {
        // SAFETY: the caller's.
        unsafe { panel.cast::<f32>().add(input * PANEL + column).write(value) };
    }
}

/// The inverse of packing, for one output.
///
/// # Safety
/// The matrix has that row, and `out` its inputs.
pub(super) unsafe fn weight_row_out(matrix: &PackedMatrix, row: usize, out: &mut [f32]) {
    let column = row % PANEL;
    // SAFETY: the caller's.
    unsafe {
        let panel = matrix.data.as_ptr().add(row / PANEL * matrix.panel_bytes());
        for (input, value) in out.iter_mut().enumerate() {
            *value = match matrix.format {
                Format::F32 => *panel.cast::<f32>().add(input * PANEL + column),
                Format::F16 => (*panel.cast::<f16>().add(input * PANEL + column)).to_f32(),
                Format::Bf16 => {
                    let at = (input / 2) * PANEL * 2 + column * 2 + input % 2;
                    (*panel.cast::<bf16>().add(at)).to_f32()
                }
            };
        }
    }
}

/// Packs `x` `[rows, in]` into `packed`, tile after tile, inputs padded with zeros.
pub(super) fn activations(
    kernels: &Kernels,
    path: Path,
    tiles: Tiles,
    x: &[f32],
    matrix: &PackedMatrix,
    packed: *mut u8,
) {
    let (inputs, depth, level) = (matrix.in_features, matrix.depth, kernels.level());
    let element = if path == Path::Widen { 4 } else { 2 };
    let packed = SharedMut::from_ptr(packed);
    let pack = |tile: usize| {
        let rows = tiles.range(tile);
        let source = &x[rows.start * inputs..rows.end * inputs];
        let (count, offset) = (rows.len(), rows.start * depth * element);
        // SAFETY: tiles are disjoint, the scratch holds `rows * depth` elements and is aligned, and any
        // bits are values of these types.
        unsafe {
            let target = packed.get().add(offset);
            match path {
                Path::Widen => {
                    let out = std::slice::from_raw_parts_mut(target.cast::<f32>(), count * depth);
                    level.run(Columns { x: source, inputs, rows: count, out });
                }
                Path::Dot => bf16_pairs(level, source, inputs, depth, count, target),
                Path::Amx => {
                    let out = std::slice::from_raw_parts_mut(target.cast::<u16>(), count * depth);
                    level.run(RoundedTiles { x: source, inputs, rows: count, out });
                }
            }
        }
    };
    if x.len() < ALONE {
        (0..tiles.count).for_each(pack);
    } else {
        kernels.pool().run(tiles.count, &pack);
    }
}

/// `[rows, inputs]` to `[inputs][rows]`, and zeros after that.
struct Columns<'a> {
    x: &'a [f32],
    inputs: usize,
    rows: usize,
    out: &'a mut [f32],
}

impl Operation for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, inputs, rows, out } = self;
        assert!(x.len() == rows * inputs && out.len() >= x.len(), "shapes of the tile");
        let whole = inputs - inputs % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES` inputs exist in each row, and as many columns in `out`.
            unsafe { s.transpose(x.as_ptr().add(at), inputs, rows, out.as_mut_ptr().add(at * rows)) };
        }
        for at in whole..inputs {
            for row in 0..rows {
                out[at * rows + row] = x[row * inputs + at];
            }
        }
        out[inputs * rows..].fill(0.0);
    }
}

/// `[rows, inputs]` to `[rows][depth]` in bf16.
struct Rounded<'a> {
    x: &'a [f32],
    inputs: usize,
    depth: usize,
    out: &'a mut [u16],
}

impl Operation for Rounded<'_> {
    type Output = ();

    /// Plain Rust: the compiler vectorises it for the level.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (source, target) in self.x.chunks_exact(self.inputs).zip(self.out.chunks_exact_mut(self.depth)) {
            let (values, padding) = target.split_at_mut(self.inputs);
            for (target, value) in values.iter_mut().zip(source) {
                *target = round_to_bf16(*value);
            }
            padding.fill(0);
        }
    }
}

/// `[rows, inputs]` to `[inputs / 32][rows][32]` in bf16, zeros after the last input: what an AMX instruction takes
/// lies together, whatever the number of inputs.
struct RoundedTiles<'a> {
    x: &'a [f32],
    inputs: usize,
    rows: usize,
    out: &'a mut [u16],
}

impl Operation for RoundedTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        const WIDTH: usize = 32;
        let Self { x, inputs, rows, out } = self;
        for (row, source) in x.chunks_exact(inputs).enumerate() {
            for (block, values) in source.chunks(WIDTH).enumerate() {
                let target = &mut out[(block * rows + row) * WIDTH..][..WIDTH];
                for (target, value) in target.iter_mut().zip(values) {
                    *target = round_to_bf16(*value);
                }
                target[values.len()..].fill(0);
            }
        }
    }
}

/// To nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
    (bits >> 16) as u16
}

/// `[rows, inputs]` to `[depth / 2][rows][2]` in bf16: rows of pairs, transposed as if each were an f32.
///
/// # Safety
/// `target` is aligned and holds `rows * depth` elements.
unsafe fn bf16_pairs(level: Level, x: &[f32], inputs: usize, depth: usize, rows: usize, target: *mut u8) {
    ROUNDED.with_borrow_mut(|rounded| {
        rounded.resize(rows * depth / 2, 0.0);
        // SAFETY: `depth` is even, so these are the same bytes.
        let halves =
            unsafe { std::slice::from_raw_parts_mut(rounded.as_mut_ptr().cast::<u16>(), rows * depth) };
        level.run(Rounded { x, inputs, depth, out: halves });
        // SAFETY: the caller's.
        let out = unsafe { std::slice::from_raw_parts_mut(target.cast::<f32>(), rows * depth / 2) };
        level.run(Columns { x: rounded, inputs: depth / 2, rows, out });
    });
}

thread_local! {
    /// Rounded activations of a tile, two to an f32, before they are transposed.
    static ROUNDED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_support::{Random, kernels_of_all_levels};

    #[test]
    fn rounding_is_that_of_half() {
        let mut random = Random::new(5);
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45];
        let bits = (0..100_000).map(|_| f32::from_bits(random.next() as u32));
        for value in bits.chain(special).filter(|value| !value.is_nan()) {
            assert_eq!(round_to_bf16(value), bf16::from_f32(value).to_bits(), "{value}");
        }
        assert!(bf16::from_bits(round_to_bf16(f32::NAN)).is_nan());
        assert!(bf16::from_bits(round_to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn tiles_are_transposed_and_rounded_as_plain_loops_do() {
        for kernels in kernels_of_all_levels(1) {
            let level = kernels.level();
            for rows in 1..=level.tile_rows() {
                for inputs in [1, 8, 16, 31, 64, 100] {
                    let x = Random::new(6).vec(rows * inputs);
                    let depth = inputs.next_multiple_of(32);
                    let value = |row: usize, at: usize| if at < inputs { x[row * inputs + at] } else { 0.0 };
                    let mut out = vec![f32::NAN; rows * depth];
                    level.run(Columns { x: &x, inputs, rows, out: &mut out });
                    for at in 0..depth {
                        for row in 0..rows {
                            assert_eq!(out[at * rows + row], value(row, at));
                        }
                    }
                    let mut tiles = vec![u16::MAX; rows * depth];
                    level.run(RoundedTiles { x: &x, inputs, rows, out: &mut tiles });
                    for at in 0..depth {
                        for row in 0..rows {
                            let found = tiles[(at / 32 * rows + row) * 32 + at % 32];
                            assert_eq!(found, round_to_bf16(value(row, at)));
                        }
                    }
                    // SAFETY: `out` holds twice what is written.
                    unsafe { bf16_pairs(level, &x, inputs, depth, rows, out.as_mut_ptr().cast()) };
                    for at in 0..depth {
                        for row in 0..rows {
                            let pair = out[at / 2 * rows + row].to_bits();
                            let half = (pair >> (16 * (at % 2))) as u16;
                            assert_eq!(half, round_to_bf16(value(row, at)));
                        }
                    }
                }
            }
        }
    }
}
