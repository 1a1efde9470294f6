//! A whole benchmark: every level of load, every repeat of it, or the trials of a search.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::arrivals::ArrivalShape;
use crate::client::Client;
use crate::find_rate::{FindRate, RateSearch};
use crate::live::Live;
use crate::measure::{self, Tally};
use crate::phases::{Extent, PhasePlan};
use crate::prompt::{Job, Writer, key, mix};
use crate::result::{Interval, Load, Metrics, Phase, Point, Repeat, RequestRecord, Search, Slo, Trial};
use crate::run::{LoadShape, RunLog, RunPlan, run};
use crate::server::{PrefixCounters, change, prefix_counters};
use crate::stats;
use crate::vllm;
use crate::workload::Workload;

/// Between two repeats: what the last one gave up is noticed by the server, and is no load on the next.
const SETTLE: Duration = Duration::from_millis(300);

/// What is measured.
pub trait Target {
    /// Runs one repeat.
    fn run(
        &mut self,
        writer: Arc<Writer>,
        jobs: Box<dyn Iterator<Item = Job> + Send>,
        plan: &RunPlan,
        live: Arc<Live>,
        stop: CancellationToken,
    ) -> impl Future<Output = RunLog>;

    /// Counters of the prefix cache, if it has any.
    fn prefix_counters(&mut self) -> impl Future<Output = Option<PrefixCounters>>;
}

/// A server over HTTP.
pub struct Http {
    pub client: Client,
}

impl Target for Http {
    async fn run(
        &mut self,
        writer: Arc<Writer>,
        jobs: Box<dyn Iterator<Item = Job> + Send>,
        plan: &RunPlan,
        live: Arc<Live>,
        stop: CancellationToken,
    ) -> RunLog {
        run(&self.client, writer, jobs, plan, live, stop).await
    }

    async fn prefix_counters(&mut self) -> Option<PrefixCounters> {
        prefix_counters(&self.client).await
    }
}

/// Who watches a benchmark run.
pub trait Observer {
    /// A repeat begins; `live` shows it until it has ended.
    fn begins(&mut self, load: &Load, repeat: u32, repeats: u32, live: Arc<Live>);
    fn ended(&mut self, load: &Load, repeat: &Repeat);
    /// A rate of the search has been judged.
    fn judged(&mut self, trial: &Trial);
}

/// Which loads are run.
#[derive(Clone, Debug, PartialEq)]
pub enum Loads {
    /// One after the other.
    Ladder(Vec<LoadShape>),
    /// Open loops of this shape at the rates of the search.
    Search { arrivals: ArrivalShape, max_concurrency: Option<u32>, search: FindRate },
}

/// How a benchmark is run.
#[derive(Clone, Debug)]
pub struct Settings {
    pub loads: Loads,
    pub measured: Extent,
    /// `None`: the load's own default; see [`default_phases`].
    pub warm_up: Option<Extent>,
    pub cool_down: Option<bool>,
    pub repeats: u32,
    pub seed: u64,
    /// Whether prompts differ from repeat to repeat and from run to run.
    pub salted: bool,
    pub slo: Option<Slo>,
    pub max_in_flight: u32,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    pub points: Vec<Point>,
    pub search: Option<Search>,
}

/// Whether a load kept the SLO, and by how much.
enum Judgement {
    Kept(String),
    Broken(String),
    /// It would have been kept, had the client sent in time.
    ClientLate(String),
}

impl Judgement {
    fn of(slo: &Slo, records: &[RequestRecord]) -> Self {
        let ended = |record: &&RequestRecord| record.is_completed() || record.is_failed();
        let measured = records.iter().filter(|record| record.phase == Phase::Measured).filter(ended);
        match slo.judge(measured.clone()) {
            Ok(room) => Self::Kept(room),
            Err(broken) if slo.is_kept_without_lag(measured) => Self::ClientLate(broken),
            Err(broken) => Self::Broken(broken),
        }
    }
}

/// Runs a benchmark. Records go to `records` as soon as their repeat has ended.
pub struct Session<'a, T> {
    pub target: T,
    pub workload: &'a Workload,
    /// Its key and salt are set for every repeat.
    pub writer: Writer,
    pub settings: &'a Settings,
    pub observer: &'a mut dyn Observer,
    pub records: &'a mut dyn FnMut(&RequestRecord) -> io::Result<()>,
    pub stop: CancellationToken,
}

