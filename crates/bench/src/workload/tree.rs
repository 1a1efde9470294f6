//! Prompts that repeat each other's beginnings, as conversations do that grow from turn to turn.
//!
//! A prompt is a path in a tree of blocks: it takes the first blocks of an earlier prompt and goes on with its own.
//! How much is repeated is steered: a request repeats a prefix whenever that brings the share of tokens that an
//! infinite cache finds closer to the wanted one. So the share is met by every seed and by short runs. How far back
//! the repeated request lies decides what a finite cache finds.

use std::collections::VecDeque;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, LogNormal};
use serde::Deserialize;

use crate::prompt::Segment;

/// Earlier prompts that can be repeated.
const REMEMBERED: usize = 16_384;
/// How many are looked at for one that is long enough.
const TRIES: usize = 64;
/// A request that repeats an earlier one repeats that much of its own length.
const REPEATED: std::ops::Range<f64> = 0.5..0.95;
/// The stream of the blocks that begin every prompt.
const ROOT: u64 = 0;

/// The shape of the tree.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefixTree {
    pub block_tokens: u32,
    pub root_blocks: u32,
    /// Share of all prompt tokens that a cache which forgets nothing finds, in whole blocks.
    pub infinite_hit: f64,
    /// Requests between a prompt and the one whose prefix it repeats: log-normal, and a least.
    distance_median: f64,
    distance_sigma: f64,
    distance_least: usize,
}

/// Makes the paths, one after the other.
pub struct Paths {
    tree: PrefixTree,
    random: ChaCha8Rng,
    distance: LogNormal<f64>,
    /// Segments of earlier prompts and their whole blocks; the last is the latest.
    earlier: VecDeque<(Vec<Segment>, u32)>,
    next_stream: u64,
    tokens: f64,
    hit_tokens: f64,
}

impl Paths {
    pub fn new(tree: PrefixTree, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(3);
        // The catalogue's sigmas are positive.
        let distance = LogNormal::new(tree.distance_median.ln(), tree.distance_sigma)
            .unwrap_or_else(|_| LogNormal::new(0.0, 1.0).expect("a standard distribution"));
        let earlier = VecDeque::new();
        Self { tree, random, distance, earlier, next_stream: ROOT + 1, tokens: 0.0, hit_tokens: 0.0 }
    }

    /// A prompt of `length` tokens.
    pub fn next(&mut self, length: u32) -> Vec<Segment> {
        let block = self.tree.block_tokens;
        let blocks = length / block;
        let root = self.tree.root_blocks.min(blocks);
        let mut path =
            self.repeated(length, blocks, root).unwrap_or_else(|| vec![Segment::of(ROOT, root * block)]);
        let shared: u32 = path.iter().map(|segment| segment.tokens).sum();
        self.tokens += f64::from(length);
        if !self.earlier.is_empty() {
            self.hit_tokens += f64::from(shared);
        }
        path.push(Segment { stream: self.next_stream, start: shared, tokens: length - shared });
        path.retain(|segment| segment.tokens > 0);
        self.next_stream += 1;
        if self.earlier.len() == REMEMBERED {
            self.earlier.pop_front();
        }
        self.earlier.push_back((path.clone(), blocks));
        path
    }

    /// The beginning of an earlier prompt, if it is time to repeat one.
    fn repeated(&mut self, length: u32, blocks: u32, root: u32) -> Option<Vec<Segment>> {
        let share = self.random.random_range(REPEATED);
        let block = self.tree.block_tokens;
        let owed = self.tree.infinite_hit * (self.tokens + f64::from(length)) - self.hit_tokens;
        if owed - f64::from(root * block) <= share * f64::from(length) / 2.0 {
            return None;
        }
        let wanted = (share * f64::from(blocks)).round() as u32;
        let parent = self.parent(wanted)?;
        let (segments, parent_blocks) = &self.earlier[parent];
        let taken = wanted.min(*parent_blocks);
        (taken > root).then(|| first(segments, taken * block))
    }

    /// Index of an earlier prompt of at least `wanted` blocks at about the right distance, or of the longest seen
    /// while looking for it.
    fn parent(&mut self, wanted: u32) -> Option<usize> {
        let count = self.earlier.len();
        let distance = (self.distance.sample(&mut self.random) as usize).max(self.tree.distance_least);
        let near = (distance..distance + TRIES).map_while(|distance| count.checked_sub(distance));
        if let Some(found) = near.filter(|at| *at < count).find(|at| self.earlier[*at].1 >= wanted) {
            return Some(found);
        }
        // So far back there is nothing yet, or nothing long enough: any that is not too recent.
        let old_enough = count.saturating_sub(self.tree.distance_least);
        let candidates = if old_enough > 0 { old_enough } else { count };
        if candidates == 0 {
            return None;
        }
        let mut best = self.random.random_range(0..candidates);
        for _ in 0..TRIES {
            if self.earlier[best].1 >= wanted {
                break;
            }
            let other = self.random.random_range(0..candidates);
            if self.earlier[other].1 > self.earlier[best].1 {
                best = other;
            }
        }
        Some(best)
    }
}

