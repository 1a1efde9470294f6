//! The cases of scaling_scripts.toml: a whole manifest, a script of what its queries give, and what is asked for.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Deserialize;
use servelab_sim::autoscale::{Autoscaler, Manifest, PodCounts, SampleStore};

#[derive(Deserialize)]
struct File {
    case: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    source: String,
    start: u32,
    steps: Vec<StepOf>,
    #[serde(default = "five")]
    threshold: f64,
    metric_type: Option<String>,
    activation: Option<f64>,
    ignore_null_values: Option<bool>,
    #[serde(default = "one")]
    min: u32,
    max: Option<u32>,
    idle: Option<u32>,
    #[serde(default = "fifteen")]
    polling: u64,
    cooldown: Option<u64>,
    initial_cooldown: Option<u64>,
    fallback: Option<FallbackOf>,
    second: Option<SecondTrigger>,
    formula: Option<String>,
    formula_target: Option<f64>,
    #[serde(default = "yes")]
    behavior: bool,
    scale_up_window: Option<u64>,
    scale_down_window: Option<u64>,
    scale_up: Option<Vec<PolicyOf>>,
    scale_down: Option<Vec<PolicyOf>>,
    scale_down_select: Option<String>,
    scale_up_tolerance: Option<String>,
    scale_down_tolerance: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StepOf {
    at: u64,
    value: toml::Value,
    ready: Option<u32>,
    expect: u32,
}

#[derive(Deserialize)]
struct FallbackOf {
    failure_threshold: u32,
    replicas: u32,
    behavior: Option<String>,
}

#[derive(Deserialize)]
struct SecondTrigger {
    threshold: f64,
    value: toml::Value,
}

#[derive(Deserialize)]
struct PolicyOf {
    r#type: String,
    value: u32,
    period: u64,
}

fn five() -> f64 {
    5.0
}
fn one() -> u32 {
    1
}
fn fifteen() -> u64 {
    15
}
fn yes() -> bool {
    true
}

impl Case {
    /// The ScaledObject that it describes.
    fn manifest(&self) -> String {
        let mut text =
            "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata:\n  name: case\n".to_owned();
        writeln!(text, "spec:\n  scaleTargetRef: {{name: it}}\n  minReplicaCount: {}", self.min).unwrap();
        writeln!(text, "  pollingInterval: {}", self.polling).unwrap();
        let mut field = |name: &str, value: Option<u64>| {
            if let Some(value) = value {
                writeln!(text, "  {name}: {value}").unwrap();
            }
        };
        field("maxReplicaCount", self.max.map(u64::from));
        field("idleReplicaCount", self.idle.map(u64::from));
        field("cooldownPeriod", self.cooldown);
        field("initialCooldownPeriod", self.initial_cooldown);
        if let Some(fallback) = &self.fallback {
            let (threshold, replicas) = (fallback.failure_threshold, fallback.replicas);
            let behavior = fallback.behavior.as_deref().unwrap_or("static");
            writeln!(
                text,
                "  fallback: {{failureThreshold: {threshold}, replicas: {replicas}, behavior: {behavior}}}"
            )
            .unwrap();
        }
        text.push_str("  advanced:\n    restoreToOriginalReplicaCount: false\n");
        if let (Some(formula), Some(target)) = (&self.formula, self.formula_target) {
            writeln!(text, "    scalingModifiers: {{formula: \"{formula}\", target: \"{target}\"}}").unwrap();
        }
        if self.behavior {
            text.push_str("    horizontalPodAutoscalerConfig:\n      behavior:\n");
            let none = &None;
            let (up, down) = (&self.scale_up, &self.scale_down);
            text.push_str(&rules("scaleUp", self.scale_up_window, up, none, &self.scale_up_tolerance));
            let select = &self.scale_down_select;
            text.push_str(&rules(
                "scaleDown",
                self.scale_down_window,
                down,
                select,
                &self.scale_down_tolerance,
            ));
        }
        text.push_str("  triggers:\n");
        text.push_str(&self.trigger("first", self.threshold));
        if let Some(second) = &self.second {
            text.push_str(&self.trigger("second", second.threshold));
        }
        text
    }

