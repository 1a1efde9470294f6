//! All that the kernels have to know of a step, packed into one run of words, so that one copy brings it to the
//! GPU.
//!
//! The front has a fixed place for each list, given the size of the step, because a recorded graph names
//! addresses. What varies from step to step comes behind it, packed tightly, and is found by offsets that are
//! themselves uploaded: block tables by the `table` of an item, changes of logits by the `changes` of a draw.
//!
//! ```text
//! | tokens | positions | slots | picked rows | draws | item counts | items ... tables ... changes ... copies |
//! '------------------------- fixed for a size --------------------'-------------- the tail ----------------'
//! ```

use std::ops::Range;

use servelab_engine::{RunnerError, Step, StepSequence, Want};

use super::draws::{ChangeWords, DrawWords, Draws};
use super::geometry::{
    DecodeItem, DecodeSequence, PrefillChunk, PrefillItem, PrefillTile, plan_decode, plan_prefill,
};
use super::words::{Words, bytes_of};
use crate::ops::Pass;

/// In front of the number of an answer of the last step, whose token stays on the GPU (`kernels/rows.cu`).
const FROM_LAST: u32 = 1 << 31;
/// Sections begin at multiples of this: what 16-byte loads need.
const ALIGNMENT: usize = 16;

/// Sizes of the lists whose place is fixed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StepSize {
    /// Rows of the step.
    pub tokens: usize,
    /// Rows whose logits are computed, over all passes.
    pub picked: usize,
    pub answers: usize,
}

impl StepSize {
    /// Every one of `rows` sequences computes a token and wants the next.
    pub fn decode(rows: usize) -> Self {
        Self { tokens: rows, picked: rows, answers: rows }
    }

    pub fn of(step: &Step, passes: &[Pass]) -> Self {
        let picked = passes.iter().map(|pass| pass.rows.len()).sum();
        Self { tokens: step.tokens.len(), picked, answers: step.rows.len() }
    }
}

/// Where each list stands, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub tokens: Range<usize>,
    pub positions: Range<usize>,
    pub slots: Range<usize>,
    pub picked: Range<usize>,
    pub draws: Range<usize>,
    /// One for each list of decode items.
    pub counts: Range<usize>,
    /// Where what varies begins.
    pub tail: usize,
}

impl Layout {
    /// For `lists` lists of decode items.
    pub fn new(size: StepSize, lists: usize) -> Self {
        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(ALIGNMENT);
            start..start + bytes
        };
        let mut layout = Self {
            tokens: place(size.tokens * 4),
            positions: place(size.tokens * 4),
            slots: place(size.tokens * 4),
            picked: place(size.picked * 4),
            draws: place(size.answers * size_of::<DrawWords>()),
            counts: place(lists * 4),
            tail: 0,
        };
        layout.tail = end;
        layout
    }
}

/// Most of everything, for which memory is made once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub tokens: usize,
    /// Sequences of a step.
    pub sequences: usize,
    /// Answers of a step.
    pub answers: usize,
    /// Blocks of one sequence.
    pub blocks_per_sequence: usize,
    /// Decode items of one list.
    pub items: usize,
    pub vocabulary: usize,
    pub group: usize,
    /// Draws whose logits are changed, in one launch.
    pub scratch_rows: usize,
}

impl Limits {
    /// Bytes of the largest step: all lists at their longest, but for the changes of logits, of which there is
    /// room for two whole vocabularies and for some for every answer. A step with more is refused.
    pub fn bytes(&self, lists: usize, tile: PrefillTile) -> usize {
        let size = StepSize { tokens: self.tokens, picked: self.tokens, answers: self.answers };
        let prefill_items = self.tokens * self.group / tile.rows as usize + self.sequences;
        let changes = 2 * self.vocabulary + 64 * self.answers;
        Layout::new(size, lists).tail
            + lists * self.items * size_of::<DecodeItem>()
            + prefill_items * size_of::<PrefillItem>()
            + self.sequences * self.blocks_per_sequence * 4
            + changes * size_of::<ChangeWords>()
            + self.sequences * 8
            + 4 * ALIGNMENT
    }
}

