//! `servelab bench compare` and `servelab bench report`: what is done with results that have been saved.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use servelab_bench::compare::{Comparison, compare};
use servelab_bench::output::OutputError;
use servelab_bench::report::details::DetailsError;
use servelab_bench::report::{self, Details};
use servelab_bench::saved::{self, SavedError};

#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Two saved results side by side, each figure with its ratio and how far that can be trusted.
    Compare(CompareArgs),
    /// Writes report.html and report.md anew from a folder's result.json and requests.jsonl.
    Report(ReportFolder),
}

#[derive(Args, Clone, Debug)]
pub struct CompareArgs {
    /// Folder of --out, or a result.json.
    pub a: PathBuf,
    /// What is compared with it.
    pub b: PathBuf,
    /// Compare all the same what differs in model, hardware, workload or the like.
    #[arg(long)]
    pub force: bool,
    /// Print JSON in place of the table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct ReportFolder {
    /// Folder of --out.
    pub folder: PathBuf,
}

/// Why there is no comparison, or no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportsError {
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error("{0}; leave the file out to do without the pictures of single requests")]
    Details(#[from] DetailsError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("these results cannot be compared: {0}; measure again with the same, or add --force")]
    NotComparable(String),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl ReportsError {
    /// Whether other files would have helped.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Saved(_) | Self::Details(_) | Self::NotComparable(_))
    }
}

/// # Errors
/// If a file is missing or cannot be written, or two results do not belong together.
pub fn run(action: &Action, out: &mut impl Write) -> Result<(), ReportsError> {
    match action {
        Action::Compare(args) => print_comparison(args, out),
        Action::Report(args) => write_report(&args.folder, out),
    }
}

fn print_comparison(args: &CompareArgs, out: &mut impl Write) -> Result<(), ReportsError> {
    let (a, b) = (saved::read(&args.a)?, saved::read(&args.b)?);
    let comparison = compare(&a, &b);
    if !comparison.obstacles.is_empty() && !args.force {
        return Err(ReportsError::NotComparable(obstacles(&comparison)));
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &comparison).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        let names = [&args.a, &args.b].map(|path| path.display().to_string());
        write!(out, "{}", comparison.text([&names[0], &names[1]]))?;
    }
    Ok(out.flush()?)
}

fn obstacles(comparison: &Comparison) -> String {
    comparison.obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn write_report(folder: &Path, out: &mut impl Write) -> Result<(), ReportsError> {
    let result = saved::read(folder)?;
    let requests = folder.join("requests.jsonl");
    let details = if requests.exists() { Details::read(&requests)? } else { Details::default() };
    report::write(folder, &result, &details)?;
    writeln!(out, "Written to {}", folder.display())?;
    Ok(out.flush()?)
}
