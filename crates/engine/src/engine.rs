//! Plan, run, apply.
//!
//! A runner whose device works by itself takes two steps at once: while it computes one, the next is planned and
//! submitted, so that the device never waits for the host. [`Engine::step`] keeps its queue full and applies the step
//! that ends first.

use std::collections::VecDeque;

use crate::block_hash::HashChain;
use crate::block_pool::BlockId;
use crate::kv_event::{KvEvent, StoredBlock};
use crate::request::{Request, RequestId, Timestamp, TokenId};
use crate::runner::{ModelRunner, RunnerError, Step, StepOutput, Submitted};
use crate::scheduler::{Plan, Scheduler};
use crate::sequence::Sequence;
use crate::step::build_step;

pub use crate::admission::AdmissionError;
pub use crate::config::{ConfigError, EngineConfig};
pub use crate::event::{Event, StepReport};
pub use crate::stats::{EngineSnapshot, EngineStats, RunningSequence, WaitingSequence};
pub use crate::trace::StepTrace;

/// The scheduler, the block pool and the prefix cache around a [`ModelRunner`].
///
/// Deterministic: the same calls with the same runner give the same reports.
pub struct Engine<R> {
    runner: R,
    scheduler: Scheduler,
    /// Steps that were submitted and not yet applied, oldest first.
    under_way: VecDeque<Flight>,
    /// Their memory, for the next ones.
    spare: Vec<Flight>,
    steps: u64,
    trace: StepTrace,
}

/// A step on its way from plan to outcome.
#[derive(Default)]
struct Flight {
    plan: Plan,
    step: Step,
    /// `None` while the runner has it.
    output: Option<StepOutput>,
}

