//! Packing: weights once at load, activations once per product.

use half::{bf16, f16};

use super::{Format, PANEL, PackedMatrix, Path, Tiles, WeightRows};
use crate::cpu::buffer::SharedMut;
use crate::cpu::level::Kernels;

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
    let (inputs, depth) = (matrix.in_features, matrix.depth);
    let element = if path == Path::Widen { 4 } else { 2 };
    let packed = SharedMut::from_ptr(packed);
    let pack = |tile: usize| {
        let rows = tiles.range(tile);
        let source = &x[rows.start * inputs..rows.end * inputs];
        // SAFETY: tiles are disjoint, and the scratch holds `rows * depth` elements.
        unsafe {
            let target = packed.get().add(rows.start * depth * element);
            match path {
                Path::Widen => columns(source, inputs, depth, rows.len(), target.cast()),
                Path::Dot => bf16_pairs(source, inputs, depth, rows.len(), target.cast()),
                Path::Amx => bf16_rows(source, inputs, depth, target.cast()),
            }
        }
    };
    if x.len() < ALONE {
        (0..tiles.count).for_each(pack);
    } else {
        kernels.pool().run(tiles.count, &pack);
    }
}

/// `[rows, inputs]` to `[depth][rows]`.
unsafe fn columns(x: &[f32], inputs: usize, depth: usize, rows: usize, out: *mut f32) {
    // SAFETY: the caller's: `out` holds `depth * rows` values.
    let out = unsafe { std::slice::from_raw_parts_mut(out, depth * rows) };
    // Some inputs of all rows at a time, so that the lines written stay in L1.
    const STRIP: usize = 64;
    for start in (0..inputs).step_by(STRIP) {
        let end = inputs.min(start + STRIP);
        for (row, source) in x.chunks_exact(inputs).enumerate() {
            let targets = out[start * rows..end * rows].chunks_exact_mut(rows);
            for (target, value) in targets.zip(&source[start..end]) {
                target[row] = *value;
            }
        }
    }
    out[inputs * rows..].fill(0.0);
}

/// `[rows, inputs]` to `[depth / 2][rows][2]`.
unsafe fn bf16_pairs(x: &[f32], inputs: usize, depth: usize, rows: usize, out: *mut bf16) {
    // SAFETY: the caller's: `out` holds `depth * rows` values.
    let out = unsafe { std::slice::from_raw_parts_mut(out, depth * rows) };
    for (row, source) in x.chunks_exact(inputs).enumerate() {
        for (input, value) in source.iter().enumerate() {
            out[(input / 2) * rows * 2 + row * 2 + input % 2] = bf16::from_f32(*value);
        }
        for input in inputs..depth {
            out[(input / 2) * rows * 2 + row * 2 + input % 2] = bf16::ZERO;
        }
    }
}

/// `[rows, inputs]` to `[rows][depth]`.
unsafe fn bf16_rows(x: &[f32], inputs: usize, depth: usize, out: *mut bf16) {
    for (row, source) in x.chunks_exact(inputs).enumerate() {
        // SAFETY: the caller's: `out` holds `depth` values for each row.
        let target = unsafe { std::slice::from_raw_parts_mut(out.add(row * depth), depth) };
        for (target, value) in target.iter_mut().zip(source) {
            *target = bf16::from_f32(*value);
        }
        target[inputs..].fill(bf16::ZERO);
    }
}
