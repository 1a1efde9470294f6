//! Which replica holds which prefix: one index for all replicas at once.
//!
//! A block's hash covers every token before it ([`servelab_engine::block_hash`]), so the name of a block is the
//! name of a whole prefix, and no tree is needed: a flat table maps each block to the set of replicas that hold it.
//! A lookup walks the prompt's chain once, for all replicas together, and notes where each drops out.
//!
//! Two ways to feed it. *Approximate*: the router notes what it sent where ([`PrefixIndex::touch`]), and each
//! replica's blocks form an LRU list as long as the replica's own cache. *Precise*: the replica tells which blocks it
//! stored and removed ([`PrefixIndex::store`], [`PrefixIndex::forget`]).
//!
//! Invariant: the index takes all its memory when it is made and never more. When it is full, the replica with the
//! most blocks gives up its oldest. Invariant: a replica that was removed has left nothing behind.

use servelab_engine::BlockHash;

use super::replica_set::{MAX_REPLICAS, ReplicaId, ReplicaSet};
use super::table::Table;

const NONE: u32 = u32::MAX;
const SET_WORDS: usize = MAX_REPLICAS / 64;
/// Of a block: who holds it, and where the node of one of them is.
const BLOCK_WORDS: usize = SET_WORDS + 1;

/// One replica holds one block; a node of the replica's LRU list.
#[derive(Clone, Copy, Debug)]
struct Held {
    block: u64,
    older: u32,
    /// In a free node, the next free one.
    newer: u32,
    replica: ReplicaId,
}

/// What is known of a block. Most blocks have a single holder, so the node of one of them is noted here, and
/// [`PrefixIndex::places`] knows those of all others.
#[derive(Clone, Copy, Debug)]
struct Holders {
    all: ReplicaSet,
    first: ReplicaId,
    node_of_first: u32,
}

impl Holders {
    fn read(words: &[u64; BLOCK_WORDS]) -> Self {
        let [all @ .., last] = *words;
        Self { all: ReplicaSet(all), first: ReplicaId(last as u8), node_of_first: (last >> 8) as u32 }
    }

    fn write(self, words: &mut [u64; BLOCK_WORDS]) {
        let [all @ .., last] = words;
        *all = self.all.0;
        *last = u64::from(self.node_of_first) << 8 | u64::from(self.first.0);
    }
}

/// The list of one replica's blocks.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    /// Most that it may have.
    limit: u32,
    len: u32,
    oldest: u32,
    newest: u32,
}

/// How many blocks of a prompt's beginning each replica holds.
#[derive(Clone, Debug)]
pub struct Matches(Box<[u32; MAX_REPLICAS]>);

impl Default for Matches {
    fn default() -> Self {
        Self(Box::new([0; MAX_REPLICAS]))
    }
}

impl Matches {
    /// Blocks, counted from the first one without a gap.
    pub fn of(&self, replica: ReplicaId) -> u32 {
        self.0[usize::from(replica.0)]
    }

    pub fn set(&mut self, replica: ReplicaId, blocks: u32) {
        self.0[usize::from(replica.0)] = blocks;
    }
}

/// The prefixes of all replicas.
#[derive(Debug)]
pub struct PrefixIndex {
    /// Of each block that anybody holds.
    holders: Table<BLOCK_WORDS>,
    /// Where the node of a block and a replica is, unless the block's entry says so.
    places: Table<1>,
    nodes: Vec<Held>,
    /// Of them, those that are not free: pairs of a block and a replica.
    len: usize,
    free: u32,
    replicas: Box<[Option<Blocks>; MAX_REPLICAS]>,
    present: ReplicaSet,
    capacity: usize,
}

impl PrefixIndex {
    /// An index that takes `max_bytes` at most, and holds what fits into it: see [`PrefixIndex::capacity`].
    pub fn new(max_bytes: usize) -> Self {
        // What a block takes is no whole number of bytes, so the estimate is a little too high.
        let of_a_thousand = Self::bytes_for(1000) - Self::bytes_for(0);
        let mut capacity = (max_bytes.saturating_mul(1000) / of_a_thousand).min(NONE as usize);
        while capacity > 0 && Self::bytes_for(capacity) > max_bytes {
            capacity -= 1;
        }
        Self {
            holders: Table::new(capacity),
            places: Table::new(capacity),
            nodes: Vec::with_capacity(capacity),
            len: 0,
            free: NONE,
            replicas: Box::new([None; MAX_REPLICAS]),
            present: ReplicaSet::EMPTY,
            capacity,
        }
    }