impl<R: ModelRunner> Engine<R> {
    /// An engine without any request.
    ///
    /// # Errors
    /// A setting that is impossible; see [`EngineConfig::validate`].
    pub fn new(config: EngineConfig, runner: R) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            runner,
            scheduler: Scheduler::new(config),
            under_way: VecDeque::new(),
            spare: Vec::new(),
            steps: 0,
            trace: StepTrace::default(),
        })
    }

    /// One pass: plan what to compute, run it, apply the outcome.
    ///
    /// Also reports what happened between two steps (aborts, stop strings). Does not call the runner
    /// if there is nothing to compute. `now` is the caller's clock; it is shown in the trace and the
    /// snapshot and decides nothing.
    pub fn step(&mut self, now: Timestamp) -> StepReport {
        let mut report = StepReport::default();
        self.trace = StepTrace { step: self.trace.step + 1, now, ..StepTrace::default() };
        report.events.append(&mut self.scheduler.pending);
        while self.under_way.len() < self.runner.steps_at_once() && self.submit(&mut report) {}
        if let Some(flight) = self.under_way.pop_front() {
            self.collect(flight, &mut report);
        }
        self.record_trace(&report);
        report
    }

    /// Plans the next step and gives it to the runner. False if there is nothing to compute, or the runner did not
    /// take it.
    fn submit(&mut self, report: &mut StepReport) -> bool {
        let mut flight = self.spare.pop().unwrap_or_default();
        self.scheduler.plan(&mut flight.plan, &mut report.events);
        self.trace.admitted += flight.plan.admitted;
        self.trace.preempted += flight.plan.preempted;
        self.trace.copies += flight.plan.copies.len() as u32;
        if flight.plan.work.is_empty() {
            self.spare.push(flight);
            return false;
        }
        let block_size = self.scheduler.config.block_size as usize;
        build_step(&flight.plan, &self.scheduler.running, block_size, &mut flight.step);
        match self.runner.submit(&flight.step) {
            Ok(submitted) => {
                self.scheduler.submitted(&flight.plan, &flight.step);
                flight.output = match submitted {
                    Submitted::Done(output) => Some(output),
                    Submitted::UnderWay => None,
                };
                self.under_way.push_back(flight);
                true
            }
            Err(error) => {
                self.end(flight, Err(error), report);
                false
            }
        }
    }

    /// Waits for the outcome of a step, and applies it.
    fn collect(&mut self, mut flight: Flight, report: &mut StepReport) {
        let output = flight.output.take().map_or_else(|| self.runner.collect(), Ok);
        let asked = flight.step.rows.len();
        let output = output.and_then(|output| match output.rows.len() {
            answered if answered == asked => Ok(output),
            answered => Err(RunnerError::Step(format!("the runner answered {answered} rows of {asked}"))),
        });
        self.end(flight, output, report);
    }

    fn end(&mut self, flight: Flight, output: Result<StepOutput, RunnerError>, report: &mut StepReport) {
        self.steps += 1;
        report.sequences += flight.plan.work.len() as u32;
        match output {
            Ok(output) => self.scheduler.apply(&flight.plan, &flight.step, output, report),
            Err(error) => self.fail(&flight.plan, error, report),
        }
        self.spare.push(flight);
    }

    fn fail(&mut self, plan: &Plan, error: RunnerError, report: &mut StepReport) {
        match error {
            RunnerError::Step(_) => self.scheduler.fail(plan, &error, report),
            RunnerError::Fatal(_) => {
                self.under_way.clear();
                self.scheduler.fail_all(&error, report);
                report.fatal = Some(error.clone());
            }
        }
        report.error = Some(error);
    }

    /// Puts a request into the queue. It starts in a later [`Engine::step`].
    ///
    /// # Errors
    /// If it can never be served, or if the queue is full. A request that is preempted does not
    /// count against the queue.
    pub fn add(&mut self, request: Request) -> Result<(), AdmissionError> {
        self.scheduler.add(request)
    }

    /// Gives a request up. Its blocks are free at once; the `Finished { Abort }` of each choice that
    /// had not ended comes in the next [`StepReport`], and until then the id is in use. False if no
    /// such request is alive.
    pub fn abort(&mut self, request: RequestId) -> bool {
        self.scheduler.abort(request)
    }

    /// Ends one choice because the caller found a stop string in its text. Its blocks are free at
    /// once; its `Finished { Stop(None) }` comes in the next [`StepReport`]. False if the choice has
    /// ended already, is unknown, or has not generated a token yet.
    pub fn finish_choice(&mut self, request: RequestId, choice: u32) -> bool {
        self.scheduler.finish_choice(request, choice)
    }

    /// Whether a step would do or report anything.
    pub fn has_work(&self) -> bool {
        let scheduler = &self.scheduler;
        let is_idle = scheduler.running.is_empty() && scheduler.waiting.is_empty();
        !(is_idle && scheduler.pending.is_empty() && self.under_way.is_empty())
    }

    /// Forgets the content of all blocks. Running requests go on with the blocks they hold, which
    /// nobody else will find, and publish nothing more. Always done; true if there was anything to
    /// forget.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.scheduler.reset_prefix_cache()
    }

    /// How many leading tokens of a prompt the cache holds, in whole blocks. For whoever wants to know what a router
    /// can only guess; O(prompt).
    pub fn cached_tokens(&self, prompt: &[TokenId], cache_salt: u64) -> usize {
        let block_size = self.scheduler.config.block_size as usize;
        let mut chain = HashChain::new(block_size, cache_salt);
        self.scheduler.pool.longest_prefix(prompt, &mut chain, usize::MAX).blocks.len() * block_size
    }

    /// Notes from now on, or no more, what the prefix cache gains and loses: see [`Engine::take_kv_events`].
    pub fn listen_to_kv(&mut self, listens: bool) {
        self.scheduler.pool.listen(listens);
    }

    /// What the prefix cache has gained and lost since the last call, in order. If nobody takes them for long, they
    /// are put together to a [`KvEvent::Cleared`] and all that is there, so that the list is never longer than two
    /// entries for each block. Empty unless [`Engine::listen_to_kv`] said so.
    pub fn take_kv_events(&mut self) -> Vec<KvEvent> {
        self.scheduler.pool.take_changes()
    }

    /// All blocks that can be found in the prefix cache, each behind its parent where that is there too. Copies their
    /// tokens; O(blocks).
    pub fn kv_blocks(&self) -> Vec<StoredBlock> {
        self.scheduler.pool.stored_blocks()
    }

    pub fn config(&self) -> &EngineConfig {
        &self.scheduler.config
    }

    pub fn runner(&self) -> &R {
        &self.runner
    }

    pub fn runner_mut(&mut self) -> &mut R {
        &mut self.runner
    }

    pub fn stats(&self) -> EngineStats {
        let scheduler = &self.scheduler;
        let blocks = scheduler.pool.counts();
        EngineStats {
            running: scheduler.running.len() as u32,
            waiting: scheduler.waiting.len() as u32,
            blocks_total: scheduler.config.num_blocks,
            blocks_held: blocks.held,
            blocks_cached: blocks.cached,
            blocks_free: blocks.free,
            prefix_query_tokens: scheduler.counters.prefix_query_tokens,
            prefix_hit_tokens: scheduler.counters.prefix_hit_tokens,
            preemptions: scheduler.counters.preemptions,
        }
    }

    /// The state of everything, copied. O(sequences and blocks): for a page that people look at, not
    /// for every step.
    pub fn snapshot(&self) -> EngineSnapshot {
        let scheduler = &self.scheduler;
        EngineSnapshot {
            steps: self.steps,
            now: self.trace.now,
            running: scheduler.running.iter().map(show_running).collect(),
            waiting: scheduler.waiting.values().map(show_waiting).collect(),
            blocks: (0..scheduler.config.num_blocks).map(|block| self.show_block(BlockId(block))).collect(),
        }
    }

    fn show_block(&self, block: BlockId) -> u8 {
        let pool = &self.scheduler.pool;
        match pool.references(block) {
            0 => u8::from(pool.is_published(block)),
            held => u8::try_from(held).map_or(u8::MAX, |held| held.saturating_add(1)),
        }
    }

    /// What the last step did, as one line of a table.
    pub fn trace(&self) -> StepTrace {
        self.trace
    }

    fn record_trace(&mut self, report: &StepReport) {
        let stats = self.stats();
        let finished = report.events.iter().filter(|event| matches!(event, Event::Finished { .. }));
        self.trace = StepTrace {
            finished: finished.count() as u32,
            decode_tokens: report.decode_tokens,
            prefill_tokens: report.prefill_tokens,
            failed: report.error.is_some(),
            running: stats.running,
            waiting: stats.waiting,
            blocks_held: stats.blocks_held,
            blocks_cached: stats.blocks_cached,
            blocks_free: stats.blocks_free,
            ..self.trace
        };
    }

    /// The conservation law: free + held + cached = all blocks, each block is held as often as it is
    /// counted, the queues are in order, and every request that is alive is somewhere. For tests;
    /// O(sequences and blocks).
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.scheduler.check_integrity()
    }
}

fn show_running(sequence: &Sequence) -> RunningSequence {
    RunningSequence {
        request: sequence.request.id,
        choice: sequence.choice(),
        priority: sequence.request.priority,
        prompt_tokens: sequence.prompt_len() as u32,
        tokens: sequence.tokens.len() as u32,
        computed: sequence.computed as u32,
        cached: sequence.cached as u32,
        blocks: sequence.blocks.clone(),
    }
}

fn show_waiting(sequence: &Sequence) -> WaitingSequence {
    WaitingSequence {
        request: sequence.request.id,
        choice: sequence.choice(),
        priority: sequence.request.priority,
        prompt_tokens: sequence.prompt_len() as u32,
        tokens: sequence.tokens.len() as u32,
        preempted: sequence.preempted,
        arrival: sequence.request.arrival,
    }
}
