//! How fast the HPA follows what its metrics ask for: stabilisation windows and scaling policies.
//!
//! `pkg/controller/podautoscaler/horizontal.go`: `stabilizeRecommendationWithBehaviors`,
//! `convertDesiredReplicasWithBehaviorRate`, `calculateScaleUpLimitWithScalingRules`,
//! `calculateScaleDownLimitWithBehaviors`, `getReplicasChangePerPeriod`; defaults from
//! `pkg/apis/autoscaling/v2/defaults.go`.

use std::time::Duration;

/// Of a policy's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyType {
    Pods,
    Percent,
}

/// How much may change within a period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub kind: PolicyType,
    pub value: u32,
    pub period: Duration,
}

/// Which of several policies holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Select {
    #[default]
    Max,
    Min,
    Disabled,
}

/// The rules of one direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    pub stabilization: Duration,
    pub policies: Vec<Policy>,
    pub select: Select,
    /// Of the ratio of usage to target; `None` takes the controller's 10 %.
    pub tolerance: Option<f64>,
}

/// Both directions.
#[derive(Clone, Debug, PartialEq)]
pub struct Behavior {
    pub up: Rules,
    pub down: Rules,
}

const PERIOD: Duration = Duration::from_secs(15);
/// `--horizontal-pod-autoscaler-downscale-stabilization` of the controller manager.
pub const DOWNSCALE_STABILIZATION: Duration = Duration::from_secs(300);

impl Rules {
    /// Twice as many or four more in 15 s, whichever is more; at once.
    pub fn default_up() -> Self {
        Self {
            stabilization: Duration::ZERO,
            policies: vec![
                Policy { kind: PolicyType::Pods, value: 4, period: PERIOD },
                Policy { kind: PolicyType::Percent, value: 100, period: PERIOD },
            ],
            select: Select::Max,
            tolerance: None,
        }
    }

    /// All in 15 s, after five minutes in which no more were wanted.
    pub fn default_down() -> Self {
        Self {
            stabilization: DOWNSCALE_STABILIZATION,
            policies: vec![Policy { kind: PolicyType::Percent, value: 100, period: PERIOD }],
            select: Select::Max,
            tolerance: None,
        }
    }
}

/// Something with a time: a recommendation, or a change of that many replicas.
type Timed = (Duration, u32);

/// What the controller remembers of one autoscaler.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    recommendations: Vec<Timed>,
    ups: Vec<Timed>,
    downs: Vec<Timed>,
}

/// Within the last `window`. The controller's clock never stands still between two passes, so that an entry as old as
/// the window is outside; `now` of a pass that wrote it counts as inside.
fn within(entries: &[Timed], now: Duration, window: Duration) -> impl Iterator<Item = u32> {
    let inside = move |at: Duration| now.saturating_sub(at) < window;
    entries.iter().filter(move |(at, _)| inside(*at)).map(|(_, value)| *value)
}

impl Memory {
    /// The number of replicas at the first pass is a recommendation too.
    pub fn begin(&mut self, now: Duration, current: u32) {
        if self.recommendations.is_empty() {
            self.recommendations.push((now, current));
        }
    }

    /// Holds `desired` back: up no higher than the least, down no lower than the most that was recommended within the
    /// direction's window. Remembers `desired`.
    pub fn stabilize(
        &mut self,
        now: Duration,
        current: u32,
        desired: u32,
        up: Duration,
        down: Duration,
    ) -> u32 {
        let least = within(&self.recommendations, now, up).fold(desired, u32::min);
        let most = within(&self.recommendations, now, down).fold(desired, u32::max);
        self.remember(now, desired, up.max(down));
        // Not `clamp`: the limits may cross, and then the second one holds, as in the source.
        current.max(least).min(most)
    }

    /// For an HPA without behavior: only scaling down is stabilised (`stabilizeRecommendation`).
    pub fn stabilize_down(&mut self, now: Duration, desired: u32) -> u32 {
        let most = within(&self.recommendations, now, DOWNSCALE_STABILIZATION).fold(desired, u32::max);
        self.remember(now, desired, DOWNSCALE_STABILIZATION);
        most
    }

    fn remember(&mut self, now: Duration, desired: u32, window: Duration) {
        self.recommendations.retain(|(at, _)| now.saturating_sub(*at) < window);
        self.recommendations.push((now, desired));
    }

    /// The replicas were changed: it counts against the policies' periods.
    pub fn changed(&mut self, now: Duration, from: u32, to: u32, behavior: &Behavior) {
        let longest = |rules: &Rules| rules.policies.iter().map(|policy| policy.period).max();
        let forget = |entries: &mut Vec<Timed>, rules: &Rules| {
            let longest = longest(rules).unwrap_or_default();
            entries.retain(|(at, _)| now.saturating_sub(*at) < longest);
        };
        forget(&mut self.ups, &behavior.up);
        forget(&mut self.downs, &behavior.down);
        if to > from {
            self.ups.push((now, to - from));
        } else if to < from {
            self.downs.push((now, from - to));
        }
    }

    /// `desired`, as far as policies and bounds let it.
    pub fn limit(
        &self,
        now: Duration,
        current: u32,
        desired: u32,
        bounds: (u32, u32),
        behavior: &Behavior,
    ) -> u32 {
        let (min, max) = bounds;
        if desired > current {
            let limit = self.up_limit(now, current, &behavior.up).max(current);
            desired.min(max.min(limit))
        } else if desired < current {
            let limit = self.down_limit(now, current, &behavior.down).min(current);
            desired.max(min.max(limit))
        } else {
            desired
        }
    }

    /// Replicas at the beginning of the period, had nothing changed within it.
    fn at_period_start(&self, now: Duration, current: u32, period: Duration) -> f64 {
        let added: u32 = within(&self.ups, now, period).sum();
        let removed: u32 = within(&self.downs, now, period).sum();
        f64::from(current) - f64::from(added) + f64::from(removed)
    }

    fn up_limit(&self, now: Duration, current: u32, rules: &Rules) -> u32 {
        let proposal = |policy: &Policy| {
            let start = self.at_period_start(now, current, policy.period);
            match policy.kind {
                PolicyType::Pods => start + f64::from(policy.value),
                // Rounded up: else a small share of a small number would never add one.
                PolicyType::Percent => (start * (1.0 + f64::from(policy.value) / 100.0)).ceil(),
            }
        };
        let proposals = rules.policies.iter().map(proposal);
        let limit = match rules.select {
            Select::Disabled => return current,
            Select::Max => proposals.fold(f64::NEG_INFINITY, f64::max),
            Select::Min => proposals.fold(f64::INFINITY, f64::min),
        };
        limit as u32
    }

    fn down_limit(&self, now: Duration, current: u32, rules: &Rules) -> u32 {
        let proposal = |policy: &Policy| {
            let start = self.at_period_start(now, current, policy.period);
            match policy.kind {
                PolicyType::Pods => start - f64::from(policy.value),
                PolicyType::Percent => (start * (1.0 - f64::from(policy.value) / 100.0)).trunc(),
            }
        };
        let proposals = rules.policies.iter().map(proposal);
        let limit = match rules.select {
            Select::Disabled => return current,
            // The largest change leaves the fewest.
            Select::Max => proposals.fold(f64::INFINITY, f64::min),
            Select::Min => proposals.fold(f64::NEG_INFINITY, f64::max),
        };
        limit as u32
    }
}

/// Without behavior: twice as many or four, whichever is more (`calculateScaleUpLimit`).
pub fn default_up_limit(current: u32) -> u32 {
    current.saturating_mul(2).max(4)
}
