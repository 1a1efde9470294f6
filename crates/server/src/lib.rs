//! One replica: HTTP, admission, the engine thread, streams, drain.
//!
//! The way of a request: `routes` (parse, refuse) - `admission` (429) - `model` (template, tokenizer, the
//! engine's request) - `engine_thread` - `generation` (events to text) - `sse`. The life of the process:
//! `server` - `loading` - `drain`.

mod admission;
mod app;
mod blocking;
mod body;
mod clock;
mod drain;
mod engine_thread;
mod errors;
mod generation;
pub mod kv_events;
mod loading;
mod logprobs;
mod model;
pub mod options;
mod routes;
mod run_ahead;
mod server;
mod spans;
mod sse;

pub use options::{
    LoadError, LoadTimes, LoadedModel, Loader, ModelMemory, Runner, SamplingDefaults, ServerOptions,
};
pub use routes::ROUTES;
pub use server::{ServeError, Server, serve};
