//! Plan, run, apply.

use crate::block_pool::BlockId;
use crate::request::{Request, RequestId, Timestamp};
use crate::runner::{ModelRunner, RunnerError, Step, StepOutput};
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
    plan: Plan,
    step: Step,
    steps: u64,
    trace: StepTrace,
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
            plan: Plan::default(),
            step: Step::default(),
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
        report.events.append(&mut self.scheduler.pending);
        self.scheduler.plan(&mut self.plan, &mut report.events);
        if !self.plan.work.is_empty() {
            let block_size = self.scheduler.config.block_size as usize;
            build_step(&self.plan, &self.scheduler.running, block_size, &mut self.step);
            report.sequences = self.plan.work.len() as u32;
            match self.run() {
                Ok(output) => self.scheduler.apply(&self.plan, &self.step, output, &mut report),
                Err(error) => self.fail(error, &mut report),
            }
            self.steps += 1;
        }
        self.record_trace(now, &report);
        report
    }

    fn run(&mut self) -> Result<StepOutput, RunnerError> {
        let output = self.runner.run(&self.step)?;
        let (answered, asked) = (output.rows.len(), self.step.rows.len());
        if answered != asked {
            return Err(RunnerError::Step(format!("the runner answered {answered} rows of {asked}")));
        }
        Ok(output)
    }

    fn fail(&mut self, error: RunnerError, report: &mut StepReport) {
        match error {
            RunnerError::Step(_) => self.scheduler.fail(&self.plan, &error, report),
            RunnerError::Fatal(_) => {
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
        !(scheduler.running.is_empty() && scheduler.waiting.is_empty() && scheduler.pending.is_empty())
    }

    /// Forgets the content of all blocks. Running requests go on with the blocks they hold, which
    /// nobody else will find, and publish nothing more. Always done; true if there was anything to
    /// forget.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.scheduler.reset_prefix_cache()
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

    fn record_trace(&mut self, now: Timestamp, report: &StepReport) {
        let stats = self.stats();
        let finished = report.events.iter().filter(|event| matches!(event, Event::Finished { .. }));
        self.trace = StepTrace {
            step: self.trace.step + 1,
            now,
            admitted: self.plan.admitted,
            preempted: self.plan.preempted,
            finished: finished.count() as u32,
            decode_tokens: report.decode_tokens,
            prefill_tokens: report.prefill_tokens,
            copies: self.plan.copies.len() as u32,
            failed: report.error.is_some(),
            running: stats.running,
            waiting: stats.waiting,
            blocks_held: stats.blocks_held,
            blocks_cached: stats.blocks_cached,
            blocks_free: stats.blocks_free,
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
