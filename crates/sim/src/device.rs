//! The simulated device: a [`ModelRunner`] without weights that takes the time of a [`CostModel`].
//!
//! It answers what [`Answers`] says and computes nothing, but it keeps what a real one would be kept by: a KV memory
//! ([`Chain`]), read and written through the block tables, on which the answers depend. So a wrong block changes the
//! text here too, and a request has the same answer alone, in any batch, with a warm cache and after a preemption.
//!
//! Like a GPU it takes the next step while one is under way, so that planning costs no time as long as it is shorter
//! than a step.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{
    Draw, LogitsRow, ModelRunner, RowOutput, RunnerError, Step, StepOutput, StepSequence, Submitted, TokenId,
    Want,
};

use crate::cost::CostModel;
use crate::device_answers::Answers;
use crate::device_chain::{Chain, mix};
use crate::device_clock::Pace;
use crate::roofline::SequenceWork;

/// How a simulated device is set up.
pub struct DeviceOptions {
    pub num_blocks: u32,
    pub block_size: u32,
    /// 1, or 2 to take the next step while one is under way.
    pub steps_at_once: usize,
    pub cost: CostModel,
    pub pace: Pace,
    /// After so long, by the clock of `pace`, it is lost: the step under way and every later one fail with
    /// [`RunnerError::Fatal`], as on a GPU that has fallen off the bus.
    pub lost_after: Option<Duration>,
    pub answers: Arc<Answers>,
}

/// A device that only takes time.
pub struct SimulatedDevice {
    cost: CostModel,
    pace: Pace,
    lost_at: Option<Duration>,
    answers: Arc<Answers>,
    chain: Chain,
    steps_at_once: usize,
    /// Steps with the moment at which they end, oldest first.
    under_way: VecDeque<(Duration, StepOutput)>,
    /// When the device has done all it was given.
    free_at: Duration,
    /// What the last step answered.
    last: Vec<TokenId>,
    /// The step's tokens with those filled in that the step before chose; reused.
    tokens: Vec<TokenId>,
}

impl SimulatedDevice {
    pub fn new(options: DeviceOptions) -> Self {
        Self {
            cost: options.cost,
            lost_at: options.lost_after.map(|after| options.pace.now().saturating_add(after)),
            pace: options.pace,
            answers: options.answers,
            chain: Chain::new(options.num_blocks, options.block_size),
            steps_at_once: options.steps_at_once.clamp(1, 2),
            under_way: VecDeque::new(),
            free_at: Duration::ZERO,
            last: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Takes a step: its answers, and when they are there.
    fn begin(&mut self, step: &Step) -> Result<(Duration, StepOutput), RunnerError> {
        let seconds = self.cost.step_seconds(SequenceWork::of(step));
        let output = self.answer(step)?;
        let from = self.pace.now().max(self.free_at);
        self.free_at = from + self.pace.duration(seconds);
        Ok((self.free_at, output))
    }

    /// Until the step has ended, or the device is lost.
    fn wait_until(&self, end: Duration) -> Result<(), RunnerError> {
        let lost_at = self.lost_at.filter(|lost_at| *lost_at <= end);
        self.pace.wait_until(lost_at.unwrap_or(end));
        match lost_at {
            Some(_) => Err(RunnerError::Fatal("the simulated device is lost, as it was told to be".into())),
            None => Ok(()),
        }
    }

    fn answer(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.tokens.clone_from(&step.tokens);
        for pending in &step.from_last {
            // After a step that failed there is nothing to refer to; its sequences have ended.
            self.tokens[pending.token] = self.last.get(pending.answer).copied().unwrap_or(0);
        }
        self.chain.copy(&step.copies);
        for sequence in &step.sequences {
            self.chain.write(step, sequence, &self.tokens);
        }
        let mut output = StepOutput::default();
        let mut sequences = step.sequences.iter().peekable();
        for row in &step.rows {
            // Rows ascend, as the sequences do.
            while sequences.next_if(|sequence| sequence.tokens.end <= row.row).is_some() {}
            let Some(sequence) = sequences.peek() else { break };
            output.rows.push(self.row(step, sequence, row)?);
        }
        self.last.clear();
        self.last.extend(output.rows.iter().map(|row| row.token));
        Ok(output)
    }

    fn row(&self, step: &Step, sequence: &StepSequence, row: &LogitsRow) -> Result<RowOutput, RunnerError> {
        let Want::Sample(draw) = &row.want else { return Err(no_logits()) };
        if draw.sampling.logprobs.is_some() {
            return Err(no_logits());
        }
        // The answer depends on the prompt: on what the cache holds at its last token.
        let prompt_end = step.positions[row.row].saturating_sub(draw.output_index);
        let prompt = self.chain.read(step, sequence, prompt_end);
        let token = self.answers.token(answer_seed(prompt, draw), draw.output_index, &draw.banned);
        Ok(RowOutput { token, logprobs: None })
    }
}

/// There are none to report of. The server refuses such requests before they come here.
fn no_logits() -> RunnerError {
    RunnerError::Step("a simulated device has no logits, so no log-probabilities either".into())
}

/// Which answer it is: one for each prompt when greedy, else one for each seed, choice and set of sampling values too.
/// (A real model's answer changes with each of these as well.)
fn answer_seed(prompt: u64, draw: &Draw) -> u64 {
    let sampling = &draw.sampling;
    let penalties =
        [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0];
    let mut seed = penalties.iter().fold(prompt, |seed, value| match *value {
        0.0 => seed,
        value => mix(seed, u64::from(value.to_bits())),
    });
    if sampling.temperature > 0.0 {
        let values = [sampling.temperature, sampling.top_p, sampling.min_p];
        seed = values.iter().fold(seed, |seed, value| mix(seed, u64::from(value.to_bits())));
        seed = mix(mix(seed, u64::from(sampling.top_k.unwrap_or(0))), sampling.seed);
        seed = mix(seed, u64::from(draw.choice) + 1);
    }
    seed
}

impl ModelRunner for SimulatedDevice {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        let (end, output) = self.begin(step)?;
        self.wait_until(end)?;
        Ok(output)
    }

    fn steps_at_once(&self) -> usize {
        self.steps_at_once
    }

    fn submit(&mut self, step: &Step) -> Result<Submitted, RunnerError> {
        if self.steps_at_once == 1 {
            return self.run(step).map(Submitted::Done);
        }
        let begun = self.begin(step)?;
        self.under_way.push_back(begun);
        Ok(Submitted::UnderWay)
    }

    fn collect(&mut self) -> Result<StepOutput, RunnerError> {
        let Some((end, output)) = self.under_way.pop_front() else {
            return Err(RunnerError::Step("no step is under way".into()));
        };
        self.wait_until(end)?;
        Ok(output)
    }
}
