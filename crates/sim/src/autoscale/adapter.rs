//! prometheus-adapter: the rules by which it offers metrics of pods (`pkg/naming` of prometheus-adapter 0.12).

use std::collections::BTreeMap;

use regex::Regex;
use serde::Deserialize;

use super::manifest::ManifestError;
use super::promql::Query;

/// The rules for custom metrics, as the adapter's configuration or the values of its Helm chart hold them.
#[derive(Clone, Debug, Default)]
pub struct Adapter {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    /// Of one of the series that it is about.
    series: String,
    /// The name under which it is offered.
    name: String,
    query: String,
}

/// The label that tells the namespace, in what is simulated.
pub const NAMESPACE: &str = "servelab";

#[derive(Deserialize)]
struct File {
    rules: Rules,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Rules {
    /// The configuration itself.
    Plain(Vec<TypedRule>),
    Values(HelmRules),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HelmRules {
    #[serde(default = "yes")]
    default: bool,
    #[serde(default)]
    custom: Vec<TypedRule>,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TypedRule {
    series_query: String,
    resources: Resources,
    #[serde(default)]
    name: Name,
    metrics_query: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    overrides: BTreeMap<String, Resource>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resource {
    #[serde(rename = "group")]
    _group: Option<String>,
    resource: String,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    matches: Option<String>,
    r#as: Option<String>,
}

impl Adapter {
    /// Reads the configuration, or the values of the Helm chart.
    ///
    /// # Errors
    /// What cannot be read, or is not simulated.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let file: File =
            serde_saphyr::from_str(text).map_err(|error| ManifestError::Adapter(error.to_string()))?;
        let (has_default, rules) = match file.rules {
            Rules::Plain(rules) => (false, rules),
            Rules::Values(HelmRules { default, custom }) => (default, custom),
        };
        if has_default {
            let text = "rules.default is true; the chart's own rules are not simulated: set it to false";
            return Err(ManifestError::Adapter(text.into()));
        }
        let rules = rules.into_iter().map(rule).collect::<Result<Vec<Rule>, String>>();
        Ok(Self { rules: rules.map_err(ManifestError::Adapter)? })
    }

    /// The query that gives the metric of that name of every pod, which its label `pod` names.
    ///
    /// # Errors
    /// If no rule offers it, or its query is not simulated.
    pub fn query(&self, metric: &str) -> Result<Query, ManifestError> {
        let Some(rule) = self.rules.iter().find(|rule| rule.name == metric) else {
            let offered: Vec<&str> = self.rules.iter().map(|rule| rule.name.as_str()).collect();
            return Err(ManifestError::Adapter(format!(
                "no rule offers the metric {metric:?}; offered: {}",
                if offered.is_empty() { "none".to_owned() } else { offered.join(", ") }
            )));
        };
        let text = rule
            .query
            .replace("<<.Series>>", &rule.series)
            .replace("<<.LabelMatchers>>", &format!("namespace=\"{NAMESPACE}\""))
            .replace("<<.GroupBy>>", "pod");
        if let Some(at) = text.find("<<") {
            let (part, field) = (text[at..].chars().take(30).collect::<String>(), "metricsQuery".to_owned());
            let rule = "of its template Series, LabelMatchers and GroupBy are simulated";
            return Err(ManifestError::Field { field, value: part, rule });
        }
        Query::parse(&text).map_err(|source| ManifestError::Query { field: "metricsQuery".into(), source })
    }
}

fn rule(typed: TypedRule) -> Result<Rule, String> {
    let TypedRule { series_query, resources, name, metrics_query } = typed;
    let of_label = |label: &str| resources.overrides.get(label).map(|it| it.resource.as_str());
    if of_label("namespace") != Some("namespace") || of_label("pod") != Some("pod") {
        return Err(format!(
            "resources.overrides of {series_query:?}: the labels namespace and pod are to name the resources of \
             the same names"
        ));
    }
    let series = series_query.split('{').next().unwrap_or_default().trim().to_owned();
    if series.is_empty() {
        return Err(format!("seriesQuery is {series_query:?}; it is to begin with the name of a metric"));
    }
    let name = offered(&series, &name)?;
    Ok(Rule { series, name, query: metrics_query })
}

/// `MetricNameConverter`: the whole name, or its one group, where nothing else is said.
fn offered(series: &str, name: &Name) -> Result<String, String> {
    let pattern = name.matches.as_deref().unwrap_or(".*");
    let matches = Regex::new(pattern).map_err(|error| format!("name.matches is {pattern:?}: {error}"))?;
    let template = match (&name.r#as, matches.captures_len()) {
        (Some(template), _) => template.clone(),
        (None, 1) => "${0}".to_owned(),
        (None, 2) => "${1}".to_owned(),
        (None, _) => {
            return Err(format!("name.matches is {pattern:?}; with several groups name.as is needed"));
        }
    };
    Ok(matches.replace(series, template).into_owned())
}
