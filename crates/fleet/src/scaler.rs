//! Who says how many replicas there are to be.

use std::time::Duration;

use crate::pods::Pods;
use crate::scrape::Prometheus;

/// The autoscaler of a run.
pub struct Scaler {
    name: String,
    wanted: u32,
}

impl Scaler {
    /// None: the fleet is as large as it is.
    pub fn fixed(replicas: u32) -> Self {
        Self { name: format!("{replicas} replicas"), wanted: replicas }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replicas that it asks for now.
    pub fn wanted(&self) -> u32 {
        self.wanted
    }

    /// The most that it may ask for.
    pub fn most_replicas(&self) -> u32 {
        self.wanted
    }

    /// When it wants to look next.
    pub fn next_wake(&self, _now: Duration) -> Option<Duration> {
        None
    }

    /// Looks, and says why it changed its mind, if it did.
    pub fn tick(&mut self, _now: Duration, _prometheus: &Prometheus, _pods: &Pods) -> Option<String> {
        None
    }
}