    /// Has the system hand out all of its memory now: see [`Table::take_memory`].
    pub fn take_memory(&mut self) {
        self.holders.take_memory();
        self.places.take_memory();
        let unused = Held { block: 0, older: NONE, newer: NONE, replica: ReplicaId(0) };
        for slot in self.nodes.spare_capacity_mut() {
            slot.write(unused);
        }
    }

    fn bytes_for(capacity: usize) -> usize {
        Table::<BLOCK_WORDS>::bytes(capacity)
            + Table::<1>::bytes(capacity)
            + capacity * size_of::<Held>()
            + MAX_REPLICAS * size_of::<Option<Blocks>>()
    }

    /// Bytes that it takes, however much it holds.
    pub fn bytes(&self) -> usize {
        Self::bytes_for(self.capacity)
    }

    /// Blocks that it can hold. One that two replicas hold counts twice.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks that it holds, counted in the same way.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Blocks of one replica.
    pub fn blocks(&self, replica: ReplicaId) -> u32 {
        self.list(replica).map_or(0, |list| list.len)
    }

    /// Whether the replica is known to hold the block, whatever stands before it.
    pub fn holds(&self, replica: ReplicaId, block: BlockHash) -> bool {
        self.node(name(block), replica).is_some()
    }

    /// Takes a replica in, or changes its limit: the most blocks that it can hold, which is the size of its cache.
    pub fn add(&mut self, replica: ReplicaId, limit: u32) {
        match &mut self.replicas[usize::from(replica.0)] {
            Some(list) => list.limit = limit,
            none => *none = Some(Blocks { limit, len: 0, oldest: NONE, newest: NONE }),
        }
        self.present.insert(replica);
        self.keep_limit(replica);
    }

    /// Forgets a replica and all that it held. O(its blocks).
    pub fn remove(&mut self, replica: ReplicaId) {
        self.clear(replica);
        self.replicas[usize::from(replica.0)] = None;
        self.present.remove(replica);
    }

    /// Forgets what a replica held: its cache was reset, or it was started anew.
    pub fn clear(&mut self, replica: ReplicaId) {
        while self.drop_oldest(replica) {}
    }

    /// The replica computes, or has computed, a prompt: it holds these blocks now, the first as the newest, since
    /// the engine evicts a chain from its tail.
    pub fn touch(&mut self, replica: ReplicaId, chain: &[BlockHash]) {
        /// Few enough to be near still when they are stored.
        const AT_ONCE: usize = 256;
        for blocks in chain.rchunks(AT_ONCE) {
            self.bring_near(replica, blocks);
            blocks.iter().rev().for_each(|block| self.store(replica, *block));
        }
    }

    /// Looks at where these blocks will be, and those that have to go for them: see [`Table::bring_near`].
    fn bring_near(&self, replica: ReplicaId, blocks: &[BlockHash]) {
        let Some(list) = self.list(replica) else { return };
        let over = (list.len as usize + blocks.len()).saturating_sub(list.limit as usize);
        let node = |at: u32| (at != NONE).then(|| self.nodes[at as usize]);
        let oldest = std::iter::successors(node(list.oldest), |held| node(held.newer));
        let go = oldest.take(over.min(blocks.len())).map(|held| held.block);
        self.holders.bring_near(blocks.iter().map(|block| name(*block)).chain(go));
    }

    /// The replica holds this block now, as its newest.
    pub fn store(&mut self, replica: ReplicaId, block: BlockHash) {
        let block = name(block);
        if self.list(replica).is_none_or(|list| list.limit == 0) {
            return;
        }
        if let Some(node) = self.node(block, replica) {
            self.unlink(node);
            self.link_as_newest(node);
            return;
        }
        if self.len == self.capacity {
            let largest = self.present.iter().max_by_key(|replica| self.blocks(*replica));
            if !largest.is_some_and(|largest| self.drop_oldest(largest)) {
                return;
            }
        }
        self.hold(replica, block);
        self.keep_limit(replica);
    }

