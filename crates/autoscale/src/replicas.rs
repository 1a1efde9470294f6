//! How many replicas one metric asks for.
//!
//! `pkg/controller/podautoscaler/replica_calculator.go`: `GetExternalPerPodMetricReplicas`,
//! `GetExternalMetricReplicas`, `getUsageRatioReplicaCount`, `calcPlainMetricReplicas`, `GetResourceReplicas`.

/// How far from 1 the ratio of usage to target may be in each direction before anything is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerances {
    pub up: f64,
    pub down: f64,
}

impl Default for Tolerances {
    /// `--horizontal-pod-autoscaler-tolerance`.
    fn default() -> Self {
        Self { up: 0.1, down: 0.1 }
    }
}

impl Tolerances {
    fn holds(self, ratio: f64) -> bool {
        (1.0 - self.down) <= ratio && ratio <= (1.0 + self.up)
    }
}

fn count(value: f64) -> u32 {
    // Not a number and anything below 0 become 0.
    value.ceil() as u32
}

/// `AverageValue` of an external metric: `ceil(usage / target)`, whatever runs now, unless that is near enough.
///
/// Usage and target in thousandths, as Kubernetes computes.
pub fn average_value(usage: i64, target: i64, replicas: u32, tolerances: Tolerances) -> u32 {
    let (usage, target) = (usage as f64, target as f64);
    if tolerances.holds(usage / (target * f64::from(replicas))) { replicas } else { count(usage / target) }
}

/// `Value`: the ratio times the READY pods. While pods start cold, the same ratio is applied to more and more.
pub fn value(usage: i64, target: i64, current: u32, ready: u32, tolerances: Tolerances) -> u32 {
    let ratio = usage as f64 / target as f64;
    if current == 0 {
        count(ratio)
    } else if tolerances.holds(ratio) {
        current
    } else {
        count(ratio * f64::from(ready))
    }
}

/// A pod as metrics of pods see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PodMetric {
    pub ready: bool,
    /// `None`: the pod has none.
    pub usage: Option<f64>,
}

/// A metric of each pod, or the utilisation of a resource. A pod without a metric counts as using all of its target
/// when that keeps from scaling down, and nothing when it keeps from scaling up; one that is not ready counts as using
/// nothing when scaling up. `None` if no ready pod has the metric.
///
/// `missing_usage` is what a pod without a metric counts as on the way down: the target, or for a resource 100 % if
/// that is more.
pub fn of_pods(
    pods: &[PodMetric],
    target: f64,
    missing_usage: f64,
    current: u32,
    tolerances: Tolerances,
) -> Option<u32> {
    let known: Vec<f64> = pods.iter().filter(|pod| pod.ready).filter_map(|pod| pod.usage).collect();
    let missing = pods.iter().filter(|pod| pod.ready && pod.usage.is_none()).count();
    let unready = pods.iter().filter(|pod| !pod.ready).count();
    if known.is_empty() {
        return None;
    }
    let sum: f64 = known.iter().sum();
    let ratio = sum / known.len() as f64 / target;
    let up_with_unready = unready > 0 && ratio > 1.0;
    if !up_with_unready && missing == 0 {
        let wanted = count(ratio * known.len() as f64);
        return Some(if tolerances.holds(ratio) { current } else { wanted });
    }
    let assumed = if ratio < 1.0 { missing as f64 * missing_usage } else { 0.0 };
    let counted = known.len() + missing + if up_with_unready { unready } else { 0 };
    let cautious = (sum + assumed) / counted as f64 / target;
    let turned = (ratio < 1.0 && cautious > 1.0) || (ratio > 1.0 && cautious < 1.0);
    if tolerances.holds(cautious) || turned {
        return Some(current);
    }
    let wanted = count(cautious * counted as f64);
    let backwards = (cautious < 1.0 && wanted > current) || (cautious > 1.0 && wanted < current);
    Some(if backwards { current } else { wanted })
}
