//! Fits `throughput(B) = most * B / (B + half)` to a ladder, with an interval for `half`.
//!
//! Turned around it is a straight line: a step takes `B / throughput = (B + half) / most = a + b*B` seconds, so
//! that `half = a / b` and `most = 1 / b`. The line is fitted by least squares with weights for errors that are
//! the same share of each step. The interval of the ratio of two estimates is Fieller's ("Some Problems in
//! Interval Estimation", 1954); for small errors it is that of the delta method, and for large ones it tells when
//! the ladder sets no upper bound.

use super::measurement::{Interval, LadderPoint};
use crate::stats::student_t;

/// The fitted hyperbola.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyperbola {
    /// The batch with half of the asymptote.
    pub half_batch: f64,
    pub half_interval: Interval,
    /// The asymptote, in tokens a second.
    pub most_tokens_per_second: f64,
    pub most_interval: Interval,
}

/// A ladder that no hyperbola fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    #[error("a line needs at least 3 measurements at 2 batch sizes or more")]
    TooFew,
    #[error(
        "throughput still grows in proportion to the batch: half of the asymptote lies beyond the ladder"
    )]
    Unbent,
    #[error("throughput does not grow with the batch: there is no half of the asymptote")]
    Flat,
}

/// Sums of a weighted regression.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    one: f64,
    x: f64,
    xx: f64,
    y: f64,
    xy: f64,
}

impl Sums {
    fn add(&mut self, weight: f64, x: f64, y: f64) {
        self.one += weight;
        self.x += weight * x;
        self.xx += weight * x * x;
        self.y += weight * y;
        self.xy += weight * x * y;
    }

    fn determinant(&self) -> f64 {
        self.one * self.xx - self.x * self.x
    }
}

/// `a + b*x`, with the covariances of the two.
#[derive(Clone, Copy, Debug)]
struct Line {
    a: f64,
    b: f64,
    a_variance: f64,
    b_variance: f64,
    covariance: f64,
    degrees_of_freedom: usize,
}

/// Batch size and seconds of a step.
type Step = (f64, f64);

fn line(steps: &[Step]) -> Option<Line> {
    let weight = |seconds: f64| 1.0 / (seconds * seconds);
    let mut sums = Sums::default();
    steps.iter().for_each(|&(batch, seconds)| sums.add(weight(seconds), batch, seconds));
    let determinant = sums.determinant();
    // A single batch size leaves rounding errors only.
    let spread = determinant / (sums.one * sums.xx);
    if steps.len() < 3 || spread.is_nan() || spread <= 1e-12 {
        return None;
    }
    let a = (sums.xx * sums.y - sums.x * sums.xy) / determinant;
    let b = (sums.one * sums.xy - sums.x * sums.y) / determinant;
    let residual = |&(batch, seconds): &Step| weight(seconds) * (seconds - a - b * batch).powi(2);
    let degrees_of_freedom = steps.len() - 2;
    let variance = steps.iter().map(residual).sum::<f64>() / degrees_of_freedom as f64;
    Some(Line {
        a,
        b,
        a_variance: variance * sums.xx / determinant,
        b_variance: variance * sums.one / determinant,
        covariance: -variance * sums.x / determinant,
        degrees_of_freedom,
    })
}

/// Fits the points of a ladder, all of them positive.
///
/// # Errors
/// If they do not lie on a hyperbola that bends.
pub fn hyperbola(points: &[LadderPoint]) -> Result<Hyperbola, FitError> {
    let steps: Vec<Step> =
        points.iter().map(|point| (point.sequences, point.sequences / point.tokens_per_second)).collect();
    let line = line(&steps).ok_or(FitError::TooFew)?;
    if line.b <= 0.0 {
        return Err(FitError::Unbent);
    }
    if line.a <= 0.0 {
        return Err(FitError::Flat);
    }
    Ok(Hyperbola {
        half_batch: line.a / line.b,
        half_interval: fieller(&line),
        most_tokens_per_second: 1.0 / line.b,
        most_interval: asymptote_interval(&line),
    })
}

