//! `servelab up`: replicas, the router in front of them and a load, all on this machine, each a process of its own.
//!
//! The router's page is the one place to look. What happens to the processes is told on standard error.

pub mod args;
mod child;
mod choices;
mod keeper;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde::de::DeserializeOwned;
use servelab_bench::client::{Client, Failure, Target, Timeouts};
use servelab_telemetry::Secret;
use tokio::process::{Child, Command};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::args::UpCommand;
use self::child::{Program, Server, StartError};
use self::choices::Decisions;
use self::keeper::Happened;
use crate::secrets::{self, API_KEYS_VARIABLE, SecretError};

const ROUTER: &str = "router";
/// How often the router is asked whether all replicas are ready.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The router asks its replicas that often how they are: a lab is looked at.
const HEALTH_INTERVAL: &str = "250ms";
/// Of the load generator, see [`crate::bench`].
const LOAD_KEY_VARIABLE: &str = "SERVELAB_API_KEY";

/// Why `servelab up` ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--{flag} is set by servelab up for every replica; leave it out after --")]
    Flag { flag: &'static str },
    #[error(transparent)]
    Secrets(#[from] SecretError),
    #[error("cannot use {} for the logs: {error}; name another folder with --logs", folder.display())]
    Logs { folder: PathBuf, error: std::io::Error },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("{name} ended ({how}); its log: {}", log.display())]
    Ended { name: String, how: String, log: PathBuf },
    #[error("the load cannot be started: {0}")]
    Load(std::io::Error),
    #[error("the load ended with {0}")]
    LoadFailed(ExitStatus),
    #[error("the router does not answer: {0}")]
    Router(#[from] Failure),
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    /// Whether other flags would have helped before anything was started.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Flag { .. } | Self::Secrets(_) | Self::Logs { .. })
    }
}

/// Runs the lab until SIGTERM or SIGINT, or with `--end-with-load` until the load has ended.
///
/// # Errors
/// If a process cannot be started, or the router ends, or, with `--end-with-load`, the load fails.
pub fn run(command: UpCommand) -> Result<(), Error> {
    check_flags(&command.serve)?;
    let keys = secrets::api_keys(None, std::env::var(API_KEYS_VARIABLE).ok().as_deref())?;
    let logs = command.logs.clone().unwrap_or_else(|| std::env::temp_dir().join("servelab-up"));
    std::fs::create_dir_all(&logs).map_err(|error| Error::Logs { folder: logs.clone(), error })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let outcome = runtime.block_on(up(&command, keys.into_iter().next(), &logs));
    runtime.shutdown_background();
    outcome
}

/// Those that every replica gets anyway.
fn check_flags(serve: &[String]) -> Result<(), Error> {
    for flag in ["port", "host"] {
        let typed = |given: &String| {
            given.strip_prefix("--").is_some_and(|name| name.split('=').next() == Some(flag))
        };
        if serve.iter().any(typed) {
            return Err(Error::Flag { flag });
        }
    }
    Ok(())
}

async fn up(command: &UpCommand, key: Option<Secret>, logs: &Path) -> Result<(), Error> {
    let stopped = crate::signals::stop();
    tokio::pin!(stopped);
    let mut lab = tokio::select! {
        lab = Lab::start(command, key, logs) => lab?,
        // What has been started is killed as it is dropped.
        () = &mut stopped => return Ok(()),
    };
    let outcome = tokio::select! {
        outcome = lab.run(command) => outcome,
        () = &mut stopped => Ok(()),
    };
    lab.down().await;
    outcome
}

/// All that runs.
struct Lab {
    router: Option<Server>,
    load: Option<Child>,
    client: Client,
    key: Option<Secret>,
    keepers: Vec<JoinHandle<()>>,
    stop: CancellationToken,
    happened: UnboundedReceiver<Happened>,
    /// The replicas' names by their addresses.
    names: BTreeMap<String, String>,
    logs: PathBuf,
}

impl Lab {
    /// Starts replicas and router; they load their models after that.
    async fn start(command: &UpCommand, key: Option<Secret>, logs: &Path) -> Result<Self, Error> {
        let mut servers = Vec::new();
        for number in 1..=command.replicas {
            let name = format!("replica {number}");
            let arguments =
                std::iter::once("serve".to_owned()).chain(command.serve.iter().cloned()).collect();
            let log = log_of(logs, &name);
            let program = Program { name, arguments, port: 0, checks_keys: false, log };
            let server = Server::start(&program).await?;
            tell(&line(&program.name, &server));
            servers.push((server, program));
        }
        let router = route(command, &servers, logs);
        let router = Server::start(&router).await?;
        tell(&line(ROUTER, &router));
        tell(&format!(
            "\nthe fleet, live: {}/   metrics: {0}/metrics\nlogs: {}\n",
            router.address,
            logs.display()
        ));
        let target = Target::parse(&router.address).map_err(|error| {
            Failure::new(servelab_bench::result::FailureClass::Unreachable, error.to_string())
        })?;
        let client = Client::new(target, key.as_ref(), Timeouts::default()).await?;
        let names =
            servers.iter().map(|(server, program)| (server.address.clone(), program.name.clone())).collect();
        let (sender, happened) = unbounded_channel();
        let stop = CancellationToken::new();
        let keep = |(server, program)| keeper::keep(server, program, sender.clone(), stop.clone());
        let keepers = servers.into_iter().map(keep).collect();
        let router = Some(router);
        Ok(Self { router, load: None, client, key, keepers, stop, happened, names, logs: logs.to_owned() })
    }

