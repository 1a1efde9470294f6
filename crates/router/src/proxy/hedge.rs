//! When a second attempt is worth while: when the first is slower than nearly all others were (Dean and Barroso 2013,
//! "The tail at scale").

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Times that are remembered, and how many there must be before anything is said.
const REMEMBERED: usize = 256;
const ENOUGH: usize = 32;

/// The last times to the first byte.
#[derive(Debug, Default)]
pub struct FirstBytes(Mutex<VecDeque<Duration>>);

impl FirstBytes {
    pub fn observe(&self, time: Duration) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() == REMEMBERED {
            times.pop_front();
        }
        times.push_back(time);
    }

    /// The time within which that share of them came. `None` while there are too few.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() < ENOUGH {
            return None;
        }
        let mut sorted: Vec<Duration> = times.iter().copied().collect();
        drop(times);
        sorted.sort_unstable();
        let at = (sorted.len() as f64 * share) as usize;
        sorted.get(at.min(sorted.len() - 1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_is_of_the_last_times() {
        let times = FirstBytes::default();
        assert_eq!(times.quantile(0.9), None);
        (0..1000).for_each(|_| times.observe(Duration::from_secs(9)));
        (1..=256).for_each(|millis| times.observe(Duration::from_millis(millis)));
        assert_eq!(times.quantile(0.5), Some(Duration::from_millis(129)));
        assert_eq!(times.quantile(1.0), Some(Duration::from_millis(256)));
    }
}
