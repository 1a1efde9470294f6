//! One repeat over HTTP: sends what the workload asks for when the load says so, and keeps a record of each
//! request.
//!
//! Requests are written ahead of time on a thread of their own, so that the thread that measures only sends, reads
//! and looks at the clock. An open loop never waits for an answer: a request that is due is sent, or, with too many
//! in flight, counted as a failure.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::arrivals::ArrivalShape;
use crate::client::{Client, Failure, Observed, Outgoing, ReadStats, Timer};
use crate::clock::Clock;
use crate::live::{Live, LiveView};
use crate::phases::{PhasePlan, Phases};
use crate::prompt::{Job, Writer};
use crate::result::{FailureClass, Outcome, Phase, RequestRecord};

/// Gaps between tokens that are kept, over all requests of a repeat: 256 MiB.
pub const MAX_GAPS: u64 = 64 << 20;
/// Requests that are written ahead, at most; each may hold a whole context.
const MAX_AHEAD: usize = 1024;
const MIN_AHEAD: usize = 64;
/// A client of a closed loop whose request failed waits that long, so that a server that is down does not make it
/// spin.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// How requests arrive.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadShape {
    Closed {
        concurrency: u32,
        think_time: Duration,
    },
    Open {
        arrivals: ArrivalShape,
        /// Later requests wait in the client until fewer are in flight.
        max_concurrency: Option<u32>,
    },
}

/// One repeat.
#[derive(Clone, Debug)]
pub struct RunPlan {
    pub shape: LoadShape,
    pub phases: PhasePlan,
    /// Open loop: more in flight is a failure.
    pub max_in_flight: u32,
    /// Of the arrivals.
    pub seed: u64,
}

/// What a repeat leaves.
#[derive(Debug)]
pub struct RunLog {
    /// In the order in which the requests ended.
    pub records: Vec<RequestRecord>,
    pub live: LiveView,
    /// Absent offline.
    pub reads: Option<ReadStats>,
    /// Ended early from outside.
    pub interrupted: bool,
    /// The clock of the records, for those who want to compare with their own.
    pub clock: Clock,
}

/// A job whose first request is written.
struct Prepared {
    number: u64,
    job: Job,
    first: Outgoing,
}

/// When a request is to be sent.
#[derive(Clone, Copy, Debug)]
enum Due {
    At(Duration),
    /// A client that does not think sends as soon as it can: no clock says when, and its request cannot be late.
    WhenReady,
}

impl Due {
    fn after(now: Duration, think_time: Duration) -> Self {
        if think_time.is_zero() { Self::WhenReady } else { Self::At(now + think_time) }
    }
}

/// A request's number and phase.
type Ticket = (u64, Phase);

/// What all tasks of a repeat share.
struct Shared {
    client: Client,
    writer: Arc<Writer>,
    live: Arc<Live>,
    phases: Mutex<Phases>,
    records: Mutex<Vec<RequestRecord>>,
    gaps: AtomicU64,
    in_flight: AtomicU32,
    /// What is under way is to be given up.
    over: CancellationToken,
}

