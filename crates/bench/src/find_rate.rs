//! The search for the highest rate that keeps an SLO.
//!
//! The rate is doubled while the SLO is kept and halved while it is not; once a rate that kept it and one that did
//! not are known, the geometric mean of the two is tried, until they are close. It assumes that what is kept at one
//! rate is kept at every lower one, which holds for a server whose latency grows with its load.

use crate::arrivals::MAX_RATE;

/// Where to search, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FindRate {
    /// The first rate that is tried, requests a second.
    pub start: f64,
    pub least: f64,
    pub most: f64,
    /// Done when the lowest rate that failed is at most that much above the highest that was kept.
    pub tolerance: f64,
    pub max_trials: u32,
}

impl Default for FindRate {
    fn default() -> Self {
        Self { start: 1.0, least: 0.01, most: MAX_RATE, tolerance: 0.05, max_trials: 16 }
    }
}

/// A search under way.
#[derive(Clone, Debug)]
pub struct RateSearch {
    settings: FindRate,
    kept: Option<f64>,
    failed: Option<f64>,
    trials: u32,
}

impl FindRate {
    /// When the search ends, in words.
    pub fn stopping_rule(&self) -> String {
        format!(
            "doubles or halves from {} req/s within {} to {} until one rate kept the SLO and another did not, then \
             bisects (geometric mean) until they are within {} %, at most {} trials",
            self.start,
            self.least,
            self.most,
            100.0 * self.tolerance,
            self.max_trials
        )
    }
}

impl RateSearch {
    pub fn new(settings: FindRate) -> Self {
        Self { settings, kept: None, failed: None, trials: 0 }
    }

    /// The next rate to try.
    ///
    /// # Errors
    /// Why the search is over, in words.
    pub fn next_rate(&mut self) -> Result<f64, String> {
        let FindRate { start, least, most, tolerance, max_trials } = self.settings;
        if self.trials >= max_trials {
            return Err(format!("{max_trials} trials were made"));
        }
        let rate = match (self.kept, self.failed) {
            (None, None) => start.clamp(least, most),
            (Some(kept), None) if kept >= most => {
                return Err(format!("the SLO is kept at {most} req/s, the highest allowed"));
            }
            (Some(kept), None) => (2.0 * kept).min(most),
            (None, Some(failed)) if failed <= least => {
                return Err(format!("the SLO is not kept at {least} req/s, the lowest allowed"));
            }
            (None, Some(failed)) => (failed / 2.0).max(least),
            (Some(kept), Some(failed)) if failed <= kept * (1.0 + tolerance) => {
                return Err(format!("{kept:.4} req/s keeps the SLO and {failed:.4} does not"));
            }
            (Some(kept), Some(failed)) => (kept * failed).sqrt(),
        };
        self.trials += 1;
        Ok(rate)
    }

    /// What became of a trial.
    pub fn tell(&mut self, rate: f64, kept: bool) {
        if kept {
            self.kept = Some(self.kept.map_or(rate, |best| best.max(rate)));
        } else {
            self.failed = Some(self.failed.map_or(rate, |best| best.min(rate)));
        }
    }

    pub fn best_rate(&self) -> Option<f64> {
        self.kept
    }

    pub fn lowest_rate_that_failed(&self) -> Option<f64> {
        self.failed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn search(settings: FindRate, limit: f64) -> (RateSearch, String) {
        let mut search = RateSearch::new(settings);
        loop {
            match search.next_rate() {
                Ok(rate) => search.tell(rate, rate <= limit),
                Err(reason) => return (search, reason),
            }
        }
    }

    proptest! {
        #[test]
        fn the_limit_is_found_to_the_tolerance(limit in 0.02_f64..5000.0, start in 0.02_f64..5000.0) {
            let settings = FindRate { start, max_trials: 60, ..FindRate::default() };
            let (search, reason) = search(settings, limit);
            let best = search.best_rate().unwrap();
            prop_assert!(best <= limit && limit < best * 1.05, "{best} of {limit}: {reason}");
            prop_assert!(search.lowest_rate_that_failed().unwrap() > limit);
        }
    }

    #[test]
    fn a_server_without_limits_and_one_without_a_chance_end_the_search() {
        let settings = FindRate { start: 3.0, least: 1.0, most: 10.0, ..FindRate::default() };
        let (all, reason) = search(settings, f64::INFINITY);
        assert_eq!((all.best_rate(), all.lowest_rate_that_failed()), (Some(10.0), None));
        assert!(reason.contains("highest allowed"), "{reason}");
        let (none, reason) = search(settings, 0.0);
        assert_eq!((none.best_rate(), none.lowest_rate_that_failed()), (None, Some(1.0)));
        assert!(reason.contains("lowest allowed"), "{reason}");
    }

    #[test]
    fn a_search_gives_up_after_its_trials() {
        let (search, reason) = search(FindRate { max_trials: 3, ..FindRate::default() }, 1000.0);
        assert_eq!(search.best_rate(), Some(4.0));
        assert!(reason.contains("3 trials"), "{reason}");
    }
}
