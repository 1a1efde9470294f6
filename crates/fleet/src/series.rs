//! What is remembered of a run: a row every few seconds, and the latencies of all requests.

use std::time::Duration;

use serde::Serialize;
use servelab_bench::stats::percentile;

/// Rows of a run.
const ROWS: u32 = 360;

/// The fleet at one moment. Rates and shares are of the time since the row before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    pub seconds: f64,
    pub offered_per_second: f64,
    pub completed_per_second: f64,
    pub failed_per_second: f64,
    /// Pods that the autoscaler asks for.
    pub wanted: u32,
    pub ready: u32,
    /// Without a node, and starting on one.
    pub pending: u32,
    pub starting: u32,
    pub draining: u32,
    /// Requests in the router: all that wait, and those of them that wait because nobody is ready.
    pub router_waiting: u32,
    pub held: u32,
    /// Requests in the queues of the replicas, and sequences that run.
    pub queued: u32,
    pub running: u32,
    /// Share of the KV blocks held: mean over ready replicas, and the fullest.
    pub kv_usage_mean: f64,
    pub kv_usage_most: f64,
    /// Share of the time in which the ready replicas computed.
    pub busy: f64,
    /// Of pods since the start.
    pub gpu_hours: f64,
}

/// Percentiles of the requests that arrived within a row. `None`: nobody did, or nobody got an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Latency {
    /// Of values in seconds, which are sorted.
    pub fn of(values: &mut [f64]) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let at = |percent| percentile(values, percent);
        (!values.is_empty()).then(|| Self { p50: at(50.0), p95: at(95.0), p99: at(99.0) })
    }
}

/// How long the time between two rows is.
pub fn resolution(duration: Duration) -> Duration {
    let seconds = (duration.as_secs_f64() / f64::from(ROWS)).ceil().max(1.0);
    Duration::from_secs_f64(seconds)
}

/// Values by the time at which their requests arrived.
#[derive(Clone, Debug)]
pub struct ByArrival {
    resolution: Duration,
    values: Vec<Vec<f32>>,
}

impl ByArrival {
    pub fn new(resolution: Duration) -> Self {
        Self { resolution, values: Vec::new() }
    }

    pub fn push(&mut self, arrived: Duration, value: Duration) {
        let at = (arrived.as_nanos() / self.resolution.as_nanos().max(1)) as usize;
        if self.values.len() <= at {
            self.values.resize(at + 1, Vec::new());
        }
        self.values[at].push(value.as_secs_f32());
    }

    fn all(&self) -> Vec<f64> {
        self.values.iter().flatten().map(|value| f64::from(*value)).collect()
    }

    pub fn over_all(&self) -> Option<Latency> {
        Latency::of(&mut self.all())
    }

    pub fn mean(&self) -> f64 {
        let all = self.all();
        // The sum of nothing is -0, which would be printed.
        (0.0 + all.iter().sum::<f64>()) / (all.len() as f64).max(1.0)
    }

    /// Of each row, in order.
    pub fn rows(&self) -> Vec<Option<Latency>> {
        let row = |values: &Vec<f32>| {
            let mut values: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
            Latency::of(&mut values)
        };
        self.values.iter().map(row).collect()
    }
}
