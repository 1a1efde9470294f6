//! What was typed for `servelab bench`, as something that can be run: defaults filled in, and what cannot be refused
//! before anything starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};
use servelab_bench::arrivals::{ArrivalError, ArrivalShape, Stage};
use servelab_bench::client::{Target, TargetError, Timeouts};
use servelab_bench::find_rate::FindRate;
use servelab_bench::phases::{Extent, MAX_REQUESTS};
use servelab_bench::result::{Endpoint, Slo};
use servelab_bench::run::LoadShape;
use servelab_bench::session::{self, Loads};
use servelab_bench::vocabulary::FormChoice;
use servelab_bench::workload::{Fit, Workload, WorkloadError};
use servelab_telemetry::Secret;
use servelab_telemetry::traces::TraceOptions;

use super::args::{self, Amount, BenchCommand, LoadArgs};
use crate::args::Typed;
use crate::settings::{EngineSettings, ModelSettings, Settings, SettingsError};
use crate::traces::{self, TraceSettingsError, TypedTraces};

const DEFAULT_URL: &str = "http://127.0.0.1:8000";
const DEFAULT_REQUESTS: u64 = 100;
const DEFAULT_MAX_IN_FLIGHT: u32 = 4096;
const DEFAULT_REPEATS: u32 = 3;
/// Where the API key comes from if no file is named; the first that is set.
pub const API_KEY_VARIABLES: [&str; 2] = ["SERVELAB_API_KEY", "OPENAI_API_KEY"];

/// What `servelab bench` does. Ready to use.
#[derive(Debug)]
pub struct BenchSettings {
    pub target: TargetSettings,
    pub workload: Workload,
    pub fit: Fit,
    pub session: session::Settings,
    pub ignore_eos: bool,
    /// `None`: the server's own.
    pub temperature: Option<f64>,
    pub extra_body: Map<String, Value>,
    pub out: Option<PathBuf>,
    pub json: bool,
    /// Whether nothing is shown while it runs.
    pub quiet: bool,
    pub save_detailed: bool,
    pub label: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

/// What is measured.
pub enum TargetSettings {
    Http(HttpSettings),
    Offline { model: ModelSettings, engine: EngineSettings },
}

impl std::fmt::Debug for TargetSettings {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http(http) => http.fmt(out),
            Self::Offline { engine, .. } => engine.fmt(out),
        }
    }
}

#[derive(Debug)]
pub struct HttpSettings {
    pub target: Target,
    /// Default: the first that is served.
    pub model: Option<String>,
    pub endpoint: Endpoint,
    pub form: FormChoice,
    pub api_key: Option<Secret>,
    /// How long it may take until the server is ready; default: it is.
    pub wait_ready: Option<Duration>,
    pub timeouts: Timeouts,
    /// Default: none, whatever the environment says: they are no part of what is measured.
    pub traces: Option<TraceOptions>,
}

/// A combination that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    #[error(
        "say how requests arrive: --concurrency, --rate, --steps or --find-rate; or take a workload that has arrivals of its own, such as azure-chat or --trace"
    )]
    NoLoad,
    #[error(transparent)]
    Traces(#[from] TraceSettingsError),
    #[error("{0} exclude each other; give one of them")]
    Several(String),
    #[error("--{option} goes with {with} only; leave it out, or add that")]
    Needs { option: &'static str, with: &'static str },
    #[error("--{option} is {value}; it must be {rule}")]
    Range { option: &'static str, value: String, rule: &'static str },
    #[error(
        "the workload {workload} has {there} requests, and {wanted} are wanted with the warm-up; lower --requests or --warm-up"
    )]
    TooFew { workload: String, there: u64, wanted: u64 },
    #[error(
        "--workload {0} needs a server, whose answers it repeats or whose tokenizer reads it; leave out --offline"
    )]
    NeedsServer(String),
    #[error("--prompt-form token-ids does not go with {0}, whose prompts are text; use --prompt-form words")]
    NoTokenIds(String),
    #[error("--metadata {0:?} is no pair; give NAME=VALUE")]
    Metadata(String),
    #[error("--extra-body is no JSON object: {0}")]
    ExtraBody(String),
    #[error("--extra-body sets {0}, which the benchmark sets itself; leave it out")]
    ExtraField(String),
    #[error("--api-key-file: cannot read {}: {source}", path.display())]
    KeyFile { path: PathBuf, source: std::io::Error },
    #[error("{0} holds no key; put one into its first line, or leave it out")]
    NoKey(String),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Arrivals(#[from] ArrivalError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Engine(#[from] SettingsError),
}

