//! The operations that a step of the decoder is made of. A device implements them once and runs
//! every model of the family.
//!
//! Activations are matrices of `rows x width` in a buffer that the device owns. All buffers are made
//! when the model is loaded, large enough for the largest step; a step allocates none. `rows` is
//! how many rows of a buffer are filled, and each operation sets it on what it writes.
//!
//! A device may put the work in a queue and return before it is done; [`Ops::answers`] waits for the step.

use servelab_engine::{LogitsRow, RunnerError, Step, StepOutput};

use crate::error::ModelError;
use crate::weights::TensorData;

/// Rows of a step whose logits are computed together, and the wishes that they answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Rows of the step, each once, ascending.
    pub rows: Vec<usize>,
    /// The first of [`Step::rows`] that belongs to this pass.
    pub first_want: usize,
    /// For each wish of this pass, in order: its row's place in `rows`.
    pub places: Vec<usize>,
}

impl Pass {
    /// Splits the wishes of a step so that no pass has more than `most` rows. A row that is wanted several
    /// times stands in one pass, once.
    pub fn split(wants: &[LogitsRow], most: usize) -> Vec<Self> {
        let mut passes: Vec<Self> = Vec::new();
        for (index, want) in wants.iter().enumerate() {
            let is_new = passes.last().is_none_or(|pass| pass.rows.last() != Some(&want.row));
            if is_new && passes.last().is_none_or(|pass| pass.rows.len() == most) {
                passes.push(Self { first_want: index, ..Self::default() });
            }
            let Some(pass) = passes.last_mut() else { break };
            if is_new {
                pass.rows.push(want.row);
            }
            pass.places.push(pass.rows.len() - 1);
        }
        passes
    }

    /// Its wishes, each with its row's place.
    pub fn wants<'a>(&'a self, step: &'a Step) -> impl ExactSizeIterator<Item = (usize, &'a LogitsRow)> {
        let wants = &step.rows[self.first_want..self.first_want + self.places.len()];
        self.places.iter().copied().zip(wants)
    }
}

/// What the runners of all devices check before they compute, because they index by what a step says.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    pub tokens: usize,
    pub vocabulary: usize,
    pub blocks: usize,
    pub block_size: usize,
}

impl StepLimits {
    /// That nothing of a step points outside.
    ///
    /// # Errors
    /// [`RunnerError::Step`] that says what does.
    pub fn check(&self, step: &Step) -> Result<(), RunnerError> {
        let (tokens, blocks, block_size) = (step.tokens.len(), self.blocks, self.block_size);
        if tokens > self.tokens {
            return Err(RunnerError::Step(format!(
                "a step of {tokens} tokens; the runner was built for {}",
                self.tokens
            )));
        }
        if let Some(token) = step.tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            let vocabulary = self.vocabulary;
            return Err(RunnerError::Step(format!("token {token} is not in the vocabulary of {vocabulary}")));
        }
        let slots_fit = step.slots.iter().all(|slot| (*slot as usize) < blocks * block_size);
        let copies_fit = step.copies.iter().all(|(from, to)| (from.0.max(to.0) as usize) < blocks);
        let rows_fit = step.rows.iter().all(|row| row.row < tokens);
        let lengths_fit = step.slots.len() == tokens && step.positions.len() == tokens;
        let sequences_fit = step.sequences.iter().all(|sequence| {
            let (context, held) = (sequence.context_len as usize, sequence.blocks.len() * block_size);
            let table = step.blocks.get(sequence.blocks.clone());
            let inputs = step.positions.get(sequence.tokens.clone());
            table.is_some_and(|table| table.iter().all(|block| (block.0 as usize) < blocks))
                && inputs.is_some_and(|p| p.len() <= context && p.iter().all(|p| (*p as usize) < context))
                && context <= held
        });
        if slots_fit && copies_fit && rows_fit && lengths_fit && sequences_fit {
            return Ok(());
        }
        Err(RunnerError::Step("the step names slots, blocks or rows that do not exist".to_owned()))
    }
}

/// What a device can do. Shapes are given in brackets; T is the number of tokens of the step.
pub trait Ops {
    /// Activations, `[rows, width]`.
    type Buffer;
    /// A weight matrix `[outputs, inputs]` with or without a bias, in the device's own layout.
    type Matrix;
    /// The weight of a norm, `[width]`.
    type Vector;

    /// Takes over a weight matrix made of `parts`, whose rows follow one another: query, key and
    /// value, or gate and up. They are one product then. `bias` is `[outputs]`. The device keeps it in the
    /// format that it was told to.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn matrix(
        &mut self,
        parts: Vec<TensorData<'_>>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self::Matrix, ModelError>;

