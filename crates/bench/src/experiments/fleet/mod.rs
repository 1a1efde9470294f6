//! Experiments that take a fleet. Few have one, so that theirs is simulated: `servelab sim` and
//! `servelab plan --simulate` are started as a reader would start them, and each experiment keeps its commands.

pub mod day;
pub mod from_zero;
pub mod ladder;
pub mod policies;
pub mod size;
pub mod tails;
pub mod users;

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use servelab_sim::HardwareProfile;

use super::lab::{Lab, Said, Subject};
use super::measurement::{Circumstances, Origin, PredictionKind};
use super::replica::Launcher;
use super::{ExperimentError, ExperimentId};
use crate::ledger::calculation::{Calculation, On};
use crate::ledger::{Chosen, Ledger};

const HARDWARE: &str = "h100";
pub const SMALL_MODEL: &str = "llama-3.1-8b";
pub const LARGE_MODEL: &str = "llama-3.1-70b";
/// GPUs of a replica of the large model.
pub const LARGE_MODEL_GPUS: u32 = 4;

/// What `servelab sim --json` says of one fleet, as far as experiments read it.
#[derive(Debug, Deserialize)]
pub struct Outcome {
    pub requests: u64,
    pub completed: u64,
    pub seconds: f64,
    pub ttft_seconds: Option<Percentiles>,
    pub tpot_seconds: Option<Percentiles>,
    pub e2e_seconds: Option<Percentiles>,
    pub output_tokens: u64,
    pub hit_rate: Option<f64>,
    pub mean_ready: f64,
    pub rows: Vec<Moment>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

/// One of the equal parts of the time that was simulated.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Moment {
    pub offered_per_second: f64,
}

impl Outcome {
    /// # Errors
    /// If no request got that far.
    pub fn percentiles(found: Option<Percentiles>) -> Result<Percentiles, ExperimentError> {
        found.ok_or_else(|| ExperimentError::DoesNotStand("no request was answered".to_owned()))
    }
}

/// What `servelab plan --simulate --json` found.
#[derive(Debug, Deserialize)]
struct SmallestFleet {
    gpus: u64,
}

/// The model and the hardware that an experiment simulates, and under which circumstances. `None` for an experiment
/// that measures what is there.
///
/// # Errors
/// None with the data that this crate is built with, which a test reads.
pub fn subject(
    experiment: ExperimentId,
    program: PathBuf,
    origin: Origin,
) -> Result<Option<(Subject, Circumstances)>, ExperimentError> {
    let Some(name) = model(experiment) else { return Ok(None) };
    let mut ledger = Ledger::load()?;
    let model = ledger.models.remove(name).ok_or(ExperimentError::NotUnderstood("a model of the ledger"))?;
    let hardware = HardwareProfile::named(HARDWARE)?;
    let subject = Subject {
        launcher: Launcher { program, arguments: Vec::new() },
        model: model.clone(),
        hardware: hardware.clone(),
        is_gpu: false,
        dollars_per_hour: hardware.dollars_per_hour.unwrap_or(1.0),
    };
    let circumstances = Circumstances {
        hardware: format!("simulated {}", hardware.name),
        is_gpu: false,
        limits: hardware,
        model,
        weights: "no weights".to_owned(),
        // How busy the machine is does not matter in virtual time.
        busy_share: None,
        origin,
    };
    Ok(Some((subject, circumstances)))
}

/// The model that an experiment simulates, by its name in the ledger; `None` if it measures what is there.
pub fn model(experiment: ExperimentId) -> Option<&'static str> {
    match experiment {
        ExperimentId::FleetLadder | ExperimentId::FleetSize | ExperimentId::FleetUsers => Some(LARGE_MODEL),
        ExperimentId::FleetDay
        | ExperimentId::FleetTails
        | ExperimentId::FleetPolicies
        | ExperimentId::FleetFromZero => Some(SMALL_MODEL),
        ExperimentId::BatchLadder
        | ExperimentId::Naive
        | ExperimentId::KvBytes
        | ExperimentId::FirstPreemption
        | ExperimentId::PrefixHit
        | ExperimentId::Starvation
        | ExperimentId::ColdStart
        | ExperimentId::LittlesLaw
        | ExperimentId::Price => None,
    }
}

/// Runs `servelab sim` with these flags besides model and hardware: one outcome for each scaler.
///
/// # Errors
/// If it fails.
pub async fn simulate(lab: &mut Lab<'_>, flags: &[&str]) -> Result<Vec<Outcome>, ExperimentError> {
    let model = lab.subject.model.name.clone();
    command(lab, &[&["sim", "--json", "--hardware", HARDWARE, "--model", &model], flags].concat()).await
}

/// The same with one scaler, or with a fixed number of replicas.
///
/// # Errors
/// If it fails.
pub async fn simulate_one(lab: &mut Lab<'_>, flags: &[&str]) -> Result<Outcome, ExperimentError> {
    let mut outcomes = simulate(lab, flags).await?;
    outcomes.pop().ok_or(ExperimentError::NotUnderstood("an outcome"))
}

/// GPUs of the smallest fleet that `servelab plan --simulate` finds with these flags besides model and hardware.
///
/// # Errors
/// If it fails.
pub async fn smallest_fleet(lab: &mut Lab<'_>, flags: &[&str]) -> Result<u64, ExperimentError> {
    let (model, gpus) = (lab.subject.model.name.clone(), LARGE_MODEL_GPUS.to_string());
    let fixed = ["plan", "--simulate", "--json", "--hardware", HARDWARE, "--model", &model];
    let size = ["--gpus-per-replica", &gpus];
    let found: SmallestFleet = command(lab, &[&fixed[..], &size, flags].concat()).await?;
    Ok(found.gpus)
}

/// What a command of this program prints.
async fn command<T: DeserializeOwned>(lab: &mut Lab<'_>, arguments: &[&str]) -> Result<T, ExperimentError> {
    lab.flags.push(arguments.join(" "));
    let printed = lab.subject.launcher.output(arguments).await?;
    serde_json::from_slice(&printed).map_err(|error| ExperimentError::Simulation(error.to_string()))
}

/// Says what a closed form of the ledger expects of the subject.
///
/// # Errors
/// If it cannot be computed.
pub fn expect(
    lab: &mut Lab<'_>,
    key: &'static str,
    label: impl Into<String>,
    kind: PredictionKind,
    calculation: &Calculation,
) -> Result<Said, ExperimentError> {
    let chosen = Chosen { model: lab.subject.model.clone(), hardware: lab.subject.hardware.clone() };
    let computed = calculation.evaluate(Ledger::load()?.inputs(&chosen))?;
    let because = format!("{}: {}", computed.formula, computed.substituted);
    Ok(lab.predict(key, label, computed.unit, kind, computed.value, because))
}

/// The subject on so many GPUs a replica.
pub fn on(gpus: u32) -> On {
    On { gpus: Some(gpus), ..On::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_simulated_experiment_has_a_model_that_is_there() {
        let origin = Origin { os: "linux".into(), tool_version: "0.1.0".into(), tool_commit: None };
        for experiment in ExperimentId::ALL {
            let found = subject(experiment, "servelab".into(), origin.clone()).unwrap();
            assert_eq!(found.is_some(), experiment.name().starts_with("fleet-"), "{experiment:?}");
            assert_eq!(found.is_some(), experiment.is_simulated(), "{experiment:?}");
            if let Some((_, circumstances)) = found {
                assert_eq!(circumstances.hardware, "simulated H100 SXM");
            }
        }
    }
}
