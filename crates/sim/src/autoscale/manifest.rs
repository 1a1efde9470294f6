//! Reads a ScaledObject of KEDA or a HorizontalPodAutoscaler. What is not simulated is refused by name.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::adapter::Adapter;
use super::formula::{Formula, FormulaError};
use super::hpa::{Behavior, Policy, PolicyKind, Rules, Select, Target};
use super::promql::{Query, QueryError};

/// A manifest that cannot be read or simulated.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("no manifest of a ScaledObject or HorizontalPodAutoscaler: {0}")]
    Yaml(String),
    #[error("prometheus-adapter: {0}")]
    Adapter(String),
    #[error("the kind {0:?} is not simulated; give a ScaledObject or a HorizontalPodAutoscaler")]
    Kind(String),
    #[error("{field} is {value}; {rule}")]
    Field { field: String, value: String, rule: &'static str },
    #[error("{field}: {source}")]
    Query { field: String, source: QueryError },
    #[error(transparent)]
    Formula(#[from] FormulaError),
}

fn refused<T>(
    field: impl Into<String>,
    value: impl ToString,
    rule: &'static str,
) -> Result<T, ManifestError> {
    Err(ManifestError::Field { field: field.into(), value: value.to_string(), rule })
}

/// What an autoscaler is told.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub name: String,
    /// Without KEDA there is nothing below one replica.
    pub is_keda: bool,
    pub min: u32,
    pub max: u32,
    pub polling_interval: Duration,
    pub cooldown: Duration,
    pub initial_cooldown: Duration,
    pub idle: Option<u32>,
    pub fallback: Option<Fallback>,
    pub behavior: Option<Behavior>,
    pub triggers: Vec<Trigger>,
    pub modifiers: Option<Modifiers>,
    pub annotations: Annotations,
}

/// What the annotations of a ScaledObject forbid and force (`apis/keda/v1alpha1/scaledobject_types.go`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Neither operator nor autoscaler does anything, but for what follows.
    pub is_paused: bool,
    /// So many, and no others.
    pub paused_replicas: Option<u32>,
    pub pauses_scale_in: bool,
    pub pauses_scale_out: bool,
    /// Active, whatever the triggers say.
    pub forces_activation: bool,
}

/// Replicas when a trigger has failed more often than so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fallback {
    pub failure_threshold: u32,
    pub replicas: u32,
    pub behavior: FallbackBehavior,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FallbackBehavior {
    #[default]
    Static,
    CurrentReplicas,
    CurrentReplicasIfHigher,
    CurrentReplicasIfLower,
}

/// One reason to scale.
#[derive(Clone, Debug)]
pub struct Trigger {
    /// As it was given, else by its place.
    pub name: String,
    pub kind: TriggerKind,
    /// The autoscaler is told what the operator saw when it looked last (`useCachedMetrics`).
    pub is_cached: bool,
}

#[derive(Clone, Debug)]
pub enum TriggerKind {
    Prometheus {
        query: Query,
        target: Target,
        activation: f64,
        ignore_null_values: bool,
    },
    /// In percent of what pods ask for.
    Cpu {
        utilization: f64,
    },
    /// A metric of each pod, which its label `pod` names, and how much of it each may have on average, in thousandths.
    Pods {
        query: Query,
        average: f64,
    },
}

/// All triggers as one number.
#[derive(Clone, Debug)]
pub struct Modifiers {
    pub formula: Formula,
    pub target: Target,
    pub activation: f64,
}

