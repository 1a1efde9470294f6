//! A program of the lab that runs below `servelab up`: started, waited for until it listens, ended.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::secrets::API_KEYS_VARIABLE;
use crate::signals::PARENT_VARIABLE;

/// What a server prints once its socket is open.
const LISTENING: &str = "listening on ";
/// How long one may take to open its socket; models are loaded after that.
const OPENS_WITHIN: Duration = Duration::from_secs(60);
/// How long one may take to go down: longer than the drain of its requests.
const ENDS_WITHIN: Duration = Duration::from_secs(40);
/// Of a log, what an error shows.
const LAST_LINES: usize = 5;

/// Why a program did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{name} cannot be started: {error}")]
    Start { name: String, error: std::io::Error },
    #[error("{name} did not listen ({how}); {log} ends with:\n{last}")]
    Silent { name: String, how: String, log: String, last: String },
}

/// How to start a server.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: String,
    /// The command and its flags, without the port.
    pub arguments: Vec<String>,
    /// 0: a free one.
    pub port: u16,
    /// Whether clients need the API keys of the environment.
    pub checks_keys: bool,
    /// Where its output goes, after what is there.
    pub log: PathBuf,
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    pub address: String,
    process: Child,
    /// Its end tells the child that this program is gone.
    leash: Option<ChildStdin>,
}

impl Server {
    /// Starts this very binary and waits until it listens.
    ///
    /// # Errors
    /// If it cannot be started, ends, or does not listen in time.
    pub async fn start(program: &Program) -> Result<Self, StartError> {
        let Program { name, log, .. } = program;
        let failed = |error| StartError::Start { name: name.clone(), error };
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(log).map_err(failed)?;
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(&program.arguments).args(["--port", &program.port.to_string()]);
        command.env(PARENT_VARIABLE, "1").kill_on_drop(true);
        if !program.checks_keys {
            command.env_remove(API_KEYS_VARIABLE);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(opened.try_clone().map_err(failed)?);
        // A signal to the terminal's group is for this program, which ends the children in order.
        #[cfg(unix)]
        command.process_group(0);
        let mut process = command.spawn().map_err(failed)?;
        let leash = process.stdin.take();
        let stdout =
            process.stdout.take().ok_or_else(|| failed(std::io::Error::other("it has no output")))?;
        let mut lines = BufReader::new(stdout).lines();
        let listens = tokio::time::timeout(OPENS_WITHIN, first_address(&mut lines)).await;
        let address = match listens {
            Ok(Some(address)) => address,
            Ok(None) => {
                return Err(silent(name, told(process.wait().await), log));
            }
            Err(_) => return Err(silent(name, format!("{} s have passed", OPENS_WITHIN.as_secs()), log)),
        };
        tokio::spawn(keep(lines, File::from_std(opened)));
        Ok(Self { address, process, leash })
    }

    /// That it listens on.
    pub fn port(&self) -> u16 {
        self.address.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or(0)
    }

    /// Of the process; `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// Waits until it ends by itself, and tells how.
    pub async fn ended(&mut self) -> String {
        told(self.process.wait().await)
    }

    /// Lets it end what it has, then ends it.
    pub async fn stop(mut self) {
        drop(self.leash.take());
        if tokio::time::timeout(ENDS_WITHIN, self.process.wait()).await.is_err() {
            // One that is gone by now needs no killing.
            let _ = self.process.kill().await;
        }
    }
}

fn told(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

async fn first_address(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<String> {
    loop {
        let line = lines.next_line().await.ok()??;
        if let Some(address) = line.strip_prefix(LISTENING) {
            return Some(address.trim().to_owned());
        }
    }
}

/// Writes what comes to the log, so that the child never waits for a reader.
async fn keep(mut lines: Lines<BufReader<ChildStdout>>, mut log: File) {
    while let Ok(Some(line)) = lines.next_line().await {
        // A full disk must not stop the lab.
        let _ = log.write_all(format!("{line}\n").as_bytes()).await;
    }
}

fn silent(name: &str, how: String, log: &Path) -> StartError {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    StartError::Silent { name: name.to_owned(), how, log: log.display().to_string(), last }
}
