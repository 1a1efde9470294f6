//! From the points of a benchmark to a [`Calibration`].
//!
//! A point tells means over requests, not steps: TTFT, TPOT, requests a second. What a calibration would have given at
//! the same load is known from a replay over the real engine in virtual time, waves of requests that end together
//! and waits in the queue included. So the coefficients are those whose replays come closest to what was measured:
//! least squares of the relative errors, none of them negative, by Gauss-Newton from a first guess without a replay.
//! Omega, behind which tokens are hidden, is tried at a few shares of the least TPOT, since what it does is not linear; it
//! stays 0 unless it explains much.
//!
//! A coefficient that the points cannot tell from others stays at 0 and is named in [`Fit::unseen`].

use serde::Serialize;
use servelab_engine::{ConfigError, EngineConfig};

use crate::calibration::Calibration;
use crate::cost::CostModel;
use crate::least_squares::{independent, least_squares};
use crate::replay::{Arrivals, Length, Load, replay};

/// Requests of one level of load: means over those that completed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// As the user knows it.
    pub label: String,
    pub arrivals: Arrivals,
    /// Measured ones.
    pub requests: u32,
    /// Those before them.
    pub warm_up: u32,
    /// Prompt tokens that were computed: those of the prefix cache are taken off.
    pub input_tokens: Length,
    pub output_tokens: Length,
    pub requests_per_second: f64,
    pub ttft_seconds: f64,
    pub tpot_seconds: f64,
}

/// What was measured, and how the server was set up.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub model: String,
    pub gpus: u32,
    /// Most sequences at once, and most tokens of a step.
    pub max_running: u32,
    pub max_batched_tokens: u32,
    /// Tokens that the KV cache holds.
    pub kv_tokens: u32,
    /// 2 if the server prepares a step while one is under way.
    pub steps_at_once: usize,
    /// Whether requests took a way to the engine, over HTTP.
    pub is_remote: bool,
}

/// A calibration and how far it is to be trusted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fit {
    pub calibration: Calibration,
    /// Coefficients that the points say nothing of, by name.
    pub unseen: Vec<&'static str>,
    /// Of each point with the fit to all of them.
    pub errors: Vec<Errors>,
    /// Of each point with the fit to all the others, omega apart, which is that of all; empty if those are too few.
    pub held_out: Vec<Errors>,
    /// Of each point that was given to be predicted only.
    pub checked: Vec<Errors>,
}

/// What the fit says of a point's load over what was measured, less 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Errors {
    pub ttft: f64,
    pub tpot: f64,
    pub requests_per_second: f64,
}

/// Points that nothing can be fitted to.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum FitError {
    #[error("{0} points are too few; measure at least {LEAST_POINTS} levels of load, better five")]
    TooFew(usize),
    #[error("point {label}: {field} is {value}; it must be {rule}")]
    Range { label: String, field: &'static str, value: f64, rule: &'static str },
    #[error(transparent)]
    Engine(#[from] ConfigError),
}

/// Alpha, beta and one more to see whether they hold.
const LEAST_POINTS: usize = 3;

const COEFFICIENTS: usize = 7;
/// In the order in which they are taken: what cannot be told from those in front is left out.
const NAMES: [&str; COEFFICIENTS] = ["alpha", "beta", "delta", "gamma", "zeta", "tau", "epsilon"];
const ALPHA: usize = 0;
const BETA: usize = 1;
const DELTA: usize = 2;
const GAMMA: usize = 3;
const ZETA: usize = 4;
const TAU: usize = 5;
const EPSILON: usize = 6;

type Row = [f64; COEFFICIENTS];

/// What a replay takes: the coefficients, and omega.
#[derive(Clone, Copy)]
struct Guess {
    coefficients: Row,
    weights_seconds: f64,
}

