//! The seam between the scheduler and whatever computes: CPU, CUDA, a simulated device, a fake.

use std::ops::Range;
use std::sync::Arc;

use crate::block_pool::BlockId;
use crate::request::{SamplingParams, TokenId};

/// One stream of tokens computed for a request. Never reused within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// One pass of the model over a batch, as plain data. Every sequence contributes a run of
/// consecutive tokens: one when it decodes, a chunk of its prompt while it prefills. There is no
/// padding. The buffers are reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Input token ids, sequence after sequence. `[tokens]`
    pub tokens: Vec<TokenId>,
    /// Position of each token in its sequence. `[tokens]`
    pub positions: Vec<u32>,
    /// Where each token's key and value go: `block * block_size + offset`. `[tokens]`
    pub slots: Vec<u32>,
    /// Block tables, sequence after sequence; see [`StepSequence::blocks`].
    pub blocks: Vec<BlockId>,
    pub sequences: Vec<StepSequence>,
    /// Blocks to copy (from, to) before anything is computed: copy on write of forked sequences.
    /// No block is both a source and a destination, and no two copies have the same destination, so
    /// that they can be done in any order or at once.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Rows whose logits are wanted, in ascending order of `row`.
    pub rows: Vec<LogitsRow>,
    /// Tokens that nobody knows yet: the step before this one, which is still under way, chooses them.
    /// Empty for runners that compute one step at a time.
    pub from_last: Vec<FromLast>,
}

/// An input token that is an answer of the step submitted just before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FromLast {
    /// Index into [`Step::tokens`], where a 0 stands for it.
    pub token: usize,
    /// Index into the other step's [`Step::rows`].
    pub answer: usize,
}

impl Step {
    /// Empties the step and keeps its allocations.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.blocks.clear();
        self.sequences.clear();
        self.copies.clear();
        self.rows.clear();
        self.from_last.clear();
    }
}

/// The part of a step that belongs to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepSequence {
    pub id: SequenceId,
    /// Its tokens within [`Step::tokens`].
    pub tokens: Range<usize>,
    /// Its block table within [`Step::blocks`]: the blocks that hold positions
    /// `0..context_len`, in order.
    pub blocks: Range<usize>,
    /// Tokens in the cache once this step is done; the last input token has position
    /// `context_len - 1`.
    pub context_len: u32,
}

/// A row of the step whose logits are wanted, and what for.
#[derive(Clone, Debug)]
pub struct LogitsRow {
    /// Index into [`Step::tokens`]. Several rows may name the same index (forked choices).
    pub row: usize,
    /// The sequence that receives the result.
    pub sequence: SequenceId,
    pub want: Want,
}

/// What is to be done with a row of logits.
#[derive(Clone, Debug)]
pub enum Want {
    /// Choose the next token.
    Sample(Draw),
    /// Report the probability of a known next token (prompt log-probabilities).
    Score { target: TokenId, top: u32 },
}

/// All that the choice of one token depends on besides the logits. Two equal draws on equal logits
/// give the same token in whatever batch.
#[derive(Clone, Debug)]
pub struct Draw {
    pub sampling: Arc<SamplingParams>,
    /// Which of the request's `n` continuations; part of the random counter.
    pub choice: u32,
    /// How many tokens this choice has generated so far; part of the random counter.
    pub output_index: u32,
    /// Tokens that must not be chosen (stop tokens before `min_tokens` is reached).
    pub banned: Arc<[TokenId]>,
    /// Present only if [`SamplingParams::needs_history`].
    pub history: Option<History>,
}

/// Tokens that the penalties look at.
#[derive(Clone, Debug)]
pub struct History {
    pub prompt: Arc<[TokenId]>,
    pub output: Vec<TokenId>,
}

/// What a runner gives back: one entry for each of [`Step::rows`], in the same order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    pub rows: Vec<RowOutput>,
}

/// The outcome of one row: the token chosen (or the target of a score) and, where asked for, its
/// log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOutput {
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// Natural-log probabilities at one position, from the model's raw logits (before temperature,
/// penalties and truncation), as vLLM's `logprobs_mode=raw_logprobs` reports them.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// 1 for the likeliest token of the vocabulary.
    pub rank: u32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

/// How a step can fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunnerError {
    /// The sequences of this step end with an error; the runner remains usable.
    #[error("{0}")]
    Step(String),
    /// The device is lost: no later step can succeed.
    #[error("{0}")]
    Fatal(String),
}

/// What became of a step that was submitted.
#[derive(Clone, Debug, PartialEq)]
pub enum Submitted {
    /// It is computed; there is nothing to collect.
    Done(StepOutput),
    /// [`ModelRunner::collect`] will give its answers.
    UnderWay,
}

/// Computes steps. Implementations own weights, KV memory and sampler; the engine owns everything
/// that decides what is computed when.
///
/// A runner that computes one step at a time has [`ModelRunner::run`] and nothing else. One whose device works by
/// itself can take the next step while it does: it says how many, and is given them by `submit`.
pub trait ModelRunner {
    /// Computes `step`: writes keys and values of its tokens to their slots and answers every row.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if this step failed and later ones may succeed; the content of the
    /// slots it named is then undefined. [`RunnerError::Fatal`] if no later step can.
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError>;

    /// Steps that may be submitted and not yet collected, 1 or 2. With 2, [`Step::from_last`] may name answers of
    /// the step before; steps are computed in the order in which they are submitted.
    fn steps_at_once(&self) -> usize {
        1
    }

    /// Takes a step. Whether it succeeds may show only when it is collected.
    ///
    /// # Errors
    /// As [`ModelRunner::run`]; nothing is to be collected then.
    fn submit(&mut self, step: &Step) -> Result<Submitted, RunnerError> {
        self.run(step).map(Submitted::Done)
    }

    /// Waits for the step that was submitted first of those under way.
    ///
    /// # Errors
    /// As [`ModelRunner::run`].
    fn collect(&mut self) -> Result<StepOutput, RunnerError> {
        Err(RunnerError::Step("no step is under way".into()))
    }
}

impl<R: ModelRunner + ?Sized> ModelRunner for Box<R> {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        (**self).run(step)
    }

    fn steps_at_once(&self) -> usize {
        (**self).steps_at_once()
    }

    fn submit(&mut self, step: &Step) -> Result<Submitted, RunnerError> {
        (**self).submit(step)
    }

    fn collect(&mut self) -> Result<StepOutput, RunnerError> {
        (**self).collect()
    }
}
