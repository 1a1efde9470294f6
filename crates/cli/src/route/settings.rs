//! What was typed for `servelab route`, checked and ready to use.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use servelab_router::choice::fleet::FleetOptions;
use servelab_router::choice::policy::{Policy, UnknownPolicy};
use servelab_router::choice::rates::Pace;
use servelab_router::events::{KvEventsOptions, Transport};
use servelab_router::limits::KeyLimits;
use servelab_router::limits::redis::{Away, BadRedisAddress, RedisAddress, RedisOptions, UnknownAway};
use servelab_router::metrics::{MetricsError, RouterMetrics};
use servelab_router::options::is_label;
use servelab_router::parity::tokeniser::Tokeniser;
use servelab_router::parity::watch::ParityOptions;
use servelab_router::prompt::BLOCK_SIZE;
use servelab_router::replicas::address::{Address, BadAddress};
use servelab_router::replicas::probe::ProbeOptions;
use servelab_router::{
    ClientKey, Dns, HoldOptions, KubernetesService, Question, RouterOptions, Source, Timeouts,
};
use servelab_telemetry::{LogError, LogFormat, Secret, Traces};

use super::args::{KvTransport, TypedRoute};
use crate::load::for_prompts;
use crate::open_files;
use crate::secrets::{self, SecretError};
use crate::settings::SettingsError;
use crate::size::TimeSpan;