/// Of the least TPOT, what is tried for omega.
const OMEGA_SHARES: [f64; 6] = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9];
/// Omega has to leave no more than this part of the squares. Where the mean error without it is below the second figure,
/// all that is left is noise.
const MOST_SQUARES_LEFT: f64 = 0.7;
const LEAST_ERROR: f64 = 0.02;
/// Improvements of the first guess, and of one that comes from a fit.
const ROUNDS: usize = 8;
const ROUNDS_FROM_A_FIT: usize = 3;
/// A round that brings less ends the search.
const LEAST_GAIN: f64 = 0.02;
/// A coefficient is moved by what changes TPOT or TTFT about as much, to see what it does.
const PROBE: f64 = 0.03;
/// The part of what a coefficient does that others cannot do, below which it counts as unseen: measured points carry
/// noise of a few percent.
const LEAST_NEW_PART: f64 = 0.05;
/// Of mean lengths that still count as the same load.
const MOST_LENGTH_RATIO: f64 = 1.3;
/// A replay of more requests tells little more.
const MOST_REQUESTS: u32 = 400;
const TURNS: u32 = 6;

/// One point for each load: what was measured several times counts as the median of each figure, so that a stall of
/// the machine does not. The order is that of their first ones.
pub fn merged(points: &[Point]) -> Vec<Point> {
    let mut loads: Vec<Vec<&Point>> = Vec::new();
    for point in points {
        match loads.iter_mut().find(|load| load[0].is_same_load(point)) {
            Some(load) => load.push(point),
            None => loads.push(vec![point]),
        }
    }
    loads.iter().map(|load| median_point(load)).collect()
}

fn median_point(load: &[&Point]) -> Point {
    let of = |figure: fn(&Point) -> f64| {
        let mut values: Vec<f64> = load.iter().map(|point| figure(point)).collect();
        values.sort_by(f64::total_cmp);
        f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
    };
    Point {
        label: load[0].label.clone(),
        arrivals: load[0].arrivals,
        requests: of(|point| point.requests.into()) as u32,
        warm_up: of(|point| point.warm_up.into()) as u32,
        input_tokens: Length {
            mean: of(|point| point.input_tokens.mean),
            std: of(|point| point.input_tokens.std),
        },
        output_tokens: Length {
            mean: of(|point| point.output_tokens.mean),
            std: of(|point| point.output_tokens.std),
        },
        requests_per_second: of(|point| point.requests_per_second),
        ttft_seconds: of(|point| point.ttft_seconds),
        tpot_seconds: of(|point| point.tpot_seconds),
    }
}

/// Fits `points`, all measured on `target`, and predicts `checks`, measured there too.
///
/// # Errors
/// If the points are too few or impossible.
pub fn fit(target: &Target, points: &[Point], checks: &[Point]) -> Result<Fit, FitError> {
    if points.len() < LEAST_POINTS {
        return Err(FitError::TooFew(points.len()));
    }
    points.iter().chain(checks).try_for_each(check)?;
    let all: Vec<&Point> = points.iter().collect();
    let found = Search { target, points: &all }.best()?;
    let mut held_out = Vec::new();
    if points.len() > LEAST_POINTS {
        for point in points {
            let others: Vec<&Point> = points.iter().filter(|other| *other != point).collect();
            let found = Search { target, points: &others }.improve(found.guess, ROUNDS_FROM_A_FIT)?;
            held_out.push(target.errors(&found.guess, point)?);
        }
    }
    let errors = |points: &[Point]| -> Result<Vec<Errors>, ConfigError> {
        points.iter().map(|point| target.errors(&found.guess, point)).collect()
    };
    Ok(Fit {
        calibration: target.calibration(&found.guess),
        unseen: (0..COEFFICIENTS).filter(|index| !found.seen[*index]).map(|index| NAMES[index]).collect(),
        errors: errors(points)?,
        held_out,
        checked: errors(checks)?,
    })
}

