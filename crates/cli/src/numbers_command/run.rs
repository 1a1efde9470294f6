//! `servelab numbers run`: which experiments, on what, and where their results go.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clap::Args;
use servelab_bench::experiments::{
    self, Circumstances, ExperimentId, Launcher, Origin, Subject, Task, fleet, store,
};
use servelab_bench::ledger::{Ledger, Needs, Row};
use servelab_model::cuda::gpu::{Gpu, GpuInfo};
use servelab_model::presets;
use servelab_sim::{HardwareProfile, ModelShape};

use super::report::Report;
use super::{DEMO, Error, results_file};
use crate::args::{Device, Typed};
use crate::bench::{hardware, machine};
use crate::device::{self, Device as OnDevice};
use crate::plan_command;
use crate::settings::Settings;

/// With random weights: what is measured is speed and memory.
const GPU_MODEL: &str = "llama-3.1-8b";
/// Larger than every last-level cache; a smaller model is read from the cache, and that is then the limit.
const MOST_READ_BYTES: f64 = (256 << 20) as f64;
/// Of a name of a processor, in characters.
const NAME_LENGTH: usize = 27;

#[derive(Args, Clone, Debug)]
pub struct RunCommand {
    /// Rows of the ledger or experiments [default: all experiments that this machine can do].
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Model to measure with: demo, the name of a known shape (random weights), or a folder or hub id as for
    /// servelab serve [default: demo, on a GPU llama-3.1-8b].
    #[arg(long, value_name = "NAME|FOLDER|HUB-ID")]
    model: Option<String>,
    /// Where to compute [default: auto].
    #[arg(long)]
    device: Option<Device>,
    /// Threads that compute on the CPU [default: one a core].
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
    /// Hardware whose limits the predictions take: a known GPU or a profile (TOML) [default: on a CPU as measured
    /// at the start, on a GPU the known one of its name].
    #[arg(long, value_name = "NAME|FILE")]
    hardware: Option<String>,
    /// Price of an hour of this machine [default: that of the hardware profile, else 1: multiply with yours].
    #[arg(long, value_name = "DOLLARS")]
    dollars_per_hour: Option<f64>,
    /// File that measurements are added to [default: servelab/numbers.jsonl in XDG_STATE_HOME, else in
    /// ~/.local/state].
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
}

/// What an experiment is about, and where it is measured.
type About = (Subject, Circumstances);

/// What is to be run, and the rows that this machine cannot answer.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    experiments: Vec<ExperimentId>,
    others: Vec<String>,
}

pub fn run(command: &RunCommand, out: &mut impl Write) -> Result<(), Error> {
    let ledger = Ledger::load()?;
    // Names are looked at first: to be told of a slip after minutes would be late.
    let named = wanted(&ledger, &command.ids, true)?;
    let is_all_simulated =
        !named.experiments.is_empty() && named.experiments.iter().all(|experiment| experiment.is_simulated());
    if let (true, Some(option)) = (is_all_simulated, first_of_this_machine(command)) {
        return Err(Error::OfThisMachine { option });
    }
    let path = results_file(command.results.as_deref())?;
    store::check(&path)?;
    let here = if is_all_simulated { None } else { Some(prepare(command)?) };
    let is_gpu = here.as_ref().is_some_and(|(subject, _)| subject.is_gpu);
    let wanted = wanted(&ledger, &command.ids, is_gpu)?;
    let subjects = subjects(&wanted.experiments, here)?;
    let tasks = subjects.iter().map(|(experiment, about)| {
        let (subject, circumstances) = &**about;
        Task { experiment: *experiment, subject, circumstances }
    });
    let mut report = Report::new(out);
    let (kept, interrupted) = measure(&tasks.collect::<Vec<_>>(), &path, &mut report)?;
    if interrupted {
        return Err(Error::Interrupted { kept, path });
    }
    report.others(&ledger, &wanted.others)?;
    report.end(kept, &path)?;
    let of = wanted.experiments.len();
    if kept < of { Err(Error::Failed { failed: of - kept, of }) } else { Ok(()) }
}

