//! What the prefix cache gains and loses, for whoever wants to know elsewhere what it holds.

use crate::block_hash::BlockHash;
use crate::request::TokenId;

/// One change. Applied in order to what was there before, the changes give what is there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    Stored(StoredBlock),
    /// The block with this hash can be found no more.
    Removed(BlockHash),
    /// Nothing can be found any more.
    Cleared,
}

/// A block that can be found in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlock {
    pub hash: BlockHash,
    /// The hash of the block before it, which need not be in the cache any more; `None` for the first of a prompt.
    pub parent: Option<BlockHash>,
    /// Of the hash chain; 0 where the request named none.
    pub salt: u64,
    /// As many as a block has slots.
    pub tokens: Box<[TokenId]>,
}