    fn trigger(&self, name: &str, threshold: f64) -> String {
        let kind = self.metric_type.as_deref().unwrap_or("AverageValue");
        let mut text = format!("    - type: prometheus\n      name: {name}\n      metricType: {kind}\n");
        write!(
            text,
            "      metadata: {{serverAddress: \"http://p\", query: {name}, threshold: \"{threshold}\""
        )
        .unwrap();
        if let Some(activation) = self.activation {
            write!(text, ", activationThreshold: \"{activation}\"").unwrap();
        }
        if let Some(ignore) = self.ignore_null_values {
            write!(text, ", ignoreNullValues: \"{ignore}\"").unwrap();
        }
        text.push_str("}\n");
        text
    }

    /// Looks at every 15 s up to each step's time, with the step's value from the step's time on.
    /// What is wrong, if anything.
    fn run(&self) -> Option<String> {
        let manifest =
            Manifest::parse(&self.manifest()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let mut store = SampleStore::default();
        let mut scaler = Autoscaler::new(manifest);
        let mut wanted = self.start;
        let mut value = &self.steps[0].value;
        let mut seconds = 0;
        for step in &self.steps {
            while seconds <= step.at {
                value = if seconds == step.at { &step.value } else { value };
                let now = Duration::from_secs(seconds);
                record(&mut store, now, "first", value);
                if let Some(second) = &self.second {
                    record(&mut store, now, "second", &second.value);
                }
                let ready = step.ready.unwrap_or(wanted).min(wanted);
                let pods = PodCounts { wanted, existing: wanted, ready, ..PodCounts::default() };
                wanted = scaler.tick(now, &store, &pods).map_or(wanted, |to| to.replicas);
                seconds += 15;
            }
            let (name, source) = (&self.name, &self.source);
            if wanted != step.expect {
                return Some(format!("{name}, at {} s: {wanted}, not {} ({source})", step.at, step.expect));
            }
        }
        None
    }
}

fn rules(
    name: &str,
    window: Option<u64>,
    policies: &Option<Vec<PolicyOf>>,
    select: &Option<String>,
    tolerance: &Option<String>,
) -> String {
    let mut fields = Vec::new();
    fields.extend(window.map(|window| format!("stabilizationWindowSeconds: {window}")));
    fields.extend(select.as_ref().map(|select| format!("selectPolicy: {select}")));
    fields.extend(tolerance.as_ref().map(|tolerance| format!("tolerance: \"{tolerance}\"")));
    fields.extend(policies.as_ref().map(|policies| {
        let one = |policy: &PolicyOf| {
            format!("{{type: {}, value: {}, periodSeconds: {}}}", policy.r#type, policy.value, policy.period)
        };
        format!("policies: [{}]", policies.iter().map(one).collect::<Vec<_>>().join(", "))
    }));
    format!("        {name}: {{{}}}\n", fields.join(", "))
}

/// What the query of that name gives from now on.
fn record(store: &mut SampleStore, now: Duration, name: &str, value: &toml::Value) {
    for target in ["a", "b"] {
        store.target_gone(now, &format!("{name}-{target}"));
    }
    let number = match value {
        toml::Value::Integer(number) => *number as f64,
        toml::Value::Float(number) => *number,
        toml::Value::String(text) if text == "nan" => f64::NAN,
        toml::Value::String(text) if text == "two" => {
            store.record(now, &format!("{name}-b"), name, &[], 1.0);
            1.0
        }
        _ => return,
    };
    store.record(now, &format!("{name}-a"), name, &[], number);
}

#[test]
fn every_case_of_the_table_holds() {
    let text = include_str!("scaling_scripts.toml");
    let file: File = toml::from_str(text).unwrap();
    assert!(file.case.len() >= 40, "{} cases", file.case.len());
    let wrong: Vec<String> = file.case.iter().filter_map(Case::run).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
