//! End-to-end tests: every one starts the real binary with the embedded demo model and talks to it over
//! sockets and signals, as clients and operators do.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

/// Starts and stops the binary; HTTP in a few words.
mod util;

/// Chat, completions, models, tokenize: what comes back for a well-formed request.
mod api;
/// The load generator: its files, its exit codes, an interrupt.
mod bench;
/// The load generator against servers that misbehave.
mod bench_failures;
/// What the load generator shows while it runs.
#[cfg(target_os = "linux")]
mod bench_live;
/// Every shape of load, a search, results compared, limits of the hardware.
mod bench_loads;
/// A collector of traces.
mod collector;
/// The command line: settings, the configuration file, exit codes, logs, the address taken.
mod command_line;
/// `--device cuda` on an emulated driver.
#[cfg(target_os = "linux")]
mod cuda;
/// Settings and commands of deploy/.
mod deploy;
/// The same answer alone, among others, with a warm cache, after a preemption.
mod determinism;
/// A client that goes away frees its blocks.
mod disconnect;
/// What the doctor shows, and its exit codes.
mod doctor;
/// SIGTERM: running requests finish, the rest are told, exit 0.
mod drain;
/// What is refused, and in which words.
mod errors;
/// What a replica's prefix cache holds, as the router hears it.
mod kv_events;
/// The commands of the labs.
mod labs;
/// Full queues and requests that can never fit.
mod limits;
/// Every metric of the table moves when it should.
mod metrics;
/// The ledger of quoted numbers, and an experiment of it.
mod numbers;
/// Dashboards, rules and triggers against a real Prometheus.
mod observability;
/// The capacity plan.
mod plan;
/// Clients that misbehave hurt nobody else; memory stays flat.
mod robustness;
/// The router before real replicas.
mod router;
/// The router's memory over thousands of requests.
#[cfg(target_os = "linux")]
mod router_memory;
/// The simulated device: its answers, its time, its memory, and that it says what it is.
mod sim;
/// Streams carry the same answer, piece by piece.
mod streaming;
/// One trace of a request, as a collector gets it.
mod traces;
/// Replicas, router and load by one command.
#[cfg(target_os = "linux")]
mod up;
