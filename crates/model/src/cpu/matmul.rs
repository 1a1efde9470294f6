//! Products with packed weights: `out = x W^T + bias`.
//!
//! The weights are packed once into panels of 32 outputs, so that a kernel reads them as one stream and
//! all rows of a batch share each load. Blocking for registers, L1 and L2 follows Goto and van de Geijn,
//! "Anatomy of High-Performance Matrix Multiplication" (2008), and Van Zee and van de Geijn, "BLIS"
//! (2015): a register tile of rows by outputs, activations packed per tile, and a group of panels that
//! stays in L2 while all rows pass over it, so that a step reads each weight from memory once.
//!
//! Each output is one chain of multiply-adds over the inputs in ascending order, whatever the number
//! of rows, the blocking or the threads.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod bf16_dot;
mod micro;
mod pack;

use super::buffer::{Buffer, SharedMut};
use super::level::{Kernels, Level};
use super::threads::split;
use micro::Block;

/// Outputs of a panel.
const PANEL: usize = 32;
/// Rows of the highest register tile.
const MOST_TILE_ROWS: usize = 32;
/// Inputs that a tile passes over at a time; larger products keep their sums in `out` between blocks.
const BLOCK_INPUTS: usize = 2048;
/// Weights that stay in L2 while all rows of a batch pass over them.
const GROUP_BYTES: usize = 256 << 10;

/// Rows of a weight matrix as checkpoints store it: row-major `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub enum WeightRows<'a> {
    F32(&'a [f32]),
    F16(&'a [half::f16]),
    BF16(&'a [half::bf16]),
}

impl WeightRows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    fn format(&self) -> Format {
        match self {
            Self::F32(_) => Format::F32,
            Self::F16(_) => Format::F16,
            Self::BF16(_) => Format::Bf16,
        }
    }
}

/// How a panel is laid out: `[in][32]`, for bf16 `[in / 2][32][2]`, so that one load serves two inputs
/// (and is what `vdpbf16ps` and AMX tiles take).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    F16,
    Bf16,
}

impl Format {
    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Inputs are padded with zeros to a multiple of this: pairs, or AMX tiles.
    fn input_multiple(self) -> usize {
        if self == Self::Bf16 { 32 } else { 2 }
    }
}

/// A weight matrix `[out, in]`, possibly several concatenated along `out`, packed for products.
#[derive(Debug)]
pub struct PackedMatrix {
    format: Format,
    in_features: usize,
    out_features: usize,
    /// `in_features`, padded; see [`Format::input_multiple`].
    depth: usize,
    data: Buffer,
}

impl PackedMatrix {
    /// Packs `parts`, each row-major `[out, in_features]`, one below the other. The element type is kept;
    /// parts of different types become f32, which holds them all exactly.
    ///
    /// # Panics
    /// If `in_features` is 0 or a part is not a whole number of rows.
    pub fn pack(kernels: &Kernels, parts: &[WeightRows<'_>], in_features: usize) -> Self {
        assert!(in_features > 0, "a matrix needs at least one input");
        for part in parts {
            let len = part.len();
            assert!(len.is_multiple_of(in_features), "{len} weights are no rows of {in_features}");
        }
        let format = parts.first().map_or(Format::F32, WeightRows::format);
        let format = if parts.iter().all(|part| part.format() == format) { format } else { Format::F32 };
        let out_features = parts.iter().map(|part| part.len() / in_features).sum::<usize>();
        let depth = in_features.next_multiple_of(format.input_multiple());
        let data = Buffer::zeroed(out_features.div_ceil(PANEL) * PANEL * depth * format.bytes());
        let mut matrix = Self { format, in_features, out_features, depth, data };
        pack::weights(kernels, parts, &mut matrix);
        matrix
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Memory held, and read once by each product.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Writes row `index` of the matrix, `[in]`, to `out`: the embedding of a token where the table is
    /// also the last product's matrix.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length.
    pub fn copy_row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.out_features, "row {index} of {}", self.out_features);
        assert_eq!(out.len(), self.in_features, "out must be [in]");
        // SAFETY: the panel exists and holds `depth` inputs of 32 outputs in this format.
        unsafe { pack::weight_row_out(self, index, out) };
    }

    fn panel_bytes(&self) -> usize {
        PANEL * self.depth * self.format.bytes()
    }

