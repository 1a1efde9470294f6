//! The last batches of KV events, in a ring that the engine's thread writes and every reader reads at its own pace.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use servelab_engine::{KvEvent, StoredBlock};
use tokio::sync::watch;

/// Most batches and most tokens in stored blocks that are kept for readers who are behind.
const KEPT_BATCHES: usize = 4096;
const KEPT_TOKENS: usize = 1 << 22;
/// So many batches that nobody read end the recording.
const UNHEARD_BATCHES: usize = 1024;

/// What one step of the engine changed.
#[derive(Debug)]
pub struct Batch {
    pub seq: u64,
    /// Seconds since the Unix epoch.
    pub unix_seconds: f64,
    pub events: Vec<KvEvent>,
    tokens: usize,
}

/// All blocks before the batch `next`, each behind its parent.
#[derive(Debug)]
pub struct Snapshot {
    pub next: u64,
    pub blocks: Vec<StoredBlock>,
}

/// How far the ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    next: u64,
    closed: bool,
}

/// The ring of one engine.
#[derive(Debug)]
pub struct KvLog {
    /// Names this run of the replica.
    id: String,
    ring: Mutex<Ring>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct Ring {
    /// False: nobody listens, and numbers of before mean nothing.
    records: bool,
    next: u64,
    batches: VecDeque<Arc<Batch>>,
    tokens: usize,
    /// The last one taken, while the ring still leads on from it.
    snapshot: Option<Arc<Snapshot>>,
    readers: usize,
    /// Batches since the last reader left.
    unheard: usize,
}

/// Where a reader begins.
pub enum Start {
    /// What it missed is still there.
    Resumed(Reader),
    /// With a snapshot of not long ago.
    Snapshot(Reader, Arc<Snapshot>),
    /// The engine has to be asked: see [`KvLog::snapshot_taken`].
    Ask(Waiting),
}

/// Why a reader gets nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was too slow; `oldest` is the first number that is still kept.
    Overtaken { oldest: u64 },
    /// The engine is gone.
    Closed,
}

