//! The last choices and what they were made by, for `GET /decisions` and the header `x-servelab-decision`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::choice::cost::Terms;
use crate::choice::picker::Decision;
use crate::choice::replica_set::ReplicaId;

/// Decisions that are kept.
const KEPT: usize = 1000;
/// Of each, the terms of the replica chosen and of the cheapest others.
const TERMS: usize = 8;

/// What a choice was made for.
#[derive(Clone, Debug)]
pub struct Purpose {
    pub request_id: Arc<str>,
    /// 1 for the first.
    pub attempt: u32,
    pub prompt_tokens: u32,
}

/// One choice, as it is kept: made with every request, and rarely looked at.
#[derive(Debug)]
pub struct Noted {
    request_id: Arc<str>,
    /// Since the router began.
    at: Duration,
    policy: &'static str,
    /// What the match was found by.
    hashing: &'static str,
    /// 1 for the first attempt.
    attempt: u32,
    prompt_tokens: u32,
    reason: &'static str,
    /// Of the replica chosen, then of the others, cheapest first.
    table: Vec<Terms>,
    /// The replicas of the table.
    names: Vec<Arc<str>>,
}

impl Noted {
    /// `hashing` says what the match was found by, `at` is the time since the router began; `names` gives the names of
    /// replicas in the order in which they are asked for.
    pub fn new(
        decision: &Decision,
        policy: &'static str,
        hashing: &'static str,
        purpose: Purpose,
        at: Duration,
        names: impl FnOnce(&mut dyn Iterator<Item = ReplicaId>) -> Vec<Arc<str>>,
    ) -> Self {
        let mut table = decision.table.clone();
        let rank = |terms: &Terms| (terms.replica != decision.replica, terms.cost_seconds());
        table.sort_by(|one, other| {
            let (one, other) = (rank(one), rank(other));
            one.0.cmp(&other.0).then(one.1.total_cmp(&other.1))
        });
        table.truncate(TERMS);
        table.shrink_to_fit();
        let names = names(&mut table.iter().map(|terms| terms.replica));
        let reason = decision.reason.name();
        let Purpose { request_id, attempt, prompt_tokens } = purpose;
        Self { request_id, at, policy, hashing, attempt, prompt_tokens, reason, table, names }
    }
}

/// One choice, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    pub request_id: String,
    /// Seconds since the router began.
    pub at_seconds: f64,
    pub policy: &'static str,
    pub reason: &'static str,
    /// What the match was found by: `tokens`, the replica's own, or `text`.
    pub hashing: &'static str,
    pub replica: String,
    /// 1 for the first attempt.
    pub attempt: u32,
    pub prompt_tokens: u32,
    pub matched_tokens: u32,
    /// What the replica chosen would cost, then the others, cheapest first. Terms in seconds.
    pub table: Vec<ExplainedTerms>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ExplainedTerms {
    pub replica: String,
    pub matched_tokens: u32,
    pub prefill_seconds: f64,
    pub queue_seconds: f64,
    pub imposed_seconds: f64,
    pub decode_seconds: f64,
    pub memory_seconds: f64,
    pub cost_seconds: f64,
}

impl From<&Noted> for Explained {
    fn from(noted: &Noted) -> Self {
        let terms = |(terms, name): (&Terms, &Arc<str>)| ExplainedTerms {
            replica: name.to_string(),
            matched_tokens: terms.matched_tokens,
            prefill_seconds: terms.prefill_seconds,
            queue_seconds: terms.queue_seconds,
            imposed_seconds: terms.imposed_seconds,
            decode_seconds: terms.decode_seconds,
            memory_seconds: terms.memory_seconds,
            cost_seconds: terms.cost_seconds(),
        };
        let table: Vec<ExplainedTerms> = noted.table.iter().zip(&noted.names).map(terms).collect();
        Self {
            request_id: noted.request_id.to_string(),
            at_seconds: noted.at.as_secs_f64(),
            policy: noted.policy,
            hashing: noted.hashing,
            reason: noted.reason,
            replica: table.first().map_or_else(String::new, |terms| terms.replica.clone()),
            attempt: noted.attempt,
            prompt_tokens: noted.prompt_tokens,
            matched_tokens: table.first().map_or(0, |terms| terms.matched_tokens),
            table,
        }
    }
}

impl Explained {
    /// As one line that a header can carry: URLs and numbers, nothing that a client sent.
    pub fn header(&self) -> String {
        let terms = self.table.first().map_or_else(String::new, |terms| {
            format!(
                "; prefill={:.6}; queue={:.6}; imposed={:.6}; decode={:.6}; memory={:.6}",
                terms.prefill_seconds,
                terms.queue_seconds,
                terms.imposed_seconds,
                terms.decode_seconds,
                terms.memory_seconds
            )
        });
        format!(
            "replica={}; policy={}; reason={}; attempt={}; matched={}/{}; hashing={}{terms}",
            self.replica,
            self.policy,
            self.reason,
            self.attempt,
            self.matched_tokens,
            self.prompt_tokens,
            self.hashing
        )
    }
}

/// The last [`KEPT`] of them.
#[derive(Debug, Default)]
pub struct Decisions(Mutex<VecDeque<Arc<Noted>>>);

impl Decisions {
    pub fn add(&self, decision: Arc<Noted>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if kept.len() == KEPT { kept.pop_front() } else { None };
        kept.push_back(decision);
        drop(kept);
        // Freed outside of the lock.
        drop(oldest);
    }

    /// The newest first.
    pub fn newest(&self, count: usize) -> Vec<Explained> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newest: Vec<Arc<Noted>> = kept.iter().rev().take(count).cloned().collect();
        drop(kept);
        newest.iter().map(|noted| Explained::from(&**noted)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::policy::Reason;

    fn noted(number: u32) -> Noted {
        let terms = |replica, queue_seconds| Terms {
            replica: ReplicaId(replica),
            matched_tokens: 64,
            prefill_seconds: 0.5,
            queue_seconds,
            imposed_seconds: 0.0,
            decode_seconds: 0.0,
            memory_seconds: 0.0,
        };
        let table = (0..20).map(|replica| terms(replica, f64::from(20 - replica))).collect();
        let decision = Decision { replica: ReplicaId(3), reason: Reason::Prefix, table };
        let names = |replicas: &mut dyn Iterator<Item = ReplicaId>| {
            replicas.map(|replica| format!("http://r{}:80", replica.0).into()).collect()
        };
        let purpose = Purpose { request_id: number.to_string().into(), attempt: 1, prompt_tokens: 100 };
        Noted::new(&decision, "cost", "tokens", purpose, Duration::from_secs(2), names)
    }

    #[test]
    fn the_chosen_one_comes_first_and_then_the_cheapest() {
        let explained = Explained::from(&noted(1));
        let order: Vec<&str> = explained.table.iter().map(|terms| terms.replica.as_str()).collect();
        assert_eq!(order[..3], ["http://r3:80", "http://r19:80", "http://r18:80"]);
        assert_eq!(order.len(), TERMS);
        assert_eq!(
            explained.header(),
            "replica=http://r3:80; policy=cost; reason=prefix; attempt=1; matched=64/100; hashing=tokens; prefill=0.500000; \
             queue=17.000000; imposed=0.000000; decode=0.000000; memory=0.000000"
        );
    }

    #[test]
    fn only_the_last_ones_are_kept() {
        let decisions = Decisions::default();
        (0..2500).for_each(|number| decisions.add(Arc::new(noted(number))));
        let newest = decisions.newest(usize::MAX);
        assert_eq!((newest.len(), newest[0].request_id.as_str()), (KEPT, "2499"));
    }
}
