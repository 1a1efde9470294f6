//! When requests arrive: a seeded, pure iterator of times since the start of the run.
//!
//! Every shape is a renewal process of unit mean (how regular the arrivals are) stretched by a rate that may
//! change over time (how many there are). A stretch of work `u` ends where the integral of the rate has grown
//! by `u`; with exponential intervals that is the inhomogeneous Poisson process (Cinlar 1975).

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1, Gamma};

/// How requests arrive in an open loop. Rates are in requests a second.
#[derive(Clone, Debug, PartialEq)]
pub enum ArrivalShape {
    /// As many as there are, at time 0.
    AllAtOnce,
    /// Equal intervals.
    Constant { rate: f64 },
    /// Gamma intervals of shape `burstiness`, as vLLM's benchmark: 1 is a Poisson process, less is burstier (the
    /// coefficient of variation is 1 / sqrt(burstiness)).
    Gamma { rate: f64, burstiness: f64 },
    /// A Poisson process that is switched on and off, both for exponential times with these means (interrupted
    /// Poisson process). `rate` is the mean over both.
    OnOff { rate: f64, on_seconds: f64, off_seconds: f64 },
    /// Stages one after the other, with gamma intervals within; the run ends with the last.
    Stages { stages: Vec<Stage>, burstiness: f64 },
    /// Given times, in order.
    Trace { times: Arc<[Duration]> },
}

/// A stretch of time over which the rate goes linearly from one value to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    pub seconds: f64,
    pub from_rate: f64,
    pub to_rate: f64,
}

/// An arrival process that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ArrivalError {
    #[error("a rate of {0} requests a second is out of range; give more than 0 and at most {MAX_RATE}")]
    Rate(f64),
    #[error(
        "a burstiness of {0} is out of range; give {MIN_BURSTINESS} to {MAX_BURSTINESS}; 1 is a Poisson process"
    )]
    Burstiness(f64),
    #[error("a stretch of {0} seconds is out of range; give more than 0 and at most {MAX_SECONDS}")]
    Seconds(f64),
    #[error("no stage has a rate above 0, so that no request would ever arrive; give one")]
    NoRate,
}

pub const MAX_RATE: f64 = 1e6;
pub const MIN_BURSTINESS: f64 = 0.001;
pub const MAX_BURSTINESS: f64 = 1e6;
/// A year.
pub const MAX_SECONDS: f64 = 366.0 * 86_400.0;

impl ArrivalShape {
    pub fn poisson(rate: f64) -> Self {
        Self::Gamma { rate, burstiness: 1.0 }
    }

    /// # Errors
    /// If a rate, a burstiness or a duration is out of range.
    pub fn validate(&self) -> Result<(), ArrivalError> {
        match self {
            Self::AllAtOnce | Self::Trace { .. } => Ok(()),
            Self::Constant { rate } => check_rate(*rate),
            Self::Gamma { rate, burstiness } => check_rate(*rate).and(check_burstiness(*burstiness)),
            Self::OnOff { rate, on_seconds, off_seconds } => check_rate(*rate)
                .and(check_seconds(*on_seconds))
                .and(check_seconds(*off_seconds))
                .and(check_rate(rate * (on_seconds + off_seconds) / on_seconds)),
            Self::Stages { stages, burstiness } => {
                check_burstiness(*burstiness)?;
                for stage in stages {
                    check_seconds(stage.seconds)?;
                    for rate in [stage.from_rate, stage.to_rate].into_iter().filter(|rate| *rate != 0.0) {
                        check_rate(rate)?;
                    }
                }
                let any = stages.iter().any(|stage| stage.from_rate + stage.to_rate > 0.0);
                if any { Ok(()) } else { Err(ArrivalError::NoRate) }
            }
        }
    }

    /// The times at which requests arrive, ascending. Endless but for stages and traces.
    pub fn times(&self, seed: u64) -> Box<dyn Iterator<Item = Duration> + Send> {
        let process = |intervals, stages| Box::new(Process::new(intervals, stages, seed));
        match self {
            Self::AllAtOnce => Box::new(std::iter::repeat(Duration::ZERO)),
            Self::Constant { rate } => process(Intervals::Constant, forever(*rate)),
            Self::Gamma { rate, burstiness } => process(Intervals::of(*burstiness), forever(*rate)),
            Self::OnOff { rate, on_seconds, off_seconds } => {
                process(Intervals::Exponential, on_off(*rate, *on_seconds, *off_seconds, seed))
            }
            Self::Stages { stages, burstiness } => {
                process(Intervals::of(*burstiness), Box::new(stages.clone().into_iter()))
            }
            Self::Trace { times } => {
                let times = times.clone();
                Box::new((0..times.len()).map(move |at| times[at]))
            }
        }
    }