/// Why the settings cannot work.
#[derive(Debug, thiserror::Error)]
pub enum RouteSettingsError {
    #[error(
        "no replica is named; give --replica URL, --replicas-file FILE, --replicas-dns NAME:PORT, --replicas-srv NAME or --replicas-kubernetes SERVICE:PORT, or an --admin-key-file to add them later"
    )]
    NoReplica,
    #[error("--replica {0}")]
    Replica(#[from] BadAddress),
    #[error("--replicas-dns {0:?} is no NAME:PORT, such as servelab-headless:8000")]
    Dns(String),
    #[error(
        "--replicas-srv {0:?} is no name, such as _http._tcp.servelab-headless.default.svc.cluster.local"
    )]
    Srv(String),
    #[error("--dns-server {0:?} is no IP:PORT, such as 127.0.0.1:8600")]
    DnsServer(String),
    #[error(
        "--replicas-kubernetes {0:?} is no [NAMESPACE/]SERVICE:PORT, such as servelab:http or serving/servelab:8000"
    )]
    Kubernetes(String),
    #[error("--limits-redis: {0}")]
    Redis(#[from] BadRedisAddress),
    #[error("give --limits-redis or --limits-redis-file, not both")]
    RedisTwice,
    #[error("--limits-redis-away: {0}")]
    RedisAway(#[from] UnknownAway),
    #[error("--{0} is of no use without {1}")]
    OfNoUse(&'static str, &'static str),
    #[error("--policy: {0}")]
    Policy(#[from] UnknownPolicy),
    #[error("--{name} is {value}; {rule}")]
    Range { name: &'static str, value: String, rule: &'static str },
    #[error("--tokenizer {folder:?}: {error}; give the folder of the model that the replicas serve")]
    Tokenizer { folder: String, error: String },
    #[error("--health-path {0:?} is no path; it begins with a slash, as /health")]
    HealthPath(String),
    #[error(
        "--{0} is for ZeroMQ, which is not used; add --kv-events zmq or --kv-events-zmq-port, or leave it out"
    )]
    NoZmq(&'static str),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Connections(#[from] SettingsError),
    #[error(transparent)]
    Logs(#[from] LogError),
    #[error("--metrics-prefix {prefix:?}: {error}")]
    Metrics { prefix: String, error: MetricsError },
}

/// Everything that the command needs.
pub struct RouteSettings {
    pub options: RouterOptions,
    pub log_format: LogFormat,
    pub log_level: String,
    /// That pass requests on.
    pub threads: usize,
}

const AT_LEAST_ONE: &str = "it must be at least 1";
const SOME_TIME: &str = "it must be longer than nothing";

impl RouteSettings {
    /// `api_keys`: what the environment has.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn new(typed: TypedRoute, api_keys: Option<&str>) -> Result<Self, RouteSettingsError> {
        let sources = sources(&typed)?;
        let policy: Policy = typed.policy.as_deref().map_or(Ok(Policy::default()), str::parse)?;
        let keys = secrets::api_keys(typed.api_key_file.as_deref(), api_keys)?;
        let limits = limits(&typed)?;
        let prefix = typed.metrics_prefix.clone().unwrap_or_else(|| "servelab_".to_owned());
        let metrics = RouterMetrics::new(&prefix, policy)
            .map_err(|error| RouteSettingsError::Metrics { prefix: prefix.clone(), error })?;
        let log_level = typed.log_level.clone().unwrap_or_else(|| "info".to_owned());
        servelab_telemetry::check_level(&log_level)?;
        let key_of = |path: &Option<std::path::PathBuf>| -> Result<Option<Secret>, SecretError> {
            let keys = path.as_deref().map(|path| secrets::api_keys(Some(path), None)).transpose()?;
            Ok(keys.and_then(|keys| keys.into_iter().next()))
        };
        let options = RouterOptions {
            host: typed.host.clone().unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: typed.port.unwrap_or(8080),
            sources,
            fleet: FleetOptions {
                policy,
                seed: typed.seed.unwrap_or(0),
                index_bytes: typed.index_memory.map_or(256 << 20, |size| size.0 as usize),
                block_size: BLOCK_SIZE,
                prior: Pace::default(),
            },
            probe: probe(&typed)?,
            kv_events: kv_events(&typed)?,
            parity: parity(&typed)?,
            timeouts: timeouts(&typed)?,
            hold: HoldOptions {
                max_requests: typed.max_held.unwrap_or(1000),
                timeout: time("hold-timeout", typed.hold_timeout, Duration::from_secs(120))?,
            },
            max_retries: typed.retries.unwrap_or(3),
            hedge_quantile: hedge(typed.hedge)?,
            max_connections: open_files::max_connections(typed.max_connections)?,
            max_body_bytes: typed.max_body_bytes.map_or(8 << 20, |size| size.0 as usize),
            max_in_flight_per_replica: at_least_one("max-in-flight", typed.max_in_flight, 512)?,
            max_waiting: typed.max_waiting.unwrap_or(4096),
            keys: keys.into_iter().map(|secret| ClientKey { secret, limits }).collect(),
            anonymous_limits: limits,
            limits_redis: limits_redis(&typed, &limits)?,
            admin_key: key_of(&typed.admin_key_file)?,
            replica_key: key_of(&typed.replica_key_file)?,
            idempotency_window: time(
                "idempotency-window",
                typed.idempotency_window,
                Duration::from_secs(600),
            )?,
            drain_timeout: typed.drain_timeout.map_or(Duration::from_secs(30), |time| time.0),
            metrics: Arc::new(metrics),
            traces: Traces::off(),
        };
        let log_format = match typed.log_format {
            Some(crate::args::LogFormat::Json) => LogFormat::Json,
            _ => LogFormat::Human,
        };
        let threads = threads(typed.threads)?;
        Ok(Self { options, log_format, log_level, threads })
    }
}

/// Beyond any machine, and few enough to be started.
const MOST_THREADS: usize = 1024;

fn threads(typed: Option<usize>) -> Result<usize, RouteSettingsError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match typed.unwrap_or((cores / 2).max(1)) {
        threads @ 1..=MOST_THREADS => Ok(threads),
        wrong => Err(RouteSettingsError::Range {
            name: "threads",
            value: wrong.to_string(),
            rule: "it must be from 1 to 1024",
        }),
    }
}

fn sources(typed: &TypedRoute) -> Result<Vec<Source>, RouteSettingsError> {
    let mut sources = Vec::new();
    if let Some(urls) = &typed.replica {
        let addresses = urls.iter().map(|url| url.parse()).collect::<Result<Vec<Address>, _>>()?;
        sources.push(Source::Static(addresses));
    }
    sources.extend(typed.replicas_file.clone().map(Source::File));
    sources.extend(names(typed)?.into_iter().map(Source::Dns));
    sources.extend(services(typed)?.into_iter().map(Source::Kubernetes));
    if sources.is_empty() && typed.admin_key_file.is_none() {
        return Err(RouteSettingsError::NoReplica);
    }
    Ok(sources)
}

