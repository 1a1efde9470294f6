//! `servelab bench`: settings, the target, the run, the report.

pub mod args;
pub mod hardware;
mod http;
pub mod machine;
mod offline;
mod progress;
mod reports;
mod settings;

use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use servelab_bench::client::Failure;
use servelab_bench::output::{Output, OutputError};
use servelab_bench::result::{
    BenchResult, ClientInfo, Header, ModelInfo, PromptForm, RequestRecord, SCHEMA_VERSION, TargetInfo,
    WorkloadInfo,
};
use servelab_bench::server::ServerError;
use servelab_bench::session::{Measured, Session, Target};
use servelab_bench::workload::{Workload, WorkloadError};
use servelab_bench::{prompt, report, summary, vllm};
use servelab_server::LoadError;
use servelab_telemetry::Traces;
use servelab_telemetry::traces::{SpanCounters, TraceError};
use tokio_util::sync::CancellationToken;

use self::args::BenchCommand;
use self::hardware::Limiter;
use self::progress::Progress;
use self::reports::ReportsError;
use self::settings::{BenchSettings, HttpSettings, TargetSettings, UsageError};
use crate::traces::LAST_SPANS;

/// Files that the program has open besides its connections.
const OTHER_FILES: u64 = 64;

/// Why there is no result, or none that stands.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error("--hardware: {0}")]
    Hardware(#[from] hardware::HardwareError),
    #[error("cannot measure: {0}")]
    Server(#[from] ServerError),
    #[error("cannot measure: {0}")]
    Client(#[from] Failure),
    #[error("cannot load the model: {0}")]
    Load(#[from] LoadError),
    #[error(
        "{wanted} requests at once need as many connections, and this process may open {limit} files; lower \
         --concurrency or --max-in-flight, or raise the limit (ulimit -n)"
    )]
    OpenFiles { wanted: u64, limit: u64 },
    #[error(transparent)]
    Traces(#[from] TraceError),
    #[error("spans cannot be counted: {0}")]
    Spans(#[from] servelab_telemetry::MetricsError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
    #[error(transparent)]
    Reports(#[from] ReportsError),
    #[error("stopped before anything was measured")]
    Stopped,
    #[error("no measured request completed: {0}")]
    NothingCompleted(String),
    #[error("the figures do not stand: {0}")]
    Faulty(String),
}

impl Error {
    /// Whether other flags would have helped before anything was started.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Reports(error) => error.is_usage(),
            other => matches!(
                other,
                Self::Usage(_) | Self::Workload(_) | Self::Hardware(_) | Self::OpenFiles { .. }
            ),
        }
    }
}

/// Runs the benchmark and writes its result to `out`, or does what is asked with saved results.
///
/// # Errors
/// If the settings cannot work, the target cannot be measured, a file cannot be written, or, after the result is
/// out, if its figures do not stand.
pub fn run(command: &BenchCommand, out: &mut impl Write) -> Result<(), Error> {
    if let Some(action) = &command.action {
        return Ok(reports::run(action, out)?);
    }
    let settings = BenchSettings::new(command, |name| std::env::var(name).ok())?;
    let limiter = Limiter::new(&command.report, &settings.target)?;
    raise_open_files(&settings)?;
    let output = settings.out.as_deref().map(Output::create).transpose()?;
    let stop = stop_on_signal()?;
    // One thread sends, reads and looks at the clock, so that nothing of the load generator competes with it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let spans = SpanCounters::unregistered()?;
    let traces = start_traces(&settings, spans.clone())?;
    let measured = runtime.block_on(measure(&settings, &traces, limiter, output, stop));
    traces.shut_down(LAST_SPANS);
    if spans.dropped() > 0 {
        let all = spans.dropped() + spans.exported.get();
        // Whoever closed standard error does not want to know.
        let _ = writeln!(std::io::stderr(), "{} of {all} spans were not exported", spans.dropped());
    }
    let (result, details) = measured?;
    print(&settings, &result, details, out)?;
    judge(&result)
}

fn start_traces(settings: &BenchSettings, spans: SpanCounters) -> Result<Traces, TraceError> {
    match &settings.target {
        TargetSettings::Http(HttpSettings { traces: Some(traces), .. }) => Traces::start(traces, spans),
        TargetSettings::Http(_) | TargetSettings::Offline { .. } => Ok(Traces::off()),
    }
}

async fn measure(
    settings: &BenchSettings,
    traces: &Traces,
    limiter: Option<Limiter>,
    output: Option<Output>,
    stop: CancellationToken,
) -> Result<(BenchResult, Vec<RequestRecord>), Error> {
    match &settings.target {
        TargetSettings::Http(http) => {
            let prepared = tokio::select! {
                prepared = http::prepare(settings, http, traces) => prepared?,
                () = stop.cancelled() => return Err(Error::Stopped),
            };
            bench(settings, prepared, limiter, output, stop).await
        }
        TargetSettings::Offline { model, engine } => {
            let prepared = offline::prepare(settings, model, engine)?;
            bench(settings, prepared, limiter, output, stop).await
        }
    }
}

/// A target that answers, and what is known of it.
pub struct Prepared<T> {
    pub target: T,
    pub info: TargetInfo,
    pub model: ModelInfo,
    /// Fits into the model's context.
    pub workload: Workload,
    pub writer: prompt::Writer,
    pub client: ClientInfo,
    /// Why the target does not say what it serves.
    pub unanswered: Option<String>,
}

async fn bench<T: Target>(
    settings: &BenchSettings,
    prepared: Prepared<T>,
    limiter: Option<Limiter>,
    mut output: Option<Output>,
    stop: CancellationToken,
) -> Result<(BenchResult, Vec<RequestRecord>), Error> {
    let started_unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut details, mut pictured) = (Vec::new(), report::Details::default());
    let mut keep = |record: &RequestRecord| {
        if settings.save_detailed {
            details.push(record.clone());
        }
        output.as_mut().map_or(Ok(()), |output| {
            pictured.add(record);
            output.record(record)
        })
    };
    let workload = workload_info(settings, &prepared);
    let asked = match prepared.unanswered {
        None => settings.session.clone(),
        Some(_) => http::single_request(&settings.session),
    };
    let session = Session {
        target: prepared.target,
        workload: &prepared.workload,
        writer: prepared.writer,
        settings: &asked,
        observer: &mut Progress::new(&asked, &prepared.workload, settings.quiet),
        records: &mut keep,
        stop,
    };
    let Measured { mut points, search } = session.run().await?;
    if let Some(limiter) = &limiter {
        points.iter_mut().for_each(|point| point.limits = limiter.limits(&point.metrics));
    }
    let mut model = prepared.model;
    // A server does not tell; then it is what the limits were computed for.
    model.dtype = model.dtype.or(limiter.as_ref().map(|limiter| limiter.weight_dtype.name().to_owned()));
    let mut metadata = settings.metadata.clone();
    metadata.extend(limiter.iter().flat_map(|limiter| limiter.facts.clone()));
    let header = Header {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        tool_commit: option_env!("SERVELAB_COMMIT").map(str::to_owned),
        started_unix_seconds,
        command: std::env::args().collect(),
        label: settings.label.clone(),
        target: prepared.info,
        model,
        gpus: limiter.as_ref().and_then(|limiter| limiter.gpus),
        hardware: limiter.map(|limiter| limiter.hardware),
        client: prepared.client,
        workload,
        slo: settings.session.slo.clone(),
        unanswered: prepared.unanswered,
        metadata,
    };
    let result = BenchResult { schema_version: SCHEMA_VERSION, header, points, search };
    if let (Some(output), Some(folder)) = (output, &settings.out) {
        output.finish(&result, &detailed(&result, &details))?;
        report::write(folder, &result, &pictured)?;
    }
    Ok((result, details))
}

fn workload_info<T>(settings: &BenchSettings, prepared: &Prepared<T>) -> WorkloadInfo {
    let workload = &prepared.workload;
    WorkloadInfo {
        name: workload.name.clone(),
        description: workload.description.clone(),
        settings: workload.settings.clone(),
        seed: settings.session.seed,
        salted: settings.session.salted,
        prompt_form: if workload.is_given { PromptForm::Given } else { prepared.writer.pool.form() },
        ignore_eos: settings.ignore_eos,
        temperature: settings.temperature,
    }
}

/// The lists of vLLM's `--save-detailed`, of the point that stands for the whole.
fn detailed(result: &BenchResult, records: &[RequestRecord]) -> serde_json::Map<String, serde_json::Value> {
    use servelab_bench::result::Phase;
    let best = result.best_point();
    let point = result.points.iter().position(|point| Some(point) == best).unwrap_or(0) as u32;
    let mut of_point: Vec<&RequestRecord> =
        records.iter().filter(|record| record.point == point && record.phase == Phase::Measured).collect();
    of_point.sort_by_key(|record| (record.repeat, record.index));
    if of_point.is_empty() { serde_json::Map::new() } else { vllm::detailed_keys(&of_point) }
}

fn print(
    settings: &BenchSettings,
    result: &BenchResult,
    details: Vec<RequestRecord>,
    out: &mut impl Write,
) -> Result<(), Error> {
    if settings.json {
        let document = vllm::document(result, &detailed(result, &details)).map_err(std::io::Error::from)?;
        serde_json::to_writer_pretty(&mut *out, &document).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", summary::text(result))?;
        if let Some(folder) = &settings.out {
            writeln!(out, "\nWritten to {}", Path::new(folder).display())?;
        }
    }
    Ok(out.flush()?)
}

/// Whether the figures may be quoted.
fn judge(result: &BenchResult) -> Result<(), Error> {
    if result.points.iter().all(|point| point.metrics.completed == 0) {
        return Err(Error::NothingCompleted(why_nothing_completed(result)));
    }
    match result.faults().first() {
        None => Ok(()),
        Some(fault) => Err(Error::Faulty(fault.clone())),
    }
}

/// How the requests failed, most frequent first.
fn why_nothing_completed(result: &BenchResult) -> String {
    let repeats = result.points.iter().flat_map(|point| &point.repeats);
    let failures = repeats.flat_map(|repeat| &repeat.failures);
    let lines: Vec<String> = failures
        .map(|failure| format!("{} x {}, for example: {}", failure.all, failure.name, failure.example))
        .collect();
    if lines.is_empty() { "none ended before the run was stopped".into() } else { lines.join("; ") }
}

/// Every request in flight has a connection.
fn raise_open_files(settings: &BenchSettings) -> Result<(), Error> {
    use servelab_bench::run::LoadShape;
    use servelab_bench::session::Loads;
    if matches!(settings.target, TargetSettings::Offline { .. }) {
        return Ok(());
    }
    let of_shape = |shape: &LoadShape| match shape {
        LoadShape::Closed { concurrency, .. } => *concurrency,
        LoadShape::Open { max_concurrency, .. } => max_concurrency.unwrap_or(settings.session.max_in_flight),
    };
    let most = match &settings.session.loads {
        Loads::Ladder(shapes) => shapes.iter().map(of_shape).max().unwrap_or(1),
        Loads::Search { max_concurrency, .. } => max_concurrency.unwrap_or(settings.session.max_in_flight),
    };
    let wanted = u64::from(most) + OTHER_FILES;
    // Where the system does not tell, its own error at the limit is met and counted.
    let limit = rlimit::increase_nofile_limit(wanted).unwrap_or(wanted);
    if limit < wanted { Err(Error::OpenFiles { wanted: u64::from(most), limit }) } else { Ok(()) }
}

/// Cancelled by the first SIGINT or SIGTERM, on a thread of its own: offline the main thread computes.
fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let token = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            crate::signals::stop().await;
            let _ = writeln!(
                std::io::stderr(),
                "ending early, with what was measured so far; once more ends at once"
            );
            token.cancel();
            // For the second signal.
            std::future::pending::<()>().await;
        });
    });
    Ok(stop)
}
