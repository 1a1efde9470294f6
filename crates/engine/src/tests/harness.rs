//! Requests in one line, and an engine whose every step is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::{
    AdmissionError, BlockHash, Engine, EngineConfig, Event, FakeRunner, FinishReason, KvEvent, Request,
    RequestId, SamplingParams, StepReport, StepTrace, StopConditions, StoredBlock, TokenId, TokenLogprobs,
};

pub const VOCAB: u32 = 50;

/// SplitMix64 (Steele et al. 2014): small, and the same everywhere.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// In `0..end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// In `low..=high`.
    pub fn range(&mut self, low: u32, high: u32) -> u32 {
        low + self.below(u64::from(high - low) + 1) as u32
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

pub fn config(num_blocks: u32) -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks,
        max_model_len: 64,
        max_batched_tokens: 16,
        max_running: 8,
        max_waiting: 16,
        prefix_cache: true,
    }
}

/// A greedy request of `max_tokens` tokens that nothing stops.
pub fn request(id: u64, prompt: &[TokenId], max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: prompt.into(),
        n: 1,
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: Arc::default() },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    }
}

/// The same with `n` choices that differ from each other.
pub fn choices(id: u64, prompt: &[TokenId], max_tokens: u32, n: u32) -> Request {
    let sampling = SamplingParams { temperature: 1.0, seed: id, ..SamplingParams::greedy() };
    Request { n, sampling: Arc::new(sampling), ..request(id, prompt, max_tokens) }
}

/// `len` tokens that no other `start` shares.
pub fn prompt(start: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|at| start * 100 + at).collect()
}

/// What came out of one request.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub tokens: BTreeMap<u32, Vec<TokenId>>,
    pub finished: BTreeMap<u32, FinishReason>,
    pub cached_tokens: Vec<u32>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub preemptions: u32,
}

/// An engine around the fake runner. Every step is followed by the check of all invariants.
pub struct Checked {
    pub engine: Engine<FakeRunner>,
    pub requests: BTreeMap<RequestId, Request>,
    pub outcomes: BTreeMap<RequestId, Outcome>,
    pub steps: u64,
    pub trace: Vec<StepTrace>,
    pub replayed: Replayed,
}

/// The prefix cache as somebody sees it who only hears of its changes.
#[derive(Default)]
pub struct Replayed(pub BTreeMap<BlockHash, StoredBlock>);

impl Replayed {
    pub fn apply(&mut self, events: Vec<KvEvent>) {
        for event in events {
            match event {
                KvEvent::Stored(block) => {
                    let before = self.0.insert(block.hash, block);
                    assert_eq!(before, None, "a block was stored twice");
                }
                KvEvent::Removed(hash) => {
                    assert!(self.0.remove(&hash).is_some(), "{hash:?} was removed and is not there");
                }
                KvEvent::Cleared => self.0.clear(),
            }
        }
    }

    pub fn check(&self, blocks: Vec<StoredBlock>) {
        let there: BTreeMap<_, _> = blocks.into_iter().map(|block| (block.hash, block)).collect();
        assert_eq!(self.0, there, "the replayed events and the cache differ");
    }
}

impl Checked {
    pub fn new(config: EngineConfig) -> Self {
        Self::taking(1, config)
    }

    /// With a runner that takes so many steps at once.
    pub fn taking(steps_at_once: usize, config: EngineConfig) -> Self {
        let runner = FakeRunner::new(config.num_blocks, config.block_size, VOCAB).taking(steps_at_once);
        let mut engine = Engine::new(config, runner).unwrap();
        engine.listen_to_kv(true);
        Self {
            engine,
            requests: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            steps: 0,
            trace: Vec::new(),
            replayed: Replayed::default(),
        }
    }

    pub fn add(&mut self, request: Request) -> Result<(), AdmissionError> {
        self.engine.add(request.clone())?;
        self.outcomes.insert(request.id, Outcome::default());
        self.requests.insert(request.id, request);
        Ok(())
    }

    pub fn check(&self) {
        self.engine.check_integrity().unwrap();
        let stats = self.engine.stats();
        assert_eq!(stats.blocks_free + stats.blocks_held + stats.blocks_cached, stats.blocks_total);
        if stats.running == 0 {
            assert_eq!(stats.blocks_held, 0, "blocks are held and nothing runs");
        }
    }

    pub fn step(&mut self) -> StepReport {
        self.steps += 1;
        let had_work = self.engine.has_work();
        let ran = self.engine.runner().steps();
        let report = self.engine.step(Duration::from_millis(self.steps));
        self.trace.push(self.engine.trace());
        self.check();
        self.replayed.apply(self.engine.take_kv_events());
        self.replayed.check(self.engine.kv_blocks());
        let computed = report.prefill_tokens + report.decode_tokens;
        assert!(computed <= self.engine.config().max_batched_tokens);
        assert_eq!(report.sequences > 0, self.engine.runner().steps() > ran, "a step without work");
        assert!(report.sequences == 0 || computed > 0 || report.error.is_some());
        assert!(computed == 0 || report.sequences > 0);
        assert!(
            !had_work || computed > 0 || !report.events.is_empty() || report.error.is_some(),
            "no progress"
        );
        report.events.iter().for_each(|event| self.record(event));
        self.check_ended();
        report
    }

