//! All replicas as the choice sees them: what each holds, has to do, and how fast it works.
//!
//! Plain data with the time as an argument, so that the proxy drives it in real time and the test bed of
//! `benches/routing` in virtual time.

use std::sync::Arc;
use std::time::Duration;

use servelab_engine::BlockHash;

use super::expected::Expected;
use super::index::{Matches, PrefixIndex};
use super::latency::PeakEwma;
use super::load::{Dispatch, Load, Report, Work};
use super::picker::{Ask, Candidate, Decision, Picker};
use super::policy::Policy;
use super::rates::{Counters, Pace, Rates};
use super::replica_set::{MAX_REPLICAS, ReplicaId, ReplicaSet};

/// How the fleet chooses.
#[derive(Clone, Copy, Debug)]
pub struct FleetOptions {
    pub policy: Policy,
    /// Of the random numbers that break ties.
    pub seed: u64,
    /// Most that the index of prefixes takes.
    pub index_bytes: usize,
    /// Tokens per block of the chains that requests bring.
    pub block_size: u32,
    /// What to expect of a replica while none has been measured.
    pub prior: Pace,
}

/// Names a tokenizer with its chat template: a hash over its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokeniserId(pub u128);

/// What the blocks of a replica are known by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hashing {
    /// Pieces of text: see [`crate::prompt`].
    #[default]
    Text,
    /// The token ids that the replica computes.
    Tokens(TokeniserId),
}

impl Hashing {
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Tokens(_) => "tokens",
        }
    }
}

/// A request's prompts as a tokenizer cuts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exact {
    pub tokeniser: TokeniserId,
    /// Of all prompts.
    pub tokens: u32,
    /// Of the first one, whose chain it is.
    pub first_tokens: u32,
    pub chain: Vec<BlockHash>,
}

/// A request as the choice sees it.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Of all its prompts, as well as the router can count.
    pub tokens: u32,
    /// Pieces of text of all its prompts, which is what `tokens` is as long as nobody has tokenised them. 0: the same.
    pub pieces: u32,
    /// Hashes of the full blocks of the first prompt's text; empty if it was not read.
    pub chain: Vec<BlockHash>,
    /// The chain is over the tokens themselves, since the prompt was given as token ids; no tokenizer has to be known.
    pub is_exact: bool,
    /// The same in tokens, for each tokenizer that the replicas have.
    pub exact: Vec<Exact>,
    /// A hash of the session's name, if the request has one.
    pub session: Option<u64>,
    /// Answers that are generated.
    pub sequences: u32,
    /// Most tokens that each answer may have.
    pub output_tokens: u32,
}

/// How the router knows what a replica holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Knowledge {
    /// By what was sent there.
    #[default]
    Guessed,
    /// The replica tells what changes, and what was before is guessed.
    Partial,
    /// The replica tells everything. What is sent there is expected until the replica confirms it, if the router knows
    /// the prompt's tokens ([`Prompt::is_exact_for`]); a prompt of which it knows only the text is noted as if the
    /// replica said nothing, under hashes of its own.
    Precise,
}

impl Prompt {
    pub fn exact(&self, tokeniser: TokeniserId) -> Option<&Exact> {
        self.exact.iter().find(|exact| exact.tokeniser == tokeniser)
    }

    /// Whether its chain for a replica is over the tokens that the replica caches, and so of the blocks that it tells
    /// of.
    pub fn is_exact_for(&self, hashing: Hashing) -> bool {
        match hashing {
            Hashing::Text => self.is_exact,
            Hashing::Tokens(tokeniser) => self.is_exact || self.exact(tokeniser).is_some(),
        }
    }

    /// What it is matched by on such a replica: by its text where it was not tokenised for that one, or not in time.
    pub fn matched_by(&self, hashing: Hashing) -> Hashing {
        if self.is_exact_for(hashing) { hashing } else { Hashing::Text }
    }

