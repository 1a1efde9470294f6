//! Connections: how many there may be, how long each part of them may take, and how they end.
//!
//! axum's own accept loop bounds none of it. A client that opens sockets and says nothing, or asks for an
//! answer and never reads it, would hold memory for ever.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// How long the head of a request may take to arrive, and how long a connection may be idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a client may leave bytes of its answer unread while no room is left in the socket.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a peer may be silent before the kernel asks it whether it still exists, how often it asks, and
/// how many questions may stay without an answer: a client whose machine vanished is noticed in about two
/// minutes, and its request is given up.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(20), 3);
/// Connections that are being told that there are too many.
const REFUSALS: usize = 64;
/// How long one of them may take to hear it.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// A pause after an error that another `accept` would meet again, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Connections that the kernel completes while none is accepted. A burst beyond it has its clients try again a second
/// later, which nothing in this program would ever show. The kernel's own limit (net.core.somaxconn) applies too.
const BACKLOG: u32 = 4096;

/// Listens at the first address of that name where it can.
///
/// # Errors
/// If the name has no address, or none of them can be listened on.
pub async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut failed = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        match listen_at(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // On Windows it would mean that two programs may have the port.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves `router` on every connection, at most `max_connections` at once, until `going_down` is ready;
/// then closes idle connections, lets answers under way end, and returns. One connection too many is
/// answered 503 by `refused` and closed.
///
/// Only HTTP/1.1: a stream of tokens gains nothing from multiplexing, and the bounds here are per connection.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    max_connections: usize,
    refused: impl Fn() -> String,
    going_down: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(max_connections));
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    tokio::pin!(going_down);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            },
            () = &mut going_down => break,
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            let body = refused();
            // With as many refusals under way the peer is no client that reads them.
            if let Ok(refusal) = refusals.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, refuse(stream, &body)).await;
                    drop(refusal);
                });
            }
            continue;
        };
        set_options(&stream);
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(timed(stream)), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke off");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Fails with a time-out when a write has found no room for [`UNREAD_TIMEOUT`].
fn timed(stream: TcpStream) -> Pin<Box<TimeoutStream<TcpStream>>> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(UNREAD_TIMEOUT));
    Box::pin(stream)
}

fn set_options(stream: &TcpStream) {
    // A token is a small write, and it must not wait for the acknowledgement of the last one.
    let _ = stream.set_nodelay(true);
    let (time, interval, retries) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// Errors of a connection that ended before it was accepted say nothing about the next one.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "no connection can be accepted");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

/// Answers whatever comes with 503. Reads to the end, since closing a socket with unread bytes would take
/// the answer from the client again.
async fn refuse(mut stream: TcpStream, body: &str) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         retry-after: 1\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await?;
    let mut unread = [0; 4096];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::sync::oneshot;

    use super::*;

    /// Answers "yes" to everything, on at most two connections.
    async fn server() -> (std::net::SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new().route("/", get(async || "yes"));
        let going_down = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(serve(listener, router, 2, || "{\"full\":true}".into(), going_down));
        (address, stop, task)
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut bytes = vec![0; 1024];
        let length = stream.read(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    #[tokio::test]
    async fn one_connection_too_many_is_told_so_and_the_place_comes_free() {
        let (address, _stop, _task) = server().await;
        let mut inside =
            [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        for stream in &mut inside {
            assert!(ask(stream).await.ends_with("yes"));
        }
        let mut outside = TcpStream::connect(address).await.unwrap();
        outside.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        outside.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("{\"full\":true}"), "{answer}");
        drop(inside);
        for _ in 0..1000 {
            let mut next = TcpStream::connect(address).await.unwrap();
            if ask(&mut next).await.ends_with("yes") {
                return;
            }
        }
        panic!("the places never came free");
    }

    /// The clock is the test's: it jumps to the next timer whenever everybody waits.
    #[tokio::test(start_paused = true)]
    async fn a_head_that_never_ends_and_an_idle_connection_are_closed() {
        let (address, _stop, _task) = server().await;
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET / HT").await.unwrap();
        let mut silent = TcpStream::connect(address).await.unwrap();
        for stream in [&mut half, &mut silent] {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            assert!(!String::from_utf8_lossy(&rest).contains("yes"));
        }
        assert!(ask(&mut TcpStream::connect(address).await.unwrap()).await.ends_with("yes"));
    }

    #[tokio::test]
    async fn going_down_closes_idle_connections_and_ends() {
        let (address, stop, task) = server().await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut idle).await.ends_with("yes"));
        stop.send(()).unwrap();
        task.await.unwrap();
        assert_eq!(idle.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    }
}
