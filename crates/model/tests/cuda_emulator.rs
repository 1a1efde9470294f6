//! The CUDA kernels without a GPU: every check of `servelab doctor` on the emulator, and the emulator itself.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]
#![allow(clippy::print_stdout, reason = "the table of checks is shown if one fails")]

#[allow(unsafe_code, dead_code)]
#[path = "../src/cuda/emulator/mod.rs"]
mod emulator;

use emulator::Emulator;
use gpu::GpuError;
use servelab_model::cuda::checks::{self, Check, Report, Size};
// The emulator finds these beside itself.
use servelab_model::cuda::{gpu, kernels};

type Group = fn(&Emulator, Size, Report<'_>) -> Result<(), GpuError>;

/// Runs one group of checks and prints them like a table. With another seed they run in `cuda_runner`, as the
/// doctor runs them.
fn passes(test: &str, group: Group) {
    let Some(emulator) = Emulator::or_skip(test, 1) else { return };
    let mut failed = Vec::new();
    let mut count = 0;
    let mut report = |check: Check| {
        println!("{:<18} {:>9.2e} of {:.0e}  {}", check.kernel, check.error, check.tolerance, check.case);
        count += 1;
        if !check.passed() {
            failed.push(check);
        }
    };
    group(&emulator, Size::Small, &mut report).unwrap();
    assert!(failed.is_empty() && count > 0, "{failed:#?}");
    assert_eq!(emulator.conflicts(), 0, "rows of matrix loads lie in the same banks");
}

#[test]
fn copies() {
    passes("copies", checks::copies);
}

#[test]
fn norms() {
    passes("norms", checks::norms);
}

#[test]
fn silu() {
    passes("silu", checks::silu);
}

#[test]
fn rope() {
    passes("rope", checks::rope);
}

#[test]
fn decode() {
    passes("decode", checks::decode);
}

#[test]
fn prefill() {
    passes("prefill", checks::prefill);
}

#[test]
fn sampling() {
    passes("sampling", checks::sampling);
}

#[test]
fn products() {
    passes("products", checks::products);
}

#[test]
fn fp8() {
    passes("fp8", checks::fp8);
}

/// What the emulator is for: each kind of mistake in a kernel shows.
mod mistakes {
    use super::emulator::Emulator;
    use super::gpu::{Argument, Gpu, GpuError, Launch, Memory};
    use super::kernels::{Entry, KernelFile, Module, Parameter, ParameterKind};
    use servelab_model::cuda::words::{bytes_of, bytes_of_mut};

    /// `mistake(float* out, const float* x)` with 64 threads and 16 KiB of dynamic shared memory.
    static ENTRY: Entry = Entry {
        name: "mistake",
        parameters: &[
            Parameter { name: "out", kind: ParameterKind::Pointer },
            Parameter { name: "x", kind: ParameterKind::Pointer },
        ],
    };

    static ENTRIES: [&Entry; 1] = [&ENTRY];

    fn file(body: &str) -> &'static KernelFile {
        let source = format!(
            "extern \"C\" __global__ void mistake(\n    float* out,\n    const float* x) {{\n\
             u32 t = threadIdx.x;\n{body}\n}}\n"
        );
        Box::leak(Box::new(KernelFile {
            name: "mistake.cu",
            source: source.leak(),
            macros: &[],
            options: &[],
            entries: &ENTRIES,
        }))
    }

    /// The 64 numbers that the kernel makes of 0, 1, 2, ... 63.
    fn run(emulator: &Emulator, body: &str) -> Result<Vec<f32>, GpuError> {
        let module = emulator.load(&Module::new(file(body), vec![]))?;
        let kernel = emulator.kernel(&module, &ENTRY, 16 << 10)?;
        let stream = emulator.stream()?;
        let x: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let (from, to) = (emulator.allocate(256)?, emulator.allocate(256)?);
        emulator.upload(&stream, bytes_of(&x), from.span())?;
        let launch = Launch { grid: [1, 1, 1], block: 64, shared_bytes: 16 << 10 };
        let arguments = [Argument::Memory(to.span()), Argument::Memory(from.span())];
        // SAFETY: the kernels that leave their memory on purpose are stopped before they do.
        #[allow(unsafe_code)]
        unsafe {
            emulator.launch(&stream, &kernel, launch, &arguments)?;
        }
        let mut out = vec![0.0f32; 64];
        emulator.download(&stream, to.span(), bytes_of_mut(&mut out))?;
        Ok(out)
    }

    fn lost(body: &str) -> String {
        let Some(emulator) = Emulator::or_skip("mistakes", 1) else { return String::new() };
        match run(&emulator, body) {
            Err(GpuError::Lost { reason, .. }) => {
                assert!(emulator.stream().is_err_and(|error| error.is_sticky()), "a lost GPU stays lost");
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_missing_barrier_gives_wrong_numbers_with_some_seed() {
        const TURNED: &str =
            "__shared__ float shared[64]; shared[t] = x[t]; BARRIER out[t] = shared[(t + 33) % 64];";
        let wrong = |barrier: &str| {
            let body = TURNED.replace("BARRIER", barrier);
            let run =
                |seed| Emulator::or_skip("mistakes", seed).map(|emulator| run(&emulator, &body).unwrap());
            let wanted: Vec<f32> = (0..64).map(|t| ((t + 33) % 64) as f32).collect();
            (0..8).filter_map(run).filter(|out| *out != wanted).count()
        };
        assert_eq!(wrong("__syncthreads();"), 0);
        if Emulator::new(0).is_ok() {
            assert!(wrong("") > 0);
        }
    }

    #[test]
    fn loads_and_stores_outside_are_stopped() {
        let Some(emulator) = Emulator::or_skip("mistakes", 1) else { return };
        if !emulator.checks_accesses() {
            return;
        }
        assert!(lost("out[t] = x[t + 1];").contains("thread 63: read of 4 bytes"));
        assert!(lost("out[t == 5 ? 64 : t] = 1.0f;").contains("thread 5: write of 4 bytes"));
        assert!(
            lost("float* s = (float*)dynamic_shared(); s[4095 + t] = 1.0f;").contains("write of 4 bytes")
        );
    }

    #[test]
    fn an_asynchronous_copy_is_there_only_after_the_wait() {
        const COPY: &str = "float* s = (float*)dynamic_shared();
            if (t < 16) copy_async(s + 4 * t, x + 4 * t, true);
            commit_copies(); EARLY wait_copies<0>(); __syncthreads(); LATE";
        let Some(emulator) = Emulator::or_skip("mistakes", 3) else { return };
        let early = COPY.replace("EARLY", "__syncthreads(); out[t] = s[t];").replace("LATE", "");
        assert!(run(&emulator, &early).unwrap().iter().any(|value| value.is_nan()));
        let late = COPY.replace("EARLY", "").replace("LATE", "out[t] = s[t];");
        assert_eq!(run(&emulator, &late).unwrap()[..3], [0.0, 1.0, 2.0]);
        assert!(lost("copy_async(dynamic_shared() + 8, x, true);").contains("not aligned"));
        assert!(lost("copy_async(dynamic_shared(), x + 64, true);").contains("outside all memory"));
    }

    #[test]
    fn lanes_must_meet_at_the_same_instruction() {
        if Emulator::or_skip("mistakes", 1).is_none() {
            return;
        }
        let part = "if (t % 32 < 7) return; out[t] = __shfl_xor_sync(FULL_WARP, x[t], 1);";
        assert!(lost(part).contains("left"));
        let two = "if (t & 1) __syncwarp(); else out[t] = __shfl_xor_sync(FULL_WARP, x[t], 2);";
        assert!(lost(two).contains("different common instructions"));
        let apart = "if (t < 16) __syncthreads(); else __syncwarp(); out[t] = x[t];";
        assert!(lost(apart).contains("never reach"));
    }

    #[test]
    fn rows_in_the_same_banks_are_counted() {
        let Some(emulator) = Emulator::or_skip("mistakes", 1) else { return };
        let rows = |stride: u32| {
            format!(
                "float* s = (float*)dynamic_shared(); for (u32 i = t; i < 4096; i += 64) s[i] = (float)i;
                 __syncthreads(); u32 m[4]; load_matrices(m, dynamic_shared() + t % 32 * {stride});
                 out[t] = __uint_as_float(m[0] | m[1] | m[2] | m[3]);"
            )
        };
        run(&emulator, &rows(144)).unwrap();
        assert_eq!(emulator.conflicts(), 0);
        run(&emulator, &rows(128)).unwrap();
        // Two warps, four matrices of which seven of eight rows have to wait.
        assert_eq!(emulator.conflicts(), 2 * 4 * 7);
    }

    #[test]
    fn matrix_instructions_multiply_matrices() {
        // a[i][j] = i - j, b[i][j] = (i + 2 j) % 5 - 1 as f16; the first warp multiplies, lane by lane.
        const PRODUCT: &str = "
            u16* a = (u16*)dynamic_shared(); u16* b = a + 16 * 16;
            for (u32 i = t; i < 256; i += 64) a[i] = (u16)pack_f16((float)(i / 16) - (float)(i % 16), 0);
            for (u32 i = t; i < 128; i += 64) b[i] = (u16)pack_f16((float)((i % 16 + 2 * (i / 16)) % 5) - 1, 0);
            __syncthreads();
            if (t >= 32) return;
            u32 ra[4], rb[4]; float c[4] = {0, 0, 0, 0};
            load_matrices(ra, a + t % 16 * 16 + t / 16 * 8);
            load_matrices(rb, b + t % 8 * 16 + t / 8 % 2 * 8);
            multiply_f16(c, ra, rb[0], rb[1]);
            out[t] = c[0] + 1000 * c[1]; out[t + 32] = c[2] + 1000 * c[3];";
        let Some(emulator) = Emulator::or_skip("mistakes", 1) else { return };
        let out = run(&emulator, PRODUCT).unwrap();
        let product = |row: i32, column: i32| -> f32 {
            (0..16).map(|k| ((row - k) * ((k + 2 * column) % 5 - 1)) as f32).sum()
        };
        for lane in 0..32 {
            let (g, c) = (lane / 4, lane % 4);
            let pair = |row| product(row, 2 * c) + 1000.0 * product(row, 2 * c + 1);
            assert_eq!((out[lane as usize], out[32 + lane as usize]), (pair(g), pair(g + 8)), "lane {lane}");
        }
    }

    #[test]
    fn graphs_run_what_was_recorded_when_they_are_replayed() {
        let Some(emulator) = Emulator::or_skip("graphs", 1) else { return };
        let stream = emulator.stream().unwrap();
        let memory = emulator.allocate(8).unwrap();
        let (one, two) = (memory.span().part(0..4), memory.span().part(4..8));
        let read = || {
            let mut out = [0u32; 2];
            emulator.download(&stream, memory.span(), bytes_of_mut(&mut out)).unwrap();
            out
        };
        let graph = emulator
            .capture(&stream, &mut || {
                emulator.copy(&stream, one, two)?;
                emulator.fill(&stream, one, 0)
            })
            .unwrap();
        emulator.upload(&stream, bytes_of(&[7u32, 9]), memory.span()).unwrap();
        assert_eq!(read(), [7, 9], "nothing ran yet");
        emulator.replay(&stream, &graph).unwrap();
        assert_eq!(read(), [0, 7]);
        let refused = emulator.capture(&stream, &mut || emulator.synchronise(&stream)).err().unwrap();
        assert!(matches!(refused, GpuError::Refused { .. }));
        emulator.synchronise(&stream).unwrap();
    }

    #[test]
    fn what_a_driver_refuses_is_refused() {
        let Some(emulator) = Emulator::or_skip("refusals", 1) else { return };
        let stream = emulator.stream().unwrap();
        let memory = emulator.allocate(64).unwrap();
        let too_much = emulator.allocate(2 << 30).err().unwrap();
        assert!(matches!(too_much, GpuError::OutOfMemory { wanted_bytes: 2_147_483_648, .. }));
        let overlap = emulator.copy(&stream, memory.span().part(0..32), memory.span().part(16..48));
        assert!(overlap.unwrap_err().to_string().contains("overlap"));
        assert!(emulator.upload(&stream, &[0; 65], memory.span()).is_err());
        let module = emulator.load(&Module::new(file("out[t] = x[t];"), vec![])).unwrap();
        static OTHER: Entry = Entry { name: "other", parameters: &[] };
        assert!(emulator.kernel(&module, &OTHER, 0).err().unwrap().to_string().contains("no such kernel"));
        static MISMATCH: Entry = Entry {
            name: "mistake",
            parameters: &[
                Parameter { name: "out", kind: ParameterKind::Pointer },
                Parameter { name: "x", kind: ParameterKind::U32 },
            ],
        };
        let mismatch = emulator.kernel(&module, &MISMATCH, 0).err().unwrap().to_string();
        assert!(mismatch.contains("the source takes pp, the table says pu"), "{mismatch}");
        let broken = emulator.load(&Module::new(file("out[t] = y[t];"), vec![])).err().unwrap();
        assert!(matches!(&broken, GpuError::Compile { log, .. } if log.contains("mistake.cu")), "{broken}");
        assert!(!broken.is_sticky());
    }
}
