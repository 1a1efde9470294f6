//! What the prefix cache gains and loses, told to whoever listens: [`log`] keeps the last batches, [`zmq`] publishes
//! them as vLLM does, and the route `GET /kv/events` sends them over HTTP.
//!
//! Invariant: the engine's thread never waits for a listener. It writes into a ring, and a reader that the ring has
//! overtaken is cut off. Without a listener nothing is recorded.

pub mod log;
pub mod zmq;

use servelab_engine::{KvEvent, StoredBlock};
use servelab_wire::kv_events as wire;

/// The engine's events as they travel; blocks that follow each other in a chain become one event. `medium` is said
/// only where a reader wants to hear it.
pub fn to_wire<'a>(
    events: impl IntoIterator<Item = &'a KvEvent>,
    block_size: u32,
    medium: Option<&str>,
) -> Vec<wire::KvEvent> {
    let mut out: Vec<wire::KvEvent> = Vec::new();
    for event in events {
        match (event, out.last_mut()) {
            (KvEvent::Stored(block), Some(wire::KvEvent::BlockStored(run))) if continues(run, block) => {
                run.block_hashes.push(block.hash.0.into());
                run.token_ids.extend_from_slice(&block.tokens);
            }
            (KvEvent::Stored(block), _) => out.push(wire::KvEvent::BlockStored(wire::BlockStored {
                block_hashes: vec![block.hash.0.into()],
                parent_block_hash: block.parent.map(|parent| parent.0.into()),
                token_ids: block.tokens.to_vec(),
                block_size,
                salt_hash: (block.salt != 0).then_some(block.salt),
                medium: medium.map(str::to_owned),
                ..wire::BlockStored::default()
            })),
            (KvEvent::Removed(hash), Some(wire::KvEvent::BlockRemoved(run))) => {
                run.block_hashes.push(hash.0.into());
            }
            (KvEvent::Removed(hash), _) => out.push(wire::KvEvent::BlockRemoved(wire::BlockRemoved {
                block_hashes: vec![hash.0.into()],
                medium: medium.map(str::to_owned),
                ..wire::BlockRemoved::default()
            })),
            (KvEvent::Cleared, _) => out.push(wire::KvEvent::AllBlocksCleared),
        }
    }
    out
}

fn continues(run: &wire::BlockStored, block: &StoredBlock) -> bool {
    let parent = block.parent.map(|parent| parent.0.into());
    parent.is_some() && run.block_hashes.last() == parent.as_ref() && run.salt_hash.unwrap_or(0) == block.salt
}

#[cfg(test)]
mod tests {
    use servelab_engine::BlockHash;

    use super::*;

    fn stored(hash: u128, parent: Option<u128>, salt: u64) -> KvEvent {
        let parent = parent.map(BlockHash);
        KvEvent::Stored(StoredBlock { hash: BlockHash(hash), parent, salt, tokens: [hash as u32, 0].into() })
    }

    #[test]
    fn only_blocks_that_follow_each_other_are_put_together() {
        let events = [
            stored(1, None, 0),
            stored(2, Some(1), 0),
            stored(3, None, 0),
            stored(4, Some(3), 9),
            KvEvent::Removed(BlockHash(1)),
            KvEvent::Removed(BlockHash(2)),
            KvEvent::Cleared,
        ];
        let out = to_wire(&events, 2, Some("GPU"));
        let lens: Vec<_> = out
            .iter()
            .map(|event| match event {
                wire::KvEvent::BlockStored(run) => run.block_hashes.len(),
                wire::KvEvent::BlockRemoved(run) => run.block_hashes.len(),
                wire::KvEvent::AllBlocksCleared => 0,
            })
            .collect();
        assert_eq!(lens, [2, 1, 1, 2, 0]);
        let wire::KvEvent::BlockStored(first) = &out[0] else { panic!("{out:?}") };
        assert_eq!((first.token_ids.as_slice(), first.salt_hash), ([1, 0, 2, 0].as_slice(), None));
    }
}