/// Runs one repeat. `client` says which server; its connections are not used, every repeat opens its own.
/// `stop` ends it early. Must be called on a runtime with timers and IO; a single-threaded one disturbs least.
pub async fn run(
    client: &Client,
    writer: Arc<Writer>,
    jobs: Box<dyn Iterator<Item = Job> + Send>,
    plan: &RunPlan,
    live: Arc<Live>,
    stop: CancellationToken,
) -> RunLog {
    let mut queue = write_ahead(writer.clone(), jobs, &plan.shape).await;
    let shared = Arc::new(Shared {
        client: client.restarted(),
        writer,
        live,
        phases: Mutex::new(Phases::new(plan.phases)),
        records: Mutex::default(),
        gaps: AtomicU64::new(0),
        in_flight: AtomicU32::new(0),
        over: CancellationToken::new(),
    });
    let ended = {
        let load = async {
            match &plan.shape {
                LoadShape::Closed { concurrency, think_time } => {
                    closed_loop(&shared, queue, *concurrency, *think_time).await;
                }
                LoadShape::Open { arrivals, max_concurrency } => {
                    let times = arrivals.times(plan.seed);
                    open_loop(&shared, &mut queue, times, *max_concurrency, plan.max_in_flight).await;
                }
            }
        };
        tokio::pin!(load);
        tokio::select! {
            () = &mut load => true,
            () = stop.cancelled() => {
                shared.lock_phases().close();
                shared.over.cancel();
                load.await;
                false
            }
        }
    };
    let records = std::mem::take(&mut *shared.lock_records());
    RunLog {
        records,
        live: shared.live.view(),
        reads: Some(shared.client.read_stats()),
        interrupted: !ended,
        clock: shared.client.clock(),
    }
}

/// Starts the thread that writes requests, and returns when as many are ready as are kept ahead.
async fn write_ahead(
    writer: Arc<Writer>,
    jobs: Box<dyn Iterator<Item = Job> + Send>,
    shape: &LoadShape,
) -> mpsc::Receiver<Prepared> {
    let ahead = match shape {
        LoadShape::Closed { concurrency, .. } => *concurrency as usize,
        LoadShape::Open { .. } => MIN_AHEAD,
    };
    let ahead = ahead.clamp(MIN_AHEAD, MAX_AHEAD);
    let (sender, receiver) = mpsc::channel(ahead);
    let (ready, is_ready) = oneshot::channel::<()>();
    let mut ready = Some(ready);
    std::thread::spawn(move || {
        for (number, job) in jobs.enumerate() {
            if number == ahead {
                drop(ready.take());
            }
            let first = writer.write(&job.turns[..job.turns.len().min(1)], &[]);
            let first = Outgoing { keep_text: job.turns.len() > 1, ..first };
            // Fails once the run is over.
            if sender.blocking_send(Prepared { number: number as u64, job, first }).is_err() {
                return;
            }
        }
    });
    // The sender is dropped when that many are written, or all there are.
    let _ = is_ready.await;
    receiver
}

async fn closed_loop(
    shared: &Arc<Shared>,
    queue: mpsc::Receiver<Prepared>,
    concurrency: u32,
    think_time: Duration,
) {
    let queue = Arc::new(tokio::sync::Mutex::new(queue));
    let mut clients = JoinSet::new();
    for _ in 0..concurrency {
        let (shared, queue) = (shared.clone(), queue.clone());
        clients.spawn(async move {
            let (mut timer, mut due) = (Timer::default(), Due::WhenReady);
            while let Some(prepared) = take(&shared, &queue).await {
                let Some(pause) = shared.converse(prepared, due, None, &mut timer, None).await else {
                    return;
                };
                due = Due::after(shared.client.clock().now(), think_time.max(pause));
            }
        });
    }
    while clients.join_next().await.is_some() {}
}

/// The next job; `None` if there is none or the run is over.
async fn take(shared: &Shared, queue: &tokio::sync::Mutex<mpsc::Receiver<Prepared>>) -> Option<Prepared> {
    let next = async { queue.lock().await.recv().await };
    let prepared = tokio::select! {
        prepared = next => prepared,
        () = shared.over.cancelled() => return None,
    };
    if prepared.is_none() {
        shared.close();
    }
    prepared
}

