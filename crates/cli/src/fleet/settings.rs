//! From what was typed to a simulation that is ready to run.

use std::time::Duration;

use servelab_bench::arrivals::{ArrivalError, ArrivalShape, Stage};
use servelab_bench::result::{Slo, SloLimit, SloMetric};
use servelab_bench::workload::{Workload, WorkloadError};
use servelab_engine::EngineConfig;
use servelab_fleet::settings::MAX_PODS;
use servelab_fleet::{
    FaultSettings, Load, NodeSettings, PodSettings, ReplicaKind, RouterSettings, Settings, StartStages,
    traffic,
};
use servelab_router::choice::policy::Policy;
use servelab_sim::{CostModel, DoesNotFit, Dtype, HardwareProfile, ModelShape, RooflineError, kv_pool};

use super::args::{FleetArgs, Shape};
use crate::plan_command;
use crate::size::TimeSpan;

/// What a disk or a network volume gives while weights are loaded.
const LOAD_BYTES_PER_SECOND: f64 = 2e9;
/// A pool that holds less is of no use.
const LEAST_TOKENS: u64 = 2048;
const DAY: Duration = Duration::from_secs(86_400);

/// A flag that cannot be, or does not go with the others.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    #[error("--{option} is {value}; it must be {rule}")]
    Range { option: &'static str, value: String, rule: &'static str },
    #[error("--{option} goes with {with} only; add that, or leave it out")]
    Needs { option: &'static str, with: &'static str },
    #[error("{0} exclude each other; give one")]
    Several(String),
    #[error("--policy: {0}, or oracle")]
    Policy(String),
    #[error("--tp {tp}: the profile was calibrated with {gpus}; leave --tp out, or calibrate with {tp}")]
    Calibrated { tp: u32, gpus: u32 },
    #[error(transparent)]
    Names(#[from] plan_command::Error),
    #[error("--hardware: {0}")]
    Roofline(#[from] RooflineError),
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error("the load: {0}")]
    Arrivals(#[from] ArrivalError),
}

fn range(option: &'static str, value: impl ToString, rule: &'static str) -> UsageError {
    UsageError::Range { option, value: value.to_string(), rule }
}

/// What is simulated, before anybody says how many replicas there are.
pub struct Prepared {
    pub settings: Settings,
    pub shape: ModelShape,
    pub hardware: HardwareProfile,
}

/// How many replicas there are at the beginning, and at most.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub initial: u32,
    pub most: u32,
}

impl FleetArgs {
    /// The simulation with so many replicas.
    ///
    /// # Errors
    /// A flag that cannot be, or does not go with the others.
    pub fn prepare(&self, bounds: Bounds) -> Result<Prepared, UsageError> {
        let (kind, shape, hardware) = self.kind()?;
        let duration = self.duration();
        if self.workload.no_salt {
            return Err(UsageError::Needs { option: "no-salt", with: "servelab bench" });
        }
        let workload = Workload::new(&self.workload.options())?
            .within(kind.engine.max_model_len, self.workload.fit())?;
        let load = self.load(&workload, duration)?;
        let pods = self.pods(&kind, bounds)?;
        let settings = Settings {
            seed: self.workload.seed.unwrap_or(0),
            is_exact: self.replica.exact,
            load,
            workload,
            duration,
            router: self.router_settings()?,
            network_time: time(self.router.network_time, 0.0),
            pods,
            faults: FaultSettings {
                crashes_per_hour: self.faults.crashes_per_hour.unwrap_or(0.0),
                partitions_per_hour: self.faults.partitions_per_hour.unwrap_or(0.0),
                partition: time(self.faults.partition_time, 30.0),
            },
            scrape_interval: time(self.scaling.scrape_interval, 5.0),
            model_name: self.scaling.served_model_name.clone().unwrap_or_else(|| shape.name.clone()),
            slo: self.slo(),
            dollars_per_gpu_hour: self.dollars(&hardware)?,
            kind,
        };
        Ok(Prepared { settings, shape, hardware })
    }

    fn slo(&self) -> Slo {
        let default = || vec![SloLimit { metric: SloMetric::Ttft, limit_ms: 1000.0, percentile: 95.0 }];
        let typed = &self.load.slo;
        Slo { limits: if typed.is_empty() { default() } else { typed.clone() } }
    }

    fn dollars(&self, hardware: &HardwareProfile) -> Result<f64, UsageError> {
        match self.report.price {
            Some(price) if !(0.0..=1e5).contains(&price) => {
                Err(range("price", price, "from 0 to 100000 dollars"))
            }
            Some(price) => Ok(price),
            None => Ok(hardware.dollars_per_hour.unwrap_or(0.0)),
        }
    }

    // ---- the replica ----

