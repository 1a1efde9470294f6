//! A runner for tests, without a model: its tokens are hashes.
//!
//! It has KV memory of its own, one number a slot. What it stores for a token depends on the token,
//! its position, and on everything stored for the positions before it, which it reads through the
//! block table as attention does. So a wrong slot, a stale block, a missed copy on write or another
//! prompt's prefix changes the answer; [`FakeRunner::answer`] tells the right one without any blocks.

use std::collections::{BTreeMap, VecDeque};

use crate::request::{Request, TokenId};
use crate::runner::{
    Draw, ModelRunner, RowOutput, RunnerError, Step, StepOutput, StepSequence, Submitted, TokenLogprobs, Want,
};

/// Computes nothing but depends on everything.
#[derive(Clone, Debug)]
pub struct FakeRunner {
    block_size: usize,
    vocab: u32,
    /// `[blocks * block_size]`
    memory: Vec<u64>,
    failures: BTreeMap<u64, RunnerError>,
    forced: BTreeMap<u32, TokenId>,
    /// Steps whose outcome the engine knows.
    steps: u64,
    /// Steps computed.
    submitted: u64,
    steps_at_once: usize,
    /// Outcomes that were not collected yet, oldest first.
    under_way: VecDeque<Result<StepOutput, RunnerError>>,
    /// What the last step answered.
    last: Vec<TokenId>,
}

impl FakeRunner {
    /// KV memory of `num_blocks` blocks of `block_size` tokens; answers tokens below `vocab` (at
    /// least 1).
    pub fn new(num_blocks: u32, block_size: u32, vocab: u32) -> Self {
        Self {
            block_size: block_size as usize,
            vocab: vocab.max(1),
            memory: vec![0xDEAD_BEEF; num_blocks as usize * block_size as usize],
            failures: BTreeMap::new(),
            forced: BTreeMap::new(),
            steps: 0,
            submitted: 0,
            steps_at_once: 1,
            under_way: VecDeque::new(),
            last: Vec::new(),
        }
    }

    /// The same as a device that takes so many steps at once: it computes them as they are submitted and keeps the
    /// outcome for itself until it is asked.
    pub fn taking(self, steps_at_once: usize) -> Self {
        Self { steps_at_once, ..self }
    }

    /// How many steps the engine knows the outcome of.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Fails the `ahead`-th step from now; 0 is the next one. As a device does, it leaves garbage in
    /// the slots of that step.
    pub fn fail(&mut self, ahead: u64, error: RunnerError) {
        self.failures.insert(self.submitted + ahead, error);
    }

    /// Answers `token` (a stop token, say) wherever a choice's output has that many tokens, unless
    /// it is banned there.
    pub fn force(&mut self, output_index: u32, token: TokenId) {
        self.forced.insert(output_index, token);
    }

    /// The tokens of one choice of `request`, as they must come out of every engine around a runner
    /// with the same vocabulary and forced tokens: computed in one go, with no blocks at all.
    pub fn answer(&self, request: &Request, choice: u32) -> Vec<TokenId> {
        let stop = &request.stop;
        let (mut values, mut output) = (Vec::new(), Vec::new());
        for token in request.prompt.iter() {
            append_value(&mut values, *token);
        }
        for output_index in 0..stop.max_tokens {
            let may_stop = output_index >= stop.min_tokens;
            let draw = Draw {
                sampling: request.sampling.clone(),
                choice,
                output_index,
                banned: if may_stop { Default::default() } else { stop.stop_token_ids.clone() },
                history: request.sampling.needs_history().then(|| crate::runner::History {
                    prompt: request.prompt.clone(),
                    output: output.clone(),
                }),
            };
            let token = self.draw(*values.last().unwrap_or(&0), &draw);
            output.push(token);
            append_value(&mut values, token);
            if may_stop && stop.stop_token_ids.contains(&token) {
                break;
            }
        }
        output
    }

    /// The log-probability that it reports for a prompt token after `before`.
    pub fn score(&self, before: &[TokenId], target: TokenId, top: u32) -> TokenLogprobs {
        let mut values = Vec::new();
        before.iter().for_each(|token| append_value(&mut values, *token));
        self.logprobs(*values.last().unwrap_or(&0), target, top)
    }

    /// Last copy first: no order may matter.
    fn copy(&mut self, step: &Step) {
        for (from, to) in step.copies.iter().rev() {
            let (from, to) = (from.0 as usize * self.block_size, to.0 as usize * self.block_size);
            self.memory.copy_within(from..from + self.block_size, to);
        }
    }

    fn compute(&mut self, step: &Step, tokens: &[TokenId], sequence: &StepSequence) {
        let blocks = &step.blocks[sequence.blocks.clone()];
        for index in sequence.tokens.clone() {
            let position = step.positions[index];
            let context = (0..position as usize).map(|at| {
                self.memory[blocks[at / self.block_size].0 as usize * self.block_size + at % self.block_size]
            });
            let value = value(context, position, tokens[index]);
            self.memory[step.slots[index] as usize] = value;
        }
    }

