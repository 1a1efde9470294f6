//! Random numbers, formats, and the comparison.

use std::ops::Range;

use half::{bf16, f16};

use crate::cpu::random::Random;
use crate::cuda::kernels::Element;

/// A number as it is stored.
pub(super) fn to_bits(element: Element, value: f64) -> u16 {
    match element {
        Element::BF16 => bf16::from_f64(value).to_bits(),
        Element::F16 => f16::from_f64(value).to_bits(),
    }
}

/// The exact value of a stored number.
pub(super) fn from_bits(element: Element, bits: u16) -> f64 {
    match element {
        Element::BF16 => bf16::from_bits(bits).to_f64(),
        Element::F16 => f16::from_bits(bits).to_f64(),
    }
}

/// How far a stored result may be from the exact one, relative to the largest: two roundings, and those of
/// probabilities or intermediate results.
pub(super) fn tolerance(element: Element) -> f64 {
    match element {
        Element::BF16 => 8e-3,
        Element::F16 => 2e-3,
    }
}

/// Random numbers repeat after that many: more would take the CPU too long to make.
const PERIOD: usize = 1_048_583;

/// Random numbers as they are stored.
pub(super) struct Stored {
    element: Element,
    pub bits: Vec<u16>,
}

impl Stored {
    /// `count` numbers in `-scale..scale`.
    pub fn random(random: &mut Random, element: Element, count: usize, scale: f32) -> Self {
        let mut bits: Vec<u16> =
            (0..count.min(PERIOD)).map(|_| to_bits(element, f64::from(random.value() * scale))).collect();
        while bits.len() < count {
            bits.extend_from_within(..PERIOD.min(count - bits.len()));
        }
        Self { element, bits }
    }

    /// The exact values of some of them.
    pub fn values(&self, range: Range<usize>) -> Vec<f64> {
        values_of(self.element, &self.bits[range])
    }

    pub fn set(&mut self, at: usize, value: f64) {
        self.bits[at] = to_bits(self.element, value);
    }
}

/// The rows that are compared: all, or some from the last on where there are many.
pub(super) fn compared(rows: usize, most: usize) -> impl Iterator<Item = usize> {
    (0..rows).rev().step_by(rows.div_ceil(most.max(1)).max(1))
}

/// Values of stored numbers.
pub(super) fn values_of(element: Element, bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|bits| from_bits(element, *bits)).collect()
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
    fn long_inputs_repeat_and_long_outputs_are_sampled() {
        let stored = Stored::random(&mut Random::new(1), Element::BF16, PERIOD + 10, 1.0);
        assert_eq!(stored.values(PERIOD..PERIOD + 10), stored.values(0..10));
        assert_eq!(compared(3, 8).collect::<Vec<_>>(), [2, 1, 0]);
        assert_eq!(compared(10, 4).collect::<Vec<_>>(), [9, 6, 3, 0]);
        assert_eq!(compared(0, 4).count(), 0);
    }

    #[test]
    fn nan_and_missing_numbers_are_infinitely_wrong() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(difference(&[f64::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[2.0, f64::NAN, 1.0], &[2.0, 1.0, 1.0]), f64::INFINITY);
        assert_eq!(difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
