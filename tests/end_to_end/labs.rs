//! Runs the labs: every command of docs/labs that needs no cluster, in order, as a reader would.
//!
//! The first word of a fenced block is its language, the second says what it is:
//! - `sh serve`: a program that runs beside the rest, in a terminal of its own, until another takes its port;
//! - `sh run`: commands that must succeed;
//! - `sh cluster`: commands that need a cluster; the files that they name must be there, tests/deploy looks into those;
//! - `text shows`: lines that the commands before print, where any number but 0 stands for any other.
//!
//! With SERVELAB_LABS_RECORD=1 each line that is shown is printed beside what came out here; with =write the labs get it.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::observability::is_missing;
use crate::util::{BINARY, PATIENCE, has_sent_its_load, run, servelab};

/// The ports that the labs use, each replaced by a free one.
const PORTS: [&str; 4] = ["8000", "8001", "8080", "9090"];

fn labs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/labs").canonicalize().unwrap()
}

/// A fenced block.
#[derive(Debug)]
struct Block {
    line: usize,
    kind: String,
    text: String,
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut open: Option<Block> = None;
    for (index, line) in markdown.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(info), None) => {
                open = Some(Block { line: index + 1, kind: info.to_owned(), text: String::new() });
            }
            (Some(_), Some(_)) => found.extend(open.take()),
            (None, Some(block)) => block.text += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block that does not end");
    found
}

/// A line with every number but 0 replaced and runs of blanks squeezed.
fn pattern(line: &str) -> String {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut result = String::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_number(c) != is_number(first)).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        let number = part.parse::<f64>().ok();
        result += number.map_or(part, |value| if value == 0.0 { "0" } else { "#" });
        rest = after;
    }
    result.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where a lab runs: a folder that looks like the repository, ports of its own, and what runs beside.
struct Bench {
    folder: TempDir,
    ports: BTreeMap<&'static str, u16>,
    beside: BTreeMap<u16, Child>,
}

