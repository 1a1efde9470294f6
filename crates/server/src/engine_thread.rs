//! The one thread that owns the engine. Commands come in over one bounded channel; events go out over
//! one bounded channel per HTTP request.
//!
//! The thread never waits for a client. An event channel has room for every event that its requests
//! can produce (their `max_tokens` bound them), so that sending into it cannot fail for want of room: a
//! slow reader costs the memory of its own answer and nobody else's time. The channels grow as they
//! fill; an unused bound costs nothing.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use servelab_engine::{
    AdmissionError, Engine, EngineSnapshot, Event, FinishReason, Request, RequestId, StepReport, Timestamp,
    TokenId, TokenLogprobs,
};
use servelab_telemetry::{
    EngineSample, FinishedReason, Metrics, RejectionReason, RequestTimings, RequestTrace,
};
use tokio::sync::{mpsc, oneshot};

use crate::admission::Place;
use crate::clock::Clock;
use crate::kv_events::log::{KvLog, Snapshot};
use crate::options::Runner;

/// All that can happen to the engine from outside.
pub enum Command {
    Add(Box<Submission>),
    /// The client is gone, or wants no more.
    Abort(RequestId),
    /// A stop string was found in the choice's text.
    FinishChoice {
        request: RequestId,
        choice: u32,
    },
    /// Answers whether there was anything to forget.
    ResetPrefixCache(oneshot::Sender<bool>),
    Snapshot(oneshot::Sender<EngineReport>),
    /// Records KV events from now on, and answers what the prefix cache holds.
    ListenToKv(oneshot::Sender<Arc<Snapshot>>),
    Stop,
}

/// A request on its way into the engine, with all that belongs to it until it ends.
pub struct Submission {
    pub request: Request,
    pub events: EventSender,
    /// When the HTTP request reached the server; [`Request::arrival`] is when it was tokenised and queued.
    pub arrived: Timestamp,
    /// As in the log and in `x-request-id`.
    pub http_request_id: Arc<str>,
    pub trace: RequestTrace,
    /// The HTTP request has no other prompt.
    pub is_alone: bool,
    pub place: Place,
}

/// One of the requests that an HTTP request consists of sends its events through this.
#[derive(Clone)]
pub struct EventSender {
    /// Position of the prompt in the HTTP request.
    pub part: usize,
    pub sender: mpsc::Sender<(usize, RequestEvent)>,
}

/// What happens to one request, in order. [`Self::most`] bounds how many there are.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestEvent {
    /// The engine will not serve the request. Nothing follows.
    Refused(AdmissionError),
    Accepted,
    /// The first token comes next (or the log-probabilities of the prompt).
    Started {
        cached_tokens: u32,
    },
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    Token {
        choice: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
    /// The last event of a choice.
    Finished {
        choice: u32,
        reason: FinishReason,
    },
}

impl RequestEvent {
    /// Most events of one request: accepted, started, prompt log-probabilities, and per choice its tokens
    /// and its end.
    pub fn most(n: u32, max_tokens: u32) -> usize {
        3 + n as usize * (max_tokens as usize + 1)
    }
}

/// The engine between two steps, for `/state`.
pub struct EngineReport {
    pub snapshot: EngineSnapshot,
    pub stats: servelab_engine::EngineStats,
    pub now: Timestamp,
    /// The HTTP id of every request alive.
    pub http_request_ids: HashMap<RequestId, Arc<str>>,
}

/// Tells from outside whether the engine gets on.
#[derive(Default)]
pub struct Heartbeat {
    /// Milliseconds on the server's clock, plus one, of the last progress; 0 while there is no work.
    progress: AtomicU64,
}

impl Heartbeat {
    fn idle(&self) {
        self.progress.store(0, Ordering::Relaxed);
    }

    fn progressed(&self, now: Timestamp) {
        self.progress.store(now.as_millis() as u64 + 1, Ordering::Relaxed);
    }

    /// How long there has been work and no step ended; zero while there is none.
    pub fn stalled_for(&self, now: Timestamp) -> Duration {
        match self.progress.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => now.saturating_sub(Duration::from_millis(since - 1)),
        }
    }
}

/// Why the thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEnd {
    /// It was told to, or nobody could send commands any more.
    Stopped,
    /// The runner can compute no more.
    Failed(String),
}

/// The engine and what the thread knows about its requests.
pub struct EngineThread {
    engine: Engine<Runner>,
    commands: mpsc::Receiver<Command>,
    live: HashMap<RequestId, Live>,
    metrics: Arc<Metrics>,
    heartbeat: Arc<Heartbeat>,
    clock: Clock,
    kv: Arc<KvLog>,
}

