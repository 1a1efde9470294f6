//! `servelab route`: settings, logs, the socket, the router, and the way down.

pub mod args;
mod settings;

use std::io::Write;

use servelab_router::metrics::MetricsError;
use servelab_router::{RouteError, RouterOptions, Server};
use servelab_telemetry::traces::TraceError;
use servelab_telemetry::{LogError, Traces};

use self::args::RouteCommand;
use self::settings::{RouteSettings, RouteSettingsError};
use crate::config_file::{self, ConfigFileError};
use crate::secrets::API_KEYS_VARIABLE;
use crate::traces::{self, LAST_SPANS, TraceSettingsError};

/// Tasks that a thread goes on with before it looks for what has arrived. With tokio's 61 a request that arrives waits
/// for a millisecond behind the work of others, and again when its answer does.
const EVENT_INTERVAL: u32 = 8;

/// Why `servelab route` ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    ConfigFile(#[from] ConfigFileError),
    #[error(transparent)]
    Settings(#[from] RouteSettingsError),
    #[error(transparent)]
    TraceSettings(#[from] TraceSettingsError),
    #[error(transparent)]
    Traces(#[from] TraceError),
    #[error(transparent)]
    Logs(#[from] LogError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    /// Whether other settings would have helped before anything was started.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::ConfigFile(_) | Self::Settings(_) | Self::TraceSettings(_) | Self::Logs(_))
    }
}

/// Routes until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// If the settings cannot work or the address is taken.
pub fn run(command: RouteCommand) -> Result<(), Error> {
    let file = command.config.as_deref().map(config_file::read).transpose()?.unwrap_or_default();
    let api_keys = std::env::var(API_KEYS_VARIABLE).ok();
    let typed = command.typed.over(file);
    let traces = traces::options(typed.traces(), "servelab-router", |name| std::env::var(name).ok())?;
    let RouteSettings { mut options, log_format, log_level, threads } =
        RouteSettings::new(typed, api_keys.as_deref())?;
    servelab_telemetry::init_logs(log_format, &log_level)?;
    if let Some(traces) = traces {
        options.traces = Traces::start(&traces, options.metrics.span_counters())?;
    }
    let traces = options.traces.clone();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime
        .worker_threads(threads)
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let outcome = runtime.block_on(route(options));
    traces.shut_down(LAST_SPANS);
    runtime.shutdown_background();
    outcome
}

async fn route(options: RouterOptions) -> Result<(), Error> {
    let policy = options.fleet.policy.name();
    let server = Server::bind(options).await?;
    let mut out = std::io::stdout().lock();
    // Whoever started the program may have closed it; that is no reason to stop.
    let _ = writeln!(out, "listening on http://{}", server.local_addr()).and_then(|()| out.flush());
    drop(out);
    tracing::info!(policy, "routing");
    Ok(server.run(crate::signals::stop()).await?)
}
