//! Little's law: requests that arrive by the clock, counted while they are in flight, against rate x mean residence.

use std::time::Duration;

use servelab_sim::formulas::{MeanResidence, in_flight};
use servelab_sim::numbers::{seconds, short};

use super::ExperimentError;
use super::lab::{Lab, Pace, Shape};
use super::measurement::PredictionKind;
use crate::arrivals::ArrivalShape;
use crate::ledger::Unit;
use crate::measure;
use crate::phases::{Extent, PhasePlan};
use crate::result::RequestRecord;
use crate::run::LoadShape;
use crate::stats;

const INPUT_TOKENS: u32 = 32;
/// Some of them meet. With more of them, a server that is a little slower than it was looked at is a crowded one, and
/// the prediction is worth nothing.
const WANTED_IN_FLIGHT: f64 = 0.75;
const RESIDENCE_SECONDS: f64 = 0.25;
const SECONDS: f64 = 8.0;

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let pace = lab.pace().await?;
    let room = lab.max_model_len().saturating_sub(INPUT_TOKENS).max(2);
    let output_tokens = Lab::fitting(RESIDENCE_SECONDS, pace.step_seconds, 16, 256).min(room);
    let alone = Alone::new(pace, output_tokens);
    let rate = WANTED_IN_FLIGHT / (alone.residence.seconds() + WANTED_IN_FLIGHT * alone.shared_seconds);
    let stretch = alone.stretch(rate);
    let said = lab.predict(
        "in_flight",
        format!("in flight at {} req/s", short(rate)),
        Unit::Requests,
        PredictionKind::Equal,
        in_flight(rate, alone.residence) * stretch,
        format!(
            "F7: {}/s x ({} + {} x {}) alone, x {} since requests slow each other down",
            short(rate),
            seconds(alone.residence.ttft_seconds),
            output_tokens - 1,
            seconds(pace.step_seconds),
            short(stretch)
        ),
    );
    let because = "the two are one number, counted in two ways".to_owned();
    let identity = lab.predict(
        "identity",
        "in flight / (rate x mean residence), both measured",
        Unit::Factor,
        PredictionKind::Equal,
        1.0,
        because,
    );
    let shortcut = Lab::unpredicted("p99_in_flight", "what rate x p99 residence would say", Unit::Requests);
    lab.progress("requests arrive by the clock");
    let load = LoadShape::Open { arrivals: ArrivalShape::poisson(rate), max_concurrency: None };
    let measured = Extent::Time(Duration::from_secs_f64(SECONDS));
    let phases = PhasePlan { warm_up: Extent::Requests(0), measured, cool_down: false };
    let log = lab.load(load, phases, Shape { input_tokens: INPUT_TOKENS, output_tokens }).await?;
    let law = measure::littles_law(&log);
    if !law.holds {
        let found = format!("{:.3} and {:.3}", law.mean_in_flight, law.rate_times_residence);
        return Err(ExperimentError::DoesNotStand(format!("Little's law does not hold: {found}")));
    }
    let (mean, p99) = residences(&log.records);
    let note = format!("{} requests, mean residence {}", log.records.len(), seconds(mean));
    lab.found(said, law.mean_in_flight, None, Some(note));
    lab.found(identity, law.mean_in_flight / law.rate_times_residence, None, None);
    let measured_rate = law.rate_times_residence / mean;
    lab.found(shortcut, measured_rate * p99, None, Some(format!("the p99 is {}", seconds(p99))));
    Ok(())
}

/// A request alone.
#[derive(Clone, Copy, Debug)]
struct Alone {
    residence: MeanResidence,
    /// The part of it in which it keeps others waiting: its prefill, and what it adds to each step.
    shared_seconds: f64,
}

impl Alone {
    fn new(pace: Pace, output_tokens: u32) -> Self {
        let prefill_seconds = f64::from(INPUT_TOKENS) * pace.prefill_seconds_per_token;
        let steps = f64::from(output_tokens - 1);
        Self {
            residence: MeanResidence {
                ttft_seconds: pace.overhead_seconds + prefill_seconds,
                output_tokens: steps,
                tpot_seconds: pace.step_seconds,
            },
            shared_seconds: prefill_seconds + steps * pace.step_more_seconds,
        }
    }

    /// By how much residences grow at a rate of arrivals. Requests share the server as in processor sharing, where
    /// a request of which `n` are there advances at `1 / (alone + (n - 1) * more)`; for Poisson arrivals `n` then has
    /// a negative binomial distribution, whatever the lengths (Cohen, "The Multiple Phase Service Network with
    /// Generalized Processor Sharing", 1979), and its mean is `rate * alone / (1 - rate * more)`.
    fn stretch(self, rate: f64) -> f64 {
        1.0 / (1.0 - rate * self.shared_seconds)
    }
}

/// Mean and 99th percentile, from sending to the end.
fn residences(records: &[RequestRecord]) -> (f64, f64) {
    let residence = |record: &RequestRecord| Some(record.end_seconds - record.sent_seconds?);
    let mut all: Vec<f64> = records.iter().filter_map(residence).collect();
    all.sort_unstable_by(f64::total_cmp);
    (stats::mean(&all), stats::percentile(&all, 99.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0.1 s alone, of which half keeps others waiting, at 10/s: p(n) is proportional to the product of
    /// rate x (0.1 + (k - 1) x 0.05) / k over k up to n.
    #[test]
    fn the_stretch_is_that_of_the_distribution() {
        let residence = MeanResidence { ttft_seconds: 0.1, output_tokens: 0.0, tpot_seconds: 0.0 };
        let alone = Alone { residence, shared_seconds: 0.05 };
        let (mut weight, mut all, mut mean) = (1.0, 1.0, 0.0);
        for n in 1..2000 {
            weight *= 10.0 * (0.1 + f64::from(n - 1) * 0.05) / f64::from(n);
            all += weight;
            mean += f64::from(n) * weight;
        }
        let predicted = in_flight(10.0, residence) * alone.stretch(10.0);
        assert!(
            (predicted - 2.0).abs() < 1e-9 && (mean / all - 2.0).abs() < 1e-9,
            "{predicted} {}",
            mean / all
        );
    }
}
