//! What a run gave.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::series::{Latency, Row};

/// Why a request has no whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// It could never fit into a replica.
    TooLarge,
    /// Nobody was ready, and too many were held already.
    TooManyHeld,
    /// It was held, and nobody became ready in time.
    HeldTooLong,
    /// The replicas had as many as they may, and too many waited for them.
    TooManyWaiting,
    /// The queue of the replica was full.
    QueueFull,
    /// The answer broke off: its replica crashed, or was not reached for too long.
    BrokenOff,
    /// Its replica had to go before the answer was there.
    Terminated,
    /// Every attempt failed before the first token.
    NoReplica,
}

impl Failure {
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLarge => "too large",
            Self::TooManyHeld => "too many held",
            Self::HeldTooLong => "held too long",
            Self::TooManyWaiting => "too many waiting",
            Self::QueueFull => "queue full",
            Self::BrokenOff => "broken off",
            Self::Terminated => "terminated",
            Self::NoReplica => "no replica",
        }
    }
}

/// A word of the autoscaler, or a fault.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogLine {
    pub seconds: f64,
    pub text: String,
}

/// How far a limit was kept: by which share of all requests. Those that failed did not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Attainment {
    pub limit: String,
    pub share: f64,
    pub is_kept: bool,
}

/// One run, in numbers that depend on nothing but its settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The autoscaler.
    pub scaler: String,
    pub requests: u64,
    pub completed: u64,
    pub failures: BTreeMap<Failure, u64>,
    /// Until the last request had ended.
    pub seconds: f64,
    pub ttft_seconds: Option<Latency>,
    pub tpot_seconds: Option<Latency>,
    pub e2e_seconds: Option<Latency>,
    /// Mean time from arrival until a replica begins with a request.
    pub mean_queue_seconds: f64,
    pub slo: Vec<Attainment>,
    /// Requests that kept all limits, of all.
    pub good_share: f64,
    pub output_tokens: u64,
    pub prompt_tokens: u64,
    /// Share of the prompt tokens that the caches had.
    pub hit_rate: f64,
    pub preemptions: u64,
    pub retries: u64,
    pub most_ready: u32,
    pub mean_ready: f64,
    /// How often the wanted number changed, and how often its direction did.
    pub scalings: u64,
    pub turns: u64,
    pub pods_started: u64,
    pub crashes: u64,
    pub partitions: u64,
    pub gpu_hours: f64,
    pub dollars: f64,
    pub dollars_per_million_output_tokens: Option<f64>,
    pub rows: Vec<Row>,
    /// Of the requests that arrived in each row.
    pub ttft_rows: Vec<Option<Latency>>,
    pub log: Vec<LogLine>,
    /// Lines of the log that were left out.
    pub log_left_out: u64,
}

impl Outcome {
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    pub fn slo_is_kept(&self) -> bool {
        self.slo.iter().all(|limit| limit.is_kept)
    }
}
