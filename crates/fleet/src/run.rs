//! The run: one queue of events in virtual time.
//!
//! What happens to requests is in `requests.rs`, what happens to pods in `lifecycle.rs`; here is the order of events,
//! what is read and written down at intervals, and what remains of it all.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use servelab_bench::prompt::{Job, Writer};
use servelab_bench::result::SloLimit;
use servelab_router::choice::load::Dispatch;

use crate::gateway::Gateway;
use crate::metrics_server::{self, MetricsServer};
use crate::outcome::{Attainment, Failure, LogLine, Outcome};
use crate::pods::{Phase, PodId, Pods};
use crate::replica::{Ask, Note};
use crate::scaler::Scaler;
use crate::scrape::Prometheus;
use crate::series::{ByArrival, Row, resolution};
use crate::settings::{Settings, SettingsError};
use crate::traffic::{Conversation, Load, random, writer};

/// Lines of the log that are kept.
const MOST_LINES: usize = 2000;

/// Something that will happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// A step of a pod's replica ends.
    Step(PodId),
    /// The pod's stage is over, or its time to finish what it has. Of this generation.
    Pod(PodId, u32),
    /// A probe finds the pod ready.
    Probe(PodId, u32),
    /// The network to the pod is whole again; or it has been broken for so long that streams are given up.
    Heal(PodId, u32),
    GiveUp(PodId, u32),
    NodeIsThere,
    /// The next request of the open loop.
    Arrival,
    /// The next turn of a conversation, or of a user.
    Send(u64),
    HoldTimeout(u64),
    RouterScrape,
    Scrape,
    ReadCpu,
    Scale,
    Crash,
    Partition,
    Row,
}

/// A request that has not ended.
pub(crate) struct Active {
    pub ask: Ask,
    pub conversation: Conversation,
    pub arrived: Duration,
    pub cell: usize,
    /// Where it is, if it is anywhere.
    pub at: Option<(PodId, Dispatch)>,
    pub first_token: Option<Duration>,
    pub attempts: u32,
    /// Until when it may be held; none while it was never held.
    pub held_until: Option<Duration>,
}

#[derive(Default)]
pub(crate) struct Tally {
    pub requests: u64,
    pub completed: u64,
    pub failures: BTreeMap<Failure, u64>,
    pub good: u64,
    /// Of each limit, by how many it was kept.
    pub kept: Vec<u64>,
    pub output_tokens: u64,
    pub prompt_tokens: u64,
    pub hit_tokens: u64,
    pub looked_up_tokens: u64,
    pub preemptions: u64,
    pub retries: u64,
    pub crashes: u64,
    pub partitions: u64,
    pub scalings: u64,
    pub turns: u64,
    pub last_direction: i32,
    /// What the rows have seen of the counts above.
    pub seen: (u64, u64, u64),
}

/// Everything at one moment.
pub struct Run {
    pub(crate) settings: Settings,
    pub(crate) now: Duration,
    pub(crate) scaler: Scaler,
    pub(crate) prometheus: Prometheus,
    pub(crate) metrics_server: MetricsServer,
    pub(crate) gateway: Gateway,
    pub(crate) pods: Pods,
    pub(crate) writer: Writer,
    pub(crate) jobs: Box<dyn Iterator<Item = Job> + Send>,
    pub(crate) arrivals: Option<Box<dyn Iterator<Item = Duration> + Send>>,
    pub(crate) think: ChaCha8Rng,
    pub(crate) faults: ChaCha8Rng,
    pub(crate) active: BTreeMap<u64, Active>,
    /// Conversations between two turns.
    pub(crate) pausing: BTreeMap<u64, Conversation>,
    pub(crate) next_request: u64,
    pub(crate) next_conversation: u64,
    queue: BinaryHeap<Reverse<(Duration, u8, u64, Event)>>,
    queued: u64,
    pub(crate) notes: Vec<Note>,
    pub(crate) tally: Tally,
    pub(crate) ttft: ByArrival,
    pub(crate) tpot: ByArrival,
    pub(crate) e2e: ByArrival,
    pub(crate) queue_time: ByArrival,
    rows: Vec<Row>,
    row_interval: Duration,
    busy_nanos: u64,
    log: Vec<LogLine>,
    log_left_out: u64,
}

/// Simulates a fleet.
///
/// # Errors
/// If a setting cannot be.
pub fn simulate(settings: Settings, scaler: Scaler) -> Result<Outcome, SettingsError> {
    let mut run = Run::new(settings, scaler)?;
    while run.step() {}
    Ok(run.finish())
}

