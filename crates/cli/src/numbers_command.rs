//! `servelab numbers`: the ledger of quoted numbers for a model and hardware, and, as `servelab numbers run`, the
//! experiments that fill its last column.

mod report;
mod run;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use servelab_bench::experiments::store::{self, StoreError};
use servelab_bench::experiments::{ExperimentError, Measurement};
use servelab_bench::ledger::view::Filter;
use servelab_bench::ledger::{Chosen, Ledger, LedgerError, LedgerView, Needs, html, markdown, terminal};
use servelab_server::LoadError;
use servelab_sim::{Dtype, HardwareProfile, ModelShape};

use self::run::RunCommand;
use crate::args::Typed;
use crate::bench::hardware::{self, served_shape};
use crate::device::NoGpu;
use crate::plan_command;
use crate::settings::{Settings, SettingsError};

/// Shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  servelab numbers                                    every row, limits of an 8B on an H100
  servelab numbers --model llama-3.1-70b --hardware h200
  servelab numbers --row knee-32,kv-left              with the formulas and their numbers
  servelab numbers --format html --out numbers.html   one page to show
  servelab numbers run                                measure what this machine can, in a few minutes
  servelab numbers run knee-32 batching
  servelab numbers --hardware measured --model demo   limits of this machine, beside what it did

Exit codes: 0 ended as asked, 1 failed or an experiment has no result, 2 wrong usage or settings.";

const DEFAULT_MODEL: &str = "llama-3.1-8b";
const DEFAULT_HARDWARE: &str = "h100";
/// The model that `servelab serve` takes where none is named.
const DEMO: &str = "demo";
/// As hardware: what the newest measurement was made on.
const MEASURED: &str = "measured";

#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct NumbersCommand {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Measure: start servers, say what is expected, measure, compare, and keep the results.
    #[command(after_help = EXAMPLES)]
    Run(Box<RunCommand>),
}

