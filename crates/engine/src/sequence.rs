//! One stream of tokens and the blocks that hold its keys and values.

use std::sync::Arc;

use crate::block_hash::HashChain;
use crate::block_pool::{BlockId, BlockPool, Link};
use crate::request::{FinishReason, Request, Timestamp, TokenId};
use crate::runner::{SequenceId, TokenLogprobs};

/// Who is served first: smaller goes first. A sequence keeps its place for life, preempted or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Precedence {
    pub priority: i32,
    pub arrival: Timestamp,
    /// Counts requests in the order in which they were added.
    pub ordinal: u64,
    pub choice: u32,
}

/// One stream of tokens computed for a request.
///
/// A request starts as one sequence. Once its prompt is computed, that sequence forks into the
/// request's `n` choices.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: SequenceId,
    pub precedence: Precedence,
    pub request: Arc<Request>,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// How many of them, from the first, have keys and values in the cache.
    pub computed: usize,
    /// How many the step in planning computes.
    pub planned: usize,
    /// How many, behind the computed ones, are computed by steps that were submitted and not yet applied.
    pub under_way: usize,
    /// Tokens that such steps choose for this sequence: they follow `tokens`, and nobody knows them yet.
    pub ahead: usize,
    /// Where the last of them stands among the rows of its step.
    pub answer: usize,
    /// How many of the computed ones were found in the cache when it was last admitted.
    pub cached: usize,
    /// The blocks that hold positions `0..computed` and those that this and the next steps fill.
    pub blocks: Vec<BlockId>,
    /// Further choices that fork off when the prompt is computed.
    pub unforked: u32,
    pub preempted: bool,
    /// Scores of prompt tokens, from the first step on until the prompt is computed.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub prompt_scored: bool,
    pub finished: Option<FinishReason>,
    pub chain: HashChain,
    pub publication: Publication,
    /// The empty list of banned tokens, made once.
    pub nothing: Arc<[TokenId]>,
}

/// How far a sequence's full blocks are published.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Publication {
    /// The first `blocks` blocks are, and `link` identifies the prefix they hold.
    Upto { blocks: usize, link: Link },
    /// No more: the cache is off, or was reset while the sequence ran.
    Off,
}

impl Sequence {
    /// The first sequence of a request.
    pub fn new(id: SequenceId, ordinal: u64, request: Request, block_size: usize) -> Self {
        let (priority, arrival) = (request.priority, request.arrival);
        Self {
            id,
            precedence: Precedence { priority, arrival, ordinal, choice: 0 },
            tokens: request.prompt.to_vec(),
            computed: 0,
            planned: 0,
            under_way: 0,
            ahead: 0,
            answer: 0,
            cached: 0,
            blocks: Vec::new(),
            unforked: request.n - 1,
            preempted: false,
            prompt_logprobs: Vec::new(),
            prompt_scored: request.sampling.prompt_logprobs.is_none(),
            finished: None,
            chain: HashChain::new(block_size, request.cache_salt),
            publication: Publication::Off,
            nothing: Arc::default(),
            request: Arc::new(request),
        }
    }

    pub fn choice(&self) -> u32 {
        self.precedence.choice
    }

    /// The choices that this sequence stands for.
    pub fn choices(&self) -> std::ops::RangeInclusive<u32> {
        self.choice()..=self.choice() + self.unforked
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens generated so far, those known.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len()
    }

    /// The position that the step in planning begins with.
    pub fn position(&self) -> usize {
        self.computed + self.under_way
    }

    /// Tokens that the step in planning can compute before the next one is chosen. 0 if that has to wait for
    /// the token that is being chosen; else at least one.
    pub fn remaining(&self) -> usize {
        let ahead = if self.waits_for_token() { 0 } else { self.ahead };
        self.tokens.len() + ahead - self.position()
    }

    /// Whether the next step cannot be planned without the token that is being chosen: it may be the last, choices
    /// fork off at it, or penalties look at it. (That it may be a stop token is no reason to wait: then one
    /// row is computed in vain.)
    fn waits_for_token(&self) -> bool {
        self.ahead > 0
            && (self.unforked > 0
                || self.request.sampling.needs_history()
                || self.generated() + self.ahead >= self.request.stop.max_tokens as usize)
    }

