//! The engine in this process, without HTTP and without text: the same loads, workloads and records.
//!
//! One loop: what is due is added, the engine steps, its events are stamped with the end of the step. Time is real,
//! or that of a simulated device, whose steps take the time that it says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{
    Engine, Event, FinishReason, ModelRunner, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use servelab_sim::VirtualClock;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::live::Live;
use crate::phases::Phases;
use crate::prompt::{Content, Job, Writer};
use crate::result::{FailureClass, Outcome, Phase, RequestRecord, UsageCounts};
use crate::run::{LoadShape, MAX_GAPS, RunLog, RunPlan, blank};
use crate::server::PrefixCounters;
use crate::session::Target;

/// How long the loop sleeps at most before it looks whether it is to stop.
const NAP: Duration = Duration::from_millis(20);

/// Time as the loop sees it, since the start of the repeat.
pub trait Time {
    fn restart(&mut self);
    fn now(&self) -> Duration;
    fn wait_until(&mut self, at: Duration);
}

/// The time on the wall.
#[derive(Debug)]
pub struct RealTime(Clock);

impl RealTime {
    pub fn start() -> Self {
        Self(Clock::start())
    }
}

impl Time for RealTime {
    fn restart(&mut self) {
        self.0 = Clock::start();
    }

    fn now(&self) -> Duration {
        self.0.now()
    }

    fn wait_until(&mut self, at: Duration) {
        std::thread::sleep(at.saturating_sub(self.0.now()));
    }
}

/// The time of a simulated device, which its steps and the loop's waits move on.
#[derive(Clone, Debug, Default)]
pub struct VirtualTime {
    clock: VirtualClock,
    /// The beginning of the repeat.
    origin: Duration,
}

impl VirtualTime {
    /// As `clock` shows it, which the device moves on too.
    pub fn of(clock: VirtualClock) -> Self {
        Self { clock, origin: Duration::ZERO }
    }
}

impl Time for VirtualTime {
    fn restart(&mut self) {
        self.origin = self.clock.now();
    }

    fn now(&self) -> Duration {
        self.clock.now().saturating_sub(self.origin)
    }

    fn wait_until(&mut self, at: Duration) {
        self.clock.advance_to(self.origin + at);
    }
}

/// An engine as the target of a benchmark.
pub struct Offline<R, T> {
    pub engine: Engine<R>,
    pub time: T,
    /// Tokens that end an answer, unless the workload ignores them.
    pub eos_token_ids: Arc<[TokenId]>,
    next_id: u64,
}

impl<R: ModelRunner, T: Time> Offline<R, T> {
    pub fn new(engine: Engine<R>, time: T, eos_token_ids: Arc<[TokenId]>) -> Self {
        Self { engine, time, eos_token_ids, next_id: 0 }
    }
}

impl<R: ModelRunner, T: Time> Target for Offline<R, T> {
    async fn run(
        &mut self,
        writer: Arc<Writer>,
        jobs: Box<dyn Iterator<Item = Job> + Send>,
        plan: &RunPlan,
        live: Arc<Live>,
        stop: CancellationToken,
    ) -> RunLog {
        self.time.restart();
        Loop::new(self, &writer, jobs, plan, &live).run(&stop)
    }

    async fn prefix_counters(&mut self) -> Option<PrefixCounters> {
        let stats = self.engine.stats();
        let (queries, hits) = (stats.prefix_query_tokens, stats.prefix_hit_tokens);
        Some(PrefixCounters { prefix: "engine_".into(), queries, hits })
    }
}

/// A job between two of its turns.
struct Conversation {
    number: u64,
    job: Job,
    turn: usize,
    /// All tokens so far, answers included.
    history: Vec<TokenId>,
    /// Number and phase of the first turn, where the schedule has given them; later ones get theirs when they are
    /// sent.
    ticket: Option<(u64, Phase)>,
}

/// A conversation whose next turn is to be sent. Ordered by time, then by number.
struct Due {
    at: Duration,
    conversation: Conversation,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.conversation.number).cmp(&(other.at, other.conversation.number))
    }
}

/// A request in the engine.
struct Active {
    record: RequestRecord,
    conversation: Conversation,
    last_token: Option<Duration>,
    prompt_tokens: u32,
    cached_tokens: Option<u32>,
}

