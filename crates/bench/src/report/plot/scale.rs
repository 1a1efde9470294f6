//! From values to places on an axis, and where its ticks stand.

/// An axis from `min` to `max`, with `max` above `min`; a logarithmic one above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Linear { min: f64, max: f64 },
    Log { min: f64, max: f64 },
}

impl Scale {
    /// From 0 to a round number that is not below any of the values.
    pub fn from_zero(values: impl IntoIterator<Item = f64>) -> Self {
        let most = values.into_iter().filter(|value| value.is_finite()).fold(0.0, f64::max);
        if most <= 0.0 {
            return Self::Linear { min: 0.0, max: 1.0 };
        }
        // A little air above the highest value.
        let step = round_step(1.02 * most / 5.0);
        Self::Linear { min: 0.0, max: (1.02 * most / step).ceil() * step }
    }

    /// Around all the values, from 0 only if they come near it.
    pub fn around(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let from_zero = Self::from_zero(values);
        let (_, max) = from_zero.ends();
        if low.is_infinite() || low < 0.35 * max {
            return from_zero;
        }
        let step = round_step((max - low) / 5.0);
        Self::Linear { min: (0.98 * low / step).floor() * step, max }
    }

    /// Exactly these ends; where they do not make an axis, a little more.
    pub fn between(min: f64, max: f64) -> Self {
        match max > min && min.is_finite() && max.is_finite() {
            true => Self::Linear { min, max },
            false => Self::Linear { min: 0.0, max: 1.0 },
        }
    }

    /// Logarithmic, around all the values above 0, with some air; from 1 to 10 if there are none.
    pub fn log(values: impl IntoIterator<Item = f64>) -> Self {
        let positive = values.into_iter().filter(|value| value.is_finite() && *value > 0.0);
        let (min, max) =
            positive.fold((f64::INFINITY, 0.0_f64), |(min, max), value| (min.min(value), max.max(value)));
        if min > max {
            return Self::Log { min: 1.0, max: 10.0 };
        }
        Self::Log { min: min / 1.15, max: max * 1.15 }
    }

    /// 0 at the lower end, 1 at the upper; beyond the ends, the ends.
    pub fn place(self, value: f64) -> f64 {
        let place = match self {
            Self::Linear { min, max } => (value - min) / (max - min),
            Self::Log { min, max } => (value.max(min) / min).ln() / (max / min).ln(),
        };
        if place.is_finite() { place.clamp(0.0, 1.0) } else { 0.0 }
    }

    pub fn ends(self) -> (f64, f64) {
        match self {
            Self::Linear { min, max } | Self::Log { min, max } => (min, max),
        }
    }

    /// The values at equal distances on the axis, `count` spaces and their ends.
    pub fn edges(self, count: usize) -> Vec<f64> {
        let at = |share: f64| match self {
            Self::Linear { min, max } => min + share * (max - min),
            Self::Log { min, max } => min * (max / min).powf(share),
        };
        (0..=count).map(|edge| at(edge as f64 / count as f64)).collect()
    }

    /// Round values, about `wanted` of them.
    pub fn ticks(self, wanted: usize) -> Vec<f64> {
        match self {
            Self::Linear { min, max } => linear_ticks(min, max, wanted),
            Self::Log { min, max } => log_ticks(min, max, wanted),
        }
    }
}

/// The next of 1, 2, 5, 10, ... times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= step * 0.999).unwrap_or(10.0);
    factor * power
}

fn linear_ticks(min: f64, max: f64, wanted: usize) -> Vec<f64> {
    let step = round_step((max - min) / wanted.max(1) as f64);
    let (first, last) = ((min / step - 1e-9).ceil() as i64, (max / step + 1e-9).floor() as i64);
    (first..=last).map(|tick| tick as f64 * step).collect()
}

/// Powers of ten, with 2 and 5 times them, or all multiples, where the axis is short.
fn log_ticks(min: f64, max: f64, wanted: usize) -> Vec<f64> {
    let (first, last) = (min.log10().floor() as i32, max.log10().ceil() as i32);
    let with = |factors: &[f64]| -> Vec<f64> {
        let all = (first..=last).flat_map(|power| factors.iter().map(move |f| f * 10_f64.powi(power)));
        all.filter(|tick| (min..=max).contains(tick)).collect()
    };
    let choices: [&[f64]; 3] = [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]];
    let ticks = choices.into_iter().map(with).find(|ticks| ticks.len() >= wanted.min(4));
    // Less than an octave is as good as linear.
    ticks.unwrap_or_else(|| linear_ticks(min, max, wanted))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(ticks: &[f64]) -> Vec<String> {
        ticks
            .iter()
            .map(|tick| format!("{tick:.3}").trim_end_matches('0').trim_end_matches('.').into())
            .collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(shown(&Scale::between(0.0, 10.0).ticks(5)), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(shown(&Scale::between(0.0, 0.9).ticks(5)), ["0", "0.2", "0.4", "0.6", "0.8"]);
        let decades = Scale::Log { min: 0.5, max: 20_000.0 };
        assert_eq!(shown(&decades.ticks(6)), ["1", "10", "100", "1000", "10000"]);
        assert_eq!(shown(&Scale::Log { min: 8.0, max: 120.0 }.ticks(6)), ["10", "20", "50", "100"]);
    }

    #[test]
    fn an_axis_from_zero_ends_at_a_round_number() {
        assert_eq!(Scale::from_zero([3.0, 97.0]), Scale::Linear { min: 0.0, max: 100.0 });
        assert_eq!(Scale::from_zero([]), Scale::Linear { min: 0.0, max: 1.0 });
        assert_eq!(Scale::from_zero([f64::NAN, 0.0]), Scale::Linear { min: 0.0, max: 1.0 });
    }

    #[test]
    fn an_axis_around_values_leaves_out_what_is_far_from_them() {
        assert_eq!(Scale::around([90.0, 143.0]), Scale::Linear { min: 80.0, max: 150.0 });
        assert_eq!(Scale::around([9.0, 143.0]), Scale::Linear { min: 0.0, max: 150.0 });
        assert_eq!(Scale::around([]), Scale::Linear { min: 0.0, max: 1.0 });
    }

    #[test]
    fn edges_divide_the_axis() {
        assert_eq!(Scale::between(0.0, 4.0).edges(4), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(shown(&Scale::Log { min: 1.0, max: 16.0 }.edges(4)), ["1", "2", "4", "8", "16"]);
    }

    proptest! {
        #[test]
        fn ticks_are_few_and_on_the_axis(min in 1e-6_f64..1e6, factor in 1.001_f64..1e6) {
            for scale in [Scale::Linear { min, max: min * factor }, Scale::Log { min, max: min * factor }] {
                let ticks = scale.ticks(5);
                prop_assert!((1..=14).contains(&ticks.len()), "{scale:?}: {ticks:?}");
                let inside = |tick: &f64| *tick >= min * 0.999 && *tick <= min * factor * 1.001;
                prop_assert!(ticks.iter().all(inside), "{scale:?}: {ticks:?}");
            }
        }
    }
}