/// A request that the engine serves.
struct Live {
    events: EventSender,
    timings: RequestTimings,
    started: bool,
    open_choices: u32,
    /// The worst reason for which a choice ended.
    reason: FinishedReason,
    http_request_id: Arc<str>,
    trace: RequestTrace,
    _place: Place,
}

/// Whether the thread goes on.
enum Next {
    Continue,
    End(EngineEnd),
}

impl EngineThread {
    pub fn new(
        engine: Engine<Runner>,
        commands: mpsc::Receiver<Command>,
        metrics: Arc<Metrics>,
        heartbeat: Arc<Heartbeat>,
        clock: Clock,
        kv: Arc<KvLog>,
    ) -> Self {
        Self { engine, commands, live: HashMap::new(), metrics, heartbeat, clock, kv }
    }

    /// Serves until it is told to stop or the runner is lost. Requests alive then end with an error.
    pub fn run(mut self) -> EngineEnd {
        loop {
            let next = match self.commands_first() {
                Next::Continue => self.step(),
                end => end,
            };
            if let Next::End(end) = next {
                self.heartbeat.idle();
                self.kv.close();
                return end;
            }
        }
    }

    /// Handles what has come in; waits for a command if there is nothing to compute.
    fn commands_first(&mut self) -> Next {
        // Bounded, so that commands that keep coming do not hold up the requests inside.
        for _ in 0..self.commands.max_capacity() {
            let command = if self.engine.has_work() {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => return Next::End(EngineEnd::Stopped),
                }
            } else {
                self.heartbeat.idle();
                self.publish();
                match self.commands.blocking_recv() {
                    Some(command) => command,
                    None => return Next::End(EngineEnd::Stopped),
                }
            };
            if let Next::End(end) = self.obey(command) {
                return Next::End(end);
            }
        }
        Next::Continue
    }

    fn obey(&mut self, command: Command) -> Next {
        match command {
            Command::Add(submission) => self.add(*submission),
            Command::Abort(request) => {
                self.engine.abort(request);
                if let Some(mut live) = self.live.remove(&request) {
                    live.reason = FinishedReason::Abort;
                    live.finish(self.clock.now());
                }
            }
            Command::FinishChoice { request, choice } => {
                // False if it has ended by itself meanwhile.
                let _ = self.engine.finish_choice(request, choice);
            }
            // Whoever asked may be gone by now.
            Command::ResetPrefixCache(answer) => {
                let forgot = self.engine.reset_prefix_cache();
                self.tell_kv();
                let _ = answer.send(forgot);
            }
            Command::Snapshot(answer) => {
                let _ = answer.send(self.report());
            }
            Command::ListenToKv(answer) => {
                self.tell_kv();
                self.engine.listen_to_kv(true);
                let _ = answer.send(self.kv.snapshot_taken(self.engine.kv_blocks()));
            }
            Command::Stop => return Next::End(EngineEnd::Stopped),
        }
        Next::Continue
    }

    fn add(&mut self, submission: Submission) {
        let Submission { request, events, arrived, http_request_id, trace, is_alone, place } = submission;
        let (id, open_choices) = (request.id, request.n);
        let (queued, prompt_tokens) = (request.arrival, request.prompt.len() as u32);
        if let Err(error) = self.engine.add(request) {
            self.metrics.admission_rejections.of(rejection(&error)).inc();
            events.send(RequestEvent::Refused(error));
            return;
        }
        if !self.heartbeat_runs() {
            self.heartbeat.progressed(self.clock.now());
        }
        events.send(RequestEvent::Accepted);
        let timings = RequestTimings::new(self.metrics.clone(), arrived, queued, prompt_tokens, open_choices)
            .traced(trace.clone(), is_alone);
        let live = Live {
            events,
            timings,
            started: false,
            open_choices,
            reason: FinishedReason::Stop,
            http_request_id,
            trace,
            _place: place,
        };
        self.live.insert(id, live);
    }

    fn heartbeat_runs(&self) -> bool {
        self.heartbeat.progress.load(Ordering::Relaxed) != 0
    }

    fn step(&mut self) -> Next {
        if !self.engine.has_work() {
            return Next::Continue;
        }
        let now = self.clock.now();
        // A panic in the runner leaves the engine in an unknown state: it ends like a lost device.
        let report = match catch_unwind(AssertUnwindSafe(|| self.engine.step(now))) {
            Ok(report) => report,
            Err(_) => return Next::End(EngineEnd::Failed("the engine panicked in a step".into())),
        };
        self.apply(report, now)
    }

    /// `began` is when the step was planned: a request that it took in was scheduled then, and not when its first chunk
    /// had been computed.
    fn apply(&mut self, report: StepReport, began: Timestamp) -> Next {
        let now = self.clock.now();
        let progress = report.sequences > 0 || !report.events.is_empty();
        if let Some(error) = &report.error {
            tracing::error!(%error, "a step failed");
        }
        for event in report.events {
            let at = if matches!(event, Event::Scheduled { .. }) { began } else { now };
            self.deliver(event, at);
        }
        self.metrics.observe_step(report.prefill_tokens + report.decode_tokens);
        self.tell_kv();
        self.publish();
        if progress {
            self.heartbeat.progressed(now);
        } else {
            // Work and no step: cannot be. The health check will tell; meanwhile do not burn a core.
            std::thread::sleep(Duration::from_millis(1));
        }
        match report.fatal {
            Some(error) => Next::End(EngineEnd::Failed(error.to_string())),
            None => Next::Continue,
        }
    }

    fn deliver(&mut self, event: Event, now: Timestamp) {
        let id = event.request();
        let Some(live) = self.live.get_mut(&id) else { return };
        match event {
            Event::Scheduled { cached_tokens, .. } => live.scheduled(now, cached_tokens),
            Event::PromptLogprobs { logprobs, .. } => {
                live.events.send(RequestEvent::PromptLogprobs(logprobs))
            }
            Event::Token { choice, token, logprobs, .. } => {
                live.timings.token(now, choice);
                live.events.send(RequestEvent::Token { choice, token, logprobs });
            }
            Event::Preempted { .. } => live.timings.preempted(now),
            Event::Finished { choice, reason, .. } => {
                live.reason = live.reason.max(finished_reason(&reason));
                live.open_choices = live.open_choices.saturating_sub(1);
                live.events.send(RequestEvent::Finished { choice, reason });
            }
        }
        if live.open_choices == 0
            && let Some(ended) = self.live.remove(&id)
        {
            ended.finish(now);
        }
    }

    fn publish(&self) {
        let stats = self.engine.stats();
        self.metrics.observe_engine(&EngineSample {
            running: stats.running,
            waiting: stats.waiting,
            blocks_held: stats.blocks_held,
            blocks_total: stats.blocks_total,
            prefix_query_tokens: stats.prefix_query_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            preemptions: stats.preemptions,
        });
    }

    /// Passes on what the prefix cache has gained and lost, if somebody listens.
    fn tell_kv(&mut self) {
        let events = self.engine.take_kv_events();
        if !events.is_empty() && !self.kv.push(events, self.clock.unix_seconds()) {
            self.engine.listen_to_kv(false);
        }
    }

    fn report(&self) -> EngineReport {
        EngineReport {
            snapshot: self.engine.snapshot(),
            stats: self.engine.stats(),
            now: self.clock.now(),
            http_request_ids: self
                .live
                .iter()
                .map(|(id, live)| (*id, live.http_request_id.clone()))
                .collect(),
        }
    }
}