    /// The blocks by which it is noted on such a replica.
    fn chain(&self, hashing: Hashing) -> &[BlockHash] {
        match hashing {
            Hashing::Tokens(tokeniser) => self.exact(tokeniser).map_or(&self.chain, |exact| &exact.chain),
            Hashing::Text => &self.chain,
        }
    }

    /// The tokens that `blocks` blocks of `size` stand for, on a replica with blocks of `own`.
    fn matched_tokens(&self, hashing: Hashing, blocks: u32, size: u32, own: u32) -> u32 {
        let matched = u64::from(blocks) * u64::from(size);
        let tokens = match self.matched_by(hashing) {
            Hashing::Text if self.pieces > 0 && !self.is_exact => {
                matched * u64::from(self.tokens) / u64::from(self.pieces)
            }
            Hashing::Text => matched,
            // A replica holds whole blocks of its own, and computes at least one token of a prompt that it holds whole.
            Hashing::Tokens(tokeniser) => {
                let tokens = self.exact(tokeniser).map_or(self.tokens, |exact| exact.first_tokens);
                let most = tokens.saturating_sub(1);
                matched.min(most.into()) / u64::from(own.max(1)) * u64::from(own.max(1))
            }
        };
        u32::try_from(tokens).unwrap_or(u32::MAX)
    }
}

/// A replica.
#[derive(Debug)]
struct Member {
    hashing: Hashing,
    /// Tokens per block of its cache.
    block_size: u32,
    /// A hash of its address.
    key: u64,
    load: Arc<Load>,
    rates: Rates,
    latency: PeakEwma,
    knowledge: Knowledge,
    /// Of its cache, in blocks.
    capacity: u32,
}

/// The replicas and the picker over them.
#[derive(Debug)]
pub struct Fleet {
    index: PrefixIndex,
    picker: Picker,
    members: Box<[Option<Member>; MAX_REPLICAS]>,
    present: ReplicaSet,
    block_size: u32,
    prior: Pace,
    expected: Expected,
    /// Of the last decision.
    now: Duration,
    /// Tokens that an answer has, in the mean over the latest.
    answer_tokens: Option<f64>,
    /// Kept between lookups.
    matches: Matches,
    exact_matches: Matches,
}

/// Blocks of a replica that has not told how many it has: as many as fit into the index.
const UNKNOWN_LIMIT: u32 = u32::MAX;
/// Weight of the latest answer in the mean.
const LATEST_ANSWER: f64 = 0.02;
/// Most that an answer is expected to have while none has ended.
const UNKNOWN_OUTPUT_TOKENS: u32 = 512;

impl Fleet {
    pub fn new(options: FleetOptions) -> Self {
        Self {
            index: PrefixIndex::new(options.index_bytes),
            picker: Picker::new(options.policy, options.seed),
            members: Box::new([const { None }; MAX_REPLICAS]),
            present: ReplicaSet::EMPTY,
            block_size: options.block_size,
            prior: options.prior,
            expected: Expected::default(),
            now: Duration::ZERO,
            answer_tokens: None,
            matches: Matches::default(),
            exact_matches: Matches::default(),
        }
    }

    /// As [`PrefixIndex::take_memory`]; before the first request, or it waits.
    pub fn take_memory(&mut self) {
        self.index.take_memory();
    }