/// Warm-up and cool-down where the user says nothing. Closed loop: one request of each client warms up. Open loop:
/// a tenth of what is measured. A workload that belongs together has neither.
pub fn default_phases(settings: &Settings, shape: &LoadShape, workload: &Workload) -> PhasePlan {
    let warm_up = match (shape, settings.measured) {
        _ if workload.is_whole => Extent::Requests(0),
        (LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, .. }, _) => Extent::Requests(0),
        (LoadShape::Closed { concurrency, .. }, Extent::Requests(_)) => {
            Extent::Requests(u64::from(*concurrency))
        }
        (LoadShape::Open { .. }, Extent::Requests(requests)) => Extent::Requests(requests.div_ceil(10)),
        (_, Extent::Time(time)) => Extent::Time(time / 10),
    };
    let all_at_once = matches!(shape, LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, .. });
    PhasePlan {
        warm_up: settings.warm_up.unwrap_or(warm_up),
        measured: settings.measured,
        cool_down: settings.cool_down.unwrap_or(!workload.is_whole && !all_at_once),
    }
}

impl<T: Target> Session<'_, T> {
    /// Runs all of it. Ends early, with what was measured until then, if it is stopped, or if no request of a repeat
    /// completes.
    ///
    /// # Errors
    /// If a record cannot be kept.
    pub async fn run(mut self) -> io::Result<Measured> {
        let settings = self.settings;
        match &settings.loads {
            Loads::Ladder(loads) => self.ladder(loads).await,
            Loads::Search { arrivals, max_concurrency, search } => {
                self.search(arrivals, *max_concurrency, *search).await
            }
        }
    }

    async fn ladder(&mut self, loads: &[LoadShape]) -> io::Result<Measured> {
        let mut points = Vec::new();
        for shape in loads {
            let (point, _) = self.point(points.len(), shape).await?;
            let goes_on = point.metrics.completed > 0 && !self.stop.is_cancelled();
            points.push(point);
            if !goes_on {
                break;
            }
        }
        Ok(Measured { points, search: None })
    }

    async fn search(
        &mut self,
        arrivals: &ArrivalShape,
        max_concurrency: Option<u32>,
        search: FindRate,
    ) -> io::Result<Measured> {
        let mut state = RateSearch::new(search);
        let (mut points, mut trials) = (Vec::new(), Vec::new());
        let ended = loop {
            let rate = match state.next_rate() {
                Ok(rate) => rate,
                Err(reason) => break reason,
            };
            let Some(arrivals) = arrivals.at_rate(rate) else { break "these arrivals have no rate".into() };
            let (point, judged) =
                self.point(points.len(), &LoadShape::Open { arrivals, max_concurrency }).await?;
            points.push(point);
            if self.stop.is_cancelled() {
                break "it was stopped".into();
            }
            let (kept, reason) = match judged {
                Judgement::Kept(reason) => (true, reason),
                Judgement::Broken(reason) => (false, reason),
                Judgement::ClientLate(reason) => {
                    break format!(
                        "the client, and not the server, broke the SLO at {rate:.4} req/s by sending late: {reason}"
                    );
                }
            };
            state.tell(rate, kept);
            let trial = Trial { rate, point: points.len() - 1, kept, reason };
            self.observer.judged(&trial);
            trials.push(trial);
        };
        let search = Search {
            best_rate: state.best_rate(),
            lowest_rate_that_failed: state.lowest_rate_that_failed(),
            trials,
            stopping_rule: search.stopping_rule(),
            ended,
        };
        Ok(Measured { points, search: Some(search) })
    }

    /// All repeats of one load, and whether each of them kept the SLO.
    async fn point(&mut self, number: usize, shape: &LoadShape) -> io::Result<(Point, Judgement)> {
        let load = describe(shape);
        let plan = RunPlan {
            shape: shape.clone(),
            phases: default_phases(self.settings, shape, self.workload),
            max_in_flight: self.settings.max_in_flight,
            seed: 0,
        };
        let mut repeats = Vec::new();
        let mut pooled = Tally::default();
        let mut judged = Judgement::Kept(String::new());
        for number_of_repeat in 1..=self.settings.repeats {
            if number_of_repeat > 1 || number > 0 {
                tokio::time::sleep(SETTLE).await;
            }
            let live = Arc::new(Live::default());
            self.observer.begins(&load, number_of_repeat, self.settings.repeats, live.clone());
            let (repeat, tally, records) = self.repeat(number_of_repeat, &plan, live).await;
            self.observer.ended(&load, &repeat);
            self.keep(number, number_of_repeat, records.iter())?;
            if let (Some(slo), Judgement::Kept(_)) = (&self.settings.slo, &judged) {
                judged = Judgement::of(slo, &records);
            }
            let goes_on = repeat.metrics.completed > 0 && !repeat.interrupted;
            pooled.merge(tally);
            repeats.push(repeat);
            if !goes_on {
                break;
            }
        }
        let intervals = intervals(&repeats);
        Ok((Point { load, metrics: pooled.metrics(), intervals, repeats, limits: None }, judged))
    }

    async fn repeat(
        &mut self,
        number: u32,
        plan: &RunPlan,
        live: Arc<Live>,
    ) -> (Repeat, Tally, Vec<RequestRecord>) {
        let seed = self.settings.seed.wrapping_add(u64::from(number - 1));
        let salt = if self.settings.salted { fresh_salt() } else { 0 };
        let mut writer = self.writer.clone();
        writer.key = key(self.settings.seed, salt);
        writer.salt_text = (salt != 0).then(|| format!("[{salt:016x}] "));
        let plan = RunPlan { seed, ..plan.clone() };
        let before = self.target.prefix_counters().await;
        let jobs = self.workload.jobs(seed);
        let log = self.target.run(Arc::new(writer), jobs, &plan, live, self.stop.clone()).await;
        let after = self.target.prefix_counters().await;
        let tally = Tally::of(&log.records, self.settings.slo.as_ref());
        let count = |phase| log.records.iter().filter(|record| record.phase == phase).count() as u64;
        let repeat = Repeat {
            repeat: number,
            salt,
            interrupted: log.interrupted,
            metrics: tally.clone().metrics(),
            failures: measure::failures(&log.records),
            client: measure::client_check(&log),
            littles_law: measure::littles_law(&log),
            prefix_cache: change(before, after),
            warm_up_requests: count(Phase::WarmUp),
            cool_down_requests: count(Phase::CoolDown),
            window_seconds: measure::window(&log.records).unwrap_or_default(),
            series: measure::series(&log.records),
        };
        (repeat, tally, log.records)
    }

    fn keep<'r>(
        &mut self,
        point: usize,
        repeat: u32,
        records: impl Iterator<Item = &'r RequestRecord>,
    ) -> io::Result<()> {
        for record in records {
            (self.records)(&RequestRecord { point: point as u32, repeat, ..record.clone() })?;
        }
        Ok(())
    }
}

