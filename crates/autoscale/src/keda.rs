//! KEDA's operator: between nothing and something by itself, and the metrics that the HPA asks it for.
//!
//! `pkg/scaling/executor/scale_scaledobjects.go` (`RequestScale`, `doFallbackScaling`, `scaleToZeroOrIdle`,
//! `scaleFromZeroOrIdle`), `pkg/fallback/fallback.go` (`GetMetricsWithFallback`, `doFallback`), and
//! `pkg/scalers/prometheus_scaler.go` for what a query's answer counts as.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::manifest::{Fallback, FallbackBehavior, KedaSpec, MetricType, Trigger};
use crate::promql::Value;
use crate::quantity;
use crate::store::SampleStore;

/// A metric that the HPA gets.
#[derive(Clone, Debug, PartialEq)]
pub struct External {
    pub metric_type: MetricType,
    /// In thousandths.
    pub target: i64,
    /// In thousandths, or why there is none.
    pub usage: Result<i64, String>,
}

/// The operator and what it remembers.
#[derive(Clone, Debug)]
pub struct Keda {
    spec: KedaSpec,
    created: Duration,
    last_active: Option<Duration>,
    /// Of each trigger, or of the formula.
    failures: Vec<u32>,
    /// What was polled last, for triggers that the HPA is to get cached.
    cached: Vec<Option<Result<f64, String>>>,
}

impl Keda {
    pub fn new(spec: KedaSpec, now: Duration) -> Self {
        let count = spec.triggers.len().max(1);
        Self { spec, created: now, last_active: None, failures: vec![0; count], cached: vec![None; count] }
    }

    pub fn spec(&self) -> &KedaSpec {
        &self.spec
    }

    /// Polls all triggers; the number of replicas that it sets, if it does, and why.
    pub fn poll(&mut self, now: Duration, current: u32, store: &SampleStore) -> Option<(u32, String)> {
        if let Some(replicas) = self.spec.paused_replicas {
            return (replicas != current).then(|| (replicas, "paused at that many".to_owned()));
        }
        if self.spec.is_paused {
            return None;
        }
        let values: Vec<_> = self.spec.triggers.iter().map(|trigger| answer(trigger, now, store)).collect();
        self.cached = values.iter().cloned().map(Some).collect();
        let is_error = values.iter().any(Result::is_err);
        if self.is_active(&values) {
            self.activate(now, current)
        } else {
            self.deactivate(now, current, is_error)
        }
    }

    fn is_active(&self, values: &[Result<f64, String>]) -> bool {
        match &self.spec.modifiers {
            Some(modifiers) => {
                let value = formula_value(&self.spec.triggers, values, &modifiers.formula);
                value.is_ok_and(|value| value > modifiers.activation_target)
            }
            None => {
                let mut triggers = self.spec.triggers.iter().zip(values);
                triggers.any(|(trigger, value)| {
                    value.as_ref().is_ok_and(|value| *value > trigger.activation_threshold)
                })
            }
        }
    }

    fn activate(&mut self, now: Duration, current: u32) -> Option<(u32, String)> {
        self.last_active = Some(now);
        let from_idle = self.spec.idle_replicas.is_some() && current < self.spec.min_replicas;
        (from_idle || current == 0).then(|| (self.spec.min_replicas.max(1), "a trigger is active".to_owned()))
    }

    fn deactivate(&self, now: Duration, current: u32, is_error: bool) -> Option<(u32, String)> {
        let spec = &self.spec;
        let set = |replicas: u32, why: &str| (replicas != current).then(|| (replicas, why.to_owned()));
        if is_error && spec.fallback.is_some_and(|fallback| fallback.replicas != 0) {
            // The operator knows neither the fallback's threshold nor its behavior; both are the HPA's path.
            return set(spec.fallback?.replicas, "no trigger is active and one fails: fallback");
        }
        if is_error && spec.fallback.is_none() {
            return None;
        }
        let above_idle = spec.idle_replicas.is_some_and(|idle| current > idle);
        if above_idle || (current > 0 && spec.min_replicas == 0) {
            let cooled = match self.last_active {
                Some(at) => now > at + spec.cooldown,
                None => now > self.created + spec.initial_cooldown,
            };
            return if cooled { set(spec.idle_replicas.unwrap_or(0), "no trigger is active") } else { None };
        }
        if current < spec.min_replicas && spec.idle_replicas.is_none() {
            return set(spec.min_replicas, "fewer than minReplicaCount");
        }
        None
    }