/// What the domain name system is asked.
fn names(typed: &TypedRoute) -> Result<Vec<Dns>, RouteSettingsError> {
    let mut questions = Vec::new();
    for text in typed.replicas_dns.iter().flatten() {
        let wrong = || RouteSettingsError::Dns(text.clone());
        let (name, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
        if name.is_empty() {
            return Err(wrong());
        }
        questions.push(Question::Addresses { name: name.to_owned(), port });
    }
    for name in typed.replicas_srv.iter().flatten() {
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=255).contains(&name.len()) || !name.bytes().all(sane) {
            return Err(RouteSettingsError::Srv(name.clone()));
        }
        questions.push(Question::Services { name: name.clone() });
    }
    let server = |text: &String| text.parse().map_err(|_| RouteSettingsError::DnsServer(text.clone()));
    let server = typed.dns_server.as_ref().map(server).transpose()?;
    if questions.is_empty() && server.is_some() {
        return Err(RouteSettingsError::OfNoUse("dns-server", "--replicas-dns or --replicas-srv"));
    }
    let interval = time("dns-interval", typed.dns_interval, Duration::from_secs(5))?;
    Ok(questions.into_iter().map(|question| Dns { question, server, interval }).collect())
}

fn services(typed: &TypedRoute) -> Result<Vec<KubernetesService>, RouteSettingsError> {
    let texts = typed.replicas_kubernetes.as_deref().unwrap_or_default();
    if texts.is_empty() && typed.kubeconfig.is_some() {
        return Err(RouteSettingsError::OfNoUse("kubeconfig", "--replicas-kubernetes"));
    }
    let service = |text: &String| {
        let (namespace, rest) = match text.split_once('/') {
            None => (None, text.as_str()),
            Some((namespace, rest)) => (Some(namespace.to_owned()), rest),
        };
        let (name, port) = rest.rsplit_once(':')?;
        let sane = is_label(name) && namespace.as_deref().is_none_or(is_label);
        let kubeconfig = typed.kubeconfig.clone();
        let port = port.parse().ok().filter(|_| sane)?;
        Some(KubernetesService { namespace, name: name.to_owned(), port, kubeconfig })
    };
    let wrong = |text: &String| RouteSettingsError::Kubernetes(text.clone());
    texts.iter().map(|text| service(text).ok_or_else(|| wrong(text))).collect()
}

fn probe(typed: &TypedRoute) -> Result<ProbeOptions, RouteSettingsError> {
    let usual = ProbeOptions::default();
    let health_path = typed.health_path.clone().unwrap_or(usual.health_path);
    if !health_path.starts_with('/') {
        return Err(RouteSettingsError::HealthPath(health_path));
    }
    Ok(ProbeOptions {
        health_path,
        interval: time("health-interval", typed.health_interval, usual.interval)?,
        timeout: time("health-timeout", typed.health_timeout, usual.timeout)?,
        fall: usual.fall,
        lost: usual.lost,
        metrics_prefixes: usual.metrics_prefixes,
    })
}

fn kv_events(typed: &TypedRoute) -> Result<KvEventsOptions, RouteSettingsError> {
    let transport = match typed.kv_events {
        None | Some(KvTransport::Auto) => Transport::Auto,
        Some(KvTransport::Http) => Transport::Http,
        Some(KvTransport::Zmq) => Transport::Zmq,
        Some(KvTransport::Off) => Transport::Off,
    };
    let (zmq_port, replay_port) = (typed.kv_events_zmq_port, typed.kv_events_replay_port);
    for (name, port) in [("kv-events-zmq-port", zmq_port), ("kv-events-replay-port", replay_port)] {
        if port == Some(0) {
            return Err(RouteSettingsError::Range {
                name,
                value: "0".into(),
                rule: "it must be from 1 to 65535",
            });
        }
        if port.is_some() && matches!(transport, Transport::Http | Transport::Off) {
            return Err(RouteSettingsError::NoZmq(name));
        }
    }
    if replay_port.is_some() && zmq_port.is_none() && transport == Transport::Auto {
        return Err(RouteSettingsError::NoZmq("kv-events-replay-port"));
    }
    Ok(KvEventsOptions { transport, zmq_port, replay_port })
}

fn parity(typed: &TypedRoute) -> Result<ParityOptions, RouteSettingsError> {
    let usual = ParityOptions::default();
    Ok(ParityOptions {
        interval: time("parity-interval", typed.parity_interval, usual.interval)?,
        tokenise_timeout: time("tokenise-timeout", typed.tokenise_timeout, usual.tokenise_timeout)?,
        tokeniser: typed.tokenizer.as_deref().map(tokeniser).transpose()?.map(Arc::new),
    })
}

