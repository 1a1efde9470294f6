//! How many requests may be in the replica at once, and when to come back if there are too many.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use servelab_engine::Timestamp;
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::errors::ApiError;

/// Weight of the newest request in the mean stay.
const NEWEST: f64 = 0.2;
/// Longest wait that a client is told, however long the queue.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Counts the requests between the HTTP front and their end in the engine. Tokenisation, the command
/// channel and the engine's queue all lie behind this bound.
pub struct Admission {
    /// Requests that may run plus those that may wait.
    limit: usize,
    /// Of `limit`, those that may wait.
    max_waiting: usize,
    live: AtomicUsize,
    emptied: Notify,
    clock: Clock,
    /// Mean time that a request stays, in seconds; `None` until one has ended.
    mean_stay: Mutex<Option<f64>>,
}

/// The right of one request to be in the replica; dropping it gives it back.
pub struct Place {
    admission: Arc<Admission>,
    entered: Timestamp,
}

impl Admission {
    pub fn new(max_running: u32, max_waiting: u32, clock: Clock) -> Self {
        Self {
            limit: max_running as usize + max_waiting as usize,
            max_waiting: max_waiting as usize,
            live: AtomicUsize::new(0),
            emptied: Notify::new(),
            clock,
            mean_stay: Mutex::new(None),
        }
    }

    /// Takes `count` places, or none.
    ///
    /// # Errors
    /// [`ApiError::QueueFull`] if fewer are left, [`ApiError::TooManyPrompts`] if there never can be as
    /// many.
    pub fn enter(self: &Arc<Self>, count: usize) -> Result<Vec<Place>, ApiError> {
        if count > self.limit {
            return Err(ApiError::TooManyPrompts { places: count, limit: self.limit });
        }
        let room = |live: usize| live.checked_add(count).filter(|live| *live <= self.limit);
        match self.live.fetch_update(Ordering::AcqRel, Ordering::Acquire, room) {
            Err(live) => Err(ApiError::QueueFull { live, retry_after: self.retry_after() }),
            Ok(_) => {
                let entered = self.clock.now();
                Ok((0..count).map(|_| Place { admission: self.clone(), entered }).collect())
            }
        }
    }

    /// Requests inside now.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Acquire)
    }

    /// Returns once nobody is inside.
    pub async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.live() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// How long the queue takes to clear. By Little's law, when `limit` requests are inside and each
    /// stays for W, they leave at a rate of `limit / W`, so that those waiting take `waiting * W / limit`.
    fn retry_after(&self) -> Duration {
        let stay = self.mean_stay.lock().map_or(None, |stay| *stay).unwrap_or(1.0);
        let seconds = (stay * self.max_waiting as f64 / self.limit as f64).ceil().max(1.0);
        Duration::try_from_secs_f64(seconds).map_or(LONGEST_RETRY, |wait| wait.min(LONGEST_RETRY))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let stay = self.admission.clock.now().saturating_sub(self.entered).as_secs_f64();
        if let Ok(mut mean) = self.admission.mean_stay.lock() {
            *mean = Some(mean.map_or(stay, |mean| mean + NEWEST * (stay - mean)));
        }
        if self.admission.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.admission.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(max_running: u32, max_waiting: u32) -> Arc<Admission> {
        Arc::new(Admission::new(max_running, max_waiting, Clock::start()))
    }

    #[test]
    fn all_places_or_none() {
        let admission = admission(2, 1);
        let two = admission.enter(2).unwrap();
        assert!(matches!(admission.enter(2), Err(ApiError::QueueFull { live: 2, .. })));
        let one = admission.enter(1).unwrap();
        assert!(admission.enter(1).is_err());
        drop((two, one));
        assert_eq!(admission.live(), 0);
        assert!(matches!(admission.enter(4), Err(ApiError::TooManyPrompts { places: 4, limit: 3 })));
    }

    #[test]
    fn the_wait_told_follows_from_how_long_requests_stay() {
        let told = |stay| {
            let admission = admission(1, 3);
            *admission.mean_stay.lock().unwrap() = stay;
            admission.retry_after().as_secs()
        };
        assert_eq!(told(None), 1);
        assert_eq!(told(Some(8.0)), 6, "three of four wait, one leaves every two seconds");
        assert_eq!(told(Some(1e9)), 60);
        assert_eq!(told(Some(f64::NAN)), 1);
    }

    #[tokio::test]
    async fn empty_returns_when_the_last_has_left() {
        let admission = admission(2, 0);
        admission.empty().await;
        let places = admission.enter(2).unwrap();
        let waiter = tokio::spawn({
            let admission = admission.clone();
            async move { admission.empty().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(places);
        waiter.await.unwrap();
    }
}
