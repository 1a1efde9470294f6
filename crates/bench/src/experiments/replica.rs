//! A server of its own for an experiment: this program again, on a free port, killed when nobody needs it any more.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use http::Method;
use servelab_wire::StateSnapshot;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::ExperimentError;
use crate::client::{Client, Target, Timeouts};
use crate::server;

/// Longest time until a server listens, and until its model is loaded.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// What is kept of what it says on standard error.
const MOST_COMPLAINT_BYTES: u64 = 4096;
const POLL: Duration = Duration::from_millis(2);

/// How servers are started.
#[derive(Clone, Debug)]
pub struct Launcher {
    pub program: PathBuf,
    /// `serve` and what says which model.
    pub arguments: Vec<String>,
}

/// A running server.
pub struct Replica {
    child: Child,
    pub client: Client,
    /// Besides those of the launcher.
    pub flags: Vec<String>,
    pub start: StartTimes,
}

/// How long a start took, since the process was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StartTimes {
    pub listening: Duration,
    pub ready: Duration,
}

impl Launcher {
    /// Starts a server with `flags` and waits until its model is loaded.
    ///
    /// # Errors
    /// If it ends or hangs before that; what it said is in the error.
    pub async fn start(&self, flags: &[String]) -> Result<Replica, ExperimentError> {
        let started = Instant::now();
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(["--port", "0", "--log-level", "error"]).args(flags);
        // Keys would keep us out, too.
        command.env_remove("SERVELAB_API_KEYS");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // In a group of its own, so that Ctrl-C reaches only the one who decides what to do about it.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn().map_err(|source| ExperimentError::Start(source.to_string()))?;
        match tokio::time::timeout(START_TIMEOUT, address(&mut child)).await {
            Ok(Some(address)) => self.wait_until_ready(child, &address, flags, started).await,
            Ok(None) => Err(ExperimentError::Start(complaint(child).await)),
            Err(_) => Err(ExperimentError::Start(format!("it did not listen within {START_TIMEOUT:?}"))),
        }
    }

    /// What a command of the program prints. It ends with the future.
    ///
    /// # Errors
    /// If it does not succeed; what it said last is in the error.
    pub async fn output(&self, arguments: &[&str]) -> Result<Vec<u8>, ExperimentError> {
        let failed = |reason: String| ExperimentError::Simulation(reason);
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        #[cfg(unix)]
        command.process_group(0);
        let output = command.output().await.map_err(|source| failed(source.to_string()))?;
        if output.status.success() { Ok(output.stdout) } else { Err(failed(last_line(&output.stderr))) }
    }

    async fn wait_until_ready(
        &self,
        child: Child,
        address: &str,
        flags: &[String],
        started: Instant,
    ) -> Result<Replica, ExperimentError> {
        let listening = started.elapsed();
        let target = Target::parse(address).map_err(|error| ExperimentError::Start(error.to_string()))?;
        let client = Client::new(target, None, Timeouts::default()).await?;
        let mut replica = Replica {
            child,
            client,
            flags: flags.to_vec(),
            start: StartTimes { listening, ready: listening },
        };
        while !replica.is_ready().await {
            if let Ok(Some(_)) = replica.child.try_wait() {
                return Err(ExperimentError::Start(complaint(replica.child).await));
            }
            if started.elapsed() > START_TIMEOUT {
                return Err(ExperimentError::Start(format!(
                    "its model was not loaded within {START_TIMEOUT:?}"
                )));
            }
            tokio::time::sleep(POLL).await;
        }
        replica.start.ready = started.elapsed();
        Ok(replica)
    }
}

/// The address that the server prints; the rest of its output is read and dropped, so that it never meets a full
/// pipe. `None` if it ends without one.
async fn address(child: &mut Child) -> Option<String> {
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(address) = line.strip_prefix("listening on ") {
            let address = address.trim().to_owned();
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Some(address);
        }
    }
    None
}

/// What a server that ended said last.
async fn complaint(mut child: Child) -> String {
    let mut said = Vec::new();
    if let Some(errors) = child.stderr.take() {
        // A process that it left behind may hold the pipe open.
        let read = async { errors.take(MOST_COMPLAINT_BYTES).read_to_end(&mut said).await };
        let _ = tokio::time::timeout(Duration::from_secs(2), read).await;
    }
    last_line(&said)
}

fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let line = said.lines().map(str::trim).rfind(|line| !line.is_empty());
    line.map_or_else(|| "it ended without a word".to_owned(), str::to_owned)
}

