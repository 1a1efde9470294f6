//! What a benchmark leaves behind, as plain data: `result.json` is a [`BenchResult`], each line of
//! `requests.jsonl` a [`RequestRecord`]. Reports, plots and comparisons read these and nothing else.
//!
//! Units stand last in the names. Points in time are seconds since the start of their repeat, on one clock.
//! Statistics of latencies are in milliseconds, as vLLM's benchmark has them; `vllm.rs` adds its key names when
//! a result is written.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Raised when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// `result.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchResult {
    pub schema_version: u32,
    pub header: Header,
    /// One per level of load: a single one, or a ladder of concurrencies or rates, in the order they were run.
    pub points: Vec<Point>,
    /// Of a search for the highest rate that keeps the SLO; its trials are among the points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,
}

impl BenchResult {
    /// Why the figures must not be quoted, if so: one line a reason, such as a client that could not follow.
    pub fn faults(&self) -> Vec<String> {
        let repeats = self.points.iter().flat_map(|point| point.repeats.iter().map(move |r| (point, r)));
        let unanswered = self.header.unanswered.iter().map(|reason| {
            format!("the server could not be asked what it serves, so one request was sent to see how it fails: {reason}")
        });
        let mut faults: Vec<String> = unanswered.collect();
        faults.extend(repeats.flat_map(|(point, repeat)| {
            let place = format!("{}, repeat {}", point.load, repeat.repeat);
            repeat.faults().into_iter().map(move |fault| format!("{place}: {fault}"))
        }));
        for point in &self.points {
            let rows = point.limits.iter().flat_map(|limits| &limits.rows);
            faults.extend(rows.filter(|row| row.beaten).map(|row| {
                format!(
                    "{}: {} is faster than physics; the measurement or the stated hardware is wrong",
                    point.load, row.metric
                )
            }));
        }
        faults
    }

    /// The point that stands for the whole where only one can: the one with the highest output throughput.
    pub fn best_point(&self) -> Option<&Point> {
        self.points.iter().max_by(|a, b| a.metrics.output_throughput.total_cmp(&b.metrics.output_throughput))
    }
}

/// Under which circumstances the figures came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub tool_version: String,
    /// Of the load generator's source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_commit: Option<String>,
    pub started_unix_seconds: u64,
    /// As it was typed, without secrets.
    pub command: Vec<String>,
    /// What the user calls this run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    pub target: TargetInfo,
    pub model: ModelInfo,
    /// Hardware under the model, as the user names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
    /// GPUs of it that serve one replica, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u32>,
    /// The machine that the load came from.
    pub client: ClientInfo,
    pub workload: WorkloadInfo,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo: Option<Slo>,
    /// Why the server could not be asked what it serves. Then a single request was sent, to see how it fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unanswered: Option<String>,
    /// Whatever else the user wants to keep with the figures: clocks, driver, power limit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TargetInfo {
    /// A server over HTTP.
    Http {
        url: String,
        endpoint: Endpoint,
        /// What the server says of itself: version, commit, layout of the KV cache.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        server: BTreeMap<String, String>,
    },
    /// The engine in this process, without HTTP and without text.
    Offline { engine: BTreeMap<String, String> },
}

/// Which of OpenAI's two endpoints the requests went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    Completions,
    Chat,
}

impl Endpoint {
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The name that requests carry.
    pub id: String,
    /// Where the server has it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientInfo {
    pub cpu: String,
    pub cores: u32,
    pub os: String,
    /// Open loop: more in flight than this is a failure of the class `max_in_flight`.
    pub max_in_flight: u32,
    pub connect_timeout_seconds: f64,
    pub first_byte_timeout_seconds: f64,
    pub idle_timeout_seconds: f64,
    pub total_timeout_seconds: f64,
}

/// What was asked of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkloadInfo {
    pub name: String,
    pub description: String,
    /// Its settings as typed or by default.
    pub settings: BTreeMap<String, String>,
    pub seed: u64,
    /// Whether prompts differ from run to run, so that no run measures the cache of an earlier one.
    pub salted: bool,
    pub prompt_form: PromptForm,
    pub ignore_eos: bool,
    /// `None`: the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
}

/// How prompts travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptForm {
    /// As token ids: lengths are exact.
    #[default]
    TokenIds,
    /// As words that are one token each in the server's vocabulary.
    Words,
    /// As words, whose mean number of tokens was measured.
    EstimatedWords,
    /// As they stand in the user's file.
    Given,
}

/// Service level objective: limits, each kept by a share of the requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    pub limits: Vec<SloLimit>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SloLimit {
    pub metric: SloMetric,
    pub limit_ms: f64,
    /// The percentile that must not exceed the limit; failed requests count as exceeding it.
    pub percentile: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SloMetric {
    Ttft,
    Tpot,
    E2el,
}

