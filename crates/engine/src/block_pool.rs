//! Fixed-size blocks of KV memory: reference counts, and an LRU of freed blocks whose content is
//! still good.
//!
//! A block is in one of three states, and the three always add up to the whole pool:
//!
//! - **free**: nobody holds it, its content is of no use;
//! - **held**: at least one sequence holds it;
//! - **cached**: nobody holds it, its content is published and can be taken again until it is evicted.
//!
//! Every operation is O(1). The pool knows nothing of sequences or of the memory itself.

use std::num::NonZeroU64;

use hashbrown::HashTable;

use crate::block_hash::{BlockHash, HashChain};
use crate::kv_event::{KvEvent, StoredBlock};
use crate::request::TokenId;

/// A block of KV memory, `block_size` token slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// The identity of one exact token prefix, as verified token by token. Two prefixes with equal
/// hashes never share a link, so that a colliding hash cannot smuggle in the children of another
/// prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The empty prefix of all requests with this salt.
    Root { salt: u64 },
    /// A published block. Numbers begin at 1 and are never reused; hash and salt are those of its chain.
    Block { number: u64, hash: BlockHash, salt: u64 },
}

impl Link {
    fn salt(self) -> u64 {
        match self {
            Self::Root { salt } | Self::Block { salt, .. } => salt,
        }
    }

    fn hash(self) -> Option<BlockHash> {
        match self {
            Self::Root { .. } => None,
            Self::Block { hash, .. } => Some(hash),
        }
    }

    fn number(self) -> Option<u64> {
        match self {
            Self::Root { .. } => None,
            Self::Block { number, .. } => Some(number),
        }
    }
}

/// The leading blocks of a prompt that were found in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Not yet held: [`BlockPool::retain`] each before anything else is allocated.
    pub blocks: Vec<BlockId>,
    /// Identity of the prefix that ends with the last of them.
    pub link: Link,
}

/// How many blocks are in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCounts {
    pub free: u32,
    pub held: u32,
    pub cached: u32,
}

/// What is known about the content of a published block. 64 bytes, a cache line: the pool of a large GPU has tens of
/// thousands of blocks, and nearly every look at one is a miss.
#[derive(Clone, Copy, Debug)]
struct Content {
    hash: BlockHash,
    /// Of the block before it; of no meaning in a first block.
    parent_hash: BlockHash,
    number: NonZeroU64,
    /// `None` in a first block.
    parent: Option<NonZeroU64>,
    salt: u64,
}

impl Content {
    fn link(&self) -> Link {
        Link::Block { number: self.number.get(), hash: self.hash, salt: self.salt }
    }

    fn parent(&self) -> Link {
        match self.parent {
            None => Link::Root { salt: self.salt },
            Some(number) => Link::Block { number: number.get(), hash: self.parent_hash, salt: self.salt },
        }
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Block {
    references: u32,
    /// Neighbours in the LRU list; `NONE` at its ends and outside of it.
    older: u32,
    newer: u32,
}

/// All blocks of one engine.
#[derive(Clone, Debug)]
pub struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    /// Of each block, as long as it is published.
    contents: Vec<Option<Content>>,
    /// Tokens of published blocks, to compare on a hit. `[blocks, block_size]`
    tokens: Vec<TokenId>,
    /// Free blocks; the last one is handed out next.
    free: Vec<BlockId>,
    /// Ends of the list of cached blocks.
    oldest: u32,
    newest: u32,
    cached: u32,
    /// Published blocks by the hash of their content. Never grows: it has room for all blocks.
    published: HashTable<BlockId>,
    next_number: NonZeroU64,
    releases: u64,
    /// What changed since somebody took the changes; `None` while nobody listens.
    changes: Option<Vec<KvEvent>>,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks of `block_size` tokens.
    pub fn new(num_blocks: u32, block_size: usize) -> Self {
        let block = Block { references: 0, older: NONE, newer: NONE };
        Self {
            block_size,
            blocks: vec![block; num_blocks as usize],
            contents: vec![None; num_blocks as usize],
            tokens: vec![0; num_blocks as usize * block_size],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            oldest: NONE,
            newest: NONE,
            cached: 0,
            published: HashTable::with_capacity(num_blocks as usize),
            next_number: NonZeroU64::MIN,
            releases: 0,
            changes: None,
        }
    }

    /// Blocks that [`BlockPool::allocate`] can hand out, by eviction if need be.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached as usize
    }

