//! The rules of the scheduler over the real block pool, with runs of decode steps taken together.
//!
//! Every rule here is one of `servelab_engine`'s scheduler, in its order: decodes first, then chunks, then admissions;
//! the last sequence is preempted when blocks run out; the first in the queue is never overtaken. Three things are
//! different, none of which can be seen from outside. A block is known by its hash alone, so the pool stores one word
//! for each. Blocks of an answer are published when it ends or is preempted, since nobody else can ask for them before.
//! And a step that only decodes, in which nobody ends, begins or runs out of blocks, is a number in a list: its end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::block_pool::Link;
use servelab_engine::{BlockHash, BlockId, BlockPool, EngineConfig, TokenId};
use servelab_sim::{CostModel, SequenceWork};

use super::{Ask, Gauges, Happened, Note, ReplicaKind};
use crate::counters::{Counters, Times, nanos};

/// Steps that are foreseen at once: few behind a request that came and made the others worthless, and twice as many each
/// time that nobody did.
const FEWEST_STEPS: usize = 16;
const MOST_STEPS: usize = 128;
const ROOT: Link = Link::Root { salt: 0 };

/// Who is served first: smaller goes first. Arrival, then order.
type Precedence = (Duration, u64);

struct Sequence {
    precedence: Precedence,
    request: u64,
    chain: Arc<[BlockHash]>,
    prompt: usize,
    /// Tokens of prompt and whole answer.
    most: usize,
    tokens: usize,
    computed: usize,
    planned: usize,
    cached: usize,
    blocks: Vec<BlockId>,
    published: usize,
    link: Link,
    preempted: bool,
    scheduled: Option<Duration>,
    /// Found in the cache when it was first scheduled.
    first_cached: u32,
    last_token: Option<Duration>,
}

impl Sequence {
    fn remaining(&self) -> usize {
        self.tokens - self.computed
    }

    fn generated(&self) -> usize {
        self.tokens - self.prompt
    }

    fn decodes(&self) -> bool {
        self.remaining() == 1 && self.generated() > 0
    }

    fn work(&self) -> SequenceWork {
        SequenceWork {
            cached_tokens: self.computed as u64,
            new_tokens: self.planned as u64,
            logits_rows: u64::from(self.planned == self.remaining()),
        }
    }

    fn times(&self) -> Times {
        Times {
            arrived: self.precedence.0,
            scheduled: self.scheduled.unwrap_or(self.precedence.0),
            prompt_tokens: self.prompt as u32,
            cached_tokens: self.first_cached,
        }
    }

    /// Publishes full computed blocks, up to that many.
    fn publish(&mut self, pool: &mut BlockPool, config: &EngineConfig, most: usize) {
        if !config.prefix_cache {
            return;
        }
        let full = (self.computed / config.block_size as usize).min(most);
        // Apart from `self`, so that it stays in registers: from memory it would come only once all that was written
        // before is there.
        let mut link = self.link;
        while self.published < full {
            let hash = self.chain[self.published];
            link = pool.publish(self.blocks[self.published], hash, link, &word(hash));
            self.published += 1;
        }
        self.link = link;
    }

    fn release(&mut self, pool: &mut BlockPool, config: &EngineConfig) {
        self.publish(pool, config, usize::MAX);
        pool.release_chain(&mut self.blocks);
        (self.computed, self.planned, self.cached, self.published) = (0, 0, 0, 0);
        self.link = ROOT;
    }
}

/// What the pool compares in place of a block's tokens.
fn word(hash: BlockHash) -> [TokenId; 1] {
    [hash.0 as u32]
}

/// What is counted when a step ends.
enum Counted {
    First(Times),
    Gap(Duration),
    Ended(Duration),
}