/// Different in every run of the program, and never 0.
fn fresh_salt() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (mix(now.as_nanos() as u64) ^ mix(u64::from(std::process::id()))).max(1)
}

fn describe(shape: &LoadShape) -> Load {
    match shape {
        LoadShape::Closed { concurrency, think_time } => {
            Load::Closed { concurrency: *concurrency, think_time_seconds: think_time.as_secs_f64() }
        }
        LoadShape::Open { arrivals, max_concurrency } => Load::Open {
            rate: arrivals.mean_rate(),
            burstiness: arrivals.burstiness(),
            shape: arrivals.describe(),
            max_concurrency: *max_concurrency,
        },
    }
}

/// Every number that vLLM's benchmark names, over the repeats.
fn intervals(repeats: &[Repeat]) -> BTreeMap<String, Interval> {
    let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let metrics: Vec<&Metrics> =
        repeats.iter().map(|repeat| &repeat.metrics).filter(|m| m.completed > 0).collect();
    for metrics in &metrics {
        for (name, value) in vllm::metric_keys(metrics) {
            if let Some(value) = value.as_f64() {
                samples.entry(name).or_default().push(value);
            }
        }
    }
    // What one repeat lacks has no mean over all of them.
    let whole = samples.into_iter().filter(|(_, values)| values.len() == metrics.len());
    whole.filter_map(|(name, values)| Some((name, stats::interval(&values)?))).collect()
}
