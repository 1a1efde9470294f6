//! Chooses a replica for a request. The same calls with the same seed give the same choices.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cost::Terms;
use super::load::LoadView;
use super::policy::{Policy, Reason};
use super::rates::Pace;
use super::replica_set::ReplicaId;

/// What is known of the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    pub prompt_tokens: u32,
    /// Tokens that are likely to be generated, all answers together.
    pub output_tokens: u32,
    /// A hash of the session's name, if the request has one.
    pub session: Option<u64>,
    /// A hash of the prompt's beginning, if the prompt was read.
    pub beginning: Option<u64>,
}

/// A replica that can take the request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub replica: ReplicaId,
    /// A hash of its address, the same in every router.
    pub key: u64,
    pub load: LoadView,
    pub pace: Pace,
    /// See [`super::latency::PeakEwma`].
    pub latency_seconds: f64,
    /// Tokens of the prompt's beginning that it holds.
    pub matched_tokens: u32,
}

/// A choice, and what it was made by.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub replica: ReplicaId,
    pub reason: Reason,
    /// The terms of every candidate, in their order, whatever the policy: what `cost` would have seen.
    pub table: Vec<Terms>,
}

impl Decision {
    /// The terms of the replica chosen.
    pub fn terms(&self) -> Option<&Terms> {
        self.table.iter().find(|terms| terms.replica == self.replica)
    }
}

/// How much more than the mean a replica may have under `consistent_hash`.
const BOUNDED_LOAD: f64 = 1.25;

/// A policy and its seeded random numbers.
#[derive(Clone, Debug)]
pub struct Picker {
    policy: Policy,
    random: ChaCha8Rng,
    turn: u64,
}

impl Picker {
    pub fn new(policy: Policy, seed: u64) -> Self {
        Self { policy, random: ChaCha8Rng::seed_from_u64(seed), turn: 0 }
    }

    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Chooses one of the candidates; `None` only if there is none.
    pub fn pick(&mut self, ask: &Ask, candidates: &[Candidate]) -> Option<Decision> {
        let terms = |candidate: &Candidate| {
            let Candidate { replica, load, pace, matched_tokens, .. } = *candidate;
            Terms::new(replica, ask, matched_tokens, load, pace)
        };
        let table: Vec<Terms> = candidates.iter().map(terms).collect();
        let (at, reason) = self.choose(ask, candidates, &table)?;
        let reason = if candidates.len() == 1 { Reason::Only } else { reason };
        Some(Decision { replica: candidates[at].replica, reason, table })
    }

    fn choose(&mut self, ask: &Ask, candidates: &[Candidate], table: &[Terms]) -> Option<(usize, Reason)> {
        let requests = |at: usize| f64::from(candidates[at].load.requests);
        match self.policy {
            Policy::Cost => {
                let at = self.least(candidates.len(), |at| table[at].cost_seconds())?;
                Some((at, reason_of_cost(at, table)))
            }
            Policy::RoundRobin => {
                self.turn += 1;
                let at = (self.turn - 1).checked_rem(candidates.len() as u64)?;
                Some((at as usize, Reason::Turn))
            }
            Policy::Random => Some((self.any(candidates.len())?, Reason::Turn)),
            Policy::LeastRequests => Some((self.least(candidates.len(), requests)?, Reason::Load)),
            Policy::PowerOfTwo => Some((self.better_of_two(candidates.len(), requests)?, Reason::Load)),
            Policy::PeakEwma => {
                let cost = |at: usize| candidates[at].latency_seconds * (requests(at) + 1.0);
                Some((self.better_of_two(candidates.len(), cost)?, Reason::Load))
            }
            Policy::ConsistentHash => match ask.session.or(ask.beginning) {
                Some(key) => Some((within_bound(key, candidates)?, Reason::Hash)),
                None => Some((self.least(candidates.len(), requests)?, Reason::Load)),
            },
            Policy::Session => match ask.session {
                Some(key) => Some((highest_weight(key, candidates, |_| true)?, Reason::Hash)),
                None => Some((self.least(candidates.len(), requests)?, Reason::Load)),
            },
            Policy::LongestPrefix => {
                let at = self.least(candidates.len(), |at| -f64::from(table[at].matched_tokens))?;
                Some((at, if table[at].matched_tokens > 0 { Reason::Prefix } else { Reason::Turn }))
            }
        }
    }

