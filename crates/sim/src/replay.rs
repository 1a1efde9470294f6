//! A load over the real engine in virtual time.
//!
//! It is what a cost model is judged by: what it says of steps becomes what a benchmark would have measured of
//! requests. Prompts share nothing. The same load gives the same figures.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use servelab_engine::{
    ConfigError, Engine, EngineConfig, Event, Request, RequestId, SamplingParams, StopConditions,
};

use crate::cost::CostModel;
use crate::device::{DeviceOptions, SimulatedDevice};
use crate::device_answers::Answers;
use crate::device_chain::mix;
use crate::device_clock::{Pace, VirtualClock};

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub arrivals: Arrivals,
    /// In all; at least the concurrency makes sense.
    pub requests: u32,
    /// The first of them, which are not measured.
    pub warm_up: u32,
    pub input_tokens: Length,
    pub output_tokens: Length,
    /// From the moment at which a request is sent until the engine has it.
    pub request_seconds: f64,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// By so many clients, each of which sends its next one when the last has ended.
    Closed(u32),
    /// So many a second, at random.
    Poisson(f64),
}

/// Tokens of prompts or answers: spread evenly around the mean, with that standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Length {
    pub mean: f64,
    pub std: f64,
}

impl Length {
    /// All alike.
    pub fn exactly(tokens: u32) -> Self {
        Self { mean: f64::from(tokens), std: 0.0 }
    }

    fn draw(self, seed: u64) -> u32 {
        let half_width = 3f64.sqrt() * self.std;
        (self.mean + half_width * (2.0 * unit(seed) - 1.0)).round().clamp(1.0, 1e7) as u32
    }

    fn most(self) -> f64 {
        self.mean + 3f64.sqrt() * self.std + 1.0
    }
}

/// In [0, 1).
fn unit(seed: u64) -> f64 {
    (seed >> 11) as f64 / (1u64 << 53) as f64
}

/// What they measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Until the last request has ended.
    pub duration_seconds: f64,
    /// Of all requests.
    pub output_tokens_per_second: f64,
    /// Means over the measured requests, as `servelab bench` defines them.
    pub ttft_seconds: f64,
    pub tpot_seconds: f64,
    pub preemptions: u64,
}

/// A request from its sending to its end.
struct Life {
    number: u32,
    sent: Duration,
    first: Option<Duration>,
    last: Duration,
    tokens: u32,
}

struct Replay {
    engine: Engine<SimulatedDevice>,
    clock: VirtualClock,
    load: Load,
    sent: u32,
    /// Requests on their way to the engine, by arrival: when each was sent.
    on_the_way: BTreeSet<(Duration, u32, Duration)>,
    alive: BTreeMap<RequestId, Life>,
    measured: f64,
    ttft_seconds: f64,
    tpot_seconds: f64,
    output_tokens: u64,
}

/// Runs the load to its end. The engine takes every request that its pool has room for.
///
/// # Errors
/// If the engine's configuration is impossible.
pub fn replay(
    config: EngineConfig,
    cost: CostModel,
    steps_at_once: usize,
    load: Load,
) -> Result<Measured, ConfigError> {
    let clock = VirtualClock::default();
    let device = SimulatedDevice::new(DeviceOptions {
        num_blocks: config.num_blocks,
        block_size: config.block_size,
        steps_at_once,
        cost,
        pace: Pace::Virtual(clock.clone()),
        lost_after: None,
        answers: Arc::new(Answers::unread()),
    });
    let longest = load.input_tokens.most() + load.output_tokens.most();
    let config = EngineConfig {
        max_waiting: load.requests.max(1),
        max_model_len: config.max_model_len.max(longest as u32),
        prefix_cache: false,
        ..config
    };
    let replay = Replay {
        engine: Engine::new(config, device)?,
        clock,
        load,
        sent: 0,
        on_the_way: BTreeSet::new(),
        alive: BTreeMap::new(),
        measured: 0.0,
        ttft_seconds: 0.0,
        tpot_seconds: 0.0,
        output_tokens: 0,
    };
    Ok(replay.run())
}

