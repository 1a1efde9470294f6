//! Where traces go: from the flags, else from the variables that OpenTelemetry gives every program.
//!
//! Headers, time-out, compression and resource attributes (`OTEL_EXPORTER_OTLP_HEADERS`, `..._TIMEOUT`,
//! `..._COMPRESSION`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`) are read where they are used.

use std::time::Duration;

use http::Uri;
use servelab_telemetry::traces::{OtlpProtocol, Sampling, TraceOptions};

use crate::args;

/// How long the spans that are left may take when the program ends.
pub const LAST_SPANS: Duration = Duration::from_secs(3);

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
/// The port that collectors listen on for gRPC.
const GRPC_PORT: u16 = 4317;
/// Where collectors take traces over HTTP.
const TRACES_PATH: &str = "/v1/traces";

/// Why traces cannot be exported as asked. Never holds the value of a variable that may have a secret in it.
#[derive(Debug, thiserror::Error)]
pub enum TraceSettingsError {
    #[error(
        "{origin} {given:?} {problem}; give it as http://HOST:4317 for gRPC or http://HOST:4318 for HTTP"
    )]
    Endpoint { origin: &'static str, given: String, problem: &'static str },
    #[error(
        "{0} holds a user name or a password; put what the collector asks for into OTEL_EXPORTER_OTLP_HEADERS"
    )]
    Credentials(&'static str),
    #[error(
        "--{0} says how traces are exported, and nothing where to; give --otlp-endpoint too, or leave it out"
    )]
    NoEndpoint(&'static str),
    #[error("{origin} is {given:?}; use {allowed}")]
    Unknown { origin: &'static str, given: String, allowed: &'static str },
    #[error("{origin} is {given}; it must be from 0 to 1, the share of requests that are traced")]
    Ratio { origin: &'static str, given: String },
    #[error(
        "{0} is set and not supported: certificates are checked against the public authorities; leave it out, or send traces through a collector nearby"
    )]
    NotSupported(&'static str),
}

/// What was typed about traces.
#[derive(Clone, Debug, Default)]
pub struct TypedTraces {
    pub endpoint: Option<String>,
    pub protocol: Option<args::OtlpProtocol>,
    pub sample_ratio: Option<f64>,
    pub prompts: Option<bool>,
}

/// What to export and where to; `None`, the default, is nothing. `variable` reads the environment.
///
/// # Errors
/// The first setting that cannot work.
pub fn options(
    typed: TypedTraces,
    service_name: &'static str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<TraceOptions>, TraceSettingsError> {
    // An empty variable is as good as none, says OpenTelemetry.
    let variable =
        |name: &str| variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    let Some(given) = given_endpoint(&typed, &variable) else {
        return refuse_without_endpoint(&typed).map(|()| None);
    };
    for name in ["OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE"] {
        if variable(name).is_some() {
            return Err(TraceSettingsError::NotSupported(name));
        }
    }
    let address = given.uri()?;
    let protocol = match typed.protocol {
        Some(args::OtlpProtocol::Grpc) => OtlpProtocol::Grpc,
        Some(args::OtlpProtocol::Http) => OtlpProtocol::Http,
        None => protocol(&address, &variable)?,
    };
    Ok(Some(TraceOptions {
        endpoint: given.target(address, protocol)?,
        protocol,
        sampling: sampling(typed.sample_ratio, &variable)?,
        prompts: typed.prompts.unwrap_or(false),
        service_name,
        version: env!("CARGO_PKG_VERSION"),
    }))
}

/// An address, and who gave it.
struct Given {
    origin: &'static str,
    text: String,
}

fn given_endpoint(typed: &TypedTraces, variable: &impl Fn(&str) -> Option<String>) -> Option<Given> {
    if let Some(text) = typed.endpoint.clone() {
        return Some(Given { origin: "--otlp-endpoint", text });
    }
    let is_off = variable("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true"))
        || variable("OTEL_TRACES_EXPORTER").is_some_and(|text| text == "none");
    if is_off {
        return None;
    }
    let of = |origin| variable(origin).map(|text| Given { origin, text });
    of(TRACES_ENDPOINT).or_else(|| of(ENDPOINT))
}

/// A setting that would be ignored.
fn refuse_without_endpoint(typed: &TypedTraces) -> Result<(), TraceSettingsError> {
    let given = [
        ("otlp-protocol", typed.protocol.is_some()),
        ("trace-sample-ratio", typed.sample_ratio.is_some()),
        ("trace-prompts", typed.prompts == Some(true)),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(TraceSettingsError::NoEndpoint(name)),
        None => Ok(()),
    }
}