    /// Mean rate; `None` if all arrive at once.
    pub fn mean_rate(&self) -> Option<f64> {
        match self {
            Self::AllAtOnce => None,
            Self::Constant { rate } | Self::Gamma { rate, .. } | Self::OnOff { rate, .. } => Some(*rate),
            Self::Stages { stages, .. } => {
                let seconds: f64 = stages.iter().map(|stage| stage.seconds).sum();
                Some(stages.iter().map(Stage::arrivals).sum::<f64>() / seconds)
            }
            Self::Trace { times } => {
                let seconds = times.last()?.saturating_sub(*times.first()?).as_secs_f64();
                (seconds > 0.0).then(|| (times.len() - 1) as f64 / seconds)
            }
        }
    }

    /// The same shape at another mean rate; `None` where the times are given.
    pub fn at_rate(&self, rate: f64) -> Option<Self> {
        match self {
            Self::Constant { .. } => Some(Self::Constant { rate }),
            Self::Gamma { burstiness, .. } => Some(Self::Gamma { rate, burstiness: *burstiness }),
            Self::OnOff { on_seconds, off_seconds, .. } => {
                Some(Self::OnOff { rate, on_seconds: *on_seconds, off_seconds: *off_seconds })
            }
            Self::AllAtOnce | Self::Stages { .. } | Self::Trace { .. } => None,
        }
    }

    /// Shape of the gamma distribution of the intervals, where they have one.
    pub fn burstiness(&self) -> Option<f64> {
        match self {
            Self::Gamma { burstiness, .. } | Self::Stages { burstiness, .. } => Some(*burstiness),
            Self::AllAtOnce | Self::Constant { .. } | Self::OnOff { .. } | Self::Trace { .. } => None,
        }
    }

    /// In words, without the rate.
    pub fn describe(&self) -> String {
        match self {
            Self::AllAtOnce => "all at once".into(),
            Self::Constant { .. } => "equal intervals".into(),
            Self::Gamma { burstiness, .. } => intervals_in_words(*burstiness),
            Self::OnOff { on_seconds, off_seconds, .. } => {
                format!("on for {on_seconds} s and off for {off_seconds} s on average")
            }
            Self::Stages { stages, burstiness } => {
                let stages: Vec<String> = stages.iter().map(Stage::describe).collect();
                format!("{}, {}", stages.join(", then "), intervals_in_words(*burstiness))
            }
            Self::Trace { times } => format!("{} arrivals of a trace", times.len()),
        }
    }
}

fn intervals_in_words(burstiness: f64) -> String {
    if burstiness == 1.0 { "Poisson".into() } else { format!("gamma of burstiness {burstiness}") }
}

fn check_rate(rate: f64) -> Result<(), ArrivalError> {
    if rate > 0.0 && rate <= MAX_RATE { Ok(()) } else { Err(ArrivalError::Rate(rate)) }
}

fn check_burstiness(burstiness: f64) -> Result<(), ArrivalError> {
    let fits = (MIN_BURSTINESS..=MAX_BURSTINESS).contains(&burstiness);
    if fits { Ok(()) } else { Err(ArrivalError::Burstiness(burstiness)) }
}

fn check_seconds(seconds: f64) -> Result<(), ArrivalError> {
    if seconds > 0.0 && seconds <= MAX_SECONDS { Ok(()) } else { Err(ArrivalError::Seconds(seconds)) }
}

type Stages = Box<dyn Iterator<Item = Stage> + Send>;

fn forever(rate: f64) -> Stages {
    Box::new(std::iter::once(Stage { seconds: f64::INFINITY, from_rate: rate, to_rate: rate }))
}

fn on_off(rate: f64, on_seconds: f64, off_seconds: f64, seed: u64) -> Stages {
    let rate_on = rate * (on_seconds + off_seconds) / on_seconds;
    // Another stream than the intervals': both are drawn from the seed.
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(1);
    let states = [(on_seconds, rate_on), (off_seconds, 0.0)];
    Box::new(states.into_iter().cycle().map(move |(mean, rate)| {
        let length: f64 = Exp1.sample(&mut random);
        Stage { seconds: mean * length, from_rate: rate, to_rate: rate }
    }))
}

impl Stage {
    /// Mean number of arrivals in it.
    fn arrivals(&self) -> f64 {
        self.seconds * (self.from_rate + self.to_rate) / 2.0
    }