    /// Takes over the embedding or the head, `[vocabulary, hidden]`, whose rows [`Ops::embed`] reads one by one.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn table(&mut self, tensor: TensorData<'_>) -> Result<Self::Matrix, ModelError>;

    /// Takes over the weight of a norm.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, ModelError>;

    /// A buffer for up to `rows` rows.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn buffer(&mut self, rows: usize, width: usize) -> Result<Self::Buffer, ModelError>;

    /// A buffer for the logits of up to `rows` rows, which are f32 on every device.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn logits_buffer(&mut self, rows: usize, width: usize) -> Result<Self::Buffer, ModelError>;

    /// Most rows whose logits are computed at once; a step that wants more takes several passes.
    fn logits_rows(&self) -> usize;

    /// Starts a step: copies the blocks it wants copied and makes positions, slots, block tables and
    /// wishes known to the operations below. `passes` are those of the step's rows.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if the step does not fit the device's buffers or names a block or token
    /// that does not exist.
    fn begin(&mut self, step: &Step, passes: &[Pass]) -> Result<(), RunnerError>;

    /// `out [T, hidden]`: the rows of `table` that the step's tokens name.
    ///
    /// # Errors
    /// Here and below: if the device does not take the work ([`RunnerError::Step`]) or is lost
    /// ([`RunnerError::Fatal`]).
    fn embed(&mut self, table: &Self::Matrix, step: &Step, out: &mut Self::Buffer)
    -> Result<(), RunnerError>;

    /// `out = x / rms(x) * weight`, row by row. (Zhang and Sennrich 2019)
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn rms_norm(
        &mut self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// `x += delta`, then as [`Ops::rms_norm`].
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Buffer,
        delta: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// `out [rows, outputs] = x [rows, inputs] * matrix^T + bias`.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn linear(
        &mut self,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// For each row of `qkv [T, (heads + 2 * kv_heads) * head_dim]`: the norm of each query and key
    /// head where `norms` (query, key) are given, the rotation of queries and keys to the token's
    /// position, queries into `queries [T, heads * head_dim]`, keys and values into the token's slot
    /// of the layer's cache.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn rope_and_cache(
        &mut self,
        layer: usize,
        qkv: &Self::Buffer,
        norms: Option<(&Self::Vector, &Self::Vector)>,
        eps: f32,
        queries: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// `out [T, heads * head_dim]`: causal attention of `queries` to the cached keys and values of
    /// their own sequence, found through its block table; at most to the latest `window`.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn attention(
        &mut self,
        layer: usize,
        window: Option<usize>,
        step: &Step,
        queries: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// `out [T, inner] = silu(gate) * up` of `gate_up [T, 2 * inner]`.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn silu_mul(&mut self, gate_up: &Self::Buffer, out: &mut Self::Buffer) -> Result<(), RunnerError>;

    /// `out [rows of the pass, width]`: those rows of `x`. `index` is the pass's place among the step's.
    ///
    /// # Errors
    /// As [`Ops::embed`].
    fn gather_rows(
        &mut self,
        x: &Self::Buffer,
        index: usize,
        pass: &Pass,
        out: &mut Self::Buffer,
    ) -> Result<(), RunnerError>;

    /// Answers the wishes of a pass from its `logits`.
    ///
    /// # Errors
    /// As [`Ops::embed`], and [`RunnerError::Step`] if a row holds no usable number.
    fn sample(
        &mut self,
        logits: &Self::Buffer,
        step: &Step,
        index: usize,
        pass: &Pass,
    ) -> Result<(), RunnerError>;

    /// The answers to all wishes of the step that was begun first of those not yet asked for. Waits for it.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if a row holds no usable number; [`RunnerError::Fatal`] if the device is lost.
    fn answers(&mut self) -> Result<StepOutput, RunnerError>;
}

#[cfg(test)]
mod tests {
    use servelab_engine::{SequenceId, Want};

    use super::*;

    fn wants(rows: &[usize]) -> Vec<LogitsRow> {
        let want = |row: &usize| LogitsRow {
            row: *row,
            sequence: SequenceId(0),
            want: Want::Score { target: 0, top: 0 },
        };
        rows.iter().map(want).collect()
    }

    #[test]
    fn passes_hold_each_row_once_and_no_more_than_fit() {
        let passes = Pass::split(&wants(&[2, 3, 3, 3, 7, 8]), 2);
        let pass = |rows: &[usize], first_want, places: &[usize]| Pass {
            rows: rows.to_vec(),
            first_want,
            places: places.to_vec(),
        };
        assert_eq!(passes, [pass(&[2, 3], 0, &[0, 1, 1, 1]), pass(&[7, 8], 4, &[0, 1])]);
        assert_eq!(Pass::split(&wants(&[5]), 64), [pass(&[5], 0, &[0])]);
        assert_eq!(Pass::split(&[], 64), []);
    }
}
