//! A token bucket: what may be taken a minute, evenly.

use std::time::Duration;

const MINUTE: f64 = 60.0;

/// What a bucket has at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub per_minute: f64,
    /// Below zero where more was used than was there.
    pub left: f64,
}

impl Level {
    /// When there will be as much; zero if there is. `None` if it is more than a minute gives.
    pub fn wait(&self, amount: u64) -> Option<Duration> {
        let missing = amount as f64 - self.left;
        match amount as f64 {
            amount if amount > self.per_minute => None,
            _ if missing <= 0.0 => Some(Duration::ZERO),
            _ => Some(self.time(missing).max(Duration::from_nanos(1))),
        }
    }

    pub fn remaining(&self) -> u64 {
        self.left.max(0.0) as u64
    }

    /// When it will be full again.
    pub fn reset(&self) -> Duration {
        self.time(self.per_minute - self.left)
    }

    /// How long that much flows in.
    fn time(&self, amount: f64) -> Duration {
        let seconds = amount * MINUTE / self.per_minute.max(f64::MIN_POSITIVE);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// Holds at most what a minute gives, and is full at first. All times are the caller's clock.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    level: Level,
    at: Duration,
}

impl Bucket {
    pub fn new(per_minute: u64, now: Duration) -> Self {
        let per_minute = per_minute as f64;
        Self { level: Level { per_minute, left: per_minute }, at: now }
    }

    /// What it has now.
    pub fn level(&mut self, now: Duration) -> Level {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        let Level { per_minute, left } = self.level;
        self.level.left = (left + passed * per_minute / MINUTE).min(per_minute);
        self.at = self.at.max(now);
        self.level
    }

    /// Takes it, whether it is there or not: what was used is used.
    pub fn take(&mut self, now: Duration, amount: u64) {
        self.level(now);
        self.level.left -= amount as f64;
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&mut self, amount: u64) {
        self.level.left = (self.level.left + amount as f64).min(self.level.per_minute);
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
        let level = bucket.level(at(0));
        assert_eq!((level.remaining(), level.reset()), (0, at(60)));
        assert_eq!(level.wait(5), Some(at(5)));
        assert_eq!(bucket.level(at(5)).wait(5), Some(at(0)));
        assert_eq!(level.wait(61), None, "it will never be there");
        bucket.give_back(50);
        assert_eq!(bucket.level(at(5)).remaining(), 55);
        bucket.give_back(1_000_000);
        assert_eq!(bucket.level(at(5)).remaining(), 60);
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
                if bucket.level(now).wait(amount).is_some_and(|wait| wait.is_zero()) {
                    bucket.take(now, amount);
                    given += amount;
                }
                let most = per_minute as f64 * (1.0 + now.as_secs_f64() / MINUTE);
                prop_assert!(given as f64 <= most + 1e-6, "{} of {}", given, most);
            }
        }
    }
}
