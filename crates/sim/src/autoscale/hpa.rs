//! The Horizontal Pod Autoscaler (`pkg/controller/podautoscaler` of Kubernetes 1.36).

use std::time::Duration;

use super::{CpuPod, CpuUsage};

/// `--horizontal-pod-autoscaler-sync-period`.
pub const SYNC_PERIOD: Duration = Duration::from_secs(15);
/// `--horizontal-pod-autoscaler-tolerance`.
pub const TOLERANCE: f64 = 0.1;
/// `--horizontal-pod-autoscaler-downscale-stabilization`, and the default of `behavior.scaleDown`.
pub const DOWNSCALE_STABILIZATION: Duration = Duration::from_secs(300);
/// `--horizontal-pod-autoscaler-cpu-initialization-period`: so long a pod that is not ready does not count, nor one whose
/// usage was read over a time in which it was not.
pub const CPU_INITIALIZATION: Duration = Duration::from_secs(300);
/// `--horizontal-pod-autoscaler-initial-readiness-delay`: after that time, a change of its readiness was not the first.
pub const INITIAL_READINESS_DELAY: Duration = Duration::from_secs(30);

/// How a metric becomes replicas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// So much for each pod, whatever runs now.
    AverageValue(f64),
    /// The metric itself; what is more is a ratio by which the ready pods are multiplied.
    Value(f64),
}

/// How fast the number may change in one direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    pub stabilization: Duration,
    pub select: Select,
    pub policies: Vec<Policy>,
    /// `None`: [`TOLERANCE`].
    pub tolerance: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Select {
    #[default]
    Max,
    Min,
    Disabled,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    pub kind: PolicyKind,
    pub value: u32,
    pub period: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    Pods,
    Percent,
}

impl Rules {
    /// Of `behavior.scaleUp` where nothing is said (`pkg/apis/autoscaling/v2/defaults.go`).
    pub fn default_up() -> Self {
        let period = Duration::from_secs(15);
        let policies = vec![
            Policy { kind: PolicyKind::Pods, value: 4, period },
            Policy { kind: PolicyKind::Percent, value: 100, period },
        ];
        Self { stabilization: Duration::ZERO, select: Select::Max, policies, tolerance: None }
    }

    /// Of `behavior.scaleDown`.
    pub fn default_down() -> Self {
        let policies =
            vec![Policy { kind: PolicyKind::Percent, value: 100, period: Duration::from_secs(15) }];
        Self { stabilization: DOWNSCALE_STABILIZATION, select: Select::Max, policies, tolerance: None }
    }
}

/// Up and down. Without it, the rules from before there were any hold: double or 4 at once up, stabilized down.
#[derive(Clone, Debug, PartialEq)]
pub struct Behavior {
    pub up: Rules,
    pub down: Rules,
}

impl Default for Behavior {
    fn default() -> Self {
        Self { up: Rules::default_up(), down: Rules::default_down() }
    }
}

/// How far a ratio may be off before anything is done.
#[derive(Clone, Copy, Debug)]
pub struct Tolerances {
    pub up: f64,
    pub down: f64,
}

impl Tolerances {
    pub fn of(behavior: Option<&Behavior>) -> Self {
        let of = |rules: fn(&Behavior) -> &Rules| {
            behavior.and_then(|behavior| rules(behavior).tolerance).unwrap_or(TOLERANCE)
        };
        Self { up: of(|behavior| &behavior.up), down: of(|behavior| &behavior.down) }
    }

    /// `Tolerances.isWithin`.
    pub fn holds(self, ratio: f64) -> bool {
        (1.0 - self.down) <= ratio && ratio <= (1.0 + self.up)
    }
}

/// Replicas from more than any number, or none, of pods.
fn ceil(value: f64) -> u32 {
    // As Go converts on amd64 after a check of its own would be: nothing sensible is that large.
    value.ceil().clamp(0.0, f64::from(i32::MAX)) as u32
}

/// In whole thousandths, as the metric APIs carry a value and its target (`GenerateMetricInMili` and
/// `GetMetricTargetMili` of KEDA; prometheus-adapter does the same). What is not a number is 0.
pub fn thousandths(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { (value * 1000.0).trunc() }
}

/// `GetExternalPerPodMetricReplicas`: of a sum and what each pod may have of it.
pub fn per_pod_replicas(existing: u32, usage: f64, target: f64, tolerances: Tolerances) -> u32 {
    let (usage, target) = (thousandths(usage), thousandths(target));
    let ratio = usage / (target * f64::from(existing));
    if tolerances.holds(ratio) { existing } else { ceil(usage / target) }
}

