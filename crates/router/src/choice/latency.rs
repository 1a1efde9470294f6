//! The latency of one replica as the policy `peak_ewma` sees it.

use std::time::Duration;

/// How long a peak is remembered: after this time its weight is 1/e.
const MEMORY: Duration = Duration::from_secs(10);

/// A mean that jumps to every peak at once and comes down from it slowly (Finagle's `PeakEwma`), so that a replica
/// that has just been slow is avoided before many requests have found out.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeakEwma {
    seconds: f64,
    at: Duration,
}

impl PeakEwma {
    /// Takes in how long a request took. `now` is the caller's clock.
    pub fn observe(&mut self, now: Duration, seconds: f64) {
        let kept = self.weight(now);
        let mean = self.seconds * kept + seconds * (1.0 - kept);
        self.seconds = mean.max(seconds);
        self.at = now;
    }

    /// What to expect now: a replica that is asked no more is forgotten its peak.
    pub fn seconds(&self, now: Duration) -> f64 {
        self.seconds * self.weight(now)
    }

    fn weight(&self, now: Duration) -> f64 {
        (-now.saturating_sub(self.at).as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_at_once_and_down_slowly() {
        let at = Duration::from_secs;
        let mut latency = PeakEwma::default();
        latency.observe(at(1), 0.1);
        latency.observe(at(2), 3.0);
        assert_eq!(latency.seconds(at(2)), 3.0);
        latency.observe(at(3), 0.1);
        assert!((2.5..3.0).contains(&latency.seconds(at(3))));
        (4..60).for_each(|second| latency.observe(at(second), 0.1));
        assert!((0.1..0.2).contains(&latency.seconds(at(59))), "{latency:?}");
        assert!(latency.seconds(at(600)) < 1e-9, "in the end it is tried again");
    }
}