struct Loop<'a, R, T> {
    target: &'a mut Offline<R, T>,
    writer: &'a Writer,
    plan: &'a RunPlan,
    live: &'a Live,
    jobs: std::iter::Enumerate<Box<dyn Iterator<Item = Job> + Send>>,
    /// Open loop: times that have not come.
    times: Option<std::iter::Peekable<Box<dyn Iterator<Item = Duration> + Send>>>,
    due: BinaryHeap<Reverse<Due>>,
    active: BTreeMap<RequestId, Active>,
    phases: Phases,
    records: Vec<RequestRecord>,
    gaps: u64,
}

impl<'a, R: ModelRunner, T: Time> Loop<'a, R, T> {
    fn new(
        target: &'a mut Offline<R, T>,
        writer: &'a Writer,
        jobs: Box<dyn Iterator<Item = Job> + Send>,
        plan: &'a RunPlan,
        live: &'a Live,
    ) -> Self {
        let times = match &plan.shape {
            LoadShape::Closed { .. } => None,
            LoadShape::Open { arrivals, .. } => Some(arrivals.times(plan.seed).peekable()),
        };
        let mut this = Self {
            target,
            writer,
            plan,
            live,
            jobs: jobs.enumerate(),
            times,
            due: BinaryHeap::new(),
            active: BTreeMap::new(),
            phases: Phases::new(plan.phases),
            records: Vec::new(),
            gaps: 0,
        };
        if let LoadShape::Closed { concurrency, .. } = plan.shape {
            (0..concurrency).for_each(|_| this.next_job(Duration::ZERO));
        }
        this
    }

    fn run(mut self, stop: &CancellationToken) -> RunLog {
        let clock = Clock::start();
        let mut is_lost = false;
        while !stop.is_cancelled() && !self.phases.is_over() && !is_lost {
            self.arrivals();
            self.send_what_is_due();
            if self.target.engine.has_work() {
                is_lost = self.step();
            } else if !self.wait() {
                break;
            }
        }
        let interrupted = stop.is_cancelled();
        self.give_up();
        RunLog { records: self.records, live: self.live.view(), reads: None, interrupted, clock }
    }

    /// Sleeps until something is due. False if nothing ever will be.
    fn wait(&mut self) -> bool {
        let next_due = self.due.peek().map(|Reverse(due)| due.at);
        let next_arrival = self.times.as_mut().and_then(|times| times.peek().copied());
        let Some(next) = next_due.into_iter().chain(next_arrival).min() else { return false };
        let now = self.target.time.now();
        if next > now {
            self.target.time.wait_until(next.min(now + NAP));
        }
        true
    }

    /// A client of a closed loop begins its next job.
    fn next_job(&mut self, at: Duration) {
        match self.jobs.next() {
            Some((number, job)) => self.push(at, number, job, None),
            None => self.phases.close(),
        }
    }

    fn push(&mut self, at: Duration, number: usize, job: Job, ticket: Option<(u64, Phase)>) {
        let conversation = Conversation { number: number as u64, job, turn: 0, history: Vec::new(), ticket };
        self.due.push(Reverse(Due { at, conversation }));
    }

    /// Open loop: takes in the requests whose time has come.
    fn arrivals(&mut self) {
        let now = self.target.time.now();
        while let Some(times) = &mut self.times {
            let Some(at) = times.next_if(|at| *at <= now) else {
                if times.peek().is_none() {
                    self.times = None;
                    self.phases.close();
                }
                return;
            };
            let next = self.jobs.next().and_then(|job| Some((job, self.phases.next(at)?)));
            let Some(((number, job), ticket)) = next else {
                self.times = None;
                self.phases.close();
                return;
            };
            if self.active.len() + self.due.len() >= self.plan.max_in_flight as usize {
                self.refuse(at, &job, ticket);
            } else {
                self.push(at, number, job, Some(ticket));
            }
        }
    }

    fn refuse(&mut self, at: Duration, job: &Job, (index, phase): (u64, Phase)) {
        let message =
            format!("{0} requests were in flight; --max-in-flight allows no more", self.plan.max_in_flight);
        self.live.not_sent();
        self.keep(RequestRecord {
            wanted_input_tokens: job.turns[0].content.tokens(),
            wanted_output_tokens: job.turns[0].output_tokens,
            outcome: Outcome::Failed { class: FailureClass::MaxInFlight, status: None, message },
            ..blank(index, phase, at)
        });
    }

