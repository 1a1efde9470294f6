//! From ended spans to the collector: a bounded queue, and a thread with a small runtime of its own that empties it.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use opentelemetry::Context;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_TIMEOUT, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT, Protocol, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use prometheus::IntCounter;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_rustls::rustls::crypto::ring;

use super::{OtlpProtocol, TraceError, TraceOptions};
use crate::metrics::MetricsError;

/// Spans that wait; a request has about five. At some hundred bytes each they take a few MiB at most.
const QUEUE_SPANS: usize = 8192;
/// Spans that are sent at once, and how long the first of them waits for others.
const BATCH_SPANS: usize = 512;
const LINGER: Duration = Duration::from_secs(1);
/// The exporter has a time-out of its own, with which it also bounds how often it tries again; this one holds if that
/// is set to something longer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(60);
/// While exports fail, one line in so long says so.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// How much later than it should the thread may end before it is left behind.
const GRACE: Duration = Duration::from_secs(1);
/// Of an error's text.
const MAX_REASON_CHARS: usize = 300;

/// What became of ended spans.
#[derive(Clone)]
pub struct SpanCounters {
    pub exported: IntCounter,
    /// They found no room in the queue.
    pub queue_full: IntCounter,
    /// The collector did not take them.
    pub export_failed: IntCounter,
    /// They were left when the time to shut down was over, or came later.
    pub shutdown: IntCounter,
}

impl SpanCounters {
    /// Counters that belong to no registry, for a program that shows them itself.
    ///
    /// # Errors
    /// [`MetricsError::Register`] if one cannot be made.
    pub fn unregistered() -> Result<Self, MetricsError> {
        let failed = |name: &str, source| MetricsError::Register { name: name.to_owned(), source };
        let counter = |name: &str| IntCounter::new(name, name).map_err(|source| failed(name, source));
        Ok(Self {
            exported: counter("exported")?,
            queue_full: counter("queue_full")?,
            export_failed: counter("export_failed")?,
            shutdown: counter("shutdown")?,
        })
    }

    /// All that were not exported, for whatever reason.
    pub fn dropped(&self) -> u64 {
        self.queue_full.get() + self.export_failed.get() + self.shutdown.get()
    }
}

/// The end of the queue that spans enter. Never waits.
pub(super) struct Queue {
    spans: mpsc::Sender<SpanData>,
    /// When the worker has to be done, once it is told to end.
    stop: watch::Sender<Option<Instant>>,
    counters: SpanCounters,
}

impl fmt::Debug for Queue {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Queue")
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        match self.spans.try_send(span) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => self.counters.queue_full.inc(),
            Err(mpsc::error::TrySendError::Closed(_)) => self.counters.shutdown.inc(),
        }
    }

    /// There is nobody to wait for: the worker empties the queue all the time.
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.stop.send_replace(Some(Instant::now() + timeout));
        Ok(())
    }
}

/// The thread, as seen from whoever waits for its end.
pub(super) struct Worker {
    /// Hangs up when the thread ends.
    ended: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Worker {
    /// Waits for the end of a thread that was told to end within `most`.
    pub fn wait(&self, most: Duration) {
        let _ = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(most + GRACE);
    }
}

/// Starts the thread. Everything that needs a runtime is made there, so that this may be called from within another.
pub(super) fn start(
    options: &TraceOptions,
    resource: Resource,
    counters: SpanCounters,
) -> Result<(Queue, Worker), TraceError> {
    let (sender, spans) = mpsc::channel(QUEUE_SPANS);
    let (stop, stopped) = watch::channel(None);
    let (ready, begun) = std::sync::mpsc::channel();
    let (alive, ended) = std::sync::mpsc::channel();
    let (options, counted) = (options.clone(), counters.clone());
    let run = move || {
        let _alive = alive;
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = ready.send(Err(TraceError::Thread(error)));
                return;
            }
        };
        runtime.block_on(async {
            let exporter = match exporter(&options, &resource) {
                Ok(exporter) => exporter,
                Err(reason) => {
                    let _ = ready.send(Err(TraceError::Exporter { endpoint: options.endpoint, reason }));
                    return;
                }
            };
            let _ = ready.send(Ok(()));
            let endpoint = options.endpoint;
            Exporting {
                spans,
                stopped,
                exporter,
                counters: counted,
                endpoint,
                complaints: Complaints::default(),
            }
            .run()
            .await;
        });
    };
    std::thread::Builder::new().name("otlp".into()).spawn(run).map_err(TraceError::Thread)?;
    let lost = |_| TraceError::Thread(std::io::Error::other("it panicked; its message stands above"));
    begun.recv().map_err(lost)??;
    Ok((Queue { spans: sender, stop, counters }, Worker { ended: Mutex::new(ended) }))
}

