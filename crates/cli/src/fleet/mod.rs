//! `servelab sim`: a fleet in virtual time.

pub mod args;
mod settings;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use servelab_bench::report::number;
use servelab_fleet::page::{self, Heading};
use servelab_fleet::{Outcome, Scaler, SettingsError, scaler, simulate, text};
use servelab_sim::autoscale::{Adapter, Manifest, ManifestError};

use args::FleetArgs;
use settings::{Bounds, Prepared, UsageError};

use crate::page_file::{self, PageError};

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(
        "--scaler: there is no file {name:?}, and no scaler of that name comes with the program: {known}"
    )]
    Scaler { name: String, known: String },
    #[error("{flag}: cannot read {}: {source}", path.display())]
    ReadFile { flag: &'static str, path: PathBuf, source: std::io::Error },
    #[error("--prometheus-adapter {}: {source}", path.display())]
    Adapter { path: PathBuf, source: Box<ManifestError> },
    #[error(
        "--prometheus-adapter {}: no --scaler asks for a metric of pods; give one that does, or leave the rules out",
        .0.display()
    )]
    UnusedAdapter(PathBuf),
    #[error("--scaler {name}: {source}")]
    Manifest { name: String, source: Box<ManifestError> },
    #[error(transparent)]
    Page(#[from] PageError),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl Error {
    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Page(_) | Self::Write(_))
    }
}

/// Simulates, prints to `out`, writes the page.
///
/// # Errors
/// If a setting cannot be, or something cannot be written.
pub fn run(args: &FleetArgs, out: &mut impl Write) -> Result<(), Error> {
    let (prepared, scalers): (Vec<Prepared>, Vec<Scaler>) = scaled(args)?.into_iter().unzip();
    let started = Instant::now();
    let runs = prepared.iter().zip(scalers);
    let outcomes = runs.map(|(prepared, scaler)| simulate(prepared.settings.clone(), scaler));
    let outcomes = outcomes.collect::<Result<Vec<Outcome>, _>>()?;
    // They differ in their replicas only.
    let prepared = &prepared[0];
    // Not a part of the result, which is the same every time.
    let _ = writeln!(std::io::stderr(), "{}", pace(&outcomes, started.elapsed()));
    if args.report.json {
        serde_json::to_writer_pretty(&mut *out, &outcomes).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", text::table(&outcomes))?;
    }
    if let Some(path) = &args.report.out {
        page_file::write(path, page::html(&heading(prepared), &prepared.settings, &outcomes))?;
        if !args.report.json {
            writeln!(out, "\nwritten: {}", path.display())?;
        }
    }
    Ok(out.flush()?)
}

/// What is simulated, one for each scaler, or one without.
fn scaled(args: &FleetArgs) -> Result<Vec<(Prepared, Scaler)>, Error> {
    let manifests = manifests(&args.scaling)?;
    if manifests.is_empty() {
        let prepared = args.prepare(bounds(args, None))?;
        let scaler = Scaler::fixed(prepared.settings.pods.initial);
        return Ok(vec![(prepared, scaler)]);
    }
    let of = |(name, manifest): (String, Manifest)| {
        let bounds = bounds(args, Some(&manifest));
        let initial = bounds.initial;
        Ok((args.prepare(bounds)?, Scaler::manifest(name, manifest, initial)))
    };
    manifests.into_iter().map(of).collect()
}

/// Of every scaler, with the name that it is shown under.
fn manifests(typed: &args::ScalingArgs) -> Result<Vec<(String, Manifest)>, Error> {
    let adapter = match &typed.prometheus_adapter {
        Some(path) => adapter(path)?,
        None => Adapter::default(),
    };
    let read = typed.scaler.iter().map(|name| manifest(name, &adapter));
    let manifests = read.collect::<Result<Vec<(String, Manifest)>, Error>>()?;
    let is_used = manifests.iter().any(|(_, manifest)| manifest.has_pod_metrics());
    match &typed.prometheus_adapter {
        Some(path) if !is_used => Err(Error::UnusedAdapter(path.clone())),
        _ => Ok(manifests),
    }
}

/// As many as were typed, else as few as the scaler may have; 1 without one.
fn bounds(args: &FleetArgs, manifest: Option<&Manifest>) -> Bounds {
    let fewest = manifest.map_or(1, |manifest| manifest.idle.unwrap_or(manifest.min));
    let initial = args.scaling.replicas.unwrap_or(fewest);
    Bounds { initial, most: manifest.map_or(initial, |manifest| manifest.max.max(initial)) }
}

/// The manifest in a file, or one that comes with the program, with the name that it is shown under.
fn manifest(name: &str, adapter: &Adapter) -> Result<(String, Manifest), Error> {
    let path = Path::new(name);
    let (shown, text) = match scaler::preset(name) {
        Some(text) => (name.to_owned(), text.to_owned()),
        None if !path.exists() => {
            let known = scaler::presets().collect::<Vec<_>>().join(", ");
            return Err(Error::Scaler { name: name.to_owned(), known });
        }
        None => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            (stem.into_owned(), read(path, "--scaler")?)
        }
    };
    let manifest = Manifest::parse_with(&text, adapter);
    manifest
        .map(|manifest| (shown, manifest))
        .map_err(|source| Error::Manifest { name: name.to_owned(), source: Box::new(source) })
}

fn adapter(path: &Path) -> Result<Adapter, Error> {
    let text = read(path, "--prometheus-adapter")?;
    Adapter::parse(&text).map_err(|source| Error::Adapter { path: path.to_owned(), source: Box::new(source) })
}

fn read(path: &Path, flag: &'static str) -> Result<String, Error> {
    /// These files are some lines.
    const MOST_BYTES: u64 = 1 << 20;
    let failed = |source| Error::ReadFile { flag, path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
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
