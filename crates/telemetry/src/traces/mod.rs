//! Traces over OTLP: one trace of a request from its client through the router to the replica.
//!
//! What a request did is known from times that are noted for the metrics anyway; its spans are made of them when it
//! ends, so that a token costs nothing. Ended spans go into a bounded queue and from there, by a thread of their own,
//! to the collector. Nothing waits for that thread: where the queue is full or the collector away, spans are dropped
//! and counted. Off, which is the default, a request costs a look at an `Option`.

mod export;
mod request;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Uri};
use opentelemetry::propagation::TextMapPropagator;
pub use opentelemetry::trace::SpanKind;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Array, Context, Key};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

pub use export::SpanCounters;
pub use opentelemetry::{KeyValue, StringValue, Value};
pub use request::{Child, OpenSpan, RequestTrace};

use export::{Queue, Worker};

/// How spans travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    Grpc,
    /// Protobuf over HTTP/1.1.
    Http,
}

/// Which requests are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Share of the traces that begin here, 0 to 1; drawn from the trace's id, so that services with the same share
    /// record the same traces.
    pub ratio: f64,
    /// A request that comes with a trace is recorded if its sender records it, whatever the ratio.
    pub follows_parent: bool,
}

/// Where traces go, and what is in them.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceOptions {
    /// Of the collector: with gRPC its address, with HTTP the whole URL that spans are posted to.
    pub endpoint: Uri,
    pub protocol: OtlpProtocol,
    pub sampling: Sampling,
    /// Record the text of prompts too.
    pub prompts: bool,
    /// `service.name`, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` gives another.
    pub service_name: &'static str,
    /// `service.version`.
    pub version: &'static str,
}

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot export traces to {endpoint}: {reason}")]
    Exporter { endpoint: Uri, reason: String },
    #[error("cannot start the thread that exports traces: {0}")]
    Thread(std::io::Error),
}

/// Makes the traces of requests. Copies share one queue and one exporter.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Started>>);

pub(crate) struct Started {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
    worker: Worker,
    prompts: bool,
}

impl Traces {
    /// No traces; the context that clients send is not touched.
    pub fn off() -> Self {
        Self(None)
    }

    /// Starts the thread that exports. That the collector is away is no error. Headers, time-out and compression of the
    /// exporter are those of the `OTEL_EXPORTER_OTLP_*` variables, and `OTEL_RESOURCE_ATTRIBUTES` adds to the resource.
    ///
    /// # Errors
    /// If the endpoint or such a variable cannot be used.
    pub fn start(options: &TraceOptions, counters: SpanCounters) -> Result<Self, TraceError> {
        let resource = resource(options);
        let (queue, worker) = export::start(options, resource.clone(), counters)?;
        let provider = provider(options.sampling, resource, queue);
        let tracer = provider.tracer("servelab");
        Ok(Self(Some(Arc::new(Started { tracer, provider, worker, prompts: options.prompts }))))
    }

    /// Whether there are any.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the trace of a request that came with these headers: as a part of the trace that they name, if they name
    /// one that is well formed, else as a new one. `name` is the span's until [`RequestTrace::rename`].
    pub fn request(
        &self,
        name: impl FnOnce() -> String,
        kind: SpanKind,
        headers: &HeaderMap,
    ) -> RequestTrace {
        let Some(started) = &self.0 else { return RequestTrace::default() };
        let parent =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        RequestTrace::begin(started.clone(), name(), kind, &parent)
    }

    /// Begins the trace of a request that nobody sent.
    pub fn begin(&self, name: impl FnOnce() -> String, kind: SpanKind) -> RequestTrace {
        let Some(started) = &self.0 else { return RequestTrace::default() };
        RequestTrace::begin(started.clone(), name(), kind, &Context::new())
    }

    /// Exports what is queued, for no longer than `most`, and ends; spans that end later are dropped. Blocks.
    pub fn shut_down(&self, most: Duration) {
        let Some(started) = &self.0 else { return };
        // The queue cannot fail to stop; what it could not export it has counted.
        let _ = started.provider.shutdown_with_timeout(most);
        started.worker.wait(most);
    }
}

/// A list of texts, as the value of an attribute.
pub fn strings(texts: impl IntoIterator<Item = String>) -> Value {
    Value::Array(Array::String(texts.into_iter().map(StringValue::from).collect()))
}

fn provider(sampling: Sampling, resource: Resource, queue: Queue) -> SdkTracerProvider {
    let by_ratio = Sampler::TraceIdRatioBased(sampling.ratio);
    let sampler = if sampling.follows_parent { Sampler::ParentBased(Box::new(by_ratio)) } else { by_ratio };
    SdkTracerProvider::builder()
        .with_span_processor(queue)
        .with_sampler(sampler)
        .with_resource(resource)
        .build()
}

/// Who makes the spans: what the environment says, and where it says nothing the program itself.
fn resource(options: &TraceOptions) -> Resource {
    let named = Resource::builder().build();
    let is_named = named
        .get(&Key::from_static_str("service.name"))
        .is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let mut own = vec![
        KeyValue::new("service.version", options.version),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ];
    if !is_named {
        own.push(KeyValue::new("service.name", options.service_name));
    }
    // What the environment says is merged over it last.
    let given = named.iter().filter(|(key, _)| is_named || key.as_str() != "service.name");
    own.extend(given.map(|(key, value)| KeyValue::new(key.clone(), value.clone())));
    Resource::builder_empty().with_attributes(own).build()
}
