//! The list of replicas: who is there, who may get a request, and what became of those that did.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::address::Address;
use super::breaker::{Breaker, BreakerState};
use super::exposition::Exposition;
use crate::choice::fleet::{Fleet, FleetOptions, Hashing, Knowledge, Prompt};
use crate::choice::load::Dispatch;
use crate::choice::picker::Decision;
use crate::choice::replica_set::{MAX_REPLICAS, ReplicaId, ReplicaSet};
use crate::events::mirror::Change;
use crate::events::{StreamState, StreamStats};
use crate::parity::Parity;
use crate::parity::tokeniser::Tokeniser;

/// Whether a replica may get requests, by its own word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not asked yet.
    Unknown,
    Ready,
    /// It says so, or does not answer.
    NotReady,
    /// It was taken off the list; what it has may end.
    Removed,
}

impl Health {
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::NotReady => "not_ready",
            Self::Removed => "removed",
        }
    }
}

/// One replica.
#[derive(Debug)]
pub struct Replica {
    pub id: ReplicaId,
    pub address: Address,
    /// The same as text, for whoever keeps it.
    pub name: Arc<str>,
    /// Cancelled when it is taken off the list.
    pub removed: CancellationToken,
    /// True while it answers nothing at all, not even whether it is well.
    lost: watch::Sender<bool>,
    /// Its stream of KV events.
    pub kv: StreamStats,
    /// Told when what it tokenises with may have changed.
    pub check_parity: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    health: Health,
    breaker: Breaker,
    process_start_seconds: Option<f64>,
    parity: Parity,
}

impl Replica {
    pub fn health(&self) -> Health {
        lock(&self.state).health
    }

    /// Whether it answers nothing at all.
    pub fn set_lost(&self, lost: bool) {
        let changed = self.lost.send_if_modified(|known| std::mem::replace(known, lost) != lost);
        if changed && lost {
            tracing::warn!(replica = %self.address, "it answers nothing; what waits for it is taken elsewhere");
        }
    }

    /// Waits until it answers nothing at all.
    pub async fn until_lost(&self) {
        // The sender is at hand as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    /// Whether the router tokenises as it does, by the last check.
    pub fn parity(&self) -> Parity {
        lock(&self.state).parity.clone()
    }
}

/// There are as many replicas as the router can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there are {MAX_REPLICAS} replicas already, which is the most of one router; remove one, or run another router"
)]
pub struct TooMany;

/// A replica that was chosen, with the request counted there until the guards are dropped.
#[derive(Debug)]
pub struct Chosen {
    pub replica: Arc<Replica>,
    pub decision: Decision,
    /// What the match was found by.
    pub hashing: Hashing,
    pub dispatch: Dispatch,
    pub ticket: Ticket,
}

/// What `GET /replicas` tells of one.
#[derive(Clone, Debug, Serialize)]
pub struct ReplicaView {
    pub url: String,
    pub health: &'static str,
    pub breaker: &'static str,
    /// Whether the router tokenises as it does: `kept`, `lost` or `unknown`.
    pub parity: &'static str,
    /// Why it is not kept.
    pub parity_detail: Option<String>,
    /// What its blocks are known by: `tokens` or `text`.
    pub hashing: &'static str,
    pub in_flight: u32,
    pub pending_prefill_tokens: u64,
    pub decoding: u32,
    pub kv_usage: f64,
    pub prefill_tokens_per_second: f64,
    pub step_seconds: f64,
    pub index_blocks: u32,
    /// How its KV events stand.
    pub kv_events: StreamState,
    pub kv_batches: u64,
    pub kv_gaps: u64,
    pub kv_resyncs: u64,
}

/// All replicas. Every method is short and never waits for the network.
#[derive(Debug)]
pub struct Registry {
    start: Instant,
    inner: Mutex<Inner>,
    /// Moves whenever a replica may have become eligible.
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    fleet: Fleet,
    replicas: BTreeMap<ReplicaId, Arc<Replica>>,
    /// Those that prompts are tokenised with, because replicas do.
    tokenisers: Vec<Arc<Tokeniser>>,
}

/// Tokenisers that a prompt goes through at most: one, and a second while a new model is rolled out.
const MAX_TOKENISERS: usize = 2;

impl Registry {
    pub fn new(options: FleetOptions) -> Self {
        let inner = Inner { fleet: Fleet::new(options), replicas: BTreeMap::new(), tokenisers: Vec::new() };
        Self { start: Instant::now(), inner: Mutex::new(inner), changes: watch::Sender::new(0) }
    }

    /// As [`Fleet::take_memory`].
    pub fn take_memory(&self) {
        lock(&self.inner).fleet.take_memory();
    }

