//! What Prometheus has scraped, in memory.
//!
//! Invariant: a sample older than the store keeps is gone with the next one of its series, and a series whose target
//! went away is gone once its last sample is.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Names and values, without the metric's name.
pub type Labels = BTreeMap<String, String>;

/// A sample; no value is a staleness marker: the target stopped to export the series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub at: Duration,
    pub value: Option<f64>,
}

/// The samples of one series, the oldest first.
pub type Samples = VecDeque<Sample>;

/// All series by name and labels.
#[derive(Clone, Debug)]
pub struct SampleStore {
    keep: Duration,
    series: BTreeMap<String, BTreeMap<Labels, Samples>>,
}

impl SampleStore {
    /// A store that keeps samples for that long; [`crate::promql::Query::reach`] says how long a query needs.
    pub fn new(keep: Duration) -> Self {
        Self { keep, series: BTreeMap::new() }
    }

    /// A scraped sample of the target, which becomes the label `instance`.
    pub fn record(&mut self, at: Duration, target: &str, name: &str, labels: &[(&str, &str)], value: f64) {
        let instance = [("instance", target)];
        let labels = instance.iter().chain(labels).map(|(name, value)| ((*name).into(), (*value).into()));
        if !self.series.contains_key(name) {
            self.series.insert(name.to_owned(), BTreeMap::new());
        }
        let Some(series) = self.series.get_mut(name) else { return };
        let samples = series.entry(labels.collect()).or_default();
        let too_old = |sample: &Sample| sample.at + self.keep < at;
        while samples.front().is_some_and(too_old) {
            samples.pop_front();
        }
        samples.push_back(Sample { at, value: Some(value) });
    }

    /// The target is gone, or could not be scraped: its series end here (Prometheus writes staleness markers).
    pub fn target_gone(&mut self, at: Duration, target: &str) {
        let keep = self.keep;
        for series in self.series.values_mut() {
            series.retain(|_, samples| samples.back().is_some_and(|last| last.at + keep >= at));
            let of_target = |labels: &Labels| labels.get("instance").is_some_and(|it| it == target);
            for samples in
                series.iter_mut().filter(|(labels, _)| of_target(labels)).map(|(_, samples)| samples)
            {
                if samples.back().is_some_and(|last| last.value.is_some()) {
                    samples.push_back(Sample { at, value: None });
                }
            }
        }
    }

    /// Every series of that name.
    pub fn named(&self, name: &str) -> impl Iterator<Item = (&Labels, &Samples)> {
        self.series.get(name).into_iter().flatten()
    }

    /// Takes the series of that name from another store in place of its own.
    pub fn replace(&mut self, name: &str, mut from: Self) {
        self.series.remove(name);
        self.series.extend(from.series.remove_entry(name));
    }

    pub fn series_count(&self) -> usize {
        self.series.values().map(BTreeMap::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_samples_and_gone_targets_leave_nothing() {
        let mut store = SampleStore::new(Duration::from_secs(60));
        let at = Duration::from_secs;
        (0..100).for_each(|turn| store.record(at(turn * 15), "a", "m", &[], 1.0));
        let kept = store.named("m").next().unwrap().1.len();
        assert_eq!(kept, 5, "those of the last minute");
        store.target_gone(at(1500), "a");
        store.target_gone(at(1500), "a");
        assert_eq!(store.named("m").next().unwrap().1.len(), 6, "one marker");
        store.target_gone(at(1600), "b");
        assert_eq!(store.series_count(), 0);
    }
}