impl BenchSettings {
    /// `environment` looks up a variable of the environment.
    ///
    /// # Errors
    /// The first setting that cannot work, alone or with another.
    pub fn new(
        command: &BenchCommand,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, UsageError> {
        let workload = Workload::new(&command.workload.options())?;
        let session = session_settings(command, &workload)?;
        let extra_body = extra_body(command.target.extra_body.as_deref())?;
        let temperature = command.target.temperature;
        if let Some(value) = temperature.filter(|value| !(0.0..=2.0).contains(value)) {
            return Err(range("temperature", value, "from 0 to 2"));
        }
        Ok(Self {
            target: target(command, &workload, &environment)?,
            fit: command.workload.fit(),
            session,
            ignore_eos: command.target.ignore_eos.unwrap_or(workload.ignore_eos),
            temperature: Some(temperature.unwrap_or(workload.temperature)),
            extra_body,
            out: command.report.out.clone(),
            json: command.report.json,
            quiet: command.report.quiet || command.report.json,
            save_detailed: command.report.save_detailed,
            label: command.report.label.clone(),
            metadata: metadata(&command.report.metadata)?,
            workload,
        })
    }
}

fn range(option: &'static str, value: impl ToString, rule: &'static str) -> UsageError {
    UsageError::Range { option, value: value.to_string(), rule }
}

// ---- what is measured ----

fn target(
    command: &BenchCommand,
    workload: &Workload,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<TargetSettings, UsageError> {
    if command.target.offline {
        return offline(command, workload);
    }
    if command.engine.typed() != Typed::default() {
        let option = "load-format, --dtype, --threads and other settings of the engine";
        return Err(UsageError::Needs { option, with: "--offline" });
    }
    let typed = &command.target;
    let endpoint = match typed.endpoint {
        Some(args::Endpoint::Chat) => Endpoint::Chat,
        Some(args::Endpoint::Completions) => Endpoint::Completions,
        None if workload.name == "multi-turn" => Endpoint::Chat,
        None => Endpoint::Completions,
    };
    let form = match typed.prompt_form {
        Some(args::Form::TokenIds) if workload.needs_text => {
            return Err(UsageError::NoTokenIds(format!("the workload {}", workload.name)));
        }
        Some(args::Form::TokenIds) if endpoint == Endpoint::Chat => {
            return Err(UsageError::NoTokenIds("--endpoint chat".into()));
        }
        Some(args::Form::TokenIds) => FormChoice::TokenIds,
        Some(args::Form::Words) => FormChoice::Words,
        None | Some(args::Form::Auto) if workload.needs_text => FormChoice::Words,
        None | Some(args::Form::Auto) => FormChoice::Auto,
    };
    let target = Target::parse(typed.url.as_deref().unwrap_or(DEFAULT_URL))?;
    Ok(TargetSettings::Http(HttpSettings {
        target: match &typed.ca_file {
            Some(file) => target.trusting(file)?,
            None => target,
        },
        model: typed.model.clone(),
        endpoint,
        form,
        api_key: api_key(typed.api_key_file.as_deref(), environment)?,
        wait_ready: typed.wait_ready.map(|time| time.0),
        timeouts: timeouts(typed)?,
        traces: traces(typed, environment)?,
    }))
}

fn traces(
    typed: &args::TargetArgs,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Option<TraceOptions>, TraceSettingsError> {
    let given = TypedTraces {
        endpoint: typed.otlp_endpoint.clone(),
        protocol: typed.otlp_protocol,
        sample_ratio: typed.trace_sample_ratio,
        prompts: None,
    };
    let is_wanted = given.endpoint.is_some();
    traces::options(given, "servelab-bench", |name| environment(name).filter(|_| is_wanted))
}

fn offline(command: &BenchCommand, workload: &Workload) -> Result<TargetSettings, UsageError> {
    let typed = &command.target;
    let of_http = [
        ("url", typed.url.is_some()),
        ("endpoint", typed.endpoint.is_some()),
        ("prompt-form", typed.prompt_form.is_some()),
        ("api-key-file", typed.api_key_file.is_some()),
        ("ca-file", typed.ca_file.is_some()),
        ("extra-body", typed.extra_body.is_some()),
        ("wait-ready", typed.wait_ready.is_some()),
        ("connect-timeout", typed.connect_timeout.is_some()),
        ("first-byte-timeout", typed.first_byte_timeout.is_some()),
        ("idle-timeout", typed.idle_timeout.is_some()),
        ("total-timeout", typed.total_timeout.is_some()),
        ("otlp-endpoint", typed.otlp_endpoint.is_some()),
        ("otlp-protocol", typed.otlp_protocol.is_some()),
        ("trace-sample-ratio", typed.trace_sample_ratio.is_some()),
    ];
    if let Some((option, _)) = of_http.iter().find(|(_, given)| *given) {
        return Err(UsageError::Several(format!("--offline and --{option}")));
    }
    if workload.is_given {
        return Err(UsageError::NeedsServer(workload.name.clone()));
    }
    let is_simulated = command.engine.device == Some(crate::args::Device::Sim);
    let serve = Typed {
        model: typed.model.clone(),
        seed: command.workload.seed,
        // What is simulated is what the limits are of.
        hardware: command.report.hardware.clone().filter(|_| is_simulated),
        tp: command.report.gpus.filter(|_| is_simulated),
        // What is in flight is bounded by the load generator.
        max_waiting: Some(command.load.max_in_flight.unwrap_or(DEFAULT_MAX_IN_FLIGHT)),
        ..command.engine.typed()
    };
    let Settings { model, engine, .. } = Settings::new(serve, None)?;
    Ok(TargetSettings::Offline { model, engine })
}

fn api_key(
    file: Option<&Path>,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Secret>, UsageError> {
    let (origin, text) = match file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|source| UsageError::KeyFile { path: path.to_owned(), source })?;
            (path.display().to_string(), text)
        }
        None => match API_KEY_VARIABLES.iter().find_map(|name| Some((*name, environment(name)?))) {
            Some((name, text)) => (name.to_owned(), text),
            None => return Ok(None),
        },
    };
    let key = text.lines().map(str::trim).find(|line| !line.is_empty());
    key.map(|key| Some(Secret::new(key))).ok_or(UsageError::NoKey(origin))
}

fn timeouts(typed: &args::TargetArgs) -> Result<Timeouts, UsageError> {
    let default = Timeouts::default();
    let timeout = |option, given: Option<crate::size::TimeSpan>, default: Duration| match given {
        Some(time) if time.0.is_zero() => Err(range(option, "0", "more than 0")),
        given => Ok(given.map_or(default, |time| time.0)),
    };
    Ok(Timeouts {
        connect: timeout("connect-timeout", typed.connect_timeout, default.connect)?,
        first_byte: timeout("first-byte-timeout", typed.first_byte_timeout, default.first_byte)?,
        idle: timeout("idle-timeout", typed.idle_timeout, default.idle)?,
        total: timeout("total-timeout", typed.total_timeout, default.total)?,
    })
}

fn extra_body(text: Option<&str>) -> Result<Map<String, Value>, UsageError> {
    const OWN: [&str; 8] =
        ["model", "prompt", "messages", "max_tokens", "stream", "stream_options", "n", "best_of"];
    let Some(text) = text else { return Ok(Map::new()) };
    let body: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| UsageError::ExtraBody(error.to_string()))?;
    match OWN.iter().find(|name| body.contains_key(**name)) {
        Some(name) => Err(UsageError::ExtraField((*name).to_owned())),
        None => Ok(body),
    }
}

