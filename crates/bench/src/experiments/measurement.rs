//! What an experiment leaves behind, as plain data: one line of the results file.

use serde::{Deserialize, Serialize};
use servelab_sim::numbers::short;
use servelab_sim::{HardwareProfile, ModelShape};

use super::ExperimentId;
use crate::ledger::Unit;
use crate::ledger::unit::percent;

/// Raised when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// A measurement may be beyond its limit by that much: peaks in data sheets are rounded.
const TOLERANCE: f64 = 0.02;

/// From here on a machine counts as busy.
const BUSY_SHARE: f64 = 0.3;

/// One experiment, carried out once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    pub schema_version: u32,
    pub experiment: ExperimentId,
    pub unix_seconds: u64,
    pub took_seconds: f64,
    pub circumstances: Circumstances,
    /// Flags of the servers that were started, besides those for the model; of a simulation its commands.
    pub server_flags: Vec<String>,
    pub findings: Vec<Finding>,
    /// Of the batch ladder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ladder: Option<Ladder>,
}

/// Where and with what a measurement was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Circumstances {
    /// The name of the hardware under the model; of a simulated one it says so.
    pub hardware: String,
    /// Whether that is a GPU.
    pub is_gpu: bool,
    /// What it can do, measured or from its data sheet; predictions come from here.
    pub limits: HardwareProfile,
    pub model: ModelShape,
    /// Where the weights are from: `demo checkpoint`, `random weights`, `no weights`, or the checkpoint's name.
    pub weights: String,
    /// How busy other programs kept each processor in the minute before; 1 is all of it. `None` where nobody tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_share: Option<f64>,
    #[serde(flatten)]
    pub origin: Origin,
}

/// The program that measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    pub os: String,
    pub tool_version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_commit: Option<String>,
}

impl Circumstances {
    /// Whether others took so much of the machine that times are too long.
    pub fn is_busy(&self) -> bool {
        self.busy_share.is_some_and(|share| share > BUSY_SHARE)
    }
}

/// One number that was measured, beside what was expected of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What rows of the ledger ask for.
    pub key: String,
    pub label: String,
    pub unit: Unit,
    /// Made before the measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    pub measured: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Interval>,
    /// What a reader should know about how it came about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// The 95 % interval of a measured value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub low: f64,
    /// `None`: the measurements set no upper bound.
    pub high: Option<f64>,
}

/// A number that was said before it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    pub value: f64,
    pub kind: PredictionKind,
    /// The formula with its numbers.
    pub because: String,
}

/// What a prediction claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionKind {
    /// The measurement should be equal to it.
    Equal,
    /// The measurement cannot be below it.
    Floor,
    /// The measurement cannot be above it.
    Ceiling,
}

impl Finding {
    /// Measured over predicted, less one.
    pub fn error(&self) -> Option<f64> {
        let prediction = self.prediction.as_ref().filter(|prediction| prediction.value != 0.0)?;
        Some(self.measured / prediction.value - 1.0)
    }

    /// Whether the measurement is beyond a limit of physics, so that one of the two is wrong.
    pub fn is_beaten(&self) -> bool {
        match (&self.prediction, self.error()) {
            (Some(Prediction { kind: PredictionKind::Floor, .. }), Some(error)) => error < -TOLERANCE,
            (Some(Prediction { kind: PredictionKind::Ceiling, .. }), Some(error)) => error > TOLERANCE,
            _ => false,
        }
    }

    /// `12.1 sequences (95 %: 10.2 to 14.5)`.
    pub fn measured_text(&self) -> String {
        let measured = self.unit.show(self.measured);
        match self.interval {
            None => measured,
            Some(Interval { low, high: Some(high) }) => {
                format!("{measured} (95 %: {} to {})", self.plain(low), self.plain(high))
            }
            Some(Interval { low, high: None }) => format!("{measured} (95 %: above {})", self.plain(low)),
        }
    }

    /// Without the word for the unit where that follows the number.
    fn plain(&self, value: f64) -> String {
        let text = self.unit.show(value);
        match self.unit {
            Unit::Sequences | Unit::Requests | Unit::Tokens | Unit::TokensPerSecond => {
                text.split(' ').next().unwrap_or_default().to_owned()
            }
            _ => text,
        }
    }

    /// How the measurement compares: `predicted 2.51: error -14 %`, `limit 76,000: 7.1 % of it`.
    pub fn comparison_text(&self) -> Option<String> {
        let prediction = self.prediction.as_ref()?;
        let predicted = self.plain(prediction.value);
        let ratio = self.measured / prediction.value;
        Some(match (prediction.kind, self.is_beaten()) {
            (PredictionKind::Equal, _) => {
                let error =
                    self.error().map_or_else(|| "none".to_owned(), |error| Unit::Deviation.show(error));
                format!("predicted {predicted}, error {error}")
            }
            (_, true) => format!("limit {predicted}: FASTER THAN PHYSICS, one of the two is wrong"),
            (PredictionKind::Ceiling, false) => format!("limit {predicted}, {} of it", percent(ratio)),
            (PredictionKind::Floor, false) => {
                format!("floor {predicted}, {} times that", short(ratio))
            }
        })
    }
}

/// Throughput over batch: what was measured, what fits it, what was predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ladder {
    pub context_tokens: f64,
    /// Each batch that was measured, each repeat.
    pub points: Vec<LadderPoint>,
    /// The fitted `throughput(B) = most * B / (B + half)`.
    pub half_batch: f64,
    pub most_tokens_per_second: f64,
    /// The roofline's throughput at each batch of the ladder.
    pub predicted: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LadderPoint {
    pub sequences: f64,
    pub tokens_per_second: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(kind: PredictionKind, predicted: f64, measured: f64) -> Finding {
        Finding {
            key: "k".into(),
            label: "l".into(),
            unit: Unit::TokensPerSecond,
            prediction: Some(Prediction { value: predicted, kind, because: "2 x 50".into() }),
            measured,
            interval: None,
            note: None,
        }
    }

    #[test]
    fn an_error_is_relative_to_the_prediction() {
        let finding = finding(PredictionKind::Equal, 100.0, 86.0);
        assert!((finding.error().unwrap() + 0.14).abs() < 1e-12);
        assert_eq!(finding.comparison_text().unwrap(), "predicted 100, error -14 %");
        assert!(!finding.is_beaten(), "an expectation may be missed on either side");
    }

    #[test]
    fn limits_may_not_be_beaten_by_more_than_their_rounding() {
        for (kind, measured, beaten) in [
            (PredictionKind::Ceiling, 101.0, false),
            (PredictionKind::Ceiling, 103.0, true),
            (PredictionKind::Floor, 99.0, false),
            (PredictionKind::Floor, 97.0, true),
            (PredictionKind::Floor, 500.0, false),
        ] {
            let finding = finding(kind, 100.0, measured);
            assert_eq!(finding.is_beaten(), beaten, "{kind:?} {measured}");
            assert_eq!(finding.comparison_text().unwrap().contains("PHYSICS"), beaten);
        }
    }

    #[test]
    fn intervals_are_shown_with_their_open_end() {
        let mut finding = finding(PredictionKind::Equal, 10.0, 12.1);
        finding.unit = Unit::Sequences;
        finding.interval = Some(Interval { low: 10.2, high: Some(14.5) });
        assert_eq!(finding.measured_text(), "12.1 sequences (95 %: 10.2 to 14.5)");
        finding.interval = Some(Interval { low: 10.2, high: None });
        assert_eq!(finding.measured_text(), "12.1 sequences (95 %: above 10.2)");
    }
}
