//! The block pool against a model so simple that it is evidently right: lists, searched from the
//! front.

use proptest::prelude::*;

use super::harness::Replayed;
use crate::block_hash::{BlockHash, HashChain};
use crate::block_pool::{BlockId, BlockPool, Link};
use crate::{KvEvent, StoredBlock, TokenId};

const BLOCKS: u32 = 6;
const BLOCK_SIZE: usize = 2;

#[derive(Clone, Debug)]
enum Operation {
    Allocate,
    /// Retain the n-th block that is held or cached.
    Retain(usize),
    /// Release the n-th block that is held.
    Release(usize),
    /// Publish the n-th held block under one of four hashes, as a child of the n-th link.
    Publish {
        held: usize,
        hash: u128,
        parent: usize,
        tokens: [TokenId; BLOCK_SIZE],
    },
    Lookup {
        hash: u128,
        parent: usize,
        tokens: [TokenId; BLOCK_SIZE],
    },
    ForgetAll,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let tokens = || [0..2u32, 0..2u32];
    let one = prop_oneof![
        6 => Just(Operation::Allocate),
        4 => (0..64usize).prop_map(Operation::Retain),
        8 => (0..64usize).prop_map(Operation::Release),
        8 => (0..64usize, 0..4u128, 0..64usize, tokens())
            .prop_map(|(held, hash, parent, tokens)| Operation::Publish { held, hash, parent, tokens }),
        6 => (0..4u128, 0..64usize, tokens())
            .prop_map(|(hash, parent, tokens)| Operation::Lookup { hash, parent, tokens }),
        1 => Just(Operation::ForgetAll),
    ];
    prop::collection::vec(one, 1..200)
}

#[derive(Clone, Debug)]
struct Published {
    block: BlockId,
    hash: BlockHash,
    parent: Link,
    tokens: [TokenId; BLOCK_SIZE],
    link: Link,
}

/// The same rules, without any index.
struct Naive {
    references: Vec<u32>,
    /// Last is handed out first.
    free: Vec<BlockId>,
    /// First is evicted first.
    cached: Vec<BlockId>,
    published: Vec<Published>,
    links: Vec<Link>,
}

impl Naive {
    fn new() -> Self {
        Self {
            references: vec![0; BLOCKS as usize],
            free: (0..BLOCKS).rev().map(BlockId).collect(),
            cached: Vec::new(),
            published: Vec::new(),
            links: vec![Link::Root { salt: 0 }, Link::Root { salt: 1 }],
        }
    }

    fn held(&self) -> Vec<BlockId> {
        (0..BLOCKS).map(BlockId).filter(|block| self.references[block.0 as usize] > 0).collect()
    }

    fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None if self.cached.is_empty() => return None,
            None => self.cached.remove(0),
        };
        self.published.retain(|published| published.block != block);
        self.references[block.0 as usize] = 1;
        Some(block)
    }

    fn retain(&mut self, block: BlockId) {
        self.cached.retain(|cached| *cached != block);
        self.references[block.0 as usize] += 1;
    }

    fn release(&mut self, block: BlockId) {
        self.references[block.0 as usize] -= 1;
        if self.references[block.0 as usize] == 0 {
            match self.published.iter().any(|published| published.block == block) {
                true => self.cached.push(block),
                false => self.free.push(block),
            }
        }
    }

    fn lookup(&self, hash: BlockHash, parent: Link, tokens: &[TokenId]) -> Option<(BlockId, Link)> {
        let equal = |p: &&Published| p.hash == hash && p.parent == parent && p.tokens == tokens;
        self.published.iter().find(equal).map(|published| (published.block, published.link))
    }

    /// Takes the link that the pool made up for a new prefix.
    fn publish(&mut self, new: Published) -> Link {
        if let Some(published) = self.published.iter().find(|published| published.block == new.block) {
            return published.link;
        }
        if let Some((_, link)) = self.lookup(new.hash, new.parent, &new.tokens) {
            return link;
        }
        if let Some(at) = self.published.iter().position(|published| published.hash == new.hash) {
            let other = self.published.remove(at).block;
            if let Some(at) = self.cached.iter().position(|cached| *cached == other) {
                self.cached.remove(at);
                self.free.push(other);
            }
        }
        let link = new.link;
        assert!(!self.links.contains(&link), "a link was used twice");
        self.links.push(link);
        self.published.push(new);
        link
    }

    fn forget_all(&mut self) -> usize {
        let published = self.published.len();
        self.published.clear();
        self.cached.sort();
        self.free.append(&mut self.cached);
        published
    }
}