    fn record(&mut self, event: &Event) {
        let outcome = self.outcomes.get_mut(&event.request()).expect("the request is known");
        match event {
            Event::Scheduled { cached_tokens, .. } => outcome.cached_tokens.push(*cached_tokens),
            Event::PromptLogprobs { logprobs, .. } => {
                assert!(outcome.prompt_logprobs.is_none() && outcome.tokens.is_empty());
                outcome.prompt_logprobs = Some(logprobs.clone());
            }
            Event::Token { choice, token, .. } => {
                assert!(!outcome.finished.contains_key(choice), "a token after the end");
                outcome.tokens.entry(*choice).or_default().push(*token);
            }
            Event::Preempted { choice, .. } => {
                assert!(!outcome.finished.contains_key(choice), "preempted after the end");
                outcome.preemptions += 1;
            }
            Event::Finished { choice, reason, .. } => {
                let before = outcome.finished.insert(*choice, reason.clone());
                assert_eq!(before, None, "a choice ended twice");
            }
        }
    }

    /// A choice that has ended is nowhere; one that has not is somewhere (which `check_integrity`
    /// counts).
    fn check_ended(&self) {
        let snapshot = self.engine.snapshot();
        let running = snapshot.running.iter().map(|sequence| (sequence.request, sequence.choice));
        let waiting = snapshot.waiting.iter().map(|sequence| (sequence.request, sequence.choice));
        let present: BTreeSet<_> = running.chain(waiting).collect();
        for (request, choice) in &present {
            assert!(!self.outcomes[request].finished.contains_key(choice), "{request:?} ended and is here");
        }
        for (id, outcome) in &self.outcomes {
            let ended = outcome.finished.len() as u32 == self.requests[id].n;
            assert_eq!(ended, !present.iter().any(|(request, _)| request == id), "{id:?} is lost");
        }
    }

    /// Steps until nothing is left, at most `bound` times.
    pub fn finish(&mut self, bound: u64) {
        let last = self.steps + bound;
        while self.engine.has_work() {
            assert!(self.steps < last, "still at work after {bound} steps");
            self.step();
        }
        let stats = self.engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.blocks_held), (0, 0, 0));
    }

    pub fn outcome(&self, id: u64) -> &Outcome {
        &self.outcomes[&RequestId(id)]
    }

    /// Every choice of every request ended in a way its tokens agree with, and has the tokens that
    /// it has alone.
    pub fn check_answers(&self) {
        for (id, request) in &self.requests {
            let outcome = &self.outcomes[id];
            assert_eq!(outcome.finished.len() as u32, request.n, "{id:?} has not ended");
            for (choice, reason) in &outcome.finished {
                let tokens = outcome.tokens.get(choice).map_or(&[][..], Vec::as_slice);
                self.check_answer(request, *choice, tokens, reason);
            }
            self.check_scores(request, outcome);
        }
    }

    fn check_answer(&self, request: &Request, choice: u32, tokens: &[TokenId], reason: &FinishReason) {
        let expected = self.engine.runner().answer(request, choice);
        let id = request.id;
        match reason {
            FinishReason::Length => {
                assert_eq!(tokens, expected, "{id:?} choice {choice}");
                assert_eq!(tokens.len(), request.stop.max_tokens as usize);
            }
            FinishReason::Stop(Some(token)) => {
                assert_eq!(tokens, expected, "{id:?} choice {choice}");
                assert_eq!(tokens.last(), Some(token));
                assert!(request.stop.stop_token_ids.contains(token));
                assert!(tokens.len() > request.stop.min_tokens as usize);
            }
            FinishReason::Stop(None) | FinishReason::Abort | FinishReason::Error(_) => {
                assert!(expected.starts_with(tokens), "{id:?} choice {choice}: {tokens:?} of {expected:?}");
                assert!(tokens.len() < expected.len());
            }
        }
    }

    fn check_scores(&self, request: &Request, outcome: &Outcome) {
        let Some(top) = request.sampling.prompt_logprobs else {
            assert_eq!(outcome.prompt_logprobs, None);
            return;
        };
        let Some(scores) = &outcome.prompt_logprobs else {
            assert!(outcome.tokens.is_empty(), "tokens came before the scores of the prompt");
            return;
        };
        let runner = self.engine.runner();
        let score = |at: usize| runner.score(&request.prompt[..at], request.prompt[at], top);
        let expected: Vec<_> = (0..request.prompt.len()).map(|at| (at > 0).then(|| score(at))).collect();
        assert_eq!(scores, &expected);
    }
}

/// The tokens of all choices of `request` from an engine in which nothing else runs, without a
/// prefix cache and with room for everything.
pub fn alone(request: &Request, block_size: u32) -> BTreeMap<u32, Vec<TokenId>> {
    let mut checked = Checked::new(EngineConfig {
        block_size,
        num_blocks: 512,
        max_model_len: 1024,
        max_batched_tokens: 1024,
        max_running: 16,
        max_waiting: 1,
        prefix_cache: false,
    });
    checked.add(request.clone()).unwrap();
    checked.finish(1024);
    checked.outcome(request.id.0).tokens.clone()
}
