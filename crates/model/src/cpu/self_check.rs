//! A small problem at start: does the chosen level agree with plain loops on this very machine?
//!
//! Not every level can be run where it is developed, and a wrong kernel must not serve a model.

use half::{bf16, f16};

use super::elementwise::{rms_norm, silu_mul};
use super::level::Kernels;
use super::matmul::{PackedMatrix, WeightRows};
use super::random::Random;

/// Says what disagreed.
pub(super) fn check(kernels: &Kernels) -> Result<(), String> {
    let (inputs, outputs) = (70, 45);
    let mut random = Random::new(1);
    let weights = random.vec(inputs * outputs);
    let half: Vec<f16> = weights.iter().map(|weight| f16::from_f32(*weight)).collect();
    let brain: Vec<bf16> = weights.iter().map(|weight| bf16::from_f32(*weight)).collect();
    let bias = random.vec(outputs);
    let exact = |rounded: &mut dyn Iterator<Item = f32>| rounded.collect::<Vec<f32>>();
    let cases = [
        ("f32", WeightRows::F32(&weights), exact(&mut weights.iter().copied())),
        ("f16", WeightRows::F16(&half), exact(&mut half.iter().map(|weight| weight.to_f32()))),
        ("bf16", WeightRows::BF16(&brain), exact(&mut brain.iter().map(|weight| weight.to_f32()))),
    ];
    for (name, rows, plain) in cases {
        let matrix = PackedMatrix::pack(kernels, &[rows], inputs);
        let rounds = name == "bf16" && kernels.level().rounds_activations();
        for count in [1, 5, 17] {
            let x = random.vec(count * inputs);
            let mut out = vec![f32::NAN; count * outputs];
            matrix.matmul(kernels, &x, count, Some(&bias), &mut out);
            let want = product(&x, &plain, &bias, rounds);
            compare(&format!("{name} product of {count} rows"), &out, &want, 1e-4)?;
        }
    }
    elementwise(kernels, &mut random)
}

fn elementwise(kernels: &Kernels, random: &mut Random) -> Result<(), String> {
    let (x, weight) = (random.vec(70), random.vec(35));
    let mut out = vec![f32::NAN; 35];
    rms_norm(kernels, &x[..35], &weight, 1e-5, &mut out);
    let square = x[..35].iter().map(|x| x * x).sum::<f32>() / 35.0 + 1e-5;
    let want: Vec<_> = x.iter().zip(&weight).map(|(x, weight)| x / square.sqrt() * weight).collect();
    compare("norm", &out, &want, 1e-4)?;
    silu_mul(kernels, &x, 35, &mut out);
    let want: Vec<_> = x.iter().zip(&x[35..]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    compare("gate", &out, &want, 1e-4)
}

fn product(x: &[f32], weights: &[f32], bias: &[f32], rounds: bool) -> Vec<f32> {
    let inputs = weights.len() / bias.len();
    let activation = |x: f32| if rounds { bf16::from_f32(x).to_f32() } else { x };
    let row = |x: &[f32]| -> Vec<f32> {
        let dot = |weights: &[f32]| x.iter().zip(weights).map(|(x, w)| activation(*x) * w).sum::<f32>();
        weights.chunks(inputs).zip(bias).map(|(weights, bias)| dot(weights) + bias).collect()
    };
    x.chunks(inputs).flat_map(row).collect()
}

fn compare(what: &str, out: &[f32], want: &[f32], tolerance: f32) -> Result<(), String> {
    let scale = want.iter().fold(1e-6f32, |scale, want| scale.max(want.abs()));
    for (out, want) in out.iter().zip(want) {
        let error = (out - want).abs() / scale;
        // Written so that NaN fails.
        if !matches!(error.partial_cmp(&tolerance), Some(std::cmp::Ordering::Less)) {
            return Err(format!("{what}: {out} where plain loops give {want}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::level::Level;
    use crate::cpu::limits::bf16_dots_pay;

    #[test]
    fn every_available_level_passes() {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            let kernels = Kernels::with_level(level, 1).expect("just detected");
            assert_eq!(check(&kernels), Ok(()), "{}", level.name());
        }
    }

    #[test]
    fn a_difference_is_told() {
        assert!(compare("norm", &[1.0, 2.0], &[1.0, 2.1], 1e-4).unwrap_err().contains("norm: 2 where"));
        assert!(compare("norm", &[f32::NAN], &[1.0], 1e-4).is_err());
    }

    #[test]
    fn the_fastest_available_level_is_selected() {
        let (kernels, passed_over) = Kernels::select(1);
        let pays = |level: Level| level != Level::Avx512Bf16 || bf16_dots_pay(1);
        let best = Level::ALL.into_iter().find(|level| level.is_available() && pays(*level));
        assert_eq!(Some(kernels.level()), best);
        assert!(passed_over.is_empty(), "{passed_over:?}");
    }
}
