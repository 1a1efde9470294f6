//! `servelab plan --simulate`: the smallest fleet that keeps an SLO, found by simulating fleets under the plan's load.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::report::number;
use servelab_bench::result::{Slo, SloLimit, SloMetric};
use servelab_bench::workload::lengths::Span;
use servelab_bench::workload::{Workload, WorkloadError, WorkloadOptions};
use servelab_engine::EngineConfig;
use servelab_fleet::page::{self, Heading};
use servelab_fleet::search::{Search, smallest_fleet};
use servelab_fleet::{
    FaultSettings, Load, NodeSettings, PodSettings, ReplicaKind, RouterSettings, Settings, SettingsError,
    StartStages, text,
};
use servelab_sim::{CapacityPlan, CostModel, DoesNotFit, RooflineError, kv_pool};

use crate::page_file::{self, PageError};
use crate::size::TimeSpan;

/// Requests of one simulation, about.
const REQUESTS: f64 = 20_000.0;
/// Shorter ones are all beginning.
const LEAST_SECONDS: f64 = 240.0;
const MOST_SECONDS: f64 = 1800.0;
/// Larger fleets are not tried.
const MOST_REPLICAS: u32 = 1000;
const BLOCK_SIZE: u32 = 16;

/// What was typed for the search.
#[derive(Args, Clone, Debug, Default)]
pub struct SimulateArgs {
    /// Search the smallest fleet that keeps --slo, by simulating fleets under the plan's peak, or under --users.
    #[arg(long, help_heading = "Simulation")]
    pub simulate: bool,
    /// So many users who ask, read the answer, and ask again, in place of the plan's peak.
    #[arg(long, value_name = "COUNT", requires = "simulate", help_heading = "Simulation")]
    pub users: Option<u32>,
    /// How long they read, exponential with this mean; 0: all of them always wait for an answer [default: 30s].
    #[arg(long, value_name = "TIME", requires = "users", help_heading = "Simulation")]
    pub think_time: Option<TimeSpan>,
    /// What was promised: METRIC=TIME[@pNN] with ttft, tpot or e2el, separated by commas [default: ttft=1s@p95].
    #[arg(
        long,
        value_name = "LIMIT,..",
        value_delimiter = ',',
        requires = "simulate",
        help_heading = "Simulation"
    )]
    pub slo: Vec<SloLimit>,
    /// Of arrivals and lengths [default: 0].
    #[arg(long, requires = "simulate", help_heading = "Simulation")]
    pub seed: Option<u64>,
    /// File for a page with plots of the search and of the fleet that it found.
    #[arg(long, value_name = "FILE", requires = "simulate", help_heading = "Simulation")]
    pub out: Option<PathBuf>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--users is {0}; it must be from 1 to 1000000")]
    Users(u32),
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    #[error(transparent)]
    Roofline(#[from] RooflineError),
    #[error("the load of the plan: {0}")]
    Workload(#[from] WorkloadError),
    #[error("--{flag} is {value} tokens; a simulation takes at most 10000000")]
    Tokens { flag: &'static str, value: u64 },
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl Error {
    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Page(_) | Self::Write(_))
    }
}

/// Searches, prints what it found to `out`, writes the page.
///
/// # Errors
/// If the plan's load cannot be simulated, or something cannot be written.
pub fn run(
    args: &SimulateArgs,
    plan: &CapacityPlan,
    is_json: bool,
    out: &mut impl Write,
) -> Result<(), Error> {
    let kind = kind(plan)?;
    let one = settings(args, plan, &kind, 1)?;
    let guess = guess(args, plan);
    let search = smallest_fleet(guess, MOST_REPLICAS, |replicas| settings(args, plan, &kind, replicas))?;
    if is_json {
        serde_json::to_writer_pretty(&mut *out, &json(&search, &kind)).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", answer(&search, plan, &one))?;
    }
    if let Some(path) = &args.out {
        page_file::write(path, page::search_html(&heading(plan, &one), &one, &search))?;
        if !is_json {
            writeln!(out, "\nwritten: {}", path.display())?;
        }
    }
    Ok(out.flush()?)
}

fn json(search: &Search, kind: &ReplicaKind) -> serde_json::Value {
    let tried = search.tried.iter();
    let tried: Vec<_> = tried
        .map(|(replicas, outcome)| serde_json::json!({ "replicas": replicas, "outcome": outcome }))
        .collect();
    serde_json::json!({
        "replicas": search.smallest,
        "gpus": search.smallest.map(|replicas| replicas * kind.gpus),
        "tried": tried,
    })
}

fn answer(search: &Search, plan: &CapacityPlan, settings: &Settings) -> String {
    let gpus = settings.kind.gpus;
    let limits = settings.slo.to_string();
    let load = load_in_words(settings);
    let found = match search.smallest {
        Some(replicas) => format!(
            "{replicas} replicas of {gpus} x {}, {} GPUs, keep {limits} under {load}.",
            plan.hardware.name,
            number::count(u64::from(replicas) * u64::from(gpus))
        ),
        None => format!(
            "No fleet of up to {MOST_REPLICAS} replicas of {gpus} x {} keeps {limits} under {load}: more replicas do \
             not make one of them faster.",
            plan.hardware.name
        ),
    };
    let outcomes: Vec<_> = search.tried.iter().map(|(_, outcome)| outcome.clone()).collect();
    format!("{found}\n\n{}", text::table(&outcomes))
}

fn load_in_words(settings: &Settings) -> String {
    match &settings.load {
        Load::Users { users, think } => format!("{users} users who read for {} s", think.as_secs_f64()),
        Load::Open(shape) => {
            format!("{} requests a second", number::shown(shape.mean_rate().unwrap_or_default()))
        }
    }
}

fn heading(plan: &CapacityPlan, settings: &Settings) -> Heading {
    let fact = |name: &str, value: String| (name.to_owned(), value);
    Heading {
        title: format!(
            "{} on {} x {}: how many replicas",
            plan.model.name, settings.kind.gpus, plan.hardware.name
        ),
        facts: vec![
            fact("load", load_in_words(settings)),
            fact("prompt", format!("{} tokens", plan.assumptions.input_tokens)),
            fact("answer", format!("{} tokens", plan.assumptions.output_tokens)),
            fact("SLO", settings.slo.to_string()),
            fact("seed", settings.seed.to_string()),
        ],
        notes: vec!["Nothing was computed: all times are simulated.".to_owned()],
    }
}

fn kind(plan: &CapacityPlan) -> Result<ReplicaKind, Error> {
    let (shape, hardware, gpus) = (&plan.model, &plan.hardware, plan.memory.gpus_per_replica);
    let utilisation = plan.assumptions.memory_utilisation;
    let tokens = plan.assumptions.input_tokens + plan.assumptions.output_tokens;
    let pool = kv_pool(shape, hardware, gpus, utilisation, BLOCK_SIZE, 2 * tokens)?;
    let max_running = plan.assumptions.max_running.unwrap_or(256).clamp(1, 1 << 16);
    let room = pool.num_blocks.saturating_mul(BLOCK_SIZE);
    Ok(ReplicaKind {
        cost: CostModel::new(shape, hardware, gpus)?,
        engine: EngineConfig {
            block_size: BLOCK_SIZE,
            num_blocks: pool.num_blocks,
            max_model_len: u32::try_from(shape.max_context_tokens).unwrap_or(u32::MAX).min(room),
            max_batched_tokens: 2048.max(max_running),
            max_running,
            max_waiting: 1 << 16,
            prefix_cache: true,
        },
        gpus,
        weight_bytes: shape.weight_bytes(),
    })
}

/// Lengths are spread evenly, half of the mean to one and a half; what is cached is a beginning that all share.
fn workload(plan: &CapacityPlan) -> Result<Workload, Error> {
    let uncached = plan.assumptions.uncached_tokens().round().max(1.0) as u64;
    let shared = plan.assumptions.input_tokens.saturating_sub(uncached);
    let spread = |flag, mean: u64| match u32::try_from(mean) {
        Ok(mean) if mean <= 10_000_000 => {
            Ok(Span { least: (mean / 2).max(1), most: (mean + mean / 2).max(1) })
        }
        _ => Err(Error::Tokens { flag, value: mean }),
    };
    let (input, output) =
        (spread("input-tokens", uncached)?, spread("output-tokens", plan.assumptions.output_tokens)?);
    let mut options =
        WorkloadOptions { input: Some(input), output: Some(output), ..WorkloadOptions::default() };
    if shared > 0 {
        options.name = Some("shared-prefix".to_owned());
        (options.prefixes, options.prefix_tokens) = (Some(1), u32::try_from(shared).ok());
    }
    Ok(Workload::new(&options)?)
}

fn guess(args: &SimulateArgs, plan: &CapacityPlan) -> u32 {
    let planned = plan.load.peak_requests_per_second.max(1e-9);
    let rate = match args.users {
        Some(users) => f64::from(users) / (think(args).as_secs_f64() + 10.0),
        None => planned,
    };
    (plan.fleet.replicas as f64 * rate / planned).ceil().clamp(1.0, f64::from(MOST_REPLICAS)) as u32
}

fn think(args: &SimulateArgs) -> Duration {
    args.think_time.map_or(Duration::from_secs(30), |time| time.0)
}

fn settings(
    args: &SimulateArgs,
    plan: &CapacityPlan,
    kind: &ReplicaKind,
    replicas: u32,
) -> Result<Settings, Error> {
    let (load, rate) = match args.users {
        Some(users) if !(1..=1_000_000).contains(&users) => return Err(Error::Users(users)),
        Some(users) => {
            (Load::Users { users, think: think(args) }, f64::from(users) / (think(args).as_secs_f64() + 5.0))
        }
        None => {
            let rate = plan.load.peak_requests_per_second;
            (Load::Open(ArrivalShape::poisson(rate)), rate)
        }
    };
    let limit = SloLimit { metric: SloMetric::Ttft, limit_ms: 1000.0, percentile: 95.0 };
    let limits = if args.slo.is_empty() { vec![limit] } else { args.slo.clone() };
    let gpus_per_node = kind.gpus.max(8);
    let nodes = replicas.div_ceil(gpus_per_node / kind.gpus);
    Ok(Settings {
        seed: args.seed.unwrap_or(0),
        kind: kind.clone(),
        is_exact: false,
        load,
        workload: workload(plan)?,
        duration: Duration::from_secs_f64((REQUESTS / rate).clamp(LEAST_SECONDS, MOST_SECONDS)),
        router: RouterSettings::default(),
        network_time: Duration::ZERO,
        pods: PodSettings {
            initial: replicas,
            stages: StartStages {
                schedule: Duration::ZERO,
                image: Duration::ZERO,
                load: Duration::ZERO,
                warm_up: Duration::ZERO,
            },
            nodes: NodeSettings { gpus_per_node, initial: nodes, most: nodes, start: Duration::ZERO },
            termination_grace: Duration::ZERO,
        },
        faults: FaultSettings::default(),
        scrape_interval: Duration::from_secs(5),
        model_name: plan.model.name.clone(),
        slo: Slo { limits },
        dollars_per_gpu_hour: plan
            .assumptions
            .dollars_per_gpu_hour
            .or(plan.hardware.dollars_per_hour)
            .unwrap_or(0.0),
    })
}