async fn open_loop(
    shared: &Arc<Shared>,
    queue: &mut mpsc::Receiver<Prepared>,
    times: Box<dyn Iterator<Item = Duration> + Send>,
    max_concurrency: Option<u32>,
    max_in_flight: u32,
) {
    let places = max_concurrency.map(|places| Arc::new(Semaphore::new(places as usize)));
    let mut timer = Timer::default();
    let mut requests = JoinSet::new();
    for scheduled in times {
        let prepared = async {
            timer.until(shared.client.clock().instant(scheduled)).await;
            queue.recv().await
        };
        let prepared = tokio::select! {
            prepared = prepared => prepared,
            () = shared.over.cancelled() => None,
        };
        let Some(prepared) = prepared else { break };
        // Taken here, in the order of the schedule, and not when the request's own task comes to it.
        let ticket = shared.lock_phases().next(scheduled);
        let Some(ticket) = ticket else { break };
        if shared.in_flight.load(Ordering::Relaxed) >= max_in_flight {
            shared.refuse(&prepared, ticket, scheduled, max_in_flight);
            continue;
        }
        let (shared, places) = (shared.clone(), places.clone());
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        requests.spawn(async move {
            shared
                .converse(
                    prepared,
                    Due::At(scheduled),
                    Some(ticket),
                    &mut Timer::default(),
                    places.as_deref(),
                )
                .await;
            shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        });
        while requests.try_join_next().is_some() {}
    }
    shared.close();
    while requests.join_next().await.is_some() {}
}