    /// The clock of everything here.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Sees every change after which a replica may be eligible that was not.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Takes a replica in, unless it is there already. `Ok(None)` if it is.
    ///
    /// # Errors
    /// If there is no place left.
    pub fn add(&self, address: &Address) -> Result<Option<Arc<Replica>>, TooMany> {
        let mut inner = lock(&self.inner);
        if inner.replicas.values().any(|replica| replica.address == *address) {
            return Ok(None);
        }
        let id = inner.fleet.add(address.key()).ok_or(TooMany)?;
        let state = State {
            health: Health::Unknown,
            breaker: Breaker::default(),
            process_start_seconds: None,
            parity: Parity::Unknown,
        };
        let replica = Arc::new(Replica {
            id,
            address: address.clone(),
            name: address.to_string().into(),
            removed: CancellationToken::new(),
            lost: watch::Sender::new(false),
            kv: StreamStats::default(),
            check_parity: Notify::new(),
            state: Mutex::new(state),
        });
        inner.replicas.insert(id, replica.clone());
        tracing::info!(replica = %address, "a replica was added");
        Ok(Some(replica))
    }

    /// Takes a replica off the list: it gets no new request, those that it has end as they would have. False if it
    /// is not there.
    pub fn remove(&self, address: &Address) -> bool {
        let mut inner = lock(&self.inner);
        let Some(replica) = inner.replicas.values().find(|replica| replica.address == *address).cloned()
        else {
            return false;
        };
        lock(&replica.state).health = Health::Removed;
        replica.removed.cancel();
        inner.replicas.remove(&replica.id);
        inner.fleet.remove(replica.id);
        inner.settle_tokenisers();
        tracing::info!(replica = %address, "a replica was removed");
        true
    }

    pub fn addresses(&self) -> Vec<Address> {
        lock(&self.inner).replicas.values().map(|replica| replica.address.clone()).collect()
    }

