//! Prometheus: reads what router and replicas export, at its interval.

use std::time::Duration;

use servelab_sim::autoscale::SampleStore;
use servelab_sim::autoscale::adapter::NAMESPACE;

use crate::exposition::{self, Wanted};
use crate::gateway::Gateway;
use crate::pods::{PodId, Pods};
use crate::scaler::Scaler;

/// The samples that the autoscaler's queries see. Series that they do not name are not kept.
pub struct Prometheus {
    pub samples: SampleStore,
    model_name: String,
    wanted: Wanted,
    is_asked: bool,
}

const ROUTER: &str = "router";

impl Prometheus {
    pub fn new(model_name: &str, scaler: &Scaler) -> Self {
        let queries = scaler.queries();
        Self {
            samples: SampleStore::default(),
            model_name: model_name.to_owned(),
            is_asked: !queries.is_empty(),
            wanted: Wanted::by(queries),
        }
    }

    /// Every target that is there and reached, `since` after the last time.
    pub fn scrape(&mut self, now: Duration, gateway: &Gateway, pods: &mut Pods, since: Duration) {
        let Self { samples, wanted, model_name, .. } = self;
        for id in &pods.alive {
            let pod = &mut pods.pods[*id];
            let Some(replica) = &mut pod.replica else { continue };
            replica.sync(now);
            let nanos = replica.counters().busy_nanos;
            let computed = Duration::from_nanos(nanos.saturating_sub(pod.busy_nanos_scraped));
            pod.busy_nanos_scraped = nanos;
            let busy = (computed.as_secs_f64() / since.as_secs_f64()).min(1.0);
            if self.is_asked && !pod.is_cut_off {
                let target = target(*id);
                let sink = &mut |name: &str, labels: &[(&str, &str)], value| {
                    record(samples, now, &target, name, labels, value);
                };
                exposition::replica(replica, model_name, busy, wanted, sink);
            }
        }
        if self.is_asked {
            let sink = &mut |name: &str, labels: &[(&str, &str)], value| {
                record(samples, now, ROUTER, name, labels, value);
            };
            exposition::router(gateway, sink);
        }
    }

    /// The pod is gone, or not reached.
    pub fn gone(&mut self, now: Duration, pod: PodId) {
        if self.is_asked {
            self.samples.target_gone(now, &target(pod));
        }
    }
}

/// With the labels that Prometheus gives what it found in a cluster.
fn record(
    samples: &mut SampleStore,
    now: Duration,
    target: &str,
    name: &str,
    labels: &[(&str, &str)],
    value: f64,
) {
    let labels = [labels, &[("namespace", NAMESPACE), ("pod", target)]].concat();
    samples.record(now, target, name, &labels, value);
}

/// Its name, as its series have it.
pub fn target(pod: PodId) -> String {
    format!("pod-{pod}")
}