impl Shared {
    fn lock_phases(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_records(&self) -> MutexGuard<'_, Vec<RequestRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No request will be measured any more.
    fn close(&self) {
        let mut phases = self.lock_phases();
        phases.close();
        if phases.is_over() {
            self.over.cancel();
        }
    }

    /// Sends the turns of a job one after the other, the first at `due`. Returns how long the client has to wait
    /// before it begins another one; `None` if the run is over.
    async fn converse(
        &self,
        prepared: Prepared,
        mut due: Due,
        mut ticket: Option<Ticket>,
        timer: &mut Timer,
        places: Option<&Semaphore>,
    ) -> Option<Duration> {
        let Prepared { number, job, first } = prepared;
        let clock = self.client.clock();
        let mut first = Some(first);
        let mut answers = Vec::new();
        for at in 0..job.turns.len() {
            if at > 0 {
                due = Due::after(clock.now(), job.turns[at].think);
            }
            let outgoing = match first.take() {
                Some(outgoing) => outgoing,
                None => {
                    let outgoing = self.writer.write(&job.turns[..=at], &answers);
                    Outgoing { keep_text: at + 1 < job.turns.len(), ..outgoing }
                }
            };
            let scheduled = self.wait(due, timer).await?;
            let (index, phase) = match ticket.take() {
                Some(ticket) => ticket,
                None => self.lock_phases().next(scheduled)?,
            };
            let mut record = blank(index, phase, scheduled);
            record.turn = (job.turns.len() > 1).then_some((number, at as u32));
            record.wanted_input_tokens = job.turns[..=at].iter().map(|turn| turn.content.tokens()).sum();
            record.wanted_output_tokens = outgoing.output_tokens;
            let place = match places {
                None => None,
                Some(places) => tokio::select! {
                    place = places.acquire() => place.ok(),
                    () = self.over.cancelled() => {
                        self.keep(record);
                        return None;
                    }
                },
            };
            if place.is_some() {
                record.due_seconds = clock.now().max(scheduled).as_secs_f64();
            }
            let (outcome, text) = self.request(&outgoing, scheduled, record).await;
            drop(place);
            match outcome {
                Outcome::Completed => answers.push(text),
                Outcome::Failed { .. } => return Some(PAUSE_AFTER_FAILURE),
                Outcome::Cut => return None,
            }
        }
        Some(Duration::ZERO)
    }

    /// Waits until a request is due, and says when that was. `None` if the run is over before.
    async fn wait(&self, due: Due, timer: &mut Timer) -> Option<Duration> {
        let clock = self.client.clock();
        let Due::At(scheduled) = due else { return Some(clock.now()) };
        tokio::select! {
            () = timer.until(clock.instant(scheduled)) => Some(scheduled),
            () = self.over.cancelled() => None,
        }
    }

    /// Sends one request and keeps its record.
    async fn request(
        &self,
        outgoing: &Outgoing,
        scheduled: Duration,
        record: RequestRecord,
    ) -> (Outcome, String) {
        let mut observed = Observed::scheduled(scheduled);
        let clock = self.client.clock();
        self.live.sent(clock.now());
        let outcome = tokio::select! {
            biased;
            outcome = self.client.stream(outgoing, &mut observed, &self.live) => outcome.map_or_else(failed, |()| Outcome::Completed),
            () = self.over.cancelled() => Outcome::Cut,
        };
        let now = clock.now();
        let completed = match &outcome {
            Outcome::Completed => Some(true),
            Outcome::Failed { .. } => Some(false),
            Outcome::Cut => None,
        };
        let end = observed.end.filter(|_| outcome == Outcome::Completed).unwrap_or(now);
        self.live.ended(now, now.saturating_sub(end), completed);
        let text = std::mem::take(&mut observed.text);
        self.keep(fill(RequestRecord { outcome: outcome.clone(), ..record }, observed, end));
        (outcome, text)
    }

    /// Keeps the record of a request that there was no room for.
    fn refuse(&self, prepared: &Prepared, (index, phase): Ticket, scheduled: Duration, max_in_flight: u32) {
        let message = format!("{max_in_flight} requests were in flight; --max-in-flight allows no more");
        let turn = &prepared.job.turns[0];
        self.live.not_sent();
        self.keep(RequestRecord {
            wanted_input_tokens: turn.content.tokens(),
            wanted_output_tokens: turn.output_tokens,
            outcome: failed(Failure::new(FailureClass::MaxInFlight, message)),
            ..blank(index, phase, scheduled)
        });
    }

    /// Keeps a record, and its gaps while there is room for them. The request has ended.
    fn keep(&self, mut record: RequestRecord) {
        let gaps = record.gaps_micros.len() as u64;
        if self.gaps.fetch_add(gaps, Ordering::Relaxed) + gaps > MAX_GAPS {
            record.gaps_micros = Vec::new();
        }
        let phase = record.phase;
        self.lock_records().push(record);
        let mut phases = self.lock_phases();
        phases.ended(phase);
        if phases.is_over() {
            self.over.cancel();
        }
    }
}

fn failed(failure: Failure) -> Outcome {
    Outcome::Failed { class: failure.class, status: failure.status, message: failure.message }
}

/// The record of a request of which nothing is known yet.
pub(crate) fn blank(index: u64, phase: Phase, scheduled: Duration) -> RequestRecord {
    RequestRecord {
        point: 0,
        repeat: 0,
        index,
        phase,
        turn: None,
        scheduled_seconds: scheduled.as_secs_f64(),
        due_seconds: scheduled.as_secs_f64(),
        sent_seconds: None,
        connect_seconds: None,
        started_seconds: None,
        first_byte_seconds: None,
        first_token_seconds: None,
        last_token_seconds: None,
        end_seconds: scheduled.as_secs_f64(),
        gaps_micros: Vec::new(),
        chunks: 0,
        wanted_input_tokens: 0,
        wanted_output_tokens: 0,
        usage: None,
        finish_reason: None,
        trace_id: None,
        outcome: Outcome::Cut,
    }
}

fn fill(record: RequestRecord, observed: Observed, end: Duration) -> RequestRecord {
    let seconds = |at: Option<Duration>| at.map(|at| at.as_secs_f64());
    RequestRecord {
        sent_seconds: seconds(observed.sent),
        connect_seconds: seconds(observed.connect),
        first_byte_seconds: seconds(observed.first_byte),
        first_token_seconds: seconds(observed.first_token),
        last_token_seconds: seconds(observed.last_token),
        end_seconds: end.as_secs_f64(),
        gaps_micros: observed.gaps_micros,
        chunks: observed.deltas,
        usage: observed.usage,
        finish_reason: observed.finish_reason,
        trace_id: observed.trace_id,
        ..record
    }
}
