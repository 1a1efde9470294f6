//! What was typed for `servelab route`, checked and ready to use.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use servelab_router::choice::fleet::FleetOptions;
use servelab_router::choice::policy::{Policy, UnknownPolicy};
use servelab_router::choice::rates::Pace;
use servelab_router::limits::KeyLimits;
use servelab_router::metrics::{MetricsError, RouterMetrics};
use servelab_router::parity::tokeniser::Tokeniser;
use servelab_router::parity::watch::ParityOptions;
use servelab_router::prompt::BLOCK_SIZE;
use servelab_router::replicas::address::{Address, BadAddress};
use servelab_router::replicas::probe::ProbeOptions;
use servelab_router::{ClientKey, HoldOptions, RouterOptions, Source, Timeouts};
use servelab_telemetry::{LogError, LogFormat, Secret};

use super::args::TypedRoute;
use crate::load::for_prompts;
use crate::open_files;
use crate::secrets::{self, SecretError};
use crate::settings::SettingsError;
use crate::size::TimeSpan;

/// Why the settings cannot work.
#[derive(Debug, thiserror::Error)]
pub enum RouteSettingsError {
    #[error(
        "no replica is named; give --replica URL, --replicas-file FILE or --replicas-dns NAME:PORT, or an --admin-key-file to add them later"
    )]
    NoReplica,
    #[error("--replica {0}")]
    Replica(#[from] BadAddress),
    #[error("--replicas-dns {0:?} is no NAME:PORT, such as servelab-headless:8000")]
    Dns(String),
    #[error("--policy: {0}")]
    Policy(#[from] UnknownPolicy),
    #[error("--{name} is {value}; {rule}")]
    Range { name: &'static str, value: String, rule: &'static str },
    #[error("--tokenizer {folder:?}: {error}; give the folder of the model that the replicas serve")]
    Tokenizer { folder: String, error: String },
    #[error("--health-path {0:?} is no path; it begins with a slash, as /health")]
    HealthPath(String),
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
            admin_key: key_of(&typed.admin_key_file)?,
            replica_key: key_of(&typed.replica_key_file)?,
            idempotency_window: time(
                "idempotency-window",
                typed.idempotency_window,
                Duration::from_secs(600),
            )?,
            drain_timeout: typed.drain_timeout.map_or(Duration::from_secs(30), |time| time.0),
            metrics: Arc::new(metrics),
        };
        let log_format = match typed.log_format {
            Some(crate::args::LogFormat::Json) => LogFormat::Json,
            _ => LogFormat::Human,
        };
        Ok(Self { options, log_format, log_level })
    }
}

fn sources(typed: &TypedRoute) -> Result<Vec<Source>, RouteSettingsError> {
    let mut sources = Vec::new();
    if let Some(urls) = &typed.replica {
        let addresses = urls.iter().map(|url| url.parse()).collect::<Result<Vec<Address>, _>>()?;
        sources.push(Source::Static(addresses));
    }
    sources.extend(typed.replicas_file.clone().map(Source::File));
    let interval = time("dns-interval", typed.dns_interval, Duration::from_secs(5))?;
    for text in typed.replicas_dns.iter().flatten() {
        let wrong = || RouteSettingsError::Dns(text.clone());
        let (name, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
        if name.is_empty() {
            return Err(wrong());
        }
        sources.push(Source::Dns { name: name.to_owned(), port, interval });
    }
    if sources.is_empty() && typed.admin_key_file.is_none() {
        return Err(RouteSettingsError::NoReplica);
    }
    Ok(sources)
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
        metrics_prefixes: usual.metrics_prefixes,
    })
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
    fn what_cannot_work_is_named() {
        type Change = fn(&mut TypedRoute);
        let cases: [(Change, &str); 9] = [
            (|typed| typed.replica = None, "no replica is named"),
            (|typed| typed.replica = Some(vec!["a".into()]), "--replica \"a\" is no address"),
            (|typed| typed.replicas_dns = Some(vec!["a:b".into()]), "is no NAME:PORT"),
            (|typed| typed.policy = Some("best".into()), "unknown policy \"best\""),
            (
                |typed| typed.tokenizer = Some("/nothing/here".into()),
                "--tokenizer \"/nothing/here\": there is no tokenizer.json",
            ),
            (|typed| typed.parity_interval = Some(TimeSpan(Duration::ZERO)), "--parity-interval is 0"),
            (|typed| typed.hedge = Some(2.0), "--hedge is 2"),
            (|typed| typed.max_in_flight = Some(0), "--max-in-flight is 0"),
            (|typed| typed.metrics_prefix = Some("9".into()), "--metrics-prefix \"9\""),
        ];
        for (change, part) in cases {
            let error = settings(change).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
