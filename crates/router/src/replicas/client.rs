//! The HTTP client towards the replicas: connections are kept and used again, and each is given up by itself.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::client::legacy::Client as PooledClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// Sends whole requests and gives answers as they come. Dropping an answer, or the future of one, closes its
/// connection, and by that tells the replica that nobody waits any more.
pub type Client = PooledClient<HttpConnector, Full<Bytes>>;

/// Shorter than a replica keeps an idle connection, so that the router closes first.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_PER_REPLICA: usize = 256;
/// How long a replica's machine may say nothing at all, not even to the kernel's question whether it is there.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);

/// A client that gives up a connection that is not made within `connect_timeout`.
pub fn client(connect_timeout: Duration) -> Client {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_timeout));
    let (time, interval, retries) = KEEPALIVE;
    connector.set_keepalive(Some(time));
    connector.set_keepalive_interval(Some(interval));
    connector.set_keepalive_retries(Some(retries));
    // What was sent and not acknowledged for as long breaks the connection too.
    #[cfg(target_os = "linux")]
    connector.set_tcp_user_timeout(Some(time + interval * retries));
    PooledClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(IDLE_PER_REPLICA)
        .build(connector)
}
