//! What the doctor found, as lines for people and as JSON.

use serde_json::{Value, json};
use servelab_model::cuda::checks::Check;
use servelab_model::cuda::compare::{Comparison, Numbers};
use servelab_model::cuda::driver::OpenError;
use servelab_model::cuda::examine::Finding;
use servelab_model::cuda::libraries::{Found, Library};
use servelab_model::cuda::limits::Limits;

use super::{CpuFacts, GpuFacts, Word};
use crate::size::ByteSize;

/// All that was found so far.
pub struct Report {
    /// Whether a missing GPU is a fault.
    needs_gpu: bool,
    cpu: Option<CpuFacts>,
    cpu_model: Option<Comparison>,
    gpu: Option<GpuFacts>,
    no_gpu: Option<OpenError>,
    limits: Option<Limits>,
    checks: Vec<Check>,
    models: Vec<(Numbers, Comparison)>,
    /// What is wrong, and what to do about it.
    pub faults: Vec<String>,
}

impl Report {
    pub fn new(needs_gpu: bool) -> Self {
        Self {
            needs_gpu,
            cpu: None,
            cpu_model: None,
            gpu: None,
            no_gpu: None,
            limits: None,
            checks: Vec::new(),
            models: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Keeps what was found; the lines that show it.
    pub fn take(&mut self, word: Word) -> Vec<String> {
        match word {
            Word::Begins(_) => Vec::new(),
            Word::Cpu(facts) => self.take_cpu(facts),
            Word::CpuModel(outcome) => self.take_cpu_model(outcome),
            Word::Gpu(facts) => {
                let lines = gpu_lines(&facts);
                self.gpu = Some(facts);
                lines
            }
            Word::NoGpu(error) => {
                let line = format!("GPU          none: {error}");
                if self.needs_gpu || error.can_be_fixed() {
                    self.faults.push(error.to_string());
                }
                self.no_gpu = Some(error);
                vec![line]
            }
            Word::Finding(finding) => self.take_finding(finding),
        }
    }

    fn take_cpu(&mut self, facts: CpuFacts) -> Vec<String> {
        let told = facts.passed_over.iter().map(|reason| format!("CPU: {reason}; please report it"));
        self.faults.extend(told);
        let lines = cpu_lines(&facts);
        self.cpu = Some(facts);
        lines
    }

    fn take_cpu_model(&mut self, outcome: Result<Comparison, String>) -> Vec<String> {
        match outcome {
            Ok(comparison) => {
                if !comparison.passed() {
                    self.faults.push(
                        "a small model answers otherwise than candle's models do, on the CPU; please report it"
                            .to_owned(),
                    );
                }
                self.cpu_model = Some(comparison);
                vec![format!("CPU model    {}", comparison_text(&comparison, "candle's"))]
            }
            Err(error) => {
                self.faults.push(format!("a small model could not be run on the CPU: {error}"));
                Vec::new()
            }
        }
    }

    fn take_finding(&mut self, finding: Finding) -> Vec<String> {
        self.faults.extend(finding.fault());
        match finding {
            Finding::Limits(limits) => {
                self.limits = Some(limits);
                vec![limits_line(limits)]
            }
            Finding::Check(check) => {
                let mut lines = Vec::new();
                if self.checks.is_empty() {
                    lines.push(format!(
                        "\n{:<18} {:>9} {:>9} {:>9} {:>7}  case",
                        "kernel", "error", "allowed", "time", "share"
                    ));
                }
                lines.push(check_line(&check, self.limits));
                self.checks.push(check);
                lines
            }
            Finding::Model(numbers, comparison) => {
                let gap = if self.models.is_empty() { "\n" } else { "" };
                self.models.push((numbers, comparison));
                let text = comparison_text(&comparison, "the CPU's");
                vec![format!("{gap}GPU model    {}: {text}", numbers.title())]
            }
            Finding::Failed { .. } => Vec::new(),
        }
    }

    /// To be called when the examining thread has ended, which it said last it was `doing`.
    pub fn close(&mut self, doing: &str) {
        let is_whole = self.no_gpu.is_some() || !self.models.is_empty();
        if !is_whole && self.faults.is_empty() {
            self.faults.push(format!("the examination ended early while {doing}; please report it"));
        }
    }

    pub fn verdict(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        lines.extend(self.faults.iter().map(|fault| format!("to fix: {fault}")));
        if self.faults.is_empty() {
            lines.push(match &self.gpu {
                Some(gpu) => format!("all is well: servelab serves on {}", gpu.info.name),
                None => "all is well: servelab serves on the CPU; there was no GPU to check".to_owned(),
            });
        }
        lines
    }

    pub fn json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("SERVELAB_COMMIT"),
            "cpu": self.cpu.as_ref().map(|facts| self.cpu_json(facts)),
            "gpu": self.gpu.as_ref().map(|facts| self.gpu_json(facts)),
            "no_gpu": self.no_gpu.as_ref().map(ToString::to_string),
            "faults": self.faults,
            "passed": self.faults.is_empty(),
        })
    }

    fn cpu_json(&self, facts: &CpuFacts) -> Value {
        json!({
            "name": facts.name,
            "threads": facts.threads,
            "free_bytes": facts.free_bytes,
            "kernels": facts.level,
            "read_bytes_per_second": facts.limits.read_bytes_per_second,
            "f32_flops_per_second": facts.limits.f32_flops_per_second,
            "bf16_flops_per_second": facts.limits.bf16_flops_per_second,
            "small_model": self.cpu_model.as_ref().map(comparison_json),
        })
    }

    fn gpu_json(&self, facts: &GpuFacts) -> Value {
        let library = |found: &Found| {
            let path = found.path.as_ref().map(|path| path.display().to_string());
            json!({ "name": found.library.title(), "cuda": found.version.to_string(), "path": path })
        };
        let model = |(numbers, comparison): &(Numbers, Comparison)| {
            let mut json = comparison_json(comparison);
            json["numbers"] = numbers.title().into();
            json
        };
        json!({
            "name": facts.info.name,
            "compute_capability": facts.info.arch.to_string(),
            "multiprocessors": facts.info.multiprocessors,
            "memory_bytes": facts.info.memory_bytes,
            "free_bytes": facts.free_bytes,
            "l2_bytes": facts.info.l2_bytes,
            "driver": facts.driver,
            "libraries": facts.libraries.all().map(library),
            "limits": self.limits.map(|limits| json!({
                "copy_bytes_per_second": limits.copy_bytes_per_second,
                "bf16_flops_per_second": limits.bf16_flops_per_second,
            })),
            "checks": self.checks.iter().map(|check| check_json(check, self.limits)).collect::<Vec<_>>(),
            "small_models": self.models.iter().map(model).collect::<Vec<_>>(),
        })
    }
}