/// The steps that are foreseen, most often one.
#[derive(Default)]
struct Run {
    start: Duration,
    /// Of each step.
    ends: Vec<Duration>,
    /// Of these, how many have begun and are applied, and how many have ended and are counted.
    begun: usize,
    ended: usize,
    /// Sequences of every step that only decodes; 0 for a single step of any kind.
    batch: usize,
    /// What the last one brings about.
    counted: Vec<Counted>,
    notes: Vec<Note>,
}

impl Run {
    fn start_of(&self, step: usize) -> Duration {
        if step == 0 { self.start } else { self.ends[step - 1] }
    }
}

pub struct Fast {
    cost: CostModel,
    config: EngineConfig,
    pool: BlockPool,
    running: Vec<Sequence>,
    waiting: BTreeMap<Precedence, Sequence>,
    next_ordinal: u64,
    /// As the scheduler's: who did not fit when the pool had given back so many blocks.
    blocked: Option<(Precedence, u64)>,
    preemptions: u64,
    /// Steps that are foreseen next time.
    foresight: usize,
    counters: Counters,
    run: Option<Run>,
}

impl Fast {
    pub fn new(kind: &ReplicaKind) -> Self {
        Self {
            cost: kind.cost.clone(),
            config: kind.engine.clone(),
            pool: BlockPool::new(kind.engine.num_blocks, 1),
            running: Vec::new(),
            waiting: BTreeMap::new(),
            next_ordinal: 0,
            blocked: None,
            preemptions: 0,
            foresight: FEWEST_STEPS,
            counters: Counters::default(),
            run: None,
        }
    }

    fn block_size(&self) -> usize {
        self.config.block_size as usize
    }

    // ---- what is asked of it ----

    pub fn add(&mut self, now: Duration, ask: &Ask) -> bool {
        if self.waiting.len() as u32 >= self.config.max_waiting {
            return false;
        }
        let precedence = (now, self.next_ordinal);
        self.next_ordinal += 1;
        // Behind somebody who does not fit, it changes nothing before a step does.
        let may_begin = self.waiting.is_empty();
        let sequence = Sequence {
            precedence,
            request: ask.number,
            chain: ask.chain.clone(),
            prompt: ask.prompt.len(),
            most: ask.prompt.len() + ask.output_tokens as usize,
            tokens: ask.prompt.len(),
            computed: 0,
            planned: 0,
            cached: 0,
            blocks: Vec::new(),
            published: 0,
            link: ROOT,
            preempted: false,
            scheduled: None,
            first_cached: 0,
            last_token: None,
        };
        self.waiting.insert(precedence, sequence);
        if self.run.is_none() {
            self.begin(now);
        } else if may_begin {
            self.cut(now);
        }
        true
    }

    pub fn next(&self) -> Option<Duration> {
        self.run.as_ref().and_then(|run| run.ends.last().copied())
    }

    pub fn advance(&mut self, now: Duration, notes: &mut Vec<Note>) {
        while let Some(end) = self.next().filter(|end| *end <= now) {
            self.sync(end);
            let Some(mut run) = self.run.take() else { return };
            notes.append(&mut run.notes);
            self.foresight = (2 * self.foresight).min(MOST_STEPS);
            self.begin(end);
        }
    }

    /// Applies the steps that have begun and counts those that have ended.
    pub fn sync(&mut self, now: Duration) {
        let Some(mut run) = self.run.take() else { return };
        let begun = (run.begun..run.ends.len()).take_while(|step| run.start_of(*step) <= now).count();
        self.apply_decodes(&mut run, begun);
        while run.ended < run.begun && run.ends[run.ended] <= now {
            self.count(&mut run);
        }
        self.run = Some(run);
    }

    /// Forgets the steps that have not begun.
    fn cut(&mut self, now: Duration) {
        self.sync(now);
        if let Some(run) = &mut self.run {
            run.ends.truncate(run.begun);
        }
        self.foresight = FEWEST_STEPS;
    }