    fn send_what_is_due(&mut self) {
        let most = match self.plan.shape {
            LoadShape::Open { max_concurrency: Some(most), .. } => most as usize,
            LoadShape::Open { .. } | LoadShape::Closed { .. } => usize::MAX,
        };
        while self.active.len() < most
            && self.due.peek().is_some_and(|Reverse(due)| due.at <= self.target.time.now())
        {
            let Some(Reverse(mut due)) = self.due.pop() else { return };
            // Without one no more is to be sent, which ends this conversation and the client's part in the load.
            let ticket = due.conversation.ticket.take().or_else(|| self.phases.next(due.at));
            if let Some((index, phase)) = ticket {
                self.send(due, index, phase, most < usize::MAX);
            }
        }
    }

    fn send(&mut self, due: Due, index: u64, phase: Phase, may_have_waited: bool) {
        let Due { at, mut conversation } = due;
        let now = self.target.time.now();
        let turn = &conversation.job.turns[conversation.turn];
        if let Content::Random(segments) = &turn.content {
            conversation.history.extend(self.writer.ids(segments));
        }
        let mut record = blank(index, phase, at);
        record.due_seconds = if may_have_waited { now.max(at) } else { at }.as_secs_f64();
        record.sent_seconds = Some(now.as_secs_f64());
        record.wanted_input_tokens = conversation.history.len() as u32;
        record.wanted_output_tokens = turn.output_tokens;
        if conversation.job.turns.len() > 1 {
            record.turn = Some((conversation.number, conversation.turn as u32));
        }
        let id = RequestId(self.target.next_id);
        self.target.next_id += 1;
        let request = self.request(id, &conversation.history, turn.output_tokens, now);
        let prompt_tokens = conversation.history.len() as u32;
        self.live.sent(now);
        let active = Active { record, conversation, last_token: None, prompt_tokens, cached_tokens: None };
        match self.target.engine.add(request) {
            Ok(()) => {
                self.active.insert(id, active);
            }
            Err(error) => self.ended(active, now, Err(error.to_string())),
        }
    }

    fn request(&self, id: RequestId, prompt: &[TokenId], max_tokens: u32, now: Duration) -> Request {
        let sampling = SamplingParams {
            temperature: self.writer.temperature.unwrap_or(0.0) as f32,
            seed: id.0,
            ..SamplingParams::greedy()
        };
        let stop_token_ids = match self.writer.ignore_eos {
            true => Arc::default(),
            false => self.target.eos_token_ids.clone(),
        };
        Request {
            id,
            prompt: prompt.into(),
            n: 1,
            sampling: Arc::new(sampling),
            stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids },
            priority: 0,
            cache_salt: 0,
            arrival: now,
        }
    }

    /// One step of the engine. True if the device is lost.
    fn step(&mut self) -> bool {
        let began = self.target.time.now();
        let report = self.target.engine.step(began);
        let now = self.target.time.now();
        for event in report.events {
            self.event(event, began, now);
        }
        report.fatal.is_some()
    }

    /// Of a step that began and ended then.
    fn event(&mut self, event: Event, began: Duration, now: Duration) {
        let id = event.request();
        match event {
            Event::Scheduled { cached_tokens, .. } => {
                if let Some(active) = self.active.get_mut(&id) {
                    active.cached_tokens.get_or_insert(cached_tokens);
                    active.record.started_seconds.get_or_insert(began.as_secs_f64());
                }
            }
            Event::Token { token, .. } => {
                if let Some(active) = self.active.get_mut(&id) {
                    active.token(token, now, self.live);
                }
            }
            Event::Finished { reason, .. } => {
                let Some(mut active) = self.active.remove(&id) else { return };
                let outcome = match reason {
                    FinishReason::Stop(_) => Ok("stop"),
                    FinishReason::Length => Ok("length"),
                    FinishReason::Abort => Err("the engine gave the request up".to_owned()),
                    FinishReason::Error(error) => Err(error),
                };
                active.record.finish_reason = outcome.as_ref().ok().map(|reason| (*reason).to_owned());
                self.ended(active, now, outcome.map(|_| ()));
            }
            Event::PromptLogprobs { .. } | Event::Preempted { .. } => {}
        }
    }

    fn ended(&mut self, active: Active, now: Duration, outcome: Result<(), String>) {
        let Active { mut record, mut conversation, prompt_tokens, cached_tokens, .. } = active;
        self.live.ended(now, Duration::ZERO, Some(outcome.is_ok()));
        record.end_seconds = now.as_secs_f64();
        let completion_tokens = record.chunks;
        record.usage =
            Some(UsageCounts { prompt_tokens, completion_tokens, cached_tokens: cached_tokens.unwrap_or(0) });
        let goes_on = outcome.is_ok() && conversation.turn + 1 < conversation.job.turns.len();
        record.outcome = match outcome {
            Ok(()) => Outcome::Completed,
            Err(message) => Outcome::Failed { class: FailureClass::Engine, status: None, message },
        };
        self.keep(record);
        if goes_on {
            conversation.turn += 1;
            let at = now + conversation.job.turns[conversation.turn].think;
            self.due.push(Reverse(Due { at, conversation }));
        } else if let LoadShape::Closed { think_time, .. } = self.plan.shape {
            self.next_job(now + think_time);
        }
    }

    fn keep(&mut self, mut record: RequestRecord) {
        self.gaps += record.gaps_micros.len() as u64;
        if self.gaps > MAX_GAPS {
            record.gaps_micros = Vec::new();
        }
        self.phases.ended(record.phase);
        self.records.push(record);
    }

    /// Gives up what is under way, and lets the engine forget it.
    fn give_up(&mut self) {
        let now = self.target.time.now();
        for (id, active) in std::mem::take(&mut self.active) {
            self.target.engine.abort(id);
            self.live.ended(now, Duration::ZERO, None);
            self.keep(RequestRecord {
                end_seconds: now.as_secs_f64(),
                outcome: Outcome::Cut,
                ..active.record
            });
        }
        for Reverse(due) in std::mem::take(&mut self.due) {
            if let Some((index, phase)) = due.conversation.ticket {
                self.keep(blank(index, phase, due.at));
            }
        }
        // Tells of the aborts, and has nothing to compute.
        self.target.engine.step(now);
    }
}

