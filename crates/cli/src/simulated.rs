//! A simulated device in place of a real one: its settings, and what it takes to serve with it.

use std::sync::Arc;
use std::time::Duration;

use servelab_engine::EngineConfig;
use servelab_model::{LoadTimings, LoadedModel, MemoryReport, PoolSize, Prepared};
use servelab_server::LoadError;
use servelab_sim::{
    Answers, CostModel, DeviceOptions, Dtype, HardwareProfile, KvPool, ModelShape, Pace, SimulatedDevice,
    VirtualClock, kv_pool,
};
use servelab_text::Tokenizer;

use crate::args::{self, Typed};
use crate::plan_command;
use crate::settings::{EngineSettings, ModelSettings};

/// A pool that holds less is of no use.
const LEAST_TOKENS: u32 = 2048;

/// What is simulated, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedSettings {
    /// Default h100.
    pub hardware: HardwareProfile,
    /// That share the model. Default 1.
    pub gpus: u32,
    /// Default 1: as fast as the device.
    pub speed: Speed,
    /// Default: never.
    pub lost_after: Option<Duration>,
    /// Default bf16.
    pub weight_dtype: Dtype,
    /// Default: 16 bits, or 32 where the weights have them.
    pub kv_dtype: Dtype,
}

/// How time passes.
#[derive(Clone, Debug, PartialEq)]
pub enum Speed {
    /// So many times as fast as the device.
    Times(f64),
    /// Steps take no time.
    Unlimited,
    /// At once, and a clock that shows when it would have been.
    Virtual(VirtualClock),
}

/// A setting of the simulated device that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SimulatedError {
    #[error("--{name} {value} goes with --device sim only; add that, or leave it out")]
    Alone { name: &'static str, value: String },
    #[error("--{name} is {value}; it must be {rule}")]
    Range { name: &'static str, value: String, rule: &'static str },
    #[error("--tp {tp}: the profile was calibrated with {gpus}; leave --tp out, or calibrate with {tp}")]
    Calibrated { tp: u32, gpus: u32 },
    #[error(transparent)]
    Hardware(Box<plan_command::Error>),
}

impl SimulatedSettings {
    /// What was typed for `--device sim`; `None` for any other device.
    ///
    /// # Errors
    /// If it was typed for another device, or cannot be.
    pub fn new(typed: &Typed) -> Result<Option<Self>, SimulatedError> {
        if typed.device != Some(args::Device::Sim) {
            let given = [
                ("hardware", typed.hardware.clone()),
                ("tp", typed.tp.map(|gpus| gpus.to_string())),
                ("speed", typed.speed.map(|speed| speed.to_string())),
                ("lost-after", typed.lost_after.map(|after| format!("{:?}", after.0))),
            ];
            let given = given.into_iter().find_map(|(name, value)| Some((name, value?)));
            return given.map_or(Ok(None), |(name, value)| Err(SimulatedError::Alone { name, value }));
        }
        let hardware = plan_command::named_or_file(typed.hardware.as_deref().unwrap_or("h100"))
            .map_err(|error| SimulatedError::Hardware(Box::new(error)))?;
        let gpus = gpus(typed, &hardware)?;
        let weight_dtype = match typed.dtype {
            Some(args::Dtype::F32) => Dtype::F32,
            Some(args::Dtype::F16) => Dtype::F16,
            Some(args::Dtype::Fp8) => Dtype::Fp8,
            Some(args::Dtype::Auto | args::Dtype::Bf16) | None => Dtype::Bf16,
        };
        let kv_dtype = match typed.kv_dtype {
            Some(args::KvDtype::F32) => Dtype::F32,
            Some(args::KvDtype::F16) => Dtype::F16,
            Some(args::KvDtype::Bf16) => Dtype::Bf16,
            Some(args::KvDtype::Fp8) => Dtype::Fp8,
            Some(args::KvDtype::Auto) | None => match weight_dtype {
                Dtype::Fp8 => Dtype::Bf16,
                wide => wide,
            },
        };
        let lost_after = typed.lost_after.map(|after| after.0);
        Ok(Some(Self { hardware, gpus, speed: speed(typed.speed)?, lost_after, weight_dtype, kv_dtype }))
    }

