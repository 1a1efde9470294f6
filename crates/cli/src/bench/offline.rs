//! The engine in this process as the target, set up as `servelab serve` sets it up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use servelab_bench::offline::{Offline, RealTime, Time, VirtualTime};
use servelab_bench::prompt::{Pool, Writer};
use servelab_bench::result::{ClientInfo, Endpoint, ModelInfo, TargetInfo};
use servelab_engine::{Engine, ModelRunner};
use servelab_server::{LoadError, LoadedModel};
use servelab_sim::VirtualClock;
use servelab_telemetry::LogFormat;

use super::machine;
use super::settings::BenchSettings;
use super::{Error, Prepared};
use crate::device;
use crate::load::{self, Summary};
use crate::settings::{EngineSettings, ModelSettings};
use crate::simulated::Speed;

/// Ids that prompts are drawn from: enough that no two prompts are alike by chance.
const MAX_IDS: usize = 4096;

/// Warnings, and how the GPU spent its time, which its runner says at the end.
const LOG_LEVEL: &str = "warn,servelab_model::cuda::runner=info";

type Runner = Box<dyn ModelRunner + Send>;

/// Loads the model.
///
/// # Errors
/// If it cannot be loaded, or its context is too short for the workload.
pub fn prepare(
    settings: &BenchSettings,
    model: &ModelSettings,
    engine: &EngineSettings,
) -> Result<Prepared<Offline<Runner, EngineTime>>, Error> {
    // Only one program logs in this process.
    let _ = servelab_telemetry::init_logs(LogFormat::Human, LOG_LEVEL);
    let (engine, time) = in_time(engine);
    let engine = &engine;
    let device = device::choose(engine).map_err(|error| LoadError(error.to_string()))?;
    let opened = load::open(model)?;
    let (loaded, summary) = load::load(opened, model, engine, &device)?;
    let id = model.served_names[0].clone();
    let workload = settings.workload.clone().within(loaded.engine.max_model_len, settings.fit)?;
    let writer = Writer {
        endpoint: Endpoint::Completions,
        model: id.clone(),
        pool: Pool::Ids(ordinary_ids(&loaded)),
        key: 0,
        salt_text: None,
        ignore_eos: settings.ignore_eos,
        temperature: settings.temperature,
        extra_body: serde_json::Map::new(),
    };
    let info = ModelInfo {
        id,
        root: Some(loaded.root.clone()),
        dtype: Some(summary.weight_dtype.to_owned()),
        max_model_len: Some(loaded.engine.max_model_len),
    };
    let facts = facts(&summary);
    let engine = loaded_engine(loaded, time)?;
    let client = ClientInfo { max_in_flight: settings.session.max_in_flight, ..machine::describe() };
    Ok(Prepared {
        target: engine,
        info: TargetInfo::Offline { engine: facts },
        model: info,
        workload,
        writer,
        client,
        unanswered: None,
    })
}

/// The settings with which a simulated device, if it is one, moves the clock that the load generator looks at.
fn in_time(engine: &EngineSettings) -> (EngineSettings, EngineTime) {
    let mut engine = engine.clone();
    let Some(simulated) = &mut engine.simulated else { return (engine, EngineTime::Real(RealTime::start())) };
    let clock = VirtualClock::default();
    simulated.speed = Speed::Virtual(clock.clone());
    (engine, EngineTime::Virtual(VirtualTime::of(clock)))
}

/// Time of the device: on the wall, or simulated.
pub enum EngineTime {
    Real(RealTime),
    Virtual(VirtualTime),
}

impl Time for EngineTime {
    fn restart(&mut self) {
        match self {
            Self::Real(time) => time.restart(),
            Self::Virtual(time) => time.restart(),
        }
    }

    fn now(&self) -> Duration {
        match self {
            Self::Real(time) => time.now(),
            Self::Virtual(time) => time.now(),
        }
    }

    fn wait_until(&mut self, at: Duration) {
        match self {
            Self::Real(time) => time.wait_until(at),
            Self::Virtual(time) => time.wait_until(at),
        }
    }
}

fn loaded_engine(loaded: LoadedModel, time: EngineTime) -> Result<Offline<Runner, EngineTime>, LoadError> {
    let engine = Engine::new(loaded.engine, loaded.runner).map_err(|error| LoadError(error.to_string()))?;
    Ok(Offline::new(engine, time, loaded.eos_token_ids.into()))
}

/// Tokens that are no special ones.
fn ordinary_ids(loaded: &LoadedModel) -> Arc<[u32]> {
    let ids: Vec<u32> = (0..loaded.vocab_size)
        .filter(|id| !loaded.prompter.tokenizer.is_special(*id))
        .take(MAX_IDS)
        .collect();
    // A vocabulary of nothing but special tokens is still one.
    if ids.is_empty() { (0..loaded.vocab_size.max(1)).collect() } else { ids.into() }
}

fn facts(summary: &Summary) -> BTreeMap<String, String> {
    let engine = &summary.engine;
    let facts = [
        ("device", summary.device.clone()),
        ("architecture", summary.architecture.to_owned()),
        ("parameters", summary.parameters.to_string()),
        ("weight_dtype", summary.weight_dtype.to_owned()),
        ("kv_dtype", summary.kv_dtype.to_owned()),
        ("block_size", engine.block_size.to_string()),
        ("num_blocks", engine.num_blocks.to_string()),
        ("max_batched_tokens", engine.max_batched_tokens.to_string()),
        ("max_running", engine.max_running.to_string()),
        ("prefix_cache", engine.prefix_cache.to_string()),
    ];
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
