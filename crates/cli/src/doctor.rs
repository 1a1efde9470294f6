//! `servelab doctor`: what hardware, driver and libraries are here, whether every kernel computes what it should,
//! how close it comes to the limits of this machine, and what to fix.
//!
//! One thread examines and tells what it finds, the other shows it: a GPU that hangs cannot hang the command.

mod report;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use clap::Args;
use servelab_model::cpu::{Kernels, limits as cpu_limits};
use servelab_model::cuda::checks;
use servelab_model::cuda::compare::{CompareSizes, Comparison, compare_cpu};
use servelab_model::cuda::driver::{CudaGpu, OpenError};
use servelab_model::cuda::examine::{Effort, Finding, examine};
use servelab_model::cuda::gpu::{Gpu, GpuInfo};
use servelab_model::cuda::libraries::Libraries;

use crate::bench::machine;
use crate::memory;
use report::Report;

/// Several times the last-level cache of a CPU.
const READ_BYTES: usize = 256 << 20;
/// How long nothing may be found before the machine counts as hanging. The first time, kernels are compiled.
const PATIENCE: Duration = Duration::from_secs(300);

/// What was typed.
#[derive(Args, Clone, Debug)]
pub struct DoctorCommand {
    /// Folder of libnvrtc and libcublasLt [default: where the loader, Python packages and toolkits have them].
    #[arg(long, value_name = "FOLDER")]
    cuda_lib_dir: Option<PathBuf>,
    /// Fail if there is no GPU to check [default: check the CPU alone].
    #[arg(long)]
    gpu: bool,
    /// Threads that compute on the CPU [default: one a core].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Check the GPU's kernels at small sizes and measure nothing of it: seconds, once they are compiled.
    #[arg(long)]
    quick: bool,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

/// What the examining thread says.
enum Word {
    /// What it begins to do, in words that go after "while".
    Begins(&'static str),
    Cpu(CpuFacts),
    CpuModel(Result<Comparison, String>),
    Gpu(GpuFacts),
    NoGpu(OpenError),
    Finding(Finding),
}

/// The processor and what it can do at most.
struct CpuFacts {
    name: String,
    threads: usize,
    free_bytes: Option<u64>,
    level: &'static str,
    /// Better levels that did not compute as the plain loops do.
    passed_over: Vec<String>,
    limits: cpu_limits::Limits,
}

/// The GPU and what it is driven with.
struct GpuFacts {
    info: GpuInfo,
    free_bytes: u64,
    /// Such as 580.65.06, where the system tells.
    driver: Option<String>,
    libraries: Libraries,
}

/// Looks at everything and prints it. True if all is well.
///
/// # Errors
/// If standard output is closed.
pub fn run(command: &DoctorCommand, out: &mut impl Write) -> std::io::Result<bool> {
    let (send, receive) = mpsc::channel();
    let (folder, threads) = (command.cuda_lib_dir.clone(), command.threads.map_or(0, usize::from));
    let effort = if command.quick { Effort::QUICK } else { Effort::FULL };
    std::thread::spawn(move || look(folder.as_deref(), threads, effort, &send));
    let report = listen(command, &receive, PATIENCE, out)?;
    match command.json {
        true => writeln!(out, "{:#}", report.json())?,
        false => report.verdict().into_iter().try_for_each(|line| writeln!(out, "{line}"))?,
    }
    Ok(report.faults.is_empty())
}

/// Shows what is found as it comes, until the other thread has ended or says nothing any more.
fn listen(
    command: &DoctorCommand,
    words: &Receiver<Word>,
    patience: Duration,
    out: &mut impl Write,
) -> std::io::Result<Report> {
    let mut report = Report::new(command.gpu);
    let mut doing = "starting";
    loop {
        match words.recv_timeout(patience) {
            Ok(Word::Begins(what)) => doing = what,
            Ok(word) => {
                let lines = report.take(word);
                if !command.json {
                    lines.into_iter().try_for_each(|line| writeln!(out, "{line}"))?;
                    out.flush()?;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                report.faults.push(format!(
                    "nothing happened for {} s while {doing}: something hangs; see the system's log (dmesg), restart \
                     the machine, and report it if it happens again",
                    patience.as_secs()
                ));
                break;
            }
        }
    }
    report.close(doing);
    Ok(report)
}

/// Examines the machine. Nobody listens once the command has been given up.
fn look(folder: Option<&Path>, threads: usize, effort: Effort, words: &Sender<Word>) {
    let tell = |word| drop(words.send(word));
    tell(Word::Begins("measuring the CPU"));
    tell(Word::Cpu(cpu_facts(threads)));
    tell(Word::Begins("computing a small model on the CPU"));
    let compared = compare_cpu(CompareSizes::FULL, threads);
    tell(Word::CpuModel(compared.map_err(|error| error.to_string())));
    tell(Word::Begins("opening the GPU"));
    match CudaGpu::open(folder) {
        Ok(gpu) => look_at_gpu(&Arc::new(gpu), effort, &tell),
        Err(error) => tell(Word::NoGpu(error)),
    }
}

fn look_at_gpu(gpu: &Arc<CudaGpu>, effort: Effort, tell: &dyn Fn(Word)) {
    tell(Word::Gpu(GpuFacts {
        info: gpu.info().clone(),
        free_bytes: gpu.free_bytes().unwrap_or(0),
        driver: driver_version(),
        libraries: gpu.libraries().clone(),
    }));
    tell(Word::Begins("compiling the kernels"));
    // What does not compile is found again, by the check that needs it.
    let _ = gpu.prepare(&checks::modules(gpu.info()));
    tell(Word::Begins("checking the kernels on the GPU"));
    examine(gpu, effort, &mut |finding| tell(Word::Finding(finding)));
}

fn cpu_facts(threads: usize) -> CpuFacts {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let (kernels, passed_over) = Kernels::select(threads);
    CpuFacts {
        name: machine::describe().cpu,
        threads,
        free_bytes: memory::free_bytes(),
        level: kernels.level().name(),
        passed_over: passed_over.into_iter().map(|reason| reason.to_string()).collect(),
        limits: cpu_limits::measure(&kernels, READ_BYTES),
    }
}

fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/sys/module/nvidia/version").ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn command(json: bool, gpu: bool) -> DoctorCommand {
        DoctorCommand { cuda_lib_dir: None, gpu, threads: Some(1), quick: false, json }
    }

