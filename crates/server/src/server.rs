//! Binding, loading, serving, and the way down.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servelab_engine::ConfigError;
use servelab_front::{ApiKeys, UnusableKey, connections};
use servelab_telemetry::RejectionReason;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::app::{App, Phase};
use crate::clock::Clock;
use crate::drain::drain;
use crate::engine_thread::{EngineEnd, Heartbeat};
use crate::errors::ApiError;
use crate::kv_events::zmq::{KvBindError, KvZmq};
use crate::loading::{self, Loading};
use crate::options::{LoadError, ServerOptions};
use crate::routes::router;

/// How long connections have, after the last request has ended, to take what is left for them.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// Why a replica cannot serve, or served no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "cannot listen on {address}: {source}; choose another --host or --port, or stop what listens there"
    )]
    Bind { address: String, source: std::io::Error },
    #[error("no served model name was given; give at least one")]
    NoName,
    #[error(transparent)]
    ApiKey(#[from] UnusableKey),
    #[error(transparent)]
    KvEvents(#[from] KvBindError),
    #[error("cannot load the model: {0}")]
    Load(#[from] LoadError),
    #[error("the engine's settings do not fit together: {0}")]
    Engine(#[from] ConfigError),
    #[error("cannot start the engine's thread: {0}")]
    Thread(std::io::Error),
    #[error("the model can compute no more: {0}")]
    Runner(String),
    #[error("the HTTP server failed: {0}")]
    Http(tokio::task::JoinError),
}

/// A replica that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    options: ServerOptions,
    api_keys: ApiKeys,
    kv_zmq: Option<KvZmq>,
}

impl Server {
    /// Takes the address. Connections queue until [`Server::run`].
    ///
    /// # Errors
    /// If the address is taken or wrong, or an option cannot be used.
    pub async fn bind(options: ServerOptions) -> Result<Self, ServeError> {
        if options.served_model_names.is_empty() {
            return Err(ServeError::NoName);
        }
        let api_keys = ApiKeys::new(&options.api_keys)?;
        let failed =
            |source| ServeError::Bind { address: format!("{}:{}", options.host, options.port), source };
        let listener = connections::listen(&options.host, options.port).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let kv_zmq = match options.kv_zmq.clone() {
            Some(zmq) => Some(KvZmq::bind(zmq, address, &options.served_model_names[0]).await?),
            None => None,
        };
        Ok(Self { listener, address, options, api_keys, kv_zmq })
    }

    /// The address taken; tells the port where 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Loads the model, serves until `shutdown` is ready, drains, and returns when every answer is out.
    ///
    /// The server answers from the start: it is live while it loads, and ready once it has loaded.
    ///
    /// # Errors
    /// If the model cannot be loaded or its device is lost. Answers under way have ended with an error by
    /// then, and the process should end with a code other than 0.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
        let Self { listener, options, api_keys, kv_zmq, .. } = self;
        let (clock, heartbeat) = (Clock::start(), Arc::new(Heartbeat::default()));
        let app = Arc::new(App::new(&options, api_keys, heartbeat, clock));
        let (drain_timeout, max_connections) = (options.drain_timeout, options.max_connections);
        let loading = loading::spawn(options, app.clone()).map_err(ServeError::Thread)?;
        let (down, going_down) = oneshot::channel::<()>();
        let mut http = tokio::spawn(connections::serve(
            listener,
            router(app.clone()),
            max_connections,
            too_many_connections(app.clone(), max_connections),
            async {
                let _ = going_down.await;
            },
        ));
        let outcome = tokio::select! {
            outcome = live(&app, loading, kv_zmq, shutdown, drain_timeout) => outcome,
            Err(panicked) = &mut http => return Err(ServeError::Http(panicked)),
        };
        let _ = down.send(());
        // Readers that do not read get no more than that.
        if tokio::time::timeout(LAST_BYTES, &mut http).await.is_err() {
            http.abort();
        }
        outcome
    }
}

/// Serves with the given options until `shutdown` is ready.
///
/// # Errors
/// As [`Server::bind`] and [`Server::run`].
pub async fn serve(
    options: ServerOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    Server::bind(options).await?.run(shutdown).await
}

/// What a connection beyond the bound is told; counts it.
fn too_many_connections(app: Arc<App>, limit: usize) -> impl Fn() -> String + Send {
    move || {
        app.metrics.admission_rejections.of(RejectionReason::TooManyConnections).inc();
        serde_json::to_string(&ApiError::TooManyConnections { limit }.envelope()).unwrap_or_default()
    }
}

/// From loading to the moment when nothing is left to do but to let the last bytes out.
async fn live(
    app: &App,
    loading: Loading,
    kv_zmq: Option<KvZmq>,
    shutdown: impl Future<Output = ()>,
    drain_timeout: Duration,
) -> Result<(), ServeError> {
    tokio::pin!(shutdown);
    let Loading { loaded, mut ended } = loading;
    tokio::select! {
        loaded = loaded => match loaded {
            Ok(Ok(model)) => {
                if let Some(kv_zmq) = kv_zmq {
                    // Ends with the engine.
                    tokio::spawn(kv_zmq.run(model.kv.clone(), model.engine.block_size));
                }
                app.loaded(model);
            }
            Ok(Err(error)) => {
                app.enter(Phase::Failed);
                return Err(error);
            }
            Err(_) => {
                app.enter(Phase::Failed);
                return Err(LoadError("the loader panicked; its message stands above".into()).into());
            }
        },
        () = &mut shutdown => {
            app.enter(Phase::Draining);
            return Ok(());
        }
    }
    tracing::info!(model = app.model_name(), seconds = app.clock.now().as_secs_f64(), "ready");
    tokio::select! {
        end = &mut ended => {
            app.enter(Phase::Failed);
            let text = match end {
                Ok(EngineEnd::Failed(text)) => text,
                Ok(EngineEnd::Stopped) | Err(_) => "its thread ended".to_owned(),
            };
            tracing::error!(error = text, "the engine is lost");
            return Err(ServeError::Runner(text));
        }
        () = &mut shutdown => {}
    }
    drain(app, drain_timeout, ended).await;
    Ok(())
}
