//! Rotary position embedding: the frequencies of every scaling kind, as transformers computes them.

use std::f32::consts::PI;

/// How positions become angles. Validated by [`crate::config`].
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Ways to stretch the context beyond the trained one.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Su et al. 2021, RoFormer, section 3.4.2.
    Default,
    /// Every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    Linear { factor: f64 },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, smooth between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: f64 },
    /// Peng et al. 2023, YaRN, sections 3.2 to 3.4.
    Yarn(YarnConfig),
}

/// The parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct YarnConfig {
    pub factor: f64,
    pub original_context: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// Multiplies both sine and cosine.
    pub attention_factor: f64,
    /// Round the bounds of the ramp to whole dimensions.
    pub truncate: bool,
}

impl YarnConfig {
    /// The attention factor where the checkpoint names none: `0.1 ln(factor) + 1`, or the quotient
    /// of two such terms if both `mscale` and `mscale_all_dim` are given.
    pub fn default_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
        let term = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        match (mscale, mscale_all_dim) {
            (Some(over), Some(under)) if over != 0.0 && under != 0.0 => term(over) / term(under),
            _ => term(1.0),
        }
    }
}

/// Angles of a model: `angle[i] = position * frequencies[i]`, sine and cosine times `amplitude`.
/// Dimension `i` of a head is rotated with dimension `i + head_dim / 2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[head_dim / 2]`
    pub frequencies: Vec<f32>,
    pub amplitude: f32,
}

impl Rope {
    /// The frequencies for heads of `head_dim` (even) dimensions.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let base = base_frequencies(config.theta, head_dim);
        match &config.scaling {
            RopeScaling::Default => Self { frequencies: base, amplitude: 1.0 },
            RopeScaling::Linear { factor } => {
                Self { frequencies: base.iter().map(|f| f / *factor as f32).collect(), amplitude: 1.0 }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let scale =
                    |f: &f32| llama3(*f, *factor, *low_freq_factor, *high_freq_factor, *original_context);
                Self { frequencies: base.iter().map(scale).collect(), amplitude: 1.0 }
            }
            RopeScaling::Yarn(yarn) => Self {
                frequencies: yarn_frequencies(yarn, config.theta, head_dim),
                amplitude: yarn.attention_factor as f32,
            },
        }
    }

    /// Writes cosines and sines of one position, each `[head_dim / 2]`.
    pub fn fill(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = (position as f32 * frequency).sin_cos();
            *cos = c * self.amplitude;
            *sin = s * self.amplitude;
        }
    }
}

/// `theta^(-2i / head_dim)` in f32, as transformers rounds it.
fn base_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    wavelengths(theta, head_dim).iter().map(|w| 1.0 / w).collect()
}

fn wavelengths(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim).step_by(2).map(|i| (theta as f32).powf(i as f32 / head_dim as f32)).collect()
}

fn llama3(frequency: f32, factor: f64, low: f64, high: f64, context: f64) -> f32 {
    let (factor, low, high, context) = (factor as f32, low as f32, high as f32, context as f32);
    let wavelength = 2.0 * PI / frequency;
    if wavelength < context / high {
        frequency
    } else if wavelength > context / low {
        frequency / factor
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// Blends interpolated and original frequencies with a linear ramp over the dimensions.
fn yarn_frequencies(yarn: &YarnConfig, theta: f64, head_dim: usize) -> Vec<f32> {
    let dim = head_dim as f64;
    let dimension_of = |rotations: f64| {
        dim * (yarn.original_context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let (low, width) = (low as f32, (high - low) as f32);
    let blend = |(i, wavelength): (usize, &f32)| {
        let ramp = ((i as f32 - low) / width).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        (1.0 / (yarn.factor as f32 * wavelength)) * (1.0 - keep) + (1.0 / wavelength) * keep
    };
    wavelengths(theta, head_dim).iter().enumerate().map(blend).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_frequencies_are_a_geometric_series() {
        let rope = Rope::new(&RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default }, 8);
        for (i, expected) in [1.0, 0.1, 0.01, 0.001].into_iter().enumerate() {
            assert!((rope.frequencies[i] / expected - 1.0_f32).abs() < 1e-6);
        }
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = Rope::new(&RopeConfig { theta: 500_000.0, scaling: RopeScaling::Default }, 128);
        let scaled = Rope::new(&RopeConfig { theta: 500_000.0, scaling }, 128);
        assert_eq!(plain.frequencies[0], scaled.frequencies[0]);
        assert_eq!(plain.frequencies[63] / 8.0, scaled.frequencies[63]);
    }

    #[test]
    fn attention_factor_of_yarn() {
        let expected = 0.1 * 4.0_f64.ln() + 1.0;
        assert_eq!(YarnConfig::default_attention_factor(4.0, None, None), expected);
        assert_eq!(YarnConfig::default_attention_factor(4.0, Some(1.0), Some(1.0)), 1.0);
        assert_eq!(YarnConfig::default_attention_factor(0.5, None, None), 1.0);
    }
}
