//! Who says how many replicas there are to be.

use std::time::Duration;

use servelab_sim::autoscale::{Autoscaler, CpuPod, Manifest, ManifestError, PodCounts};

use crate::metrics_server::MetricsServer;
use crate::pods::{Phase, Pod, PodId, Pods, Stage};
use crate::scrape::{Prometheus, target};

/// Manifests that come with the program: the good ones, and the usual mistakes.
const PRESETS: [(&str, &str); 9] = [
    ("queue", include_str!("../data/scalers/queue.yaml")),
    ("concurrency", include_str!("../data/scalers/concurrency.yaml")),
    ("from-zero", include_str!("../data/scalers/from-zero.yaml")),
    ("kv-use", include_str!("../data/scalers/kv-use.yaml")),
    ("ttft", include_str!("../data/scalers/ttft.yaml")),
    ("gpu-utilisation", include_str!("../data/scalers/gpu-utilisation.yaml")),
    ("cpu", include_str!("../data/scalers/cpu.yaml")),
    ("overshoot", include_str!("../data/scalers/overshoot.yaml")),
    ("never-wakes", include_str!("../data/scalers/never-wakes.yaml")),
];

/// The names of the manifests that come with the program.
pub fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The text of one of them.
pub fn preset(name: &str) -> Option<&'static str> {
    PRESETS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// The autoscaler of a run.
pub struct Scaler {
    name: String,
    wanted: u32,
    autoscaler: Option<Autoscaler>,
}

impl Scaler {
    /// None: the fleet is as large as it is.
    pub fn fixed(replicas: u32) -> Self {
        Self { name: format!("{replicas} replicas"), wanted: replicas, autoscaler: None }
    }

    /// What a manifest says, from so many replicas on. `name` is how it is shown.
    pub fn manifest(name: impl Into<String>, manifest: Manifest, initial: u32) -> Self {
        Self { name: name.into(), wanted: initial, autoscaler: Some(Autoscaler::new(manifest)) }
    }

    /// A manifest that comes with the program.
    ///
    /// # Errors
    /// None with the presets, which a test reads.
    pub fn preset(name: &str, initial: u32) -> Result<Self, ManifestError> {
        let text = preset(name).ok_or_else(|| ManifestError::Kind(name.to_owned()))?;
        Ok(Self::manifest(name, Manifest::parse(text)?, initial))
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
        self.autoscaler.as_ref().map_or(0, |autoscaler| autoscaler.manifest().max).max(self.wanted)
    }

    /// All that names the metrics it looks at.
    pub fn queries(&self) -> String {
        let queries = self.autoscaler.iter().flat_map(|autoscaler| autoscaler.manifest().queries());
        queries.collect::<Vec<_>>().join("\n")
    }

    /// Whether it looks at the CPU.
    pub fn reads_cpu(&self) -> bool {
        self.autoscaler.as_ref().is_some_and(Autoscaler::reads_cpu)
    }

    /// When it wants to look next.
    pub fn next_wake(&self) -> Option<Duration> {
        self.autoscaler.as_ref().map(Autoscaler::next_wake)
    }

    /// Looks, and says what it changed its mind about, or what it cannot see.
    pub fn tick(
        &mut self,
        now: Duration,
        prometheus: &Prometheus,
        metrics_server: &MetricsServer,
        pods: &Pods,
    ) -> Vec<String> {
        let Some(autoscaler) = &mut self.autoscaler else { return Vec::new() };
        let mut counts = pod_counts(self.wanted, pods);
        if autoscaler.reads_cpu() {
            counts.cpu = cpu_pods(metrics_server, pods);
        }
        let scaled = autoscaler.tick(now, &prometheus.samples, &counts);
        let mut said: Vec<String> = autoscaler.new_complaint(now, &prometheus.samples).into_iter().collect();
        if let Some(scaled) = scaled {
            self.wanted = scaled.replicas;
            said.push(scaled.reason);
        }
        said
    }
}

fn pod_counts(wanted: u32, pods: &Pods) -> PodCounts {
    let counts = pods.counts();
    let alive = || pods.alive.iter().map(|id| (*id, &pods.pods[*id]));
    PodCounts {
        wanted,
        existing: counts.wanted(),
        ready: counts.ready,
        running: alive().filter(|(_, pod)| is_running(pod)).map(|(id, _)| target(id)).collect(),
        cpu: Vec::new(),
    }
}

/// Those that are not going.
fn cpu_pods(metrics_server: &MetricsServer, pods: &Pods) -> Vec<CpuPod> {
    let alive = pods.alive.iter().map(|id| (*id, &pods.pods[*id]));
    let staying = alive.filter(|(_, pod)| pod.phase != Phase::Draining);
    let of = |(id, pod): (PodId, &Pod)| CpuPod {
        began: pod.began,
        is_running: is_running(pod),
        is_ready: pod.phase == Phase::Ready,
        readiness_changed: pod.readiness_changed,
        usage: metrics_server.usage(id),
    };
    staying.map(of).collect()
}

/// Whether its container has begun, and it is not going.
fn is_running(pod: &Pod) -> bool {
    matches!(pod.phase, Phase::Starting(Stage::Load | Stage::WarmUp) | Phase::Ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_can_be_read() {
        for name in presets() {
            let scaler = Scaler::preset(name, 1).unwrap();
            assert!(scaler.next_wake().is_some() && scaler.most_replicas() > 1, "{name}");
        }
        assert!(Scaler::preset("none", 1).is_err());
    }
}
