//! The name of a block's content: a 128-bit hash over everything that its keys and values depend on,
//! which is every token from the start of the prompt, and a salt.
//!
//! The hash is stable across processes and versions, because the router computes it too: it is
//! xxh3-128 (seed 0) over `parent (16 bytes) | salt (8 bytes) | token ids (4 bytes each)`, all little
//! endian; the parent of a first block is 16 zero bytes.

use xxhash_rust::xxh3::xxh3_128;

use crate::request::TokenId;

/// The chained hash of a full block. Equal hashes are a strong hint, not a proof: the pool compares
/// the tokens as well before it reuses a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u128);

const HEADER_BYTES: usize = 16 + 8;
/// Blocks up to this many tokens are hashed from the stack.
const STACK_TOKENS: usize = 64;

/// Hashes one full block. `parent` is the hash of the block before it, `None` for the first one.
pub fn block_hash(parent: Option<BlockHash>, tokens: &[TokenId], salt: u64) -> BlockHash {
    let len = HEADER_BYTES + 4 * tokens.len();
    if tokens.len() <= STACK_TOKENS {
        let mut bytes = [0; HEADER_BYTES + 4 * STACK_TOKENS];
        hash_from(&mut bytes[..len], parent, tokens, salt)
    } else {
        hash_from(&mut vec![0; len], parent, tokens, salt)
    }
}

fn hash_from(bytes: &mut [u8], parent: Option<BlockHash>, tokens: &[TokenId], salt: u64) -> BlockHash {
    bytes[..16].copy_from_slice(&parent.map_or(0, |parent| parent.0).to_le_bytes());
    bytes[16..HEADER_BYTES].copy_from_slice(&salt.to_le_bytes());
    for (to, token) in bytes[HEADER_BYTES..].chunks_exact_mut(4).zip(tokens) {
        to.copy_from_slice(&token.to_le_bytes());
    }
    BlockHash(xxh3_128(bytes))
}

/// The hashes of a growing sequence's full blocks, each computed once and only when asked for.
#[derive(Clone, Debug)]
pub struct HashChain {
    block_size: usize,
    salt: u64,
    hashes: Vec<BlockHash>,
}

impl HashChain {
    /// An empty chain; `block_size` tokens a block, at least one.
    pub fn new(block_size: usize, salt: u64) -> Self {
        Self { block_size, salt, hashes: Vec::new() }
    }

    pub fn salt(&self) -> u64 {
        self.salt
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The hash of block `index` of `tokens`, which may have grown since the last call but must not
    /// have changed otherwise. `None` if that block is not full.
    pub fn get(&mut self, index: usize, tokens: &[TokenId]) -> Option<BlockHash> {
        while self.hashes.len() <= index {
            let start = self.hashes.len() * self.block_size;
            let block = tokens.get(start..start + self.block_size)?;
            let hash = block_hash(self.hashes.last().copied(), block, self.salt);
            #[cfg(test)]
            let hash = weakened::apply(hash);
            self.hashes.push(hash);
        }
        Some(self.hashes[index])
    }
}

/// Hashes of all full blocks of `tokens`, as the router needs them to guess which replica holds a
/// prompt's prefix. A trailing partial block has no hash.
pub fn hash_blocks(tokens: &[TokenId], block_size: usize, salt: u64) -> Vec<BlockHash> {
    let mut hashes: Vec<BlockHash> = Vec::with_capacity(tokens.len() / block_size);
    for block in tokens.chunks_exact(block_size) {
        hashes.push(block_hash(hashes.last().copied(), block, salt));
    }
    hashes
}

/// Hashes cut to a few bits, so that tests meet collisions that 128 bits never show.
#[cfg(test)]
pub(crate) mod weakened {
    use super::BlockHash;
    use std::cell::Cell;

    thread_local!(static MASK: Cell<u128> = const { Cell::new(u128::MAX) });

    pub(super) fn apply(hash: BlockHash) -> BlockHash {
        BlockHash(hash.0 & MASK.get())
    }

    /// Runs `body` with hashes of `bits` bits in this thread.
    pub(crate) fn to_bits<T>(bits: u32, body: impl FnOnce() -> T) -> T {
        struct Restore;
        impl Drop for Restore {
            fn drop(&mut self) {
                MASK.set(u128::MAX);
            }
        }
        let _restore = Restore;
        MASK.set((1 << bits) - 1);
        body()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_stay_what_other_processes_expect() {
        let first = block_hash(None, &[1, 2, 3, 4], 0);
        let second = block_hash(Some(first), &[5, 6, 7, 8], 0);
        let salted = block_hash(None, &[1, 2, 3, 4], 7);
        // Computed with Python's xxhash from the layout above.
        assert_eq!(first.0, 0x3d7892a1b9d7c0762ddd73145d1011d6);
        assert_eq!(second.0, 0x59166fed9f2f6b97de88a2c9c4554f38);
        assert_eq!(salted.0, 0xb59ddef2358970939821df1738ca513d);
    }

    #[test]
    fn the_layout_is_parent_salt_tokens_in_little_endian() {
        let mut bytes = 0x1234u128.to_le_bytes().to_vec();
        bytes.extend(9u64.to_le_bytes());
        bytes.extend((0..100u32).flat_map(u32::to_le_bytes));
        let tokens: Vec<TokenId> = (0..100).collect();
        assert_eq!(block_hash(Some(BlockHash(0x1234)), &tokens, 9).0, xxh3_128(&bytes));
    }

    #[test]
    fn a_chain_equals_hashing_all_blocks_at_once() {
        let tokens: Vec<TokenId> = (0..19).collect();
        let mut chain = HashChain::new(4, 3);
        assert_eq!(chain.get(4, &tokens), None);
        let all: Vec<_> = (0..4).map(|i| chain.get(i, &tokens).unwrap()).collect();
        assert_eq!(all, hash_blocks(&tokens, 4, 3));
    }

    #[test]
    fn every_input_changes_the_hash() {
        let base = block_hash(None, &[1, 2], 0);
        let others = [
            block_hash(None, &[2, 1], 0),
            block_hash(None, &[1, 2], 1),
            block_hash(Some(base), &[1, 2], 0),
            block_hash(None, &[1, 2, 0], 0),
        ];
        assert!(others.iter().all(|other| *other != base));
    }
}
