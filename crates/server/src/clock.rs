//! The one clock of a replica: what the engine, the metrics and the health check count from.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use servelab_engine::Timestamp;

/// Counts from the start of the server; copies agree.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
    /// The same moment in Unix time.
    started: Duration,
}

impl Clock {
    pub fn start() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { origin: Instant::now(), started }
    }

    pub fn now(&self) -> Timestamp {
        self.origin.elapsed()
    }

    /// Seconds since the Unix epoch at which the server started.
    pub fn started_unix(&self) -> u64 {
        self.started.as_secs()
    }

    /// The same with fractions.
    pub fn unix_seconds(&self) -> f64 {
        (self.started + self.now()).as_secs_f64()
    }

    /// Seconds since the Unix epoch.
    pub fn unix(&self) -> u64 {
        (self.started + self.now()).as_secs()
    }
}
