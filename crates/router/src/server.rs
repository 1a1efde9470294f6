//! Binding, serving, and the way down.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servelab_front::{UnusableKey, connections};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::discovery::Discovery;
use crate::discovery::kubernetes::KubernetesError;
use crate::errors::RouterError;
use crate::limits::redis::Shared;
use crate::options::RouterOptions;
use crate::routes::router;

/// How long answers that were cut have to leave.
const AFTER_CUT: Duration = Duration::from_secs(2);
/// How long connections have, after the last request has ended, to take what is left for them.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// Why a router cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error(
        "cannot listen on {address}: {source}; choose another --host or --port, or stop what listens there"
    )]
    Bind { address: String, source: std::io::Error },
    #[error(transparent)]
    Key(#[from] UnusableKey),
    #[error("--limits-redis: {0}")]
    Redis(#[from] redis::RedisError),
    #[error("--replicas-kubernetes: {0}")]
    Kubernetes(#[from] KubernetesError),
    #[error("the HTTP server failed: {0}")]
    Http(tokio::task::JoinError),
}

/// A router that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    discovery: Discovery,
    max_connections: usize,
    drain_timeout: Duration,
}

impl Server {
    /// Takes the address. Connections queue until [`Server::run`].
    ///
    /// # Errors
    /// If the address is taken or wrong, a key cannot be used, or no cluster is configured where one is to be asked.
    pub async fn bind(options: RouterOptions) -> Result<Self, RouteError> {
        let shared = options.limits_redis.clone().map(|redis| Shared::new(redis, options.metrics.clone()));
        let app = Arc::new(App::new(&options, shared.transpose()?)?);
        app.registry.take_memory();
        let failed =
            |source| RouteError::Bind { address: format!("{}:{}", options.host, options.port), source };
        let listener = connections::listen(&options.host, options.port).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let RouterOptions { sources, max_connections, drain_timeout, .. } = options;
        let discovery = Discovery::find(sources).await?;
        Ok(Self { listener, address, app, discovery, max_connections, drain_timeout })
    }

    /// The address taken; tells the port where 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is ready, drains, and returns when every answer is out.
    ///
    /// # Errors
    /// If the HTTP server fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), RouteError> {
        let Self { listener, app, discovery, max_connections, drain_timeout, .. } = self;
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        discovery.follow(&app.members, &stop);
        tokio::spawn(end_overdue(app.clone(), stop.clone()));
        let (down, going_down) = oneshot::channel::<()>();
        let refused = move || {
            let error = RouterError::TooManyConnections { limit: max_connections };
            serde_json::to_string(&error.envelope()).unwrap_or_default()
        };
        let mut http = tokio::spawn(connections::serve(
            listener,
            router(app.clone()),
            max_connections,
            refused,
            async {
                let _ = going_down.await;
            },
        ));
        tokio::select! {
            () = shutdown => {}
            Err(panicked) = &mut http => return Err(RouteError::Http(panicked)),
        }
        drain(&app, drain_timeout).await;
        app.limits.settled().await;
        let _ = down.send(());
        // Readers that do not read get no more than that.
        if tokio::time::timeout(LAST_BYTES, &mut http).await.is_err() {
            http.abort();
        }
        // Health checks end with the replicas that they ask.
        for address in app.registry.addresses() {
            app.registry.remove(&address);
        }
        Ok(())
    }
}

async fn end_overdue(app: Arc<App>, stop: CancellationToken) {
    stop.run_until_cancelled(app.unread.end_overdue(&app.cut)).await;
}

/// Takes nothing new, lets what is under way end, and cuts what is left when the time is over. The socket stays open
/// meanwhile: an answer of 503 that names the reason is better than a refused connection.
async fn drain(app: &App, timeout: Duration) {
    app.drain();
    app.inside.close();
    tracing::info!(inside = app.inside.len(), timeout_seconds = timeout.as_secs_f64(), "draining");
    if tokio::time::timeout(timeout, app.inside.wait()).await.is_err() {
        tracing::warn!(inside = app.inside.len(), "time to drain is over; the rest end with an error");
        app.cut.cancel();
        let _ = tokio::time::timeout(AFTER_CUT, app.inside.wait()).await;
    }
}
