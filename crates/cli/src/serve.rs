//! `servelab serve`: settings, logs, metrics, the socket, the model, and the way down.

use std::io::{IsTerminal, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use servelab_model::Prepared;
use servelab_server::{LoadError, Loader, ROUTES, ServeError, Server, ServerOptions};
use servelab_telemetry::traces::{TraceError, TraceOptions};
use servelab_telemetry::{BuildInfo, LogError, Metrics, MetricsConfig, MetricsError, Traces};
use tokio::sync::oneshot;

use crate::args::ServeCommand;
use crate::banner;
use crate::config_file::{self, ConfigFileError};
use crate::device::{self, Chosen, NoGpu};
use crate::load::{self, Summary};
use crate::secrets::API_KEYS_VARIABLE;
use crate::settings::{EngineSettings, ModelSettings, Settings, SettingsError};
use crate::traces::{self, LAST_SPANS, TraceSettingsError};

/// Largest bound of the token histograms where the model's context is not known before it is downloaded.
const UNKNOWN_CONTEXT: u32 = 131_072;

/// Why `servelab serve` ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    ConfigFile(#[from] ConfigFileError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    NoGpu(#[from] NoGpu),
    #[error(transparent)]
    TraceSettings(#[from] TraceSettingsError),
    #[error(transparent)]
    Traces(#[from] TraceError),
    #[error(transparent)]
    Logs(#[from] LogError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("cannot load the model: {0}")]
    Load(#[from] LoadError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    /// Whether other settings would have helped before anything was started.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::ConfigFile(_) | Self::Settings(_) | Self::TraceSettings(_) | Self::NoGpu(_))
    }
}

/// Serves until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// If the settings cannot work, the model cannot be loaded, the address is taken, or the device is lost.
pub fn run(command: ServeCommand) -> Result<(), Error> {
    let file = command.config.as_deref().map(config_file::read).transpose()?.unwrap_or_default();
    let api_keys = std::env::var(API_KEYS_VARIABLE).ok();
    let typed = command.typed.over(file);
    let traces = traces::options(typed.traces(), "servelab-replica", |name| std::env::var(name).ok())?;
    let settings = Settings::new(typed, api_keys.as_deref())?;
    servelab_telemetry::init_logs(settings.log_format, &settings.log_level)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let device = device::choose(&settings.engine)?;
    tracing::info!("device {}: {}", device.name(), device.reason);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(serve(settings, traces, device));
    // A download or a step that hangs must not keep the process.
    runtime.shutdown_background();
    outcome
}

async fn serve(settings: Settings, traces: Option<TraceOptions>, device: Chosen) -> Result<(), Error> {
    let Settings { model, network, engine, metrics_prefix, .. } = settings;
    // Local files are opened before the socket, so that a wrong folder ends the program at once.
    let prepared = if load::is_local(&model.source) { Some(load::open(&model)?) } else { None };
    let name = model.served_names[0].clone();
    let metrics = metrics(&metrics_prefix, &name, &model, prepared.as_ref())?;
    let traces = match traces {
        Some(traces) => Traces::start(&traces, metrics.span_counters())?,
        None => Traces::off(),
    };
    let (tell, told) = oneshot::channel();
    let has_keys = !network.api_keys.is_empty();
    let options = ServerOptions {
        host: network.host,
        port: network.port,
        served_model_names: model.served_names.clone(),
        max_waiting: engine.max_waiting,
        max_connections: network.max_connections,
        max_body_bytes: network.max_body_bytes,
        api_keys: network.api_keys,
        drain_timeout: network.drain_timeout,
        stall_timeout: network.stall_timeout,
        seed: model.seed,
        kv_zmq: network.kv_zmq,
        metrics,
        traces: traces.clone(),
        load: loader(prepared, model, engine, device, tell),
    };
    let server = Server::bind(options).await?;
    let address = reachable(server.local_addr());
    announce(&format!("listening on http://{address}\n"));
    tokio::spawn(async move {
        if let Ok(summary) = told.await {
            introduce(&summary, &name, address, has_keys);
        }
    });
    let outcome = server.run(crate::signals::stop()).await;
    tokio::task::block_in_place(|| traces.shut_down(LAST_SPANS));
    Ok(outcome?)
}

fn metrics(
    prefix: &str,
    model_name: &str,
    model: &ModelSettings,
    prepared: Option<&Prepared>,
) -> Result<Arc<Metrics>, MetricsError> {
    let context = prepared.map_or(UNKNOWN_CONTEXT, |prepared| load::context(prepared.config()));
    let max_model_len = model.max_model_len.unwrap_or(context);
    let build = BuildInfo { version: env!("CARGO_PKG_VERSION"), commit: option_env!("SERVELAB_COMMIT") };
    Metrics::new(&MetricsConfig { prefix, model_name, max_model_len, routes: ROUTES, build }).map(Arc::new)
}

/// What the engine's thread does first.
fn loader(
    prepared: Option<Prepared>,
    model: ModelSettings,
    engine: EngineSettings,
    device: Chosen,
    tell: oneshot::Sender<Summary>,
) -> Loader {
    Box::new(move || {
        let prepared = match prepared {
            Some(prepared) => prepared,
            None => load::open(&model)?,
        };
        let (loaded, summary) = load::load(prepared, &model, &engine, &device)?;
        // Nobody listens once the program goes down.
        let _ = tell.send(summary);
        Ok(loaded)
    })
}

/// On a terminal the banner goes there, elsewhere into the logs.
fn introduce(summary: &Summary, name: &str, address: SocketAddr, has_keys: bool) {
    let lines = banner::lines(summary, name, address, has_keys);
    if std::io::stdout().is_terminal() {
        announce(&format!("\n{}\n\n", lines.join("\n")));
    } else {
        for line in lines {
            tracing::info!("{line}");
        }
    }
}

/// Writes to standard output. Whoever started the program may have closed it; that is no reason to stop.
fn announce(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// An address that a client on this machine can use: that of "all interfaces" cannot be connected to everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}
