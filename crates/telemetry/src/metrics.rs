//! The Prometheus registry: one typed field per metric of the table.

use std::marker::PhantomData;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::labels::{FinishedReason, Label, LoadStage, MemoryPart, RejectionReason, SpanDrop, StatusClass};
use crate::names::{self, Metric};
use crate::open_metrics::{self, Exemplars};
use crate::traces::SpanCounters;

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The route label of requests that match no route.
pub const UNKNOWN_ROUTE: &str = "unknown";

/// What the series of a replica depend on.
#[derive(Clone, Debug)]
pub struct MetricsConfig<'a> {
    /// Before every name but those of the process: `servelab_`, or `vllm:` for vLLM's own names.
    pub prefix: &'a str,
    /// The `model_name` label of every series: the name that clients use.
    pub model_name: &'a str,
    /// Context length in tokens; bounds the token histograms.
    pub max_model_len: u32,
    /// The route templates that [`Metrics::observe_http`] tells apart.
    pub routes: &'a [&'a str],
    pub build: BuildInfo<'a>,
}

/// What was built, for `build_info`.
#[derive(Clone, Copy, Debug)]
pub struct BuildInfo<'a> {
    pub version: &'a str,
    /// `None` where the sources were not in a repository; exported as `unknown`.
    pub commit: Option<&'a str>,
}

/// The layout of the KV cache, for `cache_config_info` and its capacity.
#[derive(Clone, Copy, Debug)]
pub struct CacheConfig<'a> {
    /// Tokens per block.
    pub block_size: u32,
    pub num_blocks: u32,
    /// Most tokens of one sequence.
    pub max_model_len: u32,
    /// Element type of keys and values, such as `bf16`.
    pub dtype: &'a str,
    pub prefix_cache: bool,
}

/// What computes, for `device_info`.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// `cpu`, `cuda` or `sim`.
    pub kind: &'a str,
    /// In words.
    pub name: &'a str,
    /// GPUs that share the model; 0 for a CPU.
    pub gpus: u32,
    /// How many times as fast as the device a simulated one is; empty for a real one.
    pub speed: &'a str,
}

/// What the engine counts itself, read after a step. Counters count from the engine's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineSample {
    pub running: u32,
    pub waiting: u32,
    pub blocks_held: u32,
    pub blocks_total: u32,
    pub prefix_query_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
}

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error(
        "the metrics prefix {0:?} cannot begin a metric name; use letters, digits, '_' and ':', no digit first, \
         such as servelab_ or vllm:"
    )]
    Prefix(String),
    #[error("cannot register the metric {name}: {source}")]
    Register { name: String, source: prometheus::Error },
    #[error("cannot write the metrics as text: {0}")]
    Encode(prometheus::Error),
}

/// A counter for each value of a closed label, all exported from the start.
pub struct CounterBy<L> {
    counters: Vec<IntCounter>,
    label: PhantomData<L>,
}

impl<L: Label> CounterBy<L> {
    fn new(family: &IntCounterVec) -> Self {
        let counters = L::ALL.iter().map(|value| family.with_label_values(&[value.value()])).collect();
        Self { counters, label: PhantomData }
    }

    /// The counter of one value.
    pub fn of(&self, value: L) -> &IntCounter {
        &self.counters[value.index()]
    }
}

/// Every series of one replica. Fields that a request moves are set through
/// [`RequestTimings`](crate::RequestTimings), those of the engine through [`Metrics::observe_engine`]
/// and [`Metrics::observe_step`].
pub struct Metrics {
    registry: Registry,
    names: Naming,
    http_requests: IntCounterVec,
    routes: Vec<String>,

    pub num_requests_running: IntGauge,
    pub num_requests_waiting: IntGauge,
    pub max_running: IntGauge,
    pub kv_cache_usage_perc: Gauge,

    pub prefix_cache_queries: IntCounter,
    pub prefix_cache_hits: IntCounter,
    pub num_preemptions: IntCounter,
    pub prompt_tokens: IntCounter,
    pub prompt_tokens_cached: IntCounter,
    pub generation_tokens: IntCounter,
    pub request_success: CounterBy<FinishedReason>,
    pub admission_rejections: CounterBy<RejectionReason>,
    trace_spans_exported: IntCounter,
    trace_spans_dropped: CounterBy<SpanDrop>,

