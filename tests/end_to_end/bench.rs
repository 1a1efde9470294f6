//! `servelab bench` against a replica, and against the engine in its own process. What it measures is tested beside
//! the load generator; here it is what comes out of the command.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::util::{PATIENCE, Server, servelab};

/// Runs to its end. On a busy machine the client may be late, which it says with exit code 1.
pub fn bench(flags: &[&str]) -> Output {
    let mut command = servelab(&["bench"]);
    command.args(flags).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in ["SERVELAB_API_KEY", "OPENAI_API_KEY"] {
        command.env_remove(variable);
    }
    command.output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The result of a run whose figures stand, but perhaps for a late client.
pub fn result(output: &Output) -> Value {
    let errors = text(&output.stderr);
    let stands = output.status.success() || errors.contains("client-bound");
    assert!(stands, "{:?}: {errors}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[tokio::test]
async fn a_ladder_leaves_its_files() {
    let server = Server::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run").to_str().unwrap().to_owned();
    let flags = [
        "--url",
        &server.base,
        "--concurrency",
        "1,3",
        "--requests",
        "6",
        "--repeats",
        "2",
        "--seed",
        "5",
        "--input-tokens",
        "20:30",
        "--output-tokens",
        "4",
        "--out",
        &out,
        "--json",
        "--metadata",
        "clocks=default",
    ];
    let printed = result(&bench(&flags));
    let written = json(&folder.path().join("run/result.json"));
    assert_eq!(printed, written);
    assert_eq!(written["header"]["model"]["id"], "demo");
    assert_eq!(written["header"]["metadata"]["clocks"], "default");
    assert_eq!(written["header"]["workload"]["seed"], 5);
    assert_eq!(written["header"]["target"]["server"]["version"], env!("CARGO_PKG_VERSION"));
    let points = written["points"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    for point in points {
        let metrics = &point["metrics"];
        assert_eq!((&metrics["completed"], &metrics["failed"]), (&12.into(), &0.into()), "{metrics}");
        assert_eq!(metrics["output_tokens"]["mean"], 4.0);
        let input = &metrics["input_tokens"];
        assert!(input["min"].as_f64() >= Some(20.0) && input["max"].as_f64() <= Some(30.0), "{input}");
        assert!(point["intervals"]["mean_ttft_ms"]["half_width"].is_number());
        assert!(point["repeats"][0]["prefix_cache"]["query_tokens"].as_u64() > Some(0));
    }
    // vLLM's names at the top, and a file of them for each rung.
    assert!(
        written["mean_ttft_ms"].as_f64() > Some(0.0) && written["request_throughput"].as_f64() > Some(0.0)
    );
    let rung = json(&folder.path().join("run/vllm/01-concurrency-3.json"));
    assert_eq!((&rung["max_concurrency"], &rung["completed"]), (&3.into(), &12.into()));
    let lines = std::fs::read_to_string(folder.path().join("run/requests.jsonl")).unwrap();
    let records: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let measured = records.iter().filter(|record| record["phase"] == "measured");
    assert!(measured.clone().all(|record| record["outcome"]["kind"] == "completed"));
    assert_eq!(measured.count(), 24);
}

/// A salted run finds nothing of an earlier one in the cache; without salt the second finds it all.
#[tokio::test]
async fn salt_keeps_runs_apart() {
    let server = Server::start(&[]).await;
    let hits = |more: &str| {
        let flags = [
            "--url",
            &server.base,
            "--rate",
            "inf",
            "--requests",
            "3",
            "--repeats",
            "1",
            "--input-tokens",
            "64",
            "--output-tokens",
            "2",
            "--json",
            more,
        ];
        let printed = result(&bench(&flags));
        printed["points"][0]["repeats"][0]["prefix_cache"]["hit_tokens"].as_u64().unwrap()
    };
    let plain = "--label=x";
    assert_eq!((hits(plain), hits(plain)), (0, 0));
    assert_eq!(hits("--no-salt"), 0);
    assert!(hits("--no-salt") > 100);
}

#[tokio::test]
async fn conversations_repeat_what_was_said() {
    let server = Server::start(&[]).await;
    let flags = [
        "--url",
        &server.base,
        "--workload",
        "multi-turn",
        "--turns",
        "3",
        "--input-tokens",
        "10",
        "--output-tokens",
        "5",
        "--prefix-tokens",
        "40",
        "--concurrency",
        "2",
        "--requests",
        "6",
        "--repeats",
        "1",
        "--warm-up",
        "0",
        "--no-cool-down",
        "--json",
    ];
    let printed = result(&bench(&flags));
    let metrics = &printed["points"][0]["metrics"];
    assert_eq!((&metrics["completed"], &metrics["failed"]), (&6.into(), &0.into()), "{metrics}");
    assert!(metrics["cached_prompt_tokens"].as_u64() > Some(60), "{metrics}");
    let input = &metrics["input_tokens"];
    // The first turn has the prefix and its own; the third two turns and answers more.
    assert!(input["max"].as_f64().unwrap() >= input["min"].as_f64().unwrap() + 30.0, "{input}");
}

#[test]
fn the_engine_is_measured_in_process() {
    let flags = [
        "--offline",
        "--concurrency",
        "4",
        "--requests",
        "8",
        "--repeats",
        "1",
        "--input-tokens",
        "32",
        "--output-tokens",
        "8",
        "--hardware",
        "h100",
        "--json",
    ];
    let printed = result(&bench(&flags));
    assert_eq!(printed["header"]["target"]["kind"], "offline");
    let point = &printed["points"][0];
    assert_eq!((&point["metrics"]["completed"], &point["metrics"]["failed"]), (&8.into(), &0.into()));
    assert_eq!(point["repeats"][0]["client"]["clock"], "step");
    assert_eq!(point["limits"]["rows"].as_array().unwrap().len(), 3);
}

#[cfg(unix)]
#[tokio::test]
async fn an_interrupt_ends_the_run_with_what_was_measured() {
    let server = Server::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let mut command = servelab(&[
        "bench",
        "--url",
        &server.base,
        "--concurrency",
        "2",
        "--requests",
        "100000",
        "--input-tokens",
        "8",
        "--output-tokens",
        "2",
        "--json",
        "--out",
        folder.path().to_str().unwrap(),
    ]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    server
        .until("measured", async || {
            let (_, metrics) = server.get("/metrics").await;
            let ended =
                |line: &str| line.starts_with("servelab_request_success_total{finished_reason=\"length\"");
            metrics.lines().find(|line| ended(line)).is_some_and(|line| !line.ends_with(" 0"))
        })
        .await;
    // Long enough for some measured requests, and nothing that a slow machine would fail by.
    tokio::time::sleep(PATIENCE / 100).await;
    let sent = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    let printed = result(&output);
    let repeats = printed["points"][0]["repeats"].as_array().unwrap();
    assert_eq!((repeats.len(), &repeats[0]["interrupted"]), (1, &Value::Bool(true)));
    assert!(printed["points"][0]["metrics"]["completed"].as_u64() > Some(0));
    assert_eq!(json(&folder.path().join("result.json")), printed);
    let report = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(report.contains("the run was ended early"));
    assert!(folder.path().join("report.md").exists() && folder.path().join("requests.jsonl").exists());
}

/// Both are started at once, as in a script.
#[tokio::test]
async fn a_server_that_still_starts_is_waited_for() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let url = format!("http://{address}");
    let flags = [
        "--url",
        &url,
        "--concurrency",
        "1",
        "--requests",
        "3",
        "--output-tokens",
        "4",
        "--repeats",
        "1",
        "--json",
    ];
    let too_early = bench(&[&flags[..], &["--wait-ready", "300ms"]].concat());
    let errors = text(&too_early.stderr);
    assert!(too_early.status.code() == Some(1) && errors.contains("was not ready within 0.3 s"), "{errors}");

    let mut waiting = servelab(&["bench"]);
    waiting.args(flags).args(["--wait-ready", "60s"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let waiting = waiting.spawn().unwrap();
    let port = address.port().to_string();
    let _server = Server::spawn(servelab(&["serve", "--port", &port]));
    let printed = result(&waiting.wait_with_output().unwrap());
    assert_eq!(printed["points"][0]["metrics"]["completed"], 3, "{printed}");
}

#[test]
fn what_cannot_be_measured_says_why() {
    for (flags, code, part) in [
        (&["--concurrency", "1", "--rate", "1"][..], 2, "--concurrency and --rate exclude each other"),
        (&["--concurrency", "1", "--workload", "azure"], 2, "\"azure\" is unknown"),
        (&["--concurrency", "1", "--hardware", "h900", "--model-shape", "llama-3.1-8b"], 2, "h900"),
        (&["--concurrency", "1", "--out", "/dev/null/x"], 1, "/dev/null/x"),
    ] {
        let output = bench(flags);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {errors}");
        assert!(errors.contains(part), "{flags:?}: {errors}");
        assert!(output.stdout.is_empty(), "{flags:?}");
    }
}