fn tokeniser(folder: &Path) -> Result<Tokeniser, RouteSettingsError> {
    let wrong = |error: String| RouteSettingsError::Tokenizer { folder: folder.display().to_string(), error };
    let files = servelab_model::text_files(folder).map_err(|error| wrong(error.to_string()))?;
    let tokenizer = files.tokenizer.as_deref().ok_or_else(|| wrong("there is no tokenizer.json".into()))?;
    Tokeniser::new(&for_prompts(&files, tokenizer)).map_err(|error| wrong(error.to_string()))
}

fn timeouts(typed: &TypedRoute) -> Result<Timeouts, RouteSettingsError> {
    let usual = Timeouts::default();
    Ok(Timeouts {
        connect: time("connect-timeout", typed.connect_timeout, usual.connect)?,
        first_byte: time("first-byte-timeout", typed.first_byte_timeout, usual.first_byte)?,
        idle: time("idle-timeout", typed.idle_timeout, usual.idle)?,
        total: time("total-timeout", typed.total_timeout, usual.total)?,
    })
}

fn limits(typed: &TypedRoute) -> Result<KeyLimits, RouteSettingsError> {
    let check = |name, value: Option<u64>| match value {
        Some(0) => Err(RouteSettingsError::Range { name, value: "0".into(), rule: AT_LEAST_ONE }),
        value => Ok(value),
    };
    Ok(KeyLimits {
        requests_per_minute: check("requests-per-minute", typed.requests_per_minute)?,
        tokens_per_minute: check("tokens-per-minute", typed.tokens_per_minute)?,
    })
}

fn hedge(share: Option<f64>) -> Result<Option<f64>, RouteSettingsError> {
    match share {
        Some(share) if !(0.5..=1.0).contains(&share) => {
            let rule = "it must be from 0.5 to 1, or be left out";
            Err(RouteSettingsError::Range { name: "hedge", value: share.to_string(), rule })
        }
        share => Ok(share),
    }
}

fn time(
    name: &'static str,
    typed: Option<TimeSpan>,
    usual: Duration,
) -> Result<Duration, RouteSettingsError> {
    match typed {
        Some(TimeSpan(time)) if time.is_zero() => {
            Err(RouteSettingsError::Range { name, value: "0".into(), rule: SOME_TIME })
        }
        Some(TimeSpan(time)) => Ok(time),
        None => Ok(usual),
    }
}

/// Where routers count together.
fn limits_redis(typed: &TypedRoute, limits: &KeyLimits) -> Result<Option<RedisOptions>, RouteSettingsError> {
    let address: RedisAddress = match (&typed.limits_redis, &typed.limits_redis_file) {
        (Some(_), Some(_)) => return Err(RouteSettingsError::RedisTwice),
        (Some(url), None) => url.parse()?,
        (None, Some(path)) => secrets::redis_url(path)?.expose().parse()?,
        (None, None) if typed.limits_redis_timeout.is_some() => {
            return Err(RouteSettingsError::OfNoUse("limits-redis-timeout", "--limits-redis"));
        }
        (None, None) if typed.limits_redis_away.is_some() => {
            return Err(RouteSettingsError::OfNoUse("limits-redis-away", "--limits-redis"));
        }
        (None, None) => return Ok(None),
    };
    if *limits == KeyLimits::default() {
        return Err(RouteSettingsError::OfNoUse(
            "limits-redis",
            "--requests-per-minute or --tokens-per-minute",
        ));
    }
    Ok(Some(RedisOptions {
        address,
        timeout: time("limits-redis-timeout", typed.limits_redis_timeout, Duration::from_millis(50))?,
        away: typed.limits_redis_away.as_deref().map_or(Ok(Away::default()), str::parse)?,
    }))
}