/// Runs them until they end or a signal comes; then what runs is dropped, and the server with it.
fn measure<W: Write>(
    tasks: &[Task<'_>],
    path: &Path,
    report: &mut Report<'_, W>,
) -> Result<(usize, bool), Error> {
    // One thread sends, reads and looks at the clock.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut kept = 0;
    let mut keep = |measurement: &experiments::Measurement| {
        kept += 1;
        store::add(path, measurement)
    };
    let interrupted = runtime.block_on(async {
        tokio::select! {
            outcome = experiments::run_all(tasks, report, &mut keep) => outcome.map(|()| false),
            () = crate::signals::stop() => Ok(true),
        }
    })?;
    report.clear();
    Ok((kept, interrupted))
}

/// What each experiment is about: what it simulates, or this machine.
fn subjects(
    experiments: &[ExperimentId],
    here: Option<About>,
) -> Result<Vec<(ExperimentId, Rc<About>)>, Error> {
    let here = here.map(Rc::new);
    let mut subjects = Vec::new();
    for experiment in experiments {
        let simulated = fleet::subject(*experiment, program()?, origin())?;
        let about = simulated.map(Rc::new).or_else(|| here.clone());
        subjects.extend(about.map(|about| (*experiment, about)));
    }
    Ok(subjects)
}

fn program() -> Result<PathBuf, Error> {
    Ok(std::env::current_exe()?)
}

fn origin() -> Origin {
    Origin {
        os: machine::describe().os,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        tool_commit: option_env!("SERVELAB_COMMIT").map(str::to_owned),
    }
}

/// A flag that says something of this machine or its model.
fn first_of_this_machine(command: &RunCommand) -> Option<&'static str> {
    let given = [
        ("model", command.model.is_some()),
        ("device", command.device.is_some()),
        ("threads", command.threads.is_some()),
        ("hardware", command.hardware.is_some()),
        ("dollars-per-hour", command.dollars_per_hour.is_some()),
    ];
    given.into_iter().find_map(|(option, is_given)| is_given.then_some(option))
}

// ---- which ----

fn wanted(ledger: &Ledger, ids: &[String], is_gpu: bool) -> Result<Wanted, Error> {
    let here = |row: &Row| match row.needs {
        Needs::ThisMachine | Needs::Fleet => true,
        Needs::OneGpu => is_gpu,
        Needs::Nothing | Needs::Embeddings => false,
    };
    let mut wanted = Wanted { experiments: Vec::new(), others: Vec::new() };
    let mut add = |experiment: Option<ExperimentId>, row: Option<&Row>| match (experiment, row) {
        (Some(experiment), row) if row.is_none_or(here) => {
            if !wanted.experiments.contains(&experiment) {
                wanted.experiments.push(experiment);
            }
        }
        (_, Some(row)) => wanted.others.push(row.id.clone()),
        (_, None) => {}
    };
    if ids.is_empty() {
        ExperimentId::ALL.iter().for_each(|experiment| add(Some(*experiment), None));
        ledger.rows.iter().filter(|row| !here(row)).for_each(|row| add(None, Some(row)));
    }
    for id in ids {
        match (ledger.row(id), ExperimentId::ALL.iter().find(|experiment| experiment.name() == id)) {
            (Ok(row), _) => add(row.experiment, Some(row)),
            (_, Some(experiment)) => add(Some(*experiment), None),
            (Err(_), None) => return Err(unknown(ledger, id)),
        }
    }
    Ok(wanted)
}

fn unknown(ledger: &Ledger, id: &str) -> Error {
    let rows: Vec<&str> = ledger.rows.iter().map(|row| row.id.as_str()).collect();
    Error::Unknown {
        id: id.to_owned(),
        rows: rows.join(", "),
        experiments: ExperimentId::ALL.map(ExperimentId::name).join(", "),
    }
}

// ---- on what ----