fn nth<T: Copy>(from: &[T], n: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[n % from.len()])
}

fn operate(pool: &mut BlockPool, naive: &mut Naive, operation: &Operation) {
    match *operation {
        Operation::Allocate => assert_eq!(pool.allocate(), naive.allocate()),
        Operation::Retain(n) => {
            let known = [naive.held(), naive.cached.clone()].concat();
            let Some(block) = nth(&known, n) else { return };
            pool.retain(block);
            naive.retain(block);
        }
        Operation::Release(n) => {
            let Some(block) = nth(&naive.held(), n) else { return };
            pool.release(block);
            naive.release(block);
        }
        Operation::Publish { held, hash, parent, tokens } => {
            let (Some(block), Some(parent)) = (nth(&naive.held(), held), nth(&naive.links, parent)) else {
                return;
            };
            let hash = BlockHash(hash);
            let link = pool.publish(block, hash, parent, &tokens);
            assert_eq!(link, naive.publish(Published { block, hash, parent, tokens, link }));
        }
        Operation::Lookup { hash, parent, tokens } => {
            let parent = nth(&naive.links, parent).unwrap();
            let hash = BlockHash(hash);
            assert_eq!(pool.lookup(hash, parent, &tokens), naive.lookup(hash, parent, &tokens));
        }
        Operation::ForgetAll => assert_eq!(pool.forget_all(), naive.forget_all()),
    }
}

