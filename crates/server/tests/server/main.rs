//! A whole replica in this process, on a free port, around a scripted runner and a tokenizer of bytes.
//!
//! - `harness`: the replica, the runner, the client
//! - `fields`: every field, right and wrong
//! - `answers`: what a chat and a completion look like
//! - `streams`: transcripts of server-sent events
//! - `http`: bodies, headers, routes, keys
//! - `clients`: those that go away, those that do not read, those that are too many
//! - `kv_events`: what the prefix cache gains and loses, over HTTP and ZeroMQ
//! - `life`: loading, draining, failing
//! - `fuzz`: mutated bodies

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod answers;
mod clients;
mod fields;
mod fuzz;
mod harness;
mod http;
mod kv_events;
mod life;
mod streams;