    pub fn policy(&self) -> Policy {
        self.picker.policy()
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn index(&self) -> &PrefixIndex {
        &self.index
    }

    pub fn replicas(&self) -> ReplicaSet {
        self.present
    }

    /// Takes a replica in; `key` is a hash of its address. `None` if there are [`MAX_REPLICAS`] already.
    pub fn add(&mut self, key: u64) -> Option<ReplicaId> {
        let place = self.members.iter().position(Option::is_none)?;
        let replica = ReplicaId(place as u8);
        let (rates, latency) = (Rates::default(), PeakEwma::default());
        let (knowledge, capacity) = (Knowledge::default(), UNKNOWN_LIMIT);
        let (hashing, block_size) = (Hashing::default(), self.block_size);
        self.members[place] = Some(Member {
            hashing,
            block_size,
            key,
            load: Arc::default(),
            rates,
            latency,
            knowledge,
            capacity,
        });
        self.present.insert(replica);
        self.index.add(replica, UNKNOWN_LIMIT);
        Some(replica)
    }

    /// Forgets a replica and what it holds. Dispatches that are under way end as they would have.
    pub fn remove(&mut self, replica: ReplicaId) {
        self.members[usize::from(replica.0)] = None;
        self.present.remove(replica);
        self.index.remove(replica);
        self.expected.clear(replica);
    }

    /// The replica has told how many tokens its KV cache holds.
    pub fn set_capacity(&mut self, replica: ReplicaId, tokens: u64) {
        let blocks = tokens / u64::from(self.block_size.max(1));
        let Some(member) = self.member_mut(replica) else { return };
        member.load.set_capacity(tokens);
        member.capacity = u32::try_from(blocks).unwrap_or(UNKNOWN_LIMIT);
        self.set_limit(replica);
    }

    /// How the router knows from now on what the replica holds.
    pub fn set_knowledge(&mut self, replica: ReplicaId, knowledge: Knowledge) {
        if let Some(member) = self.member_mut(replica) {
            member.knowledge = knowledge;
            self.set_limit(replica);
        }
    }

    pub fn knowledge(&self, replica: ReplicaId) -> Knowledge {
        self.member(replica).map_or_else(Knowledge::default, |member| member.knowledge)
    }

    /// What is guessed takes no room from what the replica says.
    fn set_limit(&mut self, replica: ReplicaId) {
        let Some(member) = self.member(replica) else { return };
        let limit = match member.knowledge {
            Knowledge::Guessed => member.capacity,
            Knowledge::Partial | Knowledge::Precise => member.capacity.saturating_mul(2),
        };
        self.index.add(replica, limit);
    }

    /// The replica has told how many tokens a block of its cache has.
    pub fn set_block_size(&mut self, replica: ReplicaId, tokens: u32) {
        if let Some(member) = self.member_mut(replica) {
            member.block_size = tokens;
        }
    }

    /// What the replica's blocks are known by from now on. What was guessed under another name is forgotten; what the
    /// replica told is of tokens, and stands. True if it is a change.
    pub fn set_hashing(&mut self, replica: ReplicaId, hashing: Hashing) -> bool {
        let Some(member) = self.member_mut(replica) else { return false };
        let changed = std::mem::replace(&mut member.hashing, hashing) != hashing;
        if changed && member.knowledge == Knowledge::Guessed {
            self.clear(replica);
        }
        changed
    }

    /// What the replica's blocks are known by.
    pub fn hashing(&self, replica: ReplicaId) -> Hashing {
        self.member(replica).map_or(Hashing::default(), |member| member.hashing)
    }

    /// The replica's cache is empty: it was reset, or the replica was started anew.
    pub fn clear(&mut self, replica: ReplicaId) {
        self.index.clear(replica);
        self.expected.clear(replica);
    }

    /// The replica says that it stored a block.
    pub fn stored(&mut self, replica: ReplicaId, block: BlockHash) {
        self.index.store(replica, block);
        self.expected.settled(replica, block);
    }

    /// The replica says that it removed a block.
    pub fn removed(&mut self, replica: ReplicaId, block: BlockHash) {
        self.index.forget(replica, block);
        self.expected.settled(replica, block);
    }

    /// What the replica says of its load; `None` once its last word is too old.
    pub fn report(&mut self, replica: ReplicaId, report: Option<Report>) {
        if let Some(member) = self.member(replica) {
            member.load.report(report);
        }
    }

    /// What the replica counts.
    pub fn observe(&mut self, replica: ReplicaId, counters: Counters) {
        if let Some(member) = self.member_mut(replica) {
            let decoding = member.load.view().decoding;
            member.rates.observe(counters, decoding);
        }
    }

    /// A request got the first byte of its answer after that time.
    pub fn answered(&mut self, replica: ReplicaId, now: Duration, seconds: f64) {
        if let Some(member) = self.member_mut(replica) {
            member.latency.observe(now, seconds);
        }
    }

    /// An answer had that many tokens, over all its sequences.
    pub fn completed(&mut self, tokens: u32, sequences: u32) {
        let tokens = f64::from(tokens) / f64::from(sequences.max(1));
        self.answer_tokens =
            Some(self.answer_tokens.map_or(tokens, |mean| mean + LATEST_ANSWER * (tokens - mean)));
    }

    /// What each answer is likely to have: clients ask for far more tokens than they get, so twice the mean of the
    /// latest answers is the most.
    fn likely_output_tokens(&self, prompt: &Prompt) -> u32 {
        let usual = self.answer_tokens.map_or(UNKNOWN_OUTPUT_TOKENS, |mean| (2.0 * mean).ceil() as u32);
        prompt.output_tokens.min(usual)
    }

    /// What is known of a replica's load.
    pub fn load(&self, replica: ReplicaId) -> Option<&Arc<Load>> {
        self.member(replica).map(|member| &member.load)
    }

    /// The pace of a replica: its own where measured, else the others'.
    pub fn pace(&self, replica: ReplicaId) -> Pace {
        let mean = self.mean_pace();
        self.member(replica).map_or(mean, |member| member.rates.pace(mean))
    }

    /// Chooses among the eligible replicas by what the fleet knows. `None` if none is eligible.
    pub fn decide(&mut self, now: Duration, prompt: &Prompt, eligible: &ReplicaSet) -> Option<Decision> {
        self.now = now;
        while let Some((replica, block)) = self.expected.overdue(now) {
            self.index.forget(replica, block);
        }
        let mut matches = std::mem::take(&mut self.matches);
        self.index.matches(&prompt.chain, &mut matches);
        // A replica that is known by tokens is matched by a text only if there are no tokens to match.
        for exact in &prompt.exact {
            self.index.matches(&exact.chain, &mut self.exact_matches);
            let known_by = Hashing::Tokens(exact.tokeniser);
            for replica in self.present.iter().filter(|replica| self.hashing(*replica) == known_by) {
                matches.set(replica, self.exact_matches.of(replica));
            }
        }
        let decision = self.decide_with(now, prompt, eligible, &matches);
        self.matches = matches;
        decision
    }

    /// The same with the matches given: for a test bed that knows every cache exactly.
    pub fn decide_with(
        &mut self,
        now: Duration,
        prompt: &Prompt,
        eligible: &ReplicaSet,
        matches: &Matches,
    ) -> Option<Decision> {
        let mean = self.mean_pace();
        let candidate = |replica: ReplicaId| {
            let member = self.member(replica)?;
            Some(Candidate {
                replica,
                key: member.key,
                load: member.load.view(),
                pace: member.rates.pace(mean),
                latency_seconds: member.latency.seconds(now),
                matched_tokens: prompt.matched_tokens(
                    member.hashing,
                    matches.of(replica),
                    self.block_size,
                    member.block_size,
                ),
            })
        };
        let candidates: Vec<Candidate> = self.present.and(eligible).iter().filter_map(candidate).collect();
        let ask = Ask {
            prompt_tokens: prompt.tokens,
            output_tokens: self.likely_output_tokens(prompt).saturating_mul(prompt.sequences.max(1)),
            session: prompt.session,
            beginning: prompt.chain.first().map(|block| block.0 as u64),
        };
        self.picker.pick(&ask, &candidates)
    }

    /// The request goes to the replica: counts it there until the guard is dropped, and notes that the replica will
    /// hold its prompt. `None` if the replica is gone.
    pub fn dispatch(&mut self, replica: ReplicaId, prompt: &Prompt, matched_tokens: u32) -> Option<Dispatch> {
        let load = self.load(replica)?.clone();
        let hashing = self.hashing(replica);
        let chain = prompt.chain(hashing);
        if self.knowledge(replica) == Knowledge::Precise && prompt.is_exact_for(hashing) {
            self.expect(replica, chain);
        } else {
            self.index.touch(replica, chain);
        }
        let sequences = prompt.sequences.max(1);
        let answers = u64::from(self.likely_output_tokens(prompt) / 2) * u64::from(sequences);
        Some(load.dispatch(Work {
            sequences,
            prefill_tokens: u64::from(prompt.tokens.saturating_sub(matched_tokens)),
            prompt_tokens: prompt.tokens.into(),
            context_tokens: u64::from(prompt.tokens) + answers,
        }))
    }

    /// As [`PrefixIndex::touch`], and what the replica was not known to hold is only expected.
    fn expect(&mut self, replica: ReplicaId, chain: &[BlockHash]) {
        for block in chain.iter().rev() {
            if !self.index.holds(replica, *block)
                && let Some((of, given_up)) = self.expected.add(self.now, replica, *block)
            {
                self.index.forget(of, given_up);
            }
            self.index.store(replica, *block);
        }
    }

    fn mean_pace(&self) -> Pace {
        Rates::mean(self.members.iter().flatten().map(|member| &member.rates), self.prior)
    }

    fn member(&self, replica: ReplicaId) -> Option<&Member> {
        self.members[usize::from(replica.0)].as_ref()
    }

    fn member_mut(&mut self, replica: ReplicaId) -> Option<&mut Member> {
        self.members[usize::from(replica.0)].as_mut()
    }
}

#[cfg(test)]
mod tests {
    use servelab_engine::hash_blocks;

