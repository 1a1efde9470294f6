//! What can be seen of a repeat while it runs. Written by the client, read by whoever shows it; and the count of
//! requests in flight that Little's law is checked with.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::histogram::Histogram;

/// Shared between the run and its viewers.
#[derive(Debug, Default)]
pub struct Live(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    now: Duration,
    sent: u64,
    completed: u64,
    failed: u64,
    in_flight: u32,
    peak_in_flight: u32,
    /// Integral of the requests in flight, in request-seconds.
    integral_seconds: f64,
    deltas: u64,
    ttft: Histogram,
    gap: Histogram,
}

/// A moment of a repeat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LiveView {
    /// Time of the last event, since the start of the repeat.
    pub now: Duration,
    pub sent: u64,
    pub completed: u64,
    pub failed: u64,
    pub in_flight: u32,
    pub peak_in_flight: u32,
    pub mean_in_flight: f64,
    /// Deltas that were not empty, about as many as tokens.
    pub deltas: u64,
    pub ttft_median: Duration,
    pub ttft_p99: Duration,
    pub itl_median: Duration,
    pub itl_p99: Duration,
}

impl Live {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request was sent.
    pub fn sent(&self, now: Duration) {
        let mut state = self.state();
        state.advance(now);
        state.sent += 1;
        state.in_flight += 1;
        state.peak_in_flight = state.peak_in_flight.max(state.in_flight);
    }

    /// A request that had been sent ended, `late` before this was noticed; `None`: it was given up, and counts
    /// neither as completed nor as failed.
    pub fn ended(&self, now: Duration, late: Duration, completed: Option<bool>) {
        let mut state = self.state();
        state.advance(now);
        state.integral_seconds -= late.as_secs_f64();
        state.in_flight = state.in_flight.saturating_sub(1);
        match completed {
            Some(true) => state.completed += 1,
            Some(false) => state.failed += 1,
            None => {}
        }
    }

    /// A request failed before it was sent.
    pub fn not_sent(&self) {
        self.state().failed += 1;
    }

    pub fn first_token(&self, ttft: Duration) {
        self.state().ttft.record(ttft);
    }

    /// A delta came that long after the one before it.
    pub fn gap(&self, gap: Duration) {
        let mut state = self.state();
        state.deltas += 1;
        state.gap.record(gap);
    }

    pub fn view(&self) -> LiveView {
        // Percentiles are counted outside the lock: the client must not wait for whoever looks.
        let state = self.state().clone();
        let seconds = state.now.as_secs_f64();
        LiveView {
            now: state.now,
            sent: state.sent,
            completed: state.completed,
            failed: state.failed,
            in_flight: state.in_flight,
            peak_in_flight: state.peak_in_flight,
            mean_in_flight: if seconds > 0.0 { state.integral_seconds / seconds } else { 0.0 },
            deltas: state.deltas + state.ttft.count(),
            ttft_median: state.ttft.percentile(50.0),
            ttft_p99: state.ttft.percentile(99.0),
            itl_median: state.gap.percentile(50.0),
            itl_p99: state.gap.percentile(99.0),
        }
    }
}

impl State {
    fn advance(&mut self, now: Duration) {
        let now = now.max(self.now);
        self.integral_seconds += f64::from(self.in_flight) * (now - self.now).as_secs_f64();
        self.now = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_in_flight_is_the_integral_over_the_time() {
        let live = Live::default();
        let at = Duration::from_secs;
        live.sent(at(0));
        live.sent(at(2));
        live.ended(at(4), Duration::ZERO, Some(true));
        live.ended(at(9), at(1), None);
        let view = live.view();
        // 2 s of one, 2 s of two, 4 s of one, and one of none.
        assert!((view.mean_in_flight - 10.0 / 9.0).abs() < 1e-12, "{view:?}");
        assert_eq!(
            (view.sent, view.completed, view.failed, view.in_flight, view.peak_in_flight),
            (2, 1, 0, 0, 2)
        );
    }
}
