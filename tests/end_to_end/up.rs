//! Replicas, router and load by one command: all of it comes up, one that dies comes back, and nothing is left behind.

use std::process::Stdio;
use std::time::Instant;

use tempfile::TempDir;

use crate::util::{PATIENCE, client, has_sent_its_load, servelab};

const SMALL: &[&str] = &["--threads", "1", "--kv-blocks", "256", "--max-running", "8"];

/// A running `servelab up`, whose standard error goes to a file.
struct Up {
    process: std::process::Child,
    folder: TempDir,
}

impl Up {
    fn start(flags: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let errors = std::fs::File::create(folder.path().join("errors")).unwrap();
        let mut command = servelab(&["up", "--port", "0", "--logs", folder.path().to_str().unwrap()]);
        command.args(flags).arg("--").args(SMALL).stderr(errors).stdout(Stdio::null());
        Self { process: command.spawn().unwrap(), folder }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("errors")).unwrap()
    }

    async fn until_said(&mut self, text: &str) {
        let start = Instant::now();
        while !self.said().contains(text) {
            assert!(start.elapsed() < PATIENCE, "{text} was not said: {}", self.said());
            assert!(self.process.try_wait().unwrap().is_none(), "it ended: {}", self.said());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// The word after `before` in the line that begins with `name`; of several lines the last.
    fn word(&self, name: &str, before: &str) -> String {
        let said = self.said();
        let line = said.lines().rfind(|line| line.starts_with(name)).unwrap();
        line.split_once(before).unwrap().1.split_whitespace().next().unwrap().to_owned()
    }

    fn router(&self) -> String {
        format!("http://{}", self.word("router", "http://"))
    }

    fn pids(&self) -> Vec<u32> {
        self.said().lines().filter_map(|line| line.split_once("  pid ")?.1.trim().parse().ok()).collect()
    }

    fn signal(&self, pid: u32, name: &str) {
        assert!(
            std::process::Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success()
        );
    }

    async fn ended(&mut self) -> i32 {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(start.elapsed() < PATIENCE, "it does not end: {}", self.said());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// None of its processes is left.
    async fn is_gone(&self) {
        let runs = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            status.contains("servelab")
        };
        let start = Instant::now();
        while self.pids().iter().any(runs) {
            assert!(start.elapsed() < PATIENCE, "something is left: {}", self.said());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_load_goes_through_the_router_to_all_replicas_and_ends_the_lab() {
    let load = "--concurrency 4 --requests 24 --repeats 1 --warm-up 0 --no-cool-down --input-tokens 16 \
                --output-tokens 16 --json";
    let mut up = Up::start(&["--replicas", "2", "--load", load, "--end-with-load"]);
    let code = up.ended().await;
    let said = up.said();
    assert!(has_sent_its_load(code, &said), "{code}: {said}");
    for part in [
        "replica 1",
        "replica 2",
        "all replicas are ready",
        "servelab bench --url http://127.0.0.1:",
        "choices:",
    ] {
        assert!(said.contains(part), "{part} is not in\n{said}");
    }
    assert_eq!(up.pids().len(), 3, "{said}");
    let shares = said.lines().filter(|line| line.starts_with("replica") && line.contains(" requests ("));
    assert_eq!(shares.count(), 2, "{said}");
    up.is_gone().await;
}

#[tokio::test]
async fn a_killed_replica_comes_back_and_a_signal_ends_all() {
    let mut up = Up::start(&["--no-load"]);
    up.until_said("Ctrl-C ends").await;
    let page = client().get(up.router()).send().await.unwrap();
    assert!(page.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    assert!(page.text().await.unwrap().contains("<title>servelab: the fleet</title>"));
    let address = up.word("replica 1", "http://");
    up.signal(up.pids()[0], "-KILL");
    up.until_said("replica 1 runs again").await;
    assert_eq!(up.word("replica 1 runs", "http://"), address, "where the router looks for it");
    let start = Instant::now();
    loop {
        let health =
            client().get(format!("{}/health", up.router())).send().await.unwrap().text().await.unwrap();
        if health.contains("\"replicas_ready\":2") {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{health}: {}", up.said());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    up.signal(up.process.id(), "-TERM");
    assert_eq!(up.ended().await, 0, "{}", up.said());
    up.is_gone().await;
}

#[tokio::test]
async fn nothing_outlives_a_lab_that_is_killed() {
    let mut up = Up::start(&["--no-load"]);
    up.until_said("all replicas are ready").await;
    up.signal(up.process.id(), "-KILL");
    up.ended().await;
    up.is_gone().await;
}

#[tokio::test]
async fn what_cannot_start_is_told_with_the_last_of_its_log() {
    for (flags, code, parts) in [
        (&["--", "--model", "/no/such/folder"][..], 1, ["replica 1 did not listen", "/no/such/folder"]),
        (&["--policy", "fastest"], 1, ["router did not listen", "fastest"]),
        (&["--", "--port", "80"], 2, ["--port is set by servelab up", "leave it out"]),
        (&["--replicas", "0"], 2, ["--replicas", "1..=64"]),
    ] {
        let logs = TempDir::new().unwrap();
        let mut command = servelab(&["up", "--port", "0", "--logs", logs.path().to_str().unwrap()]);
        command.args(flags);
        let (found, _, errors) = crate::util::run(command);
        assert_eq!(found, code, "{flags:?}: {errors}");
        for part in parts {
            assert!(errors.contains(part), "{flags:?}: {part} is not in {errors}");
        }
    }
}
