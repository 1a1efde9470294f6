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
use tokio_rustls::TlsConnector;

use super::socket::{Reads, Socket, Traffic};
use super::transport::Transport;
use super::{Failure, Target};
use crate::clock::Clock;
use crate::result::FailureClass;

/// How the server is reached.
#[derive(Clone)]
pub struct Route {
    pub target: Target,
    /// Or why its name has none.
    pub addresses: Result<Vec<SocketAddr>, String>,
    pub tls: Option<TlsConnector>,
}

pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: http1::Connection<TokioIo<Transport>, Full<Bytes>>,
    traffic: Arc<Traffic>,
    is_over: bool,
}

impl Connection {
    /// Opens a connection to the first address that answers.
    ///
    /// # Errors
    /// If none does in time.
    pub async fn open(
        route: &Route,
        timeout: Duration,
        clock: Clock,
        reads: &Arc<Reads>,
    ) -> Result<Self, Failure> {
        let authority = route.target.authority();
        let unreachable = |error: &dyn std::fmt::Display| {
            Failure::new(FailureClass::Unreachable, format!("cannot connect to {authority}: {error}"))
        };
        let addresses = route.addresses.as_ref().map_err(|reason| {
            let message = format!("{} cannot be resolved: {reason}", route.target.host());
            Failure::new(FailureClass::Unreachable, message)
        })?;
        let connecting = async {
            let socket = Socket::connect(addresses, clock, reads).await?;
            let traffic = socket.traffic();
            Ok((Transport::over(socket, &route.target, route.tls.as_ref()).await?, traffic))
        };
        let (transport, traffic) = match tokio::time::timeout(timeout, connecting).await {
            Ok(connected) => connected.map_err(|error: std::io::Error| unreachable(&error))?,
            Err(_) => {
                let message = format!("no connection to {authority} within {timeout:?}");
                return Err(Failure::new(FailureClass::ConnectTimeout, message));
            }
        };
        let handshake = http1::Builder::new().handshake(TokioIo::new(transport)).await;
        let (sender, driver) = handshake.map_err(|error| unreachable(&error))?;
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