    pub time_to_first_token_seconds: Histogram,
    pub inter_token_latency_seconds: Histogram,
    pub request_time_per_output_token_seconds: Histogram,
    pub e2e_request_latency_seconds: Histogram,
    pub request_queue_time_seconds: Histogram,
    pub request_prefill_time_seconds: Histogram,
    pub request_decode_time_seconds: Histogram,
    pub request_inference_time_seconds: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub request_num_preemptions: Histogram,
    pub iteration_tokens: Histogram,

    pub(crate) first_token_exemplars: Exemplars,
    pub(crate) e2e_exemplars: Exemplars,
}

impl Metrics {
    /// Registers every metric of the table, at zero, and those of the process (`process_*`: resident
    /// memory, CPU seconds, open files, start time; Linux only).
    ///
    /// # Errors
    /// [`MetricsError::Prefix`] if no metric name can begin with the prefix.
    pub fn new(config: &MetricsConfig<'_>) -> Result<Self, MetricsError> {
        let register = Registrar::new(config)?;
        register.process()?;
        register.info(&names::BUILD_INFO, &build_labels(config.build))?;
        let http_requests = register.counters(&names::HTTP_REQUESTS, &["route", StatusClass::NAME])?;
        let request_success = register.counters(&names::REQUEST_SUCCESS, &[FinishedReason::NAME])?;
        let admission_rejections =
            register.counters(&names::ADMISSION_REJECTIONS, &[RejectionReason::NAME])?;
        let trace_spans_dropped = register.counters(&names::TRACE_SPANS_DROPPED, &[SpanDrop::NAME])?;
        let exemplars = |metric| Exemplars::new(register.names.bounds(metric));
        let metrics = Self {
            num_requests_running: register.int_gauge(&names::NUM_REQUESTS_RUNNING)?,
            num_requests_waiting: register.int_gauge(&names::NUM_REQUESTS_WAITING)?,
            max_running: register.int_gauge(&names::MAX_RUNNING)?,
            kv_cache_usage_perc: register.gauge(&names::KV_CACHE_USAGE_PERC)?,
            prefix_cache_queries: register.counter(&names::PREFIX_CACHE_QUERIES)?,
            prefix_cache_hits: register.counter(&names::PREFIX_CACHE_HITS)?,
            num_preemptions: register.counter(&names::NUM_PREEMPTIONS)?,
            prompt_tokens: register.counter(&names::PROMPT_TOKENS)?,
            prompt_tokens_cached: register.counter(&names::PROMPT_TOKENS_CACHED)?,
            generation_tokens: register.counter(&names::GENERATION_TOKENS)?,
            request_success: CounterBy::new(&request_success),
            admission_rejections: CounterBy::new(&admission_rejections),
            trace_spans_exported: register.counter(&names::TRACE_SPANS_EXPORTED)?,
            trace_spans_dropped: CounterBy::new(&trace_spans_dropped),
            time_to_first_token_seconds: register.histogram(&names::TIME_TO_FIRST_TOKEN_SECONDS)?,
            inter_token_latency_seconds: register.histogram(&names::INTER_TOKEN_LATENCY_SECONDS)?,
            request_time_per_output_token_seconds: register
                .histogram(&names::REQUEST_TIME_PER_OUTPUT_TOKEN_SECONDS)?,
            e2e_request_latency_seconds: register.histogram(&names::E2E_REQUEST_LATENCY_SECONDS)?,
            request_queue_time_seconds: register.histogram(&names::REQUEST_QUEUE_TIME_SECONDS)?,
            request_prefill_time_seconds: register.histogram(&names::REQUEST_PREFILL_TIME_SECONDS)?,
            request_decode_time_seconds: register.histogram(&names::REQUEST_DECODE_TIME_SECONDS)?,
            request_inference_time_seconds: register.histogram(&names::REQUEST_INFERENCE_TIME_SECONDS)?,
            request_prompt_tokens: register.histogram(&names::REQUEST_PROMPT_TOKENS)?,
            request_generation_tokens: register.histogram(&names::REQUEST_GENERATION_TOKENS)?,
            request_num_preemptions: register.histogram(&names::REQUEST_NUM_PREEMPTIONS)?,
            iteration_tokens: register.histogram(&names::ITERATION_TOKENS)?,
            first_token_exemplars: exemplars(&names::TIME_TO_FIRST_TOKEN_SECONDS),
            e2e_exemplars: exemplars(&names::E2E_REQUEST_LATENCY_SECONDS),
            http_requests,
            routes: config.routes.iter().map(|&route| route.to_owned()).collect(),
            registry: register.registry,
            names: register.names,
        };
        metrics.touch_http_series();
        Ok(metrics)
    }

