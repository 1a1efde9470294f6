//! Who goes next when there is more to do than the replicas should have at once: fair between keys, by tokens.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng 1996): a request starts, in virtual time, when its key's last one has
//! ended there, and lasts as many units as it has tokens; the earliest start goes first. So a key that sends one prompt
//! of 100,000 tokens waits behind a thousand small ones of others, and a key that sends little never waits behind one
//! that sends much.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The order of requests that wait. Plain data.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// By start in virtual time, then by arrival.
    waiting: BTreeMap<(u64, u64), T>,
    /// Where the last request of a key that has some waiting ends, in virtual time.
    ends: HashMap<usize, u64>,
    /// The start of the request that went last.
    now: u64,
    arrivals: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), ends: HashMap::new(), now: 0, arrivals: 0 }
    }
}

/// A request's place.
pub type Place = (u64, u64);

impl<T> FairQueue<T> {
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn push(&mut self, key: usize, tokens: u64, item: T) -> Place {
        let start = self.ends.get(&key).map_or(self.now, |end| self.now.max(*end));
        self.ends.insert(key, start.saturating_add(tokens.max(1)));
        self.arrivals += 1;
        let place = (start, self.arrivals);
        self.waiting.insert(place, item);
        place
    }

    pub fn pop(&mut self) -> Option<T> {
        let ((start, _), item) = self.waiting.pop_first()?;
        self.now = start;
        // Keys whose last request has ended in virtual time are as good as new, and so are all when nobody waits.
        let nobody_waits = self.waiting.is_empty();
        self.ends.retain(|_, end| *end > start && !nobody_waits);
        Some(item)
    }

    /// The request left. False if it has gone already.
    pub fn remove(&mut self, place: Place) -> bool {
        self.waiting.remove(&place).is_some()
    }
}

/// Lets in as many requests as there are slots.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    max_waiting: usize,
}

#[derive(Debug)]
struct Inner {
    inside: usize,
    slots: usize,
    queue: FairQueue<oneshot::Sender<()>>,
}

/// As many wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Gate {
    pub fn new(slots: usize, max_waiting: usize) -> Self {
        Self { inner: Mutex::new(Inner { inside: 0, slots, queue: FairQueue::default() }), max_waiting }
    }

    /// How many may be inside from now on. Nobody is thrown out.
    pub fn set_slots(&self, slots: usize) {
        let mut inner = self.inner();
        inner.slots = slots;
        inner.let_in();
    }

    pub fn waiting(&self) -> usize {
        self.inner().queue.len()
    }

    /// Waits for a place. A caller that gives up waiting is forgotten at once.
    ///
    /// # Errors
    /// If too many wait.
    pub async fn enter(self: &Arc<Self>, key: usize, tokens: u64) -> Result<Inside, Full> {
        let (place, turn) = {
            let mut inner = self.inner();
            if inner.inside < inner.slots && inner.queue.is_empty() {
                inner.inside += 1;
                return Ok(Inside(self.clone()));
            }
            if inner.queue.len() >= self.max_waiting {
                return Err(Full);
            }
            let (tell, turn) = oneshot::channel();
            (inner.queue.push(key, tokens, tell), turn)
        };
        let waiting = Waiting { gate: self, place, turn };
        waiting.turn().await;
        Ok(Inside(self.clone()))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn let_in(&mut self) {
        while self.inside < self.slots {
            let Some(turn) = self.queue.pop() else { return };
            // One that has left a moment ago does not take the place.
            if turn.send(()).is_ok() {
                self.inside += 1;
            }
        }
    }

    fn leave(&mut self) {
        self.inside -= 1;
        self.let_in();
    }
}

struct Waiting<'a> {
    gate: &'a Gate,
    place: Place,
    turn: oneshot::Receiver<()>,
}

impl Waiting<'_> {
    async fn turn(mut self) {
        // The sender goes with the gate only, which the caller holds.
        let _ = (&mut self.turn).await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut inner = self.gate.inner();
        // Its turn may have come while it left; then the place it was given is free again.
        if !inner.queue.remove(self.place) && self.turn.try_recv().is_ok() {
            inner.leave();
        }
    }
}

/// A place inside, until it is dropped.
#[derive(Debug)]
pub struct Inside(Arc<Gate>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inner().leave();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// One prompt of 100,000 tokens and a thousand small ones.
    #[test]
    fn one_long_prompt_does_not_starve_a_thousand_small_ones() {
        let mut queue = FairQueue::default();
        queue.push(0, 100_000, "long");
        queue.push(0, 100_000, "long again");
        for _ in 0..1000 {
            queue.push(1, 90, "small");
        }
        let order: Vec<&str> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order.iter().position(|item| *item == "long"), Some(0), "nobody was before it");
        assert_eq!(order.iter().position(|item| *item == "long again"), Some(1001));
    }

    #[test]
    fn keys_share_by_tokens_and_not_by_requests() {
        let mut queue = FairQueue::default();
        for _ in 0..300 {
            queue.push(0, 300, 0);
            queue.push(1, 100, 1);
        }
        let first: Vec<usize> = (0..200).filter_map(|_| queue.pop()).collect();
        let of_small = first.iter().filter(|key| **key == 1).count();
        assert!((148..=152).contains(&of_small), "{of_small}");
    }

    #[test]
    fn who_was_idle_earns_nothing_and_leaves_nothing_behind() {
        let mut queue = FairQueue::default();
        for round in 0..1000 {
            queue.push(round, 50, ());
            queue.pop();
        }
        assert!(queue.ends.len() <= 2, "{}", queue.ends.len());
        let place = queue.push(3, 10, ());
        assert!(queue.remove(place) && !queue.remove(place) && queue.is_empty());
    }

    #[tokio::test]
    async fn the_gate_lets_in_as_many_as_there_are_slots() {
        let gate = Arc::new(Gate::new(1, 2));
        let first = gate.enter(0, 10).await.unwrap();
        let (one, other) = (gate.clone(), gate.clone());
        let left = tokio::spawn(async move { one.enter(0, 10).await });
        let second = tokio::spawn(async move { other.enter(1, 10).await });
        while gate.waiting() < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(gate.enter(2, 10).await.err(), Some(Full));
        left.abort();
        let _ = left.await;
        assert_eq!(gate.waiting(), 1, "who leaves is forgotten at once");
        drop(first);
        let second = second.await.unwrap().unwrap();
        let third = gate.enter(2, 10);
        tokio::pin!(third);
        assert!(tokio::time::timeout(Duration::from_millis(10), &mut third).await.is_err());
        gate.set_slots(2);
        let third = third.await.unwrap();
        drop((second, third));
        assert_eq!(gate.inner().inside, 0);
    }
}
