//! What one replica holds, by its own word, in the router's terms.
//!
//! A replica names its blocks as it likes and may have another block size. So the router rebuilds its own hash chain
//! from the tokens: of each block of the replica it keeps where its own chain stands at the end of it (the hash of the
//! last block of its own that is full by then, and the tokens after that) and which blocks of its own it made full.
//! Removed, it takes these with it.
//!
//! Blocks whose names depend on more than tokens (adapters, images, salts that are not told) and blocks that are not in
//! the memory that the model computes in are left out, and so is what follows on a block that is not known.

use std::collections::HashMap;

use servelab_engine::{BlockHash, block_hash};
use servelab_wire::kv_events::{BlockName, BlockStored, KvEvent};

/// A change in the router's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Stored(BlockHash),
    Removed(BlockHash),
    Cleared,
}

/// An event that contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{blocks} blocks of {block_size} tokens came with {tokens} tokens")]
pub struct BadEvent {
    blocks: usize,
    block_size: u32,
    tokens: usize,
}

/// Where the router's chain stands.
#[derive(Clone, Debug, Default)]
struct Position {
    /// Of the last full block; `None` before the first.
    hash: Option<BlockHash>,
    /// The tokens after it, fewer than a block.
    rest: Vec<u32>,
    salt: u64,
}

#[derive(Debug)]
struct Known {
    end: Position,
    /// The router's blocks that this one made full.
    full: Box<[BlockHash]>,
}

/// The blocks of one replica.
#[derive(Debug)]
pub struct Mirror {
    /// The router's, in tokens.
    block_size: usize,
    /// Most blocks of the replica that are kept; those beyond are not known.
    most: usize,
    known: HashMap<(u32, BlockName), Known>,
    /// How many blocks of the replica made a block of the router full.
    held: HashMap<BlockHash, u32>,
}

/// The memory that the model computes in.
const COMPUTES: &str = "gpu";

impl Mirror {
    /// An empty one; `block_size` is the router's, in tokens, at least one.
    pub fn new(block_size: usize, most: usize) -> Self {
        Self { block_size: block_size.max(1), most, known: HashMap::new(), held: HashMap::new() }
    }

    /// The router's blocks that the replica holds.
    pub fn blocks(&self) -> impl Iterator<Item = BlockHash> {
        self.held.keys().copied()
    }

    pub fn clear(&mut self) {
        self.known.clear();
        self.held.clear();
    }

    /// Takes an event in and adds what it means to `changes`.
    ///
    /// # Errors
    /// If it contradicts itself; nothing has changed then.
    pub fn apply(&mut self, event: &KvEvent, changes: &mut Vec<Change>) -> Result<(), BadEvent> {
        match event {
            KvEvent::AllBlocksCleared => {
                self.clear();
                changes.push(Change::Cleared);
            }
            KvEvent::BlockRemoved(removed) if computes(removed.medium.as_deref()) => {
                let group = removed.group_idx.unwrap_or(0);
                removed.block_hashes.iter().for_each(|name| self.remove(group, name, changes));
            }
            KvEvent::BlockRemoved(_) => {}
            KvEvent::BlockStored(stored) => {
                let (blocks, tokens) = (stored.block_hashes.len(), stored.token_ids.len());
                let block_size = stored.block_size;
                if block_size == 0 || blocks.checked_mul(block_size as usize) != Some(tokens) {
                    return Err(BadEvent { blocks, block_size, tokens });
                }
                if computes(stored.medium.as_deref()) && !stored.has_other_keys {
                    self.store(stored, changes);
                }
            }
        }
        Ok(())
    }

    fn store(&mut self, stored: &BlockStored, changes: &mut Vec<Change>) {
        let group = stored.group_idx.unwrap_or(0);
        let mut at = match &stored.parent_block_hash {
            None => Position { salt: stored.salt_hash.unwrap_or(0), ..Position::default() },
            Some(parent) => match self.known.get(&(group, parent.clone())) {
                Some(known) => known.end.clone(),
                None => return,
            },
        };
        for (name, tokens) in
            stored.block_hashes.iter().zip(stored.token_ids.chunks_exact(stored.block_size as usize))
        {
            let key = (group, name.clone());
            if let Some(known) = self.known.get(&key) {
                at = known.end.clone();
                continue;
            }
            if self.known.len() >= self.most {
                return;
            }
            let full = at.advance(tokens, self.block_size);
            for hash in &full {
                let count = self.held.entry(*hash).or_default();
                *count += 1;
                if *count == 1 {
                    changes.push(Change::Stored(*hash));
                }
            }
            self.known.insert(key, Known { end: at.clone(), full: full.into() });
        }
    }

    fn remove(&mut self, group: u32, name: &BlockName, changes: &mut Vec<Change>) {
        let Some(known) = self.known.remove(&(group, name.clone())) else { return };
        for hash in known.full {
            let Some(count) = self.held.get_mut(&hash) else { continue };
            *count -= 1;
            if *count == 0 {
                self.held.remove(&hash);
                changes.push(Change::Removed(hash));
            }
        }
    }
}

impl Position {
    /// Moves on over these tokens, and gives the blocks that they made full.
    fn advance(&mut self, tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
        self.rest.extend_from_slice(tokens);
        let mut full = Vec::with_capacity(self.rest.len() / block_size);
        for block in self.rest.chunks_exact(block_size) {
            let hash = block_hash(self.hash, block, self.salt);
            self.hash = Some(hash);
            full.push(hash);
        }
        self.rest.drain(..full.len() * block_size);
        full
    }
}