    /// Exports layout and capacity of the KV cache, once they are known.
    ///
    /// # Errors
    /// [`MetricsError::Register`] if it was exported before.
    pub fn set_cache_config(&self, cache: CacheConfig<'_>) -> Result<(), MetricsError> {
        let (block_size, num_blocks) = (cache.block_size.to_string(), cache.num_blocks.to_string());
        let labels = [
            ("block_size", block_size.as_str()),
            ("num_gpu_blocks", num_blocks.as_str()),
            ("cache_dtype", cache.dtype),
            ("enable_prefix_caching", if cache.prefix_cache { "True" } else { "False" }),
        ];
        register_info(&self.registry, &self.names, &names::CACHE_CONFIG_INFO, &labels)?;
        let tokens = f64::from(cache.num_blocks) * f64::from(cache.block_size);
        self.register_gauge(&names::KV_CACHE_CAPACITY_TOKENS, tokens)?;
        // A sequence takes whole blocks.
        let blocks = cache.max_model_len.div_ceil(cache.block_size.max(1)).max(1);
        let sequences = f64::from(cache.num_blocks) / f64::from(blocks);
        self.register_gauge(&names::KV_CACHE_MAX_CONCURRENCY, sequences)
    }

    fn register_gauge(&self, metric: &Metric, value: f64) -> Result<(), MetricsError> {
        let gauge = prometheus::Gauge::with_opts(self.names.opts(metric))
            .map_err(|source| self.names.failed(metric, source))?;
        gauge.set(value);
        register(&self.registry, &self.names, metric, gauge).map(drop)
    }

    /// Exports the memory that the model takes, once it is loaded.
    ///
    /// # Errors
    /// [`MetricsError::Register`] if it was exported before.
    pub fn set_model_memory(&self, bytes: impl Fn(MemoryPart) -> u64) -> Result<(), MetricsError> {
        self.register_by(&names::MODEL_MEMORY_BYTES, |part| bytes(part) as f64)
    }

    /// A gauge with a value for each value of a label.
    fn register_by<L: Label>(&self, metric: &Metric, value: impl Fn(L) -> f64) -> Result<(), MetricsError> {
        let family = prometheus::GaugeVec::new(self.names.opts(metric), &[L::NAME])
            .map_err(|source| self.names.failed(metric, source))?;
        for &label in L::ALL {
            family.with_label_values(&[label.value()]).set(value(label));
        }
        register(&self.registry, &self.names, metric, family).map(drop)
    }

    /// Exports what computes, once it is known.
    ///
    /// # Errors
    /// [`MetricsError::Register`] if it was exported before.
    pub fn set_device(&self, device: Device<'_>) -> Result<(), MetricsError> {
        let gpus = device.gpus.to_string();
        let labels = [
            ("device", device.kind),
            ("device_name", device.name),
            ("gpus", gpus.as_str()),
            ("simulated", if device.kind == "sim" { "True" } else { "False" }),
            ("speed", device.speed),
        ];
        register_info(&self.registry, &self.names, &names::DEVICE_INFO, &labels)
    }