fn at_least_one(name: &'static str, typed: Option<usize>, usual: usize) -> Result<usize, RouteSettingsError> {
    match typed.unwrap_or(usual) {
        0 => Err(RouteSettingsError::Range { name, value: "0".into(), rule: AT_LEAST_ONE }),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(change: impl FnOnce(&mut TypedRoute)) -> Result<RouteSettings, RouteSettingsError> {
        let mut typed = TypedRoute { replica: Some(vec!["http://a:1".into()]), ..TypedRoute::default() };
        change(&mut typed);
        RouteSettings::new(typed, None)
    }

    #[test]
    fn what_was_not_typed_has_its_default_and_the_rest_its_value() {
        let options = settings(|_| ()).unwrap().options;
        assert_eq!((options.port, options.fleet.policy, options.hedge_quantile), (8080, Policy::Cost, None));
        let options = settings(|typed| {
            typed.policy = Some("session".into());
            typed.replicas_dns = Some(vec!["fleet.svc:8000".into()]);
            typed.tokens_per_minute = Some(7);
        })
        .unwrap()
        .options;
        assert_eq!((options.fleet.policy, options.sources.len()), (Policy::Session, 2));
        assert_eq!(options.anonymous_limits.tokens_per_minute, Some(7));
    }

    #[test]
    fn a_service_of_kubernetes_has_a_port_by_name_or_number_and_perhaps_a_namespace() {
        let typed = |text: &str| {
            let text = text.to_owned();
            settings(|typed| typed.replicas_kubernetes = Some(vec![text])).unwrap().options.sources
        };
        let service = |namespace: Option<&str>, port: &str| {
            Source::Kubernetes(KubernetesService {
                namespace: namespace.map(str::to_owned),
                name: "servelab".to_owned(),
                port: port.parse().unwrap(),
                kubeconfig: None,
            })
        };
        assert_eq!(typed("servelab:http")[1], service(None, "http"));
        assert_eq!(typed("serving/servelab:8000")[1], service(Some("serving"), "8000"));
    }

    #[test]
    fn what_cannot_work_is_named() {
        type Change = fn(&mut TypedRoute);
        let cases: [(Change, &str); 25] = [
            (|typed| typed.replica = None, "no replica is named"),
            (|typed| typed.replica = Some(vec!["a".into()]), "--replica \"a\" is no address"),
            (|typed| typed.replicas_dns = Some(vec!["a:b".into()]), "is no NAME:PORT"),
            (|typed| typed.replicas_srv = Some(vec!["a b".into()]), "--replicas-srv \"a b\" is no name"),
            (
                |typed| typed.replicas_kubernetes = Some(vec!["a".into()]),
                "\"a\" is no [NAMESPACE/]SERVICE:PORT",
            ),
            (|typed| typed.replicas_kubernetes = Some(vec!["A/b:1".into()]), "\"A/b:1\" is no"),
            (|typed| typed.replicas_kubernetes = Some(vec!["a:0".into()]), "\"a:0\" is no"),
            (|typed| typed.replicas_kubernetes = Some(vec!["a:70000".into()]), "\"a:70000\" is no"),
            (|typed| typed.dns_server = Some("127.0.0.1:53".into()), "--dns-server is of no use"),
            (|typed| typed.kubeconfig = Some("file".into()), "--kubeconfig is of no use"),
            (
                |typed| {
                    typed.tokens_per_minute = Some(1);
                    typed.limits_redis = Some("redis.svc:6379".into());
                },
                "--limits-redis: it is no address of Redis; give it as redis://",
            ),
            (
                |typed| {
                    typed.tokens_per_minute = Some(1);
                    typed.limits_redis = Some("redis://redis.svc".into());
                    typed.limits_redis_away = Some("wait".into());
                },
                "--limits-redis-away: \"wait\" is none of local, refuse, allow",
            ),
            (
                |typed| typed.limits_redis = Some("redis://redis.svc".into()),
                "of no use without --requests-per-min",
            ),
            (|typed| typed.limits_redis_away = Some("local".into()), "of no use without --limits-redis"),
            (
                |typed| {
                    typed.limits_redis = Some("redis://redis.svc".into());
                    typed.limits_redis_file = Some("file".into());
                },
                "not both",
            ),
            (|typed| typed.policy = Some("best".into()), "unknown policy \"best\""),
            (
                |typed| typed.tokenizer = Some("/nothing/here".into()),
                "--tokenizer \"/nothing/here\": there is no tokenizer.json",
            ),
            (|typed| typed.parity_interval = Some(TimeSpan(Duration::ZERO)), "--parity-interval is 0"),
            (|typed| typed.hedge = Some(2.0), "--hedge is 2"),
            (|typed| typed.max_in_flight = Some(0), "--max-in-flight is 0"),
            (|typed| typed.threads = Some(0), "--threads is 0; it must be from 1 to 1024"),
            (|typed| typed.threads = Some(5000), "--threads is 5000"),
            (|typed| typed.metrics_prefix = Some("9".into()), "--metrics-prefix \"9\""),
            (|typed| typed.kv_events_replay_port = Some(5558), "--kv-events-replay-port is for ZeroMQ"),
            (|typed| typed.kv_events_zmq_port = Some(0), "--kv-events-zmq-port is 0"),
        ];
        for (change, part) in cases {
            let error = settings(change).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