    use super::*;

    fn fleet(policy: Policy, replicas: u64) -> (Fleet, ReplicaSet) {
        let options =
            FleetOptions { policy, seed: 1, index_bytes: 1 << 20, block_size: 16, prior: Pace::default() };
        let mut fleet = Fleet::new(options);
        let all = (0..replicas).map(|key| fleet.add(key).unwrap()).collect();
        (fleet, all)
    }

    fn prompt(first: u32, tokens: u32) -> Prompt {
        let ids: Vec<u32> = (first..first + tokens).collect();
        let chain = hash_blocks(&ids, 16, 0);
        Prompt { tokens, chain, is_exact: true, sequences: 1, output_tokens: 100, ..Prompt::default() }
    }

    fn send(fleet: &mut Fleet, prompt: &Prompt, eligible: &ReplicaSet) -> (Decision, Dispatch) {
        let decision = fleet.decide(Duration::ZERO, prompt, eligible).unwrap();
        let matched = decision.terms().unwrap().matched_tokens;
        let dispatch = fleet.dispatch(decision.replica, prompt, matched).unwrap();
        (decision, dispatch)
    }

    #[test]
    fn a_second_turn_goes_where_the_first_went() {
        let (mut fleet, all) = fleet(Policy::Cost, 8);
        for conversation in 0..20 {
            let (first, _) = send(&mut fleet, &prompt(conversation * 10_000, 500), &all);
            let (second, dispatch) = send(&mut fleet, &prompt(conversation * 10_000, 900), &all);
            assert_eq!(first.replica, second.replica);
            assert_eq!(second.terms().unwrap().matched_tokens, 496);
            assert_eq!(fleet.load(second.replica).unwrap().view().pending_prefill_tokens, 900 - 496);
            drop(dispatch);
        }
    }

