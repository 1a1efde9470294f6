//! Dashboards, rules and triggers against a real Prometheus that scrapes real replicas and routers under load.

/// The dashboards as data.
mod dashboards;
/// What is scraped besides, where it cannot be had here: as text.
mod exporters;
/// A Prometheus with the shipped configuration.
mod prometheus;
/// The triggers of the ScaledObjects.
mod triggers;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use servelab_telemetry::names::{self, Kind};

use crate::collector::Collector;
use crate::util::{PATIENCE, Server, greedy, prose, servelab};
use dashboards::{Query, array, filled, panels, queries, variables};
use exporters::Exporters;
pub use prometheus::is_missing;
use prometheus::{Prometheus, Targets, configuration, files, promtool, read, repository};
use triggers::Trigger;

/// A small pool and short queues, so that few requests are enough for a queue, preemptions and refusals.
const SMALL: &[&str] =
    &["--kv-blocks", "40", "--max-model-len", "512", "--max-running", "4", "--max-waiting", "3"];
const CLIENTS: usize = 9;
const ROUTED_CLIENTS: usize = 3;
/// An address where nobody listens.
const NOBODY: &str = "http://127.0.0.1:1";
/// Folders whose ScaledObjects must work.
const TRIGGERS: [&str; 2] = ["deploy/kustomize/components/keda", "deploy/keda"];
const CONFIGURATIONS: [&str; 2] =
    ["deploy/compose/prometheus.yml", "deploy/kustomize/components/monitoring/prometheus.yml"];
const ADAPTER: &str = "deploy/kustomize/components/hpa/adapter-values.yaml";
const ANALYSIS: &str = "deploy/kustomize/components/rollout/analysis.yaml";
const BROKEN_TRIGGERS: &str = "deploy/keda/broken";
/// Where a metric may be named.
const PLACES: [&str; 4] = ["dashboards", "deploy", "docs/labs", "docs/runbooks.md"];
/// How names of metrics begin. DCGM's driver version is a label that is called like one.
const PREFIXES: [&str; 7] =
    ["servelab_", "process_", "DCGM_FI_DEV_", "DCGM_FI_PROF_", "kube_", "keda_scaler_", "keda_scaled_"];
/// What the client library exports about the process.
const PROCESS: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
];

/// A router before these addresses, which asks them often and holds requests for a second.
async fn router(replicas: &[&str]) -> Server {
    let mut command =
        servelab(&["route", "--port", "0", "--health-interval", "100ms", "--hold-timeout", "1s"]);
    for replica in replicas {
        command.args(["--replica", replica]);
    }
    let router = Server::spawn(command);
    router.wait_until_ready().await;
    router
}