fn compare(pool: &BlockPool, naive: &Naive) {
    pool.check_integrity(&naive.references).unwrap();
    let counts = pool.counts();
    assert_eq!(counts.free as usize, naive.free.len());
    assert_eq!(counts.cached as usize, naive.cached.len());
    assert_eq!(counts.held as usize, naive.held().len());
    assert_eq!(pool.available(), naive.free.len() + naive.cached.len());
    for block in (0..BLOCKS).map(BlockId) {
        assert_eq!(pool.references(block), naive.references[block.0 as usize]);
        assert_eq!(pool.is_published(block), naive.published.iter().any(|p| p.block == block));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn the_pool_does_what_the_naive_model_does(operations in operations()) {
        let mut pool = BlockPool::new(BLOCKS, BLOCK_SIZE);
        let mut naive = Naive::new();
        for operation in &operations {
            operate(&mut pool, &mut naive, operation);
            compare(&pool, &naive);
        }
    }

    /// However seldom the changes are taken, replaying them gives what is there, and they stay few.
    #[test]
    fn the_changes_replayed_are_what_is_there(operations in operations(), seldom in 1..100usize) {
        let mut pool = BlockPool::new(BLOCKS, BLOCK_SIZE);
        let (mut naive, mut replayed) = (Naive::new(), Replayed::default());
        pool.listen(true);
        for operations in operations.chunks(seldom) {
            operations.iter().for_each(|operation| operate(&mut pool, &mut naive, operation));
            let changes = pool.take_changes();
            prop_assert!(changes.len() <= 2 * BLOCKS as usize + 1);
            replayed.apply(changes);
            replayed.check(pool.stored_blocks());
        }
        pool.listen(false);
        operations.iter().for_each(|operation| operate(&mut pool, &mut naive, operation));
        prop_assert!(pool.take_changes().is_empty());
    }
}

#[test]
fn a_change_tells_all_that_a_listener_needs_to_build_the_chain_anew() {
    let mut pool = BlockPool::new(2, BLOCK_SIZE);
    pool.listen(true);
    cache(&mut pool, &[1, 2, 3, 4]);
    let mut chain = HashChain::new(BLOCK_SIZE, 0);
    let hashes = [0, 1].map(|index| chain.get(index, &[1, 2, 3, 4]).unwrap());
    let stored = |at: usize, parent, tokens: [TokenId; BLOCK_SIZE]| {
        KvEvent::Stored(StoredBlock { hash: hashes[at], parent, salt: 0, tokens: tokens.into() })
    };
    assert_eq!(pool.take_changes(), [stored(0, None, [1, 2]), stored(1, Some(hashes[0]), [3, 4])]);
    pool.allocate().unwrap();
    assert_eq!(pool.take_changes(), [KvEvent::Removed(hashes[1])]);
    assert_eq!(pool.stored_blocks().len(), 1);
    pool.forget_all();
    assert_eq!(pool.take_changes(), [KvEvent::Cleared]);
}

/// Computes and publishes `tokens` as one sequence would, and gives the blocks back.
fn cache(pool: &mut BlockPool, tokens: &[TokenId]) -> Vec<BlockId> {
    let mut chain = HashChain::new(BLOCK_SIZE, 0);
    let mut link = Link::Root { salt: 0 };
    let mut blocks = Vec::new();
    for (index, content) in tokens.chunks_exact(BLOCK_SIZE).enumerate() {
        let block = pool.allocate().unwrap();
        link = pool.publish(block, chain.get(index, tokens).unwrap(), link, content);
        blocks.push(block);
    }
    pool.release_chain(&mut blocks.clone());
    blocks
}

fn found(pool: &BlockPool, tokens: &[TokenId]) -> Vec<BlockId> {
    pool.longest_prefix(tokens, &mut HashChain::new(BLOCK_SIZE, 0), usize::MAX).blocks
}

#[test]
fn a_chain_is_evicted_from_its_tail() {
    let mut pool = BlockPool::new(3, BLOCK_SIZE);
    let tokens = [1, 2, 3, 4, 5, 6];
    let blocks = cache(&mut pool, &tokens);
    assert_eq!(found(&pool, &tokens), blocks);
    for left in [2, 1, 0] {
        assert_eq!(pool.allocate(), Some(blocks[left]));
        assert_eq!(found(&pool, &tokens), blocks[..left]);
    }
    assert_eq!(pool.allocate(), None);
}

#[test]
fn the_chain_used_last_is_evicted_last() {
    let mut pool = BlockPool::new(4, BLOCK_SIZE);
    let old = cache(&mut pool, &[1, 2, 3, 4]);
    let new = cache(&mut pool, &[5, 6, 7, 8]);
    let again = found(&pool, &[1, 2, 3, 4]);
    assert_eq!(again, old);
    again.iter().for_each(|block| pool.retain(*block));
    pool.release_chain(&mut again.clone());
    let evicted: Vec<_> = (0..4).map_while(|_| pool.allocate()).collect();
    assert_eq!(evicted, [new[1], new[0], old[1], old[0]]);
}

#[test]
fn blocks_without_content_go_before_cached_ones() {
    let mut pool = BlockPool::new(3, BLOCK_SIZE);
    let cached = cache(&mut pool, &[1, 2]);
    let plain = pool.allocate().unwrap();
    pool.release(plain);
    assert_eq!(pool.allocate(), Some(plain));
    assert_ne!(pool.allocate(), Some(cached[0]));
    assert_eq!(pool.allocate(), Some(cached[0]));
}

/// X and Y collide. While Y's child is published, a request for X must not be given it, although
/// the hashes and the child's own tokens are equal.
#[test]
fn a_collision_of_the_parent_does_not_reuse_the_child() {
    let (x, y, child) = ([1, 1], [2, 2], [3, 3]);
    let (hash, child_hash) = (BlockHash(7), BlockHash(8));
    let root = Link::Root { salt: 0 };
    let mut pool = BlockPool::new(4, BLOCK_SIZE);
    let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
    let link_y = pool.publish(blocks[0], hash, root, &y);
    let child_of_y = pool.publish(blocks[1], child_hash, link_y, &child);
    assert_eq!(pool.lookup(child_hash, link_y, &child), Some((blocks[1], child_of_y)));
    let link_x = pool.publish(blocks[2], hash, root, &x);
    assert_eq!(pool.lookup(hash, root, &x), Some((blocks[2], link_x)));
    assert_eq!(pool.lookup(hash, root, &y), None);
    assert_eq!(pool.lookup(child_hash, link_x, &child), None);
}