/// `GetExternalMetricReplicas` with `getUsageRatioReplicaCount`: of a ratio, which multiplies the ready pods.
pub fn ratio_replicas(current: u32, ready: u32, usage: f64, target: f64, tolerances: Tolerances) -> u32 {
    let ratio = thousandths(usage) / thousandths(target);
    match current {
        0 => ceil(ratio),
        _ if tolerances.holds(ratio) => current,
        _ => ceil(ratio * f64::from(ready)),
    }
}

/// The CPU of pods, in percent of what they ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CpuGroups {
    /// Of each pod that counts.
    pub percents: Vec<f64>,
    /// Pods that have not begun, or are not ready.
    pub unready: u32,
    /// Pods that run and have no usage.
    pub missing: u32,
}

/// `groupPods` of the CPU.
pub fn group_pods(now: Duration, pods: &[CpuPod]) -> CpuGroups {
    let mut groups = CpuGroups::default();
    for pod in pods {
        match pod.usage {
            _ if !pod.is_running => groups.unready += 1,
            None => groups.missing += 1,
            Some(usage) if is_unready(now, pod, usage) => groups.unready += 1,
            Some(usage) => groups.percents.push(usage.percent),
        }
    }
    groups
}

fn is_unready(now: Duration, pod: &CpuPod, usage: CpuUsage) -> bool {
    match pod.began {
        None => true,
        Some(began) if began + CPU_INITIALIZATION > now => {
            !pod.is_ready || usage.at < pod.readiness_changed + usage.window
        }
        Some(began) => !pod.is_ready && began + INITIAL_READINESS_DELAY > pod.readiness_changed,
    }
}

/// `GetResourceReplicas` of the CPU. `None` without any value.
pub fn resource_replicas(current: u32, cpu: &CpuGroups, target: f64, tolerances: Tolerances) -> Option<u32> {
    let CpuGroups { percents, unready, missing } = cpu;
    let without = Without { unready: *unready, missing: *missing, assumed: target.max(100.0) };
    each_pod(current, percents, without, target, tolerances)
}

/// `GetMetricReplicas` (Pods metrics): of a value of each pod. `pending`: pods whose container has not begun; `missing`:
/// those that run and have no value; `target`: in thousandths, as its Quantity says it. `None` without any value.
pub fn pods_replicas(
    current: u32,
    values: &[f64],
    pending: u32,
    missing: u32,
    target: f64,
    tolerances: Tolerances,
) -> Option<u32> {
    let values: Vec<f64> = values.iter().copied().map(thousandths).collect();
    each_pod(current, &values, Without { unready: pending, missing, assumed: target }, target, tolerances)
}

/// Pods that have no value.
#[derive(Clone, Copy)]
struct Without {
    /// Count as idle when it goes up, and not at all when it goes down.
    unready: u32,
    /// Count as idle when it goes up, and as using so much when it goes down.
    missing: u32,
    assumed: f64,
}

/// `calcPlainMetricReplicas`, and `GetResourceReplicas` after it. Means are whole numbers there.
fn each_pod(
    current: u32,
    values: &[f64],
    without: Without,
    target: f64,
    tolerances: Tolerances,
) -> Option<u32> {
    if values.is_empty() {
        return None;
    }
    let sum: f64 = values.iter().sum();
    let known = values.len() as f64;
    let ratio_of = |sum: f64, pods: f64| (sum / pods).trunc() / target;
    let ratio = ratio_of(sum, known);
    let unready = if ratio > 1.0 { without.unready } else { 0 };
    // At exactly the target nothing is known of what a missing pod would change.
    if unready == 0 && (without.missing == 0 || ratio == 1.0) {
        return Some(if tolerances.holds(ratio) { current } else { ceil(ratio * known) });
    }
    let missing = f64::from(without.missing);
    let assumed = if ratio < 1.0 { missing * without.assumed } else { 0.0 };
    let all = known + f64::from(unready) + missing;
    let rebalanced = ratio_of(sum + assumed, all);
    let turned = (ratio < 1.0 && rebalanced > 1.0) || (ratio > 1.0 && rebalanced < 1.0);
    if tolerances.holds(rebalanced) || turned {
        return Some(current);
    }
    let replicas = ceil(rebalanced * all);
    let backwards = (rebalanced < 1.0 && replicas > current) || (rebalanced > 1.0 && replicas < current);
    Some(if backwards { current } else { replicas })
}

/// What the controller remembers of one autoscaler.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What was recommended, before it was stabilized.
    recommendations: Vec<(Duration, u32)>,
    ups: Vec<(Duration, u32)>,
    downs: Vec<(Duration, u32)>,
}

/// Bounds and rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub min: u32,
    pub max: u32,
    pub behavior: Option<Behavior>,
}