/// Sends requests from several clients until it is dropped: to the replicas, and through each router, of which one has
/// nobody to ask.
async fn load(replicas: &[Server; 2], routers: &[Server; 2]) {
    let client = async |server: &Server, client: usize| {
        for round in 0.. {
            let prompt = prose(client * 3 + round % 3, 60 + 10 * (round % 4));
            let body = greedy(&prompt, 80);
            // Full queues and a router without replicas refuse some: that is wanted, and counted.
            let _ = server.post("/v1/completions", &body).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let direct = join_all((0..CLIENTS).map(|number| client(&replicas[number % 2], number)));
    let routed =
        join_all((0..2 * ROUTED_CLIENTS).map(|number| client(&routers[number % 2], CLIENTS + number)));
    tokio::join!(direct, routed);
}

/// Whether there is at least one number among the elements.
fn has_data(elements: &[Value]) -> bool {
    elements.iter().any(|element| number(element).is_finite())
}

fn number(element: &Value) -> f64 {
    element["value"][1].as_str().unwrap().parse().unwrap()
}

/// Asks until every query has had data once; the load goes on meanwhile.
async fn until_all_have_data(prometheus: &Prometheus, mut open: Vec<Query>) {
    let start = Instant::now();
    while !open.is_empty() {
        assert!(start.elapsed() < PATIENCE, "no data for {open:#?}");
        let mut still_open = Vec::new();
        for query in open {
            if !has_data(&prometheus.query(&query.expression).await) {
                still_open.push(query);
            }
        }
        open = still_open;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Every query of every dashboard: for all replicas together, and where there is a choice for one alone.
fn dashboard_queries(replica: &str) -> Vec<Query> {
    let mut all = Vec::new();
    for (name, dashboard) in dashboards::all() {
        for query in queries(&name, &dashboard) {
            let instances: &[&str] =
                if query.expression.contains("$instance") { &[".*", replica] } else { &[".*"] };
            for instance in instances {
                let expression = filled(&query.expression, instance);
                all.push(Query { place: format!("{} for {instance}", query.place), expression });
            }
        }
    }
    all
}

/// What rules must have data for: recorded series, and each series that an alert looks at.
async fn rule_queries(prometheus: &Prometheus) -> Vec<Query> {
    let mut all = Vec::new();
    for rule in prometheus.rules().await {
        let place = rule["name"].as_str().unwrap().to_owned();
        if rule["type"] == "recording" {
            all.push(Query { place: place.clone(), expression: place });
            continue;
        }
        for series in words(rule["query"].as_str().unwrap()).filter(|word| is_series(word)) {
            all.push(Query { place: place.clone(), expression: format!("count({series})") });
        }
    }
    all
}

/// What prometheus-adapter asks for the HPA, with the label of a replica here in place of that of a pod.
fn adapter_query() -> Query {
    let values: Value = serde_saphyr::from_str(&read(repository().join(ADAPTER))).unwrap();
    let asked = values["rules"]["custom"][0]["metricsQuery"].as_str().unwrap();
    let expression =
        asked.replace("<<.GroupBy>>", "instance").replace("<<.LabelMatchers>>", r#"job="servelab""#);
    assert!(!expression.contains("<<"), "a placeholder without a value: {expression}");
    Query { place: "prometheus-adapter".to_owned(), expression }
}

/// What the analysis of a canary asks, with one replica as the new version and the other as the old one.
fn analysis_queries([canary, stable]: [&Server; 2]) -> Vec<Query> {
    let template: Value = serde_saphyr::from_str(&read(repository().join(ANALYSIS))).unwrap();
    let query = |metric: &Value| {
        let asked = metric["provider"]["prometheus"]["query"].as_str().unwrap();
        let expression = asked
            .replace("servelab-{{args.canary}}-.*", canary.address())
            .replace("servelab-{{args.stable}}-.*", stable.address());
        assert!(!expression.contains("{{"), "an argument without a value: {expression}");
        Query { place: format!("analysis: {}", metric["name"]), expression }
    };
    array(&template["spec"], "metrics").iter().map(query).collect()
}

/// The words of a text that could be names of metrics.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.map(|word| word.trim_matches(':'))
}

/// `servelab_x`, `servelab:x:y`, `process_x`, or a name of another exporter. One colon alone is the name of an image.
fn is_series(word: &str) -> bool {
    let recorded = word.starts_with("servelab:") && word.matches(':').count() == 2;
    let named = |prefix: &&str| word.strip_prefix(*prefix).is_some_and(|rest| !rest.is_empty());
    recorded || PREFIXES.iter().any(named)
}

#[tokio::test]
async fn every_query_of_dashboards_rules_and_triggers_has_data() {
    if is_missing("prometheus") {
        return;
    }
    // One speaks OpenMetrics, with exemplars, the other Prometheus' own format.
    let collector = Collector::http().await;
    let traced = [SMALL, &collector.flags()[..]].concat();
    let replicas = [Server::start(&traced).await, Server::start(SMALL).await];
    let routers = [router(&[&replicas[0].base, &replicas[1].base]).await, router(&[NOBODY]).await];
    let exporters = Exporters::start().await;
    let prometheus = Prometheus::start(&Targets {
        replicas: [replicas[0].address(), replicas[1].address()],
        routers: vec![routers[0].address(), routers[1].address()],
        exporters: &exporters,
    });
    let checks = async {
        variables_have_values(&prometheus).await;
        let mut all = dashboard_queries(replicas[0].address());
        all.extend(rule_queries(&prometheus).await);
        all.extend(analysis_queries([&replicas[0], &replicas[1]]));
        all.push(adapter_query());
        until_all_have_data(&prometheus, all).await;
        no_rule_fails(&prometheus).await;
        exemplars_lead_to_traces(&prometheus, &collector).await;
        for trigger in TRIGGERS.iter().flat_map(|folder| triggers::of(folder)) {
            has_one_element(&prometheus, &trigger).await;
        }
        for trigger in triggers::of(BROKEN_TRIGGERS) {
            is_broken_as_it_says(&prometheus, &trigger).await;
        }
    };
    tokio::select! {
        () = checks => {}
        () = load(&replicas, &routers) => unreachable!("the load never ends by itself"),
    }
}

async fn variables_have_values(prometheus: &Prometheus) {
    for (name, dashboard) in dashboards::all() {
        for (variable, selector, label) in variables(&dashboard) {
            let selector = filled(&selector, ".*");
            let start = Instant::now();
            while prometheus.label_values(&selector, &label).await.is_empty() {
                assert!(start.elapsed() < PATIENCE, "{name}: nothing to choose for {variable}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn no_rule_fails(prometheus: &Prometheus) {
    for rule in prometheus.rules().await {
        assert_eq!(rule["health"], "ok", "{}: {}", rule["name"], rule["lastError"]);
    }
}

/// What a scrape says about slow requests can be looked up in the trace store.
async fn exemplars_lead_to_traces(prometheus: &Prometheus, collector: &Collector) {
    for metric in [names::TIME_TO_FIRST_TOKEN_SECONDS, names::E2E_REQUEST_LATENCY_SECONDS] {
        let start = Instant::now();
        loop {
            let traces = prometheus.exemplars(&format!("servelab_{}_bucket", metric.name)).await;
            let spans = collector.spans();
            if traces.iter().any(|trace| spans.iter().any(|span| span.trace_id == *trace)) {
                break;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "no exemplar of {} leads to a trace: {traces:?}",
                metric.name
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// KEDA wants exactly one element that is a number.
async fn has_one_element(prometheus: &Prometheus, trigger: &Trigger) {
    let elements = prometheus.query(&trigger.query).await;
    assert_eq!(elements.len(), 1, "{}: {} gives {elements:?}", trigger.place, trigger.query);
    assert!(number(&elements[0]).is_finite(), "{}: {elements:?}", trigger.place);
    assert!(trigger.threshold > 0.0, "{}", trigger.place);
    assert!(!trigger.ignores_null_values, "{}: no data must not be 0", trigger.place);
    assert_ne!(trigger.metric_type.as_deref(), Some("Value"), "{}", trigger.place);
    assert!(trigger.broken.is_none(), "{} says that it is broken", trigger.place);
}

/// With no replica at all: the fleet may stay at zero while nobody asks, and one request that the router holds is enough
/// to wake it.
#[tokio::test]
async fn one_request_wakes_a_fleet_from_zero_and_none_leaves_it_there() {
    if is_missing("prometheus") {
        return;
    }
    let mut command = servelab(&["route", "--port", "0", "--hold-timeout", "10m"]);
    command.args(["--replica", NOBODY]);
    let router = Server::spawn(command);
    let exporters = Exporters::start().await;
    let nobody = NOBODY.trim_start_matches("http://");
    let targets =
        Targets { replicas: [nobody, nobody], routers: vec![router.address()], exporters: &exporters };
    let prometheus = Prometheus::start(&targets);
    let held = "sum(servelab_router_requests_held)";
    until(&prometheus, &format!("{held} == 0")).await;
    let from_zero = || TRIGGERS.iter().flat_map(|folder| triggers::of(folder)).filter(Trigger::is_from_zero);
    for trigger in from_zero() {
        let elements = prometheus.query(&trigger.query).await;
        assert_eq!(
            elements.len(),
            1,
            "{}: an error at zero leads to the fallback: {elements:?}",
            trigger.place
        );
        assert!(number(&elements[0]) <= trigger.activation_threshold, "{}: never at zero", trigger.place);
    }
    for trigger in triggers::of(BROKEN_TRIGGERS).iter().filter(|trigger| trigger.is_from_zero()) {
        assert!(prometheus.query(&trigger.query).await.is_empty(), "{} works at zero", trigger.place);
    }
    let body = greedy("Wake up", 1);
    let request = router.client.post(router.url("/v1/completions")).json(&body).send();
    let checks = async {
        until(&prometheus, &format!("{held} == 1")).await;
        for trigger in from_zero() {
            let elements = prometheus.query(&trigger.query).await;
            assert_eq!(elements.len(), 1, "{}: {elements:?}", trigger.place);
            assert!(number(&elements[0]) > trigger.activation_threshold, "{}: asleep", trigger.place);
        }
    };
    tokio::select! {
        () = checks => {}
        answer = request => panic!("nobody can have answered: {answer:?}"),
    }
}

/// Waits until an expression has an element.
async fn until(prometheus: &Prometheus, expression: &str) {
    let start = Instant::now();
    while prometheus.query(expression).await.is_empty() {
        assert!(start.elapsed() < PATIENCE, "never {expression}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The broken ones are shown to people as such: each must fail in the way that its annotation names.
async fn is_broken_as_it_says(prometheus: &Prometheus, trigger: &Trigger) {
    let elements = prometheus.query(&trigger.query).await;
    // Before anything was scraped there was no series at all.
    let before = prometheus.query_before_anything(&trigger.query).await;
    let broken = match trigger.broken.as_deref().unwrap_or_else(|| panic!("{}: why?", trigger.place)) {
        "several-elements" => elements.len() == 2,
        // How they are at zero is looked at where there are no replicas.
        "empty-at-zero" => trigger.is_from_zero() && trigger.ignores_null_values && elements.len() == 1,
        "error-at-zero" => trigger.is_from_zero() && !trigger.ignores_null_values && elements.len() == 1,
        "counted-twice" => {
            let more = format!("{} > sum(servelab_router_requests_in_flight)", trigger.query);
            until(prometheus, &more).await;
            elements.len() == 1
        }
        "value-metric-type" => trigger.metric_type.as_deref() == Some("Value"),
        "ignores-null-values" => trigger.ignores_null_values && before.is_empty(),
        "constant-zero" => elements.len() == 1 && number(&elements[0]) == 0.0,
        // Of buckets that stand still comes NaN.
        "not-a-number-when-idle" => {
            let idle = trigger.query.replace("rate(", "0 * rate(");
            let elements = prometheus.query(&idle).await;
            idle != trigger.query && elements.len() == 1 && number(&elements[0]).is_nan()
        }
        other => panic!("{}: {other} is not known here", trigger.place),
    };
    assert!(broken, "{}: it works: {elements:?}, before {before:?}", trigger.place);
}

#[test]
fn rules_and_configuration_pass_promtool_with_their_unit_tests() {
    if is_missing("promtool") {
        return;
    }
    let folder = repository().join("dashboards/rules");
    let rules = names_of(files("dashboards/rules", "yaml"));
    let tests = names_of(files("dashboards/rules/tests", "yaml"));
    for (folder, command, files) in
        [(folder.clone(), ["check", "rules"], rules), (folder.join("tests"), ["test", "rules"], tests)]
    {
        let arguments: Vec<&str> = command.into_iter().chain(files.iter().map(String::as_str)).collect();
        let (passed, output) = promtool(&folder, &arguments, "");
        assert!(passed, "{output}");
    }
    for shipped in CONFIGURATIONS {
        let config = tempfile::Builder::new().suffix(".yml").tempfile().unwrap();
        fs::write(config.path(), configuration(shipped)).unwrap();
        let (passed, output) = promtool(&folder, &["check", "config", config.path().to_str().unwrap()], "");
        assert!(passed, "{shipped}: {output}");
    }
}

fn names_of(files: Vec<std::path::PathBuf>) -> Vec<String> {
    files.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Every alert has a unit test in which it fires and one in which it does not, and an entry in the runbook.
#[test]
fn every_alert_is_tested_and_explained() {
    let runbook = read(repository().join("docs/runbooks.md"));
    let tests: String = files("dashboards/rules/tests", "yaml").iter().map(read).collect();
    for path in files("dashboards/rules", "yaml") {
        for alert in read(&path).lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
            let lower = alert.to_lowercase();
            assert!(
                tests.contains(&format!("runbook_url: docs/runbooks.md#{lower}\n")),
                "{alert} never fires"
            );
            assert!(tests.contains(&format!("alertname: {alert}, exp_alerts: []")), "{alert} always fires");
            assert!(runbook.contains(&format!("\n## {alert}\n")), "{alert} is not in docs/runbooks.md");
        }
    }
}

#[tokio::test]
async fn metrics_pass_promtool_but_for_the_name_kept_from_vllm() {
    if is_missing("promtool") {
        return;
    }
    let server = Server::start(&[]).await;
    server.complete("Hello", 2).await;
    let kept = format!("servelab_{}", names::ITERATION_TOKENS.name);
    let complaints = complaints(&server).await;
    assert!(complaints.iter().any(|line| line.starts_with(&kept)), "promtool had nothing to complain about");
    assert!(complaints.iter().all(|line| line.starts_with(&kept)), "{complaints:#?}");
    let router = router(&[&server.base]).await;
    assert_eq!(router.post("/v1/completions", &greedy("Hello", 2)).await.0, 200);
    assert_eq!(self::complaints(&router).await, Vec::<String>::new());
}

/// What promtool says about the metrics of a server.
async fn complaints(server: &Server) -> Vec<String> {
    let (status, metrics) = server.get("/metrics").await;
    assert_eq!(status, 200);
    let (_, output) = promtool(repository(), &["check", "metrics"], &metrics);
    output.lines().map(str::to_owned).collect()
}

/// All files below a place in the repository.
fn all_files(place: &Path) -> Vec<std::path::PathBuf> {
    if place.is_file() {
        return vec![place.to_owned()];
    }
    let entries = fs::read_dir(place).unwrap_or_else(|error| panic!("{}: {error}", place.display()));
    entries.flat_map(|entry| all_files(&entry.unwrap().path())).collect()
}

/// Names of metrics, and which of them are histograms.
struct Exported {
    names: BTreeSet<String>,
    histograms: BTreeSet<String>,
}

impl Exported {
    /// What replicas and routers export.
    fn new() -> Self {
        let table = || names::ALL.iter().chain(names::router::ALL);
        let named = |metric: &names::Metric| format!("servelab_{}", metric.name);
        let histograms = table().filter(|metric| matches!(metric.kind, Kind::Histogram(_)));
        Self {
            names: table().map(named).chain(PROCESS.map(str::to_owned)).collect(),
            histograms: histograms.map(named).collect(),
        }
    }

    /// The name of the metric that a series belongs to.
    fn metric_of<'a>(&self, series: &'a str) -> &'a str {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| series.strip_suffix(suffix));
        base.filter(|name| self.histograms.contains(*name)).unwrap_or(series)
    }
}

/// Series whose names come from the rules.
fn recorded() -> BTreeSet<String> {
    let texts = files("dashboards/rules", "yaml").into_iter().map(read);
    let of = |text: String| {
        text.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).map(str::to_owned).collect()
    };
    texts.flat_map(|text| -> Vec<String> { of(text) }).collect()
}

#[test]
fn every_metric_that_is_named_exists() {
    let exported = Exported::new();
    let (recorded, elsewhere) = (recorded(), exporters::names());
    for path in PLACES.iter().flat_map(|place| all_files(&repository().join(place))) {
        let text = read(&path);
        let known = |word: &str| {
            exported.names.contains(exported.metric_of(word))
                || recorded.contains(word)
                || elsewhere.contains(word)
        };
        let unknown: Vec<&str> = words(&text).filter(|word| is_series(word) && !known(word)).collect();
        assert!(unknown.is_empty(), "{}: {unknown:?}", path.display());
    }
}

#[test]
fn every_metric_is_shown_or_listed_as_not_shown() {
    let exported = Exported::new();
    let text: String = files("dashboards", "json").into_iter().map(read).collect();
    let rules: String = files("dashboards/rules", "yaml").into_iter().map(read).collect();
    let shown: BTreeSet<&str> =
        words(&text).chain(words(&rules)).map(|word| exported.metric_of(word)).collect();
    let list = read(repository().join("dashboards/not-shown.txt"));
    let entries = list.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let reasons: BTreeMap<&str, &str> = entries.map(|line| line.split_once(": ").unwrap()).collect();
    for metric in &exported.names {
        let listed = reasons.contains_key(metric.as_str());
        assert_ne!(shown.contains(metric.as_str()), listed, "{metric} must be shown or listed, and not both");
    }
    let gone: Vec<&&str> = reasons.keys().filter(|name| !exported.names.contains(**name)).collect();
    assert!(gone.is_empty(), "not-shown.txt has names that are gone: {gone:?}");
}

#[test]
fn dashboards_can_be_imported_and_explain_themselves() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in dashboards::all() {
        let stem = name.strip_suffix(".json").unwrap();
        assert_eq!(dashboard["uid"], json!(format!("servelab-{stem}")));
        assert!(uids.insert(stem.to_owned()) && dashboard["id"].is_null(), "{name}");
        assert!((39..=41).contains(&dashboard["schemaVersion"].as_u64().unwrap()), "{name}");
        assert!(dashboard.get("__inputs").is_none(), "{name}: an input is asked for at every import");
        let variables = array(&dashboard["templating"], "list");
        assert!(variables.iter().any(|v| v["name"] == "datasource" && v["type"] == "datasource"), "{name}");
        assert!(!array(&dashboard["annotations"], "list").is_empty(), "{name} marks no starts");
        panels_are_complete(&name, &dashboard);
    }
}

fn panels_are_complete(name: &str, dashboard: &Value) {
    let mut ids = BTreeSet::new();
    for panel in array(dashboard, "panels") {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{name}: {} has another's id", panel["title"]);
    }
    for panel in panels(dashboard) {
        let place = format!("{name}: {}", panel["title"]);
        let description = panel["description"].as_str().unwrap_or_default();
        assert!(description.len() > 20, "{place} does not say what to conclude");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{place} has no unit");
        assert!(!array(panel, "targets").is_empty(), "{place} asks for nothing");
        for target in array(panel, "targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{place}");
        }
    }
}
