//! Counts of durations in logarithmic buckets: fixed memory for what comes a hundred thousand times a second.
//! (The layout is that of HdrHistogram, with 64 buckets an octave: values are kept to 1.6 %.)

use std::time::Duration;

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Values of 64 bits fall into that many buckets.
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB;

#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_nanos: u128,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], count: 0, sum_nanos: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanos)] += 1;
        self.count += 1;
        self.sum_nanos += u128::from(nanos);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// 0 if nothing was recorded.
    pub fn mean(&self) -> Duration {
        let nanos = self.sum_nanos.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The buckets that hold something: their bounds and how many values lie between.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, Duration, u64)> {
        let filled = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.map(|(at, count)| {
            let below = at.checked_sub(1).map_or(0, largest);
            (Duration::from_nanos(below), Duration::from_nanos(largest(at)), *count)
        })
    }

    /// The smallest bucket value that `percent` of the values do not exceed; 0 if nothing was recorded.
    pub fn percentile(&self, percent: f64) -> Duration {
        let wanted = (percent / 100.0 * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(largest(bucket));
            }
        }
        Duration::ZERO
    }
}

/// Values below `SUB` have a bucket each; above, an octave has `SUB`.
fn bucket(nanos: u64) -> usize {
    let octave = (u64::BITS - nanos.leading_zeros()).saturating_sub(SUB_BITS);
    match octave {
        0 => nanos as usize,
        octave => octave as usize * SUB + ((nanos >> (octave - 1)) as usize - SUB),
    }
}

/// The largest value of a bucket.
fn largest(bucket: usize) -> u64 {
    match bucket / SUB {
        0 => bucket as u64,
        octave => {
            let step = 1_u64 << (octave - 1);
            ((SUB + bucket % SUB) as u64 * step).saturating_add(step - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_value_falls_into_a_bucket_that_is_close_to_it(nanos: u64) {
            let at = largest(bucket(nanos));
            prop_assert!(at >= nanos && at - nanos <= nanos / 63, "{nanos} is shown as {at}");
        }

        #[test]
        fn percentiles_are_within_two_percent(mut values in prop::collection::vec(1_u64..10_000_000_000, 1..300)) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|nanos| histogram.record(Duration::from_nanos(*nanos)));
            values.sort_unstable();
            for percent in [50.0, 90.0, 99.0, 100.0] {
                let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
                let exact = values[rank.max(1) - 1] as f64;
                let got = histogram.percentile(percent).as_nanos() as f64;
                prop_assert!(got >= exact && got <= exact * 1.02 + 1.0, "{percent}: {got}, {exact}");
            }
        }
    }

    #[test]
    fn buckets_tell_where_the_values_lie() {
        let mut histogram = Histogram::default();
        [5, 5, 1000].into_iter().for_each(|micros| histogram.record(Duration::from_micros(micros)));
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets.iter().map(|bucket| bucket.2).collect::<Vec<_>>(), [2, 1]);
        for ((low, high, _), micros) in buckets.into_iter().zip([5, 1000]) {
            let value = Duration::from_micros(micros);
            assert!(low < value && value <= high && high - low < value / 50, "{low:?} {high:?}");
        }
    }

    #[test]
    fn nothing_recorded_is_zero() {
        let histogram = Histogram::default();
        assert_eq!((histogram.percentile(99.0), histogram.mean()), (Duration::ZERO, Duration::ZERO));
        assert!(bucket(u64::MAX) < BUCKETS);
    }
}
