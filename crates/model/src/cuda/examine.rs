//! All that `servelab doctor` finds out about a GPU: its limits, every kernel, a small model.

use std::sync::Arc;

use super::checks::{self, Check, Size};
use super::compare::{CompareSizes, Comparison, Numbers, compare};
use super::gpu::Gpu;
use super::limits::{LimitSizes, Limits, measure};
use super::runner::Ways;

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// `None` to measure nothing.
    pub limits: Option<LimitSizes>,
    pub checks: Size,
    pub model: CompareSizes,
}

impl Effort {
    /// On a real GPU.
    pub const FULL: Self =
        Self { limits: Some(LimitSizes::FULL), checks: Size::Full, model: CompareSizes::FULL };
    /// On an emulator.
    pub const SMALL: Self =
        Self { limits: Some(LimitSizes::SMALL), checks: Size::Small, model: CompareSizes::SMALL };
    /// Whether everything computes what it should, in seconds, and nothing about speed.
    pub const QUICK: Self = Self { limits: None, ..Self::SMALL };
}

/// One thing that was found, told as soon as it is.
#[derive(Clone, Debug)]
pub enum Finding {
    Limits(Limits),
    Check(Check),
    /// The small model in these numbers.
    Model(Numbers, Comparison),
    /// What could not be examined, and why.
    Failed {
        what: &'static str,
        reason: String,
    },
}

impl Finding {
    /// What is wrong and what to do about it; `None` if all is well.
    pub fn fault(&self) -> Option<String> {
        match self {
            Self::Failed { what, reason } => Some(format!("{what}: {reason}")),
            Self::Check(check) if !check.passed() => Some(format!(
                "the kernel {} computes wrong numbers (error {:.1e}, {:.1e} allowed; {}); please report it, and serve \
                 with --device cpu meanwhile",
                check.kernel, check.error, check.tolerance, check.case
            )),
            Self::Model(numbers, comparison) if !comparison.passed() => Some(format!(
                "a small model ({}) answers otherwise on the GPU than on the CPU (log-probabilities differ by {:.3}, {} \
                 allowed); please report it, and {} meanwhile",
                numbers.title(),
                comparison.logprob_error.max(comparison.gap / 2.0),
                comparison.tolerance,
                match numbers {
                    Numbers::Bf16 => "serve with --device cpu",
                    Numbers::Fp8Kv => "serve without --kv-dtype fp8",
                    Numbers::Fp8Weights => "serve without --dtype fp8",
                }
            )),
            Self::Limits(_) | Self::Check(_) | Self::Model(..) => None,
        }
    }
}

/// Examines a GPU. What fails is a [`Finding`]; what comes after it is tried all the same, and fails with the same
/// words if the GPU is lost.
pub fn examine<G: Gpu>(gpu: &Arc<G>, effort: Effort, tell: &mut dyn FnMut(Finding)) {
    match effort.limits.map(|sizes| measure(&**gpu, sizes)) {
        Some(Ok(limits)) => tell(Finding::Limits(limits)),
        Some(Err(error)) => tell(failed("the limits could not be measured", &error)),
        None => {}
    }
    if let Err(error) = checks::run(&**gpu, effort.checks, &mut |check| tell(Finding::Check(check))) {
        tell(failed("the checks of the kernels ended early", &error));
    }
    let has_fp8 = gpu.info().arch.has_fp8();
    for numbers in Numbers::ALL.into_iter().filter(|numbers| has_fp8 || *numbers == Numbers::Bf16) {
        match compare(Arc::clone(gpu), effort.model, numbers, Ways::default()) {
            Ok(comparison) => tell(Finding::Model(numbers, comparison)),
            Err(error) => tell(failed("a small model could not be run", &error)),
        }
    }
}

fn failed(what: &'static str, error: &dyn std::error::Error) -> Finding {
    Finding::Failed { what, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_say_what_is_wrong_and_what_to_do() {
        let good = Check {
            kernel: "embed",
            case: "BF16, 3 rows".to_owned(),
            error: 0.0,
            tolerance: 0.0,
            bytes: 1,
            flops: 0,
            seconds: None,
        };
        assert_eq!(Finding::Check(good.clone()).fault(), None);
        let fault = Finding::Check(Check { error: f64::INFINITY, ..good }).fault().unwrap();
        assert!(
            fault.contains("embed computes wrong numbers (error inf") && fault.contains("--device cpu"),
            "{fault}"
        );
        let model = |logprob_error, gap| Comparison {
            logprob_error,
            output_tokens: 64,
            equal_tokens: 64,
            gap,
            tolerance: 0.15,
        };
        assert_eq!(Finding::Model(Numbers::Fp8Kv, model(0.1, 0.2)).fault(), None);
        let fault = Finding::Model(Numbers::Fp8Kv, model(0.1, 0.4)).fault().unwrap();
        assert!(fault.contains("differ by 0.200") && fault.contains("without --kv-dtype fp8"), "{fault}");
        assert!(Finding::Model(Numbers::Bf16, model(f32::NAN, 0.0)).fault().is_some());
    }
}
