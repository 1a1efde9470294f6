use half::{bf16, f16};

use super::*;
use crate::cpu::test_support::{Random, assert_close, kernels_of_all_levels};

/// A matrix in one of the formats, and the weights that it holds exactly.
struct Case {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

impl Case {
    fn new(random: &mut Random, len: usize) -> Self {
        let f32 = random.vec(len);
        let f16 = f32.iter().map(|value| f16::from_f32(*value)).collect();
        let bf16 = f32.iter().map(|value| bf16::from_f32(*value)).collect();
        Self { f32, f16, bf16 }
    }

    fn rows(&self, format: Format) -> WeightRows<'_> {
        match format {
            Format::F32 => WeightRows::F32(&self.f32),
            Format::F16 => WeightRows::F16(&self.f16),
            Format::Bf16 => WeightRows::BF16(&self.bf16),
        }
    }

    fn exact(&self, format: Format) -> Vec<f32> {
        match format {
            Format::F32 => self.f32.clone(),
            Format::F16 => self.f16.iter().map(|value| value.to_f32()).collect(),
            Format::Bf16 => self.bf16.iter().map(|value| value.to_f32()).collect(),
        }
    }
}

const FORMATS: [Format; 3] = [Format::F32, Format::F16, Format::Bf16];

/// Inputs, outputs: less than a panel or a pair, tails of both, several panels, several blocks of inputs.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 5), (16, 32), (33, 31), (70, 45), (64, 256), (576, 100), (129, 400), (4133, 70)];

fn plain(x: &[f32], weights: &[f32], inputs: usize, bias: Option<&[f32]>, rounds: bool) -> Vec<f32> {
    let round = |value: f32| f64::from(if rounds { bf16::from_f32(value).to_f32() } else { value });
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        for (output, weights) in weights.chunks(inputs).enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            let sum = x.iter().zip(weights).map(|(x, w)| round(*x) * f64::from(*w)).sum::<f64>();
            out.push((sum + bias) as f32);
        }
    }
    out
}

fn product(matrix: &PackedMatrix, kernels: &Kernels, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let rows = x.len() / matrix.in_features();
    let mut out = vec![f32::NAN; rows * matrix.out_features()];
    matrix.matmul(kernels, x, rows, bias, &mut out);
    out
}

