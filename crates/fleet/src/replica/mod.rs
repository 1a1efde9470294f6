//! One replica in virtual time, in two forms that behave alike.
//!
//! [`Stepped`] is the real engine, a call for every step. [`Fast`] has the rules of its scheduler and its real block
//! pool, but takes steps that only decode together: what one of them costs depends on sums alone, so a hundred of them
//! cost a hundred additions and not a hundred passes over the batch. Tests hold the two beside each other: the same
//! requests give the same events at the same nanosecond.

mod fast;
mod stepped;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use servelab_engine::{BlockHash, EngineConfig, TokenId, hash_blocks};
use servelab_router::choice::load::Report;
use servelab_router::choice::rates;
use servelab_sim::CostModel;

use crate::counters::Counters;

use fast::Fast;
use stepped::Stepped;

/// What all replicas of a fleet are.
#[derive(Clone, Debug)]
pub struct ReplicaKind {
    pub cost: CostModel,
    pub engine: EngineConfig,
    /// GPUs of one replica.
    pub gpus: u32,
    /// Bytes that are loaded at its start.
    pub weight_bytes: f64,
}

/// What a replica is asked.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Unique in the fleet.
    pub number: u64,
    /// What its answer is made of: the same for the same request, wherever and however often it is computed.
    pub answer_key: u64,
    pub prompt: Arc<[TokenId]>,
    pub output_tokens: u32,
    /// Hashes of the full blocks of the prompt and of the answer behind it.
    pub chain: Arc<[BlockHash]>,
}

impl Ask {
    /// The request with its chain in blocks of `block_size` tokens.
    pub fn new(
        number: u64,
        answer_key: u64,
        prompt: Arc<[TokenId]>,
        output_tokens: u32,
        block_size: u32,
    ) -> Self {
        let mut tokens = Vec::with_capacity(prompt.len() + output_tokens as usize);
        tokens.extend_from_slice(&prompt);
        tokens.extend((0..output_tokens).map(|at| answer_token(answer_key, at)));
        let chain = hash_blocks(&tokens, block_size as usize, 0).into();
        Self { number, answer_key, prompt, output_tokens, chain }
    }

    pub fn prompt_tokens(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// Of the prompt alone.
    pub fn prompt_chain(&self, block_size: u32) -> &[BlockHash] {
        &self.chain[..self.prompt.len() / block_size as usize]
    }
}

/// The `index`th token of an answer.
pub fn answer_token(key: u64, index: u32) -> TokenId {
    (servelab_bench::prompt::mix(key ^ (u64::from(index) << 40)) >> 33) as TokenId
}

/// Something that happened to a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happened {
    /// It left the replica's queue for the first time.
    Scheduled {
        cached_tokens: u32,
    },
    FirstToken,
    Preempted,
    /// The whole answer is there.
    Ended,
}

/// To which request and when: at the beginning of a step what was planned, at its end what was computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Note {
    pub at: Duration,
    pub request: u64,
    pub happened: Happened,
}

/// What it shows at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    pub running: u32,
    pub waiting: u32,
    /// Share of the KV blocks that sequences hold.
    pub kv_usage: f64,
    pub preemptions: u64,
}

/// A replica that computes.
pub enum Replica {
    Stepped(Box<Stepped>),
    Fast(Box<Fast>),
}

impl Replica {
    /// An idle one. `is_exact`: the real engine.
    ///
    /// # Errors
    /// If the engine's configuration is impossible.
    pub fn new(kind: &ReplicaKind, is_exact: bool) -> Result<Self, servelab_engine::ConfigError> {
        kind.engine.validate()?;
        Ok(match is_exact {
            true => Self::Stepped(Box::new(Stepped::new(kind)?)),
            false => Self::Fast(Box::new(Fast::new(kind))),
        })
    }

    /// Puts a request into its queue. False if the queue is full.
    pub fn add(&mut self, now: Duration, ask: &Ask) -> bool {
        match self {
            Self::Stepped(replica) => replica.add(now, ask),
            Self::Fast(replica) => replica.add(now, ask),
        }
    }

    /// When [`Replica::advance`] is to be called next, as long as nothing else is asked of it; `None` while it is idle.
    pub fn next(&self) -> Option<Duration> {
        match self {
            Self::Stepped(replica) => replica.next(),
            Self::Fast(replica) => replica.next(),
        }
    }

    /// Ends the steps that have ended by `now` and begins what is next. Appends what happened.
    pub fn advance(&mut self, now: Duration, notes: &mut Vec<Note>) {
        match self {
            Self::Stepped(replica) => replica.advance(now, notes),
            Self::Fast(replica) => replica.advance(now, notes),
        }
    }

    /// Brings what it shows up to `now`: call before the functions below.
    pub fn sync(&mut self, now: Duration) {
        if let Self::Fast(replica) = self {
            replica.sync(now);
        }
    }

    pub fn gauges(&self) -> Gauges {
        match self {
            Self::Stepped(replica) => replica.gauges(),
            Self::Fast(replica) => replica.gauges(),
        }
    }

    pub fn counters(&self) -> &Counters {
        match self {
            Self::Stepped(replica) => replica.counters(),
            Self::Fast(replica) => replica.counters(),
        }
    }

    pub fn counters_mut(&mut self) -> &mut Counters {
        match self {
            Self::Stepped(replica) => replica.counters_mut(),
            Self::Fast(replica) => replica.counters_mut(),
        }
    }

    /// Tokens of a request's beginning that its cache holds, in truth.
    pub fn cached_tokens(&self, ask: &Ask) -> u32 {
        match self {
            Self::Stepped(replica) => replica.cached_tokens(ask),
            Self::Fast(replica) => replica.cached_tokens(ask),
        }
    }

    /// What the router reads of it.
    pub fn report(&self, now: Duration) -> (Report, rates::Counters) {
        let Gauges { running, waiting, kv_usage, .. } = self.gauges();
        (Report { running, waiting, kv_usage }, self.counters().rates(now))
    }

    /// The conservation law of its blocks and requests. For tests; O(sequences and blocks).
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        match self {
            Self::Stepped(replica) => replica.check_integrity(),
            Self::Fast(replica) => replica.check_integrity(),
        }
    }
}
