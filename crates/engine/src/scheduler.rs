//! Decides what the next step computes, and takes its outcome in.
//!
//! One plan, in this order, under `max_batched_tokens`:
//!
//! 1. every running sequence that decodes gets its one token; when blocks run out, the running
//!    sequence of the lowest precedence gives all of its own back and waits again (preemption by
//!    recomputation);
//! 2. running sequences whose prompt is not yet computed get a chunk of it;
//! 3. waiting sequences are admitted, strictly in order of precedence: if the first one has no room,
//!    nobody behind it overtakes.
//!
//! A sequence is admitted only if all tokens known of it fit, and gets the blocks for them at once.
//! So only decoding ever needs more blocks, and only decoding ever preempts.
//!
//! A step may be planned while the one before is under way. A sequence of that step is then taken to go on: its next
//! token, not known yet, is computed as the other step's answer. What comes out for a sequence that has ended or was
//! preempted meanwhile is dropped. Its blocks may be given away at once: steps are computed in the order in which
//! they were submitted.
//!
//! Invariant: the running sequence of the highest precedence is never preempted by another one, and
//! fits alone (checked at admission to the queue). So each step makes progress, and every request
//! ends.

use std::collections::BTreeMap;

use crate::admission::{AdmissionError, check_request};
use crate::block_pool::{BlockId, BlockPool, Link};
use crate::config::EngineConfig;
use crate::event::{Event, StepReport};
use crate::request::{FinishReason, Request, RequestId};
use crate::runner::{RowOutput, RunnerError, SequenceId, Step, StepOutput, Want};
use crate::sequence::{Precedence, Publication, Sequence};

/// What one step computes, as plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Decodes first, then chunks.
    pub work: Vec<Work>,
    /// Blocks to copy (from, to) before anything is computed. No block is both a source and a
    /// destination: only choices of one request share a block that is written to, they write to it
    /// in the same step and stand next to each other, so the last of them either writes in place or
    /// is the last sequence of all.
    pub copies: Vec<(BlockId, BlockId)>,
    pub admitted: u32,
    pub preempted: u32,
}

/// The part of one sequence in a step: the next `tokens` tokens that are not yet computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Index into the running sequences, good until the step is built.
    pub running: usize,
    /// Finds the sequence later, if it still runs.
    pub precedence: Precedence,
    pub tokens: usize,
    pub decodes: bool,
}

/// A request that has not ended.
#[derive(Clone, Copy, Debug)]
struct Alive {
    /// Of its first choice.
    precedence: Precedence,
    unfinished: u32,
}

/// Counted since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub prefix_query_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
}

/// All sequences and all blocks.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub config: EngineConfig,
    pub pool: BlockPool,
    /// Sequences that hold blocks, in order of precedence.
    pub running: Vec<Sequence>,
    /// Sequences that hold none.
    pub waiting: BTreeMap<Precedence, Sequence>,
    alive: BTreeMap<RequestId, Alive>,
    /// Requests that were never admitted; the others in `waiting` were preempted.
    new_waiting: u32,
    next_ordinal: u64,
    next_sequence: u64,
    pub counters: Counters,
    /// Events between two steps, reported by the next one.
    pub pending: Vec<Event>,
    /// The first waiting sequence had no room when the pool's release count was this.
    blocked: Option<(Precedence, u64)>,
}

impl Scheduler {
    pub fn new(config: EngineConfig) -> Self {
        Self {
            pool: BlockPool::new(config.num_blocks, config.block_size as usize),
            config,
            running: Vec::new(),
            waiting: BTreeMap::new(),
            alive: BTreeMap::new(),
            new_waiting: 0,
            next_ordinal: 0,
            next_sequence: 0,
            counters: Counters::default(),
            pending: Vec::new(),
            blocked: None,
        }
    }

    fn block_size(&self) -> usize {
        self.config.block_size as usize
    }

    // ---- requests come and go between steps ----

