//! One replica: HTTP, admission, the engine thread, streams, drain.

pub mod options;

pub use options::{LoadError, LoadedModel, Loader, Runner, SamplingDefaults, ServerOptions};
