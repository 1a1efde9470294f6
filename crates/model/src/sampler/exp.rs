//! `e^x` that vectorises and gives the same bits on every machine, which the C library's need not.

/// `e^x` for `x <= 0`, to about two units in the last place; 0 below -87.
///
/// Splits off the power of two and approximates the rest by a polynomial of degree 6 (the method of
/// Cody and Waite 1980, chapter 6).
#[inline]
pub fn exp_nonpositive(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that the reduction is exact to more bits than an f32 holds.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to a whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.max(-87.0);
    let power = (clamped * LOG2_E + ROUND) - ROUND;
    let rest = (clamped - power * LN_2_HIGH) - power * LN_2_LOW;
    let mut sum = 1.0 / 720.0;
    for factor in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * rest + factor;
    }
    let scale = f32::from_bits((((power as i32) + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { sum * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_exponential() {
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let (found, expected) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 4e-7, "{x}: {found} against {expected}");
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        assert_eq!(exp_nonpositive(-88.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }
}
