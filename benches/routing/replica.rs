//! One replica in virtual time: the real engine with its real block pool, around a device whose steps take what the
//! roofline says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use servelab_bench::ledger::Ledger;
use servelab_engine::{
    Engine, EngineConfig, Event, ModelRunner, Request, RequestId, RowOutput, RunnerError, SamplingParams,
    Step, StepOutput, StopConditions, TokenId, Want,
};
use servelab_router::choice::load::Report;
use servelab_router::choice::rates::Counters;
use servelab_sim::{HardwareProfile, Roofline, SequenceWork};

/// What a device reaches of its peaks, and what a step costs besides.
#[derive(Clone, Copy, Debug)]
pub struct Efficiency {
    /// Of the bandwidth and of the arithmetic.
    pub share: f64,
    pub overhead_seconds: f64,
}

/// What all replicas are.
#[derive(Clone, Debug)]
pub struct ReplicaKind {
    pub roofline: Roofline,
    pub efficiency: Efficiency,
    pub engine: EngineConfig,
}

impl ReplicaKind {
    /// Llama 3.1 8B in bf16 on one H100, vLLM's batch of 8,192 tokens a step. The KV cache has what is left of nine
    /// tenths of the memory.
    pub fn llama_8b_on_h100() -> Self {
        let ledger = Ledger::load().expect("a test reads it");
        let shape = &ledger.models["llama-3.1-8b"];
        let hardware = HardwareProfile::named("h100").expect("it is in the crate's data");
        let kv_bytes = 0.9 * hardware.memory_bytes - shape.weight_bytes();
        let block_size = 16;
        let num_blocks = kv_bytes / shape.kv_bytes_per_token() / f64::from(block_size);
        Self {
            roofline: Roofline::new(shape, &hardware, 1).expect("the model fits on one"),
            efficiency: Efficiency { share: 0.6, overhead_seconds: 0.0005 },
            engine: EngineConfig {
                block_size,
                num_blocks: num_blocks as u32,
                max_model_len: 131_072,
                max_batched_tokens: 8192,
                max_running: 256,
                max_waiting: 1 << 20,
                prefix_cache: true,
            },
        }
    }
}

/// Answers at once with tokens that depend on nothing but the request, and says how long the step takes.
struct Device {
    kind: ReplicaKind,
    step_seconds: f64,
}

impl ModelRunner for Device {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        let Efficiency { share, overhead_seconds } = self.kind.efficiency;
        self.step_seconds =
            self.kind.roofline.step(SequenceWork::of(step)).floor_seconds() / share + overhead_seconds;
        Ok(StepOutput { rows: step.rows.iter().map(|row| answer(&row.want)).collect() })
    }
}

fn answer(want: &Want) -> RowOutput {
    let token = match want {
        Want::Sample(draw) => answer_token(draw.sampling.seed, draw.output_index),
        Want::Score { target, .. } => *target,
    };
    RowOutput { token, logprobs: None }
}

/// The `index`th token of a request's answer, the same on every replica.
pub fn answer_token(request: u64, index: u32) -> TokenId {
    (servelab_bench::prompt::mix(request ^ (u64::from(index) << 40)) >> 33) as TokenId
}

/// Something that happened to a request, at the end of the step in which it did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happened {
    Scheduled { cached_tokens: u32 },
    Token,
    Ended,
    Preempted,
}

/// What is remembered of a request, for the counters.
struct Live {
    scheduled: Duration,
    first_token: Option<Duration>,
    last_token: Duration,
    prompt_tokens: u32,
    cached_tokens: Option<u32>,
}

/// An engine and its counters.
pub struct Replica {
    engine: Engine<Device>,
    counters: Counters,
    live: BTreeMap<RequestId, Live>,
    /// Until when the device computes.
    pub busy_until: Option<Duration>,
    pub busy_seconds: f64,
    pub computed_tokens: u64,
}

