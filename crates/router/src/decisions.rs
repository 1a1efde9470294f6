//! The last choices and what they were made by, for `GET /decisions` and the header `x-servelab-decision`.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::choice::picker::Decision;
use crate::choice::replica_set::ReplicaId;

/// Decisions that are kept.
const KEPT: usize = 1000;
/// Of each, the terms of the replica chosen and of the cheapest others.
const TERMS: usize = 8;

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

impl Explained {
    pub fn new(
        decision: &Decision,
        policy: &'static str,
        hashing: &'static str,
        prompt_tokens: u32,
        attempt: u32,
        request_id: &str,
        at: Duration,
        name: impl Fn(ReplicaId) -> String,
    ) -> Self {
        let mut order: Vec<_> = decision.table.iter().collect();
        order.sort_by(|one, other| {
            let rank = |terms: &crate::choice::cost::Terms| {
                (terms.replica != decision.replica, terms.cost_seconds())
            };
            let (one, other) = (rank(one), rank(other));
            one.0.cmp(&other.0).then(one.1.total_cmp(&other.1))
        });
        let table = order.into_iter().take(TERMS).map(|terms| ExplainedTerms {
            replica: name(terms.replica),
            matched_tokens: terms.matched_tokens,
            prefill_seconds: terms.prefill_seconds,
            queue_seconds: terms.queue_seconds,
            imposed_seconds: terms.imposed_seconds,
            decode_seconds: terms.decode_seconds,
            memory_seconds: terms.memory_seconds,
            cost_seconds: terms.cost_seconds(),
        });
        Self {
            request_id: request_id.to_owned(),
            at_seconds: at.as_secs_f64(),
            policy,
            hashing,
            reason: decision.reason.name(),
            replica: name(decision.replica),
            attempt,
            prompt_tokens,
            matched_tokens: decision.terms().map_or(0, |terms| terms.matched_tokens),
            table: table.collect(),
        }
    }

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
pub struct Decisions(Mutex<VecDeque<Explained>>);

impl Decisions {
    pub fn add(&self, decision: Explained) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(decision);
    }

    /// The newest first.
    pub fn newest(&self, count: usize) -> Vec<Explained> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().rev().take(count).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::cost::Terms;
    use crate::choice::policy::Reason;

    fn explained(number: u32) -> Explained {
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
        Explained::new(
            &decision,
            "cost",
            "tokens",
            100,
            1,
            &number.to_string(),
            Duration::from_secs(2),
            |replica| format!("http://r{}:80", replica.0),
        )
    }

    #[test]
    fn the_chosen_one_comes_first_and_then_the_cheapest() {
        let table = explained(1).table;
        let order: Vec<&str> = table.iter().map(|terms| terms.replica.as_str()).collect();
        assert_eq!(order[..3], ["http://r3:80", "http://r19:80", "http://r18:80"]);
        assert_eq!(order.len(), TERMS);
        assert_eq!(
            explained(1).header(),
            "replica=http://r3:80; policy=cost; reason=prefix; attempt=1; matched=64/100; hashing=tokens; prefill=0.500000; \
             queue=17.000000; imposed=0.000000; decode=0.000000; memory=0.000000"
        );
    }

    #[test]
    fn only_the_last_ones_are_kept() {
        let decisions = Decisions::default();
        (0..2500).for_each(|number| decisions.add(explained(number)));
        let newest = decisions.newest(usize::MAX);
        assert_eq!((newest.len(), newest[0].request_id.as_str()), (KEPT, "2499"));
    }
}