fn check(point: &Point) -> Result<(), FitError> {
    let load = match point.arrivals {
        Arrivals::Closed(clients) => ("concurrency", f64::from(clients)),
        Arrivals::Poisson(rate) => ("rate", rate),
    };
    let refuse = |field, value, rule| Err(FitError::Range { label: point.label.clone(), field, value, rule });
    let positive = [
        load,
        ("number of requests", f64::from(point.requests)),
        ("requests per second", point.requests_per_second),
        ("mean TTFT", point.ttft_seconds),
        ("mean TPOT", point.tpot_seconds),
    ];
    if let Some((field, value)) = positive.into_iter().find(|(_, value)| !(1e-9..=1e9).contains(value)) {
        return refuse(field, value, "a positive number");
    }
    let lengths = [
        ("mean number of input tokens", point.input_tokens, 1.0),
        // A single token has no TPOT.
        ("mean number of output tokens", point.output_tokens, 2.0),
    ];
    for (field, length, least) in lengths {
        if !(least..=1e6).contains(&length.mean) || !(0.0..=1e6).contains(&length.std) {
            return refuse(field, length.mean, "from 1 to 1e6, of answers at least 2");
        }
    }
    Ok(())
}

impl Target {
    fn calibration(&self, Guess { coefficients, weights_seconds }: &Guess) -> Calibration {
        Calibration {
            model: self.model.clone(),
            gpus: self.gpus,
            step_seconds: coefficients[ALPHA],
            weights_seconds: *weights_seconds,
            decode_seconds: coefficients[BETA],
            context_token_seconds: coefficients[GAMMA],
            prefill_step_seconds: coefficients[ZETA],
            prefill_token_seconds: coefficients[DELTA],
            prefill_pair_seconds: coefficients[EPSILON],
            request_seconds: coefficients[TAU],
        }
    }

    /// What would have been measured at the load of `point`.
    fn predict(&self, guess: &Guess, point: &Point) -> Result<Predicted, ConfigError> {
        let calibration = self.calibration(guess);
        let config = EngineConfig {
            block_size: BLOCK_SIZE,
            num_blocks: self.kv_tokens.div_ceil(BLOCK_SIZE).max(1),
            max_model_len: 2,
            max_batched_tokens: self.max_batched_tokens,
            max_running: self.max_running,
            max_waiting: 1,
            prefix_cache: false,
        };
        // Whoever comes over a network comes after the next step has begun, however fast it is.
        let least_seconds = if self.is_remote { 1e-6 } else { 0.0 };
        let load = Load { request_seconds: calibration.request_seconds.max(least_seconds), ..point.load() };
        let measured = replay(config, CostModel::Calibrated(calibration), self.steps_at_once, load)?;
        Ok(Predicted {
            ttft_seconds: measured.ttft_seconds,
            tpot_seconds: measured.tpot_seconds,
            requests_per_second: f64::from(load.requests) / measured.duration_seconds.max(1e-9),
        })
    }

    fn errors(&self, guess: &Guess, point: &Point) -> Result<Errors, ConfigError> {
        let predicted = self.predict(guess, point)?;
        // By Little's law: the replay is shorter than the benchmark, so that its beginning and end count for more.
        let residence = |ttft: f64, tpot: f64| ttft + (point.output_tokens.mean - 1.0) * tpot;
        let requests_per_second = match point.arrivals {
            Arrivals::Closed(_) => {
                residence(point.ttft_seconds, point.tpot_seconds)
                    / residence(predicted.ttft_seconds, predicted.tpot_seconds)
            }
            Arrivals::Poisson(_) => predicted.requests_per_second / point.requests_per_second,
        };
        Ok(Errors {
            ttft: predicted.ttft_seconds / point.ttft_seconds - 1.0,
            tpot: predicted.tpot_seconds / point.tpot_seconds - 1.0,
            requests_per_second: requests_per_second - 1.0,
        })
    }
}

const BLOCK_SIZE: u32 = 16;

struct Predicted {
    ttft_seconds: f64,
    tpot_seconds: f64,
    requests_per_second: f64,
}

impl Point {
    /// Whether another measurement was one of the same load; lengths are random within it.
    fn is_same_load(&self, other: &Self) -> bool {
        let is_near = |a: Length, b: Length| {
            let ratio = a.mean / b.mean;
            (1.0 / MOST_LENGTH_RATIO..=MOST_LENGTH_RATIO).contains(&ratio)
        };
        self.arrivals == other.arrivals
            && is_near(self.input_tokens, other.input_tokens)
            && is_near(self.output_tokens, other.output_tokens)
    }

