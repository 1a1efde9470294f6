//! One run: a workload at a rate, routed by a policy over replicas in virtual time.
//!
//! The router is the real one: its index is approximate (it knows what it sent where), its loads are modelled from its
//! own dispatches and corrected by a scrape a second, its rates are learnt from the same scrapes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::prompt::{Content, Job, Pool, Writer};
use servelab_bench::result::Endpoint;
use servelab_bench::stats;
use servelab_engine::{TokenId, hash_blocks};
use servelab_router::choice::fleet::{Fleet, FleetOptions, Prompt};
use servelab_router::choice::index::Matches;
use servelab_router::choice::load::Dispatch;
use servelab_router::choice::policy::Policy;
use servelab_router::choice::rates::Pace;
use servelab_router::choice::replica_set::{ReplicaId, ReplicaSet};

use super::bounds::Seen;
use super::replica::{Happened, Replica, ReplicaKind, answer_token};
use super::scenario::Scenario;

/// How often the router reads the replicas' metrics.
const SCRAPE: Duration = Duration::from_secs(1);
/// Share of the requests that fill the caches before anything is counted.
const WARM_UP: f64 = 0.3;

/// Who routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    Policy(Policy),
    /// The policy `cost` that looks into every cache instead of guessing.
    Oracle,
}

impl Arm {
    pub fn all() -> impl Iterator<Item = Self> {
        Policy::ALL.into_iter().map(Self::Policy).chain([Self::Oracle])
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Policy(policy) => policy.name(),
            Self::Oracle => "oracle",
        }
    }
}

/// What one run gave.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests a second that came while it was measured.
    pub offered: f64,
    /// Of these, how many kept the limits on TTFT and TPOT.
    pub goodput: f64,
    /// Share of the prompt tokens that the caches had.
    pub hit_rate: f64,
    /// Share that the router thought they had.
    pub predicted_hit_rate: f64,
    pub ttft_p50_seconds: f64,
    pub ttft_p99_seconds: f64,
    pub tpot_p50_seconds: f64,
    /// The busiest replica's time at work over the mean.
    pub imbalance: f64,
    pub preemptions: u64,
    pub requests: u64,
}

/// A conversation and how far it is.
struct Conversation {
    job: Job,
    turn: usize,
    history: Vec<TokenId>,
}

struct Active {
    conversation: usize,
    replica: ReplicaId,
    dispatch: Dispatch,
    arrived: Duration,
    first_token: Option<Duration>,
    last_token: Duration,
    tokens: u32,
    measured: bool,
}

enum Event {
    /// The next turn of a conversation is sent.
    Send(usize),
    StepEnd(ReplicaId),
    Scrape,
}

/// Ordered by time, then by the order of making.
struct Queued(Duration, u64, Event);

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

#[derive(Default)]
struct Measured {
    ttft: Vec<f64>,
    tpot: Vec<f64>,
    good: u64,
    tokens: u64,
    hit_tokens: u64,
    predicted_tokens: u64,
    first_arrival: Option<Duration>,
    last_arrival: Duration,
}

pub struct Run<'a> {
    scenario: &'a Scenario,
    arm: Arm,
    writer: Writer,
    fleet: Fleet,
    all: ReplicaSet,
    replicas: Vec<Replica>,
    /// What each replica's step under way brings about at its end.
    pending: Vec<Vec<(u64, Happened)>>,
    conversations: Vec<Conversation>,
    active: BTreeMap<u64, Active>,
    queue: BinaryHeap<Reverse<Queued>>,
    queued: u64,
    next_request: u64,
    warm_up: u64,
    measured: Measured,
    pub seen: Vec<Seen>,
}