impl Replica {
    pub fn new(kind: &ReplicaKind) -> Self {
        let device = Device { kind: kind.clone(), step_seconds: 0.0 };
        Self {
            engine: Engine::new(kind.engine.clone(), device).expect("the configuration is possible"),
            counters: Counters::default(),
            live: BTreeMap::new(),
            busy_until: None,
            busy_seconds: 0.0,
            computed_tokens: 0,
        }
    }

    /// Puts a request into the engine's queue.
    pub fn add(&mut self, now: Duration, number: u64, prompt: &[TokenId], output_tokens: u32) {
        let sampling = SamplingParams { seed: number, ..SamplingParams::greedy() };
        let request = Request {
            id: RequestId(number),
            prompt: prompt.into(),
            n: 1,
            sampling: Arc::new(sampling),
            stop: StopConditions { max_tokens: output_tokens, min_tokens: 0, stop_token_ids: Arc::default() },
            priority: 0,
            cache_salt: 0,
            arrival: now,
        };
        self.engine.add(request).expect("workloads fit the context and the pool");
        let prompt_tokens = prompt.len() as u32;
        let live =
            Live { scheduled: now, first_token: None, last_token: now, prompt_tokens, cached_tokens: None };
        self.live.insert(RequestId(number), live);
    }

    pub fn has_work(&self) -> bool {
        self.engine.has_work()
    }

    /// Begins a step. What happened in it is reported as of its end, which is returned with it.
    pub fn step(&mut self, now: Duration) -> (Duration, Vec<(u64, Happened)>) {
        self.engine.runner_mut().step_seconds = 0.0;
        let report = self.engine.step(now);
        let seconds = self.engine.runner().step_seconds;
        let end = now + Duration::from_secs_f64(seconds);
        self.busy_seconds += seconds;
        self.computed_tokens += u64::from(report.prefill_tokens + report.decode_tokens);
        self.busy_until = Some(end);
        let happened = report.events.iter().filter_map(|event| self.happened(event, now, end)).collect();
        (end, happened)
    }

    fn happened(&mut self, event: &Event, start: Duration, end: Duration) -> Option<(u64, Happened)> {
        let id = event.request();
        let live = self.live.get_mut(&id)?;
        let happened = match event {
            Event::Scheduled { cached_tokens, .. } => {
                if live.first_token.is_none() {
                    live.scheduled = start;
                }
                let first = live.cached_tokens.is_none();
                live.cached_tokens.get_or_insert(*cached_tokens);
                return first.then_some((id.0, Happened::Scheduled { cached_tokens: *cached_tokens }));
            }
            Event::Token { .. } => {
                if live.first_token.is_none() {
                    live.first_token = Some(end);
                    let computed = live.prompt_tokens - live.cached_tokens.unwrap_or(0);
                    self.counters.computed_prompt_tokens += f64::from(computed);
                    self.counters.prefill_seconds += (end - live.scheduled).as_secs_f64();
                } else {
                    self.counters.token_gaps += 1.0;
                    self.counters.token_gap_seconds += (end - live.last_token).as_secs_f64();
                }
                live.last_token = end;
                Happened::Token
            }
            Event::Finished { .. } => {
                self.live.remove(&id);
                Happened::Ended
            }
            Event::Preempted { .. } => Happened::Preempted,
            Event::PromptLogprobs { .. } => return None,
        };
        Some((id.0, happened))
    }

    /// What it would export for the router to read.
    pub fn scrape(&self, now: Duration) -> (Report, Counters) {
        let stats = self.engine.stats();
        let kv_usage = f64::from(stats.blocks_held) / f64::from(stats.blocks_total);
        let report = Report { running: stats.running, waiting: stats.waiting, kv_usage };
        (report, Counters { at: now, ..self.counters })
    }

    /// Tokens of a prompt that its cache holds, in truth.
    pub fn cached_tokens(&self, prompt: &[TokenId]) -> u32 {
        self.engine.cached_tokens(prompt, 0) as u32
    }

    pub fn preemptions(&self) -> u64 {
        self.engine.stats().preemptions
    }
}