    fn load(&self) -> Load {
        let enough = match self.arrivals {
            Arrivals::Closed(clients) => MOST_REQUESTS.max(clients.saturating_mul(TURNS)),
            Arrivals::Poisson(_) => MOST_REQUESTS,
        };
        Load {
            arrivals: self.arrivals,
            requests: self.requests.saturating_add(self.warm_up).min(enough),
            warm_up: self.warm_up.min(enough / 2),
            input_tokens: self.input_tokens,
            output_tokens: self.output_tokens,
            request_seconds: 0.0,
        }
    }

    /// Decoding sequences on average, by Little's law.
    fn decoding(&self) -> f64 {
        self.requests_per_second * (self.output_tokens.mean - 1.0) * self.tpot_seconds
    }

    /// TPOT in coefficients, if prompts come evenly: the step in which `decoding` sequences decode and of prompts as
    /// much is computed as belongs to the answers that end.
    fn tpot_row(&self) -> Row {
        let decoding = self.decoding();
        let prompts = decoding / (self.output_tokens.mean - 1.0);
        let mut row = [0.0; COEFFICIENTS];
        row[ALPHA] = 1.0;
        row[BETA] = decoding;
        row[GAMMA] = decoding * (self.input_tokens.mean + self.output_tokens.mean / 2.0);
        row[DELTA] = prompts * self.input_tokens.mean;
        // The share of steps in which any prompt is computed, if they come at random.
        row[ZETA] = 1.0 - (-prompts).exp();
        row[EPSILON] = prompts * self.pairs();
        row
    }

    /// Pairs of tokens of a prompt.
    fn pairs(&self) -> f64 {
        let Length { mean, std } = self.input_tokens;
        (mean * mean + std * std + mean) / 2.0
    }
}

/// From TPOT as it would be if prompts came evenly, and TTFT as it is with nobody else there.
fn first_guess(target: &Target, points: &[&Point]) -> Row {
    let mut rows: Vec<(Row, f64)> = Vec::new();
    for point in points {
        // Divided by what was measured: relative errors count alike.
        rows.push((point.tpot_row().map(|value| value / point.tpot_seconds), 1.0));
        if matches!(point.arrivals, Arrivals::Closed(1)) {
            let mut row = [0.0; COEFFICIENTS];
            row[ALPHA] = 1.0;
            row[DELTA] = point.input_tokens.mean;
            row[ZETA] = 1.0;
            row[EPSILON] = point.pairs();
            row[TAU] = if target.is_remote { 1.0 } else { 0.0 };
            rows.push((row.map(|value| value / point.ttft_seconds), 1.0));
        }
    }
    least_squares(&rows, independent(&rows, LEAST_NEW_PART))
}

/// Coefficients, which of them the points tell apart, and the sum of the squares that they leave.
struct Found {
    guess: Guess,
    seen: [bool; COEFFICIENTS],
    squares: f64,
}

struct Search<'a> {
    target: &'a Target,
    points: &'a [&'a Point],
}

