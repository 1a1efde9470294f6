//! An autoscaler in its loops: the HPA every 15 s, KEDA's operator at its polling interval.

use std::time::Duration;

use crate::hpa::{Hpa, Proposal, SYNC_PERIOD};
use crate::keda::{External, Keda};
use crate::manifest::{Manifest, MetricType, PodMetricSource};
use crate::replicas::{self, PodMetric, Tolerances};
use crate::store::SampleStore;

/// What the resource metrics pipeline measures of a pod, recorded into the store by whoever has pods: CPU in percent
/// of the request.
pub const CPU_UTILIZATION: &str = "pod_cpu_utilization_percent";

/// A pod that exists.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// Its label `instance` in the store.
    pub target: &'a str,
    pub is_ready: bool,
}

/// Follows a manifest.
#[derive(Clone, Debug)]
pub struct Autoscaler {
    name: String,
    hpa: Hpa,
    pod_metrics: Vec<PodMetricSource>,
    keda: Option<Keda>,
    wanted: u32,
    next_pass: Duration,
    next_poll: Option<Duration>,
}

impl Autoscaler {
    /// Begins at `now` with that many replicas asked for.
    pub fn new(manifest: Manifest, now: Duration, replicas: u32) -> Self {
        let keda = manifest.keda.map(|spec| Keda::new(spec, now));
        Self {
            name: manifest.name,
            hpa: Hpa::new(manifest.hpa),
            pod_metrics: manifest.pod_metrics,
            next_poll: keda.as_ref().map(|_| now),
            keda,
            wanted: replicas,
            next_pass: now + SYNC_PERIOD,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replicas asked for now.
    pub fn wanted(&self) -> u32 {
        self.wanted
    }

    /// The most it may ever ask for, unless it began with more.
    pub fn most_replicas(&self) -> u32 {
        let keda = self.keda.as_ref().map(Keda::spec);
        let fallback = keda.and_then(|spec| spec.fallback).map_or(0, |fallback| fallback.replicas);
        let paused = keda.and_then(|spec| spec.paused_replicas).unwrap_or(0);
        self.hpa.spec().max_replicas.max(fallback).max(paused)
    }

    /// When it looks next.
    pub fn next_wake(&self) -> Duration {
        self.next_poll.map_or(self.next_pass, |poll| poll.min(self.next_pass))
    }

    /// Looks, if it is time; says why it changed the number, if it did.
    pub fn tick(&mut self, now: Duration, store: &SampleStore, pods: &[Pod<'_>]) -> Option<String> {
        let before = self.wanted;
        let mut reason = None;
        if self.next_poll.is_some_and(|at| at <= now) {
            reason = self.poll(now, store);
        }
        if self.next_pass <= now {
            reason = self.pass(now, store, pods).or(reason);
        }
        (self.wanted != before).then_some(reason)?
    }

    fn poll(&mut self, now: Duration, store: &SampleStore) -> Option<String> {
        let keda = self.keda.as_mut()?;
        self.next_poll = Some(now + keda.spec().polling_interval);
        let (replicas, why) = keda.poll(now, self.wanted, store)?;
        self.wanted = replicas;
        Some(format!("KEDA: {why}"))
    }

    fn pass(&mut self, now: Duration, store: &SampleStore, pods: &[Pod<'_>]) -> Option<String> {
        self.next_pass = now + SYNC_PERIOD;
        let spec = self.keda.as_ref().map(Keda::spec);
        if spec.is_some_and(|spec| spec.is_paused || spec.paused_replicas.is_some()) {
            // KEDA deletes the HPA of a paused object.
            return None;
        }
        let (current, tolerances) = (self.wanted, self.tolerances());
        let (keda, sources) = (&mut self.keda, &self.pod_metrics);
        let propose = || {
            let ready = pods.iter().filter(|pod| pod.is_ready).count() as u32;
            let external = keda.iter_mut().flat_map(|keda| keda.metrics(now, current, ready, store));
            let external =
                external.map(|metric| of_external(&metric, current, pods.len() as u32, ready, tolerances));
            let of_pods = sources.iter().map(|source| of_pods(source, now, store, pods, current, tolerances));
            external.chain(of_pods).collect::<Vec<_>>()
        };
        let decision = self.hpa.pass(now, current, propose);
        self.wanted = decision.replicas;
        Some(format!("HPA: {}", decision.reason))
    }

    fn tolerances(&self) -> Tolerances {
        let default = Tolerances::default();
        let Some(behavior) = &self.hpa.spec().behavior else { return default };
        Tolerances {
            up: behavior.up.tolerance.unwrap_or(default.up),
            down: behavior.down.tolerance.unwrap_or(default.down),
        }
    }
}

fn of_external(metric: &External, current: u32, exist: u32, ready: u32, tolerances: Tolerances) -> Proposal {
    let (usage, target) = (metric.usage.clone()?, metric.target);
    Ok(match metric.metric_type {
        MetricType::AverageValue => replicas::average_value(usage, target, exist, tolerances),
        MetricType::Value => replicas::value(usage, target, current, ready, tolerances),
    })
}

fn of_pods(
    source: &PodMetricSource,
    now: Duration,
    store: &SampleStore,
    pods: &[Pod<'_>],
    current: u32,
    tolerances: Tolerances,
) -> Proposal {
    let (metric, target, missing) = match source {
        PodMetricSource::CpuUtilization { target } => (CPU_UTILIZATION, *target, target.max(100.0)),
        PodMetricSource::Pods { metric, target } => (metric.as_str(), *target, *target),
    };
    let newest = |pod: &Pod<'_>| {
        let mut series = store
            .named(metric)
            .filter(|(labels, _)| labels.get("instance").is_some_and(|target| target == pod.target));
        let last = series.next()?.1.back()?;
        (last.at + crate::promql::LOOKBACK > now).then_some(last.value)?
    };
    let usages: Vec<PodMetric> =
        pods.iter().map(|pod| PodMetric { ready: pod.is_ready, usage: newest(pod) }).collect();
    let proposal = replicas::of_pods(&usages, target, missing, current, tolerances);
    proposal.ok_or_else(|| format!("no ready pod has the metric {metric}"))
}