    /// How far into the stage the integral of the rate, counted from `start`, reaches `work`. `None` if it does
    /// not within the stage; then `work` has been lowered by what the stage holds.
    fn solve(&self, start: f64, work: &mut f64) -> Option<f64> {
        let left = self.seconds - start;
        if self.from_rate == self.to_rate {
            let needed = *work / self.from_rate;
            if needed < left {
                return Some(start + needed);
            }
            *work -= left * self.from_rate;
            return None;
        }
        let slope = (self.to_rate - self.from_rate) / self.seconds;
        let rate = self.from_rate + slope * start;
        let held = left * (rate + self.to_rate) / 2.0;
        if *work >= held {
            *work -= held;
            return None;
        }
        // rate x t + slope x t^2 / 2 = work, in the form that does not cancel.
        let root = (rate * rate + 2.0 * slope * *work).max(0.0).sqrt();
        Some(start + 2.0 * *work / (rate + root))
    }

    fn describe(&self) -> String {
        let Self { seconds, from_rate, to_rate } = self;
        if from_rate == to_rate {
            format!("{from_rate} req/s for {seconds} s")
        } else {
            format!("{from_rate} to {to_rate} req/s over {seconds} s")
        }
    }
}

/// Intervals of mean 1.
enum Intervals {
    Constant,
    Exponential,
    Gamma(Gamma<f64>),
}

impl Intervals {
    /// `burstiness` has been validated; what could still be wrong with it makes it a Poisson process.
    fn of(burstiness: f64) -> Self {
        if burstiness == 1.0 {
            return Self::Exponential;
        }
        Gamma::new(burstiness, 1.0 / burstiness).map_or(Self::Exponential, Self::Gamma)
    }

    fn next(&self, random: &mut ChaCha8Rng) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Exponential => Exp1.sample(random),
            Self::Gamma(gamma) => gamma.sample(random),
        }
    }
}

struct Process {
    intervals: Intervals,
    random: ChaCha8Rng,
    stages: Stages,
    stage: Option<Stage>,
    /// Start of the stage since the start of the run, and how far it has been used up, in seconds.
    stage_start: f64,
    used: f64,
}

impl Process {
    fn new(intervals: Intervals, mut stages: Stages, seed: u64) -> Self {
        let stage = stages.next();
        let random = ChaCha8Rng::seed_from_u64(seed);
        Self { intervals, random, stages, stage, stage_start: 0.0, used: 0.0 }
    }
}