fn metadata(pairs: &[String]) -> Result<BTreeMap<String, String>, UsageError> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.trim().is_empty())?;
        Some((name.trim().to_owned(), value.trim().to_owned()))
    };
    pairs.iter().map(|text| pair(text).ok_or_else(|| UsageError::Metadata(text.clone()))).collect()
}

// ---- the load ----

fn session_settings(command: &BenchCommand, workload: &Workload) -> Result<session::Settings, UsageError> {
    let load = &command.load;
    let slo = (!load.slo.is_empty()).then(|| Slo { limits: load.slo.clone() });
    let measured = measured(load, workload)?;
    let settings = session::Settings {
        loads: loads(load, workload, slo.is_some())?,
        measured,
        warm_up: load.warm_up.map(|amount| match amount {
            Amount::Requests(requests) => Extent::Requests(requests),
            Amount::Time(time) => Extent::Time(time.0),
        }),
        cool_down: load.no_cool_down.then_some(false),
        repeats: within("repeats", load.repeats, default_repeats(load), 1..=100, "from 1 to 100")?,
        seed: command.workload.seed.unwrap_or(0),
        salted: !command.workload.no_salt,
        slo,
        max_in_flight: within(
            "max-in-flight",
            load.max_in_flight,
            DEFAULT_MAX_IN_FLIGHT,
            1..=65_536,
            "from 1 to 65536",
        )?,
    };
    enough_requests(&settings, workload)?;
    Ok(settings)
}