    /// Exports how long the stages of loading the model took, once it is loaded.
    ///
    /// # Errors
    /// [`MetricsError::Register`] if it was exported before.
    pub fn set_model_load(&self, seconds: impl Fn(LoadStage) -> Duration) -> Result<(), MetricsError> {
        self.register_by(&names::MODEL_LOAD_SECONDS, |stage| seconds(stage).as_secs_f64())
    }

    /// Takes over what the engine counts itself. Called by the one thread that owns the engine.
    pub fn observe_engine(&self, sample: &EngineSample) {
        self.num_requests_running.set(i64::from(sample.running));
        self.num_requests_waiting.set(i64::from(sample.waiting));
        self.kv_cache_usage_perc.set(f64::from(sample.blocks_held) / f64::from(sample.blocks_total.max(1)));
        advance(&self.prefix_cache_queries, sample.prefix_query_tokens);
        advance(&self.prefix_cache_hits, sample.prefix_hit_tokens);
        advance(&self.num_preemptions, sample.preemptions);
    }

    /// Records the size of a step that computed something.
    pub fn observe_step(&self, tokens: u32) {
        if tokens > 0 {
            self.iteration_tokens.observe(f64::from(tokens));
        }
    }

    /// Counts an answered HTTP request. A route that was not announced in
    /// [`MetricsConfig::routes`] counts as [`UNKNOWN_ROUTE`], so that clients cannot make series.
    pub fn observe_http(&self, route: Option<&str>, status: u16) {
        let known = route.filter(|route| self.routes.iter().any(|other| other == route));
        let labels = [known.unwrap_or(UNKNOWN_ROUTE), StatusClass::of(status).value()];
        self.http_requests.with_label_values(&labels).inc();
    }

    /// For whoever exports spans.
    pub fn span_counters(&self) -> SpanCounters {
        let dropped = |reason| self.trace_spans_dropped.of(reason).clone();
        SpanCounters {
            exported: self.trace_spans_exported.clone(),
            queue_full: dropped(SpanDrop::QueueFull),
            export_failed: dropped(SpanDrop::ExportFailed),
            shutdown: dropped(SpanDrop::Shutdown),
        }
    }

    /// Every series in Prometheus' text format, version 0.0.4; see [`CONTENT_TYPE`].
    ///
    /// # Errors
    /// [`MetricsError::Encode`] if a metric cannot be written as text.
    pub fn encode(&self) -> Result<String, MetricsError> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).map_err(MetricsError::Encode)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Every series in OpenMetrics' format, with the traces of requests that were slow or fast as exemplars; see
    /// [`OPEN_METRICS_CONTENT_TYPE`](crate::OPEN_METRICS_CONTENT_TYPE).
    ///
    /// # Errors
    /// [`MetricsError::Encode`] if a metric cannot be written as text.
    pub fn encode_open_metrics(&self) -> Result<String, MetricsError> {
        let exemplars = [
            (self.names.full(&names::TIME_TO_FIRST_TOKEN_SECONDS), &self.first_token_exemplars),
            (self.names.full(&names::E2E_REQUEST_LATENCY_SECONDS), &self.e2e_exemplars),
        ];
        Ok(open_metrics::rewrite(&self.encode()?, &exemplars))
    }

    fn touch_http_series(&self) {
        for route in self.routes.iter().map(String::as_str).chain([UNKNOWN_ROUTE]) {
            for status in [StatusClass::Success, StatusClass::ClientError, StatusClass::ServerError] {
                self.http_requests.with_label_values(&[route, status.value()]).inc_by(0);
            }
        }
    }
}

/// Raises a counter to a total that somebody else counts. Holds for one writer.
fn advance(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn build_labels(build: BuildInfo<'_>) -> [(&'static str, &str); 2] {
    [("version", build.version), ("commit", build.commit.unwrap_or("unknown"))]
}

/// How a metric of the table is called on this replica.
struct Naming {
    prefix: String,
    model_name: String,
    max_model_len: u32,
}

impl Naming {
    fn full(&self, metric: &Metric) -> String {
        format!("{}{}", self.prefix, metric.name)
    }