    /// The replica holds this block no more.
    pub fn forget(&mut self, replica: ReplicaId, block: BlockHash) {
        if let Some(node) = self.node(name(block), replica) {
            self.drop_node(node);
        }
    }

    /// For each replica, how many blocks of the chain's beginning it holds. O(blocks + replicas).
    pub fn matches(&self, chain: &[BlockHash], matches: &mut Matches) {
        matches.0.fill(0);
        let mut following = self.present;
        for (depth, block) in chain.iter().enumerate() {
            let holders =
                self.holders.get(name(*block)).map_or(ReplicaSet::EMPTY, |words| Holders::read(words).all);
            let still = following.and(&holders);
            if still != following {
                for dropped in following.without(&still).iter() {
                    matches.set(dropped, depth as u32);
                }
                following = still;
            }
            if following.is_empty() {
                return;
            }
        }
        for whole in following.iter() {
            matches.set(whole, chain.len() as u32);
        }
    }

    fn node(&self, block: u64, replica: ReplicaId) -> Option<u32> {
        let holders = self.holders.get(block).map(Holders::read)?;
        if !holders.all.contains(replica) {
            return None;
        }
        if holders.first == replica {
            return Some(holders.node_of_first);
        }
        self.places.get(place(block, replica)).map(|[node]| *node as u32)
    }

    fn list(&self, replica: ReplicaId) -> Option<&Blocks> {
        self.replicas[usize::from(replica.0)].as_ref()
    }

    fn list_mut(&mut self, replica: ReplicaId) -> Option<&mut Blocks> {
        self.replicas[usize::from(replica.0)].as_mut()
    }

    fn keep_limit(&mut self, replica: ReplicaId) {
        while self.list(replica).is_some_and(|list| list.len > list.limit) {
            self.drop_oldest(replica);
        }
    }

    /// False if it has none.
    fn drop_oldest(&mut self, replica: ReplicaId) -> bool {
        match self.list(replica) {
            Some(list) if list.oldest != NONE => {
                self.drop_node(list.oldest);
                true
            }
            _ => false,
        }
    }

    /// Notes a block that the replica did not hold. There is room.
    fn hold(&mut self, replica: ReplicaId, block: u64) {
        let held = Held { block, older: NONE, newer: NONE, replica };
        let node = match self.free {
            NONE => {
                self.nodes.push(held);
                (self.nodes.len() - 1) as u32
            }
            free => {
                self.free = self.nodes[free as usize].newer;
                self.nodes[free as usize] = held;
                free
            }
        };
        self.len += 1;
        self.note_holder(block, replica, node);
        self.link_as_newest(node);
    }

    fn note_holder(&mut self, block: u64, replica: ReplicaId, node: u32) {
        let entry = self.holders.entry(block);
        debug_assert!(entry.is_some(), "there are no more blocks than nodes, and room for as many");
        let Some(words) = entry else { return };
        let mut holders = Holders::read(words);
        if holders.all.is_empty() {
            (holders.first, holders.node_of_first) = (replica, node);
        } else {
            let entry = self.places.entry(place(block, replica));
            debug_assert!(entry.is_some(), "there are no more places than nodes, and room for as many");
            let Some(at) = entry else { return };
            *at = [node.into()];
        }
        holders.all.insert(replica);
        holders.write(words);
    }

    fn drop_node(&mut self, node: u32) {
        self.unlink(node);
        let Held { block, replica, .. } = self.nodes[node as usize];
        self.drop_holder(block, replica);
        self.nodes[node as usize].newer = self.free;
        self.free = node;
        self.len -= 1;
    }

    fn drop_holder(&mut self, block: u64, replica: ReplicaId) {
        let mut take = |replica: ReplicaId| {
            let mut node = NONE;
            self.places.remove_if(place(block, replica), |[at]| {
                node = *at as u32;
                true
            });
            node
        };
        self.holders.remove_if(block, |words| {
            let mut holders = Holders::read(words);
            holders.all.remove(replica);
            if holders.first != replica {
                take(replica);
            } else if let Some(other) = holders.all.iter().next() {
                (holders.first, holders.node_of_first) = (other, take(other));
            }
            holders.write(words);
            holders.all.is_empty()
        });
    }