    /// Whether the step in planning computes a generated token for the first time, and nothing else.
    pub fn decodes(&self) -> bool {
        self.remaining() == 1 && self.generated() + self.ahead > 0
    }

    /// Blocks that all tokens need, those being chosen included.
    pub fn blocks_needed(&self) -> usize {
        (self.tokens.len() + self.ahead).div_ceil(self.chain.block_size())
    }

    /// A step that computes `tokens` of this sequence was submitted. `answer`: its row there, if the step
    /// chooses the next token.
    pub fn submit(&mut self, tokens: usize, answer: Option<usize>) {
        self.under_way += tokens;
        if let Some(answer) = answer {
            self.ahead += 1;
            self.answer = answer;
        }
    }

    /// The choice `choice` of this sequence, sharing all its blocks. Called once the prompt is
    /// computed, before this sequence takes a token of its own.
    pub fn fork(&self, choice: u32, pool: &mut BlockPool) -> Self {
        for block in &self.blocks {
            pool.retain(*block);
        }
        Self {
            id: SequenceId(self.id.0 + u64::from(choice)),
            precedence: Precedence { choice, ..self.precedence },
            request: Arc::clone(&self.request),
            tokens: self.tokens.clone(),
            blocks: self.blocks.clone(),
            unforked: 0,
            prompt_logprobs: Vec::new(),
            finished: None,
            chain: self.chain.clone(),
            nothing: Arc::clone(&self.nothing),
            ..*self
        }
    }

    /// Takes the next token, and ends the sequence if it was the last.
    pub fn push(&mut self, token: TokenId) {
        let stop = &self.request.stop;
        let stops = self.generated() >= stop.min_tokens as usize && stop.stop_token_ids.contains(&token);
        self.tokens.push(token);
        if stops {
            self.finished = Some(FinishReason::Stop(Some(token)));
        } else if self.generated() >= self.request.stop.max_tokens as usize {
            self.finished = Some(FinishReason::Length);
        }
    }

    /// Publishes the blocks that are full and computed.
    pub fn publish(&mut self, pool: &mut BlockPool) {
        let Publication::Upto { mut blocks, mut link } = self.publication else { return };
        let block_size = self.chain.block_size();
        while (blocks + 1) * block_size <= self.computed {
            let Some(hash) = self.chain.get(blocks, &self.tokens) else { break };
            let tokens = &self.tokens[blocks * block_size..(blocks + 1) * block_size];
            link = pool.publish(self.blocks[blocks], hash, link, tokens);
            blocks += 1;
        }
        self.publication = Publication::Upto { blocks, link };
    }

    /// Gives all blocks back. What was computed or is under way is lost to this sequence, unless it is found
    /// again in the prefix cache.
    pub fn release(&mut self, pool: &mut BlockPool) {
        pool.release_chain(&mut self.blocks);
        self.computed = 0;
        self.cached = 0;
        self.planned = 0;
        (self.under_way, self.ahead) = (0, 0);
        self.prompt_logprobs.clear();
        self.publication = Publication::Off;
    }

    /// What must hold for a running sequence between two steps.
    pub fn check_running(&self) -> Result<(), String> {
        let id = self.id;
        let block_size = self.chain.block_size();
        if self.finished.is_some() || self.computed >= self.tokens.len() {
            return Err(format!("{id:?} runs and has nothing to compute"));
        }
        if self.position() > self.blocks.len() * block_size || self.blocks.len() > self.blocks_needed() {
            return Err(format!("{id:?} holds {} blocks, {} computed", self.blocks.len(), self.position()));
        }
        let (under_way, ahead) = (self.under_way, self.ahead);
        if under_way < ahead || self.position() > self.tokens.len() + ahead {
            return Err(format!("{id:?} has {under_way} tokens under way that choose {ahead}"));
        }
        if let Publication::Upto { blocks, .. } = self.publication
            && blocks != self.computed / block_size
        {
            return Err(format!("{id:?} published {blocks} blocks, {} computed", self.computed));
        }
        Ok(())
    }
}