    /// Waits for the replicas, loads them, and serves on.
    async fn run(&mut self, command: &UpCommand) -> Result<(), Error> {
        self.until_ready(usize::from(command.replicas)).await?;
        tell("all replicas are ready");
        if !command.no_load {
            let status = self.load(&command.load).await?;
            self.tell_choices().await;
            if command.end_with_load {
                return if status.success() { Ok(()) } else { Err(Error::LoadFailed(status)) };
            }
        }
        tell("serving; Ctrl-C ends all of it");
        self.watch().await
    }

    /// A replica that ends before it was ready would not do better the next time.
    async fn until_ready(&mut self, replicas: usize) -> Result<(), Error> {
        loop {
            tokio::select! {
                Some(happened) = self.happened.recv() => {
                    if let Happened::Ended { name, how } = happened {
                        let log = log_of(&self.logs, &name);
                        return Err(Error::Ended { name, how, log });
                    }
                }
                how = ended(&mut self.router) => return Err(self.router_ended(how)),
                () = tokio::time::sleep(LOOK_AGAIN) => {
                    if self.ready().await? >= replicas {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn ready(&self) -> Result<usize, Error> {
        #[derive(Default, serde::Deserialize)]
        struct Ready {
            replicas_ready: usize,
        }
        Ok(self.ask::<Ready>("/ready").await?.replicas_ready)
    }

    async fn load(&mut self, flags: &str) -> Result<ExitStatus, Error> {
        let url = self.router.as_ref().map(|router| router.address.clone()).unwrap_or_default();
        tell(&format!("load: servelab bench --url {url} {flags}"));
        let mut bench = Command::new(std::env::current_exe().map_err(Error::Load)?);
        bench.args(["bench", "--url", &url]).args(flags.split_whitespace()).kill_on_drop(true);
        if let Some(key) = &self.key {
            bench.env(LOAD_KEY_VARIABLE, key.expose());
        }
        let load = self.load.insert(bench.spawn().map_err(Error::Load)?);
        loop {
            tokio::select! {
                status = load.wait() => {
                    self.load = None;
                    return status.map_err(Error::Load);
                }
                Some(happened) = self.happened.recv() => tell_happened(&happened),
                how = ended(&mut self.router) => return Err(self.router_ended(how)),
            }
        }
    }

    async fn watch(&mut self) -> Result<(), Error> {
        loop {
            tokio::select! {
                Some(happened) = self.happened.recv() => tell_happened(&happened),
                how = ended(&mut self.router) => return Err(self.router_ended(how)),
            }
        }
    }

    async fn tell_choices(&self) {
        let decisions: Decisions = self.ask("/decisions").await.unwrap_or_default();
        let lines = choices::lines(&decisions, &self.names);
        tell(&format!("\nthe last {} choices:\n{}\n", decisions.decisions.len(), lines.join("\n")));
    }

    async fn ask<T: DeserializeOwned + Default>(&self, path: &str) -> Result<T, Error> {
        let reply = self.client.call(Method::GET, path, Bytes::new()).await?;
        Ok(serde_json::from_slice(&reply.body).unwrap_or_default())
    }

    fn router_ended(&self, how: String) -> Error {
        Error::Ended { name: ROUTER.to_owned(), how, log: log_of(&self.logs, ROUTER) }
    }

    /// First the load, then the router, which lets its requests end, then the replicas.
    async fn down(mut self) {
        if let Some(mut load) = self.load.take() {
            // One that is gone by now needs no killing.
            let _ = load.kill().await;
        }
        if let Some(router) = self.router.take() {
            router.stop().await;
        }
        self.stop.cancel();
        for keeper in self.keepers.drain(..) {
            // It ends when its replica has.
            let _ = keeper.await;
        }
    }
}

/// The router in front of these replicas.
fn route(command: &UpCommand, servers: &[(Server, Program)], logs: &Path) -> Program {
    let mut arguments: Vec<String> =
        ["route", "--health-interval", HEALTH_INTERVAL].map(str::to_owned).into();
    if let Some(policy) = &command.policy {
        arguments.extend(["--policy".to_owned(), policy.clone()]);
    }
    for (server, _) in servers {
        arguments.extend(["--replica".to_owned(), server.address.clone()]);
    }
    let log = log_of(logs, ROUTER);
    Program { name: ROUTER.to_owned(), arguments, port: command.port, checks_keys: true, log }
}

fn log_of(logs: &Path, name: &str) -> PathBuf {
    logs.join(format!("{}.log", name.replace(' ', "-")))
}

async fn ended(server: &mut Option<Server>) -> String {
    match server {
        Some(server) => server.ended().await,
        None => std::future::pending().await,
    }
}

fn line(name: &str, server: &Server) -> String {
    format!("{name:<12}{}", whereabouts(&server.address, server.pid()))
}

fn whereabouts(address: &str, pid: Option<u32>) -> String {
    pid.map_or_else(|| address.to_owned(), |pid| format!("{address}  pid {pid}"))
}

fn tell_happened(happened: &Happened) {
    match happened {
        Happened::Ended { name, how } => tell(&format!("{name} ended ({how}); it is started again")),
        Happened::Restarted { name, address, pid } => {
            tell(&format!("{name} runs again: {}", whereabouts(address, *pid)));
        }
    }
}

/// Whoever closed standard error does not want to know.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_the_lab_sets_itself_are_refused() {
        let flags = |text: &str| check_flags(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        for refused in ["--port 80", "--seed 1 --port=80", "--host ::1"] {
            let error = flags(refused).unwrap_err();
            assert!(error.is_usage() && error.to_string().contains("leave it out"), "{error}");
        }
        assert!(flags("--model x --max-model-len 64 --portable").is_ok());
    }
}