fn cpu_lines(facts: &CpuFacts) -> Vec<String> {
    let CpuFacts { name, threads, level, limits, .. } = facts;
    let free = facts.free_bytes.map_or_else(String::new, |bytes| format!(", {} free", ByteSize(bytes)));
    let products = match limits.bf16_flops_per_second {
        Some(flops) => format!(", bf16 products {}", rate(flops)),
        None => String::new(),
    };
    vec![
        format!("CPU          {name}, {threads} threads{free}; {level} kernels agree with plain loops"),
        format!(
            "CPU limits   memory read {}, f32 {}{products}",
            bandwidth(limits.read_bytes_per_second),
            rate(limits.f32_flops_per_second)
        ),
    ]
}

fn gpu_lines(facts: &GpuFacts) -> Vec<String> {
    let GpuFacts { info, free_bytes, driver, libraries } = facts;
    let mut lines = vec![format!(
        "GPU          {}, compute capability {}, {} multiprocessors, {} of {} free",
        info.name,
        info.arch,
        info.multiprocessors,
        ByteSize(*free_bytes),
        ByteSize(info.memory_bytes)
    )];
    lines.extend(libraries.all().map(|found| {
        let path = found.path.as_ref().map_or_else(String::new, |path| format!(", {}", path.display()));
        let own = driver.iter().filter(|_| found.library == Library::Driver);
        let own: String = own.map(|version| format!("{version}, ")).collect();
        format!("{:<12} {own}CUDA {}{path}", found.library.title(), found.version)
    }));
    lines
}

