//! The experiments behind the ledger: each starts a server, says what it expects, measures, and compares.

mod batch_ladder;
mod cold_start;
mod expect;
mod first_preemption;
mod fit;
pub mod fleet;
mod kv_bytes;
mod lab;
mod littles_law;
mod measurement;
mod mfu;
mod naive;
mod pace;
mod prefix_hit;
mod price;
mod replica;
mod starvation;
pub mod store;
mod window;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use servelab_sim::HardwareError;
use servelab_sim::planner::PlanError;

pub use self::lab::{Observer, Subject};
pub use self::measurement::{
    Circumstances, Finding, Interval, Ladder, LadderPoint, Measurement, Origin, Prediction, PredictionKind,
    SCHEMA_VERSION,
};
pub use self::replica::Launcher;

use self::lab::Lab;
use crate::client::Failure;
use crate::ledger::{EvaluationError, LedgerError};
use crate::server::ServerError;

/// Longest time of one experiment; on a small machine most take some seconds.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Which experiment.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExperimentId {
    BatchLadder,
    Naive,
    KvBytes,
    FirstPreemption,
    PrefixHit,
    Starvation,
    ColdStart,
    LittlesLaw,
    Price,
    FleetLadder,
    FleetSize,
    FleetDay,
    FleetUsers,
    FleetTails,
    FleetPolicies,
    FleetFromZero,
}

impl ExperimentId {
    pub const ALL: [Self; 16] = [
        Self::KvBytes,
        Self::BatchLadder,
        Self::Naive,
        Self::FirstPreemption,
        Self::PrefixHit,
        Self::Starvation,
        Self::LittlesLaw,
        Self::ColdStart,
        Self::Price,
        Self::FleetLadder,
        Self::FleetSize,
        Self::FleetDay,
        Self::FleetUsers,
        Self::FleetTails,
        Self::FleetPolicies,
        Self::FleetFromZero,
    ];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::BatchLadder => "batch-ladder",
            Self::Naive => "naive",
            Self::KvBytes => "kv-bytes",
            Self::FirstPreemption => "first-preemption",
            Self::PrefixHit => "prefix-hit",
            Self::Starvation => "starvation",
            Self::ColdStart => "cold-start",
            Self::LittlesLaw => "littles-law",
            Self::Price => "price",
            Self::FleetLadder => "fleet-ladder",
            Self::FleetSize => "fleet-size",
            Self::FleetDay => "fleet-day",
            Self::FleetUsers => "fleet-users",
            Self::FleetTails => "fleet-tails",
            Self::FleetPolicies => "fleet-policies",
            Self::FleetFromZero => "fleet-from-zero",
        }
    }

    /// Whether it simulates a fleet in virtual time; the others measure what is there.
    pub fn is_simulated(self) -> bool {
        fleet::model(self).is_some()
    }

    /// What it asks, in one line.
    pub fn question(self) -> &'static str {
        match self {
            Self::BatchLadder => {
                "how does throughput grow with the batch, and where is half of its asymptote?"
            }
            Self::Naive => "what do continuous batching and paging buy over one request at a time?",
            Self::KvBytes => "how many bytes does a token take in the KV pool?",
            Self::FirstPreemption => "how many requests fill the KV pool?",
            Self::PrefixHit => "how much earlier is the first token if the prefix is cached?",
            Self::Starvation => "what does a long prompt do to the requests beside it?",
            Self::ColdStart => "what does a replica's start spend its time on?",
            Self::LittlesLaw => "are as many requests in flight as rate x mean residence?",
            Self::Price => "what do a million tokens cost?",
            Self::FleetLadder => "how fast is a 70B on four H100, for the lengths that people quote?",
            Self::FleetSize => "how many GPUs do a million daily users of a 70B take?",
            Self::FleetDay => "what does a day look like, and what does a fleet save that follows it?",
            Self::FleetUsers => "how many GPUs do 1,000 users of a 70B take, active or thinking?",
            Self::FleetTails => "which p99 can be below 80 ms, and what do crashes break off?",
            Self::FleetPolicies => "which router finds what is cached, where all requests share a block?",
            Self::FleetFromZero => "does a fleet wake that is scaled to nothing?",
        }
    }

    /// The keys of what it finds.
    pub fn findings(self) -> &'static [&'static str] {
        match self {
            Self::BatchLadder => &[
                "half_batch",
                "asymptote_tokens_per_second",
                "single_tokens_per_second",
                "best_tokens_per_second",
            ],
            Self::Naive => {
                &["batching_gain", "total_gain", "naive_tokens_per_second", "paged_tokens_per_second"]
            }
            Self::KvBytes => &["pool_bytes_per_token", "resident_bytes_per_token"],
            Self::FirstPreemption => &["capacity_requests"],
            Self::PrefixHit => &["hit_ratio", "miss_seconds", "hit_seconds"],
            Self::Starvation => {
                &["gap_whole_seconds", "gap_chunked_seconds", "probe_whole_seconds", "probe_chunked_seconds"]
            }
            Self::ColdStart => &["first_token_seconds", "weights_seconds", "weights_share"],
            Self::LittlesLaw => &["in_flight", "identity", "p99_in_flight"],
            Self::Price => &["dollars_per_million_tokens"],
            Self::FleetLadder => &[
                "single_tpot_seconds",
                "tokens_per_second_32",
                "tokens_per_second_64",
                "tokens_per_second_128",
                "tokens_per_second_short",
            ],
            Self::FleetSize => &["gpus"],
            Self::FleetDay => &["peak_factor", "gpu_hours_share", "gpus_at_peak"],
            Self::FleetUsers => &["gpus_active", "gpus_thinking"],
            Self::FleetTails => &["ttft_p99_seconds", "tpot_p99_seconds", "e2e_p99_seconds", "lost_requests"],
            Self::FleetPolicies => &[
                "longest_prefix_hits",
                "longest_prefix_ttft_seconds",
                "round_robin_hits",
                "round_robin_ttft_seconds",
                "least_requests_hits",
                "least_requests_ttft_seconds",
                "cost_hits",
                "cost_ttft_seconds",
            ],
            Self::FleetFromZero => &["answered_quoted", "answered_right", "wait_seconds"],
        }
    }
}