    pub fn add(&mut self, request: Request) -> Result<(), AdmissionError> {
        let id = request.id;
        if self.alive.contains_key(&id) || self.pending.iter().any(|event| event.request() == id) {
            return Err(AdmissionError::DuplicateId(id));
        }
        check_request(&request, &self.config)?;
        if self.new_waiting >= self.config.max_waiting {
            return Err(AdmissionError::QueueFull { max_waiting: self.config.max_waiting });
        }
        let unfinished = request.n;
        let first = SequenceId(self.next_sequence);
        let sequence = Sequence::new(first, self.next_ordinal, request, self.block_size());
        let precedence = sequence.precedence;
        self.next_sequence += u64::from(unfinished);
        self.next_ordinal += 1;
        self.new_waiting += 1;
        self.alive.insert(id, Alive { precedence, unfinished });
        self.waiting.insert(precedence, sequence);
        Ok(())
    }

    /// Ends all choices of a request. False if it has ended already.
    pub fn abort(&mut self, id: RequestId) -> bool {
        let Some(alive) = self.alive.get(&id).copied() else { return false };
        let first = alive.precedence;
        let last = Precedence { choice: u32::MAX, ..first };
        let held = self.running.iter().filter(|sequence| sequence.request.id == id);
        let waits = self.waiting.range(first..=last).map(|(_, sequence)| sequence);
        let mut precedences: Vec<_> = held.chain(waits).map(|sequence| sequence.precedence).collect();
        precedences.sort();
        for precedence in precedences {
            self.end(precedence, FinishReason::Abort);
        }
        true
    }

    /// Ends one choice that the caller saw a stop string in. False if it has ended already or has
    /// not generated anything.
    pub fn finish_choice(&mut self, id: RequestId, choice: u32) -> bool {
        let Some(alive) = self.alive.get(&id) else { return false };
        let precedence = Precedence { choice, ..alive.precedence };
        let sequence = match self.position(precedence) {
            Ok(at) => Some(&self.running[at]),
            Err(_) => self.waiting.get(&precedence),
        };
        if sequence.is_none_or(|sequence| sequence.generated() == 0) {
            return false;
        }
        self.end(precedence, FinishReason::Stop(None));
        true
    }

    fn position(&self, precedence: Precedence) -> Result<usize, usize> {
        self.running.binary_search_by_key(&precedence, |sequence| sequence.precedence)
    }

    /// Removes a sequence between two steps.
    fn end(&mut self, precedence: Precedence, reason: FinishReason) {
        let sequence = match self.position(precedence) {
            Ok(at) => Some(self.running.remove(at)),
            Err(_) => self.remove_waiting(precedence),
        };
        let Some(mut sequence) = sequence else { return };
        sequence.release(&mut self.pool);
        let mut events = std::mem::take(&mut self.pending);
        self.report_end(&sequence, &reason, &mut events);
        self.pending = events;
    }

    fn remove_waiting(&mut self, precedence: Precedence) -> Option<Sequence> {
        let sequence = self.waiting.remove(&precedence)?;
        self.new_waiting -= u32::from(!sequence.preempted);
        Some(sequence)
    }

    /// Reports the end of every choice that the sequence stands for.
    fn report_end(&mut self, sequence: &Sequence, reason: &FinishReason, events: &mut Vec<Event>) {
        let request = sequence.request.id;
        for choice in sequence.choices() {
            events.push(Event::Finished { request, choice, reason: reason.clone() });
        }
        let Some(alive) = self.alive.get_mut(&request) else { return };
        alive.unfinished -= 1 + sequence.unforked;
        if alive.unfinished == 0 {
            self.alive.remove(&request);
        }
    }

    /// Forgets all published content. Running sequences go on and publish nothing more.
    pub fn reset_prefix_cache(&mut self) -> bool {
        for sequence in &mut self.running {
            sequence.publication = Publication::Off;
        }
        self.pool.forget_all() > 0
    }

    // ---- plan ----

    /// Plans the next step: takes and gives back blocks, and moves sequences between the queues.
    pub fn plan(&mut self, plan: &mut Plan, events: &mut Vec<Event>) {
        plan.work.clear();
        plan.copies.clear();
        (plan.admitted, plan.preempted) = (0, 0);
        for sequence in &mut self.running {
            sequence.planned = 0;
        }
        let mut budget = self.config.max_batched_tokens as usize;
        budget -= self.plan_decodes(plan, events);
        budget -= self.plan_chunks(budget);
        if plan.preempted == 0 {
            self.admit_waiting(plan, budget, events);
        }
        self.collect_work(plan);
    }

