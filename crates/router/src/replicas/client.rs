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
/// As many as a replica has requests at once by default: fewer would be closed after a burst and opened in the next.
const IDLE_PER_REPLICA: usize = 512;
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use http::Request;
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// The kernel's timer of the connection between these ports of 127.0.0.1: 2 is the keepalive (proc_net_tcp of the
    /// kernel's documentation).
    fn timer(local: u16, remote: u16) -> Option<String> {
        let connections = std::fs::read_to_string("/proc/self/net/tcp").ok()?;
        let (local, remote) = (format!("0100007F:{local:04X}"), format!("0100007F:{remote:04X}"));
        let mut lines = connections.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines.find(|fields| fields[1] == local && fields[2] == remote)?;
        Some(line[5].split(':').next()?.to_owned())
    }

    /// A machine that vanishes closes nothing: without the question the connection would stay for ever, half open.
    #[tokio::test]
    async fn the_kernel_asks_a_replica_that_says_nothing_whether_its_machine_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = client(Duration::from_secs(60));
        let asked = tokio::spawn(async move {
            let request = Request::get(format!("http://127.0.0.1:{port}/")).body(Full::default()).unwrap();
            client.request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes()
        });
        let (mut stream, peer) = listener.accept().await.unwrap();
        let read = stream.read(&mut [0; 4096]).await.unwrap();
        assert!(read > 0);
        // Until the request is acknowledged, the timer is that of its repetition.
        let mut timers = Vec::new();
        while timers.last().is_none_or(|timer| timer != "02") && timers.len() < 1000 {
            timers.extend(timer(peer.port(), port));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(timers.last().map(String::as_str), Some("02"), "it waits for an answer, and asks");
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        assert_eq!(asked.await.unwrap(), "{}");
    }
}