    fn any(&mut self, count: usize) -> Option<usize> {
        (count > 0).then(|| self.random.random_range(0..count))
    }

    /// The index with the least cost; among equal ones any.
    fn least(&mut self, count: usize, cost: impl Fn(usize) -> f64) -> Option<usize> {
        let mut best: Option<(usize, f64)> = None;
        let mut ties = 0_u32;
        for at in 0..count {
            let cost = cost(at);
            match best {
                Some((_, least)) if cost > least => {}
                Some((_, least)) if cost == least => {
                    ties += 1;
                    // Each of the equal ones seen so far is as likely (Vitter 1985, reservoir sampling).
                    if self.random.random_range(0..=ties) == 0 {
                        best = Some((at, cost));
                    }
                }
                _ => {
                    best = Some((at, cost));
                    ties = 0;
                }
            }
        }
        best.map(|(at, _)| at)
    }

    fn better_of_two(&mut self, count: usize, cost: impl Fn(usize) -> f64) -> Option<usize> {
        let first = self.any(count)?;
        if count == 1 {
            return Some(first);
        }
        let second = (first + 1 + self.any(count - 1)?) % count;
        let better = self.least(2, |at| cost([first, second][at]))?;
        Some([first, second][better])
    }
}

fn reason_of_cost(chosen: usize, table: &[Terms]) -> Reason {
    let longest = table.iter().map(|terms| terms.matched_tokens).max().unwrap_or(0);
    match table[chosen].matched_tokens {
        _ if longest == 0 => Reason::Load,
        matched if matched == longest => Reason::Prefix,
        _ => Reason::Spill,
    }
}

/// Rendezvous hashing (Thaler and Ravishankar 1998): every key ranks all replicas, and takes the first that will have
/// it. When a replica goes, only its own keys move.
fn highest_weight(key: u64, candidates: &[Candidate], takes: impl Fn(&Candidate) -> bool) -> Option<usize> {
    let willing = candidates.iter().enumerate().filter(|(_, candidate)| takes(candidate));
    willing.max_by_key(|(_, candidate)| mix(key ^ candidate.key)).map(|(at, _)| at)
}

/// The first in the key's ranking that has room for one more request within the bound. One always has: if all were
/// at 1.25 times the mean, the mean would be larger.
fn within_bound(key: u64, candidates: &[Candidate]) -> Option<usize> {
    let total: u32 = candidates.iter().map(|candidate| candidate.load.requests).sum();
    let bound = (BOUNDED_LOAD * f64::from(total + 1) / candidates.len() as f64).ceil();
    highest_weight(key, candidates, |candidate| f64::from(candidate.load.requests) < bound)
}

