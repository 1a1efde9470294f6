//! The dashboards as data: what each of their panels, variables and annotations asks Prometheus for.

use serde_json::Value;

use super::prometheus::{files, read};

/// One question to Prometheus, and where it stands.
#[derive(Clone, Debug)]
pub struct Query {
    pub place: String,
    pub expression: String,
}

/// A dashboard's file name and content.
pub fn all() -> Vec<(String, Value)> {
    let named = |path: std::path::PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let dashboard = serde_json::from_str(&read(&path)).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, dashboard)
    };
    files("dashboards", "json").into_iter().map(named).collect()
}

pub fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The panels that show something.
pub fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    array(dashboard, "panels").iter().filter(|panel| panel["type"] != "row")
}

/// What the panels and annotations ask for, as they stand in the file.
pub fn queries(name: &str, dashboard: &Value) -> Vec<Query> {
    let of = |title: &str, value: &Value| Query {
        place: format!("{name}: {title}"),
        expression: value["expr"].as_str().unwrap().to_owned(),
    };
    let mut all = Vec::new();
    for panel in panels(dashboard) {
        let title = panel["title"].as_str().unwrap();
        all.extend(array(panel, "targets").iter().map(|target| of(title, target)));
    }
    for annotation in array(&dashboard["annotations"], "list") {
        all.push(of(annotation["name"].as_str().unwrap(), annotation));
    }
    all
}

/// The dashboard's variables that are filled from Prometheus: name, selector, label.
pub fn variables(dashboard: &Value) -> Vec<(String, String, String)> {
    let list = array(&dashboard["templating"], "list").iter().filter(|variable| variable["type"] == "query");
    let parts = |variable: &Value| {
        let query = variable["query"]["query"].as_str().unwrap();
        let inside = query.strip_prefix("label_values(").unwrap().strip_suffix(')').unwrap();
        let (selector, label) = inside.rsplit_once(", ").unwrap();
        (variable["name"].as_str().unwrap().to_owned(), selector.to_owned(), label.to_owned())
    };
    list.map(parts).collect()
}

/// The expression as Grafana sends it when these replicas are chosen.
///
/// # Panics
/// If a variable is left that is not known here.
pub fn filled(expression: &str, instance: &str) -> String {
    let known = [
        ("$__rate_interval", "15s"),
        ("$model", ".*"),
        ("$instance", instance),
        ("$router", ".*"),
        ("$gpu", ".*"),
        ("$threshold", "5"),
    ];
    let text = known.iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value));
    assert!(!text.contains('$'), "a variable without a value: {text}");
    text
}
