//! One replica: HTTP, admission, the engine thread, streams, drain.

pub mod options;

pub use options::{LoadError, LoadTimes, LoadedModel, Loader, Runner, SamplingDefaults, ServerOptions};

/// Every route, as the metrics name it.
pub const ROUTES: &[&str] = &[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{id}",
    "/tokenize",
    "/detokenize",
    "/reset_prefix_cache",
    "/live",
    "/ready",
    "/health",
    "/metrics",
    "/version",
    "/state",
];