/// The 95 % interval of `a / b`.
fn fieller(line: &Line) -> Interval {
    let t = student_t(line.degrees_of_freedom);
    let square = line.b * line.b - t * t * line.b_variance;
    let linear = line.a * line.b - t * t * line.covariance;
    let constant = line.a * line.a - t * t * line.a_variance;
    let root = (linear * linear - square * constant).max(0.0).sqrt();
    if square <= 0.0 {
        // The slope may be zero, and so the ratio anything from here on.
        let low = if constant > 0.0 { constant / (linear + root) } else { 0.0 };
        return Interval { low, high: None };
    }
    Interval { low: ((linear - root) / square).max(0.0), high: Some((linear + root) / square) }
}

fn asymptote_interval(line: &Line) -> Interval {
    let margin = student_t(line.degrees_of_freedom) * line.b_variance.sqrt();
    Interval { low: 1.0 / (line.b + margin), high: (line.b > margin).then(|| 1.0 / (line.b - margin)) }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, Normal};

    use super::*;

    const BATCHES: [f64; 6] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];

    /// Points of a known hyperbola, each off by a share of its value.
    fn ladder(half: f64, most: f64, noise: f64, repeats: usize, seed: u64) -> Vec<LadderPoint> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let error = Normal::new(1.0, noise).unwrap();
        let batches = BATCHES.iter().flat_map(|batch| std::iter::repeat_n(*batch, repeats));
        let point = |sequences: f64| LadderPoint {
            sequences,
            tokens_per_second: most * sequences / (sequences + half) * error.sample(&mut random),
        };
        batches.map(point).collect()
    }

    #[test]
    fn a_hyperbola_without_noise_is_found_exactly() {
        for (half, most) in [(0.7, 900.0), (12.0, 5000.0), (300.0, 70_000.0)] {
            let fit = hyperbola(&ladder(half, most, 0.0, 2, 1)).unwrap();
            assert!((fit.half_batch / half - 1.0).abs() < 1e-9, "{fit:?}");
            assert!((fit.most_tokens_per_second / most - 1.0).abs() < 1e-9, "{fit:?}");
            let high = fit.half_interval.high.unwrap();
            assert!(high - fit.half_interval.low < 1e-3 * half, "{fit:?}");
        }
    }

    /// Of many ladders with the same truth, 95 of 100 intervals hold it.
    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        for (half, noise) in [(10.0, 0.03), (40.0, 0.05)] {
            let mut covered = [0; 2];
            const TRIALS: u64 = 2000;
            for seed in 0..TRIALS {
                let Ok(fit) = hyperbola(&ladder(half, 5000.0, noise, 2, seed)) else { continue };
                let holds = |interval: Interval, truth: f64| {
                    interval.low <= truth && interval.high.is_none_or(|high| truth <= high)
                };
                covered[0] += u64::from(holds(fit.half_interval, half));
                covered[1] += u64::from(holds(fit.most_interval, 5000.0));
            }
            for covered in covered {
                let share = covered as f64 / TRIALS as f64;
                assert!((0.93..0.97).contains(&share), "half {half}: {share}");
            }
        }
    }

    #[test]
    fn a_ladder_that_hardly_bends_sets_no_upper_bound() {
        let open = (0..50).filter_map(|seed| hyperbola(&ladder(1000.0, 1e6, 0.05, 2, seed)).ok());
        let open: Vec<Hyperbola> = open.filter(|fit| fit.half_interval.high.is_none()).collect();
        assert!(open.len() > 20, "{}", open.len());
        for fit in open {
            assert!(fit.half_interval.low > 0.0 && fit.half_interval.low < 1000.0, "{fit:?}");
        }
    }

    #[test]
    fn what_is_no_hyperbola_is_refused() {
        let points = |rate: fn(f64) -> f64| {
            let point = |&sequences: &f64| LadderPoint { sequences, tokens_per_second: rate(sequences) };
            hyperbola(&BATCHES.iter().map(point).collect::<Vec<_>>())
        };
        assert_eq!(points(|batch| 10.0 * batch.powf(1.2)), Err(FitError::Unbent));
        assert_eq!(points(|batch| 100.0 * batch.powf(-0.2)), Err(FitError::Flat));
        assert_eq!(hyperbola(&[]), Err(FitError::TooFew));
        let same = LadderPoint { sequences: 4.0, tokens_per_second: 100.0 };
        assert_eq!(hyperbola(&[same; 5]), Err(FitError::TooFew));
    }
}