    fn link_as_newest(&mut self, node: u32) {
        let replica = self.nodes[node as usize].replica;
        let Some(list) = self.list_mut(replica) else { return };
        let before = list.newest;
        list.newest = node;
        list.len += 1;
        if before == NONE {
            list.oldest = node;
        } else {
            self.nodes[before as usize].newer = node;
        }
        let held = &mut self.nodes[node as usize];
        (held.older, held.newer) = (before, NONE);
    }

    fn unlink(&mut self, node: u32) {
        let Held { older, newer, replica, .. } = self.nodes[node as usize];
        if older != NONE {
            self.nodes[older as usize].newer = newer;
        }
        if newer != NONE {
            self.nodes[newer as usize].older = older;
        }
        let Some(list) = self.list_mut(replica) else { return };
        list.len -= 1;
        if older == NONE {
            list.oldest = newer;
        }
        if newer == NONE {
            list.newest = older;
        }
    }

    /// Everything that must hold between two calls. For tests; O(blocks).
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut pairs = 0;
        for replica in (0..=255).map(ReplicaId) {
            let Some(list) = self.list(replica) else { continue };
            let (mut at, mut before, mut len) = (list.oldest, NONE, 0);
            while at != NONE {
                let held = self.nodes[at as usize];
                let known = self.node(held.block, replica) == Some(at);
                if held.replica != replica || held.older != before || !known {
                    return Err(format!("node {at} of {replica:?} is badly linked or cannot be found"));
                }
                (before, at, len) = (at, held.newer, len + 1);
            }
            if len != list.len || before != list.newest || len > list.limit {
                return Err(format!("{replica:?} has {len} blocks, counts {} of {}", list.len, list.limit));
            }
            pairs += len as usize;
        }
        let (places, blocks) = (self.places.len(), self.holders.len());
        if pairs != self.len || pairs != places + blocks || self.nodes.capacity() > self.capacity {
            let counted = self.len;
            return Err(format!(
                "{pairs} pairs in the lists, {counted} counted, {blocks} blocks and {places} places"
            ));
        }
        Ok(())
    }
}

/// Half of a block's hash is enough here: two prefixes that share it by chance cost one badly chosen replica.
fn name(block: BlockHash) -> u64 {
    block.0 as u64
}