impl Active {
    fn token(&mut self, token: TokenId, now: Duration, live: &Live) {
        self.conversation.history.push(token);
        self.record.chunks += 1;
        self.record.last_token_seconds = Some(now.as_secs_f64());
        match self.last_token.replace(now) {
            None => {
                self.record.first_token_seconds = Some(now.as_secs_f64());
                live.first_token(now.saturating_sub(Duration::from_secs_f64(self.record.scheduled_seconds)));
            }
            Some(last) => {
                let gap = now.saturating_sub(last);
                self.record.gaps_micros.push(u32::try_from(gap.as_micros()).unwrap_or(u32::MAX));
                live.gap(gap);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use servelab_engine::{EngineConfig, FakeRunner, RunnerError, Step, StepOutput};

    use super::*;
    use crate::arrivals::ArrivalShape;
    use crate::find_rate::FindRate;
    use crate::measure::{Tally, failures, littles_law};
    use crate::phases::{Extent, PhasePlan};
    use crate::prompt::{Pool, Segment, Turn};
    use crate::result::{Endpoint, Load, Metrics, Repeat, Slo, Trial};
    use crate::session::{Loads, Observer, Session, Settings};
    use crate::workload::{Workload, WorkloadOptions};

    /// Every step takes 10 ms.
    struct Steady(FakeRunner, VirtualClock);

    impl ModelRunner for Steady {
        fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
            self.1.advance_to(self.1.now() + Duration::from_millis(10));
            self.0.run(step)
        }
    }

    fn offline() -> Offline<Steady, VirtualTime> {
        let config = EngineConfig {
            block_size: 16,
            num_blocks: 256,
            max_model_len: 512,
            max_batched_tokens: 256,
            max_running: 8,
            max_waiting: 64,
            prefix_cache: true,
        };
        let clock = VirtualClock::default();
        let runner = Steady(FakeRunner::new(256, 16, 1000), clock.clone());
        let time = VirtualTime::of(clock);
        Offline::new(Engine::new(config, runner).unwrap(), time, Arc::default())
    }

    fn writer() -> Writer {
        Writer {
            endpoint: Endpoint::Completions,
            model: "fake".into(),
            pool: Pool::Ids((0..1000).collect()),
            key: 1,
            salt_text: None,
            ignore_eos: true,
            temperature: None,
            extra_body: serde_json::Map::new(),
        }
    }

    fn turn(stream: u64, input: u32, output_tokens: u32) -> Turn {
        Turn {
            content: Content::Random(vec![Segment::of(stream, input)]),
            output_tokens,
            think: Duration::ZERO,
        }
    }

    fn plan(shape: LoadShape, requests: u64) -> RunPlan {
        let measured = Extent::Requests(requests);
        let phases = PhasePlan { warm_up: Extent::Requests(0), measured, cool_down: false };
        RunPlan { shape, phases, max_in_flight: 100, seed: 1 }
    }

    fn run(target: &mut Offline<Steady, VirtualTime>, jobs: Vec<Job>, plan: &RunPlan) -> RunLog {
        target.time.restart();
        let (writer, live) = (writer(), Live::default());
        let log = Loop::new(target, &writer, Box::new(jobs.into_iter()), plan, &live)
            .run(&CancellationToken::new());
        assert_eq!(target.engine.check_integrity(), Ok(()));
        assert!(!target.engine.has_work());
        log
    }

    fn metrics(log: &RunLog) -> Metrics {
        Tally::of(&log.records, None).metrics()
    }

    fn jobs(count: u64, input: u32, output: u32) -> Vec<Job> {
        (0..count).map(|at| Job { turns: vec![turn(at, input, output)] }).collect()
    }

    #[test]
    fn a_closed_loop_is_stamped_with_the_ends_of_steps() {
        let closed = LoadShape::Closed { concurrency: 4, think_time: Duration::ZERO };
        let log = run(&mut offline(), jobs(16, 32, 11), &plan(closed, 16));
        let metrics = metrics(&log);
        assert_eq!((metrics.completed, metrics.total_output_tokens), (16, 176));
        // A prompt of 32 tokens is computed in one step, and each further token in one more.
        assert!((metrics.ttft_ms.max - 10.0).abs() < 1e-6, "{:?}", metrics.ttft_ms);
        assert!((metrics.itl_ms.mean - 10.0).abs() < 1e-6 && metrics.itl_ms.count == 160);
        assert!((metrics.duration_seconds - 4.0 * 0.11).abs() < 1e-9, "{}", metrics.duration_seconds);
        assert!((metrics.output_throughput - 176.0 / 0.44).abs() < 1e-6);
        assert_eq!(metrics.peak_in_flight, 4);
        assert!(littles_law(&log).holds, "{:?}", littles_law(&log));
    }

    #[test]
    fn an_open_loop_waits_for_its_arrivals() {
        let open = LoadShape::Open { arrivals: ArrivalShape::Constant { rate: 2.0 }, max_concurrency: None };
        let log = run(&mut offline(), jobs(5, 8, 2), &plan(open, 5));
        let metrics = metrics(&log);
        assert_eq!(metrics.completed, 5);
        assert!((metrics.duration_seconds - 2.02).abs() < 1e-6, "{}", metrics.duration_seconds);
        assert!((metrics.ttft_ms.mean - 10.0).abs() < 1e-6);
    }

    #[test]
    fn a_bound_on_the_concurrency_lets_requests_wait_and_counts_it() {
        let open = LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, max_concurrency: Some(1) };
        let log = run(&mut offline(), jobs(3, 8, 10), &plan(open, 3));
        let metrics = metrics(&log);
        assert!((metrics.ttft_ms.max - 210.0).abs() < 1e-6, "{:?}", metrics.ttft_ms);
        assert!((metrics.ttft_from_send_ms.max - 10.0).abs() < 1e-6);
        assert!((metrics.client_queue_ms.max - 200.0).abs() < 1e-6);
    }

    #[test]
    fn a_conversation_finds_what_it_said_before_in_the_cache() {
        let conversation = Job { turns: vec![turn(1, 64, 16), turn(2, 16, 16), turn(3, 16, 16)] };
        let closed = LoadShape::Closed { concurrency: 1, think_time: Duration::ZERO };
        let log = run(&mut offline(), vec![conversation], &plan(closed, 3));
        let usage: Vec<_> = log.records.iter().map(|r| r.usage.unwrap()).collect();
        assert_eq!(usage.iter().map(|u| u.prompt_tokens).collect::<Vec<_>>(), [64, 96, 128]);
        // The last token of an answer is never computed, so that its block is not full.
        assert_eq!(usage.iter().map(|u| u.cached_tokens).collect::<Vec<_>>(), [0, 64, 96]);
        assert_eq!(log.records[2].turn, Some((0, 2)));
    }

    #[test]
    fn what_the_engine_refuses_is_a_failure() {
        let closed = LoadShape::Closed { concurrency: 1, think_time: Duration::ZERO };
        let mut all = jobs(2, 8, 2);
        all.insert(1, Job { turns: vec![turn(9, 500, 100)] });
        let log = run(&mut offline(), all, &plan(closed, 3));
        let counts = failures(&log.records);
        assert_eq!((counts[0].class, counts[0].all), (FailureClass::Engine, 1));
        assert!(counts[0].example.contains("context length 512"), "{}", counts[0].example);
        assert_eq!(metrics(&log).completed, 2);
    }

    #[test]
    fn more_than_may_be_in_flight_is_a_failure() {
        let open = LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, max_concurrency: None };
        let limited = RunPlan { max_in_flight: 3, ..plan(open, 10) };
        let log = run(&mut offline(), jobs(20, 8, 2), &limited);
        assert_eq!(log.records.len(), 10);
        assert_eq!(failures(&log.records)[0].class, FailureClass::MaxInFlight);
        assert_eq!(metrics(&log).completed, 3);
    }

