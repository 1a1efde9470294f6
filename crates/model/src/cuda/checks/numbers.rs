//! Random numbers, formats, and the comparison.

use half::{bf16, f16};

use crate::cpu::random::Random;
use crate::cuda::kernels::Element;

impl Element {
    /// A number as it is stored.
    pub(super) fn bits(self, value: f64) -> u16 {
        match self {
            Self::BF16 => bf16::from_f64(value).to_bits(),
            Self::F16 => f16::from_f64(value).to_bits(),
        }
    }

    pub(super) fn value(self, bits: u16) -> f64 {
        match self {
            Self::BF16 => bf16::from_bits(bits).to_f64(),
            Self::F16 => f16::from_bits(bits).to_f64(),
        }
    }

    /// How far a stored result may be from the exact one, relative to the largest: two roundings, and
    /// those of probabilities or intermediate results.
    pub(super) fn tolerance(self) -> f64 {
        match self {
            Self::BF16 => 8e-3,
            Self::F16 => 2e-3,
        }
    }
}

/// Random numbers as they are stored, and their exact values.
pub(super) struct Stored {
    pub bits: Vec<u16>,
    pub values: Vec<f64>,
}

impl Stored {
    /// `count` numbers in `-scale..scale`.
    pub fn random(random: &mut Random, element: Element, count: usize, scale: f32) -> Self {
        let bits: Vec<u16> = (0..count).map(|_| element.bits(f64::from(random.value() * scale))).collect();
        let values = bits.iter().map(|bits| element.value(*bits)).collect();
        Self { bits, values }
    }
}

/// Values of stored numbers.
pub(super) fn values_of(element: Element, bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|bits| element.value(*bits)).collect()
}

/// The nearest e4m3 number, ties to even; beyond the range the largest, 448.
pub(super) fn to_e4m3(value: f64) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = value.abs().min(448.0);
    if magnitude == 0.0 {
        return sign;
    }
    let exponent = (magnitude.log2().floor() as i32).max(-6);
    let units = (magnitude * 2f64.powi(3 - exponent)).round_ties_even() as i32;
    // A unit too many carries into the exponent.
    sign | (units + ((exponent + 6) << 3)) as u8
}

/// The value of an e4m3 number.
pub(super) fn from_e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa * 2f64.powi(-9),
        _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// The largest difference relative to the largest value wanted; infinite if one is NaN or the lengths differ.
pub(super) fn difference(found: &[f64], wanted: &[f64]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let scale = wanted.iter().fold(1e-9, |scale: f64, value| scale.max(value.abs()));
    let largest = found.iter().zip(wanted).map(|(found, wanted)| (found - wanted).abs() / scale);
    // `max` of f64 would drop NaN.
    largest
        .fold(0.0, |most, error| if error.is_nan() || error > most { nan_is_infinite(error) } else { most })
}

fn nan_is_infinite(error: f64) -> f64 {
    if error.is_nan() { f64::INFINITY } else { error }
}

/// 0 if all hold, else infinite: for what has to be exact.
pub(super) fn exactly(holds: bool) -> f64 {
    if holds { 0.0 } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_numbers_survive_and_others_are_rounded_to_even() {
        for bits in (0..=255u8).filter(|bits| bits & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(from_e4m3(bits)), bits, "{}", from_e4m3(bits));
        }
        let cases = [(1.0625, 1.0), (1.1875, 1.25), (460.0, 448.0), (1e9, 448.0), (-1e9, -448.0)];
        for (value, rounded) in cases {
            assert_eq!(from_e4m3(to_e4m3(value)), rounded, "{value}");
        }
        // Below the smallest normal number, 2^-6, in steps of 2^-9.
        assert_eq!(from_e4m3(to_e4m3(2f64.powi(-9) * 2.5)), 2f64.powi(-8));
        assert_eq!(from_e4m3(to_e4m3(2f64.powi(-11))), 0.0);
        assert!(from_e4m3(to_e4m3(f64::NAN)).is_nan());
    }

    #[test]
    fn nan_and_missing_numbers_are_infinitely_wrong() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(difference(&[f64::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[2.0, f64::NAN, 1.0], &[2.0, 1.0, 1.0]), f64::INFINITY);
        assert_eq!(difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