#[test]
fn products_match_the_plain_loop() {
    for kernels in kernels_of_all_levels(2) {
        let mut random = Random::new(7);
        for (inputs, outputs) in SHAPES {
            let case = Case::new(&mut random, inputs * outputs);
            let bias = random.vec(outputs);
            for format in FORMATS {
                let matrix = PackedMatrix::pack(&kernels, &[case.rows(format)], inputs);
                assert_eq!((matrix.in_features(), matrix.out_features()), (inputs, outputs));
                let rounds = format == Format::Bf16 && kernels.level().rounds_activations();
                for rows in [1, 2, 3, 5, 7, 12, 13, 17, 32, 50] {
                    if inputs * outputs * rows > 4_000_000 {
                        continue;
                    }
                    let x = random.vec(rows * inputs);
                    for bias in [None, Some(&bias[..])] {
                        let want = plain(&x, &case.exact(format), inputs, bias, rounds);
                        assert_close(&product(&matrix, &kernels, &x, bias), &want, 2e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn every_tile_height_matches_the_plain_loop() {
    for kernels in kernels_of_all_levels(1) {
        let mut random = Random::new(8);
        let (inputs, outputs) = (37, 67);
        let case = Case::new(&mut random, inputs * outputs);
        for format in FORMATS {
            let matrix = PackedMatrix::pack(&kernels, &[case.rows(format)], inputs);
            let rounds = format == Format::Bf16 && kernels.level().rounds_activations();
            for rows in 1..=33 {
                let x = random.vec(rows * inputs);
                let want = plain(&x, &case.exact(format), inputs, None, rounds);
                assert_close(&product(&matrix, &kernels, &x, None), &want, 2e-5);
            }
        }
    }
}

/// The "same answer" contract: bits, not tolerances.
#[test]
fn a_row_is_the_same_to_the_bit_in_any_batch_and_on_any_number_of_threads() {
    let pools: Vec<_> = [1, 2, 3].into_iter().map(kernels_of_all_levels).collect();
    for (level, alone) in pools[0].iter().enumerate() {
        let mut random = Random::new(9);
        for (inputs, outputs) in SHAPES {
            let case = Case::new(&mut random, inputs * outputs);
            let bias = random.vec(outputs);
            let x = random.vec(50 * inputs);
            for format in FORMATS {
                let matrix = PackedMatrix::pack(alone, &[case.rows(format)], inputs);
                let one = |row: &[f32]| product(&matrix, alone, row, Some(&bias));
                let want: Vec<u32> = x.chunks(inputs).flat_map(one).map(f32::to_bits).collect();
                for kernels in pools.iter().map(|pool| &pool[level]) {
                    for rows in [1, 2, 4, 7, 16, 31, 50] {
                        let out = product(&matrix, kernels, &x[..rows * inputs], Some(&bias));
                        let bits: Vec<u32> = out.into_iter().map(f32::to_bits).collect();
                        assert!(bits == want[..rows * outputs], "{inputs} {outputs} {format:?} {rows}");
                    }
                }
            }
        }
    }
}

#[test]
fn parts_are_concatenated_and_mixed_types_become_f32() {
    for kernels in kernels_of_all_levels(2) {
        let mut random = Random::new(10);
        let inputs = 48;
        let parts = [40, 7, 33].map(|outputs| Case::new(&mut random, outputs * inputs));
        let x = random.vec(3 * inputs);
        for formats in [[Format::Bf16; 3], [Format::F16; 3], [Format::F32; 3], FORMATS] {
            let rows: Vec<_> = parts.iter().zip(formats).map(|(part, format)| part.rows(format)).collect();
            let exact: Vec<_> =
                parts.iter().zip(formats).flat_map(|(part, format)| part.exact(format)).collect();
            let matrix = PackedMatrix::pack(&kernels, &rows, inputs);
            assert_eq!(matrix.out_features(), 80);
            let rounds = formats == [Format::Bf16; 3] && kernels.level().rounds_activations();
            assert_close(
                &product(&matrix, &kernels, &x, None),
                &plain(&x, &exact, inputs, None, rounds),
                2e-5,
            );
            for (index, row) in exact.chunks(inputs).enumerate() {
                let mut out = vec![f32::NAN; inputs];
                matrix.copy_row(index, &mut out);
                assert_eq!(out, row);
            }
        }
    }
}

#[test]
fn nothing_in_is_nothing_out() {
    let (kernels, _) = Kernels::select(2);
    let matrix = PackedMatrix::pack(&kernels, &[], 8);
    matrix.matmul(&kernels, &[0.0; 16], 2, None, &mut []);
    let matrix = PackedMatrix::pack(&kernels, &[WeightRows::F32(&[1.0; 16])], 8);
    matrix.matmul(&kernels, &[], 0, None, &mut []);
}

/// A value that is not finite stays in its own row.
#[test]
fn nan_does_not_spread_to_other_rows() {
    for kernels in kernels_of_all_levels(1) {
        let mut random = Random::new(11);
        let case = Case::new(&mut random, 40 * 40);
        let mut x = random.vec(20 * 40);
        x[5 * 40 + 3] = f32::NAN;
        for format in FORMATS {
            let matrix = PackedMatrix::pack(&kernels, &[case.rows(format)], 40);
            let out = product(&matrix, &kernels, &x, None);
            for (row, out) in out.chunks(40).enumerate() {
                assert_eq!(out.iter().all(|out| out.is_nan()), row == 5);
                assert_eq!(out.iter().any(|out| out.is_nan()), row == 5);
            }
        }
    }
}