    pub fn len(&self) -> usize {
        lock(&self.inner).replicas.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names of replicas; of nobody for one that is gone.
    pub fn names(&self, replicas: impl Iterator<Item = ReplicaId>) -> Vec<Arc<str>> {
        let inner = lock(&self.inner);
        let name = |replica| match inner.replicas.get(&replica) {
            Some(replica) => replica.name.clone(),
            None => "gone".into(),
        };
        replicas.map(name).collect()
    }

    /// Replicas that say that they are ready.
    pub fn ready(&self) -> usize {
        lock(&self.inner).replicas.values().filter(|replica| replica.health() == Health::Ready).count()
    }

    /// Chooses a replica that is ready, whose breaker lets requests through and that was not tried before, and counts
    /// the request there. `None` if there is none.
    pub fn choose(self: &Arc<Self>, prompt: &Prompt, tried: &ReplicaSet) -> Option<Chosen> {
        let now = self.now();
        let mut inner = lock(&self.inner);
        let may = |replica: &&Arc<Replica>| {
            let state = lock(&replica.state);
            state.health == Health::Ready && state.breaker.allows(now) && !tried.contains(replica.id)
        };
        let eligible: ReplicaSet = inner.replicas.values().filter(may).map(|replica| replica.id).collect();
        let decision = inner.fleet.decide(now, prompt, &eligible)?;
        let replica = inner.replicas.get(&decision.replica)?.clone();
        let matched = decision.terms().map_or(0, |terms| terms.matched_tokens);
        let dispatch = inner.fleet.dispatch(replica.id, prompt, matched)?;
        let tries = lock(&replica.state).breaker.begin(now);
        let ticket = Ticket { registry: self.clone(), replica: replica.clone(), tries, told: false };
        let hashing = prompt.matched_by(inner.fleet.hashing(replica.id));
        Some(Chosen { replica, decision, hashing, dispatch, ticket })
    }

    /// A health check has an answer.
    pub fn set_ready(&self, replica: &Arc<Replica>, ready: bool) {
        {
            let mut state = lock(&replica.state);
            let health = if ready { Health::Ready } else { Health::NotReady };
            if state.health == health || state.health == Health::Removed {
                return;
            }
            tracing::info!(replica = %replica.address, from = state.health.name(), to = health.name(), "health");
            state.health = health;
        }
        if ready {
            replica.check_parity.notify_one();
            self.changed();
        }
    }

    /// What a check of the replica's tokens has found. A change is told in the log, a loss loudly.
    pub fn set_parity(&self, replica: &Arc<Replica>, parity: Parity) {
        let mut inner = lock(&self.inner);
        if !inner.is_current(replica) {
            return;
        }
        {
            let before = &mut lock(&replica.state).parity;
            // A question that got no clear answer changes nothing that is known; a new start has forgotten it already.
            let is_known = matches!(before, Parity::Kept(_) | Parity::Lost(_));
            if parity.is(before) || is_known && matches!(parity, Parity::Unclear(_)) {
                return;
            }
            *before = parity.clone();
        }
        let (name, detail) = (&replica.address, parity.detail().unwrap_or_default());
        match &parity {
            Parity::Lost(_) => {
                tracing::warn!(replica = %name, detail, "TOKEN PARITY LOST: the router tokenises \
                prompts otherwise than this replica; it is matched by text until they agree")
            }
            Parity::Kept(_) => tracing::info!(replica = %name, "token parity: matched by its own tokens"),
            Parity::Unclear(_) | Parity::Unknown => {
                tracing::info!(replica = %name, detail, "token parity is not known; it is matched by text");
            }
        }
        inner.settle_tokenisers();
    }

    /// The tokenisers whose tokens the choice can use.
    pub fn tokenisers(&self) -> Vec<Arc<Tokeniser>> {
        lock(&self.inner).tokenisers.clone()
    }

    /// What the replica's blocks are known by. What it tells of them counts for every prompt only if it is by tokens;
    /// else only for those given as token ids.
    pub fn hashing(&self, replica: &Replica) -> Hashing {
        lock(&self.inner).fleet.hashing(replica.id)
    }

    /// What a replica exports, or `None` if it could not be read this time.
    pub fn observe(&self, replica: &Arc<Replica>, exposition: Option<&Exposition>) {
        let mut inner = lock(&self.inner);
        if !inner.is_current(replica) {
            return;
        }
        inner.fleet.report(replica.id, exposition.and_then(|exposition| exposition.report));
        let Some(exposition) = exposition else { return };
        if let Some(tokens) = exposition.capacity_tokens {
            inner.fleet.set_capacity(replica.id, tokens);
        }
        if let Some(tokens) = exposition.block_size {
            inner.fleet.set_block_size(replica.id, tokens);
        }
        inner.fleet.observe(replica.id, exposition.counters);
        if exposition.process_start_seconds.is_some() {
            let before = std::mem::replace(
                &mut lock(&replica.state).process_start_seconds,
                exposition.process_start_seconds,
            );
            if before.is_some() && before != exposition.process_start_seconds {
                tracing::info!(replica = %replica.address, "it was started anew; its cache is empty");
                // A replica that tells what it holds tells that too.
                if inner.fleet.knowledge(replica.id) == Knowledge::Guessed {
                    inner.fleet.clear(replica.id);
                }
                // Perhaps with another model; until that is known again, by text.
                lock(&replica.state).parity = Parity::Unknown;
                inner.settle_tokenisers();
                replica.check_parity.notify_one();
            }
        }
    }

    /// What the replica says that it holds.
    pub fn apply_kv(&self, replica: &Arc<Replica>, changes: &[Change]) {
        let mut inner = lock(&self.inner);
        if !inner.is_current(replica) {
            return;
        }
        for change in changes {
            match change {
                Change::Stored(block) => inner.fleet.stored(replica.id, *block),
                Change::Removed(block) => inner.fleet.removed(replica.id, *block),
                Change::Cleared => inner.fleet.clear(replica.id),
            }
        }
    }

    /// How it is known from now on what the replica holds.
    pub fn set_knowledge(&self, replica: &Arc<Replica>, knowledge: Knowledge) {
        let mut inner = lock(&self.inner);
        if inner.is_current(replica) {
            inner.fleet.set_knowledge(replica.id, knowledge);
        }
    }

    /// Tokens per block of the chains that requests bring.
    pub fn block_size(&self) -> u32 {
        lock(&self.inner).fleet.block_size()
    }

    /// A request got the first byte of its answer after that time.
    pub fn answered(&self, replica: &Arc<Replica>, seconds: f64) {
        let now = self.now();
        let mut inner = lock(&self.inner);
        if inner.is_current(replica) {
            inner.fleet.answered(replica.id, now, seconds);
        }
    }

    /// An answer had that many tokens, over all its sequences.
    pub fn completed(&self, tokens: u32, sequences: u32) {
        lock(&self.inner).fleet.completed(tokens, sequences);
    }

    pub fn breaker(&self, replica: &Replica) -> BreakerState {
        lock(&replica.state).breaker.state(self.now())
    }

    pub fn view(&self) -> Vec<ReplicaView> {
        let now = self.now();
        let inner = lock(&self.inner);
        let view = |replica: &Arc<Replica>| {
            let load = inner.fleet.load(replica.id)?.view();
            let pace = inner.fleet.pace(replica.id);
            let state = lock(&replica.state);
            Some(ReplicaView {
                url: replica.address.to_string(),
                health: state.health.name(),
                breaker: state.breaker.state(now).name(),
                parity: state.parity.name(),
                parity_detail: state.parity.detail().map(str::to_owned),
                hashing: inner.fleet.hashing(replica.id).name(),
                in_flight: load.in_flight,
                pending_prefill_tokens: load.pending_prefill_tokens,
                decoding: load.decoding,
                kv_usage: load.kv_usage,
                prefill_tokens_per_second: pace.prefill_tokens_per_second,
                step_seconds: pace.step_seconds,
                index_blocks: inner.fleet.index().blocks(replica.id),
                kv_events: replica.kv.state(),
                kv_batches: replica.kv.batches.load(Ordering::Relaxed),
                kv_gaps: replica.kv.gaps.load(Ordering::Relaxed),
                kv_resyncs: replica.kv.resyncs.load(Ordering::Relaxed),
            })
        };
        inner.replicas.values().filter_map(view).collect()
    }

    /// Bytes that the index of prefixes takes.
    pub fn index_bytes(&self) -> usize {
        lock(&self.inner).fleet.index().bytes()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Inner {
    /// Whether the replica is still on the list, and its place not somebody else's by now.
    fn is_current(&self, replica: &Arc<Replica>) -> bool {
        self.replicas.get(&replica.id).is_some_and(|current| Arc::ptr_eq(current, replica))
    }

    /// Takes the tokenisers that most replicas have, and matches by tokens whoever has one of them.
    fn settle_tokenisers(&mut self) {
        let mut counts: Vec<(usize, Arc<Tokeniser>)> = Vec::new();
        let kept: Vec<(ReplicaId, Option<Arc<Tokeniser>>)> = self
            .replicas
            .values()
            .map(|replica| match replica.parity() {
                Parity::Kept(tokeniser) => (replica.id, Some(tokeniser)),
                Parity::Unknown | Parity::Unclear(_) | Parity::Lost(_) => (replica.id, None),
            })
            .collect();
        for tokeniser in kept.iter().filter_map(|(_, tokeniser)| tokeniser.as_ref()) {
            match counts.iter_mut().find(|(_, counted)| counted.id() == tokeniser.id()) {
                Some((count, _)) => *count += 1,
                None => counts.push((1, tokeniser.clone())),
            }
        }
        counts.sort_by_key(|(count, tokeniser)| (std::cmp::Reverse(*count), tokeniser.id()));
        self.tokenisers = counts.into_iter().map(|(_, tokeniser)| tokeniser).take(MAX_TOKENISERS).collect();
        for (replica, tokeniser) in kept {
            let used = tokeniser.filter(|own| self.tokenisers.iter().any(|used| used.id() == own.id()));
            let hashing = used.map_or(Hashing::Text, |own| Hashing::Tokens(own.id()));
            self.fleet.set_hashing(replica, hashing);
        }
    }
}

/// What became of one request, told to the breaker. Dropped without a word, the request says nothing about the
/// replica: its client left.
#[derive(Debug)]
pub struct Ticket {
    registry: Arc<Registry>,
    replica: Arc<Replica>,
    tries: bool,
    told: bool,
}

impl Ticket {
    pub fn succeeded(&mut self) {
        if !std::mem::replace(&mut self.told, true) {
            lock(&self.replica.state).breaker.succeeded();
            if self.tries {
                self.registry.changed();
            }
        }
    }

    pub fn failed(&mut self) {
        if !std::mem::replace(&mut self.told, true) {
            let now = self.registry.now();
            lock(&self.replica.state).breaker.failed(now, self.tries);
        }
    }
}

impl Ticket {
    /// The replica counted other tokens than the router: it is asked again what it tokenises with.
    pub fn doubt_parity(&self) {
        self.replica.check_parity.notify_one();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.told {
            lock(&self.replica.state).breaker.abandoned(self.tries);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here is left half written by a panic that could matter more than going on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::policy::Policy;
    use crate::choice::rates::Pace;

    fn registry() -> Arc<Registry> {
        Arc::new(Registry::new(FleetOptions {
            policy: Policy::Cost,
            seed: 1,
            index_bytes: 1 << 20,
            block_size: 16,
            prior: Pace::default(),
        }))
    }

    fn add(registry: &Registry, port: u16) -> Arc<Replica> {
        registry.add(&format!("127.0.0.1:{port}").parse().unwrap()).unwrap().unwrap()
    }

    fn choose(registry: &Arc<Registry>) -> Option<Chosen> {
        registry.choose(&Prompt::default(), &ReplicaSet::EMPTY)
    }

    #[test]
    fn only_ready_replicas_with_a_closed_breaker_are_chosen() {
        let registry = registry();
        let (first, second) = (add(&registry, 1), add(&registry, 2));
        assert!(choose(&registry).is_none(), "nobody has said to be ready");
        registry.set_ready(&first, true);
        for _ in 0..3 {
            choose(&registry).unwrap().ticket.failed();
        }
        assert!(choose(&registry).is_none(), "its breaker is open");
        registry.set_ready(&second, true);
        assert_eq!(choose(&registry).unwrap().replica.id, second.id);
        assert_eq!((registry.len(), registry.ready()), (2, 2));
    }

    #[test]
    fn the_same_address_is_one_replica_and_a_removed_one_comes_back_as_another() {
        let registry = registry();
        let first = add(&registry, 1);
        assert_eq!(registry.add(&first.address).unwrap().map(|replica| replica.id), None);
        registry.set_ready(&first, true);
        let chosen = choose(&registry).unwrap();
        assert!(registry.remove(&first.address) && !registry.remove(&first.address));
        assert!(first.removed.is_cancelled() && choose(&registry).is_none());
        let again = add(&registry, 1);
        registry.set_ready(&first, true);
        assert_eq!(again.health(), Health::Unknown, "a late word about the one that is gone changes nothing");
        registry.answered(&first, 9.0);
        drop(chosen);
        assert_eq!(registry.view()[0].in_flight, 0);
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_a_replica_that_turns_ready() {
        let registry = registry();
        let replica = add(&registry, 1);
        let mut changes = registry.changes();
        registry.set_ready(&replica, true);
        changes.changed().await.unwrap();
        assert!(choose(&registry).is_some());
    }

    #[test]
    fn a_replica_that_was_started_anew_holds_nothing() {
        let registry = registry();
        let replica = add(&registry, 1);
        registry.set_ready(&replica, true);
        let chain = servelab_engine::hash_blocks(&[7; 160], 16, 0);
        let prompt = Prompt { tokens: 160, chain, ..Prompt::default() };
        let began = |seconds| Exposition { process_start_seconds: Some(seconds), ..Exposition::default() };
        registry.observe(&replica, Some(&began(100.0)));
        registry.choose(&prompt, &ReplicaSet::EMPTY).unwrap();
        registry.observe(&replica, Some(&began(100.0)));
        assert_eq!(registry.view()[0].index_blocks, 10);
        registry.observe(&replica, Some(&began(200.0)));
        assert_eq!(registry.view()[0].index_blocks, 0);
    }

    fn kept(template: &'static str) -> Parity {
        Parity::Kept(Arc::new(Tokeniser::new(&crate::parity::tokeniser::tests::files(template)).unwrap()))
    }

    #[test]
    fn an_unclear_answer_takes_nothing_away_and_a_new_start_does() {
        let registry = registry();
        let replica = add(&registry, 1);
        registry.set_parity(&replica, kept("a"));
        registry.set_parity(&replica, Parity::Unclear("it was busy".into()));
        assert_eq!((replica.parity().name(), registry.tokenisers().len()), ("kept", 1));
        let began = |seconds| Exposition { process_start_seconds: Some(seconds), ..Exposition::default() };
        registry.observe(&replica, Some(&began(1.0)));
        registry.observe(&replica, Some(&began(2.0)));
        assert_eq!((replica.parity().name(), registry.tokenisers().len()), ("unknown", 0));
        assert_eq!(registry.hashing(&replica), Hashing::Text);
    }

    #[test]
    fn prompts_are_tokenised_with_what_most_replicas_have() {
        let registry = registry();
        let replicas: Vec<_> = (1..=6).map(|port| add(&registry, port)).collect();
        for (replica, template) in replicas.iter().zip(["a", "b", "c", "b", "c", "c"]) {
            registry.set_parity(replica, kept(template));
        }
        let ids: Vec<_> = registry.tokenisers().iter().map(|tokeniser| tokeniser.id()).collect();
        let hashing: Vec<_> = replicas.iter().map(|replica| registry.hashing(replica)).collect();
        let (b, c) = (Hashing::Tokens(ids[1]), Hashing::Tokens(ids[0]));
        assert_eq!(hashing, [Hashing::Text, b, c, b, c, c]);
        assert!(registry.remove(&replicas[1].address) && registry.remove(&replicas[3].address));
        assert_ne!(registry.hashing(&replicas[0]), Hashing::Text, "there is room for the third now");
    }
}
