//! Which instructions the kernels use, chosen once at start.
#![allow(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use super::buffer::Buffer;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Operation, Plain, Simd};
use super::threads::ThreadPool;

/// A set of instructions, from the most portable on; each has those of the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust.
    Plain,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL; bf16 weights are widened to f32 in registers.
    Avx512,
    /// The same, and products with bf16 weights round the activations to bf16 (`vdpbf16ps`). Not faster on every CPU: see
    /// [`Kernels::select`].
    Avx512Bf16,
    /// The same, with products in AMX tiles (`tdpbf16ps`).
    Amx,
}

impl Level {
    /// All levels, the most portable last.
    pub const ALL: [Self; 5] = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Plain];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU and operating system have the instructions.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && Self::Avx2.is_available()
        };
        match self {
            Self::Plain => true,
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Self::Avx512 => avx512(),
            Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
            Self::Amx => Self::Avx512Bf16.is_available() && super::matmul::amx::is_available(),
        }
    }

    /// Whether this CPU and operating system have the instructions.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Plain
    }

    /// Whether products with bf16 weights round the activations to bf16 first.
    pub fn rounds_activations(self) -> bool {
        self >= Self::Avx512Bf16
    }

    /// Runs a kernel that is written over [`Simd`](super::simd::Simd) vectors.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            Self::Plain => operation.run(Plain),
            // SAFETY: `Kernels` holds only levels that were detected.
            Self::Avx2 => unsafe { run_avx2(operation) },
            // SAFETY: as above.
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => unsafe { run_avx512(operation) },
        }
    }

    /// Runs a kernel that is written over [`Simd`](super::simd::Simd) vectors.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn run<O: Operation>(self, operation: O) -> O::Output {
        operation.run(Plain)
    }
}

impl Level {
    /// Rows of the register tile that the registers allow.
    pub(super) fn tile_rows(self) -> usize {
        struct TileRows;
        impl Operation for TileRows {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::TILE_ROWS
            }
        }
        self.run(TileRows)
    }

    /// As `run`, for kernels that only levels from AVX2 on call.
    pub(super) fn run_avx<O: Operation>(self, operation: O) -> O::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Kernels` holds only levels that were detected.
            Self::Avx2 => unsafe { run_avx2(operation) },
            level => level.run_avx512(operation),
        }
    }

    /// As `run`, for kernels that only levels from AVX-512 on call.
    pub(super) fn run_avx512<O: Operation>(self, operation: O) -> O::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => unsafe { run_avx512(operation) },
            level => {
                drop(operation);
                unreachable!("the {} level has no tile of this height", level.name())
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<O: Operation>(operation: O) -> O::Output {
    // SAFETY: this function is compiled with the instructions, and its caller detected them.
    operation.run(unsafe { Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<O: Operation>(operation: O) -> O::Output {
    // SAFETY: this function is compiled with the instructions, and its caller detected them.
    operation.run(unsafe { Avx512::new() })
}

/// What every operation needs: the instructions, the threads, and scratch memory that is kept from
/// call to call.
#[derive(Debug)]
pub struct Kernels {
    level: Level,
    pool: ThreadPool,
    scratch: Mutex<Buffer>,
}

/// A level that was asked for and that this machine does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this CPU has no {0} instructions; choose a lower level")]
pub struct LevelUnavailable(pub &'static str);

impl Kernels {
    /// The fastest level that this CPU has and that agrees with plain loops on a small problem (microseconds), with
    /// `threads` threads; `vdpbf16ps` only where it is faster than f32, which is measured once (milliseconds). The strings say which levels were passed over because they
    /// disagreed, for the log; normally there are none.
    pub fn select(threads: usize) -> (Self, Vec<String>) {
        let mut kernels = Self::build(Level::Plain, threads);
        let mut passed_over = Vec::new();
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            kernels.level = level;
            match super::self_check::check(&kernels) {
                Ok(()) if level == Level::Avx512Bf16 && !super::limits::bf16_dots_pay(threads) => {
                    tracing::info!("{} kernels not used: f32 is faster on this CPU", level.name());
                }
                Ok(()) => break,
                Err(reason) => passed_over.push(format!("{} kernels not used: {reason}", level.name())),
            }
        }
        (kernels, passed_over)
    }

    /// A given level, for tests and benchmarks.
    ///
    /// # Errors
    /// If the CPU or the operating system lacks it.
    pub fn with_level(level: Level, threads: usize) -> Result<Self, LevelUnavailable> {
        if level.is_available() {
            Ok(Self::build(level, threads))
        } else {
            Err(LevelUnavailable(level.name()))
        }
    }

    fn build(level: Level, threads: usize) -> Self {
        Self { level, pool: ThreadPool::new(threads), scratch: Mutex::new(Buffer::zeroed(0)) }
    }

    pub fn level(&self) -> Level {
        self.level
    }

    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Calls `body` with at least `bytes` of scratch memory of undefined content.
    pub(super) fn with_scratch<R>(&self, bytes: usize, body: impl FnOnce(*mut u8) -> R) -> R {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if scratch.len() < bytes {
            *scratch = Buffer::zeroed(bytes.next_power_of_two());
        }
        body(scratch.as_mut_ptr())
    }
}