impl Replica {
    async fn is_ready(&self) -> bool {
        server::ready(&self.client).await.is_ok()
    }

    /// What it holds now.
    ///
    /// # Errors
    /// If it does not answer, or not as this version of the program does.
    pub async fn state(&self) -> Result<servelab_wire::EngineState, ExperimentError> {
        let reply = server::ask(&self.client, Method::GET, "/state", None).await?;
        let snapshot: Option<StateSnapshot> = serde_json::from_slice(&reply.body).ok();
        snapshot.and_then(|snapshot| snapshot.engine).ok_or(ExperimentError::NotUnderstood("/state"))
    }

    /// All of its metrics.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn metrics(&self) -> Result<Metrics, ExperimentError> {
        let reply = server::ask(&self.client, Method::GET, "/metrics", None).await?;
        Ok(Metrics(String::from_utf8_lossy(&reply.body).into_owned()))
    }

    /// Ends it at once, and waits until it is gone: two of them would share the machine.
    pub async fn kill(mut self) {
        // It may have ended by itself.
        let _ = self.child.kill().await;
    }
}

/// Prometheus' text format.
pub struct Metrics(String);

impl Metrics {
    /// The first sample of a metric, of those whose labels hold `label`.
    ///
    /// # Errors
    /// If there is none.
    pub fn value(&self, name: &'static str, label: &str) -> Result<f64, ExperimentError> {
        let found = self.0.lines().find_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let labels = series.strip_prefix(name)?;
            let is_it = (labels.is_empty() || labels.starts_with('{')) && labels.contains(label);
            is_it.then(|| value.parse().ok())?
        });
        found.ok_or(ExperimentError::NotUnderstood(name))
    }

    /// The value of a label of a metric.
    pub fn label(&self, name: &str, label: &str) -> Option<&str> {
        let line = self.0.lines().find(|line| line.starts_with(name))?;
        let (_, rest) = line.split_once(&format!("{label}=\""))?;
        rest.split_once('"').map(|(value, _)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP a b\nprocess_resident_memory_bytes 1234\n\
        servelab_model_load_seconds{model_name=\"demo\",stage=\"read\"} 0.25\n\
        servelab_model_load_seconds{model_name=\"demo\",stage=\"warm_up\"} 0.5\n\
        servelab_cache_config_info{block_size=\"16\",cache_dtype=\"bf16\"} 1\n";

    #[test]
    fn metrics_are_found_by_name_and_label() {
        let metrics = Metrics(TEXT.to_owned());
        assert_eq!(metrics.value("process_resident_memory_bytes", "").unwrap(), 1234.0);
        let load = |stage| metrics.value("servelab_model_load_seconds", stage).unwrap();
        assert_eq!((load("\"read\""), load("\"warm_up\"")), (0.25, 0.5));
        assert_eq!(metrics.label("servelab_cache_config_info", "cache_dtype"), Some("bf16"));
        let error = metrics.value("servelab_model", "").unwrap_err().to_string();
        assert!(error.contains("servelab_model"), "{error}");
    }

    #[tokio::test]
    async fn a_command_that_fails_is_told_with_what_it_says() {
        let launcher = Launcher { program: "/bin/sh".into(), arguments: vec!["-c".into()] };
        assert_eq!(launcher.output(&["echo out; echo progress >&2"]).await.unwrap(), b"out\n");
        let error = launcher.output(&["echo half; echo 'no such flag' >&2; exit 2"]).await.unwrap_err();
        assert_eq!(error.to_string(), "the simulation failed: no such flag");
    }

    #[tokio::test]
    async fn a_program_that_is_no_server_is_told_with_what_it_says() {
        let launcher = |script: &str| Launcher {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into(), "sh".into()],
        };
        let error = launcher("echo 'no such model' >&2; exit 2").start(&[]).await.err().unwrap().to_string();
        assert!(error.ends_with("no such model"), "{error}");
        let error = launcher("exit 0").start(&[]).await.err().unwrap().to_string();
        assert!(error.contains("without a word"), "{error}");
        let error =
            launcher("echo listening on ftp://x; sleep 5").start(&[]).await.err().unwrap().to_string();
        assert!(error.contains("ftp"), "{error}");
        let missing = Launcher { program: "/no/such/program".into(), arguments: Vec::new() };
        assert!(missing.start(&[]).await.is_err());
    }
}