impl Memory {
    /// From what the metrics ask for to what is asked of the Deployment, which has `current`; and remembers it
    /// (`reconcileAutoscaler` from the proposal on).
    pub fn decide(&mut self, now: Duration, current: u32, proposal: u32, limits: &Limits) -> u32 {
        // What runs at the first pass counts as recommended (`recordInitialRecommendation`).
        if self.recommendations.is_empty() {
            self.recommendations.push((now, current));
        }
        let desired = match &limits.behavior {
            _ if current > limits.max => limits.max,
            _ if current < limits.min => limits.min,
            None => self.by_default(now, current, proposal, limits),
            Some(behavior) => self.by_behavior(now, current, proposal, limits, behavior),
        };
        match desired {
            more if more > current => self.ups.push((now, more - current)),
            fewer if fewer < current => self.downs.push((now, current - fewer)),
            _ => {}
        }
        self.forget(now);
        desired
    }

    /// Longer than any window or period that may be set.
    fn forget(&mut self, now: Duration) {
        const LONGEST: Duration = Duration::from_secs(3600);
        for list in [&mut self.recommendations, &mut self.ups, &mut self.downs] {
            list.retain(|(at, _)| *at + LONGEST >= now);
        }
    }

    /// `normalizeDesiredReplicas`.
    fn by_default(&mut self, now: Duration, current: u32, proposal: u32, limits: &Limits) -> u32 {
        let highest = self.recommended(now, DOWNSCALE_STABILIZATION).max().unwrap_or(0);
        self.recommendations.push((now, proposal));
        let stabilized = proposal.max(highest);
        let most = limits.max.min((2 * current).max(4));
        stabilized.max(limits.min).min(most)
    }

    fn recommended(&self, now: Duration, window: Duration) -> impl Iterator<Item = u32> {
        let within = move |(at, _): &&(Duration, u32)| *at + window > now;
        self.recommendations.iter().filter(within).map(|(_, replicas)| *replicas)
    }

    /// `normalizeDesiredReplicasWithBehaviors`.
    fn by_behavior(
        &mut self,
        now: Duration,
        current: u32,
        proposal: u32,
        limits: &Limits,
        behavior: &Behavior,
    ) -> u32 {
        let up = self.recommended(now, behavior.up.stabilization).fold(proposal, u32::min);
        let down = self.recommended(now, behavior.down.stabilization).fold(proposal, u32::max);
        self.recommendations.push((now, proposal));
        let desired = current.max(up).min(down);
        if desired > current {
            let most = self.most(now, current, &behavior.up).max(current).min(limits.max);
            desired.min(most)
        } else if desired < current {
            let least = self.least(now, current, &behavior.down).min(current).max(limits.min);
            desired.max(least)
        } else {
            desired
        }
    }

    fn changed(events: &[(Duration, u32)], now: Duration, period: Duration) -> i64 {
        let within = events.iter().filter(|(at, _)| *at + period > now);
        within.map(|(_, replicas)| i64::from(*replicas)).sum()
    }

    /// Replicas that there were a period ago.
    fn at_period_start(&self, now: Duration, current: u32, period: Duration) -> i64 {
        i64::from(current) - Self::changed(&self.ups, now, period) + Self::changed(&self.downs, now, period)
    }

    /// `calculateScaleUpLimitWithScalingRules`.
    fn most(&self, now: Duration, current: u32, rules: &Rules) -> u32 {
        let proposals = rules.policies.iter().map(|policy| {
            let start = self.at_period_start(now, current, policy.period);
            match policy.kind {
                PolicyKind::Pods => start + i64::from(policy.value),
                PolicyKind::Percent => (start as f64 * (1.0 + f64::from(policy.value) / 100.0)).ceil() as i64,
            }
        });
        selected(rules.select, current, proposals.clone().max(), proposals.min())
    }

    /// `calculateScaleDownLimitWithBehaviors`.
    fn least(&self, now: Duration, current: u32, rules: &Rules) -> u32 {
        let proposals = rules.policies.iter().map(|policy| {
            let start = self.at_period_start(now, current, policy.period);
            match policy.kind {
                PolicyKind::Pods => start - i64::from(policy.value),
                PolicyKind::Percent => (start as f64 * (1.0 - f64::from(policy.value) / 100.0)) as i64,
            }
        });
        selected(rules.select, current, proposals.clone().min(), proposals.max())
    }
}

/// The policy that changes most, or least, or none.
fn selected(select: Select, current: u32, most_change: Option<i64>, least_change: Option<i64>) -> u32 {
    let limit = match select {
        Select::Max => most_change,
        Select::Min => least_change,
        Select::Disabled => None,
    };
    limit.map_or(current, |limit| limit.clamp(0, i64::from(i32::MAX)) as u32)
}