    /// What the HPA is told when it asks, with `current` replicas.
    pub fn metrics(&mut self, now: Duration, current: u32, ready: u32, store: &SampleStore) -> Vec<External> {
        let triggers = self.spec.triggers.iter().zip(&self.cached);
        let values: Vec<Result<f64, String>> = triggers
            .map(|(trigger, cached)| match cached {
                Some(cached) if trigger.use_cached_metrics => cached.clone(),
                _ => answer(trigger, now, store),
            })
            .collect();
        if let Some(modifiers) = &self.spec.modifiers {
            let value = formula_value(&self.spec.triggers, &values, &modifiers.formula);
            let (target, kind) = (modifiers.target, modifiers.metric_type);
            return vec![self.external(0, kind, target, value, current, ready)];
        }
        let targets: Vec<_> = self.spec.triggers.iter().map(|it| (it.metric_type, it.threshold)).collect();
        let all = targets.into_iter().zip(values).enumerate();
        all.map(|(at, ((kind, target), value))| self.external(at, kind, target, value, current, ready))
            .collect()
    }

    fn external(
        &mut self,
        at: usize,
        metric_type: MetricType,
        target: f64,
        value: Result<f64, String>,
        current: u32,
        ready: u32,
    ) -> External {
        let failures = &mut self.failures[at];
        *failures = if value.is_ok() { 0 } else { failures.saturating_add(1) };
        let usage = match (value, self.spec.fallback) {
            // Cut off below a thousandth, as an integer conversion does.
            (Ok(value), _) => Ok((value * 1000.0) as i64),
            (Err(_), Some(fallback)) if *failures > fallback.failure_threshold => {
                Ok(fallback_usage(fallback, metric_type, target, current, ready))
            }
            (Err(error), _) => Err(error),
        };
        External { metric_type, target: quantity::millis(target), usage }
    }
}

/// The usage at which the HPA ends with that many replicas.
fn fallback_usage(fallback: Fallback, kind: MetricType, target: f64, current: u32, ready: u32) -> i64 {
    let replicas = match fallback.behavior {
        FallbackBehavior::Static => fallback.replicas,
        FallbackBehavior::CurrentReplicas => current,
        FallbackBehavior::CurrentReplicasIfHigher => fallback.replicas.max(current),
        FallbackBehavior::CurrentReplicasIfLower => fallback.replicas.min(current),
    };
    let share = match kind {
        MetricType::AverageValue => f64::from(replicas),
        MetricType::Value => f64::from(replicas) / f64::from(ready.max(1)),
    };
    (target * share * 1000.0) as i64
}

fn formula_value(
    triggers: &[Trigger],
    values: &[Result<f64, String>],
    formula: &crate::formula::Formula,
) -> Result<f64, String> {
    let mut named = BTreeMap::new();
    for (trigger, value) in triggers.iter().zip(values) {
        let value = value.clone()?;
        if let Some(name) = &trigger.name {
            named.insert(name.clone(), value);
        }
    }
    let value = formula.value(&named);
    if value.is_finite() { Ok(value) } else { Err(format!("the formula gave {value}")) }
}

/// What a query's answer counts as.
fn answer(trigger: &Trigger, now: Duration, store: &SampleStore) -> Result<f64, String> {
    let value = match trigger.query.at(now, store).map_err(|error| error.to_string())? {
        Value::Scalar(number) => number,
        Value::Vector(elements) => match elements.as_slice() {
            [] if trigger.ignore_null_values => 0.0,
            [] => return Err("the query gave no element".to_owned()),
            [(_, value)] => *value,
            several => return Err(format!("the query gave {} elements, not one", several.len())),
        },
    };
    match value {
        // A NaN becomes the least integer on its way to the HPA, which is below any minimum.
        value if value.is_nan() => Ok(0.0),
        value if value.is_infinite() && trigger.ignore_null_values => Ok(0.0),
        value if value.is_infinite() => Err("the query gave an infinity".to_owned()),
        value => Ok(value),
    }
}