impl Iterator for Process {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let mut work = self.intervals.next(&mut self.random);
        loop {
            let stage = self.stage?;
            if let Some(used) = stage.solve(self.used, &mut work) {
                self.used = used;
                return Duration::try_from_secs_f64(self.stage_start + used).ok();
            }
            self.stage_start += stage.seconds;
            self.used = 0.0;
            self.stage = self.stages.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(shape: &ArrivalShape, seed: u64, count: usize) -> Vec<f64> {
        shape.times(seed).take(count).map(|time| time.as_secs_f64()).collect()
    }

    /// Mean and coefficient of variation of the intervals.
    fn moments(times: &[f64]) -> (f64, f64) {
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn gamma_intervals_have_the_mean_and_the_variation_they_should(
            seed: u64, rate in 0.1..1000.0, burstiness in 0.25..16.0,
        ) {
            let times = seconds(&ArrivalShape::Gamma { rate, burstiness }, seed, 40_000);
            let (mean, variation) = moments(&times);
            prop_assert!((mean * rate - 1.0).abs() < 0.06, "mean {mean} at rate {rate}");
            prop_assert!((variation * burstiness.sqrt() - 1.0).abs() < 0.06, "CV {variation} at {burstiness}");
        }

        #[test]
        fn every_shape_ascends_and_depends_on_nothing_but_its_seed(seed: u64, rate in 0.5..200.0) {
            let stage = Stage { seconds: 20.0, from_rate: 0.0, to_rate: 2.0 * rate };
            let shapes = [
                ArrivalShape::Constant { rate },
                ArrivalShape::poisson(rate),
                ArrivalShape::OnOff { rate, on_seconds: 3.0, off_seconds: 1.0 },
                ArrivalShape::Stages { stages: vec![stage, Stage { from_rate: rate, ..stage }], burstiness: 0.5 },
            ];
            for shape in shapes {
                prop_assert_eq!(shape.validate(), Ok(()));
                let times = seconds(&shape, seed, 500);
                prop_assert!(times.windows(2).all(|pair| pair[0] <= pair[1]), "{:?}", shape);
                prop_assert_eq!(&times, &seconds(&shape, seed, 500));
            }
        }

        #[test]
        fn a_ramp_has_the_arrivals_of_its_integral(seed: u64, from in 0.0..50.0, to in 60.0..200.0) {
            let stage = Stage { seconds: 100.0, from_rate: from, to_rate: to };
            for stage in [stage, Stage { from_rate: to, to_rate: from, ..stage }] {
                let shape = ArrivalShape::Stages { stages: vec![stage], burstiness: 1.0 };
                let times = seconds(&shape, seed, usize::MAX);
                let expected = 50.0 * (from + to);
                // Six standard deviations of a Poisson count.
                prop_assert!((times.len() as f64 - expected).abs() < 6.0 * expected.sqrt());
                let early = times.iter().filter(|time| **time < 50.0).count() as f64;
                let (middle, start) = ((from + to) / 2.0, stage.from_rate);
                let expected = 25.0 * (start + middle);
                prop_assert!((early - expected).abs() < 6.0 * expected.sqrt());
            }
        }
    }

    #[test]
    fn constant_intervals_are_equal() {
        let times = seconds(&ArrivalShape::Constant { rate: 4.0 }, 1, 4);
        for (time, expected) in times.iter().zip([0.25, 0.5, 0.75, 1.0]) {
            assert!((time - expected).abs() < 1e-9, "{times:?}");
        }
    }

    #[test]
    fn different_seeds_give_different_arrivals() {
        let shape = ArrivalShape::poisson(5.0);
        assert_ne!(seconds(&shape, 1, 20), seconds(&shape, 2, 20));
    }

    /// The squared coefficient of variation of an interrupted Poisson process is
    /// 1 + 2 x rate_on x a / (a + b)^2 with a = 1 / on and b = 1 / off (Kuczura 1973).
    #[test]
    fn on_off_has_the_mean_and_the_variation_of_an_interrupted_poisson_process() {
        let (rate, on, off) = (20.0, 6.0, 2.0);
        let shape = ArrivalShape::OnOff { rate, on_seconds: on, off_seconds: off };
        let times = seconds(&shape, 7, 400_000);
        let (mean, variation) = moments(&times);
        let rate_on = rate * (on + off) / on;
        let (a, b) = (1.0 / on, 1.0 / off);
        let expected = (1.0 + 2.0 * rate_on * a / (a + b).powi(2)).sqrt();
        assert!((mean * rate - 1.0).abs() < 0.05, "mean {mean}");
        assert!((variation / expected - 1.0).abs() < 0.1, "CV {variation}, expected {expected}");
    }

    #[test]
    fn steps_keep_their_rates_and_a_pause_has_no_arrival() {
        let stages = [(10.0, 5.0), (10.0, 0.0), (10.0, 50.0)].map(|(seconds, rate)| Stage {
            seconds,
            from_rate: rate,
            to_rate: rate,
        });
        let shape = ArrivalShape::Stages { stages: stages.to_vec(), burstiness: MAX_BURSTINESS };
        let times = seconds(&shape, 3, usize::MAX);
        let within = |from: f64, to: f64| times.iter().filter(|time| (from..to).contains(*time)).count();
        assert!((48..=51).contains(&within(0.0, 10.0)), "{}", within(0.0, 10.0));
        assert_eq!(within(10.0, 20.0), 0);
        assert!((497..=502).contains(&within(20.0, 30.0)), "{}", within(20.0, 30.0));
        assert_eq!(shape.mean_rate(), Some(550.0 / 30.0));
    }

    #[test]
    fn a_trace_is_replayed_as_it_is() {
        let times: Arc<[Duration]> = [0, 5, 5, 9].map(Duration::from_secs).into();
        let shape = ArrivalShape::Trace { times: times.clone() };
        assert_eq!(shape.times(1).collect::<Vec<_>>(), times.to_vec());
        assert_eq!(shape.mean_rate(), Some(3.0 / 9.0));
    }

    #[test]
    fn impossible_processes_are_refused_by_value() {
        let stage = |seconds, rate| Stage { seconds, from_rate: rate, to_rate: rate };
        let stages = |stages| ArrivalShape::Stages { stages, burstiness: 1.0 };
        let bad = [
            (ArrivalShape::poisson(0.0), "a rate of 0"),
            (ArrivalShape::Constant { rate: f64::NAN }, "a rate of NaN"),
            (ArrivalShape::Gamma { rate: 1.0, burstiness: -1.0 }, "a burstiness of -1"),
            (ArrivalShape::OnOff { rate: 1.0, on_seconds: 0.0, off_seconds: 1.0 }, "a stretch of 0"),
            (stages(vec![stage(f64::INFINITY, 1.0)]), "a stretch of inf"),
            (stages(vec![stage(1.0, 0.0)]), "no stage"),
            (stages(vec![]), "no stage"),
        ];
        for (shape, start) in bad {
            let message = shape.validate().unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }
}
