//! Reads a ScaledObject (`keda.sh/v1alpha1`) or a HorizontalPodAutoscaler (`autoscaling/v2`) as the cluster would.
//!
//! A field that is not simulated and would change what happens is refused by name; one that only says where things
//! are (addresses, authentication, names) is read and has no effect.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value as Json;
use thiserror::Error;

use crate::behavior::{Behavior, Policy, PolicyType, Rules, Select};
use crate::formula::{Formula, FormulaError};
use crate::hpa::HpaSpec;
use crate::promql::{Query, QueryError};
use crate::quantity;

#[derive(Debug, Error)]
pub enum ManifestError {
    #[error("{0} is no YAML: {1}")]
    Yaml(String, String),
    #[error("{name} holds {found} ScaledObjects and HorizontalPodAutoscalers; one is simulated at a time")]
    Count { name: String, found: usize },
    #[error("{name}: {kind} {problem}")]
    Field { name: String, kind: &'static str, problem: String },
    #[error("{name}: {field} {value:?} {allowed}")]
    Value { name: String, field: String, value: String, allowed: &'static str },
    #[error("{name}: trigger type {kind:?} is not simulated; allowed are prometheus and cpu")]
    Trigger { name: String, kind: String },
    #[error("{0}: {1}")]
    Query(String, #[source] QueryError),
    #[error("{0}: {1}")]
    Formula(String, #[source] FormulaError),
}

/// What is compared with the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MetricType {
    #[default]
    AverageValue,
    Value,
}

/// A Prometheus trigger.
#[derive(Clone, Debug)]
pub struct Trigger {
    pub name: Option<String>,
    pub query: Query,
    pub metric_type: MetricType,
    pub threshold: f64,
    pub activation_threshold: f64,
    /// No data is 0 and not an error.
    pub ignore_null_values: bool,
    /// The HPA gets what the operator polled last, and does not ask anew.
    pub use_cached_metrics: bool,
}

/// What the HPA looks at besides the triggers, or without KEDA.
#[derive(Clone, Debug, PartialEq)]
pub enum PodMetricSource {
    /// CPU, in percent of the request.
    CpuUtilization { target: f64 },
    /// The average over the pods of a metric that each exports.
    Pods { metric: String, target: f64 },
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub enum FallbackBehavior {
    #[default]
    Static,
    CurrentReplicas,
    CurrentReplicasIfHigher,
    CurrentReplicasIfLower,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Fallback {
    pub failure_threshold: u32,
    pub replicas: u32,
    #[serde(default)]
    pub behavior: FallbackBehavior,
}

/// One formula in place of several triggers.
#[derive(Clone, Debug)]
pub struct Modifiers {
    pub formula: Formula,
    pub target: f64,
    pub activation_target: f64,
    pub metric_type: MetricType,
}

/// KEDA's part of a ScaledObject.
#[derive(Clone, Debug)]
pub struct KedaSpec {
    pub polling_interval: Duration,
    pub cooldown: Duration,
    pub initial_cooldown: Duration,
    pub idle_replicas: Option<u32>,
    pub min_replicas: u32,
    pub fallback: Option<Fallback>,
    pub modifiers: Option<Modifiers>,
    pub triggers: Vec<Trigger>,
    /// From the annotation `autoscaling.keda.sh/paused-replicas`.
    pub paused_replicas: Option<u32>,
    /// From the annotation `autoscaling.keda.sh/paused`.
    pub is_paused: bool,
}

/// An autoscaler as written down.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub name: String,
    pub hpa: HpaSpec,
    pub pod_metrics: Vec<PodMetricSource>,
    /// `None`: a plain HPA.
    pub keda: Option<KedaSpec>,
}

impl Manifest {
    /// Reads the only ScaledObject or HorizontalPodAutoscaler of a file, which may hold other objects; `name` names
    /// the file in errors.
    pub fn read(name: &str, text: &str) -> Result<Self, ManifestError> {
        let documents: Vec<Json> = serde_saphyr::from_multiple(text)
            .map_err(|error| ManifestError::Yaml(name.to_owned(), error.to_string()))?;
        let kind = |document: &Json| document.get("kind").and_then(Json::as_str).map(str::to_owned);
        let mut scalers: Vec<(String, Json)> = documents
            .into_iter()
            .filter_map(|document| Some((kind(&document)?, document)))
            .filter(|(kind, _)| kind == "ScaledObject" || kind == "HorizontalPodAutoscaler")
            .collect();
        if scalers.len() != 1 {
            return Err(ManifestError::Count { name: name.to_owned(), found: scalers.len() });
        }
        let (kind, document) = scalers.remove(0);
        let reader = Reader { name };
        if kind == "ScaledObject" { reader.scaled_object(document) } else { reader.hpa(document) }
    }

    /// How far back its queries look.
    pub fn reach(&self) -> Duration {
        let triggers = self.keda.iter().flat_map(|keda| &keda.triggers);
        triggers.map(|trigger| trigger.query.reach()).max().unwrap_or_default().max(crate::promql::LOOKBACK)
    }

    /// Everything that names a metric, to know which are worth recording.
    pub fn query_text(&self) -> String {
        let triggers = self.keda.iter().flat_map(|keda| &keda.triggers);
        let queries = triggers.map(|trigger| trigger.query.text().to_owned());
        let metrics = self.pod_metrics.iter().filter_map(|source| match source {
            PodMetricSource::Pods { metric, .. } => Some(metric.clone()),
            PodMetricSource::CpuUtilization { .. } => None,
        });
        queries.chain(metrics).collect::<Vec<_>>().join("\n")
    }
}

#[derive(Deserialize)]
struct Typed<Spec> {
    #[serde(default)]
    metadata: TypedMetadata,
    spec: Spec,
}

#[derive(Default, Deserialize)]
struct TypedMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedScaledObject {
    #[serde(rename = "scaleTargetRef")]
    _scale_target_ref: Json,
    polling_interval: Option<u64>,
    cooldown_period: Option<u64>,
    initial_cooldown_period: Option<u64>,
    idle_replica_count: Option<u32>,
    min_replica_count: Option<u32>,
    max_replica_count: Option<u32>,
    fallback: Option<Fallback>,
    #[serde(default)]
    advanced: TypedAdvanced,
    triggers: Vec<TypedTrigger>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedAdvanced {
    #[serde(rename = "restoreToOriginalReplicaCount")]
    _restore: Option<bool>,
    horizontal_pod_autoscaler_config: Option<TypedHpaConfig>,
    scaling_modifiers: Option<TypedModifiers>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedHpaConfig {
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
    metric_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedTrigger {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    metadata: std::collections::BTreeMap<String, String>,
    metric_type: Option<String>,
    #[serde(default)]
    use_cached_metrics: bool,
    #[serde(rename = "authenticationRef")]
    _authentication_ref: Option<Json>,
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
    stabilization_window_seconds: Option<u64>,
    policies: Option<Vec<TypedPolicy>>,
    select_policy: Option<String>,
    tolerance: Option<Json>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedPolicy {
    #[serde(rename = "type")]
    kind: String,
    value: u32,
    period_seconds: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedHpa {
    #[serde(rename = "scaleTargetRef")]
    _scale_target_ref: Json,
    min_replicas: Option<u32>,
    max_replicas: u32,
    metrics: Vec<TypedMetric>,
    behavior: Option<TypedBehavior>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedMetric {
    #[serde(rename = "type")]
    kind: String,
    pods: Option<TypedPodsMetric>,
    resource: Option<TypedResource>,
}

#[derive(Deserialize)]
struct TypedPodsMetric {
    metric: TypedName,
    target: TypedTarget,
}

#[derive(Deserialize)]
struct TypedResource {
    name: String,
    target: TypedTarget,
}

#[derive(Deserialize)]
struct TypedName {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypedTarget {
    #[serde(rename = "type")]
    kind: String,
    average_value: Option<Json>,
    average_utilization: Option<f64>,
}

/// KEDA's, which is 30 s, 300 s and 100 replicas.
const POLLING_INTERVAL: u64 = 30;
const COOLDOWN_PERIOD: u64 = 300;
const MAX_REPLICA_COUNT: u32 = 100;
/// More replicas than any fleet that is simulated has.
const MOST_REPLICAS: u32 = 100_000;
/// Metadata of a Prometheus trigger that says where Prometheus is and how to ask, and nothing about the answer.
const WITHOUT_EFFECT: [&str; 8] = [
    "serverAddress",
    "namespace",
    "customHeaders",
    "queryParameters",
    "unsafeSsl",
    "timeout",
    "authModes",
    "metricName",
];

struct Reader<'a> {
    name: &'a str,
}

impl Reader<'_> {
    fn typed<Spec: for<'de> Deserialize<'de>>(
        &self,
        kind: &'static str,
        document: Json,
    ) -> Result<Typed<Spec>, ManifestError> {
        let problem = |error: serde_json::Error| ManifestError::Field {
            name: self.name.to_owned(),
            kind,
            problem: error.to_string(),
        };
        serde_json::from_value(document).map_err(problem)
    }

    fn bad(&self, field: impl Into<String>, value: impl ToString, allowed: &'static str) -> ManifestError {
        ManifestError::Value {
            name: self.name.to_owned(),
            field: field.into(),
            value: value.to_string(),
            allowed,
        }
    }

    fn scaled_object(&self, document: Json) -> Result<Manifest, ManifestError> {
        let Typed { metadata, spec } = self.typed::<TypedScaledObject>("ScaledObject", document)?;
        let min = spec.min_replica_count.unwrap_or(0);
        let max = spec.max_replica_count.unwrap_or(MAX_REPLICA_COUNT);
        let idle = spec.idle_replica_count;
        if idle.is_some_and(|idle| idle >= min) {
            return Err(self.bad("idleReplicaCount", idle.unwrap_or(0), "must be less than minReplicaCount"));
        }
        let behavior = spec.advanced.horizontal_pod_autoscaler_config.and_then(|config| config.behavior);
        let hpa = self.hpa_spec(min.max(1), max, behavior)?;
        let (mut triggers, mut pod_metrics) = (Vec::new(), Vec::new());
        for (at, trigger) in spec.triggers.into_iter().enumerate() {
            match trigger.kind.as_str() {
                "prometheus" => triggers.push(self.prometheus(at, trigger)?),
                "cpu" => pod_metrics.push(self.cpu(at, &trigger)?),
                _ => return Err(ManifestError::Trigger { name: self.name.to_owned(), kind: trigger.kind }),
            }
        }
        let modifiers = spec.advanced.scaling_modifiers;
        let modifiers = modifiers.map(|typed| self.modifiers(&typed, &triggers)).transpose()?;
        let annotation = |name: &str| metadata.annotations.get(&format!("autoscaling.keda.sh/{name}"));
        let paused_replicas = annotation("paused-replicas").map(|text| {
            text.parse().map_err(|_| self.bad("paused-replicas", text, "is no number of replicas"))
        });
        let keda = KedaSpec {
            polling_interval: Duration::from_secs(spec.polling_interval.unwrap_or(POLLING_INTERVAL).max(1)),
            cooldown: Duration::from_secs(spec.cooldown_period.unwrap_or(COOLDOWN_PERIOD)),
            initial_cooldown: Duration::from_secs(spec.initial_cooldown_period.unwrap_or(0)),
            idle_replicas: idle,
            min_replicas: min,
            fallback: spec.fallback,
            modifiers,
            triggers,
            paused_replicas: paused_replicas.transpose()?,
            is_paused: annotation("paused").is_some_and(|text| text == "true"),
        };
        Ok(Manifest { name: metadata.name, hpa, pod_metrics, keda: Some(keda) })
    }

    fn prometheus(&self, at: usize, typed: TypedTrigger) -> Result<Trigger, ManifestError> {
        let field = |name: &str| format!("triggers[{at}].metadata.{name}");
        let metadata = &typed.metadata;
        let known = ["query", "threshold", "activationThreshold", "ignoreNullValues"];
        let is_known =
            |name: &&String| known.contains(&name.as_str()) || WITHOUT_EFFECT.contains(&name.as_str());
        if let Some(unknown) = metadata.keys().find(|name| !is_known(name)) {
            return Err(self.bad(
                field(unknown),
                &metadata[unknown],
                "is no setting of KEDA's prometheus trigger",
            ));
        }
        let number = |name: &str| match metadata.get(name) {
            Some(text) => {
                text.parse::<f64>().map(Some).map_err(|_| self.bad(field(name), text, "is no number"))
            }
            None => Ok(None),
        };
        let text = metadata.get("query").ok_or_else(|| self.bad(field("query"), "", "is missing"))?;
        let query = Query::parse(text).map_err(|error| ManifestError::Query(self.name.to_owned(), error))?;
        let threshold = number("threshold")?.filter(|threshold| *threshold > 0.0);
        Ok(Trigger {
            query,
            metric_type: self
                .metric_type(&format!("triggers[{at}].metricType"), typed.metric_type.as_deref())?,
            threshold: threshold
                .ok_or_else(|| self.bad(field("threshold"), "", "must be a number above 0"))?,
            activation_threshold: number("activationThreshold")?.unwrap_or(0.0),
            ignore_null_values: metadata.get("ignoreNullValues").is_none_or(|text| text != "false"),
            use_cached_metrics: typed.use_cached_metrics,
            name: typed.name,
        })
    }

    fn cpu(&self, at: usize, typed: &TypedTrigger) -> Result<PodMetricSource, ManifestError> {
        let field = format!("triggers[{at}].metricType");
        let kind = typed.metric_type.as_deref().or(typed.metadata.get("type").map(String::as_str));
        if kind != Some("Utilization") {
            return Err(self.bad(field, kind.unwrap_or(""), "of a cpu trigger must be Utilization"));
        }
        let value = typed.metadata.get("value").map_or("", String::as_str);
        let target = value.parse().ok().filter(|target| *target > 0.0);
        let allowed = "must be a number of percent above 0";
        let target =
            target.ok_or_else(|| self.bad(format!("triggers[{at}].metadata.value"), value, allowed))?;
        Ok(PodMetricSource::CpuUtilization { target })
    }

    fn metric_type(&self, field: &str, text: Option<&str>) -> Result<MetricType, ManifestError> {
        match text {
            None | Some("AverageValue") => Ok(MetricType::AverageValue),
            Some("Value") => Ok(MetricType::Value),
            Some(other) => Err(self.bad(field, other, "must be AverageValue or Value")),
        }
    }

    fn modifiers(&self, typed: &TypedModifiers, triggers: &[Trigger]) -> Result<Modifiers, ManifestError> {
        let names: Vec<&str> = triggers.iter().filter_map(|trigger| trigger.name.as_deref()).collect();
        let formula = Formula::parse(&typed.formula, &names)
            .map_err(|error| ManifestError::Formula(self.name.to_owned(), error))?;
        let number = |field: &str, text: &str| {
            text.parse::<f64>()
                .map_err(|_| self.bad(format!("scalingModifiers.{field}"), text, "is no number"))
        };
        let target = number("target", &typed.target)?;
        if target <= 0.0 {
            return Err(self.bad("scalingModifiers.target", target, "must be above 0"));
        }
        let activation = typed.activation_target.as_deref();
        Ok(Modifiers {
            formula,
            target,
            activation_target: activation.map_or(Ok(0.0), |text| number("activationTarget", text))?,
            metric_type: self.metric_type("scalingModifiers.metricType", typed.metric_type.as_deref())?,
        })
    }

    fn hpa(&self, document: Json) -> Result<Manifest, ManifestError> {
        let Typed { metadata, spec } = self.typed::<TypedHpa>("HorizontalPodAutoscaler", document)?;
        let metrics = spec.metrics.into_iter().enumerate().map(|(at, metric)| self.pod_metric(at, metric));
        Ok(Manifest {
            name: metadata.name,
            hpa: self.hpa_spec(spec.min_replicas.unwrap_or(1), spec.max_replicas, spec.behavior)?,
            pod_metrics: metrics.collect::<Result<_, _>>()?,
            keda: None,
        })
    }

    fn pod_metric(&self, at: usize, metric: TypedMetric) -> Result<PodMetricSource, ManifestError> {
        let field = |rest: &str| format!("metrics[{at}].{rest}");
        match (metric.kind.as_str(), metric.pods, metric.resource) {
            ("Pods", Some(pods), _) => {
                let value = pods.target.average_value.map(|value| match value {
                    Json::String(text) => text,
                    other => other.to_string(),
                });
                let value = value.unwrap_or_default();
                let target = quantity::parse(&value).filter(|target| *target > 0.0);
                let allowed = "must be a quantity above 0";
                let target =
                    target.ok_or_else(|| self.bad(field("pods.target.averageValue"), &value, allowed))?;
                Ok(PodMetricSource::Pods { metric: pods.metric.name, target })
            }
            ("Resource", _, Some(resource)) => {
                if resource.name != "cpu" || resource.target.kind != "Utilization" {
                    let allowed = "is not simulated; allowed is the Utilization of cpu";
                    return Err(self.bad(field("resource"), resource.name, allowed));
                }
                let target = resource.target.average_utilization.filter(|target| *target > 0.0);
                let allowed = "must be above 0";
                let name = field("resource.target.averageUtilization");
                Ok(PodMetricSource::CpuUtilization {
                    target: target.ok_or_else(|| self.bad(name, "", allowed))?,
                })
            }
            (kind, _, _) => {
                Err(self.bad(field("type"), kind, "is not simulated; allowed are Pods and Resource (cpu)"))
            }
        }
    }

    fn hpa_spec(
        &self,
        min: u32,
        max: u32,
        behavior: Option<TypedBehavior>,
    ) -> Result<HpaSpec, ManifestError> {
        if max == 0 || max > MOST_REPLICAS {
            return Err(self.bad("the most replicas", max, "must be 1 to 100,000"));
        }
        if min > max {
            return Err(self.bad("the fewest replicas", min, "must not be more than the most"));
        }
        let behavior = behavior.map(|typed| self.behavior(typed)).transpose()?;
        Ok(HpaSpec { min_replicas: min, max_replicas: max, behavior })
    }

    fn behavior(&self, typed: TypedBehavior) -> Result<Behavior, ManifestError> {
        Ok(Behavior {
            up: self.rules("scaleUp", typed.scale_up, Rules::default_up())?,
            down: self.rules("scaleDown", typed.scale_down, Rules::default_down())?,
        })
    }

    fn rules(&self, side: &str, typed: Option<TypedRules>, default: Rules) -> Result<Rules, ManifestError> {
        let Some(typed) = typed else { return Ok(default) };
        let select = match typed.select_policy.as_deref() {
            None | Some("Max") => Select::Max,
            Some("Min") => Select::Min,
            Some("Disabled") => Select::Disabled,
            Some(other) => {
                let field = format!("{side}.selectPolicy");
                return Err(self.bad(field, other, "must be Max, Min or Disabled"));
            }
        };
        let window = typed.stabilization_window_seconds;
        if window.is_some_and(|seconds| seconds > 3600) {
            let field = format!("{side}.stabilizationWindowSeconds");
            return Err(self.bad(field, window.unwrap_or(0), "must be 0 to 3600"));
        }
        let policies = typed.policies.map(|policies| {
            policies.iter().map(|policy| self.policy(side, policy)).collect::<Result<Vec<_>, _>>()
        });
        let tolerance = typed.tolerance.map(|value| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let parsed = quantity::parse(&text).filter(|tolerance| *tolerance >= 0.0);
            parsed.ok_or_else(|| {
                self.bad(format!("{side}.tolerance"), text, "must be a quantity of at least 0")
            })
        });
        Ok(Rules {
            stabilization: window.map_or(default.stabilization, Duration::from_secs),
            policies: policies.transpose()?.filter(|it| !it.is_empty()).unwrap_or(default.policies),
            select,
            tolerance: tolerance.transpose()?,
        })
    }

    fn policy(&self, side: &str, typed: &TypedPolicy) -> Result<Policy, ManifestError> {
        let kind = match typed.kind.as_str() {
            "Pods" => PolicyType::Pods,
            "Percent" => PolicyType::Percent,
            other => return Err(self.bad(format!("{side}.policies.type"), other, "must be Pods or Percent")),
        };
        if typed.value == 0 || typed.period_seconds == 0 || typed.period_seconds > 1800 {
            let value = format!("value {}, periodSeconds {}", typed.value, typed.period_seconds);
            return Err(self.bad(
                format!("{side}.policies"),
                value,
                "must be above 0, the period 1800 at most",
            ));
        }
        Ok(Policy { kind, value: typed.value, period: Duration::from_secs(typed.period_seconds) })
    }
}