/// Spreads the bits (SplitMix64, Steele, Lea and Flood 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACE: Pace =
        Pace { prefill_tokens_per_second: 10_000.0, step_seconds: 0.01, sequence_seconds: 0.0001 };

    fn candidate(replica: u8) -> Candidate {
        Candidate {
            replica: ReplicaId(replica),
            key: mix(1000 + u64::from(replica)),
            load: LoadView::default(),
            pace: PACE,
            latency_seconds: 0.1,
            matched_tokens: 0,
        }
    }

    fn fleet(count: u8) -> Vec<Candidate> {
        (0..count).map(candidate).collect()
    }

    fn ask(prompt_tokens: u32) -> Ask {
        Ask { prompt_tokens, ..Ask::default() }
    }

    fn pick(policy: Policy, ask: &Ask, candidates: &[Candidate]) -> (u8, Reason) {
        let decision = Picker::new(policy, 1).pick(ask, candidates).unwrap();
        (decision.replica.0, decision.reason)
    }

    /// How often each replica is taken, out of a thousand.
    fn shares(policy: Policy, candidates: &[Candidate]) -> Vec<u32> {
        let mut picker = Picker::new(policy, 7);
        let mut counts = vec![0; candidates.len()];
        for number in 0..1000 {
            let ask = Ask { beginning: Some(mix(number)), ..ask(100) };
            let decision = picker.pick(&ask, candidates).unwrap();
            counts[usize::from(decision.replica.0)] += 1;
        }
        counts
    }

    fn busy(candidate: &mut Candidate, requests: u32, pending_prefill_tokens: u64, decoding: u32) {
        candidate.load = LoadView {
            in_flight: requests,
            requests,
            pending_prefill_tokens,
            decoding,
            ..LoadView::default()
        };
    }

    /// Fault 1 of the peers, affinity against load: a hot prefix spills before its replica's queue costs more than
    /// recomputing the prefix elsewhere; what the three requests there would wait for this one, 0.1 s each, counts too.
    #[test]
    fn a_hot_prefix_spills_when_its_queue_costs_more_than_computing_it_elsewhere() {
        let mut fleet = fleet(3);
        fleet[1].matched_tokens = 6000;
        for (pending, expected) in
            [(0, (1, Reason::Prefix)), (2990, (1, Reason::Prefix)), (3010, (0, Reason::Spill))]
        {
            busy(&mut fleet[1], 3, pending, 0);
            busy(&mut fleet[2], 9, 100, 0);
            assert_eq!(pick(Policy::Cost, &ask(7000), &fleet), expected, "{pending} tokens are pending");
        }
    }

    /// In a peer, a difference of 32 requests between two replicas drops all locality, just when it is worth most.
    #[test]
    fn imbalance_alone_does_not_drop_locality() {
        let mut fleet = fleet(4);
        fleet[2].matched_tokens = 20_000;
        busy(&mut fleet[2], 60, 4000, 60);
        [0, 1, 3].into_iter().for_each(|at| busy(&mut fleet[at], 10, 0, 10));
        assert_eq!(pick(Policy::Cost, &ask(21_000), &fleet), (2, Reason::Prefix));
    }

    /// In a peer, one match names one arbitrary worker of those that hold the prefix.
    #[test]
    fn among_those_that_hold_the_prefix_the_least_loaded_gets_the_request() {
        let mut fleet = fleet(4);
        for (at, pending) in [(0, 900), (1, 300), (3, 700)] {
            fleet[at].matched_tokens = 2000;
            busy(&mut fleet[at], 1, pending, 0);
        }
        assert_eq!(pick(Policy::Cost, &ask(2500), &fleet), (1, Reason::Prefix));
    }

    /// In a peer, an unhealthy match falls to worker 0.
    #[test]
    fn nobody_is_chosen_who_is_no_candidate() {
        for policy in Policy::ALL {
            assert_eq!(Picker::new(policy, 1).pick(&ask(10), &[]), None, "{}", policy.name());
            let decision = Picker::new(policy, 1).pick(&ask(10), &[candidate(9)]).unwrap();
            assert_eq!((decision.replica, decision.reason), (ReplicaId(9), Reason::Only));
        }
    }

    /// A shared system prompt: everybody holds the first block. Locality says nothing then, and load decides.
    #[test]
    fn what_everybody_holds_attracts_nobody() {
        let mut fleet = fleet(4);
        fleet.iter_mut().for_each(|candidate| candidate.matched_tokens = 512);
        for at in [0, 1, 3] {
            busy(&mut fleet[at], 2, 300, 1);
        }
        assert_eq!(pick(Policy::Cost, &ask(1000), &fleet), (2, Reason::Prefix));
    }

    #[test]
    fn equal_replicas_get_equal_shares() {
        for policy in [
            Policy::Cost,
            Policy::RoundRobin,
            Policy::Random,
            Policy::LeastRequests,
            Policy::PowerOfTwo,
            Policy::PeakEwma,
            Policy::ConsistentHash,
            Policy::LongestPrefix,
        ] {
            let shares = shares(policy, &fleet(4));
            assert!(shares.iter().all(|share| (190..310).contains(share)), "{}: {shares:?}", policy.name());
        }
    }

    #[test]
    fn the_busiest_is_avoided_by_all_that_look_at_load() {
        let mut fleet = fleet(4);
        busy(&mut fleet[1], 50, 40_000, 10);
        for policy in [Policy::Cost, Policy::LeastRequests, Policy::PowerOfTwo, Policy::ConsistentHash] {
            assert_eq!(shares(policy, &fleet)[1], 0, "{}", policy.name());
        }
        let shares = shares(Policy::PowerOfTwo, &fleet);
        assert!(shares.iter().all(|share| *share < 400), "it is no herd: {shares:?}");
    }

    #[test]
    fn a_slow_replica_is_avoided_by_peak_ewma() {
        let mut fleet = fleet(2);
        fleet[0].latency_seconds = 5.0;
        busy(&mut fleet[1], 3, 0, 3);
        assert_eq!(pick(Policy::PeakEwma, &ask(10), &fleet), (1, Reason::Load));
    }

    #[test]
    fn a_session_stays_where_it_is_and_only_those_of_a_lost_replica_move() {
        let fleet = fleet(5);
        let place = |session: u64, candidates: &[Candidate]| {
            let ask = Ask { session: Some(mix(session)), ..ask(10) };
            pick(Policy::Session, &ask, candidates).0
        };
        let remaining: Vec<Candidate> = fleet.iter().copied().filter(|c| c.replica.0 != 2).collect();
        let mut moved = 0;
        for session in 0..200 {
            let (before, after) = (place(session, &fleet), place(session, &remaining));
            if before == 2 { moved += 1 } else { assert_eq!(before, after) }
        }
        assert!((20..60).contains(&moved), "{moved} of 200 were on the fifth that is gone");
    }

    #[test]
    fn a_hash_is_bounded_by_the_load() {
        let mut fleet = fleet(4);
        let ask = Ask { beginning: Some(99), ..ask(10) };
        let mut picker = Picker::new(Policy::ConsistentHash, 1);
        for sent in 0..400 {
            let decision = picker.pick(&ask, &fleet).unwrap();
            fleet[usize::from(decision.replica.0)].load.requests += 1;
            let most = fleet.iter().map(|candidate| candidate.load.requests).max().unwrap();
            assert!(f64::from(most) <= (1.25 * f64::from(sent + 1) / 4.0).ceil(), "{most} of {}", sent + 1);
        }
    }

    #[test]
    fn the_naive_policy_sends_everything_to_one_replica() {
        let mut fleet = fleet(3);
        fleet[1].matched_tokens = 16;
        busy(&mut fleet[1], 10_000, 1 << 40, 10_000);
        assert_eq!(pick(Policy::LongestPrefix, &ask(4000), &fleet), (1, Reason::Prefix));
    }

    #[test]
    fn the_table_says_what_decided() {
        let mut fleet = fleet(3);
        fleet[2].matched_tokens = 400;
        busy(&mut fleet[2], 1, 100, 2);
        let decision = Picker::new(Policy::RoundRobin, 1).pick(&ask(1000), &fleet).unwrap();
        assert_eq!(decision.table.len(), 3);
        assert_eq!(decision.table[2], Terms::new(ReplicaId(2), &ask(1000), 400, fleet[2].load, PACE));
        assert_eq!(decision.terms(), Some(&decision.table[0]));
    }

    proptest! {
        /// Whatever the numbers, a candidate is chosen, and the same one with the same seed.
        #[test]
        fn every_pick_is_a_candidate_and_repeatable(
            seed: u64,
            prompt_tokens: u32,
            session: Option<u64>,
            beginning: Option<u64>,
            numbers in prop::collection::vec((any::<u32>(), any::<u64>(), any::<f64>(), any::<f64>()), 1..20),
        ) {
            let candidates: Vec<Candidate> = numbers.iter().enumerate().map(|(at, number)| Candidate {
                load: LoadView {
                    in_flight: number.0 >> 8,
                    requests: number.0 >> 8,
                    pending_prefill_tokens: number.1,
                    decoding: number.0 >> 8,
                    kv_usage: number.2,
                },
                latency_seconds: number.3,
                pace: Pace { prefill_tokens_per_second: number.3, step_seconds: number.2, sequence_seconds: number.2 },
                matched_tokens: number.0,
                ..candidate(at as u8)
            }).collect();
            let ask = Ask { prompt_tokens, output_tokens: numbers[0].0, session, beginning };
            for policy in Policy::ALL {
                let decision = Picker::new(policy, seed).pick(&ask, &candidates).unwrap();
                prop_assert!(candidates.iter().any(|candidate| candidate.replica == decision.replica));
                // Debug, since a term that is no number equals nothing, not even itself.
                let again = Picker::new(policy, seed).pick(&ask, &candidates).unwrap();
                prop_assert_eq!(format!("{decision:?}"), format!("{again:?}"));
            }
        }
    }
}
