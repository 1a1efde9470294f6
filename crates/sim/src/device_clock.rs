//! Time of a simulated device: on the wall, or its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A clock that stands still until somebody moves it. Copies show the same time.
#[derive(Clone, Debug, Default)]
pub struct VirtualClock(Arc<AtomicU64>);

/// The same clock, not the same time.
impl PartialEq for VirtualClock {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl VirtualClock {
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    /// Moves on to `at`; never back.
    pub fn advance_to(&self, at: Duration) {
        self.0.fetch_max(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// How the time of the device passes.
#[derive(Clone, Debug)]
pub enum Pace {
    /// On the wall, so many times as fast as the device.
    Real { origin: Instant, speed: f64 },
    /// As a clock that moves on when the device is waited for.
    Virtual(VirtualClock),
}

/// How long before its time a sleeper is to wake up: sleeping ends up to about 60 us late on Linux. The rest is spun,
/// which costs at most that much of a core for each step.
const SPIN: Duration = Duration::from_micros(80);
/// Longest step. A speed near zero is no reason to sleep for ever.
const LONGEST: Duration = Duration::from_secs(3600);

impl Pace {
    pub fn real(speed: f64) -> Self {
        Self::Real { origin: Instant::now(), speed }
    }

    pub fn now(&self) -> Duration {
        match self {
            Self::Real { origin, .. } => origin.elapsed(),
            Self::Virtual(clock) => clock.now(),
        }
    }

    /// How long something takes that takes the device so many seconds.
    pub fn duration(&self, seconds: f64) -> Duration {
        let seconds = match self {
            Self::Real { speed, .. } => seconds / speed,
            Self::Virtual(_) => seconds,
        };
        Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST)
    }

    /// Returns at that time, within microseconds.
    pub fn wait_until(&self, at: Duration) {
        let origin = match self {
            Self::Virtual(clock) => return clock.advance_to(at),
            Self::Real { origin, .. } => origin,
        };
        let left = at.saturating_sub(origin.elapsed());
        if left > SPIN {
            std::thread::sleep(left - SPIN);
        }
        while origin.elapsed() < at {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_time_stands_until_it_is_moved_and_never_goes_back() {
        let clock = VirtualClock::default();
        let pace = Pace::Virtual(clock.clone());
        pace.wait_until(Duration::from_secs(5));
        pace.wait_until(Duration::from_secs(3));
        assert_eq!((pace.now(), clock.now()), (Duration::from_secs(5), Duration::from_secs(5)));
        assert_eq!(pace.duration(0.25), Duration::from_millis(250));
    }

    #[test]
    fn nobody_wakes_up_early_and_speed_divides() {
        let pace = Pace::real(100.0);
        assert_eq!(pace.duration(1.0), Duration::from_millis(10));
        for micros in [0, 50, 300, 2000] {
            let at = pace.now() + Duration::from_micros(micros);
            pace.wait_until(at);
            assert!(pace.now() >= at);
        }
        assert_eq!(Pace::real(1e-300).duration(1.0), LONGEST);
    }
}