    /// One token for each sequence that decodes. Returns the tokens planned, which are no more than
    /// the budget because `max_running` is not.
    fn plan_decodes(&mut self, plan: &mut Plan, events: &mut Vec<Event>) -> usize {
        let (mut planned, mut at) = (0, 0);
        while at < self.running.len() {
            if self.running[at].decodes() {
                while at < self.running.len() && !self.make_slot(at, plan) {
                    self.preempt_last(plan, events);
                }
                if let Some(sequence) = self.running.get_mut(at) {
                    sequence.planned = 1;
                    planned += 1;
                }
            }
            at += 1;
        }
        planned
    }

    /// Makes sure that the sequence owns the slot of its next token: a new block where the last one
    /// is full, a copy of its own where the last one is shared. False if there is no block left.
    fn make_slot(&mut self, at: usize, plan: &mut Plan) -> bool {
        let block_size = self.block_size();
        let sequence = &mut self.running[at];
        let index = sequence.position() / block_size;
        let shared = match sequence.blocks.get(index) {
            Some(block) if self.pool.references(*block) == 1 => return true,
            shared => shared.copied(),
        };
        let Some(block) = self.pool.allocate() else { return false };
        match shared {
            None => sequence.blocks.push(block),
            Some(from) => {
                sequence.blocks[index] = block;
                plan.copies.push((from, block));
                self.pool.release(from);
            }
        }
        true
    }

    /// Sends the running sequence of the lowest precedence back to its place in the queue. It is at
    /// or after the one that needs the room, so it has no part in the plan yet.
    fn preempt_last(&mut self, plan: &mut Plan, events: &mut Vec<Event>) {
        let Some(mut sequence) = self.running.pop() else { return };
        sequence.release(&mut self.pool);
        sequence.preempted = true;
        plan.preempted += 1;
        self.counters.preemptions += 1;
        events.push(Event::Preempted { request: sequence.request.id, choice: sequence.choice() });
        self.waiting.insert(sequence.precedence, sequence);
    }

    /// Chunks for running sequences that do not decode yet. Returns the tokens planned.
    fn plan_chunks(&mut self, budget: usize) -> usize {
        let mut planned = 0;
        for sequence in &mut self.running {
            if sequence.planned == 0 {
                sequence.planned = sequence.remaining().min(budget - planned);
                planned += sequence.planned;
            }
        }
        planned
    }

    /// Admits waiting sequences while there is budget, a place to run and room for the first one.
    fn admit_waiting(&mut self, plan: &mut Plan, mut budget: usize, events: &mut Vec<Event>) {
        let mut places = self.config.max_running as usize;
        places -= self.running.iter().map(|sequence| 1 + sequence.unforked as usize).sum::<usize>();
        while budget > 0 {
            let Some((&precedence, first)) = self.waiting.first_key_value() else { return };
            let wanted = 1 + first.unforked as usize;
            if wanted > places || !self.take_blocks(precedence) {
                return;
            }
            let Some(mut sequence) = self.remove_waiting(precedence) else { return };
            sequence.planned = sequence.remaining().min(budget);
            budget -= sequence.planned;
            places -= wanted;
            plan.admitted += 1;
            let cached_tokens = sequence.cached.min(sequence.prompt_len()) as u32;
            events.push(Event::Scheduled { request: sequence.request.id, cached_tokens });
            let at = self.position(precedence).unwrap_or_else(|at| at);
            self.running.insert(at, sequence);
        }
    }