impl Given {
    fn wrong(&self, problem: &'static str) -> TraceSettingsError {
        let given = self.text.chars().take(200).collect();
        TraceSettingsError::Endpoint { origin: self.origin, given, problem }
    }

    fn uri(&self) -> Result<Uri, TraceSettingsError> {
        if self.text.contains('@') {
            return Err(TraceSettingsError::Credentials(self.origin));
        }
        let uri: Uri = self.text.parse().map_err(|_| self.wrong("is no URL"))?;
        match uri.scheme_str() {
            Some("http" | "https") if uri.host().is_some_and(|host| !host.is_empty()) => Ok(uri),
            Some("http" | "https") => Err(self.wrong("has no host")),
            _ => Err(self.wrong("does not begin with http:// or https://")),
        }
    }

    /// Where spans are sent. Over HTTP the traces' own variable has the whole URL, every other address the beginning.
    fn target(&self, uri: Uri, protocol: OtlpProtocol) -> Result<Uri, TraceSettingsError> {
        if uri.query().is_some() {
            return Err(self.wrong("has a query"));
        }
        let path = uri.path().trim_end_matches('/');
        let is_whole = self.origin == TRACES_ENDPOINT || path.ends_with(TRACES_PATH);
        if protocol == OtlpProtocol::Grpc || is_whole {
            return Ok(uri);
        }
        let (path, mut parts) = (format!("{path}{TRACES_PATH}"), uri.clone().into_parts());
        parts.path_and_query = path.parse().ok();
        Uri::from_parts(parts).map_err(|_| self.wrong("is no URL"))
    }
}

/// As the variables say, else as the port suggests.
fn protocol(
    endpoint: &Uri,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<OtlpProtocol, TraceSettingsError> {
    for origin in ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"] {
        match variable(origin).as_deref() {
            None => {}
            Some("grpc") => return Ok(OtlpProtocol::Grpc),
            Some("http/protobuf") => return Ok(OtlpProtocol::Http),
            Some(other) => {
                let given = other.chars().take(60).collect();
                return Err(TraceSettingsError::Unknown { origin, given, allowed: "grpc or http/protobuf" });
            }
        }
    }
    Ok(if endpoint.port_u16() == Some(GRPC_PORT) { OtlpProtocol::Grpc } else { OtlpProtocol::Http })
}