fn default_repeats(load: &LoadArgs) -> u32 {
    if load.find_rate.is_some() { 1 } else { DEFAULT_REPEATS }
}

fn within(
    option: &'static str,
    given: Option<u32>,
    default: u32,
    allowed: std::ops::RangeInclusive<u32>,
    rule: &'static str,
) -> Result<u32, UsageError> {
    let value = given.unwrap_or(default);
    if allowed.contains(&value) { Ok(value) } else { Err(range(option, value, rule)) }
}

fn measured(load: &LoadArgs, workload: &Workload) -> Result<Extent, UsageError> {
    match (load.requests, load.duration) {
        (Some(_), Some(_)) => Err(UsageError::Several("--requests and --duration".into())),
        (Some(requests), None) if (1..=MAX_REQUESTS).contains(&requests) => Ok(Extent::Requests(requests)),
        (Some(requests), None) => Err(range("requests", requests, "from 1 to 1000000")),
        (None, Some(time)) if time.0.is_zero() => Err(range("duration", "0", "more than 0")),
        (None, Some(time)) => Ok(Extent::Time(time.0)),
        (None, None) => Ok(Extent::Requests(workload.requests.unwrap_or(DEFAULT_REQUESTS))),
    }
}

/// A workload that ends must have as many requests as are wanted.
fn enough_requests(settings: &session::Settings, workload: &Workload) -> Result<(), UsageError> {
    let (Some(there), Extent::Requests(measured)) = (workload.requests, settings.measured) else {
        return Ok(());
    };
    let warm_up = match settings.warm_up {
        Some(Extent::Requests(requests)) => requests,
        _ => 0,
    };
    let wanted = measured.saturating_add(warm_up);
    let workload = workload.name.clone();
    if wanted > there { Err(UsageError::TooFew { workload, there, wanted }) } else { Ok(()) }
}

fn loads(load: &LoadArgs, workload: &Workload, has_slo: bool) -> Result<Loads, UsageError> {
    let given = [
        ("--concurrency", !load.concurrency.is_empty()),
        ("--rate", !load.rate.is_empty()),
        ("--steps", !load.steps.is_empty()),
        ("--find-rate", load.find_rate.is_some()),
    ];
    let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    if given.len() > 1 {
        return Err(UsageError::Several(given.join(" and ")));
    }
    let is_open = given != ["--concurrency"];
    belongs("think-time", load.think_time.is_some(), !is_open, "--concurrency")?;
    belongs("on-off", load.on_off.is_some(), given == ["--rate"], "--rate")?;
    belongs(
        "max-concurrency",
        load.max_concurrency.is_some(),
        is_open,
        "an open loop (--rate, --steps, --find-rate)",
    )?;
    let has_intervals = is_open && load.on_off.is_none();
    belongs("burstiness", load.burstiness.is_some(), has_intervals, "an open loop that is not --on-off")?;
    let max_concurrency = positive("max-concurrency", load.max_concurrency)?;
    let ladder = |shapes: Vec<ArrivalShape>| {
        let shapes = shapes.into_iter().map(|arrivals| LoadShape::Open { arrivals, max_concurrency });
        Loads::Ladder(shapes.collect())
    };
    match given.first() {
        Some(&"--concurrency") => closed(load),
        Some(&"--rate") => {
            Ok(ladder(load.rate.iter().map(|rate| at_rate(load, workload, *rate)).collect::<Result<_, _>>()?))
        }
        Some(&"--steps") => Ok(ladder(vec![steps(load)?])),
        Some(_) => search(load, workload, has_slo, max_concurrency),
        None => match &workload.arrivals {
            Some(arrivals) => Ok(ladder(vec![arrivals.clone()])),
            None => Err(UsageError::NoLoad),
        },
    }
}