/// One level of load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub load: Load,
    /// All repeats pooled: percentiles over the requests of all of them, rates over the sum of their durations.
    pub metrics: Metrics,
    /// Mean over the repeats with its 95 % interval, under vLLM's key names; empty for a single repeat.
    pub intervals: BTreeMap<String, Interval>,
    pub repeats: Vec<Repeat>,
    /// Present if hardware and model are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// How requests arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Load {
    /// A fixed number of clients, each sending its next request when the last one has ended.
    Closed { concurrency: u32, think_time_seconds: f64 },
    /// Requests arrive by the clock, whatever became of the earlier ones.
    Open {
        /// Mean rate in requests a second; `None`: all at once.
        rate: Option<f64>,
        /// Shape of the gamma distribution of the intervals, as vLLM's; 1 is Poisson, infinite (written as null) constant.
        burstiness: Option<f64>,
        /// In words: Poisson, on/off, ramp.
        shape: String,
        /// As vLLM's: later requests wait in the client until fewer are in flight.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_concurrency: Option<u32>,
    },
}

impl std::fmt::Display for Load {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed { concurrency, think_time_seconds } => {
                write!(out, "concurrency {concurrency}")?;
                if *think_time_seconds > 0.0 {
                    write!(out, ", think time {think_time_seconds} s")
                } else {
                    Ok(())
                }
            }
            Self::Open { rate: None, shape, .. } => write!(out, "{shape}"),
            Self::Open { rate: Some(rate), shape, max_concurrency, .. } => {
                write!(out, "{rate:.4} req/s, {shape}")?;
                max_concurrency.map_or(Ok(()), |most| write!(out, ", at most {most} in flight"))
            }
        }
    }
}

/// Figures of a measured window. Latencies are of the requests that completed; failures have columns of their
/// own and stay in the denominators.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// From the first measured arrival to the end of the last measured request.
    pub duration_seconds: f64,
    /// Measured requests that ended: completed and failed.
    pub requests: u64,
    pub completed: u64,
    pub failed: u64,
    /// Measured requests that were under way when the run was ended early.
    pub cut: u64,
    /// Per second, whatever arrived within the window; a request counts by the share of its tokens that did.
    pub request_throughput: f64,
    pub input_throughput: f64,
    pub output_throughput: f64,
    pub total_token_throughput: f64,
    /// Requests a second that kept every limit of the SLO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_goodput: Option<f64>,
    /// Share of the measured requests that did; a failed one did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo_attainment: Option<f64>,
    /// Tokens that arrived within the window; input tokens count when their first output token arrives.
    pub total_input_tokens: u64,
    pub total_output_tokens: u64,
    /// Of the prompts of completed measured requests: all tokens, and those the server says it had cached.
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    /// The best second of the window.
    pub peak_output_tokens_per_second: f64,
    pub peak_in_flight: u32,
    pub mean_in_flight: f64,
    pub ttft_ms: Distribution,
    pub ttft_from_send_ms: Distribution,
    pub tpot_ms: Distribution,
    pub itl_ms: Distribution,
    pub e2el_ms: Distribution,
    /// From the moment a request should have been sent to the moment it was.
    pub send_lag_ms: Distribution,
    /// Time spent waiting for a place under `max_concurrency`; part of TTFT, not of the send-anchored one.
    pub client_queue_ms: Distribution,
    /// Of connections that were opened for a request.
    pub connect_ms: Distribution,
    pub input_tokens: Distribution,
    pub output_tokens: Distribution,
    /// Requests whose gaps between tokens were not kept, because there were too many.
    #[serde(default)]
    pub requests_without_gaps: u64,
}

/// A sample in numbers. All zero if it is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    pub count: u64,
    pub mean: f64,
    /// Of the sample itself (divided by n), as numpy's `std`.
    pub std: f64,
    pub min: f64,
    pub p25: f64,
    pub median: f64,
    pub p75: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub max: f64,
    /// Percentiles 0, 1, ... 100, to draw from; empty if the sample is.
    pub percentiles: Vec<f64>,
}

/// A mean over repeats and how far it can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    /// Half the width of the 95 % interval (Student's t).
    pub half_width: f64,
    pub repeats: u32,
}

