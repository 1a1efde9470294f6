//! `servelab sim`: a fleet in virtual time.

pub mod args;
mod settings;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use servelab_bench::report::number;
use servelab_fleet::page::{self, Heading};
use servelab_fleet::{Outcome, Scaler, SettingsError, simulate, text};

use args::FleetArgs;
use settings::{Bounds, Prepared, UsageError};

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("cannot write {}: {source}", path.display())]
    WritePage { path: PathBuf, source: std::io::Error },
    #[error("cannot make the page: {0}")]
    Page(String),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl Error {
    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Usage(_) | Self::Settings(_))
    }
}

/// Simulates, prints to `out`, writes the page.
///
/// # Errors
/// If a setting cannot be, or something cannot be written.
pub fn run(args: &FleetArgs, out: &mut impl Write) -> Result<(), Error> {
    let replicas = args.scaling.replicas.unwrap_or(1);
    let prepared = args.prepare(Bounds { initial: replicas, most: replicas })?;
    let started = Instant::now();
    let outcomes = vec![simulate(prepared.settings.clone(), Scaler::fixed(replicas))?];
    // Not a part of the result, which is the same every time.
    let _ = writeln!(std::io::stderr(), "{}", pace(&outcomes, started.elapsed()));
    if args.report.json {
        serde_json::to_writer_pretty(&mut *out, &outcomes).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", text::table(&outcomes))?;
    }
    if let Some(path) = &args.report.out {
        write_page(path, &prepared, &outcomes)?;
        if !args.report.json {
            writeln!(out, "\nwritten: {}", path.display())?;
        }
    }
    Ok(out.flush()?)
}

fn pace(outcomes: &[Outcome], elapsed: Duration) -> String {
    let requests: u64 = outcomes.iter().map(|outcome| outcome.requests).sum();
    let seconds = elapsed.as_secs_f64();
    let per_minute = (60.0 * requests as f64 / seconds.max(1e-9)) as u64;
    format!(
        "simulated {} requests in {seconds:.2} s, {} a minute",
        number::count(requests),
        number::count(per_minute)
    )
}

fn write_page(path: &PathBuf, prepared: &Prepared, outcomes: &[Outcome]) -> Result<(), Error> {
    let html = page::html(&heading(prepared), &prepared.settings, outcomes)
        .map_err(|error| Error::Page(error.to_string()))?;
    std::fs::write(path, html).map_err(|source| Error::WritePage { path: path.clone(), source })
}

fn heading(prepared: &Prepared) -> Heading {
    let Prepared { settings, shape, hardware } = prepared;
    let fact = |name: &str, value: String| (name.to_owned(), value);
    let load = match &settings.load {
        servelab_fleet::Load::Open(shape) => shape.describe(),
        servelab_fleet::Load::Users { users, think } => {
            format!("{users} users who read for {} s", think.as_secs_f64())
        }
    };
    let times = match hardware.calibration {
        Some(_) => "the times of steps are calibrated",
        None => "the times of steps are estimated from data sheets",
    };
    Heading {
        title: format!("{} on {} x {}, simulated", shape.name, settings.kind.gpus, hardware.name),
        facts: vec![
            fact("workload", settings.workload.name.clone()),
            fact("load", load),
            fact("time", format!("{} s", settings.duration.as_secs_f64())),
            fact("seed", settings.seed.to_string()),
            fact("policy", settings.router.policy.name().to_owned()),
        ],
        notes: vec![format!("Nothing was computed: {times}, and so is all that follows from them.")],
    }
}