fn prepare(command: &RunCommand) -> Result<About, Error> {
    let price = command.dollars_per_hour;
    if let Some(price) = price.filter(|price| !(1e-6..=1e5).contains(price)) {
        let rule = "from 0.000001 to 100000 dollars";
        return Err(Error::Range { option: "dollars-per-hour", value: price.to_string(), rule });
    }
    let settings = Settings::new(typed(command, None), None)?;
    let chosen = device::choose(&settings.engine)?;
    let gpu = match &chosen.device {
        OnDevice::Cpu => None,
        OnDevice::Cuda(gpu) => Some(gpu.info().clone()),
        OnDevice::Sim(_) => {
            let rule = "auto, cpu or cuda: what is simulated is not measured";
            return Err(Error::Range { option: "device", value: "sim".to_owned(), rule });
        }
    };
    let typed = typed(command, gpu.as_ref());
    let settings = Settings::new(typed.clone(), None)?;
    let model = hardware::served_shape(&settings.model, &settings.engine)?;
    let limits = limits(command, gpu.as_ref(), settings.engine.threads, &model)?;
    let is_gpu = gpu.is_some();
    let subject = Subject {
        launcher: Launcher { program: program()?, arguments: arguments(&typed, is_gpu) },
        model: model.clone(),
        hardware: limits.clone(),
        is_gpu,
        dollars_per_hour: price.or(limits.dollars_per_hour).unwrap_or(1.0),
    };
    let circumstances = Circumstances {
        hardware: limits.name.clone(),
        is_gpu,
        limits,
        weights: weights(&typed).to_owned(),
        model,
        busy_share: busy_share(),
        origin: origin(),
    };
    Ok((subject, circumstances))
}

/// What `servelab serve` is told.
fn typed(command: &RunCommand, gpu: Option<&GpuInfo>) -> Typed {
    let default = if gpu.is_some() { GPU_MODEL } else { DEMO };
    let name = command.model.as_deref().unwrap_or(default);
    let is_preset = presets::names().contains(&name);
    Typed {
        model: (name != DEMO).then(|| name.to_owned()),
        load_format: is_preset.then_some(crate::args::LoadFormat::Dummy),
        device: command.device,
        threads: command.threads,
        ..Typed::default()
    }
}

/// The same as flags. The device is the one that the limits are of, and no other.
fn arguments(typed: &Typed, is_gpu: bool) -> Vec<String> {
    let mut arguments = vec!["serve".to_owned(), "--device".to_owned()];
    arguments.push(if is_gpu { "cuda" } else { "cpu" }.to_owned());
    if let Some(model) = &typed.model {
        arguments.extend(["--model".to_owned(), model.clone()]);
    }
    if typed.load_format.is_some() {
        arguments.extend(["--load-format".to_owned(), "dummy".to_owned()]);
    }
    if let Some(threads) = typed.threads {
        arguments.extend(["--threads".to_owned(), threads.to_string()]);
    }
    arguments
}

fn weights(typed: &Typed) -> &'static str {
    match (&typed.model, typed.load_format) {
        (None, _) => "the embedded checkpoint",
        (_, Some(_)) => "random weights",
        _ => "a checkpoint",
    }
}

/// What predictions are made from.
fn limits(
    command: &RunCommand,
    gpu: Option<&GpuInfo>,
    threads: usize,
    model: &ModelShape,
) -> Result<HardwareProfile, Error> {
    match (command.hardware.as_deref(), gpu) {
        (Some(name), _) => Ok(plan_command::named_or_file(name)?),
        (None, Some(gpu)) => known_gpu(&gpu.name, gpu.memory_bytes as f64),
        (None, None) => {
            let read_bytes = model.streamed_bytes().min(MOST_READ_BYTES);
            let measured = hardware::measured(threads, model.weight_dtype, read_bytes as usize)?;
            let threads = match threads {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                threads => threads,
            };
            let name = processor(&machine::describe().cpu, threads);
            let source = format!("measured, reading {:.0} MB over and over", read_bytes / 1e6);
            Ok(HardwareProfile { name, source, ..measured })
        }
    }
}

/// The profile whose name is part of what the driver calls the GPU; of several the one with the nearest memory.
fn known_gpu(name: &str, memory_bytes: f64) -> Result<HardwareProfile, Error> {
    let parts: Vec<String> =
        name.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_ascii_lowercase).collect();
    let has = |part: &str| parts.iter().any(|other| other == part);
    let is_it = |profile: &HardwareProfile| {
        let own = profile.name.to_ascii_lowercase();
        own.split(' ').next().is_some_and(has)
            && own.contains("pcie") == (has("pcie") && own.starts_with("h100"))
    };
    let all = HardwareProfile::all().map_err(hardware::HardwareError::from)?;
    let distance = |profile: &HardwareProfile| (profile.memory_bytes - memory_bytes).abs();
    let found = all.into_iter().filter(is_it).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    found.ok_or_else(|| Error::UnknownGpu { gpu: name.to_owned() })
}