/// One run at one level of load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Repeat {
    pub repeat: u32,
    /// Mixed into every prompt; 0 without salt.
    pub salt: u64,
    /// Ended early by the user.
    pub interrupted: bool,
    pub metrics: Metrics,
    pub failures: Vec<FailureCount>,
    pub client: ClientCheck,
    pub littles_law: LittlesLaw,
    /// Change of the server's prefix cache counters; absent if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_cache: Option<PrefixCacheDelta>,
    /// Requests sent before and after the measured ones, to measure under full load only.
    pub warm_up_requests: u64,
    pub cool_down_requests: u64,
    /// The measured window, in seconds since the start of the repeat.
    pub window_seconds: (f64, f64),
    pub series: Series,
}

impl Repeat {
    /// Why these figures must not be quoted, if so.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Some(reason) = &self.client.bound {
            faults.push(format!("client-bound: {reason}"));
        }
        if !self.littles_law.holds {
            faults.push(format!(
                "Little's law does not hold: {:.3} in flight on average, rate x residence gives {:.3}",
                self.littles_law.mean_in_flight, self.littles_law.rate_times_residence
            ));
        }
        faults
    }
}

/// How often requests failed in one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureCount {
    pub class: FailureClass,
    /// As [`FailureClass::name`] gives it, with the code of a refused status: `status_429`.
    pub name: String,
    /// Among the measured requests, and among all.
    pub measured: u64,
    pub all: u64,
    /// What the first of them said.
    pub example: String,
}

/// Whether the client could follow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientCheck {
    pub send_lag_p99_ms: f64,
    /// The bound on it: 5 ms or 1 % of the median TTFT, whichever is less.
    pub send_lag_limit_ms: f64,
    /// From the arrival of bytes in the kernel to the moment they were read. Does not enter the latencies where
    /// the kernel tells the arrival.
    pub read_lag_p99_ms: f64,
    /// Where the times of chunks come from.
    pub clock: ArrivalClock,
    /// Why the run is client-bound, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<String>,
}

/// Where the times of received bytes come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArrivalClock {
    /// The kernel noted when the packet came in.
    Kernel,
    /// The moment of the read: a late client measures too long.
    #[default]
    Read,
    /// Offline: the end of the engine's step.
    Step,
}

/// Mean in flight, counted live, against arrival rate times mean residence from the records, over the whole
/// repeat (Little 1961). Both see the same requests, so they differ only if the accounting or the client is at
/// fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LittlesLaw {
    pub mean_in_flight: f64,
    pub rate_times_residence: f64,
    /// Relative difference.
    pub deviation: f64,
    /// Within 2 %.
    pub holds: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefixCacheDelta {
    /// In front of the counters' names, such as `servelab_` or `vllm:`.
    pub metrics_prefix: String,
    pub query_tokens: u64,
    pub hit_tokens: u64,
}

impl PrefixCacheDelta {
    /// Share of the prompt tokens looked up that were found; 0 if none was looked up.
    pub fn hit_rate(&self) -> f64 {
        if self.query_tokens == 0 { 0.0 } else { self.hit_tokens as f64 / self.query_tokens as f64 }
    }
}

/// The repeat over time, warm-up and cool-down included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    pub bucket_seconds: f64,
    /// The first begins at 0.
    pub buckets: Vec<Bucket>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Arrivals by the schedule.
    pub arrived: u32,
    pub completed: u32,
    pub failed: u32,
    pub mean_in_flight: f64,
    pub output_tokens: f64,
    /// Of the requests whose first token came in this bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<Spread>,
    /// Of the gaps that ended in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub itl_ms: Option<Spread>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub p95: f64,
    pub p99: f64,
}

/// What formulas and hardware allow beside what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub hardware: String,
    pub model: String,
    pub rows: Vec<LimitRow>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitRow {
    /// The key of the measured figure, such as `median_tpot_ms`.
    pub metric: String,
    pub limit: f64,
    pub measured: f64,
    /// Whether the limit is a floor (a latency) or a ceiling (a throughput).
    pub is_floor: bool,
    /// The formula with its numbers.
    pub because: String,
    /// Measured beyond the limit by more than the tolerance: physics is broken.
    pub beaten: bool,
}

/// The search for the highest rate that keeps the SLO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Search {
    /// Highest rate that kept it, requests a second; `None` if none did.
    pub best_rate: Option<f64>,
    /// Lowest rate that did not; `None` if the search ended before it met one.
    pub lowest_rate_that_failed: Option<f64>,
    pub trials: Vec<Trial>,
    /// When the search ends, in words.
    pub stopping_rule: String,
    /// Why it ended.
    pub ended: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    pub rate: f64,
    /// Index into [`BenchResult::points`].
    pub point: usize,
    pub kept: bool,
    /// Which limit was broken and by how much, or how much room was left.
    pub reason: String,
}