fn belongs(option: &'static str, given: bool, allowed: bool, with: &'static str) -> Result<(), UsageError> {
    if given && !allowed { Err(UsageError::Needs { option, with }) } else { Ok(()) }
}

fn positive(option: &'static str, given: Option<u32>) -> Result<Option<u32>, UsageError> {
    match given {
        Some(value) if !(1..=65_536).contains(&value) => Err(range(option, value, "from 1 to 65536")),
        given => Ok(given),
    }
}

fn closed(load: &LoadArgs) -> Result<Loads, UsageError> {
    let think_time = load.think_time.map_or(Duration::ZERO, |time| time.0);
    let shapes = load.concurrency.iter().map(|&concurrency| match concurrency {
        1..=65_536 => Ok(LoadShape::Closed { concurrency, think_time }),
        wrong => Err(range("concurrency", wrong, "from 1 to 65536")),
    });
    shapes.collect::<Result<_, _>>().map(Loads::Ladder)
}

/// The shape that the flags ask for, or the workload's own, at that rate.
fn at_rate(load: &LoadArgs, workload: &Workload, rate: f64) -> Result<ArrivalShape, UsageError> {
    if rate == f64::INFINITY {
        return Ok(ArrivalShape::AllAtOnce);
    }
    let own = || workload.arrivals.as_ref().and_then(|arrivals| arrivals.at_rate(rate));
    let shape = match (load.on_off, load.burstiness) {
        (Some(on_off), _) => ArrivalShape::OnOff {
            rate,
            on_seconds: on_off.on.0.as_secs_f64(),
            off_seconds: on_off.off.0.as_secs_f64(),
        },
        (None, Some(burstiness)) if burstiness == f64::INFINITY => ArrivalShape::Constant { rate },
        (None, Some(burstiness)) => ArrivalShape::Gamma { rate, burstiness },
        (None, None) => own().unwrap_or(ArrivalShape::poisson(rate)),
    };
    shape.validate()?;
    Ok(shape)
}

fn steps(load: &LoadArgs) -> Result<ArrivalShape, UsageError> {
    let stages = load.steps.iter().map(|step| Stage {
        seconds: step.time.0.as_secs_f64(),
        from_rate: step.from_rate,
        to_rate: step.to_rate,
    });
    let shape = ArrivalShape::Stages { stages: stages.collect(), burstiness: load.burstiness.unwrap_or(1.0) };
    shape.validate()?;
    Ok(shape)
}