#[derive(Args, Clone, Debug)]
struct ShowArgs {
    /// Model for the limits: the name of a known shape, demo, a config.json, or a folder that holds one. If given,
    /// only measurements of it are shown [default: llama-3.1-8b].
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Number format of its weights: bf16, f16, fp8 or f32 [default: bf16].
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Number format of keys and values [default: bf16].
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<Dtype>,
    /// Hardware for the limits: a known GPU, a profile (TOML), or measured for that of the newest measurement. If
    /// given, only measurements on it are shown [default: h100].
    #[arg(long, value_name = "NAME|FILE")]
    hardware: Option<String>,
    /// Only these rows, separated by commas, with their formulas.
    #[arg(long = "row", value_name = "ID,..", value_delimiter = ',')]
    rows: Vec<String>,
    /// Only rows that need this to be answered: nothing, machine, gpu, fleet or embeddings, separated by commas.
    #[arg(long, value_name = "WHAT,..", value_delimiter = ',')]
    needs: Vec<NeedsArg>,
    /// How to print it.
    #[arg(long, default_value = "table")]
    format: Format,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Write to this file in place of standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// File of measurements [default: servelab/numbers.jsonl in XDG_STATE_HOME, else in ~/.local/state].
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Markdown,
    Json,
    Html,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum NeedsArg {
    Nothing,
    Machine,
    Gpu,
    Fleet,
    Embeddings,
}

impl From<NeedsArg> for Needs {
    fn from(typed: NeedsArg) -> Self {
        match typed {
            NeedsArg::Nothing => Self::Nothing,
            NeedsArg::Machine => Self::ThisMachine,
            NeedsArg::Gpu => Self::OneGpu,
            NeedsArg::Fleet => Self::Fleet,
            NeedsArg::Embeddings => Self::Embeddings,
        }
    }
}

/// Why there is no table, or not all that was to be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("{0}")]
    Plan(#[from] plan_command::Error),
    #[error("--hardware measured: {0} holds no measurement yet; servelab numbers run makes some")]
    NothingMeasured(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no folder for results (HOME is not set); give a file with --results")]
    NoStateFolder,
    #[error("--{option} is {value}; it must be {rule}")]
    Range { option: &'static str, value: String, rule: &'static str },
    #[error(
        "--{option} changes nothing here: what was asked for is simulated, with a model and hardware of its own; leave it \
         out, or see servelab sim"
    )]
    OfThisMachine { option: &'static str },
    #[error(transparent)]
    Experiment(#[from] ExperimentError),
    #[error("{id:?} is no row of the ledger and no experiment; rows: {rows}; experiments: {experiments}")]
    Unknown { id: String, rows: String, experiments: String },
    #[error(
        "the limits of {gpu} are not known; say which of the known ones it is with --hardware, or give a profile (TOML)"
    )]
    UnknownGpu { gpu: String },
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Device(#[from] NoGpu),
    #[error("cannot load the model: {0}")]
    Load(#[from] LoadError),
    #[error("--hardware: {0}")]
    Hardware(#[from] hardware::HardwareError),
    #[error("cannot make the page: {0}")]
    Page(String),
    #[error("cannot write {}: {source}", path.display())]
    WriteFile { path: PathBuf, source: std::io::Error },
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
    #[error("interrupted; {kept} measurements are in {}", path.display())]
    Interrupted { kept: usize, path: PathBuf },
    #[error("{failed} of {of} experiments have no result; see above")]
    Failed { failed: usize, of: usize },
}

impl Error {
    /// Whether other flags would have helped before anything was started.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Ledger(_)
                | Self::Plan(_)
                | Self::NothingMeasured(_)
                | Self::NoStateFolder
                | Self::Range { .. }
                | Self::Unknown { .. }
                | Self::OfThisMachine { .. }
                | Self::UnknownGpu { .. }
                | Self::Settings(_)
                | Self::Device(_)
        )
    }
}

/// Shows the ledger on `out`, or runs experiments and tells of them there.
///
/// # Errors
/// If a name is unknown, a file cannot be used, or an experiment has no result.
pub fn run(command: &NumbersCommand, out: &mut impl Write) -> Result<(), Error> {
    match &command.action {
        Some(Action::Run(command)) => run::run(command, out),
        None => show(&command.show, out),
    }
}

fn show(args: &ShowArgs, out: &mut impl Write) -> Result<(), Error> {
    let path = results_file(args.results.as_deref())?;
    let stored = store::read(&path)?;
    if let Some(first) = stored.skipped.first() {
        let count = stored.skipped.len();
        let lines = if count == 1 { "line" } else { "lines" };
        // Standard error may be closed.
        let _ = writeln!(
            std::io::stderr(),
            "servelab: skipped {count} {lines} of {}: no measurement of this version; the first is line {first}",
            path.display()
        );
    }
    let ledger = Ledger::load()?;
    let (chosen, measurements) = choose(args, &path, stored.measurements)?;
    let filter =
        Filter { ids: args.rows.clone(), needs: args.needs.iter().copied().map(Needs::from).collect() };
    let view = LedgerView::new(&ledger, &chosen, &filter, &measurements)?;
    let colour =
        args.out.is_none() && std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let text = text(args, &view, colour)?;
    match &args.out {
        None => out.write_all(text.as_bytes())?,
        Some(path) => {
            let failed = |source| Error::WriteFile { path: path.clone(), source };
            std::fs::write(path, text).map_err(failed)?;
        }
    }
    Ok(out.flush()?)
}

fn text(args: &ShowArgs, view: &LedgerView, colour: bool) -> Result<String, Error> {
    let format = if args.json { Format::Json } else { args.format };
    Ok(match format {
        Format::Table => terminal::text(view, !args.rows.is_empty(), colour),
        Format::Markdown => markdown::text(view),
        Format::Json => serde_json::to_string_pretty(view).map_err(std::io::Error::from)? + "\n",
        Format::Html => html::page(view).map_err(|error| Error::Page(error.to_string()))?,
    })
}

/// Model and hardware for the limits, and the measurements that go with what was named.
fn choose(
    args: &ShowArgs,
    path: &Path,
    measurements: Vec<Measurement>,
) -> Result<(Chosen, Vec<Measurement>), Error> {
    let here = measurements.iter().filter(|measurement| !measurement.experiment.is_simulated());
    let newest = here.max_by_key(|measurement| measurement.unix_seconds);
    let (profile, place) = match args.hardware.as_deref() {
        Some(MEASURED) => {
            let newest = newest.ok_or_else(|| Error::NothingMeasured(path.display().to_string()))?;
            (newest.circumstances.limits.clone(), newest.circumstances.hardware.clone())
        }
        named => {
            let profile = plan_command::named_or_file(named.unwrap_or(DEFAULT_HARDWARE))?;
            let place = profile.name.clone();
            (profile, place)
        }
    };
    let model = shape(args)?;
    let is_wanted = |measurement: &Measurement| {
        let circumstances = &measurement.circumstances;
        (args.model.is_none() || circumstances.model.name == model.name)
            && (args.hardware.is_none() || circumstances.hardware == place)
    };
    let wanted = measurements.into_iter().filter(is_wanted).collect();
    Ok((Chosen { model, hardware: HardwareProfile { name: place, ..profile } }, wanted))
}

fn shape(args: &ShowArgs) -> Result<ModelShape, Error> {
    let shape = match args.model.as_deref() {
        Some(DEMO) => {
            // What is served where no model is named.
            let Settings { model, engine, .. } = Settings::new(Typed::default(), None)?;
            served_shape(&model, &engine)?
        }
        named => plan_command::named_shape(named.unwrap_or(DEFAULT_MODEL), Dtype::Bf16, Dtype::Bf16)?,
    };
    Ok(ModelShape {
        weight_dtype: args.dtype.unwrap_or(shape.weight_dtype),
        kv_dtype: args.kv_dtype.unwrap_or(shape.kv_dtype),
        ..shape
    })
}

/// Where measurements are kept.
fn results_file(given: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let folder =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The specification has relative paths ignored.
    let state = folder("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let state = state.or_else(|| Some(folder("HOME")?.join(".local/state")));
    state.map(|state| state.join("servelab/numbers.jsonl")).ok_or(Error::NoStateFolder)
}