fn sampling(
    typed: Option<f64>,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Sampling, TraceSettingsError> {
    const ALLOWED: &str =
        "always_on, always_off, traceidratio, or one of these three with parentbased_ in front";
    let checked = |origin, ratio: f64| {
        let wrong = TraceSettingsError::Ratio { origin, given: ratio.to_string() };
        if (0.0..=1.0).contains(&ratio) { Ok(ratio) } else { Err(wrong) }
    };
    if let Some(ratio) = typed {
        return Ok(Sampling { ratio: checked("--trace-sample-ratio", ratio)?, follows_parent: true });
    }
    let Some(name) = variable(SAMPLER) else { return Ok(Sampling { ratio: 1.0, follows_parent: true }) };
    let (root, follows_parent) = match name.strip_prefix("parentbased_") {
        Some(root) => (root, true),
        None => (name.as_str(), false),
    };
    let ratio = match root {
        "always_on" => 1.0,
        "always_off" => 0.0,
        "traceidratio" => {
            let text = variable(SAMPLER_ARG).unwrap_or_else(|| "1".to_owned());
            let wrong =
                || TraceSettingsError::Ratio { origin: SAMPLER_ARG, given: text.chars().take(60).collect() };
            checked(SAMPLER_ARG, text.parse().map_err(|_| wrong())?)?
        }
        _ => {
            let given = name.chars().take(60).collect();
            return Err(TraceSettingsError::Unknown { origin: SAMPLER, given, allowed: ALLOWED });
        }
    };
    Ok(Sampling { ratio, follows_parent })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(
        typed: TypedTraces,
        environment: &[(&str, &str)],
    ) -> Result<Option<TraceOptions>, TraceSettingsError> {
        let find = |name: &str| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        options(typed, "servelab", find)
    }

    fn flag(endpoint: &str) -> TypedTraces {
        TypedTraces { endpoint: Some(endpoint.into()), ..TypedTraces::default() }
    }

    fn target(typed: TypedTraces, environment: &[(&str, &str)]) -> (String, OtlpProtocol) {
        let options = of(typed, environment).unwrap().unwrap();
        (options.endpoint.to_string(), options.protocol)
    }

    #[test]
    fn nothing_said_is_no_traces() {
        assert_eq!(of(TypedTraces::default(), &[]).unwrap(), None);
        assert_eq!(of(TypedTraces::default(), &[(ENDPOINT, " ")]).unwrap(), None);
        for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(of(TypedTraces::default(), &[(ENDPOINT, "http://c:4317"), off]).unwrap(), None);
            assert!(of(flag("http://c:4317"), &[off]).unwrap().is_some(), "a flag is said last");
        }
    }

    #[test]
    fn the_port_says_the_protocol_unless_somebody_else_does() {
        use OtlpProtocol::{Grpc, Http};
        assert_eq!(target(flag("http://c:4317"), &[]), ("http://c:4317/".into(), Grpc));
        assert_eq!(target(flag("http://c:4318"), &[]), ("http://c:4318/v1/traces".into(), Http));
        let said = TypedTraces { protocol: Some(args::OtlpProtocol::Grpc), ..flag("http://c:9") };
        assert_eq!(target(said, &[]), ("http://c:9/".into(), Grpc));
        let variables = [(ENDPOINT, "http://c:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")];
        assert_eq!(target(TypedTraces::default(), &variables), ("http://c:4317/v1/traces".into(), Http));
    }

    #[test]
    fn only_the_traces_own_variable_has_the_whole_url() {
        let variables = [(TRACES_ENDPOINT, "http://c:4318/in"), (ENDPOINT, "http://other:1")];
        assert_eq!(target(TypedTraces::default(), &variables).0, "http://c:4318/in");
        let variables = [(ENDPOINT, "https://c/base/")];
        assert_eq!(target(TypedTraces::default(), &variables).0, "https://c/base/v1/traces");
        assert_eq!(target(flag("http://c:4318/v1/traces"), &[]).0, "http://c:4318/v1/traces");
    }

    #[test]
    fn a_flag_goes_before_the_variables() {
        let variables = [(ENDPOINT, "http://other:4318"), (SAMPLER, "always_off")];
        let typed = TypedTraces { sample_ratio: Some(0.25), ..flag("http://c:4318") };
        let options = of(typed, &variables).unwrap().unwrap();
        assert_eq!(options.endpoint, "http://c:4318/v1/traces");
        assert_eq!(options.sampling, Sampling { ratio: 0.25, follows_parent: true });
    }

    #[test]
    fn samplers_have_opentelemetrys_names() {
        for (name, ratio, follows_parent) in [
            ("always_on", 1.0, false),
            ("parentbased_always_off", 0.0, true),
            ("traceidratio", 0.5, false),
            ("parentbased_traceidratio", 0.5, true),
        ] {
            let options = of(flag("http://c:1"), &[(SAMPLER, name), (SAMPLER_ARG, "0.5")]).unwrap().unwrap();
            assert_eq!(options.sampling, Sampling { ratio, follows_parent }, "{name}");
        }
    }

    #[test]
    fn what_cannot_work_is_named_and_no_secret_shown() {
        let cases = [
            (of(flag("collector:4317"), &[]), "does not begin with http://"),
            (of(flag("http://me:secret@c:4317"), &[]), "--otlp-endpoint holds a user name"),
            (of(flag("http://c:4318/?key=1"), &[]), "has a query"),
            (
                of(TypedTraces { sample_ratio: Some(0.1), ..Default::default() }, &[]),
                "--trace-sample-ratio says how",
            ),
            (
                of(TypedTraces { sample_ratio: Some(1.5), ..flag("http://c:1") }, &[]),
                "--trace-sample-ratio is 1.5",
            ),
            (of(TypedTraces { prompts: Some(true), ..Default::default() }, &[]), "--trace-prompts says how"),
            (
                of(flag("http://c:1"), &[(SAMPLER, "jaeger_remote")]),
                "OTEL_TRACES_SAMPLER is \"jaeger_remote\"",
            ),
            (
                of(flag("http://c:1"), &[(SAMPLER, "traceidratio"), (SAMPLER_ARG, "many")]),
                "OTEL_TRACES_SAMPLER_ARG is many",
            ),
            (
                of(flag("http://c:1"), &[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")]),
                "grpc or http/protobuf",
            ),
            (of(flag("https://c"), &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem")]), "not supported"),
        ];
        for (outcome, part) in cases {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("secret"), "{error}");
        }
    }
}