    /// Requests that come at once spread, though no report has come in between.
    #[test]
    fn a_burst_spreads_without_any_report() {
        let (mut fleet, all) = fleet(Policy::Cost, 8);
        let sent: Vec<_> = (0..80).map(|at| send(&mut fleet, &prompt(at * 10_000, 500), &all)).collect();
        for replica in all.iter() {
            let count = sent.iter().filter(|(decision, _)| decision.replica == replica).count();
            assert_eq!(count, 10);
        }
    }

    #[test]
    fn only_eligible_replicas_are_chosen_and_a_newcomer_inherits_nothing() {
        let (mut fleet, all) = fleet(Policy::Cost, 3);
        let shared = prompt(0, 800);
        let (first, dispatch) = send(&mut fleet, &shared, &all);
        let mut others = all;
        others.remove(first.replica);
        assert_ne!(send(&mut fleet, &shared, &others).0.replica, first.replica);
        assert_eq!(fleet.decide(Duration::ZERO, &shared, &ReplicaSet::EMPTY), None);

        fleet.remove(first.replica);
        drop(dispatch);
        let newcomer = fleet.add(77).unwrap();
        assert_eq!(newcomer, first.replica, "the place is given out again");
        let terms = fleet.decide(Duration::ZERO, &shared, &all).unwrap().table;
        let of_newcomer = terms.iter().find(|terms| terms.replica == newcomer).unwrap();
        assert_eq!((of_newcomer.matched_tokens, of_newcomer.queue_seconds), (0, 0.0));
    }