    #[test]
    fn the_load_is_kept_up_and_then_given_up() {
        let closed = LoadShape::Closed { concurrency: 4, think_time: Duration::ZERO };
        let mut plan = plan(closed, 0);
        plan.phases =
            PhasePlan { warm_up: Extent::Requests(4), measured: Extent::Requests(7), cool_down: true };
        let log = run(&mut offline(), jobs(100, 16, 10), &plan);
        let count = |phase| log.records.iter().filter(|record| record.phase == phase).count();
        assert_eq!((count(Phase::WarmUp), count(Phase::Measured), count(Phase::CoolDown)), (4, 7, 1));
        assert!(log.records.iter().filter(|r| r.phase == Phase::Measured).all(RequestRecord::is_completed));
    }

    #[test]
    fn a_lost_device_ends_the_run() {
        let mut target = offline();
        target.engine.runner_mut().0.fail(3, RunnerError::Fatal("gone".into()));
        let closed = LoadShape::Closed { concurrency: 2, think_time: Duration::ZERO };
        let log = run(&mut target, jobs(100, 16, 10), &plan(closed, 100));
        let counts = failures(&log.records);
        assert!(counts[0].all >= 2 && counts[0].example.contains("gone"), "{counts:?}");
        assert!(log.records.len() < 100);
    }

