//! `Idempotency-Key`: a request that is repeated within the window gets the first one's answer, also while that still
//! runs. For whole answers only: a stream cannot be given twice.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::sync::watch;

/// Longest key.
pub const MAX_KEY_BYTES: usize = 255;
/// Keys that are known at once, and bytes of the answers that are kept.
const MAX_KEYS: usize = 10_000;
const MAX_BYTES: usize = 256 << 20;
/// Requests that wait for the same answer.
const MAX_WAITING: usize = 100;

/// An answer that can be given again.
#[derive(Clone, Debug)]
pub struct Stored {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Stored {
    fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        self.body.len() + headers
    }
}

/// The key of one client: those of two clients are not the same.
pub type Key = (usize, String);

#[derive(Debug)]
struct Entry {
    fingerprint: u128,
    state: State,
    /// To tell an entry from a later one of the same key.
    number: u64,
}

#[derive(Debug)]
enum State {
    Running(watch::Sender<Option<Arc<Stored>>>),
    Done(Arc<Stored>),
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// Answers in the order in which they are forgotten.
    done: VecDeque<(Duration, Key, u64)>,
    bytes: usize,
    numbers: u64,
}

/// The answers of the last while.
#[derive(Debug)]
pub struct Answers {
    window: Duration,
    inner: Mutex<Inner>,
}

/// What a request with a key is to do.
#[derive(Debug)]
pub enum Claim {
    /// It is the first: run it, and tell the answer.
    First(First),
    Same(Arc<Stored>),
    /// The first one still runs. When the channel closes without an answer, claim again.
    Wait(watch::Receiver<Option<Arc<Stored>>>),
    OtherBody,
    TooManyWait,
    /// As many keys are known as can be; the request runs without the promise.
    NoRoom,
}

impl Answers {
    pub fn new(window: Duration) -> Self {
        Self { window, inner: Mutex::default() }
    }

    /// `now` is the caller's clock.
    pub fn claim(self: &Arc<Self>, key: Key, fingerprint: u128, now: Duration) -> Claim {
        let mut inner = self.inner();
        inner.forget(now);
        match inner.entries.get(&key) {
            Some(entry) if entry.fingerprint != fingerprint => return Claim::OtherBody,
            Some(Entry { state: State::Done(stored), .. }) => return Claim::Same(stored.clone()),
            Some(Entry { state: State::Running(running), .. }) => {
                let many = running.receiver_count() >= MAX_WAITING;
                return if many { Claim::TooManyWait } else { Claim::Wait(running.subscribe()) };
            }
            None => {}
        }
        if inner.entries.len() >= MAX_KEYS {
            return Claim::NoRoom;
        }
        let tell = watch::Sender::new(None);
        inner.numbers += 1;
        let number = inner.numbers;
        inner.entries.insert(key.clone(), Entry { fingerprint, state: State::Running(tell), number });
        Claim::First(First { answers: self.clone(), key, number, told: false })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn forget(&mut self, now: Duration) {
        while self.bytes > MAX_BYTES || self.done.front().is_some_and(|(end, ..)| *end <= now) {
            let Some((_, key, number)) = self.done.pop_front() else { return };
            if self.entries.get(&key).is_some_and(|entry| entry.number == number)
                && let Some(Entry { state: State::Done(stored), .. }) = self.entries.remove(&key)
            {
                self.bytes -= stored.bytes();
            }
        }
    }
}

/// The one request of a key that runs. Dropped without an answer, the next one with the key runs.
#[derive(Debug)]
pub struct First {
    answers: Arc<Answers>,
    key: Key,
    number: u64,
    told: bool,
}

impl First {
    /// The answer, for all who wait and those who come within the window.
    pub fn answered(mut self, stored: Stored, now: Duration) {
        self.told = true;
        let stored = Arc::new(stored);
        let mut inner = self.answers.inner();
        inner.bytes += stored.bytes();
        if let Some(entry) = inner.entries.get_mut(&self.key)
            && let State::Running(tell) = std::mem::replace(&mut entry.state, State::Done(stored.clone()))
        {
            // Those who left need not hear it.
            let _ = tell.send(Some(stored));
        }
        inner.done.push_back((now + self.answers.window, self.key.clone(), self.number));
        inner.forget(now);
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if !self.told {
            self.answers.inner().entries.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(10);
    const WINDOW: Duration = Duration::from_secs(60);

    fn key(name: &str) -> Key {
        (0, name.to_owned())
    }

    fn stored(bytes: usize) -> Stored {
        Stored { status: StatusCode::OK, headers: HeaderMap::new(), body: Bytes::from(vec![b'x'; bytes]) }
    }

    fn first(answers: &Arc<Answers>, name: &str) -> First {
        match answers.claim(key(name), 1, NOW) {
            Claim::First(first) => first,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_first_answer_is_everybodys_until_the_window_closes() {
        let answers = Arc::new(Answers::new(WINDOW));
        let running = first(&answers, "a");
        let Claim::Wait(mut waiting) = answers.claim(key("a"), 1, NOW) else { panic!("it runs") };
        assert!(matches!(answers.claim(key("a"), 2, NOW), Claim::OtherBody));
        assert!(matches!(answers.claim((1, "a".into()), 2, NOW), Claim::First(_)), "another client");
        running.answered(stored(5), NOW);
        waiting.changed().await.unwrap();
        assert_eq!(waiting.borrow().as_ref().unwrap().body.len(), 5);
        assert!(matches!(answers.claim(key("a"), 1, NOW + WINDOW / 2), Claim::Same(_)));
        assert!(matches!(answers.claim(key("a"), 1, NOW + WINDOW), Claim::First(_)));
    }

    #[tokio::test]
    async fn when_the_first_gives_up_the_next_one_runs() {
        let answers = Arc::new(Answers::new(WINDOW));
        let running = first(&answers, "a");
        let Claim::Wait(mut waiting) = answers.claim(key("a"), 1, NOW) else { panic!("it runs") };
        drop(running);
        assert!(waiting.changed().await.is_err());
        drop(first(&answers, "a"));
        assert!(answers.inner().entries.is_empty());
    }

    #[test]
    fn keys_and_bytes_are_bounded() {
        let answers = Arc::new(Answers::new(WINDOW));
        for number in 0..300 {
            first(&answers, &number.to_string()).answered(stored(1 << 20), NOW);
        }
        assert!(answers.inner().bytes <= MAX_BYTES && answers.inner().entries.len() == 256);
        let running: Vec<First> =
            (300..300 + MAX_KEYS - 256).map(|at| first(&answers, &at.to_string())).collect();
        assert!(matches!(answers.claim(key("more"), 1, NOW), Claim::NoRoom));
        drop(running);
        assert_eq!(answers.inner().entries.len(), 256);
    }

    #[test]
    fn not_everybody_may_wait() {
        let answers = Arc::new(Answers::new(WINDOW));
        let _running = first(&answers, "a");
        let claims: Vec<Claim> = (0..=MAX_WAITING).map(|_| answers.claim(key("a"), 1, NOW)).collect();
        let waiting = claims.iter().filter(|claim| matches!(claim, Claim::Wait(_))).count();
        assert_eq!(waiting, MAX_WAITING);
        drop(claims);
        assert!(matches!(answers.claim(key("a"), 1, NOW), Claim::Wait(_)));
    }
}
