//! Samples in numbers: moments, percentiles, intervals over repeats.
//!
//! Percentiles interpolate linearly between the two nearest ranks (Hyndman and Fan's type 7), as numpy does by
//! default and vLLM's benchmark with it.

use crate::result::{Distribution, Interval, Spread};

/// The value below which `percent` of the ascending `sorted` lie; 0 if there is none.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let rank = percent.clamp(0.0, 100.0) / 100.0 * last as f64;
    let below = rank.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (rank - below as f64)
}

/// All the numbers of a sample. Sorts it.
pub fn distribution(sample: &mut [f64]) -> Distribution {
    if sample.is_empty() {
        return Distribution::default();
    }
    sample.sort_unstable_by(f64::total_cmp);
    let mean = mean(sample);
    let variance = sample.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / sample.len() as f64;
    let at = |percent| percentile(sample, percent);
    Distribution {
        count: sample.len() as u64,
        mean,
        std: variance.sqrt(),
        min: at(0.0),
        p25: at(25.0),
        median: at(50.0),
        p75: at(75.0),
        p90: at(90.0),
        p95: at(95.0),
        p99: at(99.0),
        p99_9: at(99.9),
        max: at(100.0),
        percentiles: (0..=100).map(|percent| at(f64::from(percent))).collect(),
    }
}

/// Median and tail of a sample; `None` if it is empty. Sorts it.
pub fn spread(sample: &mut [f64]) -> Option<Spread> {
    if sample.is_empty() {
        return None;
    }
    sample.sort_unstable_by(f64::total_cmp);
    Some(Spread {
        median: percentile(sample, 50.0),
        p95: percentile(sample, 95.0),
        p99: percentile(sample, 99.0),
    })
}

/// 0 if the sample is empty.
pub fn mean(sample: &[f64]) -> f64 {
    if sample.is_empty() { 0.0 } else { sample.iter().sum::<f64>() / sample.len() as f64 }
}

/// Mean of independent repeats with its 95 % interval; `None` for fewer than two.
pub fn interval(repeats: &[f64]) -> Option<Interval> {
    let count = repeats.len();
    if count < 2 {
        return None;
    }
    let mean = mean(repeats);
    let variance = repeats.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
    let half_width = student_t(count - 1) * (variance / count as f64).sqrt();
    Some(Interval { mean, half_width, repeats: count as u32 })
}

/// The 95 % interval of the median of what the ascending `sorted` were drawn from, whatever its distribution; `None`
/// for fewer than six. Each value is below that median like a coin shows heads, so that binomial probabilities tell
/// which two values of the sample enclose it (David and Nagaraja, "Order Statistics", 7.1).
pub fn median_interval(sorted: &[f64]) -> Option<(f64, f64)> {
    let count = sorted.len();
    // Of so many heads, and of at most so many.
    let (mut exactly, mut at_most, mut heads) = (0.5_f64.powi(count as i32), 0.0, 0);
    while heads < count / 2 {
        at_most += exactly;
        if at_most > 0.025 {
            break;
        }
        exactly *= (count - heads) as f64 / (heads + 1) as f64;
        heads += 1;
    }
    (heads > 0).then(|| (sorted[heads - 1], sorted[count - heads]))
}

/// 97.5th percentile of Student's t distribution.
pub(crate) fn student_t(degrees_of_freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    // Beyond the table it is at most 0.08 above the normal distribution's, to which it falls like 1 / n.
    let beyond = || 1.960 + 2.46 / degrees_of_freedom as f64;
    TABLE.get(degrees_of_freedom.saturating_sub(1)).copied().unwrap_or_else(beyond)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `numpy.percentile([1, 2, 3, 4, 10], [0, 25, 50, 90, 99, 100])`, and `numpy.std`.
    #[test]
    fn percentiles_and_moments_are_those_of_numpy() {
        let numbers = distribution(&mut [10.0, 3.0, 1.0, 4.0, 2.0]);
        let got = [numbers.min, numbers.p25, numbers.median, numbers.p90, numbers.p99, numbers.max];
        for (got, expected) in got.into_iter().zip([1.0, 2.0, 3.0, 7.6, 9.76, 10.0]) {
            assert!((got - expected).abs() < 1e-9, "{numbers:?}");
        }
        assert_eq!((numbers.count, numbers.mean), (5, 4.0));
        assert!((numbers.std - 10.0_f64.sqrt()).abs() < 1e-9, "{numbers:?}");
    }

    #[test]
    fn an_empty_sample_is_all_zero_and_one_value_is_everything() {
        assert_eq!(distribution(&mut []), Distribution::default());
        assert_eq!(spread(&mut []), None);
        let one = distribution(&mut [7.0]);
        assert_eq!((one.min, one.median, one.p99, one.max, one.std), (7.0, 7.0, 7.0, 7.0, 0.0));
        assert_eq!(one.percentiles, vec![7.0; 101]);
    }

    /// The textbook's: for 4, 5 and 6 the mean is 5 and the half width 4.303 / sqrt(3).
    /// Table of the ranks: 1 and 6 of 6, 4 and 12 of 15, 40 and 61 of 100.
    #[test]
    fn the_median_lies_between_two_ranks() {
        let ranks = |count: u32| median_interval(&(1..=count).map(f64::from).collect::<Vec<_>>());
        assert_eq!([0, 1, 5].map(ranks), [None; 3]);
        assert_eq!([6, 15, 100].map(ranks), [Some((1.0, 6.0)), Some((4.0, 12.0)), Some((40.0, 61.0))]);
    }

    #[test]
    fn the_interval_is_students() {
        let interval = interval(&[4.0, 5.0, 6.0]).unwrap();
        assert!((interval.mean - 5.0).abs() < 1e-12);
        assert!((interval.half_width - 4.303 / 3.0_f64.sqrt()).abs() < 1e-9, "{interval:?}");
        assert_eq!(super::interval(&[4.0]), None);
    }

    /// scipy.stats.t.ppf(0.975, n) for n = 31, 60, 120.
    #[test]
    fn the_tail_of_the_t_table_is_close() {
        for (degrees, expected) in [(31, 2.0395), (60, 2.0003), (120, 1.9799)] {
            assert!((student_t(degrees) - expected).abs() < 0.002, "{degrees}: {}", student_t(degrees));
        }
    }

    proptest! {
        #[test]
        fn percentiles_ascend_and_stay_within_the_sample(mut sample in prop::collection::vec(-1e6..1e6, 1..200)) {
            let numbers = distribution(&mut sample);
            prop_assert!(numbers.percentiles.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert_eq!(numbers.percentiles[0], sample[0]);
            prop_assert_eq!(numbers.percentiles[100], sample[sample.len() - 1]);
            let at_most = sample.iter().filter(|value| **value <= numbers.median).count();
            prop_assert!(2 * at_most >= sample.len());
        }
    }
}
