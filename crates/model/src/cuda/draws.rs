//! What the sampling kernel is told and what it answers: the engine's wishes as plain words and back.
#![allow(unsafe_code)]

use std::collections::HashMap;

use servelab_engine::{Draw, LogitsRow, RowOutput, RunnerError, TokenId, TokenLogprobs, Want};

use super::geometry::MOST_LOGPROBS;
use super::words::Words;

/// "None" in a word: no row, no limit, no target.
const NONE: u32 = u32::MAX;

/// One wish, as `draw_words` of `kernels/sample.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct DrawWords {
    row: u32,
    target: u32,
    top: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    frequency: f32,
    presence: f32,
    seed: [u32; 2],
    choice: u32,
    output_index: u32,
    changes: [u32; 2],
    scratch_row: u32,
    reserved: [u32; 3],
}

// SAFETY: 20 words of 4 bytes each, which is checked below.
unsafe impl Words for DrawWords {}
const _: () = assert!(size_of::<DrawWords>() == 80);

impl DrawWords {
    /// Fills up a recorded graph: nothing is answered.
    pub fn padding() -> Self {
        Self { row: NONE, ..Self::default() }
    }
}

/// What happens to the logit of one token, as `change_words` of `kernels/sample.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct ChangeWords {
    token: u32,
    bias: f32,
    seen: u32,
    count: u32,
}

// SAFETY: 4 words of 4 bytes each, which is checked below.
unsafe impl Words for ChangeWords {}
const _: () = assert!(size_of::<ChangeWords>() == 16);

/// Words of one answer's log-probabilities: its own, its rank, ids and log-probabilities of the likeliest.
pub const LOGPROB_WORDS: usize = 2 + 2 * MOST_LOGPROBS as usize;

/// The wishes of a launch; keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct Draws {
    pub draws: Vec<DrawWords>,
    /// Biases, bans and penalties of all draws.
    pub changes: Vec<ChangeWords>,
    /// Rows of the scratch that draws with changes need.
    pub scratch_rows: u32,
    changed: HashMap<TokenId, ChangeWords>,
}

impl Draws {
    pub fn clear(&mut self) {
        self.draws.clear();
        self.changes.clear();
        self.scratch_rows = 0;
    }

    /// Moves the changes that all draws refer to: they stand behind `by` others.
    pub fn shift_changes(&mut self, by: u32) {
        for draw in &mut self.draws {
            draw.changes = draw.changes.map(|at| at + by);
        }
    }

    /// Adds what is wanted of row `row` of the logits.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if more than [`MOST_LOGPROBS`] alternatives are wanted.
    pub fn push(&mut self, row: usize, want: &LogitsRow) -> Result<(), RunnerError> {
        let words = match &want.want {
            Want::Score { target, top } => DrawWords {
                row: row as u32,
                target: *target,
                top: *top,
                temperature: 0.0,
                ..DrawWords::default()
            },
            Want::Sample(draw) => self.draw(row, draw),
        };
        if words.top != NONE && words.top > MOST_LOGPROBS {
            return Err(RunnerError::Step(format!(
                "{} log-probabilities a token; the GPU's sampler reports up to {MOST_LOGPROBS}",
                words.top
            )));
        }
        self.draws.push(words);
        Ok(())
    }

    fn draw(&mut self, row: usize, draw: &Draw) -> DrawWords {
        let params = &*draw.sampling;
        let first = self.changes.len() as u32;
        self.collect_changes(draw);
        let last = self.changes.len() as u32;
        let words = DrawWords {
            row: row as u32,
            target: NONE,
            top: params.logprobs.unwrap_or(NONE),
            temperature: params.temperature,
            top_k: params.top_k.unwrap_or(NONE),
            top_p: params.top_p,
            min_p: params.min_p,
            repetition: params.repetition_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            seed: [params.seed as u32, (params.seed >> 32) as u32],
            choice: draw.choice,
            output_index: draw.output_index,
            changes: [first, last],
            scratch_row: self.scratch_rows,
            reserved: [0; 3],
        };
        self.scratch_rows += u32::from(first < last);
        words
    }

    /// One change a token, however often it is named. Biases of one token are summed first, where the CPU's
    /// sampler adds one after the other: that may round otherwise.
    fn collect_changes(&mut self, draw: &Draw) {
        let of = |token: TokenId| ChangeWords { token, ..ChangeWords::default() };
        self.changed.clear();
        for (token, bias) in &draw.sampling.logit_bias {
            self.changed.entry(*token).or_insert_with(|| of(*token)).bias += bias;
        }
        for token in draw.banned.iter() {
            self.changed.entry(*token).or_insert_with(|| of(*token)).bias = f32::NEG_INFINITY;
        }
        if let Some(history) = &draw.history {
            for token in history.prompt.iter() {
                self.changed.entry(*token).or_insert_with(|| of(*token)).seen = 1;
            }
            for token in &history.output {
                let change = self.changed.entry(*token).or_insert_with(|| of(*token));
                change.seen = 1;
                change.count += 1;
            }
        }
        self.changes.extend(self.changed.values());
    }
}