impl Manifest {
    /// Reads the first ScaledObject or HorizontalPodAutoscaler of a YAML file, which may hold other documents.
    ///
    /// # Errors
    /// What cannot be read, or is not simulated.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        Self::parse_with(text, &Adapter::default())
    }

    /// The same, with the metrics of pods that an adapter offers.
    ///
    /// # Errors
    /// What cannot be read, is not offered, or is not simulated.
    pub fn parse_with(text: &str, adapter: &Adapter) -> Result<Self, ManifestError> {
        let mut kind = String::new();
        for document in text.split("\n---") {
            kind = yaml::<Head>(document)?.kind;
            match kind.as_str() {
                "ScaledObject" => return scaled_object(yaml(document)?),
                "HorizontalPodAutoscaler" => return autoscaler(yaml(document)?, adapter),
                _ => {}
            }
        }
        Err(ManifestError::Kind(kind))
    }

    /// All that names metrics.
    pub fn queries(&self) -> impl Iterator<Item = &str> {
        self.triggers.iter().filter_map(|trigger| match &trigger.kind {
            TriggerKind::Prometheus { query, .. } | TriggerKind::Pods { query, .. } => Some(query.text()),
            TriggerKind::Cpu { .. } => None,
        })
    }

    pub fn has_pod_metrics(&self) -> bool {
        self.triggers.iter().any(|trigger| matches!(trigger.kind, TriggerKind::Pods { .. }))
    }
}

fn yaml<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, ManifestError> {
    serde_saphyr::from_str(text).map_err(|error| ManifestError::Yaml(error.to_string()))
}

// ---- the files ----