    fn kind(&self) -> Result<(ReplicaKind, ModelShape, HardwareProfile), UsageError> {
        let typed = &self.replica;
        let dtype = typed.dtype.unwrap_or(Dtype::Bf16);
        let model = typed.model.as_deref().unwrap_or("llama-3.1-8b");
        let shape = plan_command::named_shape(model, dtype, typed.kv_dtype.unwrap_or(Dtype::Bf16))?;
        let hardware = plan_command::named_or_file(typed.hardware.as_deref().unwrap_or("h100"))?;
        let utilisation = typed.gpu_memory_utilization.unwrap_or(0.9);
        if !(0.01..=1.0).contains(&utilisation) {
            return Err(range("gpu-memory-utilization", utilisation, "from 0.01 to 1"));
        }
        let block_size = typed.block_size.unwrap_or(16);
        if !block_size.is_power_of_two() || block_size > 1024 {
            return Err(range("block-size", block_size, "a power of two from 1 to 1024"));
        }
        let gpus = self.gpus(&shape, &hardware, utilisation, block_size)?;
        let pool = kv_pool(&shape, &hardware, gpus, utilisation, block_size, LEAST_TOKENS)?;
        let cost = CostModel::new(&shape, &hardware, gpus)?;
        let room = pool.num_blocks.saturating_mul(block_size);
        let context = u32::try_from(shape.max_context_tokens).unwrap_or(u32::MAX);
        if let Some(asked) = typed.max_model_len.filter(|asked| *asked > context || *asked < 2) {
            return Err(range("max-model-len", asked, "at least 2 and no more than the model's context"));
        }
        let engine = EngineConfig {
            block_size,
            num_blocks: pool.num_blocks,
            max_model_len: typed.max_model_len.unwrap_or(context.min(room)),
            max_batched_tokens: typed.max_batched_tokens.unwrap_or(2048),
            max_running: typed.max_running.unwrap_or(256),
            max_waiting: typed.max_waiting.unwrap_or(512),
            prefix_cache: !typed.no_prefix_cache,
        };
        let kind = ReplicaKind { cost, engine, gpus, weight_bytes: shape.weight_bytes() };
        Ok((kind, shape, hardware))
    }

    fn gpus(
        &self,
        shape: &ModelShape,
        hardware: &HardwareProfile,
        utilisation: f64,
        block_size: u32,
    ) -> Result<u32, UsageError> {
        match (&hardware.calibration, self.replica.tp) {
            (Some(calibration), Some(tp)) if tp != calibration.gpus => {
                Err(UsageError::Calibrated { tp, gpus: calibration.gpus })
            }
            (Some(calibration), _) => Ok(calibration.gpus),
            (None, Some(tp)) if !(1..=1024).contains(&tp) => Err(range("tp", tp, "from 1 to 1024")),
            (None, Some(tp)) => Ok(tp),
            (None, None) => match kv_pool(shape, hardware, 1, utilisation, block_size, LEAST_TOKENS) {
                Ok(_) => Ok(1),
                Err(error) => error.smallest.ok_or(UsageError::DoesNotFit(error)),
            },
        }
    }

    // ---- the load ----

    fn duration(&self) -> Duration {
        let steps: f64 = self.load.steps.iter().map(|step| step.time.0.as_secs_f64()).sum();
        let default = if self.load.steps.is_empty() { 3600.0 } else { steps };
        time(self.load.duration, default)
    }

    fn load(&self, workload: &Workload, duration: Duration) -> Result<Load, UsageError> {
        let typed = &self.load;
        let shaped = typed.shape.filter(|shape| *shape != Shape::Steady).is_some();
        let given = [
            ("--users", typed.users.is_some()),
            ("--steps", !typed.steps.is_empty()),
            ("--rate", typed.rate.is_some()),
        ];
        let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if given.len() > 1 {
            return Err(UsageError::Several(given.join(" and ")));
        }
        let is_rate = typed.users.is_none() && typed.steps.is_empty();
        for (option, given, allowed, with) in [
            ("think-time", typed.think_time.is_some(), typed.users.is_some(), "--users"),
            ("on-off", typed.on_off.is_some(), is_rate && !shaped, "a steady --rate"),
            ("shape", shaped, is_rate, "--rate"),
            (
                "peak",
                typed.peak.is_some(),
                shaped && typed.shape != Some(Shape::FromZero),
                "--shape diurnal or spike",
            ),
            ("period", typed.period.is_some(), typed.shape == Some(Shape::Diurnal), "--shape diurnal"),
        ] {
            if given && !allowed {
                return Err(UsageError::Needs { option, with });
            }
        }
        if let Some(users) = typed.users {
            return match users {
                1..=1_000_000 => Ok(Load::Users { users, think: time(typed.think_time, 30.0) }),
                wrong => Err(range("users", wrong, "from 1 to 1000000")),
            };
        }
        let shape = if typed.steps.is_empty() { self.at_rate(workload, duration)? } else { self.steps() };
        shape.validate()?;
        Ok(Load::Open(shape))
    }