/// The load average of the last minute over the number of processors.
fn busy_share() -> Option<f64> {
    let averages = std::fs::read_to_string("/proc/loadavg").ok()?;
    let last_minute: f64 = averages.split(' ').next()?.parse().ok()?;
    Some(last_minute / std::thread::available_parallelism().ok()?.get() as f64)
}

/// Short enough for a table: `AMD EPYC, 2 threads`.
fn processor(cpu: &str, threads: usize) -> String {
    let plain = cpu.replace("(R)", "").replace("(TM)", "").replace("Processor", "").replace("CPU", "");
    let plain = plain.split('@').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = plain.chars().filter(|c| !c.is_control()).take(NAME_LENGTH).collect();
    format!("{}, {threads} {}", short.trim_end(), if threads == 1 { "thread" } else { "threads" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|&id| id.to_owned()).collect()
    }

    #[test]
    fn rows_become_their_experiments_once() {
        let ledger = Ledger::load().unwrap();
        let found = wanted(&ledger, &ids(&["kv-8b", "kv-70b", "batch-ladder", "knee-32"]), false).unwrap();
        assert_eq!(found.experiments, [ExperimentId::KvBytes, ExperimentId::BatchLadder]);
        assert!(found.others.is_empty());
    }

    #[test]
    fn rows_that_need_more_are_named_and_not_run() {
        let ledger = Ledger::load().unwrap();
        let asked = ids(&["decode-7b", "semantic", "kv-mha"]);
        let found = wanted(&ledger, &asked, false).unwrap();
        assert_eq!((found.experiments.len(), found.others), (0, asked.clone()));
        let found = wanted(&ledger, &asked, true).unwrap();
        assert_eq!(found.experiments, [ExperimentId::BatchLadder]);
        let all = wanted(&ledger, &[], false).unwrap();
        assert_eq!(all.experiments, ExperimentId::ALL);
        assert!(
            all.others.contains(&"decode-7b".to_owned()) && !all.others.contains(&"least-req".to_owned())
        );
        assert!(!all.others.contains(&"knee-32".to_owned()));
        let error = wanted(&ledger, &ids(&["knee-33"]), false).unwrap_err().to_string();
        assert!(error.contains("\"knee-33\"") && error.contains("knee-32") && error.contains("prefix-hit"));
    }

    #[test]
    fn gpus_are_known_by_what_the_driver_calls_them() {
        for (name, memory, profile) in [
            ("NVIDIA H100 80GB HBM3", 85.0e9, "H100 SXM"),
            ("NVIDIA H100 PCIe", 85.0e9, "H100 PCIe"),
            ("NVIDIA H200", 150.0e9, "H200"),
            ("NVIDIA A100-SXM4-40GB", 42.0e9, "A100 40GB"),
            ("NVIDIA A100-SXM4-80GB", 85.0e9, "A100 80GB"),
            ("NVIDIA A100 80GB PCIe", 85.0e9, "A100 80GB"),
            ("NVIDIA L4", 24e9, "L4"),
            ("NVIDIA L40S", 48e9, "L40S"),
            ("NVIDIA B200", 192e9, "B200"),
        ] {
            assert_eq!(known_gpu(name, memory).unwrap().name, profile, "{name}");
        }
        let error = known_gpu("NVIDIA GeForce RTX 4090", 24e9).unwrap_err().to_string();
        assert!(error.contains("RTX 4090") && error.contains("--hardware"), "{error}");
    }

    #[test]
    fn processors_have_short_names() {
        assert_eq!(processor("AMD EPYC 9R14 96-Core Processor", 2), "AMD EPYC 9R14 96-Core, 2 threads");
        let xeon = processor("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 1);
        assert_eq!(xeon, "Intel Xeon Platinum 8481C, 1 thread");
        assert!(processor(&"x".repeat(100), 64).len() <= 40);
    }
}