/// The key of a block and a replica (SplitMix64, Steele, Lea and Flood 2014).
fn place(block: u64, replica: ReplicaId) -> u64 {
    let mut z = block ^ u64::from(replica.0).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use servelab_engine::hash_blocks;

    use super::*;

    const MANY: u32 = u32::MAX;

    fn chain(tokens: &[u32]) -> Vec<BlockHash> {
        hash_blocks(tokens, 1, 0)
    }

    fn matched(index: &PrefixIndex, chain: &[BlockHash], replica: u8) -> u32 {
        let mut matches = Matches::default();
        index.matches(chain, &mut matches);
        matches.of(ReplicaId(replica))
    }

    #[test]
    fn each_replica_matches_as_far_as_it_holds_without_a_gap() {
        let mut index = PrefixIndex::new(1 << 20);
        let prompt = chain(&[1, 2, 3, 4, 5]);
        (0..4).for_each(|replica| index.add(ReplicaId(replica), MANY));
        index.touch(ReplicaId(0), &prompt);
        index.touch(ReplicaId(1), &prompt[..2]);
        index.store(ReplicaId(2), prompt[0]);
        index.store(ReplicaId(2), prompt[4]);
        assert_eq!([0, 1, 2, 3, 99].map(|replica| matched(&index, &prompt, replica)), [5, 2, 1, 0, 0]);
        let branch = chain(&[1, 2, 9, 4, 5]);
        assert_eq!([0, 1, 2].map(|replica| matched(&index, &branch, replica)), [2, 2, 1]);
        index.check_integrity().unwrap();
    }

    #[test]
    fn an_lru_as_long_as_the_replicas_cache_loses_the_tail_of_the_oldest_chain_first() {
        let mut index = PrefixIndex::new(1 << 20);
        index.add(ReplicaId(0), 6);
        let (first, second, third) = (chain(&[1, 2, 3]), chain(&[4, 5, 6]), chain(&[7, 8]));
        for prompt in [&first, &second, &first, &third] {
            index.touch(ReplicaId(0), prompt);
        }
        assert_eq!([&first, &second, &third].map(|prompt| matched(&index, prompt, 0)), [3, 1, 2]);
        index.add(ReplicaId(0), 2);
        assert_eq!([&first, &second, &third].map(|prompt| matched(&index, prompt, 0)), [0, 0, 2]);
        index.check_integrity().unwrap();
    }

    /// Fault 3 of the peers: removed workers stay in the tree.
    #[test]
    fn a_removed_replica_leaves_nothing_behind() {
        let mut index = PrefixIndex::new(1 << 20);
        let shared = chain(&[1, 2, 3]);
        for replica in [0, 1] {
            index.add(ReplicaId(replica), MANY);
            index.touch(ReplicaId(replica), &shared);
        }
        index.touch(ReplicaId(1), &chain(&[1, 2, 7, 8, 9]));
        index.remove(ReplicaId(1));
        assert_eq!((index.len(), index.holders.len(), index.blocks(ReplicaId(1))), (3, 3, 0));
        index.touch(ReplicaId(1), &shared);
        assert_eq!(index.len(), 3, "what is said of a replica that is gone is not kept");
        // The place is given to another replica, which must not inherit anything.
        index.add(ReplicaId(1), MANY);
        assert_eq!([0, 1].map(|replica| matched(&index, &shared, replica)), [3, 0]);
        index.remove(ReplicaId(0));
        assert!(index.is_empty() && index.holders.len() == 0);
        index.check_integrity().unwrap();
    }

    #[test]
    fn a_full_index_takes_from_the_replica_that_has_most() {
        let mut index = PrefixIndex::new(PrefixIndex::bytes_for(1000));
        (0..2).for_each(|replica| index.add(ReplicaId(replica), MANY));
        let (long, short) = (chain(&(0..2000).collect::<Vec<_>>()), chain(&[5000, 5001]));
        index.touch(ReplicaId(1), &short);
        index.touch(ReplicaId(0), &long);
        assert_eq!(index.len(), index.capacity());
        assert_eq!((matched(&index, &short, 1), matched(&index, &long, 0)), (2, 998));
        index.check_integrity().unwrap();
    }

    #[test]
    fn the_bound_is_in_bytes_and_none_is_too_small() {
        for bytes in [0, 1, 10_000, 1 << 20, 100_000_000] {
            let mut index = PrefixIndex::new(bytes);
            assert!(index.bytes() <= bytes || index.capacity() == 0);
            index.add(ReplicaId(255), MANY);
            index.touch(ReplicaId(255), &chain(&[1, 2]));
            assert_eq!(index.len(), index.capacity().min(2));
        }
        let capacity = PrefixIndex::new(1 << 30).capacity();
        assert!((9_000_000..12_000_000).contains(&capacity), "about 100 bytes a block: {capacity}");
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Add(u8, u32),
        Remove(u8),
        Clear(u8),
        Touch(u8, Vec<u32>),
        Store(u8, Vec<u32>),
        Forget(u8, Vec<u32>),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let replica = prop_oneof![0_u8..4, Just(255)];
        // Few tokens, so that prompts share beginnings.
        let prompt = || prop::collection::vec(0_u32..3, 0..8);
        prop_oneof![
            1 => (replica.clone(), prop_oneof![0_u32..12, Just(MANY)]).prop_map(|(r, n)| Operation::Add(r, n)),
            1 => replica.clone().prop_map(Operation::Remove),
            1 => replica.clone().prop_map(Operation::Clear),
            6 => (replica.clone(), prompt()).prop_map(|(r, p)| Operation::Touch(r, p)),
            2 => (replica.clone(), prompt()).prop_map(|(r, p)| Operation::Store(r, p)),
            2 => (replica, prompt()).prop_map(|(r, p)| Operation::Forget(r, p)),
        ]
    }

    /// What the index is meant to be, in the plainest form: for each replica its blocks, oldest first.
    #[derive(Default)]
    struct Naive {
        replicas: BTreeMap<u8, (u32, Vec<BlockHash>)>,
        capacity: usize,
    }

    impl Naive {
        fn apply(&mut self, operation: &Operation) {
            match operation {
                Operation::Add(replica, limit) => {
                    self.replicas.entry(*replica).or_default().0 = *limit;
                    self.trim(*replica);
                }
                Operation::Remove(replica) => drop(self.replicas.remove(replica)),
                Operation::Clear(replica) => {
                    self.replicas.entry(*replica).and_modify(|(_, blocks)| blocks.clear());
                }
                Operation::Touch(replica, prompt) => {
                    chain(prompt).iter().rev().for_each(|block| self.store(*replica, *block));
                }
                Operation::Store(replica, prompt) => {
                    chain(prompt).last().into_iter().for_each(|block| self.store(*replica, *block));
                }
                Operation::Forget(replica, prompt) => {
                    if let (Some((_, blocks)), Some(gone)) =
                        (self.replicas.get_mut(replica), chain(prompt).last())
                    {
                        blocks.retain(|block| block != gone);
                    }
                }
            }
        }

        fn store(&mut self, replica: u8, block: BlockHash) {
            let total: usize = self.replicas.values().map(|(_, blocks)| blocks.len()).sum();
            let Some((limit, blocks)) = self.replicas.get(&replica) else { return };
            if *limit == 0 {
                return;
            }
            if total == self.capacity && !blocks.contains(&block) {
                // The last of the largest, as the index takes it.
                let largest = self.replicas.iter().max_by_key(|(_, (_, blocks))| blocks.len());
                let Some(largest) = largest.map(|(replica, _)| *replica) else { return };
                self.replicas.entry(largest).and_modify(|(_, blocks)| {
                    blocks.remove(0);
                });
            }
            self.replicas.entry(replica).and_modify(|(_, blocks)| {
                blocks.retain(|other| *other != block);
                blocks.push(block);
            });
            self.trim(replica);
        }

        fn trim(&mut self, replica: u8) {
            let Some((limit, blocks)) = self.replicas.get_mut(&replica) else { return };
            let excess = blocks.len().saturating_sub(*limit as usize);
            blocks.drain(..excess);
        }

        fn matched(&self, replica: u8, chain: &[BlockHash]) -> u32 {
            let Some((_, blocks)) = self.replicas.get(&replica) else { return 0 };
            chain.iter().take_while(|block| blocks.contains(block)).count() as u32
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_map_and_stays_within_its_bound(
            capacity in 1_usize..60,
            operations in prop::collection::vec(operation(), 0..120),
            prompts in prop::collection::vec(prop::collection::vec(0_u32..3, 0..8), 1..8),
        ) {
            let mut index = PrefixIndex::new(PrefixIndex::bytes_for(capacity));
            let mut naive = Naive { capacity: index.capacity(), ..Naive::default() };
            let bytes = index.bytes();
            for operation in &operations {
                match operation {
                    Operation::Add(replica, limit) => index.add(ReplicaId(*replica), *limit),
                    Operation::Remove(replica) => index.remove(ReplicaId(*replica)),
                    Operation::Clear(replica) => index.clear(ReplicaId(*replica)),
                    Operation::Touch(replica, prompt) => index.touch(ReplicaId(*replica), &chain(prompt)),
                    Operation::Store(replica, prompt) => {
                        chain(prompt).last().into_iter().for_each(|block| index.store(ReplicaId(*replica), *block));
                    }
                    Operation::Forget(replica, prompt) => {
                        chain(prompt).last().into_iter().for_each(|block| index.forget(ReplicaId(*replica), *block));
                    }
                }
                naive.apply(operation);
                prop_assert_eq!(index.check_integrity(), Ok(()));
                prop_assert!(index.len() <= index.capacity() && index.bytes() == bytes);
            }
            for prompt in &prompts {
                let prompt = chain(prompt);
                for replica in [0, 1, 2, 3, 255] {
                    prop_assert_eq!(matched(&index, &prompt, replica), naive.matched(replica, &prompt));
                }
            }
        }
    }
}