impl<'a> Run<'a> {
    pub fn new(
        scenario: &'a Scenario,
        arm: Arm,
        rate: f64,
        kind: &ReplicaKind,
        count: u8,
        seed: u64,
    ) -> Self {
        let policy = match arm {
            Arm::Policy(policy) => policy,
            Arm::Oracle => Policy::Cost,
        };
        let mut fleet = Fleet::new(FleetOptions {
            policy,
            seed,
            index_bytes: 256 << 20,
            block_size: kind.engine.block_size,
            prior: Pace::default(),
        });
        let capacity = u64::from(kind.engine.num_blocks) * u64::from(kind.engine.block_size);
        let mut all = ReplicaSet::EMPTY;
        for at in 0..count {
            let replica = fleet.add(servelab_bench::prompt::mix(at.into())).expect("there is room");
            fleet.set_capacity(replica, capacity);
            all.insert(replica);
        }
        let jobs = scenario.jobs(seed);
        let turns: usize = jobs.iter().map(|job| job.turns.len()).sum();
        let conversations: Vec<Conversation> =
            jobs.into_iter().map(|job| Conversation { job, turn: 0, history: Vec::new() }).collect();
        let mut run = Self {
            scenario,
            arm,
            writer: writer(seed),
            fleet,
            all,
            replicas: (0..count).map(|_| Replica::new(kind)).collect(),
            pending: (0..count).map(|_| Vec::new()).collect(),
            active: BTreeMap::new(),
            queue: BinaryHeap::new(),
            queued: 0,
            next_request: 0,
            warm_up: (turns as f64 * WARM_UP) as u64,
            measured: Measured::default(),
            seen: Vec::new(),
            conversations,
        };
        let times = ArrivalShape::poisson(rate).times(seed);
        let sent: Vec<_> = (0..run.conversations.len()).zip(times).collect();
        sent.into_iter().for_each(|(at, time)| run.push(time, Event::Send(at)));
        run.push(SCRAPE, Event::Scrape);
        run
    }

    /// Runs until every request has ended.
    pub fn finish(&mut self) -> Outcome {
        while let Some(Reverse(Queued(now, _, event))) = self.queue.pop() {
            match event {
                Event::Send(conversation) => self.send(now, conversation),
                Event::StepEnd(replica) => self.step_ended(now, replica),
                Event::Scrape => self.scrape(now),
            }
        }
        self.outcome()
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.queued += 1;
        self.queue.push(Reverse(Queued(at, self.queued, event)));
    }

    fn send(&mut self, now: Duration, at: usize) {
        let conversation = &mut self.conversations[at];
        let turn = &conversation.job.turns[conversation.turn];
        if let Content::Random(segments) = &turn.content {
            conversation.history.extend(self.writer.ids(segments));
        }
        let (tokens, output_tokens) = (conversation.history.clone(), turn.output_tokens);
        let is_session = conversation.job.turns.len() > 1;
        let prompt = Prompt {
            tokens: tokens.len() as u32,
            chain: hash_blocks(&tokens, self.fleet.block_size() as usize, 0),
            is_exact: true,
            session: is_session.then(|| servelab_bench::prompt::mix(at as u64)),
            sequences: 1,
            output_tokens,
            ..Prompt::default()
        };
        let number = self.next_request;
        self.next_request += 1;
        let measured = number >= self.warm_up;
        let (replica, matched) = self.decide(now, &prompt, &tokens);
        let dispatch = self.fleet.dispatch(replica, &prompt, matched).expect("the replica is there");
        if measured {
            self.measured.tokens += u64::from(prompt.tokens);
            self.measured.predicted_tokens += u64::from(matched);
            self.measured.first_arrival.get_or_insert(now);
            self.measured.last_arrival = now;
        }
        self.seen.push(Seen { tokens: prompt.tokens.into(), chain: prompt.chain, measured });
        let active = Active {
            conversation: at,
            replica,
            dispatch,
            arrived: now,
            first_token: None,
            last_token: now,
            tokens: 0,
            measured,
        };
        self.active.insert(number, active);
        self.replicas[usize::from(replica.0)].add(now, number, &tokens, output_tokens);
        self.begin_step(now, replica);
    }

    fn decide(&mut self, now: Duration, prompt: &Prompt, tokens: &[TokenId]) -> (ReplicaId, u32) {
        let decision = match self.arm {
            Arm::Policy(_) => self.fleet.decide(now, prompt, &self.all),
            Arm::Oracle => {
                let mut matches = Matches::default();
                for replica in self.all.iter() {
                    let cached = self.replicas[usize::from(replica.0)].cached_tokens(tokens);
                    matches.set(replica, cached / self.fleet.block_size());
                }
                self.fleet.decide_with(now, prompt, &self.all, &matches)
            }
        };
        let decision = decision.expect("all are eligible");
        let matched = decision.terms().map_or(0, |terms| terms.matched_tokens);
        (decision.replica, matched)
    }

    /// Unless a step is under way there, or there is nothing to do.
    fn begin_step(&mut self, now: Duration, replica: ReplicaId) {
        let place = usize::from(replica.0);
        if self.replicas[place].busy_until.is_some() || !self.replicas[place].has_work() {
            return;
        }
        let (end, happened) = self.replicas[place].step(now);
        self.pending[place] = happened;
        self.push(end, Event::StepEnd(replica));
    }