/// One answer as the kernel left it: token, status, and [`LOGPROB_WORDS`] words if log-probabilities were
/// wanted. `vocabulary` bounds how many alternatives there are.
///
/// # Errors
/// [`RunnerError::Step`] if there was nothing to answer, as the CPU's sampler says it.
pub fn read_answer(
    draw: &DrawWords,
    token: TokenId,
    status: u32,
    logprobs: &[f32],
    vocabulary: usize,
) -> Result<RowOutput, RunnerError> {
    let failed = |reason: &str| Err(RunnerError::Step(reason.to_owned()));
    match status {
        0 => {}
        1 => return failed("the model's logits are not finite numbers; its weights may be damaged"),
        2 => return failed("logit bias and banned tokens leave no token to choose"),
        3 => return failed(&format!("token {} is not in the vocabulary", draw.target)),
        other => return failed(&format!("the sampling kernel left the status {other}")),
    }
    if draw.top == NONE {
        return Ok(RowOutput { token, logprobs: None });
    }
    let (head, alternatives) = logprobs.split_at(2);
    let (ids, values) = alternatives.split_at(MOST_LOGPROBS as usize);
    let top = ids.iter().zip(values).take(vocabulary.min(draw.top as usize));
    let logprobs = TokenLogprobs {
        logprob: head[0],
        rank: head[1].to_bits(),
        top: top.map(|(id, value)| (id.to_bits(), *value)).collect(),
    };
    Ok(RowOutput { token, logprobs: Some(logprobs) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use servelab_engine::{History, SamplingParams, SequenceId};

    use super::*;

    fn row(want: Want) -> LogitsRow {
        LogitsRow { row: 0, sequence: SequenceId(1), want }
    }

    fn draw(sampling: SamplingParams) -> Draw {
        let sampling = Arc::new(sampling);
        Draw { sampling, choice: 0, output_index: 0, banned: [].into(), history: None }
    }

    #[test]
    fn a_token_is_changed_once_however_often_it_is_named() {
        let sampling =
            SamplingParams { logit_bias: vec![(3, 1.0), (3, 0.5), (4, -1.0)], ..SamplingParams::greedy() };
        let history = History { prompt: [3u32, 5].into(), output: vec![5, 5, 6] };
        let draw = Draw { banned: [4u32].into(), history: Some(history), ..draw(sampling) };
        let mut draws = Draws::default();
        draws.push(7, &row(Want::Sample(draw))).unwrap();
        let mut changes = draws.changes.clone();
        changes.sort_by_key(|change| change.token);
        let change = |token, bias, seen, count| ChangeWords { token, bias, seen, count };
        let expected = [
            change(3, 1.5, 1, 0),
            change(4, f32::NEG_INFINITY, 0, 0),
            change(5, 0.0, 1, 2),
            change(6, 0.0, 1, 1),
        ];
        assert_eq!(changes, expected);
        assert_eq!((draws.draws[0].row, draws.draws[0].changes, draws.scratch_rows), (7, [0, 4], 1));
    }

    #[test]
    fn draws_without_changes_need_no_scratch() {
        let mut draws = Draws::default();
        draws.push(0, &row(Want::Sample(draw(SamplingParams::greedy())))).unwrap();
        draws.push(1, &row(Want::Score { target: 9, top: 2 })).unwrap();
        assert_eq!((draws.scratch_rows, draws.changes.len()), (0, 0));
        let too_many = SamplingParams { logprobs: Some(21), ..SamplingParams::greedy() };
        assert!(draws.push(0, &row(Want::Sample(draw(too_many)))).is_err());
    }

    #[test]
    fn answers_are_read_as_the_cpu_gives_them() {
        let mut words = [0.0f32; LOGPROB_WORDS];
        (words[0], words[1]) = (-0.5, f32::from_bits(2));
        (words[2], words[3]) = (f32::from_bits(8), f32::from_bits(4));
        (words[22], words[23]) = (-0.25, -0.5);
        let draw = DrawWords { top: 2, ..DrawWords::default() };
        let logprobs = read_answer(&draw, 4, 0, &words, 100).unwrap().logprobs.unwrap();
        assert_eq!((logprobs.logprob, logprobs.rank), (-0.5, 2));
        assert_eq!(logprobs.top, [(8, -0.25), (4, -0.5)]);
        let only_token = read_answer(&draw, 0, 0, &words, 1).unwrap().logprobs.unwrap();
        assert_eq!(only_token.top.len(), 1);
        for status in 1..5 {
            assert!(read_answer(&draw, 4, status, &words, 100).is_err());
        }
    }
}