    /// `out = x W^T + bias`, with `x` `[rows, in]` and `out` `[rows, out]`, both row-major.
    ///
    /// # Panics
    /// If a slice has another length than these shapes say.
    pub fn matmul(&self, kernels: &Kernels, x: &[f32], rows: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        assert_eq!(x.len(), rows * self.in_features, "x must be [rows, in]");
        assert_eq!(out.len(), rows * self.out_features, "out must be [rows, out]");
        assert!(bias.is_none_or(|bias| bias.len() == self.out_features), "bias must be [out]");
        if rows == 0 || self.out_features == 0 {
            return;
        }
        let path = Path::of(kernels.level(), self.format);
        let tiles = Tiles::new(rows, path.tile_rows(kernels.level()));
        if rows == 1 && path == Path::Widen && self.depth == self.in_features {
            // One row is its own packing.
            return self.run_groups(kernels, path, tiles, x.as_ptr().cast(), bias, out);
        }
        kernels.with_scratch(path.packed_bytes(tiles, self.depth), |packed| {
            pack::activations(kernels, path, tiles, x, self, packed);
            self.run_groups(kernels, path, tiles, packed, bias, out);
        });
    }

    fn run_groups(
        &self,
        kernels: &Kernels,
        path: Path,
        tiles: Tiles,
        packed: *const u8,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let panels = self.out_features.div_ceil(PANEL);
        let block_bytes = PANEL * self.depth.min(BLOCK_INPUTS) * self.format.bytes();
        let threads = kernels.pool().threads();
        let most = (GROUP_BYTES / block_bytes).max(1);
        let groups = (threads * panels.div_ceil(threads * most)).min(panels);
        let product = Product {
            matrix: self,
            path,
            tiles,
            packed,
            bias,
            out: SharedMut::new(out),
            level: kernels.level(),
        };
        kernels.pool().run(groups, &|group| product.run(split(panels, groups, group)));
    }
}

/// Which kernel multiplies, and with it how activations are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// Weights widened to f32; activations f32, `[in][rows of the tile]`.
    Widen,
    /// `vdpbf16ps`; activations bf16 pairs, `[in / 2][rows of the tile][2]`.
    Dot,
    /// AMX; activations bf16, `[in / 32][rows of the tile][32]`.
    Amx,
}

impl Path {
    fn of(level: Level, format: Format) -> Self {
        match level {
            Level::Amx if format == Format::Bf16 => Self::Amx,
            Level::Avx512Bf16 if format == Format::Bf16 => Self::Dot,
            _ => Self::Widen,
        }
    }

    fn tile_rows(self, level: Level) -> usize {
        if self == Self::Amx { MOST_TILE_ROWS } else { level.tile_rows() }
    }

    fn packed_bytes(self, tiles: Tiles, depth: usize) -> usize {
        tiles.rows * depth * if self == Self::Widen { 4 } else { 2 }
    }
}

/// The rows of a batch, in tiles of nearly equal height.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    rows: usize,
    count: usize,
}

impl Tiles {
    fn new(rows: usize, most: usize) -> Self {
        Self { rows, count: rows.div_ceil(most) }
    }

    fn range(self, tile: usize) -> std::ops::Range<usize> {
        split(self.rows, self.count, tile)
    }
}

/// One product in progress, shared by the threads.
struct Product<'a> {
    matrix: &'a PackedMatrix,
    path: Path,
    tiles: Tiles,
    /// Packed activations, tile after tile.
    packed: *const u8,
    bias: Option<&'a [f32]>,
    out: SharedMut<f32>,
    level: Level,
}

