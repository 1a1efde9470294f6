//! Prometheus: reads what router and replicas export, at its interval.

use std::time::Duration;

use crate::gateway::Gateway;
use crate::pods::{PodId, Pods};
use crate::scaler::Scaler;

/// The samples that the autoscaler's queries see.
pub struct Prometheus {
    _model_name: String,
}

impl Prometheus {
    pub fn new(model_name: &str, _scaler: &Scaler) -> Self {
        Self { _model_name: model_name.to_owned() }
    }

    pub fn scrape(&mut self, _now: Duration, _gateway: &Gateway, _pods: &mut Pods, _interval: Duration) {}

    pub fn gone(&mut self, _now: Duration, _pod: PodId) {}
}