    fn step_ended(&mut self, now: Duration, replica: ReplicaId) {
        let place = usize::from(replica.0);
        self.replicas[place].busy_until = None;
        for (number, happened) in std::mem::take(&mut self.pending[place]) {
            self.happened(now, number, happened);
        }
        self.begin_step(now, replica);
    }

    fn happened(&mut self, now: Duration, number: u64, happened: Happened) {
        let Some(active) = self.active.get_mut(&number) else { return };
        match happened {
            Happened::Scheduled { cached_tokens } => {
                if active.measured {
                    self.measured.hit_tokens += u64::from(cached_tokens);
                }
            }
            Happened::Token => {
                active.last_token = now;
                active.tokens += 1;
                if active.first_token.is_none() {
                    active.first_token = Some(now);
                    active.dispatch.first_token();
                    let seconds = (now - active.arrived).as_secs_f64();
                    self.fleet.answered(active.replica, now, seconds);
                }
                let conversation = &mut self.conversations[active.conversation];
                conversation.history.push(answer_token(number, active.tokens - 1));
            }
            Happened::Preempted => {}
            Happened::Ended => self.ended(now, number),
        }
    }

    fn ended(&mut self, now: Duration, number: u64) {
        let Some(active) = self.active.remove(&number) else { return };
        self.fleet.completed(active.tokens, 1);
        if active.measured {
            let first_token = active.first_token.unwrap_or(now);
            let ttft = (first_token - active.arrived).as_secs_f64();
            let gaps = active.tokens.saturating_sub(1);
            let decode = (active.last_token - first_token).as_secs_f64();
            let tpot = if gaps == 0 { 0.0 } else { decode / f64::from(gaps) };
            self.measured.ttft.push(ttft);
            self.measured.tpot.push(tpot);
            let good = ttft <= self.scenario.ttft_seconds && tpot <= self.scenario.tpot_seconds;
            self.measured.good += u64::from(good);
        }
        let conversation = &mut self.conversations[active.conversation];
        conversation.turn += 1;
        if let Some(turn) = conversation.job.turns.get(conversation.turn) {
            let at = now + turn.think;
            self.push(at, Event::Send(active.conversation));
        } else {
            conversation.history = Vec::new();
        }
    }

    fn scrape(&mut self, now: Duration) {
        for replica in self.all.iter() {
            let (report, counters) = self.replicas[usize::from(replica.0)].scrape(now);
            self.fleet.report(replica, Some(report));
            self.fleet.observe(replica, counters);
        }
        if !self.queue.is_empty() {
            self.push(now + SCRAPE, Event::Scrape);
        }
    }

    fn outcome(&mut self) -> Outcome {
        let measured = &mut self.measured;
        let span = measured.last_arrival.saturating_sub(measured.first_arrival.unwrap_or_default());
        let (ttft, tpot) = (&mut measured.ttft, &mut measured.tpot);
        ttft.sort_unstable_by(f64::total_cmp);
        tpot.sort_unstable_by(f64::total_cmp);
        let busy: Vec<f64> = self.replicas.iter().map(|replica| replica.busy_seconds).collect();
        let tokens = (measured.tokens as f64).max(1.0);
        Outcome {
            offered: ttft.len() as f64 / span.as_secs_f64(),
            goodput: measured.good as f64 / span.as_secs_f64(),
            hit_rate: measured.hit_tokens as f64 / tokens,
            predicted_hit_rate: measured.predicted_tokens as f64 / tokens,
            ttft_p50_seconds: stats::percentile(ttft, 50.0),
            ttft_p99_seconds: stats::percentile(ttft, 99.0),
            tpot_p50_seconds: stats::percentile(tpot, 50.0),
            imbalance: busy.iter().copied().fold(0.0, f64::max) / stats::mean(&busy),
            preemptions: self.replicas.iter().map(Replica::preemptions).sum(),
            requests: ttft.len() as u64,
        }
    }
}

/// Turns stretches of streams into token ids.
fn writer(seed: u64) -> Writer {
    Writer {
        endpoint: Endpoint::Completions,
        model: String::new(),
        pool: Pool::Ids((0..100_000).collect()),
        key: servelab_bench::prompt::key(seed, 0),
        salt_text: None,
        ignore_eos: true,
        temperature: None,
        extra_body: serde_json::Map::new(),
    }
}
