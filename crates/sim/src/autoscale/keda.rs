//! KEDA's operator over the autoscaler that it makes (`pkg/scaling` of KEDA 2.20).

use std::collections::BTreeMap;
use std::time::Duration;

use super::PodCounts;
use super::hpa::{self, Limits, Memory, Target, Tolerances};
use super::manifest::{Fallback, FallbackBehavior, Manifest, Modifiers, Trigger, TriggerKind};
use super::promql::{Element, Query, Value};
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

/// What is to be said of a metric, and the replicas that it asks for; `None` where that cannot be told.
type Proposal = (String, Option<u32>);

/// Of each trigger that is a query.
type Readings = Vec<Option<Reading>>;

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
    /// Of each trigger, what the operator saw when it looked last.
    seen: Readings,
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
            seen: vec![None; manifest.triggers.len()],
            complaint: None,
            manifest,
        }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether it looks at [`PodCounts::cpu`].
    pub fn reads_cpu(&self) -> bool {
        self.manifest.triggers.iter().any(|trigger| matches!(trigger.kind, TriggerKind::Cpu { .. }))
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
        let failed = |trigger: &Trigger| {
            let error = match &trigger.kind {
                TriggerKind::Pods { query, .. } => pod_values(query, now, samples).err(),
                _ => read(trigger, now, samples).and_then(Reading::err),
            };
            error.map(|error| format!("trigger {}: {error}", trigger.name))
        };
        let complaint = self.manifest.triggers.iter().find_map(failed);
        let is_new = complaint != self.complaint;
        self.complaint.clone_from(&complaint);
        complaint.filter(|_| is_new)
    }

    fn readings(&self, now: Duration, samples: &SampleStore) -> Readings {
        self.manifest.triggers.iter().map(|trigger| read(trigger, now, samples)).collect()
    }

    /// What the autoscaler is told: of a cached trigger what the operator saw, if it has looked
    /// (`getScaledObjectMetricsRaw`).
    fn told(&self, now: Duration, samples: &SampleStore) -> Readings {
        let of = |(trigger, seen): (&Trigger, &Option<Reading>)| match seen {
            Some(seen) if trigger.is_cached => Some(seen.clone()),
            _ => read(trigger, now, samples),
        };
        self.manifest.triggers.iter().zip(&self.seen).map(of).collect()
    }

    // ---- between none and one ----

    /// `RequestScale` of the executor.
    fn poll(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Option<ScaleTo> {
        let Manifest { min, idle, fallback, annotations, .. } = self.manifest;
        let to = |replicas: u32, why: &str| {
            Some(ScaleTo { replicas, reason: format!("KEDA: {} to {replicas}, {why}", pods.wanted) })
        };
        let current = pods.wanted;
        if annotations.is_paused {
            return annotations.paused_replicas.and_then(|replicas| to(replicas, "paused there"));
        }
        self.seen = self.readings(now, samples);
        let (is_active, is_error, reason) = self.activity();
        if is_active {
            self.last_active = Some(now);
            let is_asleep = current == 0 || (idle.is_some() && current < min);
            let may_wake = is_asleep && !annotations.pauses_scale_out;
            return if may_wake { to(min.max(1), &reason) } else { None };
        }
        match fallback {
            Some(fallback) if is_error && fallback.replicas > 0 => {
                return to(fallback_replicas(fallback, current), "a trigger fails, and there is a fallback");
            }
            _ if is_error => return None,
            _ => {}
        }
        let lowest = idle.unwrap_or(0);
        let is_awake = idle.is_some_and(|idle| current > idle) || (current > 0 && min == 0);
        if is_awake && annotations.pauses_scale_in {
            return None;
        }
        if is_awake {
            let is_cool = match self.last_active {
                Some(at) => at + self.manifest.cooldown < now,
                None => self.manifest.initial_cooldown < now,
            };
            return if is_cool { to(lowest, "no trigger is active and the cooldown is over") } else { None };
        }
        if current < min && idle.is_none() { to(min, "fewer than minReplicaCount") } else { None }
    }

    /// Whether any trigger is active, whether any fails, and what is to be said of it.
    fn activity(&self) -> (bool, bool, String) {
        let (is_active, is_error, reason) = self.activity_of_triggers();
        if self.manifest.annotations.forces_activation && !is_active {
            return (true, is_error, "activation is forced by an annotation".to_owned());
        }
        (is_active, is_error, reason)
    }

    fn activity_of_triggers(&self) -> (bool, bool, String) {
        if let Some(modifiers) = &self.manifest.modifiers {
            return match self.composite(modifiers, &self.seen) {
                Ok(value) => {
                    (value > modifiers.activation, false, format!("the formula is {}", short(value)))
                }
                Err(error) => (false, true, error),
            };
        }
        let (mut is_active, mut is_error, mut reason) = (false, false, String::new());
        for (trigger, seen) in self.manifest.triggers.iter().zip(&self.seen) {
            match (&trigger.kind, seen) {
                (TriggerKind::Prometheus { activation, .. }, Some(Ok(value))) if value > activation => {
                    is_active = true;
                    reason = format!("trigger {} is {}, active", trigger.name, short(*value));
                }
                (_, Some(Err(_))) => is_error = true,
                _ => {}
            }
        }
        (is_active, is_error, reason)
    }

    /// The formula's value (`calculateScalingModifiersFormula`): values come and go in thousandths.
    fn composite(&self, modifiers: &Modifiers, readings: &Readings) -> Reading {
        let mut values = BTreeMap::new();
        for (trigger, reading) in self.manifest.triggers.iter().zip(readings) {
            if let Some(reading) = reading {
                values.insert(trigger.name.clone(), hpa::thousandths(reading.clone()?) / 1000.0);
            }
        }
        let value = modifiers.formula.value(&values).map_err(|error| error.to_string())?;
        Ok(hpa::thousandths(value) / 1000.0)
    }

    // ---- between one and the most ----

    /// `reconcileAutoscaler` of the Horizontal Pod Autoscaler.
    fn sync(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Option<ScaleTo> {
        // At 0 it is disabled; while the ScaledObject is paused it is deleted.
        if pods.wanted == 0 || self.manifest.annotations.is_paused {
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

    /// What each metric asks for.
    fn proposals(&mut self, now: Duration, samples: &SampleStore, pods: &PodCounts) -> Vec<Proposal> {
        let told = self.told(now, samples);
        if let Some(modifiers) = self.manifest.modifiers.clone() {
            let reading = self.composite(&modifiers, &told);
            return vec![self.of_value(0, "the formula", reading, modifiers.target, pods)];
        }
        let triggers = self.manifest.triggers.clone();
        let of_trigger = |((at, trigger), told): ((usize, &Trigger), Option<Reading>)| match &trigger.kind {
            TriggerKind::Prometheus { target, .. } => {
                self.of_value(at, &trigger.name, told.unwrap_or(Ok(0.0)), *target, pods)
            }
            TriggerKind::Cpu { utilization } => self.of_cpu(&trigger.name, now, *utilization, pods),
            TriggerKind::Pods { query, average } => {
                self.of_pods(&trigger.name, pod_values(query, now, samples), *average, pods)
            }
        };
        triggers.iter().enumerate().zip(told).map(of_trigger).collect()
    }

    fn of_value(
        &mut self,
        at: usize,
        name: &str,
        reading: Reading,
        target: Target,
        pods: &PodCounts,
    ) -> Proposal {
        let failures = &mut self.failures[at];
        *failures = if reading.is_err() { *failures + 1 } else { 0 };
        let fallback = self.manifest.fallback.filter(|fallback| *failures > fallback.failure_threshold);
        let usage = match (reading, fallback) {
            (Ok(usage), _) => usage,
            // KEDA makes up the value that gives so many replicas.
            (Err(_), Some(fallback)) => {
                return (format!("{name} fails"), Some(fallback_replicas(fallback, pods.wanted)));
            }
            (Err(error), None) => return (format!("{name}: {error}"), None),
        };
        let tolerances = self.tolerances();
        let replicas = match target {
            Target::AverageValue(target) => hpa::per_pod_replicas(pods.existing, usage, target, tolerances),
            Target::Value(target) => hpa::ratio_replicas(pods.wanted, pods.ready, usage, target, tolerances),
        };
        (format!("{name} is {}", short(usage)), Some(replicas))
    }

    fn of_cpu(&self, name: &str, now: Duration, utilization: f64, pods: &PodCounts) -> Proposal {
        let cpu = hpa::group_pods(now, &pods.cpu);
        let replicas = hpa::resource_replicas(pods.wanted, &cpu, utilization, self.tolerances());
        (format!("{name} is {}", short(mean(&cpu.percents))), replicas)
    }

    /// Of the pods that run, those that have a value; what is said of others is not looked at.
    fn of_pods(
        &self,
        name: &str,
        values: Result<BTreeMap<String, f64>, String>,
        average: f64,
        pods: &PodCounts,
    ) -> Proposal {
        let values = match values {
            Ok(values) => values,
            Err(error) => return (format!("{name}: {error}"), None),
        };
        let running = pods.running.len() as u32;
        let known: Vec<f64> = pods.running.iter().filter_map(|pod| values.get(pod)).copied().collect();
        let (pending, missing) = (pods.existing.saturating_sub(running), running - known.len() as u32);
        let tolerances = self.tolerances();
        let replicas = hpa::pods_replicas(pods.wanted, &known, pending, missing, average, tolerances);
        (format!("{name} is {} a pod", short(mean(&known))), replicas)
    }

    fn tolerances(&self) -> Tolerances {
        Tolerances::of(self.limits.behavior.as_ref())
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

/// The value of each pod, as prometheus-adapter gives it (`GetMetricByName` of its custom provider).
fn pod_values(query: &Query, now: Duration, samples: &SampleStore) -> Result<BTreeMap<String, f64>, String> {
    match query.at(now, samples).map_err(|error| error.to_string())? {
        Value::Vector(vector) if !vector.is_empty() => {
            let of = |mut element: Element| Some((element.labels.remove("pod")?, element.value));
            Ok(vector.into_iter().filter_map(of).collect())
        }
        _ => Err("no pod has the metric".to_owned()),
    }
}