    pub fn counts(&self) -> BlockCounts {
        let free = self.free.len() as u32;
        BlockCounts { free, held: self.blocks.len() as u32 - free - self.cached, cached: self.cached }
    }

    /// How often the last reference to a block was given back: while it stands still, nothing that
    /// did not fit before fits now.
    pub fn releases(&self) -> u64 {
        self.releases
    }

    /// How many sequences hold the block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.block(block).references
    }

    /// Whether the block's content can be found by its hash.
    pub fn is_published(&self, block: BlockId) -> bool {
        self.content(block).is_some()
    }

    /// Hands out a block with undefined content and one reference, or `None` if all are held. Free
    /// blocks go first; then the cached block that was given back longest ago is evicted.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.evict_oldest()?,
        };
        self.block_mut(block).references = 1;
        Some(block)
    }

    /// Hands out `count` blocks as [`BlockPool::allocate`] does, behind those in `blocks`; fewer only if all are held.
    pub fn allocate_into(&mut self, blocks: &mut Vec<BlockId>, count: usize) {
        self.bring_near(count.saturating_sub(self.free.len()));
        blocks.extend((0..count).map_while(|_| self.allocate()));
    }

    /// Looks at the blocks that are evicted next and where they are found. These looks do not wait for each other, as
    /// evictions do: in a pool that is larger than the caches each of them would wait for memory three times.
    fn bring_near(&self, count: usize) {
        let block = |at: u32| (at != NONE).then_some(BlockId(at));
        let oldest = std::iter::successors(block(self.oldest), |at| block(self.block(*at).newer));
        let is_found = |at: &BlockId, content: &Content| {
            self.published.find(short(content.hash), |other| other == at).is_some()
        };
        let found =
            oldest.take(count).filter(|at| self.content(*at).is_some_and(|content| is_found(at, content)));
        std::hint::black_box(found.count());
    }

    /// Adds a reference to a held or cached block; its content stays until the last reference is
    /// given back and the block is evicted.
    pub fn retain(&mut self, block: BlockId) {
        if self.block(block).references == 0 {
            self.unlink(block);
        }
        self.block_mut(block).references += 1;
    }

    /// Gives one reference back. With the last one a published block becomes cached, as the newest
    /// of them, and any other becomes free.
    pub fn release(&mut self, block: BlockId) {
        let entry = self.block_mut(block);
        debug_assert!(entry.references > 0, "{block:?} was released more often than it was taken");
        entry.references -= 1;
        if entry.references > 0 {
            return;
        }
        self.releases += 1;
        match self.is_published(block) {
            true => self.link_as_newest(block),
            false => self.free.push(block),
        }
    }

    /// Releases the blocks of one sequence, the last one first: it becomes the oldest, so that a
    /// chain is evicted from its tail, and what remains of it can still be found.
    pub fn release_chain(&mut self, blocks: &mut Vec<BlockId>) {
        while let Some(block) = blocks.pop() {
            self.release(block);
        }
    }

    /// Makes the content of a full, held block findable, and returns the identity of the prefix that
    /// ends with it. If the same prefix is published already, that other block stays the one to be
    /// found. A block of another prefix under the same hash gives way.
    #[inline]
    pub fn publish(&mut self, block: BlockId, hash: BlockHash, parent: Link, tokens: &[TokenId]) -> Link {
        debug_assert!(self.block(block).references > 0 && tokens.len() == self.block_size);
        if let Some(content) = self.content(block) {
            return content.link();
        }
        if let Some(other) = self.find(hash) {
            if let Some(link) = self.link_if_equal(other, parent, tokens) {
                return link;
            }
            self.forget(other);
        }
        let content = Content {
            hash,
            parent_hash: parent.hash().unwrap_or(BlockHash(0)),
            number: self.next_number,
            parent: parent.number().and_then(NonZeroU64::new),
            salt: parent.salt(),
        };
        self.next_number = self.next_number.saturating_add(1);
        self.contents[block.0 as usize] = Some(content);
        self.tokens_mut(block).copy_from_slice(tokens);
        let contents = &self.contents;
        let hash_of = |block: &BlockId| contents[block.0 as usize].map_or(0, |content| short(content.hash));
        self.published.insert_unique(short(hash), block, hash_of);
        if self.changes.is_some() {
            let stored = self.stored(block, content);
            self.note(KvEvent::Stored(stored));
        }
        content.link()
    }

    /// Finds the block with exactly this content: same hash, same prefix before it, same tokens.
    pub fn lookup(&self, hash: BlockHash, parent: Link, tokens: &[TokenId]) -> Option<(BlockId, Link)> {
        let block = self.find(hash)?;
        Some((block, self.link_if_equal(block, parent, tokens)?))
    }

    /// The block under this hash, whatever stands before it.
    fn find(&self, hash: BlockHash) -> Option<BlockId> {
        let is_it = |block: &BlockId| self.content(*block).is_some_and(|content| content.hash == hash);
        self.published.find(short(hash), is_it).copied()
    }

    fn link_if_equal(&self, block: BlockId, parent: Link, tokens: &[TokenId]) -> Option<Link> {
        let content = self.content(block)?;
        (content.parent() == parent && self.tokens_of(block) == tokens).then(|| content.link())
    }

    /// Finds the longest published prefix of `tokens`, `limit` blocks at most. Nothing is held yet.
    pub fn longest_prefix(&self, tokens: &[TokenId], chain: &mut HashChain, limit: usize) -> Prefix {
        let blocks = Vec::with_capacity(limit.min(tokens.len() / self.block_size));
        let mut prefix = Prefix { blocks, link: Link::Root { salt: chain.salt() } };
        for (index, block_tokens) in tokens.chunks_exact(self.block_size).take(limit).enumerate() {
            let Some(hash) = chain.get(index, tokens) else { break };
            let Some((block, link)) = self.lookup(hash, prefix.link, block_tokens) else { break };
            prefix.blocks.push(block);
            prefix.link = link;
        }
        prefix
    }

    /// Forgets all content: cached blocks become free, held ones stay held and are no longer found.
    /// Returns how many blocks were published.
    pub fn forget_all(&mut self) -> usize {
        let published = self.published.len();
        let listened = self.changes.take().is_some();
        for index in 0..self.blocks.len() as u32 {
            self.forget(BlockId(index));
        }
        // Whatever was not taken yet is gone as well.
        self.changes = listened.then(|| vec![KvEvent::Cleared]);
        published
    }

    /// Keeps the changes from now on, or no more. Without a listener they cost nothing.
    pub fn listen(&mut self, listens: bool) {
        match listens {
            true => drop(self.changes.get_or_insert_default()),
            false => self.changes = None,
        }
    }

    /// The changes since the last call, in order; none while nobody listens.
    pub fn take_changes(&mut self) -> Vec<KvEvent> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Everything that can be found, in the order in which it was published: a block stands behind the one before it
    /// in its chain, if that is there. O(blocks).
    pub fn stored_blocks(&self) -> Vec<StoredBlock> {
        let published =
            |(index, content): (usize, &Option<Content>)| Some((BlockId(index as u32), (*content)?));
        let mut blocks: Vec<_> = self.contents.iter().enumerate().filter_map(published).collect();
        blocks.sort_unstable_by_key(|(_, content)| content.number);
        blocks.into_iter().map(|(block, content)| self.stored(block, content)).collect()
    }

    fn stored(&self, block: BlockId, content: Content) -> StoredBlock {
        StoredBlock {
            hash: content.hash,
            parent: content.parent().hash(),
            salt: content.salt,
            tokens: self.tokens_of(block).into(),
        }
    }

    /// If more has gathered than everything afresh would take, that takes its place: the list is bounded, and what is
    /// replayed comes out the same.
    fn note(&mut self, event: KvEvent) {
        let most = 2 * self.blocks.len() + 1;
        let Some(changes) = &mut self.changes else { return };
        changes.push(event);
        if changes.len() > most {
            let stored = self.stored_blocks().into_iter().map(KvEvent::Stored);
            self.changes = Some(std::iter::once(KvEvent::Cleared).chain(stored).collect());
        }
    }

    fn forget(&mut self, block: BlockId) {
        let Some(hash) = self.take_content(block) else { return };
        if self.block(block).references == 0 {
            self.unlink(block);
            self.free.push(block);
        }
        self.note(KvEvent::Removed(hash));
    }

    fn evict_oldest(&mut self) -> Option<BlockId> {
        let block = (self.oldest != NONE).then_some(BlockId(self.oldest))?;
        self.unlink(block);
        if let Some(hash) = self.take_content(block) {
            self.note(KvEvent::Removed(hash));
        }
        Some(block)
    }

    /// The block is found no more. Returns the hash under which it was.
    fn take_content(&mut self, block: BlockId) -> Option<BlockHash> {
        let Content { hash, .. } = self.contents[block.0 as usize].take()?;
        if let Ok(entry) = self.published.find_entry(short(hash), |other| *other == block) {
            entry.remove();
        }
        Some(hash)
    }

    fn link_as_newest(&mut self, block: BlockId) {
        let before = self.newest;
        let entry = self.block_mut(block);
        entry.older = before;
        entry.newer = NONE;
        match before {
            NONE => self.oldest = block.0,
            before => self.block_mut(BlockId(before)).newer = block.0,
        }
        self.newest = block.0;
        self.cached += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let (older, newer) = (self.block(block).older, self.block(block).newer);
        match older {
            NONE => self.oldest = newer,
            older => self.block_mut(BlockId(older)).newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.block_mut(BlockId(newer)).older = older,
        }
        let entry = self.block_mut(block);
        (entry.older, entry.newer) = (NONE, NONE);
        self.cached -= 1;
    }

    fn block(&self, block: BlockId) -> &Block {
        &self.blocks[block.0 as usize]
    }

    fn content(&self, block: BlockId) -> Option<&Content> {
        self.contents[block.0 as usize].as_ref()
    }

    fn block_mut(&mut self, block: BlockId) -> &mut Block {
        &mut self.blocks[block.0 as usize]
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        &self.tokens[block.0 as usize * self.block_size..][..self.block_size]
    }

    fn tokens_mut(&mut self, block: BlockId) -> &mut [TokenId] {
        &mut self.tokens[block.0 as usize * self.block_size..][..self.block_size]
    }

    /// The conservation law of the pool. `holders` counts for each block how many sequences hold it.
    ///
    /// # Errors
    /// The first breach found, in words.
    pub fn check_integrity(&self, holders: &[u32]) -> Result<(), String> {
        let mut seen = vec![0u32; self.blocks.len()];
        for block in &self.free {
            seen[block.0 as usize] += 1;
            if self.is_published(*block) {
                return Err(format!("{block:?} is free and still published"));
            }
        }
        self.check_lru(&mut seen)?;
        for (index, block) in self.blocks.iter().enumerate() {
            if block.references != holders[index] {
                let (has, held) = (block.references, holders[index]);
                return Err(format!("block {index} has {has} references and {held} sequences hold it"));
            }
            let states = seen[index] + u32::from(block.references > 0);
            if states != 1 {
                return Err(format!("block {index} is in {states} states"));
            }
        }
        self.check_published()
    }

    fn check_lru(&self, seen: &mut [u32]) -> Result<(), String> {
        let (mut at, mut before, mut count) = (self.oldest, NONE, 0);
        while at != NONE && count <= self.cached {
            let block = self.block(BlockId(at));
            if block.older != before || !self.is_published(BlockId(at)) {
                return Err(format!("block {at} is badly linked in the LRU or unpublished"));
            }
            seen[at as usize] += 1;
            (before, at) = (at, block.newer);
            count += 1;
        }
        if count != self.cached || before != self.newest {
            return Err(format!("the LRU has {count} blocks and counts {}", self.cached));
        }
        Ok(())
    }

    fn check_published(&self) -> Result<(), String> {
        let mut count = 0;
        for (index, content) in self.contents.iter().enumerate() {
            let Some(content) = content else { continue };
            count += 1;
            if self.find(content.hash) != Some(BlockId(index as u32)) {
                return Err(format!("block {index} cannot be found under its hash"));
            }
        }
        match self.published.len() {
            len if len == count => Ok(()),
            len => Err(format!("{len} hashes are published and {count} blocks have content")),
        }
    }
}

/// What the table of published blocks goes by: hashes are spread already.
fn short(hash: BlockHash) -> u64 {
    hash.0 as u64
}