    /// Gives a waiting sequence the blocks for all its tokens, cached ones first. False, and nothing
    /// changed, if there is no room.
    ///
    /// One block is left for each running sequence, or the newcomer would soon be preempted again.
    fn take_blocks(&mut self, precedence: Precedence) -> bool {
        let known = (precedence, self.pool.releases());
        if self.blocked == Some(known) && !self.running.is_empty() {
            return false;
        }
        let Some(sequence) = self.waiting.get_mut(&precedence) else { return false };
        let root = Link::Root { salt: sequence.chain.salt() };
        let reads_cache = sequence.prompt_scored && self.config.prefix_cache;
        let (blocks, link) = match reads_cache {
            true => {
                // At least one token is computed, or there would be no logits to choose from.
                let limit = (sequence.tokens.len() - 1) / self.config.block_size as usize;
                let prefix = self.pool.longest_prefix(&sequence.tokens, &mut sequence.chain, limit);
                (prefix.blocks, prefix.link)
            }
            false => (Vec::new(), root),
        };
        let revived = blocks.iter().filter(|block| self.pool.references(**block) == 0).count();
        let needed = sequence.blocks_needed();
        let fresh = needed - blocks.len();
        if fresh + revived + self.running.len() > self.pool.available() {
            self.blocked = Some(known);
            return false;
        }
        self.blocked = None;
        blocks.iter().for_each(|block| self.pool.retain(*block));
        sequence.cached = blocks.len() * self.config.block_size as usize;
        sequence.computed = sequence.cached;
        sequence.publication = match self.config.prefix_cache {
            true => Publication::Upto { blocks: blocks.len(), link },
            false => Publication::Off,
        };
        sequence.blocks = blocks;
        self.pool.allocate_into(&mut sequence.blocks, fresh);
        assert_eq!(sequence.blocks.len(), needed, "the room was counted above");
        if reads_cache && !sequence.preempted {
            self.counters.prefix_query_tokens += sequence.prompt_len() as u64;
            self.counters.prefix_hit_tokens += sequence.cached as u64;
        }
        true
    }

    fn collect_work(&self, plan: &mut Plan) {
        for decodes in [true, false] {
            for (running, sequence) in self.running.iter().enumerate() {
                if sequence.planned > 0 && sequence.decodes() == decodes {
                    let (precedence, tokens) = (sequence.precedence, sequence.planned);
                    plan.work.push(Work { running, precedence, tokens, decodes });
                }
            }
        }
    }

    // ---- submit and apply ----

    /// Notes what a step that was submitted has under way.
    pub fn submitted(&mut self, plan: &Plan, step: &Step) {
        let mut rows = step.rows.iter().enumerate().peekable();
        for (work, part) in plan.work.iter().zip(&step.sequences) {
            let mut answer = None;
            while let Some((index, row)) = rows.next_if(|(_, row)| row.row < part.tokens.end) {
                if answer.is_none() && matches!(row.want, Want::Sample(_)) {
                    answer = Some(index);
                }
            }
            self.running[work.running].submit(work.tokens, answer);
        }
    }

    /// Takes in what the runner computed: tokens, forks, ends, and blocks that are now full.
    /// `output` has one entry for each row of `step`.
    pub fn apply(&mut self, plan: &Plan, step: &Step, output: StepOutput, report: &mut StepReport) {
        let mut rows = step.rows.iter().zip(output.rows).peekable();
        let (mut forked, mut drawn) = (Vec::new(), Vec::new());
        report.events.reserve(step.rows.len());
        for (work, part) in plan.work.iter().zip(&step.sequences) {
            match work.decodes {
                true => report.decode_tokens += 1,
                false => report.prefill_tokens += work.tokens as u32,
            }
            let mine = std::iter::from_fn(|| rows.next_if(|(row, _)| row.row < part.tokens.end));
            let sequence = match self.position(work.precedence) {
                Ok(at) if self.running[at].under_way >= work.tokens => &mut self.running[at],
                // It has ended since, or lost its blocks.
                _ => {
                    mine.for_each(drop);
                    continue;
                }
            };
            sequence.under_way -= work.tokens;
            sequence.computed += work.tokens;
            sequence.publish(&mut self.pool);
            for (row, result) in mine {
                match &row.want {
                    Want::Score { .. } => sequence.prompt_logprobs.push(result.logprobs),
                    Want::Sample(_) => drawn.push(result),
                }
            }
            take_drawn(sequence, &mut drawn, &mut self.pool, &mut forked, &mut report.events);
        }
        if !forked.is_empty() {
            self.running.append(&mut forked);
            self.running.sort_by_key(|sequence| sequence.precedence);
        }
        self.remove_finished(&mut report.events);
    }

    /// Ends all sequences of a step that failed. Their blocks hold nothing that was published by
    /// this step, so what can be found in the cache stays good.
    pub fn fail(&mut self, plan: &Plan, error: &RunnerError, report: &mut StepReport) {
        for work in &plan.work {
            if let Ok(at) = self.position(work.precedence) {
                self.running[at].finished = Some(FinishReason::Error(error.to_string()));
            }
        }
        self.remove_finished(&mut report.events);
    }