    fn steps(&self) -> ArrivalShape {
        let stages = self.load.steps.iter().map(|step| Stage {
            seconds: step.time.0.as_secs_f64(),
            from_rate: step.from_rate,
            to_rate: step.to_rate,
        });
        ArrivalShape::Stages { stages: stages.collect(), burstiness: 1.0 }
    }

    fn at_rate(&self, workload: &Workload, duration: Duration) -> Result<ArrivalShape, UsageError> {
        let typed = &self.load;
        let own = workload.arrivals.as_ref();
        let rate = typed.rate.or_else(|| own.and_then(ArrivalShape::mean_rate)).unwrap_or(1.0);
        // Before it goes into the arithmetic of a shape.
        ArrivalShape::poisson(rate).validate()?;
        let seconds = duration.as_secs_f64();
        match typed.shape {
            None | Some(Shape::Steady) => Ok(match typed.on_off {
                Some(on_off) => ArrivalShape::OnOff {
                    rate,
                    on_seconds: on_off.on.0.as_secs_f64(),
                    off_seconds: on_off.off.0.as_secs_f64(),
                },
                None if typed.rate.is_none() && own.is_some() => {
                    own.cloned().unwrap_or(ArrivalShape::AllAtOnce)
                }
                None => own.and_then(|own| own.at_rate(rate)).unwrap_or_else(|| ArrivalShape::poisson(rate)),
            }),
            Some(Shape::FromZero) => Ok(traffic::from_zero(rate, seconds)),
            Some(Shape::Spike) => match typed.peak.unwrap_or(10.0) {
                peak if (1.0..=1e4).contains(&peak) => Ok(traffic::spike(rate, peak, seconds)),
                peak => Err(range("peak", peak, "from 1 to 10000")),
            },
            Some(Shape::Diurnal) => {
                let period = typed.period.map_or(DAY.min(duration), |period| period.0);
                if period < Duration::from_secs(48) {
                    return Err(range("period", period.as_secs_f64(), "at least 48 s"));
                }
                match typed.peak.unwrap_or(1.8) {
                    peak if (1.0..=2.0).contains(&peak) => {
                        Ok(traffic::diurnal(rate, peak, period.as_secs_f64(), seconds))
                    }
                    peak => Err(range("peak", peak, "from 1 to 2: the mean of a day bounds its peak")),
                }
            }
        }
    }

    // ---- around the replicas ----

    fn pods(&self, kind: &ReplicaKind, bounds: Bounds) -> Result<PodSettings, UsageError> {
        let typed = &self.scaling;
        if bounds.initial > MAX_PODS {
            return Err(range("replicas", bounds.initial, "at most 10000"));
        }
        let gpus_per_node = typed.gpus_per_node.unwrap_or(kind.gpus.max(8));
        let per_node = gpus_per_node / kind.gpus;
        let needed = bounds.most.max(bounds.initial).div_ceil(per_node.max(1));
        let nodes = typed.nodes.unwrap_or(needed);
        let most = typed.most_nodes.unwrap_or(needed).max(nodes);
        if most > MAX_PODS {
            return Err(range("most-nodes", most, "at most 10000"));
        }
        Ok(PodSettings {
            initial: bounds.initial,
            stages: StartStages {
                schedule: time(typed.schedule_time, 1.0),
                image: time(typed.image_time, 60.0),
                load: time(typed.load_time, kind.weight_bytes / LOAD_BYTES_PER_SECOND),
                warm_up: time(typed.warm_up_time, 20.0),
            },
            nodes: NodeSettings { gpus_per_node, initial: nodes, most, start: time(typed.node_time, 180.0) },
            termination_grace: time(typed.termination_grace, 60.0),
        })
    }

    fn router_settings(&self) -> Result<RouterSettings, UsageError> {
        let typed = &self.router;
        let default = RouterSettings::default();
        let is_oracle = typed.policy.as_deref() == Some("oracle");
        let policy = match typed.policy.as_deref() {
            None | Some("oracle") => Policy::Cost,
            Some(name) => name.parse().map_err(|error| UsageError::Policy(format!("{error}")))?,
        };
        let max_in_flight_per_replica =
            typed.max_in_flight_per_replica.unwrap_or(default.max_in_flight_per_replica);
        if !(1..=1_000_000).contains(&max_in_flight_per_replica) {
            return Err(range("max-in-flight-per-replica", max_in_flight_per_replica, "from 1 to 1000000"));
        }
        Ok(RouterSettings {
            policy,
            is_oracle,
            max_held: typed.max_held.unwrap_or(default.max_held),
            hold_timeout: typed.hold_timeout.map_or(default.hold_timeout, |time| time.0),
            max_in_flight_per_replica,
            ..default
        })
    }
}

fn time(typed: Option<TimeSpan>, seconds: f64) -> Duration {
    typed.map_or_else(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX), |time| time.0)
}