    /// The same prompt as text of four pieces a token, and as tokens.
    fn tokenised(first: u32, tokens: u32, tokeniser: TokeniserId) -> Prompt {
        let Prompt { chain, .. } = prompt(first, tokens);
        let exact = Exact { tokeniser, tokens, first_tokens: tokens, chain };
        let text = Prompt { is_exact: false, ..prompt(first + 1_000_000, 4 * tokens) };
        Prompt { tokens, pieces: 4 * tokens, exact: vec![exact], ..text }
    }

    #[test]
    fn each_replica_is_matched_by_what_its_blocks_are_known_by() {
        let (mut fleet, all) = fleet(Policy::Cost, 2);
        let [by_tokens, by_text] = all.iter().collect::<Vec<_>>().try_into().unwrap();
        let id = TokeniserId(7);
        assert!(
            fleet.set_hashing(by_tokens, Hashing::Tokens(id)) && !fleet.set_hashing(by_text, Hashing::Text)
        );
        let prompt = tokenised(0, 320, id);
        for replica in [by_tokens, by_text] {
            drop(fleet.dispatch(replica, &prompt, 0));
        }
        let matched = |fleet: &mut Fleet, prompt: &Prompt| {
            let table = fleet.decide(Duration::ZERO, prompt, &all).unwrap().table;
            [by_tokens, by_text]
                .map(|id| table.iter().find(|terms| terms.replica == id).unwrap().matched_tokens)
        };
        assert_eq!(matched(&mut fleet, &prompt), [304, 319], "of a whole prompt one token is computed");
        let other_tokeniser = tokenised(0, 320, TokeniserId(8));
        assert_eq!(matched(&mut fleet, &other_tokeniser), [0, 319]);
        let not_tokenised = Prompt { exact: Vec::new(), tokens: 1280, ..prompt.clone() };
        assert_eq!(matched(&mut fleet, &not_tokenised), [0, 1279]);
        drop(fleet.dispatch(by_tokens, &not_tokenised, 0));
        assert_eq!(
            matched(&mut fleet, &not_tokenised),
            [1279, 1279],
            "its text is noted in place of its tokens"
        );
        assert_eq!(not_tokenised.matched_by(Hashing::Tokens(id)), Hashing::Text);
        fleet.set_block_size(by_tokens, 64);
        assert_eq!(matched(&mut fleet, &prompt), [256, 319], "its blocks are larger");
        assert!(fleet.set_hashing(by_tokens, Hashing::Text), "parity is lost");
        assert_eq!(matched(&mut fleet, &prompt), [0, 319]);
        drop(fleet.dispatch(by_tokens, &prompt, 0));
        assert_eq!(matched(&mut fleet, &prompt), [319, 319], "text hashing still finds it");
    }

    #[test]
    fn the_cache_of_a_replica_bounds_what_it_is_thought_to_hold() {
        let (mut fleet, all) = fleet(Policy::Cost, 1);
        let replica = all.iter().next().unwrap();
        fleet.set_capacity(replica, 1600);
        (0..10).for_each(|at| drop(send(&mut fleet, &prompt(at * 10_000, 800), &all)));
        assert_eq!(fleet.index().blocks(replica), 100);
        fleet.clear(replica);
        assert!(fleet.index().is_empty());
    }

