//! The HTTP client: connections kept in a pool, one request after the other on each, streamed answers read as
//! they come.
//!
//! One task does all of a request: it drives hyper's connection and reads the body itself, so that a chunk wakes
//! one task and no more. Nothing is spawned; dropping the future closes the connection, which is how a client goes
//! away.

mod connection;
mod deadline;
mod events;
mod exchange;
mod socket;
mod spans;
mod target;
mod timer;
mod transport;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use http_body_util::Full;
use servelab_telemetry::{Secret, Traces};

pub use self::exchange::{Observed, Outgoing, Reply};
pub use self::socket::{ReadStats, Reads};
pub use self::target::{Target, TargetError};
pub use self::timer::Timer;

use self::connection::{Connection, Route};
use self::socket::Sentinel;
use crate::clock::Clock;
use crate::result::FailureClass;

/// Idle connections that are kept.
const MAX_IDLE: usize = 4096;

/// How long each part of a request may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timeouts {
    pub connect: Duration,
    /// From sending to the first byte of the answer.
    pub first_byte: Duration,
    /// Between two reads.
    pub idle: Duration,
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            first_byte: Duration::from_secs(600),
            idle: Duration::from_secs(120),
            total: Duration::from_secs(3600),
        }
    }
}

/// Longest time for each part of the answer to a question that is no request of the workload.
const QUESTION: Duration = Duration::from_secs(30);

impl Timeouts {
    /// Of questions about the server itself, which it answers without computing: shorter, so that one that never
    /// answers is found out before the user gives up.
    pub fn of_questions(self) -> Self {
        let short = |time: Duration| time.min(QUESTION);
        Self {
            connect: self.connect,
            first_byte: short(self.first_byte),
            idle: short(self.idle),
            total: short(self.total),
        }
    }
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub class: FailureClass,
    /// HTTP status of an answer that refused.
    pub status: Option<u16>,
    pub message: String,
}

impl Failure {
    pub fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self { class, status: None, message: message.into() }
    }
}

/// Talks to one server.
pub struct Client {
    route: Route,
    timeouts: Timeouts,
    clock: Clock,
    headers: HeaderMap,
    traces: Traces,
    idle: Mutex<Vec<Connection>>,
    reads: Arc<Reads>,
    sentinel: Arc<Sentinel>,
}

impl Client {
    /// Finds the server's addresses, once: name resolution is no part of what is measured. A name that has none is
    /// told by every request.
    ///
    /// # Errors
    /// If the API key or the certificates cannot be used.
    pub async fn new(target: Target, api_key: Option<&Secret>, timeouts: Timeouts) -> Result<Self, Failure> {
        let lookup = tokio::net::lookup_host((target.host(), target.port()));
        let addresses = match tokio::time::timeout(timeouts.connect, lookup).await {
            Ok(Ok(found)) => Ok(found.collect::<Vec<SocketAddr>>()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {:?}", timeouts.connect)),
        };
        let headers = headers(&target, api_key)?;
        let tls = transport::connector(&target).map_err(|reason| {
            Failure::new(FailureClass::Unreachable, format!("TLS cannot be set up: {reason}"))
        })?;
        Ok(Self {
            route: Route { target, addresses, tls },
            timeouts,
            clock: Clock::start(),
            headers,
            traces: Traces::off(),
            idle: Mutex::default(),
            reads: Arc::default(),
            sentinel: Arc::new(Sentinel::open()),
        })
    }

    /// Its requests have spans, and the server gets to know of them.
    pub fn traced(self, traces: Traces) -> Self {
        Self { traces, ..self }
    }

    /// The same server, with a clock that starts now, no connections, and nothing counted.
    pub fn restarted(&self) -> Self {
        Self {
            route: self.route.clone(),
            timeouts: self.timeouts,
            clock: Clock::start(),
            headers: self.headers.clone(),
            traces: self.traces.clone(),
            idle: Mutex::default(),
            reads: Arc::default(),
            sentinel: self.sentinel.clone(),
        }
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// How late reads were, so far.
    pub fn read_stats(&self) -> ReadStats {
        self.reads.stats()
    }

    pub fn target(&self) -> &Target {
        &self.route.target
    }

    fn request(&self, method: Method, path: &str, accept: &'static str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = self.route.target.path(path);
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(accept));
        request
    }

    fn pool(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that was open when last looked at.
    async fn idle_connection(&self) -> Option<Connection> {
        loop {
            let mut connection = self.pool().pop()?;
            if connection.is_usable().await {
                return Some(connection);
            }
        }
    }

    async fn keep(&self, mut connection: Connection) {
        if connection.is_usable().await {
            let mut pool = self.pool();
            if pool.len() < MAX_IDLE {
                pool.push(connection);
            }
        }
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        Connection::open(&self.route, self.timeouts.connect, self.clock, &self.reads).await
    }
}

fn headers(target: &Target, api_key: Option<&Secret>) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    let mut insert = |name: HeaderName, value: &str| {
        let mut value = HeaderValue::from_str(value).map_err(|_| {
            Failure::new(
                FailureClass::Unreachable,
                format!("the value of {name} has bytes that no header may have"),
            )
        })?;
        value.set_sensitive(name == header::AUTHORIZATION);
        headers.insert(name, value);
        Ok(())
    };
    insert(header::HOST, target.authority())?;
    insert(header::CONTENT_TYPE, "application/json")?;
    insert(header::USER_AGENT, concat!("servelab-bench/", env!("CARGO_PKG_VERSION")))?;
    if let Some(key) = api_key {
        insert(header::AUTHORIZATION, &format!("Bearer {}", key.expose()))?;
    }
    Ok(headers)
}
