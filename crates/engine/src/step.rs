//! Turns a plan into the arrays that the model computes from.

use std::ops::Range;
use std::sync::Arc;

use crate::request::TokenId;
use crate::runner::{Draw, FromLast, History, LogitsRow, SequenceId, Step, StepSequence, Want};
use crate::scheduler::Plan;
use crate::sequence::Sequence;

/// Fills `step` with the planned part of each running sequence, in the order of the plan.
pub(crate) fn build_step(plan: &Plan, running: &[Sequence], block_size: usize, step: &mut Step) {
    step.clear();
    step.copies.extend_from_slice(&plan.copies);
    debug_assert!(plan.copies.iter().all(|(from, _)| plan.copies.iter().all(|(_, to)| from != to)));
    for work in &plan.work {
        push_sequence(&running[work.running], work.tokens, block_size, step);
    }
}

fn push_sequence(sequence: &Sequence, count: usize, block_size: usize, step: &mut Step) {
    let first_token = step.tokens.len();
    let first_block = step.blocks.len();
    let positions = sequence.position()..sequence.position() + count;
    push_tokens(sequence, positions.clone(), step);
    step.positions.extend(positions.clone().map(|position| position as u32));
    step.slots.extend(positions.clone().map(|position| {
        let block = sequence.blocks[position / block_size];
        block.0 * block_size as u32 + (position % block_size) as u32
    }));
    step.blocks.extend_from_slice(&sequence.blocks[..positions.end.div_ceil(block_size)]);
    step.sequences.push(StepSequence {
        id: sequence.id,
        tokens: first_token..step.tokens.len(),
        blocks: first_block..step.blocks.len(),
        context_len: positions.end as u32,
    });
    push_scores(sequence, first_token, count, step);
    if positions.end == sequence.tokens.len() + sequence.ahead {
        push_draws(sequence, step);
    }
}

/// The tokens at these positions; the last may be one that the step before is still choosing.
fn push_tokens(sequence: &Sequence, positions: Range<usize>, step: &mut Step) {
    let known = sequence.tokens.len().min(positions.end);
    step.tokens.extend_from_slice(&sequence.tokens[positions.start.min(known)..known]);
    for _ in known..positions.end {
        step.from_last.push(FromLast { token: step.tokens.len(), answer: sequence.answer });
        step.tokens.push(0);
    }
}

/// Every prompt token after the first is scored in the row of the token before it.
fn push_scores(sequence: &Sequence, first_token: usize, count: usize, step: &mut Step) {
    let (false, Some(top)) = (sequence.prompt_scored, sequence.request.sampling.prompt_logprobs) else {
        return;
    };
    let targets = sequence.request.prompt.get(sequence.position() + 1..).unwrap_or_default();
    for (offset, target) in targets.iter().take(count).enumerate() {
        let want = Want::Score { target: *target, top };
        step.rows.push(LogitsRow { row: first_token + offset, sequence: sequence.id, want });
    }
}

/// The last token's row is drawn from once for each choice that the sequence stands for.
fn push_draws(sequence: &Sequence, step: &mut Step) {
    let row = step.tokens.len() - 1;
    for (offset, choice) in sequence.choices().enumerate() {
        let want = Want::Sample(draw(sequence, choice));
        let sequence = SequenceId(sequence.id.0 + offset as u64);
        step.rows.push(LogitsRow { row, sequence, want });
    }
}

fn draw(sequence: &Sequence, choice: u32) -> Draw {
    let request = &sequence.request;
    let index = sequence.generated() + sequence.ahead;
    let may_stop = index >= request.stop.min_tokens as usize;
    let banned: Arc<[TokenId]> = match may_stop {
        true => Arc::clone(&sequence.nothing),
        false => Arc::clone(&request.stop.stop_token_ids),
    };
    let history = request.sampling.needs_history().then(|| History {
        prompt: Arc::clone(&request.prompt),
        output: sequence.tokens[sequence.prompt_len()..].to_vec(),
    });
    Draw { sampling: Arc::clone(&request.sampling), choice, output_index: index as u32, banned, history }
}
