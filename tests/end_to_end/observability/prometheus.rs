//! A real Prometheus with the shipped configuration, and its API in a few words.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;

use super::exporters::Exporters;
use crate::util::PATIENCE;

/// The replicas that the shipped configuration names.
const SHIPPED_REPLICAS: [&str; 2] = ["replica-1:8000", "replica-2:8000"];
const SHIPPED_ROUTER: &str = "router:8080";
/// How compose's Prometheus finds dcgm-exporter, and the cluster's KEDA.
const SHIPPED_DCGM: &str = "    dns_sd_configs:\n      - {names: [dcgm-exporter], type: A, port: 9400}\n";
const SHIPPED_KEDA: &str = "keda-operator.keda.svc:8080";

/// What a Prometheus scrapes in a test, in place of what the shipped configuration names.
pub struct Targets<'a> {
    /// Addresses, as `127.0.0.1:PORT`.
    pub replicas: [&'a str; 2],
    pub routers: Vec<&'a str>,
    pub exporters: &'a Exporters,
}

pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether the tools of Debian's package `prometheus` are here. In CI they must be.
pub fn is_missing(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if found {
        return false;
    }
    assert!(std::env::var_os("CI").is_none(), "{tool} is not installed, and CI has to have it");
    let line = "SKIPPED a test against Prometheus: install prometheus and promtool (Debian: prometheus)\n";
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    true
}

/// Runs promtool in a folder of the repository; its output, and whether it was content.
pub fn promtool(folder: &Path, arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new("promtool");
    command.current_dir(folder).args(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let both = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(both).unwrap())
}

/// The files of a folder of the repository with this ending, in order.
pub fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(repository().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
    assert!(!found.is_empty(), "{folder} has no .{ending}");
    found.sort();
    found
}

/// A shipped configuration with the rules where they are here. Debian's promtool is built without the discovery of
/// Kubernetes' pods, so that part is left out; what is made of the pods' labels stays.
pub fn configuration(path: &str) -> String {
    let mut shipped = read(repository().join(path));
    if let Some(start) = shipped.find("    kubernetes_sd_configs:") {
        let end = shipped.find("    relabel_configs:").unwrap();
        shipped.replace_range(start..end, "    static_configs: []\n");
    }
    let rules = repository().canonicalize().unwrap().join("dashboards/rules");
    replace(&shipped, "/etc/prometheus/rules", rules.to_str().unwrap())
}

fn replace(text: &str, old: &str, new: &str) -> String {
    assert!(text.contains(old), "{old} is not in the configuration");
    text.replace(old, new)
}

/// A Prometheus that runs. Killed when it goes out of scope.
pub struct Prometheus {
    child: Child,
    base: String,
    client: reqwest::Client,
    _folder: TempDir,
}

impl Prometheus {
    /// Starts it with the shipped configuration, these targets, and all intervals at one second.
    pub fn start(targets: &Targets<'_>) -> Self {
        let folder = TempDir::new().unwrap();
        let rules = folder.path().join("rules");
        fs::create_dir(&rules).unwrap();
        for path in files("dashboards/rules", "yaml") {
            let text = in_seconds(&read(&path));
            fs::write(rules.join(path.file_name().unwrap()), text).unwrap();
        }
        let config = replace(&scrape_config(targets), "/etc/prometheus/rules", rules.to_str().unwrap());
        fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        Self::spawn(folder)
    }

    fn spawn(folder: TempDir) -> Self {
        let mut child = Command::new("prometheus")
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg("--enable-feature=exemplar-storage")
            .arg("--web.listen-address=127.0.0.1:0")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (send, receive) = mpsc::channel();
        // Reads to the end, so that Prometheus never meets a full or closed pipe.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.contains("Listening on") {
                    let _ = send.send(line.rsplit_once("address=").unwrap().1.to_owned());
                }
            }
        });
        let address = receive.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let _ = child.kill();
            panic!("Prometheus does not say where it listens")
        });
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Self { child, base: format!("http://{address}"), client, _folder: folder }
    }

    /// The data of an answer.
    ///
    /// # Panics
    /// With Prometheus' words where it refuses the question.
    async fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = reqwest::Url::parse_with_params(&format!("{}{path}", self.base), parameters).unwrap();
        let start = Instant::now();
        loop {
            let answer = self.client.get(url.clone()).send().await.unwrap();
            // It listens before it has read its database.
            if answer.status() == 503 && start.elapsed() < PATIENCE {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            let mut body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
            assert_eq!(body["status"], "success", "{parameters:?}: {}", body["error"]);
            return body["data"].take();
        }
    }

    /// The elements that an expression has now, NaN among them.
    pub async fn query(&self, expression: &str) -> Vec<Value> {
        let mut data = self.ask("/api/v1/query", &[("query", expression)]).await;
        match data["resultType"].as_str().unwrap() {
            "vector" => serde_json::from_value(data["result"].take()).unwrap(),
            kind => panic!("{expression} is no vector but {kind}"),
        }
    }

    /// The elements that an expression had before anything was scraped, as with no replica at all.
    pub async fn query_before_anything(&self, expression: &str) -> Vec<Value> {
        let data = self.ask("/api/v1/query", &[("query", expression), ("time", "1000")]).await;
        data["result"].as_array().unwrap().clone()
    }

    /// The values that a label has among the series of a selector.
    pub async fn label_values(&self, selector: &str, label: &str) -> Vec<Value> {
        let path = format!("/api/v1/label/{label}/values");
        self.ask(&path, &[("match[]", selector)]).await.as_array().unwrap().clone()
    }

    /// The traces that the exemplars of a series name.
    pub async fn exemplars(&self, series: &str) -> Vec<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (start, end) = ((now - 600).to_string(), (now + 60).to_string());
        let asked = [("query", series), ("start", &start), ("end", &end)];
        let data = self.ask("/api/v1/query_exemplars", &asked).await;
        let found =
            data.as_array().unwrap().iter().flat_map(|series| series["exemplars"].as_array().unwrap());
        found.map(|exemplar| exemplar["labels"]["trace_id"].as_str().unwrap().to_owned()).collect()
    }

    /// Every rule, as Prometheus read it.
    pub async fn rules(&self) -> Vec<Value> {
        let data = self.ask("/api/v1/rules", &[]).await;
        let groups = data["groups"].as_array().unwrap();
        groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Compose's configuration with these targets, and what a cluster's has besides.
fn scrape_config(targets: &Targets<'_>) -> String {
    let mut config = in_seconds(&read(repository().join("deploy/compose/prometheus.yml")));
    for (name, replica) in SHIPPED_REPLICAS.iter().zip(targets.replicas) {
        config = replace(&config, name, replica);
    }
    config = replace(&config, SHIPPED_ROUTER, &targets.routers.join("\", \""));
    let at = |address: &str| format!("    static_configs:\n      - targets: [\"{address}\"]\n");
    config = replace(&config, SHIPPED_DCGM, &at(&targets.exporters.dcgm.address));
    let cluster = read(repository().join("deploy/kustomize/components/monitoring/prometheus.yml"));
    let keda = &cluster[cluster.find("  - job_name: keda\n").unwrap()..];
    config += &replace(keda, SHIPPED_KEDA, &targets.exporters.keda.address);
    config + "  - job_name: kube-state-metrics\n" + &at(&targets.exporters.kube_state_metrics.address)
}

/// With every interval at one second: a test has no time to wait.
fn in_seconds(text: &str) -> String {
    let line = |line: &str| match line.split_once("interval: ") {
        Some((before, _)) => format!("{before}interval: 1s\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}