/// A part of the answers that one launch of the sampling kernel gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLaunch {
    /// Which pass.
    pub pass: usize,
    pub first: usize,
    pub count: usize,
    pub scratch_rows: usize,
    pub any_logprobs: bool,
}

/// A step, packed. Keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct PackedStep {
    bytes: Vec<u8>,
    pub size: StepSize,
    pub layout: Layout,
    pub draws: Draws,
    pub launches: Vec<SampleLaunch>,
    /// Whether there are sequences with one token, and so decode items.
    pub decodes: bool,
    pub prefill_items: Range<usize>,
    pub prefill_count: usize,
    pub copies: Range<usize>,
    pub copy_count: usize,
    chunks: Vec<PrefillChunk>,
    sequences: Vec<DecodeSequence>,
    tables: Vec<u32>,
    items: Vec<DecodeItem>,
    all_items: Vec<Vec<DecodeItem>>,
    prefill: Vec<PrefillItem>,
}

/// What packing depends on besides the step.
#[derive(Clone, Copy, Debug)]
pub struct Packing<'a> {
    pub limits: Limits,
    pub group: u32,
    pub tile: PrefillTile,
    /// The windows that layers have, each once: a list of decode items for each.
    pub windows: &'a [Option<u32>],
}

impl PackedStep {
    /// Packs `step`, which was checked, as if it had `size`: what is missing becomes padding.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if there are more sequences, answers or changes of logits than there is room for.
    ///
    /// # Panics
    /// If `size` is less than the step's.
    pub fn pack(
        &mut self,
        step: &Step,
        passes: &[Pass],
        size: StepSize,
        packing: &Packing<'_>,
    ) -> Result<(), RunnerError> {
        let least = StepSize::of(step, passes);
        assert!(least.tokens <= size.tokens && least.picked <= size.picked && least.answers <= size.answers);
        packing.check(step)?;
        self.size = size;
        self.layout = Layout::new(size, packing.windows.len());
        self.bytes.clear();
        self.bytes.resize(self.layout.tail, 0);
        self.put_rows(step, passes)?;
        self.put_attention(step, packing);
        self.collect_draws(step, passes, packing.limits.scratch_rows)?;
        self.put_draws();
        self.copies = self.append(&flat(step.copies.iter().map(|(from, to)| [from.0, to.0])));
        self.copy_count = step.copies.len();
        let (bytes, most) = (self.bytes.len(), packing.limits.bytes(packing.windows.len(), packing.tile));
        if bytes > most {
            let changes = self.draws.changes.len();
            return Err(RunnerError::Step(format!(
                "penalties and biases change {changes} logits in one step, which is more than the GPU has room for"
            )));
        }
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Items of the list for the window with this index, from the tail's start.
    pub fn items_at(index: usize, items: usize) -> usize {
        index * items * size_of::<DecodeItem>()
    }

    fn put_rows(&mut self, step: &Step, passes: &[Pass]) -> Result<(), RunnerError> {
        let layout = self.layout.clone();
        let mut tokens = step.tokens.clone();
        for pending in &step.from_last {
            let token = tokens.get_mut(pending.token).ok_or_else(no_such_row)?;
            *token = FROM_LAST | pending.answer as u32;
        }
        self.put(layout.tokens.start, &tokens);
        self.put(layout.positions.start, &step.positions);
        self.fill(layout.slots.clone(), 0xff);
        self.put(layout.slots.start, &step.slots);
        self.fill(layout.picked.clone(), 0xff);
        let picked: Vec<u32> = passes.iter().flat_map(|pass| &pass.rows).map(|row| *row as u32).collect();
        self.put(layout.picked.start, &picked);
        Ok(())
    }

    fn put_attention(&mut self, step: &Step, packing: &Packing<'_>) {
        self.sequences.clear();
        self.chunks.clear();
        self.tables.clear();
        for sequence in &step.sequences {
            let table = self.tables.len() as u32;
            self.tables.extend(step.blocks[sequence.blocks.clone()].iter().map(|block| block.0));
            let (row, tokens) = (sequence.tokens.start as u32, sequence.tokens.len() as u32);
            let context_len = sequence.context_len;
            match tokens {
                0 => {}
                1 => self.sequences.push(DecodeSequence { row, table, context_len }),
                _ => self.chunks.push(PrefillChunk { first_row: row, tokens, context_len, table }),
            }
        }
        self.decodes = !self.sequences.is_empty();
        // Only where layers have several windows is there a gap behind a list.
        let most = packing.limits.items;
        self.all_items.resize_with(packing.windows.len(), Vec::new);
        for (index, window) in packing.windows.iter().enumerate() {
            plan_decode(&self.sequences, *window, most, &mut self.items);
            std::mem::swap(&mut self.items, &mut self.all_items[index]);
        }
        let last = packing.windows.len().saturating_sub(1);
        let items_bytes = Self::items_at(last, most)
            + self.all_items.last().map_or(0, |items| items.len() * size_of::<DecodeItem>());
        // Tables are counted in words from the tail's start.
        let shift = (items_bytes / 4) as u32;
        self.bytes.resize(self.layout.tail + items_bytes, 0);
        for index in 0..self.all_items.len() {
            let mut items = std::mem::take(&mut self.all_items[index]);
            items.iter_mut().for_each(|item| item.table += shift);
            self.put(self.layout.counts.start + 4 * index, &[items.len() as u32]);
            self.put(self.layout.tail + Self::items_at(index, most), &items);
            self.all_items[index] = items;
        }
        let tables = std::mem::take(&mut self.tables);
        self.append(&tables);
        self.tables = tables;
        plan_prefill(&self.chunks, packing.group, packing.tile, &mut self.prefill);
        self.prefill.iter_mut().for_each(|item| item.table += shift);
        let prefill = std::mem::take(&mut self.prefill);
        self.prefill_items = self.append(&prefill);
        self.prefill_count = prefill.len();
        self.prefill = prefill;
    }

    /// The draws of all passes, and the launches that answer them: a new one for each pass, and one more
    /// whenever the scratch for changed logits is full.
    fn collect_draws(
        &mut self,
        step: &Step,
        passes: &[Pass],
        scratch_rows: usize,
    ) -> Result<(), RunnerError> {
        self.draws.clear();
        self.launches.clear();
        for (index, pass) in passes.iter().enumerate() {
            self.draws.scratch_rows = 0;
            let mut launch = SampleLaunch {
                pass: index,
                first: self.draws.draws.len(),
                count: 0,
                scratch_rows: 0,
                any_logprobs: false,
            };
            for (place, want) in pass.wants(step) {
                if self.draws.scratch_rows as usize == scratch_rows {
                    let next = launch.first + launch.count;
                    self.launches.push(launch);
                    launch = SampleLaunch { first: next, count: 0, any_logprobs: false, ..launch };
                    self.draws.scratch_rows = 0;
                }
                self.draws.push(place, want)?;
                launch.count += 1;
                launch.scratch_rows = self.draws.scratch_rows as usize;
                launch.any_logprobs |= wants_logprobs(&want.want);
            }
            self.launches.push(launch);
        }
        Ok(())
    }

    /// Changes are counted in their own size from the tail's start.
    fn put_draws(&mut self) {
        let changes = std::mem::take(&mut self.draws.changes);
        let at = self.append(&changes);
        self.draws.changes = changes;
        self.draws.shift_changes(((at.start - self.layout.tail) / size_of::<ChangeWords>()) as u32);
        let mut draws = self.draws.draws.clone();
        draws.resize(self.size.answers, DrawWords::padding());
        self.put(self.layout.draws.start, &draws);
    }

    fn put<T: Words>(&mut self, at: usize, values: &[T]) {
        let values = bytes_of(values);
        self.bytes[at..at + values.len()].copy_from_slice(values);
    }

    fn fill(&mut self, at: Range<usize>, byte: u8) {
        self.bytes[at].fill(byte);
    }

    /// Puts a list behind what is there; where, in bytes from the start.
    fn append<T: Words>(&mut self, values: &[T]) -> Range<usize> {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes_of(values));
        start..self.bytes.len()
    }
}