impl Bench {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let root = labs().join("../..").canonicalize().unwrap();
        for shared in ["dashboards", "deploy"] {
            symlink(root.join(shared), folder.path().join(shared)).unwrap();
        }
        std::fs::create_dir_all(folder.path().join("docs/labs")).unwrap();
        std::fs::create_dir_all(folder.path().join("bin")).unwrap();
        symlink(BINARY, folder.path().join("bin/servelab")).unwrap();
        // All are held until all are known, so that they differ.
        let held = PORTS.map(|name| (name, TcpListener::bind("127.0.0.1:0").unwrap()));
        let ports = held.iter().map(|(name, port)| (*name, port.local_addr().unwrap().port())).collect();
        let bench = Self { folder, ports, beside: BTreeMap::new() };
        let config = std::fs::read_to_string(labs().join("prometheus.yml")).unwrap();
        std::fs::write(bench.folder.path().join("docs/labs/prometheus.yml"), bench.with_ports(&config))
            .unwrap();
        bench
    }

    fn with_ports(&self, text: &str) -> String {
        let replace = |text: String, (name, port): (&&str, &u16)| {
            text.replace(&format!(":{name}"), &format!(":{port}"))
                .replace(&format!("--port {name}"), &format!("--port {port}"))
        };
        self.ports.iter().fold(text.to_owned(), replace)
    }

    fn shell(&self, script: &str) -> Command {
        let mut command = servelab(&[]);
        let environment = command.get_envs().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
        command = Command::new("bash");
        for name in environment {
            command.env_remove(name);
        }
        let path = format!("{}/bin:{}", self.folder.path().display(), std::env::var("PATH").unwrap());
        command.args(["-euo", "pipefail", "-c", script]).env("PATH", path);
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Starts a program in place of what had its port, and waits until it is ready.
    async fn serve(&mut self, text: &str) {
        let text = self.with_ports(text);
        let listens = |port: &&u16| {
            [format!("--port {port}"), format!("--web.listen-address 127.0.0.1:{port}")]
                .iter()
                .any(|flag| text.contains(flag))
        };
        let port = *self.ports.values().find(listens).unwrap_or_else(|| panic!("no port in {text}"));
        if let Some(mut old) = self.beside.remove(&port) {
            old.kill().unwrap();
            old.wait().unwrap();
        }
        let mut command = self.shell(&format!("exec {text}"));
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        self.beside.insert(port, child);
        let path = if text.starts_with("prometheus") { "-/ready" } else { "ready" };
        let url = format!("http://127.0.0.1:{port}/{path}");
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let start = Instant::now();
        while !client.get(&url).send().await.is_ok_and(|answer| answer.status() == 200) {
            assert!(start.elapsed() < PATIENCE, "never ready: {text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What the commands print, with the ports as the lab has them.
    async fn run(&self, text: &str) -> String {
        let command = self.shell(&self.with_ports(text));
        let (code, out, errors) = tokio::task::spawn_blocking(|| run(command)).await.unwrap();
        let is_load = text.starts_with("servelab bench");
        assert!(code == 0 || (is_load && has_sent_its_load(code, &errors)), "{text}{out}\n{errors}");
        let name = |text: String, (name, port): (&&str, &u16)| {
            text.replace(&format!(":{port}"), &format!(":{name}"))
        };
        self.ports.iter().fold(out, name)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for child in self.beside.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What came out where a lab shows a line.
struct Shown {
    line: usize,
    text: String,
    measured: String,
}

/// The printed line that fits each line of the block.
fn shown(block: &Block, printed: &str, place: &str) -> Vec<Shown> {
    let find = |(index, text): (usize, &str)| {
        let fits = |line: &&str| pattern(line) == pattern(text);
        let measured = printed.lines().find(fits);
        let measured = measured.unwrap_or_else(|| panic!("{place}: {text} is not in\n{printed}")).to_owned();
        Shown { line: block.line + index, text: text.to_owned(), measured }
    };
    block.text.lines().enumerate().map(find).collect()
}

/// Prints what a lab shows beside what came out, and writes it into the lab if that is asked for.
fn record(path: &Path, all: &[Shown]) {
    let Ok(mode) = std::env::var("SERVELAB_LABS_RECORD") else { return };
    let name = path.file_name().unwrap().to_str().unwrap();
    for Shown { line, text, measured } in all {
        let told = format!("{name}:{}: {text}\n  -> {measured}\n", line + 1);
        std::io::stdout().write_all(told.as_bytes()).unwrap();
    }
    if mode == "write" {
        let markdown = std::fs::read_to_string(path).unwrap();
        let mut lines: Vec<&str> = markdown.lines().collect();
        for Shown { line, measured, .. } in all {
            lines[*line] = measured;
        }
        std::fs::write(path, lines.join("\n") + "\n").unwrap();
    }
}

/// Every file of the repository that a command for a cluster names.
fn names_files_that_are_there(block: &Block, place: &str) {
    for word in block.text.split_whitespace().filter(|word| word.starts_with("deploy/")) {
        assert!(labs().join("../..").join(word).exists(), "{place}: {word} is not there");
    }
}

async fn follow(name: &str) {
    let path = labs().join(name);
    let markdown = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    if markdown.contains("prometheus --config.file") && is_missing("prometheus") {
        return;
    }
    let mut bench = Bench::new();
    let mut printed = String::new();
    let mut all_shown = Vec::new();
    let mut ran = 0;
    for block in blocks(&markdown) {
        let place = format!("{name}, line {}", block.line);
        match block.kind.as_str() {
            "sh serve" => bench.serve(&block.text).await,
            "sh run" => {
                printed = bench.run(&block.text).await;
                ran += 1;
            }
            "sh cluster" => names_files_that_are_there(&block, &place),
            "text shows" => all_shown.extend(shown(&block, &printed, &place)),
            // A query, a formula, a sketch: nothing to run.
            "promql" | "text" => {}
            other => panic!("{place}: what is `{other}`?"),
        }
    }
    assert!(ran > 0, "{name} runs nothing");
    record(&path, &all_shown);
}

#[tokio::test]
async fn first_tokens() {
    follow("1-first-tokens.md").await;
}

#[tokio::test]
async fn continuous_batching() {
    follow("2-continuous-batching.md").await;
}

#[tokio::test]
async fn paged_kv() {
    follow("3-paged-kv.md").await;
}

#[tokio::test]
async fn routing() {
    follow("4-routing.md").await;
}

#[tokio::test]
async fn keda() {
    follow("6-keda.md").await;
}

#[tokio::test]
async fn promql() {
    follow("5-promql.md").await;
}

#[tokio::test]
async fn cold_start() {
    follow("7-cold-start.md").await;
}

#[tokio::test]
async fn scaling_simulated() {
    follow("8-scaling-simulated.md").await;
}

#[tokio::test]
async fn capacity() {
    follow("9-capacity.md").await;
}

/// A lab that no test follows would be found here.
#[test]
fn every_lab_is_followed() {
    let followed = include_str!("labs.rs");
    for entry in std::fs::read_dir(labs()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_lab = name.ends_with(".md") && name != "README.md";
        assert!(!is_lab || followed.contains(&format!("follow(\"{name}\")")), "nothing follows {name}");
    }
}

#[test]
fn a_pattern_keeps_zero_and_forgets_other_numbers() {
    assert_eq!(pattern("a{x=\"b\"}  12.5"), "a{x=\"b\"} #");
    assert_eq!(pattern("a 0"), "a 0");
    assert_ne!(pattern("a 0"), pattern("a 3"));
}