fn computes(medium: Option<&str>) -> bool {
    medium.is_none_or(|medium| medium.eq_ignore_ascii_case(COMPUTES))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use servelab_engine::hash_blocks;
    use servelab_wire::kv_events::BlockRemoved;

    use super::*;

    fn names(blocks: std::ops::Range<u64>) -> Vec<BlockName> {
        blocks.map(BlockName::Number).collect()
    }

    fn stored(first: u64, parent: Option<u64>, tokens: &[u32], block_size: u32) -> KvEvent {
        let blocks = (tokens.len() / block_size as usize) as u64;
        KvEvent::BlockStored(BlockStored {
            block_hashes: names(first..first + blocks),
            parent_block_hash: parent.map(BlockName::Number),
            token_ids: tokens.to_vec(),
            block_size,
            ..BlockStored::default()
        })
    }

    fn removed(blocks: std::ops::Range<u64>) -> KvEvent {
        KvEvent::BlockRemoved(BlockRemoved { block_hashes: names(blocks), ..BlockRemoved::default() })
    }

    /// What an index would hold that is fed with the changes.
    #[derive(Default)]
    struct Fed(BTreeSet<BlockHash>);

    impl Fed {
        fn apply(&mut self, mirror: &mut Mirror, event: &KvEvent) {
            let mut changes = Vec::new();
            mirror.apply(event, &mut changes).unwrap();
            for change in changes {
                match change {
                    Change::Stored(hash) => assert!(self.0.insert(hash)),
                    Change::Removed(hash) => assert!(self.0.remove(&hash)),
                    Change::Cleared => self.0.clear(),
                }
            }
            assert_eq!(self.0, mirror.blocks().collect());
        }

        fn matched(&self, tokens: &[u32], block_size: usize) -> usize {
            hash_blocks(tokens, block_size, 0).iter().take_while(|hash| self.0.contains(hash)).count()
        }
    }

    #[test]
    fn the_chain_is_rebuilt_at_the_routers_block_size() {
        let tokens: Vec<u32> = (0..96).collect();
        for replicas in [1, 4, 16, 32, 48, 24] {
            let (mut mirror, mut fed) = (Mirror::new(16, 1000), Fed::default());
            // In two events, the second behind the first.
            let half = 48 / replicas as usize * replicas as usize;
            fed.apply(&mut mirror, &stored(0, None, &tokens[..half], replicas));
            let before = (half as u64 / u64::from(replicas)).checked_sub(1);
            let rest = &tokens[half..half + (96 - half) / replicas as usize * replicas as usize];
            fed.apply(&mut mirror, &stored(half as u64 / u64::from(replicas), before, rest, replicas));
            let covered = half + rest.len();
            assert_eq!(fed.matched(&tokens, 16), covered / 16, "blocks of {replicas}");
            // The last block goes, and with it all that it was needed for.
            let last = covered as u64 / u64::from(replicas) - 1;
            fed.apply(&mut mirror, &removed(last..last + 1));
            assert_eq!(fed.matched(&tokens, 16), (covered - replicas as usize) / 16, "blocks of {replicas}");
            fed.apply(&mut mirror, &KvEvent::AllBlocksCleared);
            assert!(fed.0.is_empty());
        }
    }

    #[test]
    fn what_is_not_of_tokens_alone_or_not_in_the_computing_memory_is_left_out() {
        let tokens: Vec<u32> = (0..16).collect();
        let with = |change: fn(&mut BlockStored)| {
            let KvEvent::BlockStored(mut event) = stored(0, None, &tokens, 16) else { panic!() };
            change(&mut event);
            KvEvent::BlockStored(event)
        };
        let (mut mirror, mut fed) = (Mirror::new(16, 1000), Fed::default());
        fed.apply(&mut mirror, &with(|event| event.has_other_keys = true));
        fed.apply(&mut mirror, &with(|event| event.medium = Some("CPU".into())));
        fed.apply(&mut mirror, &stored(9, Some(8), &tokens, 16));
        assert!(fed.0.is_empty());
        fed.apply(&mut mirror, &with(|event| event.salt_hash = Some(5)));
        assert_eq!(fed.0, hash_blocks(&tokens, 16, 5).into_iter().collect());
        // The copy elsewhere goes, the block stays.
        let elsewhere =
            BlockRemoved { block_hashes: names(0..1), medium: Some("CPU".into()), group_idx: None };
        fed.apply(&mut mirror, &KvEvent::BlockRemoved(elsewhere));
        assert_eq!(fed.0.len(), 1);
    }

    #[test]
    fn an_event_that_contradicts_itself_changes_nothing() {
        let mut mirror = Mirror::new(16, 1000);
        for (tokens, block_size) in [(vec![1; 15], 16), (vec![1; 16], 0)] {
            let event = KvEvent::BlockStored(BlockStored {
                block_hashes: names(0..1),
                token_ids: tokens,
                block_size,
                ..BlockStored::default()
            });
            assert!(mirror.apply(&event, &mut Vec::new()).is_err());
        }
        assert_eq!(mirror.blocks().count(), 0);
    }

    proptest! {
        /// Whatever comes in whatever order, the mirror stays in its bound and tells its changes truly.
        #[test]
        fn it_is_bounded_and_its_changes_are_what_it_holds(
            events in prop::collection::vec((0..30_u64, prop::option::of(0..30_u64), 1..4_usize, 0..8_u8), 0..200),
        ) {
            let (mut mirror, mut fed) = (Mirror::new(4, 20), Fed::default());
            for (first, parent, blocks, kind) in events {
                let event = match kind {
                    0 => KvEvent::AllBlocksCleared,
                    1..=3 => removed(first..first + blocks as u64),
                    _ => stored(first, parent, &vec![first as u32; 3 * blocks], 3),
                };
                fed.apply(&mut mirror, &event);
                prop_assert!(mirror.known.len() <= 20);
            }
        }
    }
}
