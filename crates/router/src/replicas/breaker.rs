//! The circuit breaker of one replica: closed, open, half open.
//!
//! Health checks ask whether a replica says that it is well; the breaker looks at what became of real requests.
//! After some failures in a row nobody is sent there for a while; then one request tries, and its outcome decides.

use std::time::Duration;

/// Failures in a row that open it.
const FAILURES: u32 = 3;
/// How long it stays open the first time; twice as long after each trial that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What metrics and the list of replicas say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    Open,
    HalfOpen,
}

impl BreakerState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// All times are the caller's clock.
#[derive(Clone, Copy, Debug)]
pub struct Breaker {
    failures: u32,
    /// Open until then; half open after it.
    open_until: Option<Duration>,
    pause: Duration,
    /// A request is trying.
    trial: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { failures: 0, open_until: None, pause: FIRST_PAUSE, trial: false }
    }
}

impl Breaker {
    pub fn state(&self, now: Duration) -> BreakerState {
        match self.open_until {
            None => BreakerState::Closed,
            Some(until) if now < until => BreakerState::Open,
            Some(_) => BreakerState::HalfOpen,
        }
    }

    /// Whether a request may go there.
    pub fn allows(&self, now: Duration) -> bool {
        match self.state(now) {
            BreakerState::Closed => true,
            BreakerState::Open => false,
            BreakerState::HalfOpen => !self.trial,
        }
    }

    /// A request goes there. True if it is the one that tries.
    pub fn begin(&mut self, now: Duration) -> bool {
        let tries = self.state(now) == BreakerState::HalfOpen && !self.trial;
        self.trial |= tries;
        tries
    }

    /// A request was answered.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// A request failed by the replica's fault.
    pub fn failed(&mut self, now: Duration, tried: bool) {
        self.failures += 1;
        if tried {
            self.trial = false;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.open_until = Some(now + self.pause);
        } else if self.failures >= FAILURES && self.open_until.is_none() {
            self.open_until = Some(now + self.pause);
        }
    }

    /// A request ended without telling anything: its client left.
    pub fn abandoned(&mut self, tried: bool) {
        if tried {
            self.trial = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        (0..FAILURES).for_each(|_| breaker.failed(at(0), false));
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_others_do_not() {
        let mut breaker = Breaker::default();
        for _ in 0..20 {
            (1..FAILURES).for_each(|_| breaker.failed(at(0), false));
            breaker.succeeded();
        }
        assert_eq!(breaker.state(at(0)), BreakerState::Closed);
        assert_eq!(opened().state(at(0)), BreakerState::Open);
        assert!(!opened().allows(at(999)));
    }

    #[test]
    fn one_request_tries_and_its_outcome_decides() {
        let mut breaker = opened();
        assert!(breaker.allows(at(1000)) && breaker.begin(at(1000)));
        assert!(!breaker.allows(at(1001)) && !breaker.begin(at(1001)), "one is enough");
        let mut failed = breaker;
        failed.failed(at(1500), true);
        assert!(!failed.allows(at(3499)) && failed.allows(at(3500)), "twice as long");
        breaker.succeeded();
        assert_eq!(breaker.state(at(1500)), BreakerState::Closed);
    }

    #[test]
    fn a_trial_whose_client_left_is_tried_again() {
        let mut breaker = opened();
        assert!(breaker.begin(at(1000)));
        breaker.abandoned(true);
        assert!(breaker.allows(at(1001)));
    }

    #[test]
    fn the_pause_has_an_end() {
        let mut breaker = opened();
        let mut now = at(1000);
        for _ in 0..40 {
            assert!(breaker.begin(now));
            breaker.failed(now, true);
            now += LONGEST_PAUSE;
        }
        assert!(breaker.allows(now));
    }
}