impl Run {
    /// # Errors
    /// If a setting cannot be.
    pub fn new(settings: Settings, scaler: Scaler) -> Result<Self, SettingsError> {
        settings.validate()?;
        let row_interval = resolution(settings.duration);
        let by_arrival = || ByArrival::new(row_interval);
        let seed = settings.seed;
        let most_pods = scaler.most_replicas().max(settings.pods.initial);
        let mut run = Self {
            now: Duration::ZERO,
            gateway: Gateway::new(settings.router, &settings.kind, most_pods, seed),
            prometheus: Prometheus::new(&settings.model_name, &scaler),
            metrics_server: MetricsServer::default(),
            pods: Pods::new(settings.pods, settings.kind.gpus),
            writer: writer(seed),
            jobs: settings.workload.jobs(seed),
            arrivals: None,
            think: random(seed, 11),
            faults: random(seed, 12),
            active: BTreeMap::new(),
            pausing: BTreeMap::new(),
            next_request: 0,
            next_conversation: 0,
            queue: BinaryHeap::new(),
            queued: 0,
            notes: Vec::new(),
            tally: Tally { kept: vec![0; settings.slo.limits.len()], ..Tally::default() },
            ttft: by_arrival(),
            tpot: by_arrival(),
            e2e: by_arrival(),
            queue_time: by_arrival(),
            rows: Vec::new(),
            row_interval,
            busy_nanos: 0,
            log: Vec::new(),
            log_left_out: 0,
            settings,
            scaler,
        };
        run.start()?;
        Ok(run)
    }

    fn start(&mut self) -> Result<(), SettingsError> {
        self.start_ready_pods()?;
        match self.settings.load.clone() {
            Load::Open(shape) => {
                self.arrivals = Some(shape.times(self.settings.seed));
                self.next_arrival();
            }
            Load::Users { users, think } => self.start_users(users, think),
        }
        self.push(self.settings.router.probe_interval, Event::RouterScrape);
        self.push(Duration::ZERO, Event::Scrape);
        if self.scaler.reads_cpu() {
            self.push(Duration::ZERO, Event::ReadCpu);
        }
        self.push(Duration::ZERO, Event::Row);
        if let Some(first) = self.scaler.next_wake() {
            self.push(first, Event::Scale);
        }
        self.next_crash();
        self.next_partition();
        Ok(())
    }

    pub(crate) fn push(&mut self, at: Duration, event: Event) {
        self.queued += 1;
        // Of events at one moment, steps end first: what they bring is there for whoever comes then.
        let rank = u8::from(!matches!(event, Event::Step(_)));
        self.queue.push(Reverse((at, rank, self.queued, event)));
    }

    /// Lets the next event happen. False when nothing more will: the time is over and every request has ended.
    pub fn step(&mut self) -> bool {
        let is_over = self.now >= self.settings.duration && self.is_idle();
        let Some(Reverse((at, _, _, event))) = self.queue.pop().filter(|_| !is_over) else { return false };
        self.now = at;
        match event {
            Event::Step(pod) => self.step_ended(pod),
            Event::Pod(pod, generation) => self.pod_is_due(pod, generation),
            Event::Probe(pod, generation) => self.probed(pod, generation),
            Event::Heal(pod, generation) => self.healed(pod, generation),
            Event::GiveUp(pod, generation) => self.given_up(pod, generation),
            Event::NodeIsThere => self.node_is_there(),
            Event::Arrival => self.arrival(),
            Event::Send(conversation) => self.send_paused(conversation),
            Event::HoldTimeout(request) => self.hold_timed_out(request),
            Event::RouterScrape => {
                self.gateway.scrape(self.now, &mut self.pods);
                self.push(self.now + self.settings.router.probe_interval, Event::RouterScrape);
            }
            Event::Scrape => {
                self.prometheus.scrape(
                    self.now,
                    &self.gateway,
                    &mut self.pods,
                    self.settings.scrape_interval,
                );
                self.push(self.now + self.settings.scrape_interval, Event::Scrape);
            }
            Event::ReadCpu => {
                self.metrics_server.scrape(self.now, &mut self.pods);
                self.push(self.now + metrics_server::RESOLUTION, Event::ReadCpu);
            }
            Event::Scale => self.scale(),
            Event::Crash => self.crash(),
            Event::Partition => self.partition(),
            Event::Row => self.row(),
        }
        true
    }

    /// Whether nobody is asking or will ask.
    fn is_idle(&self) -> bool {
        self.active.is_empty() && self.pausing.is_empty() && self.arrivals.is_none()
    }

    pub(crate) fn log(&mut self, text: String) {
        if self.log.len() < MOST_LINES {
            self.log.push(LogLine { seconds: self.now.as_secs_f64(), text });
        } else {
            self.log_left_out += 1;
        }
    }

    /// Requests that have not ended. For tests.
    pub fn alive(&self) -> usize {
        self.active.len()
    }

