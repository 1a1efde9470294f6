//! Logs, traces, the Prometheus registry and the metric names.

mod labels;
mod logs;
mod metrics;
pub mod names;
mod open_metrics;
mod timings;
pub mod traces;

pub use labels::{FinishedReason, Label, LoadStage, MemoryPart, RejectionReason, SpanDrop, StatusClass};
pub use logs::{LogError, LogFormat, Secret, check_level, init_logs, request_span};
pub use metrics::{
    BuildInfo, CONTENT_TYPE, CacheConfig, CounterBy, Device, EngineSample, Metrics, MetricsConfig,
    MetricsError, UNKNOWN_ROUTE, is_prefix,
};
pub use open_metrics::{OPEN_METRICS_CONTENT_TYPE, accepts_open_metrics};
pub use timings::RequestTimings;
pub use traces::{RequestTrace, Traces};