fn limits_line(limits: Limits) -> String {
    format!(
        "GPU limits   copy {} (read and written), bf16 products {}",
        bandwidth(limits.copy_bytes_per_second),
        rate(limits.bf16_flops_per_second)
    )
}

fn check_line(check: &Check, limits: Option<Limits>) -> String {
    let share = share(check, limits).map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share));
    let time = check.seconds.map_or_else(String::new, |seconds| format!("{:.1} us", 1e6 * seconds));
    let mark = if check.passed() { "" } else { "  WRONG" };
    format!(
        "{:<18} {:>9.1e} {:>9.1e} {time:>9} {share:>7}  {}{mark}",
        check.kernel, check.error, check.tolerance, check.case
    )
}

/// How much of the nearer limit a kernel reaches, where it was timed.
fn share(check: &Check, limits: Option<Limits>) -> Option<f64> {
    let (seconds, limits) = (check.seconds?, limits?);
    let bytes = check.bytes as f64 / limits.copy_bytes_per_second;
    let flops = check.flops as f64 / limits.bf16_flops_per_second;
    Some(bytes.max(flops) / seconds)
}

fn check_json(check: &Check, limits: Option<Limits>) -> Value {
    json!({
        "kernel": check.kernel,
        "case": check.case,
        // JSON has no infinity.
        "error": check.error.is_finite().then_some(check.error),
        "tolerance": check.tolerance,
        "passed": check.passed(),
        "bytes": check.bytes,
        "flops": check.flops,
        "seconds": check.seconds,
        "share": share(check, limits),
    })
}

fn comparison_text(comparison: &Comparison, of: &str) -> String {
    let Comparison { logprob_error, output_tokens, equal_tokens, gap, tolerance } = comparison;
    let tokens = match equal_tokens == output_tokens {
        true => format!("all {output_tokens} greedy tokens equal"),
        false => format!("{equal_tokens} greedy tokens equal, then two that differ by {gap:.3}"),
    };
    let mark = if comparison.passed() { "" } else { "  WRONG" };
    format!("log-probabilities within {logprob_error:.3} of {of} ({tolerance} allowed), {tokens}{mark}")
}

fn comparison_json(comparison: &Comparison) -> Value {
    json!({
        "logprob_error": comparison.logprob_error,
        "tolerance": comparison.tolerance,
        "output_tokens": comparison.output_tokens,
        "equal_tokens": comparison.equal_tokens,
        "gap": comparison.gap,
        "passed": comparison.passed(),
    })
}

fn bandwidth(bytes_per_second: f64) -> String {
    format!("{:.0} GB/s", bytes_per_second / 1e9)
}