    /// Such as `4 x H100 SXM`.
    pub fn name(&self) -> String {
        match self.gpus {
            1 => self.hardware.name.clone(),
            gpus => format!("{gpus} x {}", self.hardware.name),
        }
    }

    /// In one line: what is not real, and how far its times are to be trusted.
    pub fn describe(&self) -> String {
        let speed = match self.speed {
            Speed::Times(1.0) => String::new(),
            Speed::Times(speed) => format!(" at {speed} times its speed"),
            Speed::Unlimited => " without taking time".to_owned(),
            Speed::Virtual(_) => " in virtual time".to_owned(),
        };
        let times = match &self.hardware.calibration {
            Some(calibration) => format!("calibrated with {}", calibration.model),
            None => "estimated from data sheets".to_owned(),
        };
        let end = self.lost_after.map_or(String::new(), |after| format!(", and it is lost after {after:?}"));
        format!(
            "{} is SIMULATED{speed}, its times {times}{end}; no model is computed, answers are sentences of a fixed list",
            self.name()
        )
    }

    /// As metrics and `/state` show it.
    pub fn shown_speed(&self) -> String {
        match self.speed {
            Speed::Times(speed) => speed.to_string(),
            Speed::Unlimited => "inf".to_owned(),
            Speed::Virtual(_) => "virtual".to_owned(),
        }
    }

    fn pace(&self) -> Pace {
        match &self.speed {
            Speed::Times(speed) => Pace::real(*speed),
            Speed::Unlimited => Pace::real(1.0),
            Speed::Virtual(clock) => Pace::Virtual(clock.clone()),
        }
    }
}

fn gpus(typed: &Typed, hardware: &HardwareProfile) -> Result<u32, SimulatedError> {
    match (&hardware.calibration, typed.tp) {
        (_, Some(tp)) if !(1..=1024).contains(&tp) => {
            Err(SimulatedError::Range { name: "tp", value: tp.to_string(), rule: "from 1 to 1024" })
        }
        (Some(calibration), Some(tp)) if tp != calibration.gpus => {
            Err(SimulatedError::Calibrated { tp, gpus: calibration.gpus })
        }
        (Some(calibration), _) => Ok(calibration.gpus),
        (None, tp) => Ok(tp.unwrap_or(1)),
    }
}

fn speed(typed: Option<f64>) -> Result<Speed, SimulatedError> {
    match typed.unwrap_or(1.0) {
        f64::INFINITY => Ok(Speed::Unlimited),
        speed if (0.001..=1e6).contains(&speed) => Ok(Speed::Times(speed)),
        speed => Err(SimulatedError::Range {
            name: "speed",
            value: speed.to_string(),
            rule: "from 0.001 to 1e6, or inf for steps that take no time",
        }),
    }
}

/// A replica on a simulated device.
pub struct OnSimulated {
    pub model: LoadedModel,
    pub engine: EngineConfig,
    pub weight_dtype: &'static str,
    pub kv_dtype: &'static str,
}