impl Live {
    fn finish(self, now: Timestamp) {
        let (request_id, trace_id) = (&*self.http_request_id, self.trace.id());
        tracing::debug!(request_id, trace_id, reason = ?self.reason, "request ended");
        self.timings.finish(now, self.reason);
    }

    fn scheduled(&mut self, now: Timestamp, cached_tokens: u32) {
        self.timings.scheduled(now, cached_tokens);
        if !self.started {
            self.started = true;
            self.events.send(RequestEvent::Started { cached_tokens });
        }
    }
}

impl EventSender {
    /// Never waits. The receiver may be gone; then its guard has sent, or is about to send, an abort.
    fn send(&self, event: RequestEvent) {
        if let Err(mpsc::error::TrySendError::Full((part, event))) = self.sender.try_send((self.part, event))
        {
            // The bound is the number of events that can come: see RequestEvent::most.
            tracing::error!(part, ?event, "an event channel was full; the event is lost");
        }
    }
}

fn finished_reason(reason: &FinishReason) -> FinishedReason {
    match reason {
        FinishReason::Stop(_) => FinishedReason::Stop,
        FinishReason::Length => FinishedReason::Length,
        FinishReason::Abort => FinishedReason::Abort,
        FinishReason::Error(_) => FinishedReason::Error,
    }
}

fn rejection(error: &AdmissionError) -> RejectionReason {
    match error {
        AdmissionError::EmptyPrompt | AdmissionError::Zero { .. } => RejectionReason::EmptyPrompt,
        AdmissionError::TooManyChoices { .. } => RejectionReason::TooManyChoices,
        AdmissionError::ContextLength { .. } => RejectionReason::ContextLength,
        AdmissionError::NeverFits { .. } => RejectionReason::NeverFits,
        AdmissionError::QueueFull { .. } | AdmissionError::DuplicateId(_) => RejectionReason::QueueFull,
    }
}
