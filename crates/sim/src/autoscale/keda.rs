//! KEDA's operator over the autoscaler that it makes (`pkg/scaling` of KEDA 2.20).

use std::collections::BTreeMap;
use std::time::Duration;

use super::PodCounts;
use super::hpa::{self, Limits, Memory, Target, Tolerances};
use super::manifest::{Fallback, FallbackBehavior, Manifest, Trigger, TriggerKind};
use super::promql::Value;
use super::samples::SampleStore;

/// A Deployment is to have so many replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaleTo {
    pub replicas: u32,
    /// Who said so and why.
    pub reason: String,
}

/// A trigger's value, or why it has none.
type Reading = Result<f64, String>;

/// An autoscaler with what it remembers.
#[derive(Clone, Debug)]
pub struct Autoscaler {
    manifest: Manifest,
    limits: Limits,
    memory: Memory,
    next_poll: Duration,
    next_sync: Duration,
    last_active: Option<Duration>,
    /// Of each trigger, how often in a row it failed.
    failures: Vec<u32>,
    /// The last complaint, so that each is made once.
    complaint: Option<String>,
}

impl Autoscaler {
    /// One that begins at time 0.
    pub fn new(manifest: Manifest) -> Self {
        let limits = Limits {
            // The autoscaler of a ScaledObject has at least one: zero is the operator's.
            min: manifest.min.max(1),
            max: manifest.max,
            behavior: manifest.behavior.clone(),
        };
        Self {
            limits,
            memory: Memory::default(),
            // The operator looks at once, and then at its interval (`startScaleLoop`).
            next_poll: if manifest.is_keda { Duration::ZERO } else { Duration::MAX },
            next_sync: hpa::SYNC_PERIOD,
            last_active: None,
            failures: vec![0; manifest.triggers.len()],
            complaint: None,
            manifest,
        }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// When [`Autoscaler::tick`] is to be called next.
    pub fn next_wake(&self) -> Duration {
        self.next_poll.min(self.next_sync)
    }

    /// Does what is due. `None` if the Deployment is to stay as it is.
    pub fn tick(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Option<ScaleTo> {
        let mut scaled = None;
        if now >= self.next_poll {
            self.next_poll = now + self.manifest.polling_interval;
            scaled = self.poll(now, samples, pods);
        }
        if now >= self.next_sync {
            self.next_sync = now + hpa::SYNC_PERIOD;
            if scaled.is_none() {
                scaled = self.sync(now, samples, pods);
            }
        }
        scaled.filter(|scaled| scaled.replicas != pods.wanted)
    }

    /// Why some trigger gives nothing, if it has begun or changed since the last call.
    pub fn new_complaint(&mut self, now: Duration, samples: &SampleStore) -> Option<String> {
        let failed = |trigger: &Trigger| match read(trigger, now, samples) {
            Some(Err(error)) => Some(format!("trigger {}: {error}", trigger.name)),
            Some(Ok(_)) | None => None,
        };
        let complaint = self.manifest.triggers.iter().find_map(failed);
        let is_new = complaint != self.complaint;
        self.complaint.clone_from(&complaint);
        complaint.filter(|_| is_new)
    }

    // ---- between none and one ----

    /// `RequestScale` of the executor.
    fn poll(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Option<ScaleTo> {
        let Manifest { min, idle, fallback, .. } = self.manifest;
        let (is_active, is_error, reason) = self.activity(now, samples);
        let to = |replicas: u32, why: &str| {
            Some(ScaleTo { replicas, reason: format!("KEDA: {} to {replicas}, {why}", pods.wanted) })
        };
        let current = pods.wanted;
        if is_active {
            self.last_active = Some(now);
            let is_idle = idle.is_some() && current < min;
            return if current == 0 || is_idle { to(min.max(1), &reason) } else { None };
        }
        match fallback {
            Some(fallback) if is_error && fallback.replicas > 0 => {
                return to(fallback_replicas(fallback, current), "a trigger fails, and there is a fallback");
            }
            _ if is_error => return None,
            _ => {}
        }
        let lowest = idle.unwrap_or(0);
        let may_sleep = idle.is_some_and(|idle| current > idle) || (current > 0 && min == 0);
        if may_sleep {
            let is_cool = match self.last_active {
                Some(at) => at + self.manifest.cooldown < now,
                None => self.manifest.initial_cooldown < now,
            };
            return if is_cool { to(lowest, "no trigger is active and the cooldown is over") } else { None };
        }
        if current < min && idle.is_none() { to(min, "fewer than minReplicaCount") } else { None }
    }

    /// Whether any trigger is active, whether any fails, and what is to be said of it.
    fn activity(&self, now: Duration, samples: &SampleStore) -> (bool, bool, String) {
        if self.manifest.modifiers.is_some() {
            return match self.composite(now, samples) {
                Ok((value, _, activation)) => {
                    (value > activation, false, format!("the formula is {}", short(value)))
                }
                Err(error) => (false, true, error),
            };
        }
        let (mut is_active, mut is_error, mut reason) = (false, false, String::new());
        for trigger in &self.manifest.triggers {
            match (&trigger.kind, read(trigger, now, samples)) {
                (TriggerKind::Prometheus { activation, .. }, Some(Ok(value))) if value > *activation => {
                    is_active = true;
                    reason = format!("trigger {} is {}, active", trigger.name, short(value));
                }
                (_, Some(Err(_))) => is_error = true,
                _ => {}
            }
        }
        (is_active, is_error, reason)
    }

    /// The formula's value, its target and its activation.
    fn composite(&self, now: Duration, samples: &SampleStore) -> Result<(f64, Target, f64), String> {
        let Some(modifiers) = &self.manifest.modifiers else { return Err("there is no formula".into()) };
        let mut values = BTreeMap::new();
        for trigger in &self.manifest.triggers {
            if let Some(value) = read(trigger, now, samples) {
                values.insert(trigger.name.clone(), value?);
            }
        }
        let value = modifiers.formula.value(&values).map_err(|error| error.to_string())?;
        Ok((value, modifiers.target, modifiers.activation))
    }

    // ---- between one and the most ----

    /// `reconcileAutoscaler` of the Horizontal Pod Autoscaler.
    fn sync(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Option<ScaleTo> {
        // At 0 it is disabled.
        if pods.wanted == 0 {
            return None;
        }
        let proposals = self.proposals(now, samples, pods);
        let invalid = proposals.iter().any(|(_, proposal)| proposal.is_none());
        let valid = proposals.iter().filter_map(|(text, proposal)| Some((text, (*proposal)?)));
        let best = valid.max_by_key(|(_, proposal)| *proposal);
        let out_of_bounds = pods.wanted > self.limits.max || pods.wanted < self.limits.min;
        let (text, proposal) = match best {
            // One that is not known might want more.
            Some((_, proposal)) if invalid && proposal < pods.wanted && !out_of_bounds => return None,
            Some((text, proposal)) => (text.clone(), proposal),
            None if out_of_bounds => ("out of bounds".to_owned(), pods.wanted),
            None => return None,
        };
        let replicas = self.memory.decide(now, pods.wanted, proposal, &self.limits);
        let limited = if replicas == proposal { String::new() } else { format!(", wants {proposal}") };
        Some(ScaleTo { replicas, reason: format!("HPA: {} to {replicas}, {text}{limited}", pods.wanted) })
    }

    /// What each metric asks for; `None` where it cannot be told.
    fn proposals(
        &mut self,
        now: Duration,
        samples: &SampleStore,
        pods: &PodCounts,
    ) -> Vec<(String, Option<u32>)> {
        if self.manifest.modifiers.is_some() {
            let reading = self.composite(now, samples);
            let (value, target) = match reading {
                Ok((value, target, _)) => (Ok(value), target),
                Err(error) => (Err(error), Target::AverageValue(1.0)),
            };
            return vec![self.proposal(0, "the formula", value, target, pods)];
        }
        let triggers = self.manifest.triggers.clone();
        let of_trigger = |(at, trigger): (usize, &Trigger)| match &trigger.kind {
            TriggerKind::Prometheus { target, .. } => {
                let reading = read(trigger, now, samples).unwrap_or(Ok(0.0));
                self.proposal(at, &trigger.name, reading, *target, pods)
            }
            TriggerKind::Cpu { utilization } => self.proposal(
                at,
                &trigger.name,
                Ok(mean(&pods.cpu_percent)),
                Target::Utilization(*utilization),
                pods,
            ),
        };
        triggers.iter().enumerate().map(of_trigger).collect()
    }

    fn proposal(
        &mut self,
        at: usize,
        name: &str,
        reading: Reading,
        target: Target,
        pods: &PodCounts,
    ) -> (String, Option<u32>) {
        let failures = &mut self.failures[at];
        *failures = if reading.is_err() { *failures + 1 } else { 0 };
        let tolerances = Tolerances::of(self.limits.behavior.as_ref());
        let fallback = self.manifest.fallback.filter(|fallback| *failures > fallback.failure_threshold);
        let usage = match (reading, fallback) {
            (Ok(usage), _) => usage,
            // KEDA makes up the value that gives so many replicas.
            (Err(_), Some(fallback)) => {
                return (format!("{name} fails"), Some(fallback_replicas(fallback, pods.wanted)));
            }
            (Err(error), None) => return (format!("{name}: {error}"), None),
        };
        let replicas = match target {
            Target::AverageValue(target) => {
                Some(hpa::per_pod_replicas(pods.existing, usage, target, tolerances))
            }
            Target::Value(target) => {
                Some(hpa::ratio_replicas(pods.wanted, pods.ready, usage, target, tolerances))
            }
            Target::Utilization(target) => {
                hpa::resource_replicas(pods.wanted, pods.existing, &pods.cpu_percent, target, tolerances)
            }
        };
        (format!("{name} is {}", short(usage)), replicas)
    }
}

fn fallback_replicas(fallback: Fallback, current: u32) -> u32 {
    match fallback.behavior {
        FallbackBehavior::Static => fallback.replicas,
        FallbackBehavior::CurrentReplicas => current,
        FallbackBehavior::CurrentReplicasIfHigher => current.max(fallback.replicas),
        FallbackBehavior::CurrentReplicasIfLower => current.min(fallback.replicas),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / (values.len() as f64).max(1.0)
}

fn short(value: f64) -> String {
    format!("{:.3}", value).trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `GetMetricsAndActivity` of the Prometheus scaler. `None` for a trigger that is not a query.
fn read(trigger: &Trigger, now: Duration, samples: &SampleStore) -> Option<Reading> {
    let TriggerKind::Prometheus { query, ignore_null_values, .. } = &trigger.kind else { return None };
    let value = match query.at(now, samples) {
        Err(error) => return Some(Err(error.to_string())),
        Ok(Value::Scalar(value)) => value,
        Ok(Value::Vector(vector)) => match vector.as_slice() {
            [] if *ignore_null_values => 0.0,
            [] => return Some(Err("the query has no element".into())),
            [one] => one.value,
            several => {
                return Some(Err(format!("the query has {} elements, and one is wanted", several.len())));
            }
        },
    };
    Some(match value {
        // It passes as a number and becomes 0 on its way to the autoscaler.
        nan if nan.is_nan() => Ok(0.0),
        infinite if infinite.is_infinite() && *ignore_null_values => Ok(0.0),
        infinite if infinite.is_infinite() => Err("the query is infinite".into()),
        value => Ok(value),
    })
}