/// Sizes the replica as on the real GPUs, and puts a device without weights behind it.
///
/// # Errors
/// If the model does not fit, does not split over that many GPUs, or is asked for more than its context.
pub fn load(
    prepared: &Prepared,
    model: &ModelSettings,
    engine: &EngineSettings,
    simulated: &SimulatedSettings,
    words: (&Tokenizer, &[u32]),
) -> Result<OnSimulated, LoadError> {
    let failed = |error: &dyn std::fmt::Display| LoadError(error.to_string());
    let config = prepared.config();
    let shape =
        plan_command::shape_of(&model.served_names[0], config, simulated.weight_dtype, simulated.kv_dtype);
    shape.validate().map_err(|error| failed(&error))?;
    let cost = match simulated.speed {
        Speed::Unlimited => CostModel::Nothing,
        Speed::Times(_) | Speed::Virtual(_) => {
            CostModel::new(&shape, &simulated.hardware, simulated.gpus).map_err(|error| failed(&error))?
        }
    };
    let context = crate::load::context(config);
    if let Some(asked) = model.max_model_len.filter(|asked| *asked > context) {
        return Err(LoadError(format!(
            "--max-model-len {asked} exceeds the model's context of {context} tokens; lower it to {context} or less"
        )));
    }
    let pool = pool(&shape, engine, simulated, model.max_model_len.unwrap_or(LEAST_TOKENS.min(context)))?;
    let (tokenizer, ends) = words;
    let answers = Answers::new(|text| tokenizer.encode(text, false), ends.first().copied())
        .map_err(|error| failed(&error))?;
    let room = pool.num_blocks.saturating_mul(engine.block_size);
    // Where steps take no time there is nothing to prepare them beside.
    let overlaps = engine.gpu.ways.overlap && simulated.speed != Speed::Unlimited;
    let steps_at_once = if overlaps { 2 } else { 1 };
    let engine = EngineConfig {
        block_size: engine.block_size,
        num_blocks: pool.num_blocks,
        max_model_len: model.max_model_len.unwrap_or(context.min(room)),
        max_batched_tokens: engine.gpu.max_batched_tokens,
        max_running: engine.gpu.max_running,
        max_waiting: engine.max_waiting,
        prefix_cache: engine.prefix_cache,
    };
    Ok(OnSimulated {
        model: LoadedModel {
            runner: Box::new(SimulatedDevice::new(DeviceOptions {
                num_blocks: engine.num_blocks,
                block_size: engine.block_size,
                steps_at_once,
                cost,
                pace: simulated.pace(),
                lost_after: simulated.lost_after,
                answers: Arc::new(answers),
            })),
            config: config.clone(),
            text: prepared.text_files().clone(),
            memory: MemoryReport {
                weight_bytes: pool.weight_bytes as u64,
                kv_cache_bytes: pool.pool_bytes as u64,
                activation_bytes: pool.activation_bytes as u64,
            },
            timings: LoadTimings::default(),
        },
        engine,
        weight_dtype: simulated.weight_dtype.name(),
        kv_dtype: simulated.kv_dtype.name(),
    })
}

/// As large as was asked for, else what the GPUs' memory leaves.
fn pool(
    shape: &ModelShape,
    engine: &EngineSettings,
    simulated: &SimulatedSettings,
    least_tokens: u32,
) -> Result<KvPool, LoadError> {
    let share = match engine.gpu.pool {
        PoolSize::Utilization(share) => share,
        PoolSize::Blocks(_) | PoolSize::Bytes(_) => 1.0,
    };
    let least_tokens = match engine.gpu.pool {
        PoolSize::Utilization(_) => least_tokens,
        PoolSize::Blocks(_) | PoolSize::Bytes(_) => engine.block_size,
    };
    let (hardware, gpus) = (&simulated.hardware, simulated.gpus);
    let all = kv_pool(shape, hardware, gpus, share, engine.block_size, u64::from(least_tokens))
        .map_err(|error| LoadError(error.to_string()))?;
    let block_bytes = all.bytes_per_token * f64::from(engine.block_size);
    let num_blocks = match engine.gpu.pool {
        PoolSize::Utilization(_) => all.num_blocks,
        PoolSize::Blocks(blocks) => blocks,
        PoolSize::Bytes(bytes) => (bytes as f64 / block_bytes) as u32,
    };
    if num_blocks == 0 || num_blocks > all.num_blocks {
        return Err(LoadError(format!(
            "a KV cache of {num_blocks} blocks does not do: {} hold from 1 to {} blocks of {block_bytes} bytes beside \
             the weights; change --kv-blocks or --kv-memory",
            simulated.name(),
            all.num_blocks
        )));
    }
    Ok(KvPool { num_blocks, pool_bytes: f64::from(num_blocks) * block_bytes, ..all })
}
