//! The real engine, around a device whose steps take what the cost model says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{
    ConfigError, Engine, Event, ModelRunner, Request, RequestId, RowOutput, RunnerError, SamplingParams,
    Step, StepOutput, StepReport, StopConditions, TokenId, Want,
};
use servelab_sim::{CostModel, SequenceWork};

use super::{Ask, Gauges, Happened, Note, ReplicaKind, answer_token};
use crate::counters::{Counters, Times, nanos};

/// Answers at once with tokens that depend on nothing but the request, and says how long the step takes.
struct Device {
    cost: CostModel,
    step_seconds: f64,
}

impl ModelRunner for Device {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.step_seconds = self.cost.step_seconds(SequenceWork::of(step));
        Ok(StepOutput { rows: step.rows.iter().map(|row| answer(&row.want)).collect() })
    }
}

fn answer(want: &Want) -> RowOutput {
    let token: TokenId = match want {
        Want::Sample(draw) => answer_token(draw.sampling.seed, draw.output_index),
        Want::Score { target, .. } => *target,
    };
    RowOutput { token, logprobs: None }
}

/// What is remembered of a request, for the counters.
struct Live {
    arrived: Duration,
    scheduled: Duration,
    /// Time of the last token, once there is one.
    last_token: Option<Duration>,
    prompt_tokens: u32,
    cached_tokens: Option<u32>,
}

pub struct Stepped {
    engine: Engine<Device>,
    counters: Counters,
    live: BTreeMap<RequestId, Live>,
    /// The step under way: its beginning, its end, and what it brings about.
    under_way: Option<(Duration, Duration, StepReport)>,
    /// Requests are taken in when the step under way has ended, as the engine's thread does.
    inbox: Vec<Request>,
}

impl Stepped {
    pub fn new(kind: &ReplicaKind) -> Result<Self, ConfigError> {
        let device = Device { cost: kind.cost.clone(), step_seconds: 0.0 };
        Ok(Self {
            engine: Engine::new(kind.engine.clone(), device)?,
            counters: Counters::default(),
            live: BTreeMap::new(),
            under_way: None,
            inbox: Vec::new(),
        })
    }

    pub fn add(&mut self, now: Duration, ask: &Ask) -> bool {
        let waiting = self.gauges().waiting;
        if waiting >= self.engine.config().max_waiting {
            return false;
        }
        let sampling = SamplingParams { seed: ask.answer_key, ..SamplingParams::greedy() };
        self.inbox.push(Request {
            id: RequestId(ask.number),
            prompt: ask.prompt.clone(),
            n: 1,
            sampling: Arc::new(sampling),
            stop: StopConditions {
                max_tokens: ask.output_tokens,
                min_tokens: 0,
                stop_token_ids: Arc::default(),
            },
            priority: 0,
            cache_salt: 0,
            arrival: now,
        });
        let (prompt_tokens, cached_tokens) = (ask.prompt_tokens(), None);
        let live = Live { arrived: now, scheduled: now, last_token: None, prompt_tokens, cached_tokens };
        self.live.insert(RequestId(ask.number), live);
        if self.under_way.is_none() {
            self.begin(now);
        }
        true
    }

    pub fn next(&self) -> Option<Duration> {
        self.under_way.as_ref().map(|(_, end, _)| *end)
    }

    pub fn advance(&mut self, now: Duration, notes: &mut Vec<Note>) {
        while let Some((start, end, report)) = self.under_way.take() {
            if end > now {
                self.under_way = Some((start, end, report));
                return;
            }
            self.counters.busy_nanos += nanos(end - start);
            report.events.iter().for_each(|event| self.happened(event, start, end, notes));
            self.begin(end);
        }
    }

    fn begin(&mut self, now: Duration) {
        for request in self.inbox.drain(..) {
            // What can never fit was refused by the fleet, and the queue was looked at.
            let _ = self.engine.add(request);
        }
        if self.engine.has_work() {
            self.engine.runner_mut().step_seconds = 0.0;
            let report = self.engine.step(now);
            let end = now + Duration::from_secs_f64(self.engine.runner().step_seconds);
            self.under_way = Some((now, end, report));
        }
    }

    fn happened(&mut self, event: &Event, start: Duration, end: Duration, notes: &mut Vec<Note>) {
        let id = event.request();
        let Some(live) = self.live.get_mut(&id) else { return };
        let at = if matches!(event, Event::Scheduled { .. } | Event::Preempted { .. }) { start } else { end };
        let happened = match event {
            Event::Scheduled { cached_tokens, .. } => {
                if live.last_token.is_none() {
                    live.scheduled = start;
                }
                if live.cached_tokens.is_some() {
                    return;
                }
                live.cached_tokens = Some(*cached_tokens);
                Happened::Scheduled { cached_tokens: *cached_tokens }
            }
            Event::Token { .. } => {
                self.counters.generated_tokens += 1;
                match live.last_token.replace(end) {
                    Some(last) => {
                        self.counters.inter_token_latency.observe(end - last, 1);
                        return;
                    }
                    None => self.counters.first_token(end, times(live)),
                }
                Happened::FirstToken
            }
            Event::Finished { .. } => {
                self.counters.ended(end, live.arrived);
                self.live.remove(&id);
                Happened::Ended
            }
            Event::Preempted { .. } => Happened::Preempted,
            Event::PromptLogprobs { .. } => return,
        };
        notes.push(Note { at, request: id.0, happened });
    }

    pub fn gauges(&self) -> Gauges {
        let stats = self.engine.stats();
        Gauges {
            running: stats.running,
            waiting: stats.waiting + self.inbox.len() as u32,
            kv_usage: f64::from(stats.blocks_held) / f64::from(stats.blocks_total),
            preemptions: stats.preemptions,
        }
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    pub fn cached_tokens(&self, ask: &Ask) -> u32 {
        self.engine.cached_tokens(&ask.prompt, 0) as u32
    }

    pub fn check_integrity(&self) -> Result<(), String> {
        self.engine.check_integrity()
    }
}

fn times(live: &Live) -> Times {
    let Live { arrived, scheduled, prompt_tokens, .. } = *live;
    Times { arrived, scheduled, prompt_tokens, cached_tokens: live.cached_tokens.unwrap_or(0) }
}
