//! One pass of the HPA controller: several proposals become one number of replicas.
//!
//! `pkg/controller/podautoscaler/horizontal.go`: `reconcileAutoscaler`, `computeReplicasForMetrics`,
//! `normalizeDesiredReplicas`, `normalizeDesiredReplicasWithBehaviors`.

use std::time::Duration;

use super::behavior::{self, Behavior, Memory};

/// `--horizontal-pod-autoscaler-sync-period`.
pub const SYNC_PERIOD: Duration = Duration::from_secs(15);

/// Bounds and behavior.
#[derive(Clone, Debug, PartialEq)]
pub struct HpaSpec {
    pub min_replicas: u32,
    pub max_replicas: u32,
    pub behavior: Option<Behavior>,
}

/// What a metric asks for, or why it could not be read.
pub type Proposal = Result<u32, String>;

/// The controller and what it remembers.
#[derive(Clone, Debug)]
pub struct Hpa {
    spec: HpaSpec,
    memory: Memory,
}

/// What a pass decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub replicas: u32,
    pub reason: String,
}

impl Hpa {
    pub fn new(spec: HpaSpec) -> Self {
        Self { spec, memory: Memory::default() }
    }

    pub fn spec(&self) -> &HpaSpec {
        &self.spec
    }

    /// One pass at that time, with `current` replicas asked for so far.
    pub fn pass(&mut self, now: Duration, current: u32, propose: impl FnOnce() -> Vec<Proposal>) -> Decision {
        self.memory.begin(now, current);
        let (min, max) = (self.spec.min_replicas, self.spec.max_replicas);
        let decision = |replicas, reason: &str| Decision { replicas, reason: reason.to_owned() };
        let decided = if current == 0 && min != 0 {
            return decision(0, "scaling is disabled at zero replicas");
        } else if current > max {
            decision(max, "more than maxReplicas")
        } else if current < min {
            decision(min, "fewer than minReplicas")
        } else {
            match largest(&propose(), current) {
                Ok(desired) => {
                    let normalized = self.normalize(now, current, desired);
                    decision(normalized, &format!("metrics ask for {desired}"))
                }
                Err(reason) => return Decision { replicas: current, reason },
            }
        };
        if let Some(behavior) = &self.spec.behavior {
            self.memory.changed(now, current, decided.replicas, behavior);
        }
        decided
    }

    fn normalize(&mut self, now: Duration, current: u32, desired: u32) -> u32 {
        let (min, max) = (self.spec.min_replicas, self.spec.max_replicas);
        match &self.spec.behavior {
            Some(behavior) => {
                let (up, down) = (behavior.up.stabilization, behavior.down.stabilization);
                let stable = self.memory.stabilize(now, current, desired, up, down);
                self.memory.limit(now, current, stable, (min, max), behavior)
            }
            None => {
                let stable = self.memory.stabilize_down(now, desired);
                stable.min(max.min(behavior::default_up_limit(current))).max(min)
            }
        }
    }
}

/// The largest proposal. A metric that cannot be read forbids to scale down, and all of them forbid anything.
fn largest(proposals: &[Proposal], current: u32) -> Result<u32, String> {
    let error = proposals.iter().find_map(|proposal| proposal.as_ref().err());
    let most = proposals.iter().filter_map(|proposal| proposal.as_ref().ok()).max();
    match (most, error) {
        (Some(most), None) => Ok(*most),
        (Some(most), Some(_)) if *most >= current => Ok(*most),
        (_, Some(error)) => Err(error.clone()),
        (None, None) => Err("there is no metric".to_owned()),
    }
}