/// Why an experiment has no result.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    #[error("the server did not start: {0}")]
    Start(String),
    #[error(transparent)]
    Client(#[from] Failure),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("a request failed: {0}")]
    Request(String),
    #[error("the server does not tell {0}")]
    NotUnderstood(&'static str),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error("a context of {max_model_len} tokens is too short; it takes {wanted}")]
    ShortContext { max_model_len: u32, wanted: u32 },
    #[error("the simulation failed: {0}")]
    Simulation(String),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the measurement does not stand: {0}")]
    DoesNotStand(String),
    #[error("it took longer than {TIMEOUT:?}; choose a smaller model")]
    TimedOut,
}

/// An experiment, and what it is about.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    pub experiment: ExperimentId,
    pub subject: &'a Subject,
    pub circumstances: &'a Circumstances,
}

/// Runs the experiments one after the other, each on servers of its own, and hands each measurement to `keep` as
/// soon as it is there. An experiment that fails is told to the observer, and the next one begins. Dropping the
/// future kills the server that runs.
pub async fn run_all<E>(
    tasks: &[Task<'_>],
    observer: &mut dyn Observer,
    keep: &mut dyn FnMut(&Measurement) -> Result<(), E>,
) -> Result<(), E> {
    let Some(first) = tasks.first() else { return Ok(()) };
    let mut lab = Lab::new(first.subject, observer);
    let mut known: Option<&Circumstances> = None;
    for (at, Task { experiment, subject, circumstances }) in tasks.iter().enumerate() {
        if known != Some(*circumstances) {
            lab.turn_to(subject).await;
            lab.observer().turns_to(circumstances);
            known = Some(circumstances);
        }
        lab.observer().begins(*experiment, at + 1, tasks.len());
        let started = Instant::now();
        let outcome = tokio::time::timeout(TIMEOUT, experiment.run(&mut lab)).await;
        let outcome = outcome.unwrap_or(Err(ExperimentError::TimedOut));
        let took = started.elapsed();
        lab.observer().ended(*experiment, took, outcome.as_ref().err());
        let (flags, findings) = (std::mem::take(&mut lab.flags), std::mem::take(&mut lab.findings));
        match outcome {
            Ok(ladder) => keep(&Measurement {
                schema_version: SCHEMA_VERSION,
                experiment: *experiment,
                unix_seconds: now_unix_seconds(),
                took_seconds: took.as_secs_f64(),
                circumstances: (*circumstances).clone(),
                server_flags: flags,
                findings,
                ladder,
            })?,
            // Its server may be in any state.
            Err(_) => lab.stop().await,
        }
    }
    lab.stop().await;
    Ok(())
}

fn now_unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl ExperimentId {
    async fn run(self, lab: &mut Lab<'_>) -> Result<Option<Ladder>, ExperimentError> {
        match self {
            Self::BatchLadder => return batch_ladder::run(lab).await.map(Some),
            Self::Naive => naive::run(lab).await?,
            Self::KvBytes => kv_bytes::run(lab).await?,
            Self::FirstPreemption => first_preemption::run(lab).await?,
            Self::PrefixHit => prefix_hit::run(lab).await?,
            Self::Starvation => starvation::run(lab).await?,
            Self::ColdStart => cold_start::run(lab).await?,
            Self::LittlesLaw => littles_law::run(lab).await?,
            Self::Price => price::run(lab).await?,
            Self::FleetLadder => fleet::ladder::run(lab).await?,
            Self::FleetSize => fleet::size::run(lab).await?,
            Self::FleetDay => fleet::day::run(lab).await?,
            Self::FleetUsers => fleet::users::run(lab).await?,
            Self::FleetTails => fleet::tails::run(lab).await?,
            Self::FleetPolicies => fleet::policies::run(lab).await?,
            Self::FleetFromZero => fleet::from_zero::run(lab).await?,
        }
        Ok(None)
    }
}
