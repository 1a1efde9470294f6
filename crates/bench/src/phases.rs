//! Which requests are measured. Warm-up comes first, then what is measured, then, so that the last measured
//! requests meet the same load as the first, requests that only keep it up. The run is over when the last measured
//! one has ended; what is then under way is given up.

use std::time::Duration;

use crate::result::Phase;

/// Most requests of one repeat: each leaves a record.
pub const MAX_REQUESTS: u64 = 1_000_000;

/// How much of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Requests(u64),
    Time(Duration),
}

/// What is measured, and what around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhasePlan {
    pub warm_up: Extent,
    pub measured: Extent,
    /// Whether requests go on coming until the last measured one has ended.
    pub cool_down: bool,
}

/// Sorts requests into phases, in the order in which they are sent.
#[derive(Debug)]
pub struct Phases {
    plan: PhasePlan,
    next_index: u64,
    warm_up: u64,
    measured: u64,
    /// When the first measured request was scheduled.
    measuring_since: Option<Duration>,
    /// Measured requests that have not ended.
    open: u64,
    is_closed: bool,
}

impl Phases {
    pub fn new(plan: PhasePlan) -> Self {
        Self {
            plan,
            next_index: 0,
            warm_up: 0,
            measured: 0,
            measuring_since: None,
            open: 0,
            is_closed: false,
        }
    }

    /// The number and the phase of the next request; `None` if no more is to be sent.
    pub fn next(&mut self, scheduled: Duration) -> Option<(u64, Phase)> {
        let phase = self.phase(scheduled);
        let ends = phase == Phase::CoolDown && !self.plan.cool_down;
        if ends || self.next_index >= MAX_REQUESTS {
            self.close();
            return None;
        }
        match phase {
            Phase::WarmUp => self.warm_up += 1,
            Phase::Measured => {
                self.measuring_since.get_or_insert(scheduled);
                self.measured += 1;
                self.open += 1;
                self.is_closed |= self.plan.measured == Extent::Requests(self.measured);
            }
            Phase::CoolDown => self.is_closed = true,
        }
        self.next_index += 1;
        Some((self.next_index - 1, phase))
    }

    fn phase(&self, scheduled: Duration) -> Phase {
        if self.is_closed {
            return Phase::CoolDown;
        }
        let warms_up = self.measuring_since.is_none()
            && match self.plan.warm_up {
                Extent::Requests(requests) => self.warm_up < requests,
                Extent::Time(time) => scheduled < time,
            };
        let measures = match (self.plan.measured, self.measuring_since) {
            (Extent::Requests(requests), _) => self.measured < requests,
            (Extent::Time(time), since) => scheduled < since.unwrap_or(scheduled) + time,
        };
        match (warms_up, measures) {
            (true, _) => Phase::WarmUp,
            (false, true) => Phase::Measured,
            (false, false) => Phase::CoolDown,
        }
    }

    /// A request has ended.
    pub fn ended(&mut self, phase: Phase) {
        self.open -= u64::from(phase == Phase::Measured);
    }

    /// No request will be measured any more.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// Whether all that is measured has ended.
    pub fn is_over(&self) -> bool {
        self.is_closed && self.open == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(plan: PhasePlan, times: impl IntoIterator<Item = u64>) -> Vec<Phase> {
        let mut phases = Phases::new(plan);
        times
            .into_iter()
            .map_while(|at| phases.next(Duration::from_secs(at)))
            .map(|(_, phase)| phase)
            .collect()
    }

    #[test]
    fn requests_are_sorted_by_number() {
        use Phase::{CoolDown, Measured, WarmUp};
        let plan = PhasePlan { warm_up: Extent::Requests(2), measured: Extent::Requests(3), cool_down: true };
        let expected = [WarmUp, WarmUp, Measured, Measured, Measured, CoolDown, CoolDown];
        assert_eq!(phases(plan, 0..7), expected);
        assert_eq!(phases(PhasePlan { cool_down: false, ..plan }, 0..7), expected[..5]);
    }

    #[test]
    fn requests_are_sorted_by_time() {
        use Phase::{CoolDown, Measured, WarmUp};
        let second = Duration::from_secs(1);
        let plan = PhasePlan {
            warm_up: Extent::Time(2 * second),
            measured: Extent::Time(3 * second),
            cool_down: true,
        };
        assert_eq!(
            phases(plan, [0, 1, 4, 5, 6, 7, 8]),
            [WarmUp, WarmUp, Measured, Measured, Measured, CoolDown, CoolDown]
        );
    }

    #[test]
    fn it_is_over_when_the_last_measured_request_has_ended() {
        let plan = PhasePlan { warm_up: Extent::Requests(1), measured: Extent::Requests(2), cool_down: true };
        let mut phases = Phases::new(plan);
        let sent: Vec<_> = (0..4).map(|_| phases.next(Duration::ZERO).unwrap().1).collect();
        for phase in [sent[0], sent[3], sent[1]] {
            phases.ended(phase);
            assert!(!phases.is_over());
        }
        phases.ended(sent[2]);
        assert!(phases.is_over());
    }

    #[test]
    fn a_workload_that_runs_out_ends_the_run() {
        let plan =
            PhasePlan { warm_up: Extent::Requests(0), measured: Extent::Requests(10), cool_down: true };
        let mut phases = Phases::new(plan);
        let (_, phase) = phases.next(Duration::ZERO).unwrap();
        phases.close();
        assert!(!phases.is_over());
        phases.ended(phase);
        assert!(phases.is_over());
    }
}