impl Replay {
    fn run(mut self) -> Measured {
        match self.load.arrivals {
            Arrivals::Closed(clients) => (0..clients).for_each(|_| self.send(Duration::ZERO)),
            Arrivals::Poisson(rate) => self.send_all(rate),
        }
        loop {
            self.arrive();
            if self.engine.has_work() {
                let report = self.engine.step(self.clock.now());
                report.events.iter().for_each(|event| self.event(event));
            } else if let Some((at, ..)) = self.on_the_way.first() {
                self.clock.advance_to(*at);
            } else {
                return self.figures();
            }
        }
    }

    fn figures(&self) -> Measured {
        let seconds = self.clock.now().as_secs_f64();
        let requests = self.measured.max(1.0);
        Measured {
            duration_seconds: seconds,
            output_tokens_per_second: if seconds > 0.0 { self.output_tokens as f64 / seconds } else { 0.0 },
            ttft_seconds: self.ttft_seconds / requests,
            tpot_seconds: self.tpot_seconds / requests,
            preemptions: self.engine.stats().preemptions,
        }
    }

    fn send(&mut self, at: Duration) {
        if self.sent < self.load.requests {
            let arrival = at + Duration::from_secs_f64(self.load.request_seconds);
            self.on_the_way.insert((arrival, self.sent, at));
            self.sent += 1;
        }
    }

    fn send_all(&mut self, rate: f64) {
        let mut at = 0.0;
        for number in 0..self.load.requests {
            self.send(Duration::from_secs_f64(at));
            at -= (1.0 - unit(mix(u64::from(number), ARRIVALS))).ln() / rate;
        }
    }

    fn arrive(&mut self) {
        let now = self.clock.now();
        while let Some((at, number, sent)) = self.on_the_way.first().copied()
            && at <= now
        {
            self.on_the_way.pop_first();
            let request = self.request(number, now);
            let id = request.id;
            if self.engine.add(request).is_ok() {
                self.alive.insert(id, Life { number, sent, first: None, last: now, tokens: 0 });
            } else {
                // It can never fit. Whoever sent it goes on.
                self.send(now);
            }
        }
    }

    fn request(&self, number: u32, arrival: Duration) -> Request {
        let seed = u64::from(number);
        let prompt = (0..self.load.input_tokens.draw(mix(seed, INPUT))).map(|token| token ^ number).collect();
        Request {
            id: RequestId(seed),
            prompt,
            n: 1,
            sampling: Arc::new(SamplingParams::greedy()),
            stop: StopConditions {
                max_tokens: self.load.output_tokens.draw(mix(seed, OUTPUT)),
                min_tokens: 0,
                stop_token_ids: Arc::default(),
            },
            priority: 0,
            cache_salt: 0,
            arrival,
        }
    }

    fn event(&mut self, event: &Event) {
        let now = self.clock.now();
        match event {
            Event::Token { request, .. } => {
                let Some(life) = self.alive.get_mut(request) else { return };
                life.first.get_or_insert(now);
                life.last = now;
                life.tokens += 1;
                self.output_tokens += 1;
            }
            Event::Finished { request, .. } => {
                let Some(life) = self.alive.remove(request) else { return };
                self.ended(&life);
                if matches!(self.load.arrivals, Arrivals::Closed(_)) {
                    self.send(now);
                }
            }
            Event::Scheduled { .. } | Event::PromptLogprobs { .. } | Event::Preempted { .. } => {}
        }
    }

    fn ended(&mut self, life: &Life) {
        let first = life.first.unwrap_or(life.last);
        if life.number >= self.load.warm_up {
            self.measured += 1.0;
            self.ttft_seconds += (first - life.sent).as_secs_f64();
            let gaps = f64::from(life.tokens.saturating_sub(1).max(1));
            self.tpot_seconds += (life.last - first).as_secs_f64() / gaps;
        }
    }
}

/// Keep the random numbers of one request apart.
const ARRIVALS: u64 = 1;
const INPUT: u64 = 2;
const OUTPUT: u64 = 3;
