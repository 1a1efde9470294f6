//! How a router works, ready to use. Each field says its unit; the defaults are those of the command line.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use servelab_telemetry::{Secret, Traces};

use crate::choice::fleet::FleetOptions;
use crate::events::KvEventsOptions;
use crate::limits::KeyLimits;
use crate::limits::redis::RedisOptions;
use crate::metrics::RouterMetrics;
use crate::parity::watch::ParityOptions;
use crate::replicas::address::Address;
use crate::replicas::probe::ProbeOptions;

/// An API key and what it may use.
#[derive(Clone, Debug)]
pub struct ClientKey {
    pub secret: Secret,
    pub limits: KeyLimits,
}

/// How long each part of an exchange with a replica may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub connect: Duration,
    /// Until a stream says its first word. An answer that comes whole has only the total.
    pub first_byte: Duration,
    /// Between two words of a stream.
    pub idle: Duration,
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            first_byte: Duration::from_secs(120),
            idle: Duration::from_secs(60),
            total: Duration::from_secs(1800),
        }
    }
}

/// What happens while no replica is ready.
#[derive(Clone, Copy, Debug)]
pub struct HoldOptions {
    pub max_requests: usize,
    pub timeout: Duration,
}

impl Default for HoldOptions {
    fn default() -> Self {
        Self { max_requests: 1000, timeout: Duration::from_secs(120) }
    }
}

/// Where replicas are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Static(Vec<Address>),
    /// One address a line; read again when it changes.
    File(PathBuf),
    Dns(Dns),
    Kubernetes(KubernetesService),
}

/// A question to the domain name system, asked again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    pub question: Question,
    /// Who is asked; `None` are the servers, search domains and hosts of the system's files.
    pub server: Option<SocketAddr>,
    pub interval: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Every address that the name has.
    Addresses { name: String, port: u16 },
    /// Every host and port that its SRV records tell.
    Services { name: String },
}

impl Question {
    pub fn name(&self) -> &str {
        match self {
            Self::Addresses { name, .. } | Self::Services { name } => name,
        }
    }
}

/// A service of Kubernetes whose EndpointSlices are watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesService {
    /// `None` is that of the service account, or of the kubeconfig's context.
    pub namespace: Option<String>,
    pub name: String,
    pub port: ServicePort,
    /// `None` is `KUBECONFIG`, `~/.kube/config`, or the pod's service account.
    pub kubeconfig: Option<PathBuf>,
}

/// A port of the pods behind a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServicePort {
    Number(u16),
    /// As the service names it.
    Name(String),
}

impl FromStr for ServicePort {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self::Number(number)),
            Err(_) if is_label(text) && text.contains(|char: char| char.is_ascii_lowercase()) => {
                Ok(Self::Name(text.to_owned()))
            }
            _ => Err(()),
        }
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(formatter, "{number}"),
            Self::Name(name) => formatter.write_str(name),
        }
    }
}

/// Whether it can be the name of a namespace, a service or a port: a label of RFC 1123.
pub fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Everything that a router is started with.
pub struct RouterOptions {
    pub host: String,
    pub port: u16,
    pub sources: Vec<Source>,
    pub fleet: FleetOptions,
    pub probe: ProbeOptions,
    pub kv_events: KvEventsOptions,
    pub parity: ParityOptions,
    pub timeouts: Timeouts,
    pub hold: HoldOptions,
    /// Attempts at other replicas after the first.
    pub max_retries: u32,
    /// A second attempt is made beside one that is slower than this share of the last ones, 0 to 1.
    pub hedge_quantile: Option<f64>,
    pub max_connections: usize,
    pub max_body_bytes: usize,
    /// Requests that are sent to the replicas at once, for each that is ready; more wait in the router.
    pub max_in_flight_per_replica: usize,
    /// Requests that wait for that.
    pub max_waiting: usize,
    /// None: everybody may come in, with [`RouterOptions::anonymous_limits`] for all together.
    pub keys: Vec<ClientKey>,
    pub anonymous_limits: KeyLimits,
    /// Where routers count together; `None`: each for itself.
    pub limits_redis: Option<RedisOptions>,
    /// Opens `POST` and `DELETE /replicas`.
    pub admin_key: Option<Secret>,
    /// Sent to the replicas in place of the client's key.
    pub replica_key: Option<Secret>,
    /// How long the answer to an `Idempotency-Key` is kept.
    pub idempotency_window: Duration,
    pub drain_timeout: Duration,
    pub metrics: Arc<RouterMetrics>,
    /// Whoever started them shuts them down, after the router has ended.
    pub traces: Traces,
}
