//! The clock of one repeat: monotonic, zero at its start.

use std::time::{Duration, Instant};

/// Copied to whoever has to tell the time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// A point in time of the rest of the process on this clock; zero if it lies before the start.
    pub fn at(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.origin)
    }

    pub fn instant(&self, at: Duration) -> Instant {
        self.origin + at
    }
}
