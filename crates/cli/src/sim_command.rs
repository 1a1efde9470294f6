//! `servelab sim`: a fleet in virtual time (`fleet/`), and `servelab sim calibrate`: from measured points to a profile
//! that `--hardware` takes.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Deserialize;
use servelab_bench::result::{BenchResult, Load, TargetInfo};
use servelab_bench::saved::{self, SavedError};
use servelab_sim::fit::{Errors, Fit, FitError, Point, Target, fit, merged};
use servelab_sim::replay::{Arrivals, Length};
use servelab_sim::{Dtype, HardwareError, HardwareProfile};

use crate::bench::hardware;
use crate::fleet::{self, args::FleetArgs};
use crate::plan_command;

/// Shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  servelab sim --replicas 4 --rate 20 --workload azure-chat
  servelab sim --replicas 8 --rate 10 --shape spike --peak 10 --workload azure-chat --out spike.html
  servelab sim --scaler queue --scaler ttft --scaler gpu-utilisation --rate 8 --shape spike --workload azure-chat \\
      --duration 1h --out scalers.html
  servelab sim --scaler deploy/keda/queue-depth.yaml --served-model-name demo --rate 20 --shape spike
  servelab sim --scaler from-zero --rate 10 --shape from-zero --workload azure-chat --duration 30m
  servelab sim --model llama-3.1-70b --tp 4 --replicas 8 --users 1000 --think-time 30s --workload azure-chat
  servelab sim --replicas 4 --rate 20 --crashes-per-hour 6 --policy least_requests
  servelab sim calibrate run --hardware h100 --out my-h100.toml

Exit codes: 0 ended as asked, 1 a file cannot be written, 2 wrong usage or settings.";

const CALIBRATE_EXAMPLES: &str = "\
Examples:
  servelab bench --concurrency 1,2,4,8,16,32 --input-tokens 512 --output-tokens 128 --out run
  servelab sim calibrate run --hardware h100 --out my-h100.toml
  servelab sim calibrate short long --hardware measured --max-running 64 --max-batched-tokens 512
  servelab sim calibrate run-1 run-2 run-3 --check other-levels --hardware h100
  servelab sim calibrate vllm-*.json --hardware h200 --tp 4 --overlap --out my-h200.toml
  servelab serve --device sim --hardware my-h100.toml --model llama-3.1-8b

Exit codes: 0 fitted, 1 the profile cannot be written, 2 wrong usage or results.";

#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct SimCommand {
    #[command(subcommand)]
    pub action: Option<Action>,
    #[command(flatten)]
    pub fleet: FleetArgs,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Fit the time of a step to measured points, print how far the fit is off, and write a profile.
    #[command(after_help = CALIBRATE_EXAMPLES)]
    Calibrate(CalibrateCommand),
}

