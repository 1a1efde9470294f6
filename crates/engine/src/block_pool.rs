//! Fixed-size blocks of KV memory: reference counts, and an LRU of freed blocks whose content is
//! still good.

/// A block of KV memory, `block_size` token slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