    fn opts(&self, metric: &Metric) -> Opts {
        Opts::new(self.full(metric), metric.help).const_label("model_name", &self.model_name)
    }

    fn histogram_opts(&self, metric: &Metric) -> HistogramOpts {
        HistogramOpts::from(self.opts(metric)).buckets(self.bounds(metric))
    }

    /// Of a histogram; none of anything else.
    fn bounds(&self, metric: &Metric) -> Vec<f64> {
        match metric.kind {
            names::Kind::Histogram(buckets) => buckets.bounds(self.max_model_len),
            names::Kind::Gauge | names::Kind::Counter => Vec::new(),
        }
    }

    fn failed(&self, metric: &Metric, source: prometheus::Error) -> MetricsError {
        MetricsError::Register { name: self.full(metric), source }
    }
}

/// Makes and registers metrics of the table, so that each needs one line.
struct Registrar {
    registry: Registry,
    names: Naming,
}

impl Registrar {
    fn new(config: &MetricsConfig<'_>) -> Result<Self, MetricsError> {
        if !is_prefix(config.prefix) {
            return Err(MetricsError::Prefix(config.prefix.to_owned()));
        }
        let names = Naming {
            prefix: config.prefix.to_owned(),
            model_name: config.model_name.to_owned(),
            max_model_len: config.max_model_len,
        };
        Ok(Self { registry: Registry::new(), names })
    }

    fn add<C: Collector + Clone + 'static>(
        &self,
        metric: &Metric,
        made: Result<C, prometheus::Error>,
    ) -> Result<C, MetricsError> {
        let collector = made.map_err(|source| self.names.failed(metric, source))?;
        register(&self.registry, &self.names, metric, collector)
    }

    fn int_gauge(&self, metric: &Metric) -> Result<IntGauge, MetricsError> {
        self.add(metric, IntGauge::with_opts(self.names.opts(metric)))
    }

    fn gauge(&self, metric: &Metric) -> Result<Gauge, MetricsError> {
        self.add(metric, Gauge::with_opts(self.names.opts(metric)))
    }

    fn counter(&self, metric: &Metric) -> Result<IntCounter, MetricsError> {
        self.add(metric, IntCounter::with_opts(self.names.opts(metric)))
    }

    fn counters(&self, metric: &Metric, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.add(metric, IntCounterVec::new(self.names.opts(metric), labels))
    }

    fn histogram(&self, metric: &Metric) -> Result<Histogram, MetricsError> {
        self.add(metric, Histogram::with_opts(self.names.histogram_opts(metric)))
    }

    fn info(&self, metric: &Metric, labels: &[(&str, &str)]) -> Result<(), MetricsError> {
        register_info(&self.registry, &self.names, metric, labels)
    }

    #[cfg(target_os = "linux")]
    fn process(&self) -> Result<(), MetricsError> {
        let collector = prometheus::process_collector::ProcessCollector::for_self();
        self.registry
            .register(Box::new(collector))
            .map_err(|source| MetricsError::Register { name: "process_*".to_owned(), source })
    }

    #[cfg(not(target_os = "linux"))]
    fn process(&self) -> Result<(), MetricsError> {
        Ok(())
    }
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    names: &Naming,
    metric: &Metric,
    collector: C,
) -> Result<C, MetricsError> {
    registry.register(Box::new(collector.clone())).map_err(|source| names.failed(metric, source))?;
    Ok(collector)
}

/// A gauge that is always 1 and tells something in its labels.
fn register_info(
    registry: &Registry,
    names: &Naming,
    metric: &Metric,
    labels: &[(&str, &str)],
) -> Result<(), MetricsError> {
    let opts = labels.iter().fold(names.opts(metric), |opts, (name, value)| opts.const_label(*name, *value));
    let gauge = IntGauge::with_opts(opts).map_err(|source| names.failed(metric, source))?;
    gauge.set(1);
    register(registry, names, metric, gauge).map(drop)
}

/// Whether a metric name can begin with `prefix`.
pub fn is_prefix(prefix: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    prefix.chars().all(allowed) && !prefix.starts_with(|c: char| c.is_ascii_digit())
}