/// A line of `requests.jsonl`: one request, whatever became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Index into [`BenchResult::points`].
    pub point: u32,
    pub repeat: u32,
    /// In the order of the schedule, from 0.
    pub index: u64,
    pub phase: Phase,
    /// Conversation and turn, from 0, of a workload that has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<(u64, u32)>,
    pub scheduled_seconds: f64,
    /// Since when it could have been sent: later than scheduled only if it waited for a place under
    /// `max_concurrency`.
    pub due_seconds: f64,
    /// When the client began to send it, before a connection was opened for it. `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_seconds: Option<f64>,
    /// How long opening a connection took; `None` if one was reused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_seconds: Option<f64>,
    /// When the first step that computed some of its prompt began. Known offline only: a server does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_seconds: Option<f64>,
    /// First byte of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte_seconds: Option<f64>,
    /// First content, reasoning or tool delta that is not empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_seconds: Option<f64>,
    /// Last such delta, or the reason to end if that came later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_token_seconds: Option<f64>,
    /// Last byte, failure, or the moment at which the request was given up.
    pub end_seconds: f64,
    /// Gaps between successive deltas that are not empty, in microseconds.
    pub gaps_micros: Vec<u32>,
    /// Deltas that are not empty.
    pub chunks: u32,
    /// Tokens that were to be sent and to be generated at most.
    pub wanted_input_tokens: u32,
    pub wanted_output_tokens: u32,
    /// From the server's usage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageCounts>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
    /// Of a request whose trace was recorded, as trace stores show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    pub outcome: Outcome,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageCounts {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub cached_tokens: u32,
}

/// Only `Measured` requests enter the latencies; the others keep up the load around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    WarmUp,
    Measured,
    CoolDown,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    Completed,
    Failed {
        class: FailureClass,
        /// HTTP status, of an answer that refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
        message: String,
    },
    /// The client gave it up because the run was over. Not a failure.
    Cut,
}

/// The ways in which a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// Open loop: as many requests in flight as the client holds. Never sent.
    MaxInFlight,
    /// No connection: refused, no route, no such host, TLS failed.
    Unreachable,
    ConnectTimeout,
    /// A status other than 2xx.
    Status,
    /// Not `text/event-stream`.
    ContentType,
    FirstByteTimeout,
    /// Nothing came for too long in the middle of an answer.
    Stall,
    TotalTimeout,
    /// The connection broke off, or the stream ended before its end was told.
    Dropped,
    /// An event that is no JSON of a completion, or too long.
    BrokenSse,
    /// The server sent an error instead of the rest.
    ErrorEvent,
    /// The stream ended well and carried no token.
    NoToken,
    /// The stream ended well and carried no usage: nobody knows how many tokens it was.
    NoUsage,
    /// The engine refused the request or failed in it (offline only).
    Engine,
}

impl FailureClass {
    pub const fn name(self) -> &'static str {
        match self {
            Self::MaxInFlight => "max_in_flight",
            Self::Unreachable => "unreachable",
            Self::ConnectTimeout => "connect_timeout",
            Self::Status => "status",
            Self::ContentType => "content_type",
            Self::FirstByteTimeout => "first_byte_timeout",
            Self::Stall => "stall",
            Self::TotalTimeout => "total_timeout",
            Self::Dropped => "dropped",
            Self::BrokenSse => "broken_sse",
            Self::ErrorEvent => "error_event",
            Self::NoToken => "no_token",
            Self::NoUsage => "no_usage",
            Self::Engine => "engine",
        }
    }
}

impl RequestRecord {
    /// From the scheduled arrival to the first token.
    pub fn ttft_seconds(&self) -> Option<f64> {
        Some(self.first_token_seconds? - self.scheduled_seconds)
    }

    pub fn ttft_from_send_seconds(&self) -> Option<f64> {
        Some(self.first_token_seconds? - self.sent_seconds?)
    }

    /// From the scheduled arrival to the last token.
    pub fn e2el_seconds(&self) -> Option<f64> {
        Some(self.last_token_seconds? - self.scheduled_seconds)
    }

    /// Mean time per output token after the first; `None` for a single token.
    pub fn tpot_seconds(&self) -> Option<f64> {
        let after_first = self.usage?.completion_tokens.checked_sub(1).filter(|&tokens| tokens > 0)?;
        Some((self.last_token_seconds? - self.first_token_seconds?) / f64::from(after_first))
    }

    pub fn send_lag_seconds(&self) -> Option<f64> {
        Some(self.sent_seconds? - self.due_seconds)
    }

    pub fn is_completed(&self) -> bool {
        self.outcome == Outcome::Completed
    }

    pub fn is_failed(&self) -> bool {
        matches!(self.outcome, Outcome::Failed { .. })
    }
}
