//! The Prometheus triggers of KEDA's ScaledObjects, typed: KEDA takes any key, and ignores one that it does not know.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::prometheus::{files, read};

#[derive(Deserialize)]
struct ScaledObject {
    kind: String,
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
#[serde(rename_all = "camelCase")]
struct Spec {
    min_replica_count: Option<u32>,
    triggers: Vec<Typed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Typed {
    r#type: String,
    #[expect(dead_code, reason = "there so that it is no unknown field")]
    name: Option<String>,
    metric_type: Option<String>,
    metadata: PrometheusMetadata,
    #[expect(dead_code, reason = "there so that it is no unknown field")]
    authentication_ref: Option<Value>,
}

/// The keys that these manifests may use, of those of KEDA 2.20. All values are strings there.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "most are there so that they are no unknown fields")]
struct PrometheusMetadata {
    server_address: String,
    query: String,
    threshold: String,
    activation_threshold: Option<String>,
    ignore_null_values: Option<String>,
    auth_modes: Option<String>,
    timeout: Option<String>,
}

/// A trigger with what is said around it.
pub struct Trigger {
    pub place: String,
    pub query: String,
    pub threshold: f64,
    pub metric_type: Option<String>,
    pub ignores_null_values: bool,
    pub min_replicas: Option<u32>,
    /// Above it the scaler keeps the fleet from zero.
    pub activation_threshold: f64,
    /// How it fails, where its manifest says that it is broken.
    pub broken: Option<String>,
}

impl Trigger {
    pub fn is_from_zero(&self) -> bool {
        self.min_replicas == Some(0)
    }
}

/// Every trigger of the ScaledObjects in a folder.
pub fn of(folder: &str) -> Vec<Trigger> {
    files(folder, "yaml").into_iter().flat_map(of_file).collect()
}

fn of_file(path: PathBuf) -> Vec<Trigger> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&read(&path)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let objects = documents.into_iter().filter(|document| document["kind"] == "ScaledObject");
    let typed = objects.map(|document| {
        serde_json::from_value::<ScaledObject>(document).unwrap_or_else(|error| panic!("{name}: {error}"))
    });
    typed.flat_map(triggers).collect()
}

fn triggers(object: ScaledObject) -> Vec<Trigger> {
    assert_eq!(object.kind, "ScaledObject");
    let ScaledObject { metadata, spec, .. } = object;
    let prometheus = spec.triggers.into_iter().filter(|trigger| trigger.r#type == "prometheus");
    let read = |trigger: Typed| Trigger {
        place: metadata.name.clone(),
        query: trigger.metadata.query,
        threshold: trigger.metadata.threshold.parse().unwrap(),
        metric_type: trigger.metric_type,
        ignores_null_values: trigger.metadata.ignore_null_values.as_deref() != Some("false"),
        min_replicas: spec.min_replica_count,
        activation_threshold: trigger.metadata.activation_threshold.map_or(0.0, |text| text.parse().unwrap()),
        broken: metadata.annotations.get("servelab.dev/broken").cloned(),
    };
    prometheus.map(read).collect()
}
