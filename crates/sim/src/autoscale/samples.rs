//! What Prometheus has scraped.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How long a sample is the value of its series if nothing newer comes (`--query.lookback-delta`).
pub const LOOKBACK: Duration = Duration::from_secs(300);
/// Older samples are forgotten; no range of a query may be longer.
pub const RETENTION: Duration = Duration::from_secs(3600);

/// Names and values of a series' labels, without its name.
pub type Labels = BTreeMap<String, String>;

/// A value at one moment; `None` where the series ended (a staleness marker).
pub type Sample = (Duration, Option<f64>);

#[derive(Clone, Debug)]
pub struct Series {
    pub labels: Labels,
    target: String,
    pub samples: VecDeque<Sample>,
}

/// All series, by name.
#[derive(Clone, Debug, Default)]
pub struct SampleStore {
    by_name: BTreeMap<String, BTreeMap<Labels, Series>>,
}

impl SampleStore {
    /// Takes in one sample of a scrape. `instance` is set to the target.
    pub fn record(&mut self, now: Duration, target: &str, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels = labels.iter().copied().chain([("instance", target)]);
        let labels: Labels = labels.map(|(label, value)| (label.to_owned(), value.to_owned())).collect();
        if !self.by_name.contains_key(name) {
            self.by_name.insert(name.to_owned(), BTreeMap::new());
        }
        let Some(all) = self.by_name.get_mut(name) else { return };
        let series = all.entry(labels).or_insert_with_key(|labels| Series {
            labels: labels.clone(),
            target: target.to_owned(),
            samples: VecDeque::new(),
        });
        series.samples.push_back((now, Some(value)));
        while series.samples.front().is_some_and(|(at, _)| *at + RETENTION < now) {
            series.samples.pop_front();
        }
    }

    /// A scrape found the target gone: its series end now.
    pub fn target_gone(&mut self, now: Duration, target: &str) {
        for all in self.by_name.values_mut() {
            all.retain(|_, series| series.samples.back().is_some_and(|(at, _)| *at + RETENTION >= now));
            for series in all.values_mut().filter(|series| series.target == target) {
                if series.samples.back().is_some_and(|(_, value)| value.is_some()) {
                    series.samples.push_back((now, None));
                }
            }
        }
    }

    /// The series of that name.
    pub fn series(&self, name: &str) -> impl Iterator<Item = &Series> {
        self.by_name.get(name).into_iter().flat_map(BTreeMap::values)
    }
}

impl Series {
    /// Its value at that moment: the newest sample, unless the series has ended or that is too long ago.
    pub fn at(&self, now: Duration) -> Option<f64> {
        let (at, value) = self.samples.iter().rev().find(|(at, _)| *at <= now)?;
        value.filter(|_| *at + LOOKBACK > now)
    }

    /// Its samples after `now - range`, up to `now`.
    pub fn within(&self, now: Duration, range: Duration) -> Vec<(f64, f64)> {
        let from = now.as_secs_f64() - range.as_secs_f64();
        let samples = self.samples.iter().filter(|(at, _)| *at <= now && at.as_secs_f64() > from);
        samples.filter_map(|(at, value)| Some((at.as_secs_f64(), (*value)?))).collect()
    }
}