    /// Reads back what was stored, so that two tokens written to one slot are noticed.
    fn read(&self, step: &Step, row: usize) -> u64 {
        self.memory[step.slots[row] as usize]
    }

    fn draw(&self, value: u64, draw: &Draw) -> TokenId {
        if let Some(token) = self.forced.get(&draw.output_index)
            && !draw.banned.contains(token)
        {
            return *token;
        }
        let mut seed = mix(value, u64::from(draw.output_index));
        if draw.sampling.temperature > 0.0 {
            seed = mix(mix(seed, draw.sampling.seed), u64::from(draw.choice) + 1);
        }
        if let Some(history) = &draw.history {
            for token in history.prompt.iter().chain(&history.output) {
                seed = mix(seed, u64::from(*token));
            }
        }
        let first = (seed % u64::from(self.vocab)) as u32;
        let mut candidates = (0..self.vocab).map(|offset| (first + offset) % self.vocab);
        candidates.find(|token| !draw.banned.contains(token)).unwrap_or(first)
    }

    fn logprobs(&self, value: u64, token: TokenId, top: u32) -> TokenLogprobs {
        let logprob = |token: TokenId| -((mix(value, u64::from(token)) % 1000) as f32) / 100.0;
        let top = (0..top.min(self.vocab)).map(|token| (token, logprob(token))).collect();
        TokenLogprobs { logprob: logprob(token), rank: 1 + (value % 100) as u32, top }
    }

    fn answer_row(&self, value: u64, want: &Want) -> RowOutput {
        match want {
            Want::Score { target, top } => {
                RowOutput { token: *target, logprobs: Some(self.logprobs(value, *target, *top)) }
            }
            Want::Sample(draw) => {
                let token = self.draw(value, draw);
                let logprobs = draw.sampling.logprobs.map(|top| self.logprobs(value, token, top));
                RowOutput { token, logprobs }
            }
        }
    }

    /// Computes a step, whoever gets to know of it when.
    fn compute_step(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        let number = self.submitted;
        self.submitted += 1;
        let mut tokens = step.tokens.clone();
        for pending in &step.from_last {
            // After a step that failed there is nothing to refer to; its sequences have ended.
            tokens[pending.token] = self.last.get(pending.answer).copied().unwrap_or(0);
        }
        self.copy(step);
        for sequence in &step.sequences {
            self.compute(step, &tokens, sequence);
        }
        self.last.clear();
        if let Some(error) = self.failures.remove(&number) {
            for slot in &step.slots {
                self.memory[*slot as usize] ^= 0xBAD;
            }
            return Err(error);
        }
        let rows = step.rows.iter().map(|row| self.answer_row(self.read(step, row.row), &row.want));
        let output = StepOutput { rows: rows.collect() };
        self.last.extend(output.rows.iter().map(|row| row.token));
        Ok(output)
    }
}

impl ModelRunner for FakeRunner {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.steps += 1;
        self.compute_step(step)
    }

    fn steps_at_once(&self) -> usize {
        self.steps_at_once
    }

    fn submit(&mut self, step: &Step) -> Result<Submitted, RunnerError> {
        if self.steps_at_once == 1 {
            return self.run(step).map(Submitted::Done);
        }
        assert!(self.under_way.len() < self.steps_at_once, "more steps at once than it takes");
        let outcome = self.compute_step(step);
        // Some errors show at once, others only later.
        match outcome {
            Err(error) if self.submitted.is_multiple_of(2) => {
                self.steps += 1;
                self.lose(&error);
                Err(error)
            }
            outcome => {
                self.under_way.push_back(outcome);
                Ok(Submitted::UnderWay)
            }
        }
    }

    fn collect(&mut self) -> Result<StepOutput, RunnerError> {
        self.steps += 1;
        let outcome = self.under_way.pop_front();
        let outcome = outcome.unwrap_or_else(|| Err(RunnerError::Step("no step is under way".into())));
        if let Err(error) = &outcome {
            self.lose(error);
        }
        outcome
    }
}

impl FakeRunner {
    /// A lost device answers nothing more.
    fn lose(&mut self, error: &RunnerError) {
        if matches!(error, RunnerError::Fatal(_)) {
            self.under_way.clear();
        }
    }
}

/// What is stored for a token: depends on the whole context.
fn value(context: impl Iterator<Item = u64>, position: u32, token: TokenId) -> u64 {
    let sum = context.fold(0, |sum: u64, value| sum.rotate_left(5).wrapping_add(value));
    mix(mix(sum, u64::from(position)), u64::from(token))
}

fn append_value(values: &mut Vec<u64>, token: TokenId) {
    let next = value(values.iter().copied(), values.len() as u32, token);
    values.push(next);
}

/// The finaliser of SplitMix64 (Steele et al. 2014) over both numbers.
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0x1234_5678_9ABC_DEF1);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