/// The first `tokens` of a path.
fn first(segments: &[Segment], tokens: u32) -> Vec<Segment> {
    let mut left = tokens;
    let mut path = Vec::new();
    for segment in segments {
        let taken = segment.tokens.min(left);
        left -= taken;
        if taken > 0 {
            path.push(Segment { tokens: taken, ..*segment });
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::super::catalogue::Catalogue;
    use super::super::lengths::Strata;
    use super::*;

    fn prompts(name: &str, seed: u64, count: usize) -> (PrefixTree, Vec<Vec<Segment>>) {
        let catalogue = Catalogue::load();
        let table = catalogue.table(name).unwrap();
        let (tree, lengths) = (table.prefixes.clone().unwrap(), catalogue.input(table));
        let mut paths = Paths::new(tree.clone(), seed);
        let mut strata = Strata::new(seed, 1);
        let prompts = (0..count).map(|_| paths.next(lengths.at(strata.share()))).collect();
        (tree, prompts)
    }

    /// The content of each whole block, as something that can be compared: all tokens up to its end.
    fn blocks(prompt: &[Segment], block: u32) -> Vec<Vec<Segment>> {
        let length: u32 = prompt.iter().map(|segment| segment.tokens).sum();
        (1..=length / block).map(|at| first(prompt, at * block)).collect()
    }

    /// Share of the tokens that an LRU cache of `capacity` blocks finds.
    fn hit_rate(prompts: &[Vec<Segment>], block: u32, capacity: usize) -> f64 {
        let mut last_used: HashMap<Vec<(u64, u32, u32)>, u64> = HashMap::new();
        let mut by_age: BTreeMap<u64, Vec<(u64, u32, u32)>> = BTreeMap::new();
        let (mut clock, mut hits, mut tokens) = (0, 0, 0);
        for prompt in prompts {
            tokens += prompt.iter().map(|segment| u64::from(segment.tokens)).sum::<u64>();
            let mut found = true;
            for path in blocks(prompt, block) {
                let key: Vec<_> = path.iter().map(|s| (s.stream, s.start, s.tokens)).collect();
                found &= last_used.contains_key(&key);
                hits += u64::from(found) * u64::from(block);
                clock += 1;
                if let Some(age) = last_used.insert(key.clone(), clock) {
                    by_age.remove(&age);
                }
                by_age.insert(clock, key);
                if by_age.len() > capacity {
                    let (_, oldest) = by_age.pop_first().unwrap();
                    last_used.remove(&oldest);
                }
            }
        }
        hits as f64 / tokens as f64
    }

    #[test]
    fn an_infinite_cache_finds_what_the_trace_says_within_two_points() {
        for (name, count) in [
            ("mooncake-conversation", 300),
            ("mooncake-conversation", 2000),
            ("mooncake-synthetic", 300),
            ("mooncake-synthetic", 2000),
        ] {
            for seed in 1..4 {
                let (tree, prompts) = prompts(name, seed, count);
                let got = hit_rate(&prompts, tree.block_tokens, usize::MAX);
                assert!(
                    (got - tree.infinite_hit).abs() < 0.02,
                    "{name}, {count} requests, seed {seed}: {got}"
                );
            }
        }
    }

    /// Over as many requests as the trace has.
    #[test]
    fn a_finite_cache_finds_about_what_it_found_of_the_trace() {
        let (tree, prompts) = prompts("mooncake-conversation", 1, 12_000);
        for (capacity_tokens, expected) in [(500_000, 0.045), (5_000_000, 0.215)] {
            let got = hit_rate(&prompts, tree.block_tokens, capacity_tokens / tree.block_tokens as usize);
            assert!((got - expected).abs() < 0.03, "{capacity_tokens} tokens: {got}, expected {expected}");
        }
    }

    #[test]
    fn every_prompt_has_its_length_and_begins_with_the_root() {
        let catalogue = Catalogue::load();
        let tree = catalogue.table("mooncake-conversation").unwrap().prefixes.clone().unwrap();
        let mut paths = Paths::new(tree, 9);
        for length in [1, 511, 512, 513, 5000, 100_000, 600, 70_000] {
            let prompt = paths.next(length);
            assert_eq!(prompt.iter().map(|segment| segment.tokens).sum::<u32>(), length);
            if length >= 512 {
                assert_eq!(prompt[0], Segment::of(ROOT, 512));
            }
        }
    }
}