fn exporter(options: &TraceOptions, resource: &Resource) -> Result<SpanExporter, String> {
    let endpoint = options.endpoint.to_string();
    let is_tls = options.endpoint.scheme_str() == Some("https");
    let built = match options.protocol {
        OtlpProtocol::Grpc => {
            let builder = SpanExporter::builder().with_tonic().with_endpoint(endpoint);
            let tls = || ClientTlsConfig::new().with_enabled_roots();
            if is_tls { builder.with_tls_config(tls()) } else { builder }.build()
        }
        OtlpProtocol::Http => {
            let connector = hyper_rustls::HttpsConnectorBuilder::new()
                .with_provider_and_webpki_roots(ring::default_provider())
                .map_err(|error| error.to_string())?
                .https_or_http()
                .enable_http1()
                .build();
            SpanExporter::builder()
                .with_http()
                .with_http_client(HyperClient::new(connector, exporter_timeout(), None))
                .with_endpoint(endpoint)
                .with_protocol(Protocol::HttpBinary)
                .build()
        }
    };
    let mut exporter = built.map_err(|error| error.to_string())?;
    exporter.set_resource(resource);
    Ok(exporter)
}

/// Of one attempt over HTTP: the exporter gives its own time-out to clients that it makes itself only.
fn exporter_timeout() -> Duration {
    let read = |name| std::env::var(name).ok().and_then(|text| text.trim().parse().ok());
    let millis = read(OTEL_EXPORTER_OTLP_TRACES_TIMEOUT).or_else(|| read(OTEL_EXPORTER_OTLP_TIMEOUT));
    millis.map_or(Duration::from_secs(10), Duration::from_millis)
}

struct Exporting {
    spans: mpsc::Receiver<SpanData>,
    stopped: watch::Receiver<Option<Instant>>,
    exporter: SpanExporter,
    counters: SpanCounters,
    endpoint: Uri,
    complaints: Complaints,
}

impl Exporting {
    async fn run(mut self) {
        loop {
            let batch = self.next_batch().await;
            if batch.is_empty() {
                return;
            }
            self.export(batch).await;
        }
    }

    /// What has come within a moment of the first; empty when nothing will come any more.
    async fn next_batch(&mut self) -> Vec<SpanData> {
        let mut batch = Vec::new();
        let mut until = None;
        while batch.len() < BATCH_SPANS {
            let told = self.stopped.wait_for(Option::is_some);
            tokio::select! {
                biased;
                _ = told, if !self.spans.is_closed() => self.spans.close(),
                span = self.spans.recv() => match span {
                    Some(span) => {
                        until.get_or_insert_with(|| Instant::now() + LINGER);
                        batch.push(span);
                    }
                    None => break,
                },
                () = at(until) => break,
            }
        }
        batch
    }

    async fn export(&mut self, batch: Vec<SpanData>) {
        let count = batch.len() as u64;
        let exported = tokio::select! {
            exported = tokio::time::timeout(EXPORT_TIMEOUT, self.exporter.export(batch)) => exported,
            () = time_is_over(&mut self.stopped) => {
                self.counters.shutdown.inc_by(count);
                return;
            }
        };
        let reason = match exported {
            Ok(Ok(())) => {
                self.counters.exported.inc_by(count);
                return self.complaints.settled(&self.endpoint);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {EXPORT_TIMEOUT:?}"),
        };
        self.counters.export_failed.inc_by(count);
        self.complaints.failed(&self.endpoint, count, &reason);
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Returns when the time that was left to end is over.
async fn time_is_over(stopped: &mut watch::Receiver<Option<Instant>>) {
    let end = stopped.wait_for(Option::is_some).await.ok().and_then(|end| *end);
    at(end).await;
}

/// Says that exports fail, but not each time.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    dropped: u64,
}

impl Complaints {
    fn failed(&mut self, endpoint: &Uri, spans: u64, reason: &str) {
        self.dropped += spans;
        if self.last.is_some_and(|last| last.elapsed() < COMPLAIN_EVERY) {
            return;
        }
        self.last = Some(Instant::now());
        let (dropped, error) = (self.dropped, reason.chars().take(MAX_REASON_CHARS).collect::<String>());
        tracing::warn!(%endpoint, dropped, error, "traces cannot be exported; requests are served as before");
    }

    fn settled(&mut self, endpoint: &Uri) {
        if self.last.take().is_some() {
            tracing::info!(%endpoint, dropped = self.dropped, "traces are exported again");
            self.dropped = 0;
        }
    }
}
