//! A token bucket: what may be taken a minute, evenly.

use std::time::Duration;

const MINUTE: f64 = 60.0;

/// Holds at most what a minute gives, and is full at first. All times are the caller's clock.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_minute: f64,
    level: f64,
    at: Duration,
}

impl Bucket {
    pub fn new(per_minute: u64, now: Duration) -> Self {
        Self { per_minute: per_minute as f64, level: per_minute as f64, at: now }
    }

    pub fn per_minute(&self) -> u64 {
        self.per_minute as u64
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_minute / MINUTE).min(self.per_minute);
        self.at = self.at.max(now);
    }

    /// When there will be as much; zero if there is. `None` if it is more than a minute gives.
    pub fn wait(&mut self, now: Duration, amount: u64) -> Option<Duration> {
        self.fill(now);
        let amount = amount as f64;
        if amount > self.per_minute {
            return None;
        }
        let missing = (amount - self.level).max(0.0);
        Some(Duration::from_secs_f64(missing * MINUTE / self.per_minute.max(f64::MIN_POSITIVE)))
    }

    /// Takes it, whether it is there or not: what was used is used.
    pub fn take(&mut self, now: Duration, amount: u64) {
        self.fill(now);
        self.level -= amount as f64;
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&mut self, amount: u64) {
        self.level = (self.level + amount as f64).min(self.per_minute);
    }

    pub fn remaining(&mut self, now: Duration) -> u64 {
        self.fill(now);
        self.level.max(0.0) as u64
    }

    /// When it will be full again.
    pub fn reset(&mut self, now: Duration) -> Duration {
        self.fill(now);
        Duration::from_secs_f64(
            (self.per_minute - self.level) * MINUTE / self.per_minute.max(f64::MIN_POSITIVE),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_gives_a_minutes_worth_and_then_as_fast_as_it_fills() {
        let mut bucket = Bucket::new(60, at(0));
        bucket.take(at(0), 60);
        assert_eq!((bucket.remaining(at(0)), bucket.reset(at(0))), (0, at(60)));
        assert_eq!(bucket.wait(at(0), 5), Some(at(5)));
        assert_eq!(bucket.wait(at(5), 5), Some(at(0)));
        assert_eq!(bucket.wait(at(0), 61), None, "it will never be there");
        bucket.give_back(50);
        assert_eq!(bucket.remaining(at(5)), 55);
        bucket.give_back(1_000_000);
        assert_eq!(bucket.remaining(at(5)), 60);
    }

    proptest! {
        /// Whatever comes when, no more is let through than a bucketful and what flowed in.
        #[test]
        fn it_never_lets_more_through(
            per_minute in 1_u64..1000,
            asks in prop::collection::vec((0_u64..5000, 0_u64..200), 1..200),
        ) {
            let mut bucket = Bucket::new(per_minute, at(0));
            let (mut now, mut given) = (at(0), 0);
            for (millis, amount) in asks {
                now += Duration::from_millis(millis);
                if bucket.wait(now, amount).is_some_and(|wait| wait.is_zero()) {
                    bucket.take(now, amount);
                    given += amount;
                }
                let most = per_minute as f64 * (1.0 + now.as_secs_f64() / MINUTE);
                prop_assert!(given as f64 <= most + 1e-6, "{} of {}", given, most);
            }
        }
    }
}