impl KvLog {
    /// `records`: from the first step on, as for a publisher that is there from the start.
    pub fn new(records: bool) -> Self {
        let ring = Ring {
            records,
            next: 0,
            batches: VecDeque::new(),
            tokens: 0,
            snapshot: None,
            readers: 0,
            unheard: 0,
        };
        Self {
            id: uuid::Uuid::new_v4().simple().to_string(),
            ring: Mutex::new(ring),
            progress: watch::Sender::new(Progress { next: 0, closed: false }),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The engine's thread has a batch. True if recording should go on.
    pub fn push(&self, events: Vec<KvEvent>, unix_seconds: f64) -> bool {
        let mut ring = self.lock();
        if events.is_empty() {
            return true;
        }
        ring.push(events, unix_seconds);
        let goes_on = ring.readers > 0 || ring.unheard < UNHEARD_BATCHES;
        if !goes_on {
            ring.stop();
        }
        let next = ring.next;
        drop(ring);
        self.progress.send_modify(|progress| progress.next = next);
        goes_on
    }

    /// The engine's thread has been asked for all that is there, and records from now on.
    pub fn snapshot_taken(&self, blocks: Vec<StoredBlock>) -> Arc<Snapshot> {
        let mut ring = self.lock();
        ring.records = true;
        let snapshot = Arc::new(Snapshot { next: ring.next, blocks });
        ring.snapshot = Some(snapshot.clone());
        snapshot
    }

    /// Nothing more will come.
    pub fn close(&self) {
        self.progress.send_modify(|progress| progress.closed = true);
    }

    /// A reader that wants to go on with the batch `from` of the run `stream`, or has seen nothing yet.
    pub fn attach(self: &Arc<Self>, from: Option<(&str, u64)>) -> Start {
        let mut ring = self.lock();
        ring.readers += 1;
        ring.unheard = 0;
        let waiting = Waiting(Guard(self.clone()));
        if let Some((stream, next)) = from
            && stream == self.id
            && ring.records
            && (ring.oldest()..=ring.next).contains(&next)
        {
            return Start::Resumed(waiting.reader(next));
        }
        match ring.snapshot.clone() {
            Some(snapshot) if snapshot.next >= ring.oldest() => {
                Start::Snapshot(waiting.reader(snapshot.next), snapshot)
            }
            _ => Start::Ask(waiting),
        }
    }

    /// The kept batches from the number on, for a replay.
    pub fn since(&self, from: u64) -> Vec<Arc<Batch>> {
        self.lock().batches.iter().filter(|batch| batch.seq >= from).cloned().collect()
    }

    fn get(&self, seq: u64) -> Result<Option<Arc<Batch>>, u64> {
        let ring = self.lock();
        let oldest = ring.oldest();
        match seq.checked_sub(oldest) {
            None => Err(oldest),
            Some(at) => Ok(ring.batches.get(at as usize).cloned()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn oldest(&self) -> u64 {
        self.next - self.batches.len() as u64
    }

    fn push(&mut self, events: Vec<KvEvent>, unix_seconds: f64) {
        let tokens = events
            .iter()
            .map(|event| match event {
                KvEvent::Stored(block) => block.tokens.len(),
                KvEvent::Removed(_) | KvEvent::Cleared => 1,
            })
            .sum();
        self.batches.push_back(Arc::new(Batch { seq: self.next, unix_seconds, events, tokens }));
        self.next += 1;
        self.tokens += tokens;
        if self.readers == 0 {
            self.unheard += 1;
        }
        while self.batches.len() > KEPT_BATCHES || (self.tokens > KEPT_TOKENS && self.batches.len() > 1) {
            self.tokens -= self.batches.pop_front().map_or(0, |batch| batch.tokens);
        }
        let oldest = self.oldest();
        self.snapshot.take_if(|snapshot| snapshot.next < oldest);
    }

    /// Skips a number, so that nobody who heard the last batch takes the next one as the one after it.
    fn stop(&mut self) {
        self.records = false;
        self.batches.clear();
        (self.tokens, self.unheard, self.snapshot) = (0, 0, None);
        self.next += 1;
    }
}

/// Counts a reader.
pub struct Guard(Arc<KvLog>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.lock().readers -= 1;
    }
}

/// A reader that has no place yet.
pub struct Waiting(Guard);

impl Waiting {
    /// Begins behind a snapshot.
    pub fn reader(self, next: u64) -> Reader {
        Reader { guard: self.0, next }
    }
}

/// Reads the ring, one batch after the other.
pub struct Reader {
    guard: Guard,
    next: u64,
}

impl Reader {
    /// The number of the batch that comes next.
    pub fn next_seq(&self) -> u64 {
        self.next
    }

    /// Gives up what it was overtaken by.
    pub fn skip_to(&mut self, seq: u64) {
        self.next = self.next.max(seq);
    }

    /// Waits for the next batch. Cancelled, it has lost nothing.
    ///
    /// # Errors
    /// If the reader has been overtaken, or nothing more will come.
    pub async fn next(&mut self) -> Result<Arc<Batch>, Ended> {
        let log = &self.guard.0;
        let mut progress = log.progress.subscribe();
        loop {
            let closed = progress.borrow_and_update().closed;
            match log.get(self.next) {
                Ok(Some(batch)) => {
                    self.next += 1;
                    return Ok(batch);
                }
                Ok(None) if closed => return Err(Ended::Closed),
                Ok(None) => {
                    if progress.changed().await.is_err() {
                        return Err(Ended::Closed);
                    }
                }
                Err(oldest) => return Err(Ended::Overtaken { oldest }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use servelab_engine::BlockHash;

    use super::*;

    fn push(log: &KvLog, times: usize) -> bool {
        (0..times).all(|_| log.push(vec![KvEvent::Removed(BlockHash(1))], 0.0))
    }

    fn asked(log: &Arc<KvLog>) -> Reader {
        let Start::Ask(waiting) = log.attach(None) else { panic!("there is nothing to begin with") };
        let next = log.snapshot_taken(Vec::new()).next;
        waiting.reader(next)
    }

    #[tokio::test]
    async fn a_reader_gets_every_batch_once_and_one_that_comes_back_what_it_missed() {
        let log = Arc::new(KvLog::new(false));
        let mut reader = asked(&log);
        push(&log, 3);
        for seq in 0..2 {
            assert_eq!(reader.next().await.unwrap().seq, seq);
        }
        drop(reader);
        let id = log.id().to_owned();
        let Start::Resumed(mut reader) = log.attach(Some((&id, 2))) else { panic!("it is still there") };
        assert_eq!(reader.next().await.unwrap().seq, 2);
        assert!(matches!(log.attach(Some(("another run", 2))), Start::Snapshot(..)));
        assert!(matches!(log.attach(Some((&id, 4))), Start::Snapshot(..)), "there was no such number yet");
        log.close();
        assert_eq!(reader.next().await.unwrap_err(), Ended::Closed);
    }

    #[tokio::test]
    async fn a_reader_that_is_too_slow_is_cut_off_and_the_ring_stays_bounded() {
        let log = Arc::new(KvLog::new(false));
        let mut slow = asked(&log);
        push(&log, KEPT_BATCHES + 5);
        assert_eq!(slow.next().await.unwrap_err(), Ended::Overtaken { oldest: 5 });
        assert_eq!(log.lock().batches.len(), KEPT_BATCHES);
        assert!(matches!(log.attach(None), Start::Ask(_)), "the ring no longer leads on from the snapshot");
        let stored =
            StoredBlock { hash: BlockHash(2), parent: None, salt: 0, tokens: vec![0; KEPT_TOKENS].into() };
        log.push(vec![KvEvent::Stored(stored)], 0.0);
        assert_eq!(log.lock().batches.len(), 1);
    }

    #[test]
    fn without_readers_the_recording_ends_and_no_old_number_is_good() {
        let log = Arc::new(KvLog::new(false));
        let reader = asked(&log);
        assert!(push(&log, 2 * UNHEARD_BATCHES), "somebody is there");
        let next = reader.next_seq() + 2 * UNHEARD_BATCHES as u64;
        drop(reader);
        assert!(!push(&log, UNHEARD_BATCHES));
        let id = log.id().to_owned();
        let last = log.lock().next;
        for from in [next, last - 1, last] {
            assert!(matches!(log.attach(Some((&id, from))), Start::Ask(_)), "{from}");
        }
        assert_eq!(log.lock().readers, 0);
    }
}
