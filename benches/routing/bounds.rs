//! What hit rate is possible at all, whoever routes.

use std::collections::{BTreeMap, HashMap};

use servelab_engine::BlockHash;

/// Prompts in the order in which they came, as chains of blocks.
pub struct Seen {
    pub tokens: u64,
    pub chain: Vec<BlockHash>,
    /// Not warm-up.
    pub measured: bool,
}

/// The share of prompt tokens that one cache of `capacity` blocks finds (LRU, chains evicted from their tail) which
/// all requests share. `None`: one that forgets nothing. With the capacity of all replicas together it bounds what any
/// routing can reach, since there a block is never held twice.
///
/// It sees prompts only: where a later turn repeats an answer, the replicas find that answer and this does not.
pub fn shared_cache_hit_rate(seen: &[Seen], capacity: Option<usize>, block_size: u32) -> f64 {
    let mut last_used: HashMap<BlockHash, u64> = HashMap::new();
    let mut by_age: BTreeMap<u64, BlockHash> = BTreeMap::new();
    let (mut clock, mut hits, mut tokens) = (0, 0, 0);
    for prompt in seen {
        let found = prompt.chain.iter().take_while(|block| last_used.contains_key(block)).count() as u64;
        if prompt.measured {
            hits += (found * u64::from(block_size)).min(prompt.tokens.saturating_sub(1));
            tokens += prompt.tokens;
        }
        for block in prompt.chain.iter().rev() {
            clock += 1;
            if let Some(age) = last_used.insert(*block, clock) {
                by_age.remove(&age);
            }
            by_age.insert(clock, *block);
            if capacity.is_some_and(|capacity| by_age.len() > capacity)
                && let Some((_, oldest)) = by_age.pop_first()
            {
                last_used.remove(&oldest);
            }
        }
    }
    hits as f64 / (tokens as f64).max(1.0)
}
