//! `GET /kv/events`: the events over HTTP, as server-sent events with one [`KvMessage`] each.
//!
//! A reader that comes for the first time gets a snapshot. One that was there before asks for `?from=NEXT&stream=ID`
//! and gets what it missed, if the replica still has it, and else a snapshot too. Then batches follow as they happen,
//! without a gap in their numbers, and heartbeats while nothing happens. A reader that is too slow is told so and cut
//! off.

use serde::{Deserialize, Serialize};

use super::KvEvent;

/// One event of the stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum KvMessage {
    /// Everything in the cache before the batch `next`, in one piece or several: `more` says that another follows.
    Snapshot {
        /// Names this run of the replica: numbers of another one mean nothing here.
        stream: String,
        next: u64,
        more: bool,
        events: Vec<KvEvent>,
    },
    /// What was missed follows, beginning with the batch `next`.
    Resumed { stream: String, next: u64 },
    /// One step of the engine.
    Batch { seq: u64, events: Vec<KvEvent> },
    /// Everything before the batch `next` has been sent.
    Heartbeat { next: u64 },
    /// The reader was too slow: what it wants next is no longer kept. The stream ends.
    Gap { oldest: u64 },
}