#[derive(Deserialize)]
struct Head {
    kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document<Spec> {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ScaledObject {
    #[serde(rename = "scaleTargetRef")]
    _scale_target_ref: Reference,
    polling_interval: Option<u32>,
    cooldown_period: Option<u32>,
    initial_cooldown_period: Option<u32>,
    idle_replica_count: Option<u32>,
    min_replica_count: Option<u32>,
    max_replica_count: Option<u32>,
    fallback: Option<TypedFallback>,
    #[serde(default)]
    advanced: Advanced,
    triggers: Vec<TypedTrigger>,
}

/// There is one Deployment, whatever its name.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Reference {
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
    #[serde(rename = "name")]
    _name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedFallback {
    failure_threshold: u32,
    replicas: u32,
    #[serde(default)]
    behavior: FallbackBehavior,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Advanced {
    #[serde(default)]
    /// What happens when the ScaledObject is deleted, which it never is here.
    #[serde(rename = "restoreToOriginalReplicaCount")]
    _restore: Option<bool>,
    #[serde(default)]
    horizontal_pod_autoscaler_config: AutoscalerConfig,
    scaling_modifiers: Option<TypedModifiers>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AutoscalerConfig {
    #[serde(rename = "name")]
    _name: Option<String>,
    behavior: Option<TypedBehavior>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedModifiers {
    formula: String,
    target: String,
    activation_target: Option<String>,
    metric_type: Option<MetricType>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum MetricType {
    AverageValue,
    Value,
    Utilization,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedTrigger {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    metric_type: Option<MetricType>,
    #[serde(default)]
    use_cached_metrics: bool,
    /// Whoever may ask, the answer is the same.
    #[serde(rename = "authenticationRef")]
    _authentication_ref: Option<AuthenticationReference>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AuthenticationReference {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "kind")]
    _kind: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedBehavior {
    scale_up: Option<TypedRules>,
    scale_down: Option<TypedRules>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedRules {
    stabilization_window_seconds: Option<u32>,
    select_policy: Option<TypedSelect>,
    policies: Option<Vec<TypedPolicy>>,
    tolerance: Option<f64>,
}

#[derive(Clone, Copy, Deserialize)]
enum TypedSelect {
    Max,
    Min,
    Disabled,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedPolicy {
    #[serde(rename = "type")]
    kind: TypedPolicyKind,
    value: u32,
    period_seconds: u32,
}

#[derive(Clone, Copy, Deserialize)]
enum TypedPolicyKind {
    Pods,
    Percent,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodAutoscaler {
    #[serde(rename = "scaleTargetRef")]
    _scale_target_ref: Reference,
    min_replicas: Option<u32>,
    max_replicas: u32,
    metrics: Vec<TypedMetric>,
    behavior: Option<TypedBehavior>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypedMetric {
    #[serde(rename = "type")]
    kind: String,
    resource: Option<TypedResource>,
    pods: Option<TypedPods>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TypedPods {
    metric: TypedPodsMetric,
    target: TypedTarget,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TypedPodsMetric {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TypedResource {
    name: String,
    target: TypedTarget,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedTarget {
    #[serde(rename = "type")]
    kind: MetricType,
    average_utilization: Option<u32>,
    average_value: Option<Quantity>,
}

/// A number, as a number or as text such as `500m`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Quantity {
    Number(f64),
    Text(String),
}

impl Quantity {
    /// In thousandths, rounded up (`Quantity.MilliValue`); the suffixes of Kubernetes' decimal quantities, as far as they
    /// are usual for counts.
    fn thousandths(&self) -> Option<f64> {
        /// What a decimal fraction may be off as a binary one.
        const ROUNDING: f64 = 1e-12;
        let (number, factor) = match self {
            Self::Number(number) => (*number, 1e3),
            Self::Text(text) => {
                let (number, factor) = match text.strip_suffix(['m', 'k', 'M']) {
                    Some(number) if text.ends_with('m') => (number, 1.0),
                    Some(number) if text.ends_with('k') => (number, 1e6),
                    Some(number) => (number, 1e9),
                    None => (text.as_str(), 1e3),
                };
                (number.parse().ok()?, factor)
            }
        };
        Some((factor * number * (1.0 - ROUNDING)).ceil())
    }
}

// ---- what they mean ----

fn seconds(typed: Option<u32>, default: u32) -> Duration {
    Duration::from_secs(u64::from(typed.unwrap_or(default)))
}

const MOST_REPLICAS: u32 = 10_000;
/// Metric APIs carry thousandths: a target below one is 0 there, and refused.
const LEAST_TARGET: f64 = 0.001;
const TARGETS: &str = "it must be a number of at least 0.001";

fn bounds(min: u32, max: u32) -> Result<(), ManifestError> {
    if max == 0 || max > MOST_REPLICAS {
        return refused("maxReplicaCount", max, "it must be from 1 to 10000");
    }
    if min > max { refused("minReplicaCount", min, "it must not be above maxReplicaCount") } else { Ok(()) }
}

fn scaled_object(document: Document<ScaledObject>) -> Result<Manifest, ManifestError> {
    let Document { metadata, spec, .. } = document;
    let annotations = annotations(&metadata.annotations)?;
    let (min, max) = (spec.min_replica_count.unwrap_or(0), spec.max_replica_count.unwrap_or(100));
    bounds(min, max)?;
    if let Some(idle) = spec.idle_replica_count.filter(|idle| *idle >= min) {
        return refused("idleReplicaCount", idle, "it must be less than minReplicaCount, and only 0 works");
    }
    if spec.polling_interval == Some(0) {
        return refused("pollingInterval", 0, "it must be at least 1");
    }
    let triggers = spec.triggers.into_iter().enumerate();
    let triggers = triggers.map(|(at, typed)| trigger(at, typed)).collect::<Result<Vec<Trigger>, _>>()?;
    if triggers.is_empty() {
        return refused("triggers", "empty", "give at least one");
    }
    let is_cpu = |trigger: &Trigger| matches!(trigger.kind, TriggerKind::Cpu { .. });
    if min == 0 && triggers.iter().all(is_cpu) {
        return refused(
            "minReplicaCount",
            0,
            "with cpu triggers alone it must be at least 1: nobody uses CPU at 0",
        );
    }
    Ok(Manifest {
        name: metadata.name,
        is_keda: true,
        min,
        max,
        polling_interval: seconds(spec.polling_interval, 30),
        cooldown: seconds(spec.cooldown_period, 300),
        initial_cooldown: seconds(spec.initial_cooldown_period, 0),
        idle: spec.idle_replica_count,
        fallback: spec.fallback.map(|typed| Fallback {
            failure_threshold: typed.failure_threshold,
            replicas: typed.replicas,
            behavior: typed.behavior,
        }),
        behavior: with_paused(
            spec.advanced.horizontal_pod_autoscaler_config.behavior.map(behavior),
            annotations,
        ),
        modifiers: match spec.advanced.scaling_modifiers {
            Some(typed) => Some(modifiers(&typed, &triggers)?),
            None => None,
        },
        triggers,
        annotations,
    })
}

fn annotations(typed: &BTreeMap<String, String>) -> Result<Annotations, ManifestError> {
    let mut known = Annotations::default();
    for (key, value) in typed {
        let Some(name) = key.strip_prefix("autoscaling.keda.sh/") else { continue };
        let field = || format!("metadata.annotations.{key}");
        let is_true = || match value.as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => refused(field(), format!("{value:?}"), "it must be \"true\" or \"false\""),
        };
        match name {
            "paused" => known.is_paused |= is_true()?,
            "paused-replicas" => match value.parse() {
                Ok(replicas) if replicas <= MOST_REPLICAS => {
                    (known.is_paused, known.paused_replicas) = (true, Some(replicas));
                }
                _ => return refused(field(), format!("{value:?}"), "it must be from \"0\" to \"10000\""),
            },
            "paused-scale-in" => known.pauses_scale_in = is_true()?,
            "paused-scale-out" => known.pauses_scale_out = is_true()?,
            "force-activation" => known.forces_activation = is_true()?,
            _ => return refused(field(), value, "this annotation is not simulated"),
        }
    }
    Ok(known)
}

/// `newHPAForScaledObject`: what annotations pause is a direction that is disabled.
fn with_paused(behavior: Option<Behavior>, annotations: Annotations) -> Option<Behavior> {
    let Annotations { pauses_scale_in, pauses_scale_out, .. } = annotations;
    if !pauses_scale_in && !pauses_scale_out {
        return behavior;
    }
    let mut behavior = behavior.unwrap_or_default();
    if pauses_scale_in {
        behavior.down.select = Select::Disabled;
    }
    if pauses_scale_out {
        behavior.up.select = Select::Disabled;
    }
    Some(behavior)
}

fn trigger(at: usize, typed: TypedTrigger) -> Result<Trigger, ManifestError> {
    let is_cached = typed.use_cached_metrics;
    if is_cached && typed.kind == "cpu" {
        return refused(
            format!("triggers[{at}].useCachedMetrics"),
            true,
            "KEDA refuses it for a cpu trigger",
        );
    }
    let name = typed.name.clone().unwrap_or_else(|| format!("s{at}"));
    let kind = match typed.kind.as_str() {
        "prometheus" => prometheus(at, &typed)?,
        "cpu" => cpu(at, &typed)?,
        other => {
            return refused(format!("triggers[{at}].type"), other, "prometheus and cpu are simulated");
        }
    };
    Ok(Trigger { name, kind, is_cached })
}

fn prometheus(at: usize, typed: &TypedTrigger) -> Result<TriggerKind, ManifestError> {
    /// Where Prometheus is and how it is asked changes no value.
    const HARMLESS: [&str; 8] = [
        "serverAddress",
        "query",
        "threshold",
        "activationThreshold",
        "ignoreNullValues",
        "unsafeSsl",
        "authModes",
        "timeout",
    ];
    let field = |name: &str| format!("triggers[{at}].metadata.{name}");
    if let Some((name, value)) = typed.metadata.iter().find(|(name, _)| !HARMLESS.contains(&name.as_str())) {
        return refused(
            field(name),
            value,
            "this key is not simulated, or not one of the prometheus trigger's",
        );
    }
    let number = |name: &str| match typed.metadata.get(name).map(|text| (text, text.parse::<f64>())) {
        None => Ok(None),
        Some((_, Ok(number))) if number.is_finite() => Ok(Some(number)),
        Some((text, _)) => refused(field(name), format!("{text:?}"), "it must be a number in quotes"),
    };
    let Some(text) = typed.metadata.get("query") else {
        return refused(field("query"), "missing", "a prometheus trigger needs one");
    };
    let query =
        Query::parse(text).map_err(|source| ManifestError::Query { field: field("query"), source })?;
    let threshold = match number("threshold")? {
        Some(threshold) if threshold >= LEAST_TARGET => threshold,
        Some(wrong) => return refused(field("threshold"), wrong, TARGETS),
        None => return refused(field("threshold"), "missing", "a prometheus trigger needs one"),
    };
    let target = match typed.metric_type {
        None | Some(MetricType::AverageValue) => Target::AverageValue(threshold),
        Some(MetricType::Value) => Target::Value(threshold),
        Some(MetricType::Utilization) => {
            let rule = "a prometheus trigger has AverageValue or Value";
            return refused(format!("triggers[{at}].metricType"), "Utilization", rule);
        }
    };
    let ignore_null_values = match typed.metadata.get("ignoreNullValues").map(String::as_str) {
        None | Some("true") => true,
        Some("false") => false,
        Some(other) => {
            return refused(field("ignoreNullValues"), format!("{other:?}"), "\"true\" or \"false\"");
        }
    };
    let activation = number("activationThreshold")?.unwrap_or(0.0);
    Ok(TriggerKind::Prometheus { query, target, activation, ignore_null_values })
}

fn cpu(at: usize, typed: &TypedTrigger) -> Result<TriggerKind, ManifestError> {
    if typed.metric_type != Some(MetricType::Utilization) {
        let rule = "of a cpu trigger Utilization is simulated";
        return refused(format!("triggers[{at}].metricType"), format!("{:?}", typed.metric_type), rule);
    }
    if let Some((name, value)) = typed.metadata.iter().find(|(name, _)| *name != "value") {
        return refused(format!("triggers[{at}].metadata.{name}"), value, "this key is not simulated");
    }
    match typed.metadata.get("value").map(|text| text.parse::<u32>()) {
        Some(Ok(utilization)) if utilization > 0 => {
            Ok(TriggerKind::Cpu { utilization: f64::from(utilization) })
        }
        _ => {
            let found = typed.metadata.get("value").map_or("missing", String::as_str);
            refused(format!("triggers[{at}].metadata.value"), found, "it must be whole percent, at least 1")
        }
    }
}

fn modifiers(typed: &TypedModifiers, triggers: &[Trigger]) -> Result<Modifiers, ManifestError> {
    let field = |name: &str| format!("advanced.scalingModifiers.{name}");
    let formula = Formula::parse(&typed.formula)?;
    if let Some(name) = formula.names().into_iter().find(|name| triggers.iter().all(|it| it.name != **name)) {
        return refused(field("formula"), name, "no trigger has this name");
    }
    let target = match typed.target.parse::<f64>() {
        Ok(target) if target >= LEAST_TARGET && f64::is_finite(target) => target,
        _ => return refused(field("target"), &typed.target, TARGETS),
    };
    let activation = match typed.activation_target.as_deref().unwrap_or("0").parse() {
        Ok(activation) => activation,
        Err(_) => return refused(field("activationTarget"), "no number", "it must be a number"),
    };
    let target = match typed.metric_type {
        None | Some(MetricType::AverageValue) => Target::AverageValue(target),
        Some(MetricType::Value) => Target::Value(target),
        Some(MetricType::Utilization) => {
            return refused(field("metricType"), "Utilization", "it is AverageValue or Value");
        }
    };
    Ok(Modifiers { formula, target, activation })
}

fn behavior(typed: TypedBehavior) -> Behavior {
    let of = |typed: Option<TypedRules>, default: Rules| match typed {
        Some(typed) => rules(typed, default),
        None => default,
    };
    let Behavior { up, down } = Behavior::default();
    Behavior { up: of(typed.scale_up, up), down: of(typed.scale_down, down) }
}

fn rules(typed: TypedRules, default: Rules) -> Rules {
    let policy = |typed: TypedPolicy| Policy {
        kind: match typed.kind {
            TypedPolicyKind::Pods => PolicyKind::Pods,
            TypedPolicyKind::Percent => PolicyKind::Percent,
        },
        value: typed.value,
        period: Duration::from_secs(u64::from(typed.period_seconds)),
    };
    Rules {
        stabilization: typed
            .stabilization_window_seconds
            .map_or(default.stabilization, |window| Duration::from_secs(u64::from(window))),
        select: match typed.select_policy {
            None | Some(TypedSelect::Max) => Select::Max,
            Some(TypedSelect::Min) => Select::Min,
            Some(TypedSelect::Disabled) => Select::Disabled,
        },
        policies: typed
            .policies
            .map_or(default.policies, |policies| policies.into_iter().map(policy).collect()),
        tolerance: typed.tolerance.or(default.tolerance),
    }
}

fn autoscaler(document: Document<PodAutoscaler>, adapter: &Adapter) -> Result<Manifest, ManifestError> {
    let Document { metadata, spec, .. } = document;
    let (min, max) = (spec.min_replicas.unwrap_or(1), spec.max_replicas);
    bounds(min, max)?;
    if min == 0 {
        return refused("minReplicas", 0, "it must be at least 1; only KEDA goes to 0");
    }
    let triggers = spec.metrics.into_iter().enumerate();
    let triggers =
        triggers.map(|(at, typed)| metric(at, typed, adapter)).collect::<Result<Vec<Trigger>, _>>()?;
    Ok(Manifest {
        name: metadata.name,
        is_keda: false,
        min,
        max,
        polling_interval: Duration::MAX,
        cooldown: Duration::ZERO,
        initial_cooldown: Duration::ZERO,
        idle: None,
        fallback: None,
        behavior: spec.behavior.map(behavior),
        triggers,
        modifiers: None,
        annotations: Annotations::default(),
    })
}

/// One of a HorizontalPodAutoscaler.
fn metric(at: usize, typed: TypedMetric, adapter: &Adapter) -> Result<Trigger, ManifestError> {
    let kind = match (typed.kind.as_str(), typed.resource, typed.pods) {
        ("Resource", Some(resource), None) if resource.name == "cpu" => {
            match (resource.target.kind, resource.target.average_utilization) {
                (MetricType::Utilization, Some(percent)) if percent > 0 => {
                    TriggerKind::Cpu { utilization: f64::from(percent) }
                }
                _ => {
                    let field = format!("metrics[{at}].resource.target");
                    return refused(field, "another", "Utilization is simulated");
                }
            }
        }
        ("Pods", None, Some(pods)) => {
            let average = pods.target.average_value.and_then(|quantity| quantity.thousandths());
            match (pods.target.kind, average) {
                (MetricType::AverageValue, Some(average)) if average >= 1.0 => {
                    TriggerKind::Pods { query: adapter.query(&pods.metric.name)?, average }
                }
                _ => {
                    let rule =
                        "metrics of pods have an averageValue of at least 1m, such as \"4\" or \"500m\"";
                    return refused(format!("metrics[{at}].pods.target"), "another", rule);
                }
            }
        }
        (kind, ..) => {
            let rule = "of a HorizontalPodAutoscaler the Resource cpu and Pods are simulated; queries come with a \
                        ScaledObject";
            return refused(format!("metrics[{at}].type"), kind, rule);
        }
    };
    Ok(Trigger { name: format!("s{at}"), kind, is_cached: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_thousandths_rounded_up() {
        for (text, thousandths) in [
            ("4", 4e3),
            ("4007m", 4007.0),
            ("1.001", 1001.0),
            ("0.0015", 2.0),
            ("0", 0.0),
            ("2k", 2e6),
            ("1M", 1e9),
        ] {
            assert_eq!(Quantity::Text(text.to_owned()).thousandths(), Some(thousandths), "{text}");
        }
        assert_eq!(Quantity::Number(4.007).thousandths(), Some(4007.0));
        assert_eq!(Quantity::Text("many".to_owned()).thousandths(), None);
    }
}