    #[test]
    fn what_a_replica_tells_counts_and_what_it_does_not_confirm_is_given_up() {
        let (mut fleet, all) = fleet(Policy::Cost, 2);
        let replica = all.iter().next().unwrap();
        all.iter().for_each(|replica| fleet.set_knowledge(replica, Knowledge::Precise));
        let (told, sent) = (prompt(0, 64), prompt(50_000, 64));
        told.chain.iter().for_each(|block| fleet.stored(replica, *block));
        let matched = |fleet: &mut Fleet, now, prompt: &Prompt| {
            let table = fleet.decide(now, prompt, &all).unwrap().table;
            table.iter().map(|terms| terms.matched_tokens).sum::<u32>()
        };
        assert_eq!(matched(&mut fleet, Duration::ZERO, &told), 63, "one token is always computed");
        drop(fleet.dispatch(replica, &sent, 0));
        assert_eq!(matched(&mut fleet, Duration::ZERO, &sent), 63, "it is expected");
        fleet.stored(replica, sent.chain[0]);
        assert_eq!(
            matched(&mut fleet, crate::choice::expected::PATIENCE, &sent),
            16,
            "one block was confirmed"
        );
        fleet.removed(replica, told.chain[3]);
        assert_eq!(matched(&mut fleet, Duration::ZERO, &told), 48, "one was evicted");

        let guess = Prompt { is_exact: false, ..prompt(90_000, 64) };
        drop(fleet.dispatch(replica, &guess, 0));
        assert_eq!(matched(&mut fleet, 10 * crate::choice::expected::PATIENCE, &guess), 63);
    }

    /// What a replica tells is of tokens: it counts for a prompt whose tokens are known, and stands while they are not.
    #[test]
    fn what_a_replica_tells_counts_for_prompts_in_its_own_tokens() {
        let (mut fleet, all) = fleet(Policy::Cost, 1);
        let replica = all.iter().next().unwrap();
        let id = TokeniserId(7);
        let (text, sent) = (tokenised(0, 64, id), tokenised(50_000, 64, id));
        fleet.set_knowledge(replica, Knowledge::Precise);
        text.exact[0].chain.iter().for_each(|block| fleet.stored(replica, *block));
        let matched = |fleet: &mut Fleet, now, prompt: &Prompt| {
            fleet.decide(now, prompt, &all).unwrap().terms().unwrap().matched_tokens
        };
        assert_eq!(matched(&mut fleet, Duration::ZERO, &text), 0, "the replica's tokens are not known");
        assert_eq!(matched(&mut fleet, Duration::ZERO, &prompt(0, 64)), 63, "but those of token ids are");
        fleet.set_hashing(replica, Hashing::Tokens(id));
        assert_eq!(matched(&mut fleet, Duration::ZERO, &text), 48);
        assert_eq!(matched(&mut fleet, Duration::ZERO, &prompt(0, 64)), 48);
        drop(fleet.dispatch(replica, &sent, 0));
        assert_eq!(matched(&mut fleet, Duration::ZERO, &sent), 48, "it is expected");
        assert_eq!(matched(&mut fleet, crate::choice::expected::PATIENCE, &sent), 0, "it was not confirmed");
        fleet.set_hashing(replica, Hashing::Text);
        assert_eq!(matched(&mut fleet, Duration::ZERO, &text), 0, "parity is lost");
        fleet.set_hashing(replica, Hashing::Tokens(id));
        assert_eq!(matched(&mut fleet, Duration::ZERO, &text), 48, "and found again");
    }

    #[test]
    fn there_is_room_for_256_and_no_more() {
        let (mut fleet, all) = fleet(Policy::Cost, 256);
        assert_eq!(all.iter().count(), 256);
        assert_eq!(fleet.add(1), None);
        let (decision, _dispatch) = send(&mut fleet, &prompt(0, 100), &all);
        assert_eq!(decision.table.len(), 256);
    }
}