impl Search<'_> {
    /// From a first guess, with omega if that explains much.
    fn best(&self) -> Result<Found, ConfigError> {
        let coefficients = first_guess(self.target, self.points);
        let without = self.improve(Guess { coefficients, weights_seconds: 0.0 }, ROUNDS)?;
        let noise = LEAST_ERROR.powi(2) * 2.0 * self.points.len() as f64;
        if self.points.len() == LEAST_POINTS || without.squares < noise {
            return Ok(without);
        }
        let least_tpot = self.points.iter().map(|point| point.tpot_seconds).fold(f64::INFINITY, f64::min);
        let mut best: Option<Found> = None;
        for share in OMEGA_SHARES {
            let mut start = Guess { weights_seconds: share * least_tpot, ..without.guess };
            let [alpha, beta] = [ALPHA, BETA].map(|index| start.coefficients[index]);
            // Whoever is alone waits as long as before.
            start.coefficients[ALPHA] = (alpha + beta - start.weights_seconds.max(beta)).max(0.0);
            let found = self.improve(start, ROUNDS_FROM_A_FIT)?;
            if best.as_ref().is_none_or(|best| found.squares < best.squares) {
                best = Some(found);
            }
        }
        match best.filter(|best| best.squares < MOST_SQUARES_LEFT * without.squares) {
            Some(best) => self.improve(best.guess, ROUNDS),
            None => Ok(without),
        }
    }

    /// Gauss-Newton: what each coefficient does is taken as linear, the best coefficients follow, and once more.
    fn improve(&self, start: Guess, rounds: usize) -> Result<Found, ConfigError> {
        let mut predicted = self.relative(&start)?;
        let mut found = Found { guess: start, seen: [true; COEFFICIENTS], squares: squares(&predicted) };
        for round in 0..rounds {
            let rows = self.linear(&found.guess, &predicted)?;
            if round == 0 {
                found.seen = independent(&rows, LEAST_NEW_PART);
            }
            let wanted = least_squares(&rows, found.seen);
            let Some((better, figures)) = self.towards(&found.guess, &wanted, found.squares)? else { break };
            let left = squares(&figures);
            let gain = 1.0 - left / found.squares;
            (found.guess.coefficients, predicted, found.squares) = (better, figures, left);
            if gain < LEAST_GAIN {
                break;
            }
        }
        for index in (0..COEFFICIENTS).filter(|index| !found.seen[*index]) {
            found.guess.coefficients[index] = 0.0;
        }
        found.squares = squares(&self.relative(&found.guess)?);
        Ok(found)
    }

    /// Predicted over measured: TPOT and TTFT of each point.
    fn relative(&self, guess: &Guess) -> Result<Vec<f64>, ConfigError> {
        let mut relative = Vec::new();
        for point in self.points {
            let predicted = self.target.predict(guess, point)?;
            relative.push(predicted.tpot_seconds / point.tpot_seconds);
            relative.push(predicted.ttft_seconds / point.ttft_seconds);
        }
        Ok(relative)
    }

    /// One equation for each figure: what the coefficients must make of it for the prediction to be right.
    fn linear(&self, at: &Guess, predicted: &[f64]) -> Result<Vec<(Row, f64)>, ConfigError> {
        let mut rows: Vec<(Row, f64)> =
            predicted.iter().map(|value| ([0.0; COEFFICIENTS], 1.0 - value)).collect();
        for index in (0..COEFFICIENTS).filter(|index| *index != TAU || self.target.is_remote) {
            let by = self.probe(index);
            let mut moved = *at;
            moved.coefficients[index] += by;
            for ((row, wanted), (after, before)) in
                rows.iter_mut().zip(self.relative(&moved)?.iter().zip(predicted))
            {
                row[index] = (after - before) / by;
                *wanted += row[index] * at.coefficients[index];
            }
        }
        Ok(rows)
    }

    /// How far a coefficient is moved.
    fn probe(&self, index: usize) -> f64 {
        let mean = |figure: fn(&Point) -> f64| {
            self.points.iter().map(|point| figure(point)).sum::<f64>() / self.points.len() as f64
        };
        if index == TAU {
            return PROBE * mean(|point| point.ttft_seconds);
        }
        let part: f64 = self.points.iter().map(|point| point.tpot_row()[index] / point.tpot_seconds).sum();
        PROBE * self.points.len() as f64 / part.max(1e-12)
    }

    /// All the way to `wanted`, or as much of it as makes things better.
    fn towards(
        &self,
        from: &Guess,
        wanted: &Row,
        before: f64,
    ) -> Result<Option<(Row, Vec<f64>)>, ConfigError> {
        let mut share = 1.0;
        for _ in 0..5 {
            let between = |index: usize| {
                let at = from.coefficients[index];
                at + share * (wanted[index] - at)
            };
            let there: Row = std::array::from_fn(between);
            let figures = self.relative(&Guess { coefficients: there, ..*from })?;
            if squares(&figures) < before {
                return Ok(Some((there, figures)));
            }
            share /= 2.0;
        }
        Ok(None)
    }
}

/// Of the relative errors.
fn squares(relative: &[f64]) -> f64 {
    relative.iter().map(|value| (value - 1.0).powi(2)).sum()
}