fn rate(flops_per_second: f64) -> String {
    match flops_per_second {
        small if small < 1e12 => format!("{:.0} GFLOP/s", small / 1e9),
        large => format!("{:.0} TFLOP/s", large / 1e12),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use servelab_model::cpu::limits as cpu_limits;
    use servelab_model::cuda::gpu::{Arch, GpuInfo};
    use servelab_model::cuda::libraries::{Libraries, Missing, Version};

    use super::*;

    const LIMITS: Limits = Limits { copy_bytes_per_second: 1e12, bf16_flops_per_second: 1e14 };

    fn check() -> Check {
        Check {
            kernel: "copy_blocks",
            case: "3 blocks in 2 layers".to_owned(),
            error: 0.0,
            tolerance: 0.0,
            bytes: 1_000_000_000,
            flops: 20_000_000_000,
            seconds: Some(2e-3),
        }
    }

    #[test]
    fn a_share_is_that_of_the_nearer_limit() {
        assert_eq!(share(&check(), Some(LIMITS)), Some(0.5));
        let bound = Check { flops: 150_000_000_000, ..check() };
        assert_eq!(share(&bound, Some(LIMITS)), Some(0.75));
        assert_eq!(share(&Check { seconds: None, ..check() }, Some(LIMITS)), None);
    }

    /// Made up, to see how a report reads.
    fn words() -> Vec<Word> {
        let found = |library, path: &str| Found {
            library,
            version: Version { major: 13, minor: 0 },
            path: Some(PathBuf::from(path)),
        };
        let comparison = Comparison {
            logprob_error: 0.0123,
            output_tokens: 64,
            equal_tokens: 64,
            gap: 0.0,
            tolerance: 0.03,
        };
        vec![
            Word::Cpu(CpuFacts {
                name: "Some CPU".to_owned(),
                threads: 16,
                free_bytes: Some(64 << 30),
                level: "avx512",
                passed_over: Vec::new(),
                limits: cpu_limits::Limits {
                    read_bytes_per_second: 1e11,
                    f32_flops_per_second: 2e12,
                    bf16_flops_per_second: None,
                },
            }),
            Word::CpuModel(Ok(comparison)),
            Word::Gpu(GpuFacts {
                info: GpuInfo {
                    name: "Some GPU".to_owned(),
                    arch: Arch(90),
                    multiprocessors: 132,
                    shared_bytes_per_block: 227 << 10,
                    shared_bytes_per_multiprocessor: 228 << 10,
                    l2_bytes: 50 << 20,
                    memory_bytes: 80 << 30,
                },
                free_bytes: 79 << 30,
                driver: Some("580.65.06".to_owned()),
                libraries: Libraries {
                    driver: found(Library::Driver, "/usr/lib/libcuda.so.1"),
                    nvrtc: found(Library::Nvrtc, "/opt/lib/libnvrtc.so.13"),
                    cublas_lt: found(Library::CublasLt, "/opt/lib/libcublasLt.so.13"),
                },
            }),
            Word::Finding(Finding::Limits(LIMITS)),
            Word::Finding(Finding::Check(check())),
            Word::Finding(Finding::Check(Check { error: f64::INFINITY, kernel: "embed", ..check() })),
            Word::Finding(Finding::Model(Numbers::Bf16, comparison)),
            Word::Finding(Finding::Model(
                Numbers::Fp8Kv,
                Comparison { equal_tokens: 7, gap: 0.9, tolerance: 0.2, ..comparison },
            )),
        ]
    }

    #[test]
    fn the_report_of_a_gpu_reads_like_a_table() {
        let mut report = Report::new(false);
        let mut lines: Vec<String> = words().into_iter().flat_map(|word| report.take(word)).collect();
        report.close("checking");
        lines.extend(report.verdict());
        insta::assert_snapshot!(lines.join("\n"));
        let json = report.json();
        assert_eq!((&json["passed"], json["faults"].as_array().unwrap().len()), (&false.into(), 2));
        assert_eq!(json["gpu"]["checks"][0]["share"], 0.5);
        assert!(json["gpu"]["checks"][1]["error"].is_null());
        assert_eq!(json["gpu"]["small_models"][1]["numbers"], "fp8 KV cache");
        assert_eq!(json["gpu"]["libraries"][2]["path"], "/opt/lib/libcublasLt.so.13");
    }

    #[test]
    fn a_gpu_that_could_be_used_is_a_fault_and_none_is_not() {
        let faults = |needs_gpu, error: Missing| {
            let mut report = Report::new(needs_gpu);
            report.take(Word::NoGpu(error.into()));
            report.close("opening the GPU");
            report.faults.len()
        };
        let library = Missing::Library { library: Library::Nvrtc, major: 13, package: "nvidia-cuda-nvrtc" };
        assert_eq!(faults(false, Missing::Driver), 0);
        assert_eq!(faults(true, Missing::Driver), 1);
        assert_eq!(faults(false, Missing::Gpu("no device".to_owned())), 0);
        assert_eq!(faults(false, library), 1);
    }
}
