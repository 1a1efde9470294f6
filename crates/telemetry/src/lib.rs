//! Logs, the Prometheus registry and the metric names.

mod labels;
mod logs;
mod metrics;
pub mod names;
mod timings;

pub use labels::{FinishedReason, Label, LoadStage, RejectionReason, StatusClass};
pub use logs::{LogError, LogFormat, Secret, check_level, init_logs, request_span};
pub use metrics::{
    BuildInfo, CONTENT_TYPE, CacheConfig, CounterBy, Device, EngineSample, Metrics, MetricsConfig,
    MetricsError, UNKNOWN_ROUTE, is_prefix,
};
pub use timings::RequestTimings;