/// What was typed.
#[derive(Args, Clone, Debug)]
pub struct CalibrateCommand {
    /// Results of servelab bench (a folder of --out, or its result.json) or of vllm bench serve, all of one model on one
    /// device. Five levels of load or more; two lengths of prompts tell context from sequences. A level that was measured
    /// several times counts as the median.
    #[arg(required = true, value_name = "RESULT")]
    results: Vec<PathBuf>,
    /// Results of other levels of load, which are predicted and not fitted; may be given again.
    #[arg(long = "check", value_name = "RESULT")]
    checks: Vec<PathBuf>,
    /// The GPU that was measured, a profile (TOML), or measured for this machine: what a step's time does not tell, such
    /// as the memory, is taken from it.
    #[arg(long, value_name = "NAME|FILE")]
    hardware: String,
    /// GPUs that shared the model.
    #[arg(long, value_name = "GPUS", default_value_t = 1)]
    tp: u32,
    /// Most sequences at once of the server [default: as the result says, else 256].
    #[arg(long, value_name = "COUNT")]
    max_running: Option<u32>,
    /// Most tokens of a step of the server [default: as the result says, else 2048].
    #[arg(long, value_name = "TOKENS")]
    max_batched_tokens: Option<u32>,
    /// Tokens that its KV cache held [default: as the result says, else a million].
    #[arg(long, value_name = "TOKENS")]
    kv_tokens: Option<u32>,
    /// The server prepares a step while one is under way.
    #[arg(long)]
    overlap: bool,
    /// File for the profile.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the fit as JSON.
    #[arg(long)]
    json: bool,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Fleet(#[from] fleet::Error),
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is no result of vllm bench serve: {source}", path.display())]
    Vllm { path: PathBuf, source: serde_json::Error },
    #[error("{}: {what}; measure with --concurrency, or with --rate and Poisson arrivals", path.display())]
    Load { path: PathBuf, what: String },
    #[error("{} is of the model {found}, and those before it of {expected}; calibrate each by itself", path.display())]
    OtherModel { path: PathBuf, found: String, expected: String },
    #[error("--{0} is {1}; it must be from 1 to 1e9, --tp to 1024")]
    Range(&'static str, u32),
    #[error(transparent)]
    Plan(#[from] plan_command::Error),
    #[error("--hardware measured: {0}")]
    Measured(hardware::HardwareError),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error(transparent)]
    Fit(#[from] FitError),
    #[error("cannot make a profile: {0}")]
    Toml(#[from] toml::ser::Error),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl Error {
    /// Whether other flags or results would have helped.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Fleet(error) => error.is_usage(),
            other => !matches!(other, Self::Write(_) | Self::Toml(_)),
        }
    }
}

/// Simulates a fleet, or calibrates a device.
///
/// # Errors
/// If what was typed or read cannot be used, or something cannot be written.
pub fn run(command: &SimCommand, out: &mut impl Write) -> Result<(), Error> {
    match &command.action {
        Some(Action::Calibrate(command)) => calibrate(command, out),
        None => Ok(fleet::run(&command.fleet, out)?),
    }
}

/// Fits, prints to `out`, writes the profile.
fn calibrate(command: &CalibrateCommand, out: &mut impl Write) -> Result<(), Error> {
    let base = base(command)?;
    let measured = read_all(&command.results, None)?;
    let checks = match command.checks.is_empty() {
        true => Vec::new(),
        false => read_all(&command.checks, Some(&measured.model))?.points,
    };
    let target = target(command, &measured)?;
    let fit = fit(&target, &measured.points, &checks)?;
    if command.json {
        serde_json::to_writer_pretty(&mut *out, &fit).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", text(&fit, &measured.points, &checks, &base.name))?;
    }
    if let Some(path) = &command.out {
        let profile = profile(base, &fit, measured.points.len());
        profile.validate()?;
        std::fs::write(path, toml::to_string(&profile)?)?;
        if !command.json {
            writeln!(out, "\nwritten: {0}; use it as --hardware {0}", path.display())?;
        }
    }
    Ok(out.flush()?)
}

fn base(command: &CalibrateCommand) -> Result<HardwareProfile, Error> {
    /// More than the caches hold.
    const READ_BYTES: usize = 256 << 20;
    let mut profile = match command.hardware.as_str() {
        "measured" => hardware::measured(0, Dtype::Bf16, READ_BYTES).map_err(Error::Measured)?,
        name => plan_command::named_or_file(name)?,
    };
    profile.calibration = None;
    Ok(profile)
}

fn profile(base: HardwareProfile, fit: &Fit, points: usize) -> HardwareProfile {
    let model = &fit.calibration.model;
    HardwareProfile {
        source: format!("{}; steps fitted to {points} points of {model}", base.source),
        calibration: Some(fit.calibration.clone()),
        ..base
    }
}

/// All points, and what the first result says of its server.
struct Measured {
    model: String,
    points: Vec<Point>,
    is_remote: bool,
    max_running: Option<u32>,
    max_batched_tokens: Option<u32>,
    kv_tokens: Option<u32>,
}

fn target(command: &CalibrateCommand, measured: &Measured) -> Result<Target, Error> {
    let target = Target {
        model: measured.model.clone(),
        gpus: command.tp,
        max_running: command.max_running.or(measured.max_running).unwrap_or(256),
        max_batched_tokens: command.max_batched_tokens.or(measured.max_batched_tokens).unwrap_or(2048),
        kv_tokens: command.kv_tokens.or(measured.kv_tokens).unwrap_or(1 << 20),
        steps_at_once: if command.overlap { 2 } else { 1 },
        is_remote: measured.is_remote,
    };
    for (flag, value, most) in [
        ("tp", target.gpus, 1024),
        ("max-running", target.max_running, 1_000_000_000),
        ("max-batched-tokens", target.max_batched_tokens, 1_000_000_000),
        ("kv-tokens", target.kv_tokens, 1_000_000_000),
    ] {
        if !(1..=most).contains(&value) {
            return Err(Error::Range(flag, value));
        }
    }
    Ok(target)
}

/// All results, which are to be of the same model, and of `model` if one is given.
fn read_all(paths: &[PathBuf], model: Option<&str>) -> Result<Measured, Error> {
    let mut all: Option<Measured> = None;
    for path in paths {
        let read = read(path)?;
        let expected = all.as_ref().map(|all| all.model.as_str()).or(model).unwrap_or(&read.model);
        if read.model != expected {
            let expected = expected.to_owned();
            return Err(Error::OtherModel { path: path.clone(), found: read.model, expected });
        }
        match &mut all {
            None => all = Some(read),
            Some(all) => all.points.extend(read.points),
        }
    }
    let all = all.ok_or(Error::Fit(FitError::TooFew(0)))?;
    Ok(Measured { points: merged(&all.points), ..all })
}

fn read(path: &Path) -> Result<Measured, Error> {
    match vllm(path)? {
        Some(result) => of_vllm(path, &result),
        None => of_bench(path, &saved::read(path)?),
    }
}

fn of_bench(path: &Path, result: &BenchResult) -> Result<Measured, Error> {
    let facts = match &result.header.target {
        TargetInfo::Offline { engine } => Some(engine),
        TargetInfo::Http { .. } => None,
    };
    let fact = |name: &str| facts.and_then(|facts| facts.get(name)?.parse::<u32>().ok());
    let points: Result<_, _> = result.points.iter().map(|point| bench_point(path, point)).collect();
    Ok(Measured {
        model: result.header.model.id.clone(),
        points: points?,
        is_remote: facts.is_none(),
        max_running: fact("max_running"),
        max_batched_tokens: fact("max_batched_tokens"),
        kv_tokens: fact("num_blocks")
            .zip(fact("block_size"))
            .map(|(blocks, size)| blocks.saturating_mul(size)),
    })
}

fn bench_point(path: &Path, point: &servelab_bench::result::Point) -> Result<Point, Error> {
    let metrics = &point.metrics;
    let repeats = point.repeats.len().max(1) as u64;
    let uncached = match metrics.prompt_tokens {
        0 => 1.0,
        all => 1.0 - metrics.cached_prompt_tokens as f64 / all as f64,
    };
    Ok(Point {
        label: point.load.to_string(),
        arrivals: arrivals(path, &point.load)?,
        requests: u32::try_from(metrics.completed / repeats).unwrap_or(u32::MAX),
        warm_up: point
            .repeats
            .first()
            .map_or(0, |repeat| u32::try_from(repeat.warm_up_requests).unwrap_or(0)),
        input_tokens: Length {
            mean: metrics.input_tokens.mean * uncached,
            std: metrics.input_tokens.std * uncached,
        },
        output_tokens: Length { mean: metrics.output_tokens.mean, std: metrics.output_tokens.std },
        requests_per_second: metrics.request_throughput,
        ttft_seconds: metrics.ttft_ms.mean / 1e3,
        tpot_seconds: metrics.tpot_ms.mean / 1e3,
    })
}

fn arrivals(path: &Path, load: &Load) -> Result<Arrivals, Error> {
    match load {
        Load::Closed { concurrency, think_time_seconds: 0.0 } => Ok(Arrivals::Closed(*concurrency)),
        Load::Open { rate: None, max_concurrency: Some(most), .. } => Ok(Arrivals::Closed(*most)),
        Load::Open { rate: Some(rate), burstiness: Some(1.0), max_concurrency: None, .. } => {
            Ok(Arrivals::Poisson(*rate))
        }
        other => Err(Error::Load { path: path.to_owned(), what: format!("{other} cannot be replayed") }),
    }
}

/// What is used of a result of `vllm bench serve`.
#[derive(Deserialize)]
struct VllmResult {
    model_id: String,
    completed: u32,
    /// A number, or `"inf"`.
    request_rate: serde_json::Value,
    max_concurrency: Option<u32>,
    burstiness: Option<f64>,
    total_input_tokens: f64,
    total_output_tokens: f64,
    request_throughput: f64,
    mean_ttft_ms: f64,
    mean_tpot_ms: f64,
    /// With `--save-detailed`.
    #[serde(default)]
    input_lens: Vec<f64>,
    #[serde(default)]
    output_lens: Vec<f64>,
}

/// The result in the file, if it is vLLM's. Ours has a schema version.
fn vllm(path: &Path) -> Result<Option<VllmResult>, Error> {
    /// With every token of a long run in it.
    const MOST_BYTES: u64 = 1 << 30;
    if path.is_dir() {
        return Ok(None);
    }
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut text = String::new();
    std::fs::File::open(path).map_err(failed)?.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
    let json = |source| Error::Vllm { path: path.to_owned(), source };
    let value: serde_json::Value = serde_json::from_str(&text).map_err(json)?;
    match value.get("schema_version") {
        Some(_) => Ok(None),
        None => serde_json::from_value(value).map(Some).map_err(json),
    }
}

fn of_vllm(path: &Path, result: &VllmResult) -> Result<Measured, Error> {
    let arrivals = match (result.request_rate.as_f64(), result.max_concurrency) {
        (None, Some(most)) => Arrivals::Closed(most),
        (Some(rate), None) if result.burstiness.unwrap_or(1.0) == 1.0 => Arrivals::Poisson(rate),
        _ => {
            let what =
                "only --max-concurrency with an infinite rate, or a Poisson rate alone, can be replayed";
            return Err(Error::Load { path: path.to_owned(), what: what.to_owned() });
        }
    };
    let completed = f64::from(result.completed.max(1));
    let label = match arrivals {
        Arrivals::Closed(clients) => format!("concurrency {clients}"),
        Arrivals::Poisson(rate) => format!("{rate} req/s"),
    };
    let point = Point {
        label,
        arrivals,
        requests: result.completed,
        warm_up: 0,
        input_tokens: Length { mean: result.total_input_tokens / completed, std: std(&result.input_lens) },
        output_tokens: Length { mean: result.total_output_tokens / completed, std: std(&result.output_lens) },
        requests_per_second: result.request_throughput,
        ttft_seconds: result.mean_ttft_ms / 1e3,
        tpot_seconds: result.mean_tpot_ms / 1e3,
    };
    Ok(Measured {
        model: result.model_id.clone(),
        points: vec![point],
        is_remote: true,
        max_running: None,
        max_batched_tokens: None,
        kv_tokens: None,
    })
}

/// Of the sample itself; 0 for none.
fn std(values: &[f64]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt()
}

fn text(fit: &Fit, points: &[Point], checks: &[Point], hardware: &str) -> String {
    let found = &fit.calibration;
    let mut lines = vec![
        format!("{} points of {} on {} x {hardware}", points.len(), found.model, found.gpus),
        String::new(),
    ];
    let seconds = [
        ("alpha", "of a step", found.step_seconds),
        ("omega", "of reading the weights, behind which tokens are hidden", found.weights_seconds),
        ("beta", "of a decoding sequence", found.decode_seconds),
        ("gamma", "of a token of its context", found.context_token_seconds),
        ("zeta", "of a step with prompts", found.prefill_step_seconds),
        ("delta", "of a token of a prompt", found.prefill_token_seconds),
        ("epsilon", "of a pair of its tokens", found.prefill_pair_seconds),
        ("tau", "of a request, outside of steps", found.request_seconds),
    ];
    for (name, what, seconds) in seconds {
        let remark = match name {
            "omega" if seconds == 0.0 => ", which the points do not need",
            name if fit.unseen.contains(&name) => ", which the points do not tell",
            _ => "",
        };
        lines.push(format!("  {name:8} {:>12}  {what}{remark}", in_words(seconds)));
    }
    lines.push(String::new());
    lines.push(format!(
        "  {:28} {:>24} {:>26}",
        "error in TTFT, TPOT, req/s", "fitted to all", "fitted to the others"
    ));
    for (index, (point, errors)) in points.iter().zip(&fit.errors).enumerate() {
        let held_out = fit.held_out.get(index).map_or_else(|| "-".to_owned(), percents);
        lines.push(format!("  {:28} {:>24} {held_out:>26}", lengths(point), percents(errors)));
    }
    for (point, errors) in checks.iter().zip(&fit.checked) {
        lines.push(format!("  {:28} {:>24} {:>26}", lengths(point), "-", percents(errors)));
    }
    lines.push(String::new());
    lines.push(verdict(fit));
    lines.push(String::new());
    lines.join("\n")
}

/// Such as `concurrency 8, 512/128`.
fn lengths(point: &Point) -> String {
    format!("{}, {:.0}/{:.0}", point.label, point.input_tokens.mean, point.output_tokens.mean)
}

fn percents(errors: &Errors) -> String {
    let percent = |error: f64| format!("{:+.1} %", 100.0 * error);
    [errors.ttft, errors.tpot, errors.requests_per_second].map(percent).join("  ")
}

fn verdict(fit: &Fit) -> String {
    let held_out = if fit.checked.is_empty() { &fit.held_out } else { &fit.checked };
    let mean = |figure: fn(&Errors) -> f64| {
        held_out.iter().map(|errors| 100.0 * figure(errors).abs()).sum::<f64>() / held_out.len() as f64
    };
    match held_out.is_empty() {
        true => "no point could be held out: measure one more level of load".to_owned(),
        false => format!(
            "mean held-out error: TTFT {:.1} %, TPOT {:.1} %, req/s {:.1} %",
            mean(|errors| errors.ttft),
            mean(|errors| errors.tpot),
            mean(|errors| errors.requests_per_second)
        ),
    }
}

/// Such as `12.3 us`.
fn in_words(seconds: f64) -> String {
    let units = [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")];
    let (unit, name) = units.into_iter().find(|(unit, _)| seconds >= *unit).unwrap_or((1e-12, "ps"));
    format!("{:.3} {name}", seconds / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_the_unit_that_suits_them() {
        assert_eq!([1.5, 2e-3, 3.25e-6, 0.0].map(in_words), ["1.500 s", "2.000 ms", "3.250 us", "0.000 ps"]);
    }

    #[test]
    fn what_is_only_predicted_is_shown_and_judges() {
        let point = |clients| Point {
            label: format!("concurrency {clients}"),
            arrivals: Arrivals::Closed(clients),
            requests: 8,
            warm_up: 0,
            input_tokens: Length { mean: 64.0, std: 0.0 },
            output_tokens: Length { mean: 32.0, std: 0.0 },
            requests_per_second: 1.0,
            ttft_seconds: 0.1,
            tpot_seconds: 0.02,
        };
        let errors = |ttft| Errors { ttft, tpot: 0.0, requests_per_second: 0.0 };
        let fit = Fit {
            calibration: servelab_sim::Calibration {
                model: "m".into(),
                gpus: 1,
                step_seconds: 0.02,
                weights_seconds: 0.0,
                decode_seconds: 0.0,
                context_token_seconds: 0.0,
                prefill_step_seconds: 0.0,
                prefill_token_seconds: 0.0,
                prefill_pair_seconds: 0.0,
                request_seconds: 0.0,
            },
            unseen: Vec::new(),
            errors: vec![errors(0.01)],
            held_out: vec![errors(0.3)],
            checked: vec![errors(-0.05)],
        };
        let text = text(&fit, &[point(1)], &[point(3)], "h");
        assert!(text.contains("concurrency 3, 64/32") && text.contains("-5.0 %"), "{text}");
        assert!(text.contains("mean held-out error: TTFT 5.0 %"), "{text}");
    }

    #[test]
    fn a_file_of_vllm_is_a_point() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vllm.json");
        let write = |rate: &str, most: &str| {
            let text = format!(
                r#"{{"model_id": "m", "completed": 4, "request_rate": {rate}, "max_concurrency": {most}, "burstiness": 1.0,
                 "total_input_tokens": 400, "total_output_tokens": 80, "request_throughput": 2.0, "mean_ttft_ms": 50.0,
                 "mean_tpot_ms": 10.0, "input_lens": [90, 110, 90, 110], "itls": [[1.0]]}}"#
            );
            std::fs::write(&path, text).unwrap();
        };
        write("\"inf\"", "8");
        let read_point = || read(&path).map(|measured| measured.points[0].clone());
        let point = read_point().unwrap();
        assert_eq!((point.arrivals, point.requests), (Arrivals::Closed(8), 4));
        assert_eq!(point.input_tokens, Length { mean: 100.0, std: 10.0 });
        assert_eq!((point.ttft_seconds, point.tpot_seconds), (0.05, 0.01));
        write("2.5", "null");
        assert_eq!(read_point().unwrap().arrivals, Arrivals::Poisson(2.5));
        write("\"inf\"", "null");
        assert!(read_point().unwrap_err().to_string().contains("can be replayed"));
        std::fs::write(&path, "{}").unwrap();
        assert!(read_point().unwrap_err().to_string().contains("missing field `model_id`"));
    }
}