    /// Says nothing.
    struct Silent;

    impl Observer for Silent {
        fn begins(&mut self, _load: &Load, _repeat: u32, _repeats: u32, _live: Arc<Live>) {}
        fn ended(&mut self, _load: &Load, _repeat: &Repeat) {}
        fn judged(&mut self, _trial: &Trial) {}
    }

    /// Eight sequences at once, each for ten steps of 10 ms: 80 requests a second and no more. The clock of the
    /// runtime is the test's, that of the device is virtual.
    #[tokio::test(start_paused = true)]
    async fn a_search_finds_the_rate_that_the_engine_can_serve() {
        let workload = Workload::new(&WorkloadOptions {
            input: Some("8".parse().unwrap()),
            output: Some("10".parse().unwrap()),
            ..WorkloadOptions::default()
        })
        .unwrap();
        let settings = Settings {
            loads: Loads::Search {
                arrivals: ArrivalShape::Constant { rate: 1.0 },
                max_concurrency: None,
                search: FindRate { start: 10.0, ..FindRate::default() },
            },
            measured: Extent::Requests(400),
            warm_up: None,
            cool_down: None,
            repeats: 1,
            seed: 1,
            salted: true,
            slo: Some(Slo { limits: vec!["ttft=40ms".parse().unwrap()] }),
            max_in_flight: 10_000,
        };
        let mut records = 0;
        let session = Session {
            target: offline(),
            workload: &workload,
            writer: writer(),
            settings: &settings,
            observer: &mut Silent,
            records: &mut |_| {
                records += 1;
                Ok(())
            },
            stop: CancellationToken::new(),
        };
        let measured = session.run().await.unwrap();
        let search = measured.search.unwrap();
        let (best, worst) = (search.best_rate.unwrap(), search.lowest_rate_that_failed.unwrap());
        assert!((70.0..=84.0).contains(&best) && worst <= best * 1.05, "{search:?}");
        assert_eq!(search.trials.len(), measured.points.len());
        assert!(records > 400 * measured.points.len(), "{records}");
        let slow = &measured.points[0];
        assert_eq!((slow.metrics.failed, slow.repeats[0].warm_up_requests), (0, 40));
        assert!(slow.metrics.request_goodput > Some(9.9), "{:?}", slow.metrics.request_goodput);
    }
}
