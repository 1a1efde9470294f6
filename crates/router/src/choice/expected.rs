//! Blocks that a replica is about to compute, where the replica itself tells what it holds.
//!
//! Between sending a request and hearing of its blocks lie its wait and its prefill. Requests with the same beginning
//! that come meanwhile would see no replica that holds it and scatter. So the blocks count as held from the dispatch
//! on, until the replica confirms them, removes them, or has not spoken of them for [`PATIENCE`]: the request failed.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use servelab_engine::BlockHash;

use super::replica_set::ReplicaId;

/// How long a block is expected.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Most blocks that are expected at once, of all replicas; beyond it the oldest are given up.
const MOST: usize = 1 << 17;

/// The blocks, in the order in which they are given up.
#[derive(Debug, Default)]
pub struct Expected {
    due: VecDeque<(Duration, ReplicaId, BlockHash)>,
    open: BTreeSet<(ReplicaId, BlockHash)>,
}

impl Expected {
    /// The replica has been sent a prompt with this block. Gives one back that is given up for it, if there are too many.
    pub fn add(
        &mut self,
        now: Duration,
        replica: ReplicaId,
        block: BlockHash,
    ) -> Option<(ReplicaId, BlockHash)> {
        self.open.insert((replica, block));
        self.due.push_back((now + PATIENCE, replica, block));
        if self.due.len() <= MOST {
            return None;
        }
        self.next()
    }

    /// The replica has said what became of the block.
    pub fn settled(&mut self, replica: ReplicaId, block: BlockHash) {
        self.open.remove(&(replica, block));
    }

    /// Nothing is expected of the replica any more.
    pub fn clear(&mut self, replica: ReplicaId) {
        self.open.retain(|(of, _)| *of != replica);
        self.due.retain(|(_, of, _)| *of != replica);
    }

    /// The next block whose time is over, once.
    pub fn overdue(&mut self, now: Duration) -> Option<(ReplicaId, BlockHash)> {
        while self.due.front().is_some_and(|(due, ..)| *due <= now) {
            if let Some(block) = self.next() {
                return Some(block);
            }
        }
        None
    }

    fn next(&mut self) -> Option<(ReplicaId, BlockHash)> {
        let (_, replica, block) = self.due.pop_front()?;
        self.open.remove(&(replica, block)).then_some((replica, block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_confirmed_is_given_up_once_and_there_is_a_bound() {
        let mut expected = Expected::default();
        let (one, other) = (ReplicaId(1), ReplicaId(2));
        for block in 0..4 {
            expected.add(Duration::ZERO, one, BlockHash(block));
        }
        expected.add(Duration::ZERO, other, BlockHash(1));
        expected.settled(one, BlockHash(1));
        expected.clear(other);
        assert_eq!(expected.overdue(PATIENCE / 2), None);
        let overdue: Vec<_> = std::iter::from_fn(|| expected.overdue(PATIENCE)).collect();
        assert_eq!(overdue, [0, 2, 3].map(|block| (one, BlockHash(block))));
        let given_up = (0..MOST as u128 + 1).find_map(|block| expected.add(PATIENCE, one, BlockHash(block)));
        assert_eq!(given_up, Some((one, BlockHash(0))));
        assert_eq!((expected.due.len(), expected.open.len()), (MOST, MOST));
    }
}