    /// What must hold between two events. For tests; O(everything).
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        let tally = &self.tally;
        let ended = tally.completed + tally.failures.values().sum::<u64>();
        if ended + self.active.len() as u64 != tally.requests {
            let (sent, alive) = (tally.requests, self.active.len());
            return Err(format!("{sent} requests were sent, {ended} ended and {alive} are alive"));
        }
        for cell in &self.gateway.cells {
            let waiting = cell.held.iter().chain(&cell.waiting);
            if waiting.clone().any(|request| self.active.get(request).is_none_or(|it| it.at.is_some())) {
                return Err("a request waits in the router that has ended or is at a replica".into());
            }
        }
        let placed = self.active.values().filter(|request| request.at.is_some()).count();
        let in_flight: usize = self.gateway.cells.iter().map(|cell| cell.in_flight).sum();
        let queued = self.gateway.waiting();
        if placed != in_flight || placed + queued != self.active.len() {
            let all = self.active.len();
            return Err(format!("{all} alive: {placed} at replicas, {in_flight} counted, {queued} wait"));
        }
        for pod in &self.pods.alive {
            if let Some(replica) = &self.pods.pods[*pod].replica {
                replica.check_integrity().map_err(|breach| format!("pod {pod}: {breach}"))?;
            }
        }
        Ok(())
    }

    // ---- rows ----

    fn row(&mut self) {
        let counts = self.pods.counts();
        let (mut queued, mut running, mut most, mut busy) = (0, 0, 0.0_f64, 0);
        let mut usage = 0.0;
        for id in &self.pods.alive {
            let pod = &mut self.pods.pods[*id];
            let Some(replica) = &mut pod.replica else { continue };
            replica.sync(self.now);
            let gauges = replica.gauges();
            queued += gauges.waiting;
            running += gauges.running;
            let busy_nanos = replica.counters().busy_nanos;
            busy += busy_nanos - pod.busy_nanos_seen;
            pod.busy_nanos_seen = busy_nanos;
            if pod.phase == Phase::Ready {
                usage += gauges.kv_usage;
                most = most.max(gauges.kv_usage);
            }
        }
        let seconds = self.row_interval.as_secs_f64();
        let failed = self.tally.failures.values().sum();
        let now = (self.tally.requests, self.tally.completed, failed);
        let seen = std::mem::replace(&mut self.tally.seen, now);
        let rate = |now: u64, seen: u64| (now - seen) as f64 / seconds;
        let computing = f64::from(counts.ready + counts.draining).max(1.0);
        self.busy_nanos += busy;
        self.rows.push(Row {
            seconds: self.now.as_secs_f64(),
            offered_per_second: rate(now.0, seen.0),
            completed_per_second: rate(now.1, seen.1),
            failed_per_second: rate(now.2, seen.2),
            wanted: self.scaler.wanted(),
            ready: counts.ready,
            pending: counts.pending,
            starting: counts.starting,
            draining: counts.draining,
            router_waiting: self.gateway.waiting() as u32,
            held: self.gateway.held() as u32,
            queued,
            running,
            kv_usage_mean: usage / f64::from(counts.ready.max(1)),
            kv_usage_most: most,
            busy: (busy as f64 / 1e9 / seconds / computing).min(1.0),
            gpu_hours: self.pods.gpu_seconds(self.now) / 3600.0,
        });
        self.push(self.now + self.row_interval, Event::Row);
    }

    // ---- the end ----

    /// What it gave until now.
    pub fn finish(mut self) -> Outcome {
        for id in &self.pods.alive {
            if let Some(replica) = &self.pods.pods[*id].replica {
                self.tally.preemptions += replica.gauges().preemptions;
            }
        }
        let gpu_hours = self.pods.gpu_seconds(self.now) / 3600.0;
        let dollars = gpu_hours * self.settings.dollars_per_gpu_hour;
        let tally = self.tally;
        let of_all = |count: u64| count as f64 / (tally.requests as f64).max(1.0);
        let attainment = |(limit, kept): (&SloLimit, &u64)| Attainment {
            limit: limit.to_string(),
            share: of_all(*kept),
            is_kept: 100.0 * of_all(*kept) >= limit.percentile,
        };
        let ready = self.rows.iter().map(|row| row.ready);
        let hit_rate = tally.hit_tokens as f64 / (tally.looked_up_tokens as f64).max(1.0);
        let millions = tally.output_tokens as f64 / 1e6;
        Outcome {
            scaler: self.scaler.name().to_owned(),
            requests: tally.requests,
            completed: tally.completed,
            seconds: self.now.as_secs_f64(),
            ttft_seconds: self.ttft.over_all(),
            tpot_seconds: self.tpot.over_all(),
            e2e_seconds: self.e2e.over_all(),
            mean_queue_seconds: self.queue_time.mean(),
            slo: self.settings.slo.limits.iter().zip(&tally.kept).map(attainment).collect(),
            good_share: of_all(tally.good),
            failures: tally.failures.clone(),
            output_tokens: tally.output_tokens,
            prompt_tokens: tally.prompt_tokens,
            hit_rate,
            preemptions: tally.preemptions,
            retries: tally.retries,
            most_ready: ready.clone().max().unwrap_or(0),
            mean_ready: ready.map(f64::from).sum::<f64>() / (self.rows.len() as f64).max(1.0),
            scalings: tally.scalings,
            turns: tally.turns,
            pods_started: self.pods.started,
            crashes: tally.crashes,
            partitions: tally.partitions,
            gpu_hours,
            dollars,
            dollars_per_million_output_tokens: (millions > 0.0).then(|| dollars / millions),
            ttft_rows: self.ttft.rows(),
            rows: self.rows,
            log: self.log,
            log_left_out: self.log_left_out,
        }
    }
}