    /// On a machine with a GPU this takes some seconds more and passes too.
    #[test]
    fn without_a_gpu_the_cpu_is_checked_and_the_reason_told() {
        let mut out = Vec::new();
        assert!(run(&command(true, false), &mut out).unwrap());
        let report: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(report["passed"], true);
        assert!(report["cpu"]["read_bytes_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(report["cpu"]["small_model"]["passed"], true);
        if report["gpu"].is_null() {
            assert!(report["no_gpu"].as_str().unwrap().contains("driver"), "{report}");
            let mut out = Vec::new();
            assert!(!run(&command(false, true), &mut out).unwrap());
            let text = String::from_utf8(out).unwrap();
            assert!(text.contains("GPU          none: ") && text.contains("\nto fix: "), "{text}");
        }
    }

    #[test]
    fn what_hangs_is_given_up_with_what_was_found_so_far() {
        let (send, receive) = mpsc::channel();
        send.send(Word::CpuModel(Err("no memory".to_owned()))).unwrap();
        send.send(Word::Begins("checking the kernels on the GPU")).unwrap();
        let report =
            listen(&command(true, false), &receive, Duration::from_millis(20), &mut Vec::new()).unwrap();
        drop(send);
        assert!(report.faults[0].contains("no memory"), "{:?}", report.faults);
        assert!(report.faults[1].contains("while checking the kernels on the GPU"), "{:?}", report.faults);
        assert_eq!(report.json()["passed"], false);
    }

    #[test]
    fn a_thread_that_panics_is_a_fault() {
        let (send, receive) = mpsc::channel();
        send.send(Word::Begins("compiling the kernels")).unwrap();
        drop(send);
        let report = listen(&command(true, false), &receive, PATIENCE, &mut Vec::new()).unwrap();
        assert!(report.faults[0].contains("ended early while compiling the kernels"), "{:?}", report.faults);
    }
}
