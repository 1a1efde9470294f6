//! One HTTP/1.1 connection, driven by whoever uses it.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;

use super::socket::{Reads, Socket, Traffic};
use super::{Failure, Target};
use crate::clock::Clock;
use crate::result::FailureClass;

pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: http1::Connection<TokioIo<Socket>, Full<Bytes>>,
    traffic: Arc<Traffic>,
    is_over: bool,
}

impl Connection {
    /// Opens a connection to the first address that answers.
    ///
    /// # Errors
    /// If none does in time.
    pub async fn open(
        addresses: &[SocketAddr],
        target: &Target,
        timeout: Duration,
        clock: Clock,
        reads: &Arc<Reads>,
    ) -> Result<Self, Failure> {
        let connecting = tokio::time::timeout(timeout, Socket::connect(addresses, clock, reads));
        let socket = match connecting.await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                let message = format!("cannot connect to {}: {error}", target.authority());
                return Err(Failure::new(FailureClass::Unreachable, message));
            }
            Err(_) => {
                let message = format!("no connection to {} within {timeout:?}", target.authority());
                return Err(Failure::new(FailureClass::ConnectTimeout, message));
            }
        };
        let traffic = socket.traffic();
        let handshake = http1::Builder::new().handshake(TokioIo::new(socket)).await;
        let (sender, driver) = handshake.map_err(|error| {
            Failure::new(FailureClass::Unreachable, format!("cannot speak HTTP: {error}"))
        })?;
        Ok(Self { sender, driver, traffic, is_over: false })
    }

    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Queues a request; nothing is written until the connection is driven.
    pub fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> impl Future<Output = hyper::Result<http::Response<Incoming>>> + use<> {
        self.sender.send_request(request)
    }

    /// Reads and writes what can be read and written now.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if !self.is_over {
            // What was wrong is told by the answer's own future.
            self.is_over = Pin::new(&mut self.driver).poll(cx).is_ready();
        }
    }

    /// Whether another request can be sent; notices that the server has hung up.
    pub async fn is_usable(&mut self) -> bool {
        poll_fn(|cx| {
            self.drive(cx);
            Poll::Ready(!self.is_over && self.sender.is_ready())
        })
        .await
    }
}