// SAFETY: `packed` is only read; `out` is written by panel, and each panel belongs to one task.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes a group of panels for all rows.
    fn run(&self, panels: std::ops::Range<usize>) {
        let depth = self.matrix.depth;
        let mut start = 0;
        while start < depth {
            let inputs = start..depth.min(start + BLOCK_INPUTS);
            start = inputs.end;
            // Few tiles: a panel serves all tiles while the next one is on its way from memory. Many:
            // a tile stays in L1 while it passes over the group in L2.
            if self.tiles.count <= 4 {
                self.panels_then_tiles(panels.clone(), &inputs);
            } else {
                for tile in 0..self.tiles.count {
                    self.tile(panels.clone(), &inputs, tile);
                }
            }
        }
    }

    fn panels_then_tiles(&self, panels: std::ops::Range<usize>, inputs: &std::ops::Range<usize>) {
        let step = if self.tiles.count == 1 { panels.len() } else { 1 };
        let mut first = panels.start;
        while first < panels.end {
            for tile in 0..self.tiles.count {
                self.tile(first..first + step, inputs, tile);
            }
            first += step;
        }
    }

    /// One tile of rows over some panels and one block of inputs.
    fn tile(&self, panels: std::ops::Range<usize>, inputs: &std::ops::Range<usize>, tile: usize) {
        let rows = self.tiles.range(tile);
        let matrix = self.matrix;
        let whole = panels.end.min(matrix.out_features / PANEL).max(panels.start);
        if whole > panels.start {
            let bias = self.bias.map_or(std::ptr::null(), |bias| bias[panels.start * PANEL..].as_ptr());
            // SAFETY: row and column are within `out`; this task alone writes these panels' columns.
            let out = unsafe { self.out.get().add(rows.start * matrix.out_features + panels.start * PANEL) };
            self.call(panels.start..whole, inputs, tile, bias, out, matrix.out_features);
        }
        if whole < panels.end {
            self.last_panel(whole, inputs, tile);
        }
    }

    /// The panel that has fewer than 32 outputs, by way of a full one.
    fn last_panel(&self, panel: usize, inputs: &std::ops::Range<usize>, tile: usize) {
        let rows = self.tiles.range(tile);
        let stride = self.matrix.out_features;
        let columns = stride - panel * PANEL;
        let mut full_bias = [0.0; PANEL];
        if let Some(bias) = self.bias {
            full_bias[..columns].copy_from_slice(&bias[panel * PANEL..]);
        }
        let mut full = [0.0f32; MOST_TILE_ROWS * PANEL];
        // SAFETY: row and column are within `out`; this task alone touches this panel's columns.
        let row_of = |row: usize| unsafe {
            std::slice::from_raw_parts_mut(
                self.out.get().add((rows.start + row) * stride + panel * PANEL),
                columns,
            )
        };
        if inputs.start > 0 {
            for row in 0..rows.len() {
                full[row * PANEL..][..columns].copy_from_slice(row_of(row));
            }
        }
        let bias = if self.bias.is_some() { full_bias.as_ptr() } else { std::ptr::null() };
        self.call(panel..panel + 1, inputs, tile, bias, full.as_mut_ptr(), PANEL);
        for row in 0..rows.len() {
            row_of(row).copy_from_slice(&full[row * PANEL..][..columns]);
        }
    }

    fn call(
        &self,
        panels: std::ops::Range<usize>,
        inputs: &std::ops::Range<usize>,
        tile: usize,
        bias: *const f32,
        out: *mut f32,
        out_stride: usize,
    ) {
        let matrix = self.matrix;
        let rows = self.tiles.range(tile);
        let element = if self.path == Path::Widen { 4 } else { 2 };
        let panel_bytes = matrix.panel_bytes();
        let block_bytes = PANEL * inputs.len() * matrix.format.bytes();
        let block = Block {
            // SAFETY: within the packed weights, and within the packed activations.
            weights: unsafe {
                matrix
                    .data
                    .as_ptr()
                    .add(panels.start * panel_bytes + inputs.start * PANEL * matrix.format.bytes())
            },
            panel_bytes,
            panels: panels.len(),
            // SAFETY: as above.
            x: unsafe { self.packed.add((rows.start * matrix.depth + inputs.start * rows.len()) * element) },
            rows: rows.len(),
            inputs: inputs.len(),
            out,
            out_stride,
            bias,
            first: inputs.start == 0,
            prefetch: Prefetch::of(self.tiles, tile, block_bytes),
        };
        match self.path {
            Path::Widen => micro::tile(self.level, &block, matrix.format),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path is chosen only at levels that have the instructions.
            Path::Dot => unsafe { bf16_dot::tile(&block) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Path::Amx => unsafe { amx::tile(&block) },
            #[cfg(not(target_arch = "x86_64"))]
            Path::Dot | Path::Amx => unreachable!("these levels are never available here"),
        }
    }
}

/// Where a tile asks for weights ahead, in bytes after those it reads, for even and for odd cache
/// lines: with one tile a little ahead in the stream; with more the next panel, of which the first
/// tile fetches one half and the second the other; 0 where there is nothing to do.
#[derive(Clone, Copy, Debug)]
struct Prefetch {
    even: usize,
    odd: usize,
}

impl Prefetch {
    /// Of one stream, and of each of four.
    const NEAR: usize = 8192;
    const NEAR_OF_FOUR: usize = 2048;

    fn of(tiles: Tiles, tile: usize, block_bytes: usize) -> Self {
        match (tiles.count, tile) {
            (1, _) => {
                let near = if tiles.rows == 1 { Self::NEAR_OF_FOUR } else { Self::NEAR };
                Self { even: near, odd: near + 64 }
            }
            (_, 0) => Self { even: block_bytes, odd: 0 },
            (_, 1) => Self { even: 0, odd: block_bytes + 64 },
            _ => Self { even: 0, odd: 0 },
        }
    }
}

#[cfg(test)]
mod tests;
