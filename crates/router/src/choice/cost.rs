//! One continuous cost in seconds, with no threshold at which locality or load suddenly stops to matter:
//!
//! ```text
//! cost(w) = (uncached_tokens(request, w) + pending_prefill_tokens(w)) / prefill_rate(w)
//!         + requests(w) * uncached_tokens(request, w) / prefill_rate(w)
//!         + output_tokens(request) * requests(w) * sequence_time(w)
//!         + lambda * k(w) / (1 - k(w))
//! ```
//!
//! The first term is how long the request waits for its first token; the second what it takes from the others there,
//! each of which waits while its prompt is computed. The third is decoding: each sequence in a step makes the step
//! longer by `sequence_time`, so that every one there slows this request's tokens, and this request every one's: twice
//! that time if all stayed as long as this one, and taken once, since those there are half done and later requests go
//! elsewhere.
//! The fourth keeps off a replica whose KV cache is about to overflow, where requests are preempted (SGLang's
//! `least_load` has it, with the same lambda).
//!
//! Without what is imposed on others every request chooses for itself alone, and a busy fleet talks itself into
//! thrashing: each spill looks cheap, adds a whole prompt of work, and evicts somebody else's prefix (Pigou 1920, on
//! roads). `benches/README.md` has the figures. A hot prefix spills by itself: once the queue of the replica that holds
//! it takes longer than computing the prefix elsewhere, elsewhere is cheaper.

use super::load::LoadView;
use super::picker::Ask;
use super::rates::Pace;
use super::replica_set::ReplicaId;

/// Weight of a full KV cache, in seconds.
pub const LAMBDA_SECONDS: f64 = 0.15;
/// A cache counts as no fuller than that, where the term would grow without bound.
const FULLEST: f64 = 0.999;

/// What the cost of one replica is made of. All terms in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    pub replica: ReplicaId,
    /// Prompt tokens that the replica holds already.
    pub matched_tokens: u32,
    /// Computing those that it does not hold.
    pub prefill_seconds: f64,
    /// Computing the prompts that came before.
    pub queue_seconds: f64,
    /// What the requests there wait for this one, all together.
    pub imposed_seconds: f64,
    /// Tokens that come later because the request and those there share their steps.
    pub decode_seconds: f64,
    pub memory_seconds: f64,
}

impl Terms {
    /// Of a request, `matched_tokens` of whose prompt the replica holds.
    pub fn new(replica: ReplicaId, ask: &Ask, matched_tokens: u32, load: LoadView, pace: Pace) -> Self {
        // A prompt that is cached whole still computes one token.
        let matched_tokens = matched_tokens.min(ask.prompt_tokens.saturating_sub(1));
        let uncached = f64::from(ask.prompt_tokens - matched_tokens);
        let shared_steps = f64::from(load.requests) * f64::from(ask.output_tokens);
        let usage = load.kv_usage.min(FULLEST);
        Self {
            replica,
            matched_tokens,
            prefill_seconds: uncached / pace.prefill_tokens_per_second,
            queue_seconds: load.pending_prefill_tokens as f64 / pace.prefill_tokens_per_second,
            imposed_seconds: f64::from(load.requests) * uncached / pace.prefill_tokens_per_second,
            decode_seconds: shared_steps * pace.sequence_seconds,
            memory_seconds: LAMBDA_SECONDS * usage / (1.0 - usage),
        }
    }

    pub fn cost_seconds(&self) -> f64 {
        let own = self.prefill_seconds + self.queue_seconds + self.decode_seconds + self.memory_seconds;
        own + self.imposed_seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace =
        Pace { prefill_tokens_per_second: 10_000.0, step_seconds: 0.01, sequence_seconds: 0.0001 };

    fn terms(matched: u32, load: LoadView) -> Terms {
        let ask = Ask { prompt_tokens: 4000, output_tokens: 50, ..Ask::default() };
        Terms::new(ReplicaId(0), &ask, matched, load, PACE)
    }

    #[test]
    fn the_terms_are_those_of_the_formula() {
        let load = LoadView {
            in_flight: 22,
            requests: 22,
            pending_prefill_tokens: 5000,
            decoding: 20,
            kv_usage: 0.5,
        };
        let terms = terms(1000, load);
        assert_eq!((terms.prefill_seconds, terms.queue_seconds), (0.3, 0.5));
        assert_eq!(terms.memory_seconds, 0.15);
        assert!((terms.imposed_seconds - 22.0 * 0.3).abs() < 1e-12);
        assert!((terms.decode_seconds - 50.0 * 22.0 * 0.0001).abs() < 1e-12);
        assert!((terms.cost_seconds() - 0.95 - 6.6 - 0.11).abs() < 1e-12);
    }

    #[test]
    fn a_whole_match_computes_one_token_and_a_full_cache_costs_a_finite_time() {
        let full = LoadView { kv_usage: 1.0, ..LoadView::default() };
        let terms = terms(9999, full);
        assert_eq!(terms.matched_tokens, 3999);
        assert!((terms.memory_seconds - 0.15 * 999.0).abs() < 1e-6);
        let empty = Terms::new(ReplicaId(0), &Ask::default(), 0, LoadView::default(), PACE);
        assert_eq!(empty.cost_seconds(), 0.0);
    }
}
