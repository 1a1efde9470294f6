//! From the events of one replica to the index.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use servelab_wire::kv_events::KvEvent;

use super::mirror::{BadEvent, Change, Mirror};
use super::{StreamState, StreamStats};
use crate::choice::fleet::Knowledge;
use crate::replicas::registry::{Registry, Replica};

/// Most blocks that are known of one replica.
const MOST_BLOCKS: usize = 1 << 19;
/// Blocks that are taken over at once: the list of replicas is locked meanwhile.
const AT_ONCE: usize = 1024;

/// What one replica holds, and where it is noted.
pub struct Feed {
    registry: Arc<Registry>,
    pub replica: Arc<Replica>,
    mirror: Mirror,
    /// Kept between events.
    changes: Vec<Change>,
    /// The stream and the number to go on with, once there was one.
    pub position: Option<(String, u64)>,
    /// Had a beginning before: the next one is a resync.
    began: bool,
}

impl Feed {
    pub fn new(registry: Arc<Registry>, replica: Arc<Replica>) -> Self {
        let mirror = Mirror::new(registry.block_size() as usize, MOST_BLOCKS);
        Self { registry, replica, mirror, changes: Vec::new(), position: None, began: false }
    }

    pub fn stats(&self) -> &StreamStats {
        &self.replica.kv
    }

    /// Begins anew, with nothing: what was noted of the replica so far goes when [`Feed::publish`] says what it holds.
    pub fn reset(&mut self) {
        self.mirror.clear();
    }

    /// Takes events in that are not to be seen yet.
    ///
    /// # Errors
    /// If one contradicts itself.
    pub fn gather(&mut self, events: &[KvEvent]) -> Result<(), BadEvent> {
        events.iter().try_for_each(|event| self.mirror.apply(event, &mut self.changes))?;
        self.changes.clear();
        Ok(())
    }

    /// What was gathered is what the index has of the replica from now on.
    pub fn publish(&mut self, knowledge: Knowledge) {
        self.registry.apply_kv(&self.replica, &[Change::Cleared]);
        let stored: Vec<_> = self.mirror.blocks().map(Change::Stored).collect();
        stored.chunks(AT_ONCE).for_each(|changes| self.registry.apply_kv(&self.replica, changes));
        self.knows(knowledge);
        if std::mem::replace(&mut self.began, true) {
            self.stats().resyncs.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Says how much is known, without a change of what.
    pub fn knows(&mut self, knowledge: Knowledge) {
        self.registry.set_knowledge(&self.replica, knowledge);
        self.stats().set(match knowledge {
            Knowledge::Guessed => StreamState::Connecting,
            Knowledge::Partial => StreamState::Partial,
            Knowledge::Precise => StreamState::Precise,
        });
    }

    /// A batch of events, to be seen at once.
    ///
    /// # Errors
    /// If one contradicts itself.
    pub fn apply(&mut self, events: &[KvEvent]) -> Result<(), BadEvent> {
        let read = events.iter().try_for_each(|event| self.mirror.apply(event, &mut self.changes));
        self.changes.chunks(AT_ONCE).for_each(|changes| self.registry.apply_kv(&self.replica, changes));
        self.changes.clear();
        self.stats().batches.fetch_add(1, Ordering::Relaxed);
        read
    }

    /// The stream is gone. What it said last stands, and what is sent there is noted on top of it.
    pub fn lost(&mut self) {
        self.knows(Knowledge::Guessed);
    }
}