impl Packing<'_> {
    fn check(&self, step: &Step) -> Result<(), RunnerError> {
        let most = &self.limits;
        let (sequences, answers) = (step.sequences.len(), step.rows.len());
        if sequences > most.sequences || answers > most.answers {
            return Err(RunnerError::Step(format!(
                "a step of {sequences} sequences and {answers} answers; the runner was built for {} and {}",
                most.sequences, most.answers
            )));
        }
        let blocks = |sequence: &StepSequence| sequence.blocks.len();
        match step.sequences.iter().map(blocks).max() {
            Some(blocks) if blocks > most.blocks_per_sequence => Err(RunnerError::Step(format!(
                "a sequence of {blocks} blocks; the runner was built for {}",
                most.blocks_per_sequence
            ))),
            _ => Ok(()),
        }
    }
}

fn wants_logprobs(want: &Want) -> bool {
    match want {
        Want::Score { .. } => true,
        Want::Sample(draw) => draw.sampling.logprobs.is_some(),
    }
}

fn no_such_row() -> RunnerError {
    RunnerError::Step("a token of the last step stands for a row that does not exist".to_owned())
}

fn flat(pairs: impl Iterator<Item = [u32; 2]>) -> Vec<u32> {
    pairs.flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use servelab_engine::{BlockId, Draw, FromLast, LogitsRow, SamplingParams, SequenceId};

    use super::*;

    /// A row that is padding.
    const NONE: u32 = u32::MAX;

    fn read(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    fn limits() -> Limits {
        Limits {
            tokens: 64,
            sequences: 8,
            answers: 16,
            blocks_per_sequence: 8,
            items: 32,
            vocabulary: 96,
            group: 2,
            scratch_rows: 2,
        }
    }

    const TILE: PrefillTile = PrefillTile { rows: 128, keys: 64, warps: 4 };

    fn packing(windows: &[Option<u32>]) -> Packing<'_> {
        Packing { limits: limits(), group: 2, tile: TILE, windows }
    }

    fn sample(row: usize, bias: Option<u32>) -> LogitsRow {
        let mut sampling = SamplingParams::greedy();
        sampling.logit_bias.extend(bias.map(|token| (token, 1.0)));
        let draw = Draw {
            sampling: Arc::new(sampling),
            choice: 0,
            output_index: 0,
            banned: [].into(),
            history: None,
        };
        LogitsRow { row, sequence: SequenceId(0), want: Want::Sample(draw) }
    }

    /// Two sequences that decode, one of them a token of the last step, and a chunk of three tokens.
    fn step() -> Step {
        let sequence = |tokens: Range<usize>, blocks: Range<usize>, context_len| StepSequence {
            id: SequenceId(0),
            tokens,
            blocks,
            context_len,
        };
        Step {
            tokens: vec![5, 0, 7, 8, 9],
            from_last: vec![FromLast { token: 1, answer: 3 }],
            positions: vec![20, 2, 0, 1, 2],
            slots: vec![100, 50, 0, 1, 2],
            blocks: [6, 6, 3, 0].map(BlockId).to_vec(),
            sequences: vec![sequence(0..1, 0..2, 21), sequence(1..2, 2..3, 3), sequence(2..5, 3..4, 3)],
            copies: vec![(BlockId(1), BlockId(2))],
            rows: vec![sample(0, Some(4)), sample(1, None), sample(4, Some(5))],
        }
    }

    #[test]
    fn every_list_stands_where_the_layout_says() {
        let step = step();
        let passes = Pass::split(&step.rows, 64);
        let mut packed = PackedStep::default();
        let windows = [None, Some(2)];
        packed.pack(&step, &passes, StepSize::of(&step, &passes), &packing(&windows)).unwrap();
        let (layout, bytes) = (packed.layout.clone(), packed.bytes().to_vec());
        let list = |range: &Range<usize>| read(&bytes[range.clone()]);
        assert_eq!(list(&layout.tokens), [5, FROM_LAST | 3, 7, 8, 9]);
        assert_eq!(list(&layout.positions), [20, 2, 0, 1, 2]);
        assert_eq!(list(&layout.slots), [100, 50, 0, 1, 2]);
        assert_eq!(list(&layout.picked), [0, 1, 4]);
        assert_eq!(list(&layout.counts), [2, 2]);
        assert_eq!((list(&packed.copies), packed.copy_count), (vec![1, 2], 1));
        // Items: row, table, begin, end. The tables of both lists lead to the same blocks.
        let tail = read(&bytes[layout.tail..]);
        let item = |list: usize, index: usize| {
            let at = PackedStep::items_at(list, 32) / 4 + 8 * index;
            tail[at..at + 4].to_vec()
        };
        let blocks = |table: u32, count: usize| tail[table as usize..][..count].to_vec();
        assert_eq!((item(0, 0)[0], &item(0, 0)[2..]), (0, &[0, 21][..]));
        assert_eq!((item(1, 0)[0], &item(1, 0)[2..]), (0, &[19, 21][..]), "the window's part");
        assert_eq!(item(1, 1)[2..], [1, 3]);
        assert_eq!((blocks(item(0, 0)[1], 2), blocks(item(1, 1)[1], 1)), (vec![6, 6], vec![3]));
        // The chunk: first row, tokens, context, table.
        let chunk = list(&packed.prefill_items);
        assert_eq!((packed.prefill_count, &chunk[..3]), (1, &[2, 3, 3][..]));
        assert_eq!(blocks(chunk[3], 1), [0]);
        // Draws lead to their changes: token and bias.
        let draws = list(&layout.draws);
        let changes = |draw: usize| draws[20 * draw + 14]..draws[20 * draw + 15];
        for (draw, token) in [(0, 4), (2, 5)] {
            assert_eq!(changes(draw).len(), 1);
            let at = 4 * changes(draw).start as usize;
            assert_eq!(tail[at..at + 2], [token, 1.0f32.to_bits()]);
        }
        assert!(changes(1).is_empty());
        assert!(bytes.len() <= limits().bytes(2, TILE));
    }

    #[test]
    fn a_smaller_batch_is_padded_to_the_recorded_one() {
        let step = step();
        let two = Step {
            tokens: step.tokens[..2].to_vec(),
            positions: step.positions[..2].to_vec(),
            slots: step.slots[..2].to_vec(),
            sequences: step.sequences[..2].to_vec(),
            rows: step.rows[..2].to_vec(),
            ..step
        };
        let passes = Pass::split(&two.rows, 64);
        let mut packed = PackedStep::default();
        packed.pack(&two, &passes, StepSize::decode(4), &packing(&[None])).unwrap();
        let list = |range: &Range<usize>| read(&packed.bytes()[range.clone()]);
        assert_eq!(packed.layout, Layout::new(StepSize::decode(4), 1));
        assert_eq!(list(&packed.layout.tokens)[2..], [0, 0]);
        assert_eq!(list(&packed.layout.slots)[2..], [NONE, NONE]);
        assert_eq!(list(&packed.layout.picked)[2..], [NONE, NONE]);
        assert_eq!(list(&packed.layout.draws)[40], NONE);
        assert_eq!(list(&packed.layout.counts), [2], "no items for padding");
        assert_eq!(packed.prefill_count, 0);
    }

    #[test]
    fn a_full_scratch_starts_another_launch() {
        let mut step = step();
        step.rows = (0..5).map(|row| sample(row, (row != 1).then_some(3))).collect();
        let passes = Pass::split(&step.rows, 64);
        let mut packed = PackedStep::default();
        packed.pack(&step, &passes, StepSize::of(&step, &passes), &packing(&[None])).unwrap();
        let launches: Vec<_> =
            packed.launches.iter().map(|l| (l.pass, l.first, l.count, l.scratch_rows)).collect();
        assert_eq!(launches, [(0, 0, 3, 2), (0, 3, 2, 2)]);
        // Two passes are two launches at least.
        let passes = Pass::split(&step.rows, 4);
        packed.pack(&step, &passes, StepSize::of(&step, &passes), &packing(&[None])).unwrap();
        let launches: Vec<_> = packed.launches.iter().map(|l| (l.pass, l.first, l.count)).collect();
        assert_eq!(launches, [(0, 0, 3), (0, 3, 1), (1, 4, 1)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let step = step();
        let passes = Pass::split(&step.rows, 64);
        let size = StepSize::of(&step, &passes);
        let refused = |limits: Limits| {
            let packing = Packing { limits, ..packing(&[None]) };
            PackedStep::default().pack(&step, &passes, size, &packing).unwrap_err().to_string()
        };
        assert!(refused(Limits { sequences: 2, ..limits() }).contains("3 sequences"));
        assert!(refused(Limits { blocks_per_sequence: 1, ..limits() }).contains("2 blocks"));
    }
}