    pub fn gauges(&self) -> Gauges {
        let held = self.pool.counts().held;
        Gauges {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            kv_usage: f64::from(held) / f64::from(self.config.num_blocks),
            preemptions: self.preemptions,
        }
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    pub fn cached_tokens(&self, ask: &Ask) -> u32 {
        let chain = ask.prompt_chain(self.config.block_size);
        find(&self.pool, chain, usize::MAX).0.len() as u32 * self.config.block_size
    }

    // ---- plan ----

    fn begin(&mut self, now: Duration) {
        if self.running.is_empty() && self.waiting.is_empty() {
            return;
        }
        let mut run = Run { start: now, ..Run::default() };
        let is_quiet = self.plan(now, &mut run.notes);
        if is_quiet && self.running.iter().all(|sequence| sequence.last_token == Some(now)) {
            self.foresee(&mut run);
            self.apply_decodes(&mut run, 1);
        } else {
            if self.planned().next().is_none() {
                return;
            }
            let sums = self.cost.sums(self.planned().map(Sequence::work));
            run.ends.push(now + Duration::from_secs_f64(self.cost.seconds(&sums)));
            self.apply(&mut run);
        }
        self.run = Some(run);
    }

    fn planned(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().filter(|sequence| sequence.planned > 0)
    }

    /// Plans a step. True if it only decodes, and the next one will too unless something happens.
    fn plan(&mut self, now: Duration, notes: &mut Vec<Note>) -> bool {
        self.running.iter_mut().for_each(|sequence| sequence.planned = 0);
        let preempted = self.preemptions;
        let mut budget = self.config.max_batched_tokens as usize;
        budget -= self.plan_decodes(now, notes);
        let chunks = self.plan_chunks(budget);
        let mut admitted = 0;
        if self.preemptions == preempted {
            admitted = self.admit(budget - chunks, now, notes);
        }
        chunks == 0 && admitted == 0 && self.preemptions == preempted
    }

    fn plan_decodes(&mut self, now: Duration, notes: &mut Vec<Note>) -> usize {
        let (mut planned, mut at) = (0, 0);
        while at < self.running.len() {
            if self.running[at].decodes() {
                while at < self.running.len() && !self.make_slot(at) {
                    self.preempt_last(now, notes);
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

    fn make_slot(&mut self, at: usize) -> bool {
        let block_size = self.block_size();
        let sequence = &mut self.running[at];
        if sequence.blocks.len() > sequence.computed / block_size {
            return true;
        }
        let Some(block) = self.pool.allocate() else { return false };
        sequence.blocks.push(block);
        true
    }

    fn preempt_last(&mut self, now: Duration, notes: &mut Vec<Note>) {
        let Some(mut sequence) = self.running.pop() else { return };
        sequence.release(&mut self.pool, &self.config);
        sequence.preempted = true;
        self.preemptions += 1;
        notes.push(Note { at: now, request: sequence.request, happened: Happened::Preempted });
        self.waiting.insert(sequence.precedence, sequence);
    }

    fn plan_chunks(&mut self, budget: usize) -> usize {
        let mut planned = 0;
        for sequence in self.running.iter_mut().filter(|sequence| sequence.planned == 0) {
            sequence.planned = sequence.remaining().min(budget - planned);
            planned += sequence.planned;
        }
        planned
    }

    /// Returns how many were admitted.
    fn admit(&mut self, mut budget: usize, now: Duration, notes: &mut Vec<Note>) -> usize {
        let mut admitted = 0;
        while budget > 0 && self.running.len() < self.config.max_running as usize {
            let Some((&precedence, _)) = self.waiting.first_key_value() else { break };
            if !self.take_blocks(precedence) {
                break;
            }
            let Some(mut sequence) = self.waiting.remove(&precedence) else { break };
            sequence.planned = sequence.remaining().min(budget);
            budget -= sequence.planned;
            admitted += 1;
            let cached_tokens = sequence.cached.min(sequence.prompt) as u32;
            if sequence.scheduled.is_none() {
                sequence.first_cached = cached_tokens;
                let happened = Happened::Scheduled { cached_tokens };
                notes.push(Note { at: now, request: sequence.request, happened });
            }
            if sequence.last_token.is_none() {
                sequence.scheduled = Some(now);
            }
            let at = self.running.partition_point(|other| other.precedence < precedence);
            self.running.insert(at, sequence);
        }
        admitted
    }

    fn take_blocks(&mut self, precedence: Precedence) -> bool {
        let known = (precedence, self.pool.releases());
        if self.blocked == Some(known) && !self.running.is_empty() {
            return false;
        }
        let block_size = self.config.block_size as usize;
        let Some(sequence) = self.waiting.get_mut(&precedence) else { return false };
        let (blocks, link) = match self.config.prefix_cache {
            true => find(&self.pool, &sequence.chain, (sequence.tokens - 1) / block_size),
            false => (Vec::new(), ROOT),
        };
        let revived = blocks.iter().filter(|block| self.pool.references(**block) == 0).count();
        let fresh = sequence.tokens.div_ceil(block_size) - blocks.len();
        if fresh + revived + self.running.len() > self.pool.available() {
            self.blocked = Some(known);
            return false;
        }
        self.blocked = None;
        blocks.iter().for_each(|block| self.pool.retain(*block));
        sequence.cached = blocks.len() * block_size;
        sequence.computed = sequence.cached;
        (sequence.published, sequence.link) = (blocks.len(), link);
        sequence.blocks = blocks;
        self.pool.allocate_into(&mut sequence.blocks, fresh);
        true
    }

    // ---- a single step ----

    /// Takes in what a step computes, and notes what it brings about at its end.
    fn apply(&mut self, run: &mut Run) {
        let end = run.ends[0];
        for decodes in [true, false] {
            for at in 0..self.running.len() {
                let sequence = &self.running[at];
                if sequence.planned > 0 && sequence.decodes() == decodes {
                    self.apply_to(at, end, run);
                    // Whoever has been computed decodes no more, or once more: it is not to be found again.
                    self.running[at].planned = 0;
                }
            }
        }
        self.finish(end, run);
        run.begun = 1;
    }

    fn apply_to(&mut self, at: usize, end: Duration, run: &mut Run) {
        let sequence = &mut self.running[at];
        sequence.computed += sequence.planned;
        sequence.publish(&mut self.pool, &self.config, sequence.prompt / self.config.block_size as usize);
        if sequence.computed < sequence.tokens {
            return;
        }
        sequence.tokens += 1;
        match sequence.last_token.replace(end) {
            Some(last) => run.counted.push(Counted::Gap(end - last)),
            None => {
                run.counted.push(Counted::First(sequence.times()));
                let happened = Happened::FirstToken;
                run.notes.push(Note { at: end, request: sequence.request, happened });
            }
        }
    }

    /// Takes out those that have their last token.
    fn finish(&mut self, end: Duration, run: &mut Run) {
        let is_done = |sequence: &mut Sequence| sequence.tokens >= sequence.most;
        for mut sequence in self.running.extract_if(.., is_done) {
            sequence.release(&mut self.pool, &self.config);
            run.counted.push(Counted::Ended(sequence.precedence.0));
            run.notes.push(Note { at: end, request: sequence.request, happened: Happened::Ended });
        }
    }

    // ---- steps that only decode ----

    /// Fills in when the steps from the planned one on end: up to the first in which a sequence ends, or before the
    /// first that finds too few blocks.
    fn foresee(&self, run: &mut Run) {
        let block_size = self.block_size();
        let left = self.running.iter().map(|sequence| sequence.most - sequence.tokens).min().unwrap_or(1);
        let most = left.clamp(1, self.foresight);
        run.ends.reserve_exact(most);
        // Sequences that need a block in the step after so many.
        let mut needs = vec![0; block_size];
        for sequence in &self.running {
            let room = sequence.blocks.len() * block_size - sequence.computed;
            needs[room % block_size] += 1;
        }
        let mut available = self.pool.available();
        let mut sums = self.cost.sums(self.running.iter().map(Sequence::work));
        let mut now = run.start;
        for step in 0..most {
            // The planned step has its slots.
            let needed: usize = if step == 0 { 0 } else { needs[step % block_size] };
            if needed > available {
                break;
            }
            available -= needed;
            now += Duration::from_secs_f64(self.cost.seconds(&sums));
            run.ends.push(now);
            if !self.cost.grow(&mut sums) {
                let grown = |sequence: &Sequence| SequenceWork {
                    cached_tokens: (sequence.computed + step + 1) as u64,
                    ..sequence.work()
                };
                sums = self.cost.sums(self.running.iter().map(grown));
            }
        }
        run.batch = self.running.len();
    }

    /// Applies the next `count` steps of a run of decodes.
    fn apply_decodes(&mut self, run: &mut Run, count: usize) {
        if run.batch == 0 || count == 0 {
            return;
        }
        run.begun += count;
        let (end, block_size) = (run.ends[run.begun - 1], self.block_size());
        let mut is_done = false;
        for sequence in &mut self.running {
            sequence.computed += count;
            sequence.tokens += count;
            sequence.last_token = Some(end);
            let needed = sequence.computed.div_ceil(block_size);
            while sequence.blocks.len() < needed {
                // There were enough when the run was foreseen, and nobody has taken any since.
                let Some(block) = self.pool.allocate() else { break };
                sequence.blocks.push(block);
            }
            is_done |= sequence.tokens >= sequence.most;
        }
        if is_done {
            self.finish(end, run);
        }
    }

    /// Counts the next step that has ended.
    fn count(&mut self, run: &mut Run) {
        let (start, end) = (run.start_of(run.ended), run.ends[run.ended]);
        run.ended += 1;
        self.counters.busy_nanos += nanos(end - start);
        if run.batch > 0 {
            self.counters.generated_tokens += run.batch as u64;
            self.counters.inter_token_latency.observe(end - start, run.batch as u64);
        }
        if run.ended < run.ends.len() {
            return;
        }
        for counted in run.counted.drain(..) {
            match counted {
                Counted::First(times) => {
                    self.counters.generated_tokens += 1;
                    self.counters.first_token(end, times);
                }
                Counted::Gap(gap) => {
                    self.counters.generated_tokens += 1;
                    self.counters.inter_token_latency.observe(gap, 1);
                }
                Counted::Ended(arrived) => self.counters.ended(end, arrived),
            }
        }
    }

    // ---- the conservation law ----

    pub fn check_integrity(&self) -> Result<(), String> {
        let mut holders = vec![0; self.config.num_blocks as usize];
        for sequence in &self.running {
            sequence.blocks.iter().for_each(|block| holders[block.0 as usize] += 1);
            if sequence.tokens >= sequence.most || sequence.computed >= sequence.tokens {
                return Err(format!("request {} runs and has nothing to compute", sequence.request));
            }
        }
        if self.waiting.values().any(|sequence| !sequence.blocks.is_empty()) {
            return Err("a waiting request holds blocks".into());
        }
        let alive = self.running.iter().chain(self.waiting.values()).map(|sequence| sequence.request);
        let alive: Vec<u64> = alive.collect();
        if alive.iter().collect::<BTreeSet<_>>().len() != alive.len() {
            return Err(format!("a request is there twice: {alive:?}"));
        }
        self.pool.check_integrity(&holders)
    }
}

/// The longest published beginning of a chain, `limit` blocks at most, and its identity.
fn find(pool: &BlockPool, chain: &[BlockHash], limit: usize) -> (Vec<BlockId>, Link) {
    let (mut blocks, mut link) = (Vec::new(), ROOT);
    for hash in chain.iter().take(limit) {
        let Some((block, next)) = pool.lookup(*hash, link, &word(*hash)) else { break };
        blocks.push(block);
        link = next;
    }
    (blocks, link)
}