fn search(
    load: &LoadArgs,
    workload: &Workload,
    has_slo: bool,
    max_concurrency: Option<u32>,
) -> Result<Loads, UsageError> {
    if !has_slo {
        return Err(UsageError::Needs { option: "find-rate", with: "--slo, such as --slo ttft=500ms" });
    }
    let start = load.find_rate.unwrap_or(1.0);
    let arrivals = at_rate(load, workload, start)?;
    if arrivals.at_rate(start).is_none() {
        return Err(range("find-rate", start, "a finite rate"));
    }
    let search = FindRate { start, ..FindRate::default() };
    Ok(Loads::Search { arrivals, max_concurrency, search })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn typed(flags: &[&str]) -> BenchCommand {
        let all = ["servelab", "bench"].into_iter().chain(flags.iter().copied());
        match Cli::try_parse_from(all).map(|cli| cli.command) {
            Ok(Some(Command::Bench(bench))) => *bench,
            Ok(_) => panic!("{flags:?}"),
            Err(error) => panic!("{flags:?}: {error}"),
        }
    }

    fn settings(flags: &[&str]) -> Result<BenchSettings, UsageError> {
        BenchSettings::new(&typed(flags), |_| None)
    }

    fn http(settings: &BenchSettings) -> &HttpSettings {
        match &settings.target {
            TargetSettings::Http(http) => http,
            TargetSettings::Offline { .. } => panic!("offline"),
        }
    }

    fn shapes(flags: &[&str]) -> Vec<LoadShape> {
        match settings(flags).unwrap().session.loads {
            Loads::Ladder(shapes) => shapes,
            Loads::Search { .. } => panic!("a search"),
        }
    }

    #[test]
    fn a_concurrency_alone_is_a_benchmark() {
        let settings = settings(&["--concurrency", "1,4"]).unwrap();
        assert_eq!(http(&settings).target.to_string(), DEFAULT_URL);
        assert_eq!(
            (http(&settings).endpoint, http(&settings).form),
            (Endpoint::Completions, FormChoice::Auto)
        );
        assert_eq!(settings.session.measured, Extent::Requests(100));
        assert_eq!((settings.session.repeats, settings.session.salted), (3, true));
        assert_eq!((settings.ignore_eos, settings.temperature), (true, Some(0.0)));
        let closed = |concurrency| LoadShape::Closed { concurrency, think_time: Duration::ZERO };
        assert_eq!(settings.session.loads, Loads::Ladder(vec![closed(1), closed(4)]));
    }

    #[test]
    fn open_loops_have_the_shape_asked_for_or_the_workloads() {
        let arrivals = |flags: &[&str]| match shapes(flags).remove(0) {
            LoadShape::Open { arrivals, .. } => arrivals,
            LoadShape::Closed { .. } => panic!("closed"),
        };
        assert_eq!(arrivals(&["--rate", "2"]), ArrivalShape::poisson(2.0));
        assert_eq!(arrivals(&["--rate", "inf"]), ArrivalShape::AllAtOnce);
        assert_eq!(arrivals(&["--rate", "2", "--burstiness", "inf"]), ArrivalShape::Constant { rate: 2.0 });
        let burstier = ArrivalShape::Gamma { rate: 2.0, burstiness: 0.5 };
        assert_eq!(arrivals(&["--rate", "2", "--burstiness", "0.5"]), burstier);
        let chat = ArrivalShape::Gamma { rate: 2.0, burstiness: 0.84 };
        assert_eq!(arrivals(&["--rate", "2", "--workload", "azure-chat"]), chat);
        let own = ArrivalShape::Gamma { rate: 5.53, burstiness: 0.84 };
        assert_eq!(arrivals(&["--workload", "azure-chat"]), own);
        let on_off = ArrivalShape::OnOff { rate: 2.0, on_seconds: 60.0, off_seconds: 0.5 };
        assert_eq!(arrivals(&["--rate", "2", "--on-off", "1m,500ms"]), on_off);
        let stage = |seconds, from_rate, to_rate| Stage { seconds, from_rate, to_rate };
        let steps = ArrivalShape::Stages {
            stages: vec![stage(60.0, 2.0, 2.0), stage(30.0, 2.0, 20.0)],
            burstiness: 1.0,
        };
        assert_eq!(arrivals(&["--steps", "2x60s,2-20x30s"]), steps);
        assert_eq!(shapes(&["--rate", "1,2,4"]).len(), 3);
    }

    #[test]
    fn a_search_needs_a_promise_and_runs_each_rate_once() {
        let search = settings(&["--find-rate", "--slo", "ttft=500ms,tpot=50ms@p95"]).unwrap();
        assert_eq!((search.session.repeats, search.session.slo.unwrap().limits.len()), (1, 2));
        assert!(matches!(search.session.loads, Loads::Search { .. }));
        let error = settings(&["--find-rate", "8"]).unwrap_err().to_string();
        assert!(error.contains("--slo"), "{error}");
    }

    #[test]
    fn text_is_asked_for_where_it_is_needed() {
        let turns = settings(&["--workload", "multi-turn", "--concurrency", "2"]).unwrap();
        assert_eq!((http(&turns).endpoint, http(&turns).form), (Endpoint::Chat, FormChoice::Words));
    }

    #[test]
    fn keys_come_from_a_file_or_the_environment_and_are_never_shown() {
        let from = |name: &str| {
            BenchSettings::new(&typed(&["--concurrency", "1"]), |asked| {
                (asked == name).then(|| "sk-1\n".into())
            })
            .unwrap()
        };
        for name in API_KEY_VARIABLES {
            let settings = from(name);
            assert_eq!(http(&settings).api_key.as_ref().unwrap().expose(), "sk-1");
            assert!(!format!("{settings:?}").contains("sk-1"));
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let error = settings(&["--concurrency", "1", "--api-key-file", path]).unwrap_err().to_string();
        assert!(error.contains("holds no key"), "{error}");
    }

    #[test]
    fn the_engine_is_set_up_as_the_server_sets_it_up() {
        let offline = settings(&[
            "--offline",
            "--concurrency",
            "2",
            "--model",
            "smollm2-135m",
            "--load-format",
            "dummy",
            "--max-running",
            "4",
        ])
        .unwrap();
        let TargetSettings::Offline { engine, model } = offline.target else { panic!("http") };
        assert_eq!((engine.max_running, engine.max_waiting), (4, DEFAULT_MAX_IN_FLIGHT));
        assert_eq!(model.served_names, ["smollm2-135m"]);
    }

    #[test]
    fn what_cannot_be_run_is_refused_with_its_flag() {
        let bad: &[(&[&str], &str)] = &[
            (&[], "say how requests arrive"),
            (&["--concurrency", "1", "--rate", "2"], "--concurrency and --rate exclude each other"),
            (&["--concurrency", "0"], "--concurrency is 0"),
            (&["--rate", "0"], "a rate of 0"),
            (&["--rate", "2", "--burstiness", "0"], "a burstiness of 0"),
            (&["--rate", "2", "--think-time", "1s"], "--think-time goes with --concurrency only"),
            (&["--concurrency", "1", "--burstiness", "1"], "--burstiness goes with an open loop"),
            (&["--concurrency", "1", "--on-off", "1s,1s"], "--on-off goes with --rate"),
            (&["--concurrency", "1", "--max-concurrency", "1"], "--max-concurrency goes with an open loop"),
            (&["--concurrency", "1", "--requests", "0"], "--requests is 0"),
            (&["--concurrency", "1", "--requests", "5", "--duration", "5s"], "--requests and --duration"),
            (&["--concurrency", "1", "--repeats", "0"], "--repeats is 0"),
            (&["--concurrency", "1", "--temperature", "3"], "--temperature is 3"),
            (&["--concurrency", "1", "--url", "ftp://x"], "ftp"),
            (&["--concurrency", "1", "--ca-file", "x"], "--ca-file goes with an https address"),
            (&["--concurrency", "1", "--url", "https://x", "--ca-file", "/dev/null"], "holds no certificate"),
            (&["--concurrency", "1", "--extra-body", "[]"], "--extra-body is no JSON object"),
            (&["--concurrency", "1", "--extra-body", "{\"stream\":false}"], "--extra-body sets stream"),
            (&["--concurrency", "1", "--metadata", "x"], "--metadata \"x\""),
            (&["--concurrency", "1", "--threads", "2"], "goes with --offline only"),
            (&["--concurrency", "1", "--offline", "--url", "http://x"], "--offline and --url"),
            (
                &["--concurrency", "1", "--workload", "engine-comparison", "--requests", "300"],
                "256 requests, and 300",
            ),
            (
                &["--concurrency", "1", "--endpoint", "chat", "--prompt-form", "token-ids"],
                "--prompt-form words",
            ),
            (&["--concurrency", "1", "--idle-timeout", "0s"], "--idle-timeout is 0"),
            (&["--steps", "0x5s"], "no stage has a rate"),
        ];
        for (flags, part) in bad {
            let error = settings(flags).unwrap_err().to_string();
            assert!(error.contains(part), "{flags:?}: {error}");
        }
    }
}