    /// Ends everything: the device is lost, and the content of all blocks with it.
    pub fn fail_all(&mut self, error: &RunnerError, report: &mut StepReport) {
        self.running.extend(std::mem::take(&mut self.waiting).into_values());
        self.new_waiting = 0;
        for sequence in &mut self.running {
            sequence.finished = Some(FinishReason::Error(error.to_string()));
        }
        self.remove_finished(&mut report.events);
        self.pool.forget_all();
    }

    fn remove_finished(&mut self, events: &mut Vec<Event>) {
        let finished: Vec<_> = self.running.extract_if(.., |sequence| sequence.finished.is_some()).collect();
        for mut sequence in finished {
            sequence.release(&mut self.pool);
            if let Some(reason) = sequence.finished.take() {
                self.report_end(&sequence, &reason, events);
            }
        }
    }

    // ---- the conservation law ----

    /// Checks everything that must hold between two steps.
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut holders = vec![0; self.config.num_blocks as usize];
        for sequence in &self.running {
            sequence.check_running()?;
            sequence.blocks.iter().for_each(|block| holders[block.0 as usize] += 1);
        }
        self.pool.check_integrity(&holders)?;
        if !self.running.is_sorted_by(|a, b| a.precedence < b.precedence) {
            return Err("the running sequences are not in order of precedence".into());
        }
        let places: u32 = self.running.iter().map(|sequence| 1 + sequence.unforked).sum();
        if places > self.config.max_running {
            return Err(format!("{places} sequences run, and {} may", self.config.max_running));
        }
        self.check_waiting()?;
        self.check_alive()
    }

    fn check_waiting(&self) -> Result<(), String> {
        for (precedence, sequence) in &self.waiting {
            if *precedence != sequence.precedence || !sequence.blocks.is_empty() || sequence.computed > 0 {
                return Err(format!("{:?} waits in the wrong place or holds blocks", sequence.id));
            }
        }
        let new = self.waiting.values().filter(|sequence| !sequence.preempted).count();
        if new != self.new_waiting as usize || self.new_waiting > self.config.max_waiting {
            return Err(format!("{new} new requests wait, {} are counted", self.new_waiting));
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<(), String> {
        let mut choices: BTreeMap<RequestId, u32> = BTreeMap::new();
        for sequence in self.running.iter().chain(self.waiting.values()) {
            *choices.entry(sequence.request.id).or_default() += 1 + sequence.unforked;
        }
        let counted = self.alive.iter().map(|(id, alive)| (*id, alive.unfinished)).collect();
        if choices != counted {
            return Err(format!("unfinished choices are {choices:?} and are counted as {counted:?}"));
        }
        Ok(())
    }
}

/// Gives the drawn tokens to a sequence and, at the end of its prompt, to the choices that fork
/// from it. Leaves `drawn` empty.
fn take_drawn(
    sequence: &mut Sequence,
    drawn: &mut Vec<RowOutput>,
    pool: &mut BlockPool,
    forked: &mut Vec<Sequence>,
    events: &mut Vec<Event>,
) {
    if drawn.is_empty() {
        return;
    }
    sequence.ahead -= 1;
    report_prompt_logprobs(sequence, events);
    let unforked = std::mem::take(&mut sequence.unforked);
    let mut choices: Vec<_> = (1..=unforked).map(|choice| sequence.fork(choice, pool)).collect();
    for (sequence, result) in std::iter::once(sequence).chain(&mut choices).zip(drawn.drain(..)) {
        let (request, choice, token) = (sequence.request.id, sequence.choice(), result.token);
        events.push(Event::Token { request, choice, token, logprobs: result.logprobs });
        sequence.push(token);
    }
    forked.append(&mut choices);
}

fn report_prompt_logprobs(sequence: &mut Sequence, events: &mut Vec<Event>) {
    if !sequence.prompt_scored {
        sequence.prompt_scored = true;
        let mut logprobs = std::mem::take(&mut sequence.prompt_logprobs);
        logprobs.insert(0, None);
        events.push(Event::PromptLogprobs { request: sequence.request.id, logprobs });
    }
}
