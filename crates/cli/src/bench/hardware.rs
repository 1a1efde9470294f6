//! `--hardware`: what the hardware under the model allows, beside what was measured.

use std::collections::BTreeMap;

use servelab_bench::limits::limits;
use servelab_bench::result::{Limits, Metrics};
use servelab_model::cpu::{Kernels, limits as cpu_limits};
use servelab_model::{KvDtype, WeightDtype};
use servelab_server::LoadError;
use servelab_sim::{Dtype, HardwareProfile, ModelShape, Roofline};

use super::args::ReportArgs;
use super::machine;
use super::settings::TargetSettings;
use crate::load;
use crate::memory;
use crate::plan_command;
use crate::settings::{EngineSettings, ModelSettings};

/// Several times the last-level cache.
const READ_BYTES: usize = 256 << 20;

/// Hardware or model that nothing can be computed of.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    #[error("{0}")]
    Plan(#[from] plan_command::Error),
    #[error("the shape of the model must be known too; add --model-shape with a name or a config.json")]
    NoShape,
    #[error("--{0} goes with --hardware only; leave it out, or add that")]
    Alone(&'static str),
    #[error("--{0} goes with --url only: offline the model is known; leave it out")]
    Known(&'static str),
    #[error("{0}")]
    Roofline(#[from] servelab_sim::roofline::RooflineError),
    #[error("{0}")]
    Profile(#[from] servelab_sim::HardwareError),
    #[error("cannot load the model: {0}")]
    Load(#[from] LoadError),
}

/// Puts limits beside figures.
pub struct Limiter {
    pub hardware: String,
    /// `None` for this machine's processor.
    pub gpus: Option<u32>,
    /// Number format of the model's weights.
    pub weight_dtype: Dtype,
    /// What was measured of this machine, to be kept with the figures.
    pub facts: BTreeMap<String, String>,
    model: String,
    roofline: Roofline,
}

impl Limiter {
    /// What the flags ask for; `None` if they do not. Measures this machine if that is asked for, which takes some
    /// tenths of a second.
    ///
    /// # Errors
    /// If a name is unknown, or the model does not fit the hardware.
    pub fn new(report: &ReportArgs, target: &TargetSettings) -> Result<Option<Self>, HardwareError> {
        let Some(name) = &report.hardware else {
            let alone = [
                ("gpus", report.gpus.is_some()),
                ("model-shape", report.model_shape.is_some()),
                ("weight-dtype", report.weight_dtype.is_some()),
            ];
            return match alone.iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(HardwareError::Alone(flag)),
                None => Ok(None),
            };
        };
        let (shape, threads) = match target {
            TargetSettings::Offline { model, engine } => {
                (offline_shape(report, model, engine)?, engine.threads)
            }
            TargetSettings::Http(_) => (given_shape(report)?, 0),
        };
        let gpus = report.gpus.unwrap_or(1);
        let profile = match name.as_str() {
            // A small model stays in the caches, and so must what is measured.
            "measured" => {
                measured(threads, shape.weight_dtype, READ_BYTES.min(shape.streamed_bytes() as usize))?
            }
            name => plan_command::named_or_file(name)?,
        };
        let roofline = Roofline::new(&shape, &profile, gpus)?;
        let is_measured = name == "measured";
        let (hardware, facts) = match (is_measured, gpus) {
            // Without the rates, which differ from time to time: results of one machine are comparable.
            (true, _) => (format!("{}, measured", machine::describe().cpu), facts(&profile)),
            (false, 1) => (profile.name, BTreeMap::new()),
            (false, gpus) => (format!("{gpus} x {}", profile.name), BTreeMap::new()),
        };
        let gpus = (!is_measured).then_some(gpus);
        Ok(Some(Self {
            hardware,
            gpus,
            weight_dtype: shape.weight_dtype,
            facts,
            model: shape.name,
            roofline,
        }))
    }

    pub fn limits(&self, metrics: &Metrics) -> Option<Limits> {
        limits(&self.roofline, &self.model, &self.hardware, metrics)
    }
}

fn facts(measured: &HardwareProfile) -> BTreeMap<String, String> {
    let rates = measured.flops_per_second.iter().map(|(dtype, rate)| {
        (format!("measured_arithmetic_{}", dtype.name()), format!("{:.0} GFLOP/s", rate / 1e9))
    });
    let bandwidth = format!("{:.1} GB/s", measured.bandwidth_bytes_per_second / 1e9);
    rates.chain([("measured_bandwidth".to_owned(), bandwidth)]).collect()
}

fn given_shape(report: &ReportArgs) -> Result<ModelShape, HardwareError> {
    let name = report.model_shape.as_deref().ok_or(HardwareError::NoShape)?;
    let dtype = report.weight_dtype.unwrap_or(Dtype::Bf16);
    Ok(plan_command::named_shape(name, dtype, Dtype::Bf16)?)
}

fn offline_shape(
    report: &ReportArgs,
    model: &ModelSettings,
    engine: &EngineSettings,
) -> Result<ModelShape, HardwareError> {
    let given =
        [("model-shape", report.model_shape.is_some()), ("weight-dtype", report.weight_dtype.is_some())];
    if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
        return Err(HardwareError::Known(flag));
    }
    Ok(served_shape(model, engine)?)
}

/// What `servelab serve` with these settings computes on a CPU.
///
/// # Errors
/// If the model's files are not there, or are wrong.
pub fn served_shape(model: &ModelSettings, engine: &EngineSettings) -> Result<ModelShape, LoadError> {
    let prepared = load::open(model)?;
    if let Some(simulated) = &engine.simulated {
        let (weights, keys_and_values) = (simulated.weight_dtype, simulated.kv_dtype);
        return Ok(plan_command::shape_of(
            &model.served_names[0],
            prepared.config(),
            weights,
            keys_and_values,
        ));
    }
    let weights = match prepared.dtype() {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::F16 => Dtype::F16,
        WeightDtype::BF16 => Dtype::Bf16,
    };
    // Where nobody says, keys and values have 16 bits unless the weights have more.
    let keys_and_values = match (engine.kv_dtype, weights) {
        (Some(KvDtype::F32), _) | (None, Dtype::F32) => Dtype::F32,
        (Some(KvDtype::BF16), _) | (None, _) => Dtype::Bf16,
    };
    Ok(plan_command::shape_of(&model.served_names[0], prepared.config(), weights, keys_and_values))
}

/// This machine, with as many threads as the engine computes with, reading over and over `read_bytes` of memory.
///
/// # Errors
/// If what was measured cannot be.
pub fn measured(threads: usize, dtype: Dtype, read_bytes: usize) -> Result<HardwareProfile, HardwareError> {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let (kernels, _) = Kernels::select(threads);
    let found = cpu_limits::measure(&kernels, read_bytes);
    // Weights of 16 bits are widened to f32 where there are no products of 16 bits.
    let flops = match dtype {
        Dtype::Bf16 => found.bf16_flops_per_second.unwrap_or(found.f32_flops_per_second),
        Dtype::F32 | Dtype::F16 | Dtype::Fp8 => found.f32_flops_per_second,
    };
    let memory = memory::free_bytes().unwrap_or(1 << 30) as f64;
    Ok(HardwareProfile::measured(memory, found.read_bytes_per_second, dtype, flops)?)
}
