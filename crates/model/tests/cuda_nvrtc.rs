//! Every kernel as NVIDIA's compiler sees it, where there is no GPU: it compiles to machine code for each
//! architecture that is served on, spills no register, fits the shared memory, and takes the parameters
//! that the table says.
//!
//! Runs when `SERVELAB_NVRTC` names the folder of libnvrtc.so (`just kernels`). What is compiled: every kernel for
//! all four architectures; attention and cache writes in every format and head size, each with three pairs of group
//! and block size for `sm_90a` and one for the others. `SERVELAB_NVRTC_EVERY=1` takes all thirty pairs everywhere.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]
#![allow(clippy::print_stdout, reason = "the table of registers is what `just kernels` is run for")]
#![allow(unsafe_code, reason = "a C library is called")]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

use servelab_model::cuda::geometry::{self, DecodeTile, PrefillTile};
use servelab_model::cuda::gpu::{Arch, GpuInfo, Launch};
use servelab_model::cuda::kernels::{
    self, BLOCK_SIZES, Element, Entry, HEAD_DIMS, KvElement, Module, ParameterKind, Specialisation,
};

/// What the CUDA C++ programming guide's table of compute capabilities says of shared memory, in KiB: of a block
/// and of a multiprocessor.
const ARCHITECTURES: [(u32, u32, u32); 4] = [(80, 163, 164), (89, 99, 100), (90, 227, 228), (100, 227, 228)];

#[test]
fn every_kernel_compiles_without_spills_and_takes_what_the_table_says() {
    let Some(folder) = std::env::var_os("SERVELAB_NVRTC") else {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED the NVRTC test: set SERVELAB_NVRTC to the folder of libnvrtc.so, or run `just kernels`"
        );
        return;
    };
    let nvrtc = &Nvrtc::open(Path::new(&folder));
    let jobs: Vec<Job> = ARCHITECTURES.into_iter().flat_map(jobs).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = &AtomicUsize::new(0);
    let tables: Vec<Registers> = std::thread::scope(|scope| {
        let work = || {
            let mut registers = Registers::new();
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                job.compile(nvrtc, &mut registers);
            }
            registers
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut most = Registers::new();
    for (key, (modules, registers)) in tables.into_iter().flatten() {
        let (all_modules, all_registers) = most.entry(key).or_default();
        (*all_modules, *all_registers) = (*all_modules + modules, registers.max(*all_registers));
    }
    println!(
        "{} modules; of each kernel how often it was compiled, and most registers of a thread:",
        jobs.len()
    );
    for ((arch, kernel), (modules, registers)) in &most {
        println!("  sm_{arch:<4} {kernel:<18} {modules:>4} {registers:>4}");
    }
    for (arch, ..) in ARCHITECTURES {
        for entry in kernels::FILES.iter().flat_map(|file| file.entries) {
            let is_shipped = Arch(arch).has_fp8() || !kernels::FP8.entries.contains(entry);
            assert_eq!(most.contains_key(&(arch, entry.name)), is_shipped, "{} for sm_{arch}", entry.name);
        }
    }
}

/// By architecture and kernel: compiled modules, and most registers of a thread.
type Registers = BTreeMap<(u32, &'static str), (usize, u32)>;

/// One module for one architecture, with the launches that need shared memory or many registers.
struct Job {
    info: GpuInfo,
    module: Module,
    launches: Vec<(&'static str, Launch)>,
}

impl Job {
    fn compile(&self, nvrtc: &Nvrtc, registers: &mut Registers) {
        let Self { info, module, launches } = self;
        let found = nvrtc.compile(module, &info.arch.target());
        let title = format!("{} for {}", module.title(), info.arch.target());
        let output = found.unwrap_or_else(|log| panic!("{title}:\n{log}"));
        let report = Report::read(&output.log);
        assert!(report.spilled_bytes == 0, "{title} spills:\n{}", output.log);
        for entry in module.file.entries {
            assert_eq!(parameters(&output.ptx, entry.name), expected(entry), "{title}, {}", entry.name);
            let used = &report.kernels[entry.name];
            let (modules, most) = registers.entry((info.arch.0, entry.name)).or_default();
            (*modules, *most) = (*modules + 1, used.registers.max(*most));
            if let Some((_, launch)) = launches.iter().find(|(name, _)| *name == entry.name) {
                used.fits(launch, info, &title);
            }
        }
    }
}

fn gpu(arch: u32, per_block: u32, per_multiprocessor: u32) -> GpuInfo {
    GpuInfo {
        name: format!("sm_{arch}"),
        arch: Arch(arch),
        multiprocessors: 1,
        shared_bytes_per_block: per_block << 10,
        shared_bytes_per_multiprocessor: per_multiprocessor << 10,
        l2_bytes: 0,
        memory_bytes: 0,
    }
}

/// What is compiled for one architecture.
fn jobs((arch, per_block, per_multiprocessor): (u32, u32, u32)) -> Vec<Job> {
    let info = gpu(arch, per_block, per_multiprocessor);
    let job = |(module, launches)| Job { info: info.clone(), module, launches };
    modules(&info).into_iter().map(job).collect()
}

fn modules(info: &GpuInfo) -> Vec<(Module, Vec<(&'static str, Launch)>)> {
    let mut all = Vec::new();
    for specialisation in specialisations(info) {
        let decode = geometry::decode_launch(info, &specialisation);
        let prefill = geometry::prefill_launch(1, 1, &specialisation);
        all.push((specialisation.decode(), vec![("decode_attention", decode)]));
        all.push((specialisation.prefill(), vec![("prefill_attention", prefill)]));
        all.push((specialisation.rope(), vec![("rope_and_cache", geometry::rope_launch(1, 32, 8))]));
    }
    let any = specialisations(info)[0];
    for element in [Element::BF16, Element::F16] {
        for hidden in [64, 576, 896, 4096, 5120, 8192, 16_384, 32_768] {
            let specialisation = Specialisation { element, hidden, ..any };
            let launch = geometry::norm_launch(1, hidden);
            all.push((specialisation.norm(), vec![("rms_norm", launch), ("add_rms_norm", launch)]));
        }
        let specialisation = Specialisation { element, ..any };
        all.push((specialisation.silu(), vec![("silu_mul", geometry::silu_launch(1, 8))]));
        if info.arch.has_fp8() {
            all.push((specialisation.fp8(), vec![("quantise_rows", geometry::quantise_launch(1))]));
        }
    }
    all.push((any.rows(), vec![("copy_blocks", geometry::copy_blocks_launch(1, 1, 16))]));
    all.push((any.sample(), vec![("sample_rows", geometry::sample_launch(1))]));
    all
}

const GROUPS: [u32; 10] = [1, 4, 8, 2, 7, 5, 3, 6, 12, 16];

/// What the tests without a GPU take for the driver and for NVRTC has the signatures of NVIDIA's own headers, which the
/// packages bring.
#[test]
fn the_emulated_libraries_have_nvidias_signatures() {
    let Some(folder) = std::env::var_os("SERVELAB_NVRTC") else { return };
    let headers = Path::new(&folder).join("../include");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/emulator/libraries");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    for (source, defines) in [
        ("cuda.cpp", &["-DCUDA_H"][..]),
        ("nvrtc.cpp", &["-DNVRTC_H", "-DFOLDER=\"\"", "-DCXX=\"\"", "-DFLAGS=\"\""]),
    ] {
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]).args(defines);
        let output = command.arg("-I").arg(&headers).arg(sources.join(source)).output().unwrap();
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// See the top of the file.
fn specialisations(info: &GpuInfo) -> Vec<Specialisation> {
    let every = std::env::var_os("SERVELAB_NVRTC_EVERY").is_some();
    let kvs = [KvElement::Same, KvElement::E4M3];
    let formats: Vec<(Element, KvElement)> = [Element::BF16, Element::F16]
        .into_iter()
        .flat_map(|element| kvs.map(|kv| (element, kv)))
        .filter(|(_, kv)| *kv == KvElement::Same || info.arch.has_fp8())
        .collect();
    let mut all = Vec::new();
    for (format, (element, kv)) in formats.iter().enumerate() {
        for (dim, head_dim) in HEAD_DIMS.into_iter().enumerate() {
            let mut add = |group: u32, block_size: u32, head_norms: bool| {
                all.push(Specialisation {
                    element: *element,
                    kv: *kv,
                    hidden: 4096,
                    head_dim,
                    group,
                    block_size,
                    head_norms,
                    decode: DecodeTile::choose(info, head_dim, *kv),
                    prefill: PrefillTile::choose(head_dim),
                });
            };
            let shape = dim + HEAD_DIMS.len() * format;
            let mut nth = |i: usize| add(GROUPS[i % GROUPS.len()], BLOCK_SIZES[i % 3], i % 2 == 1);
            match (every, info.arch) {
                (true, _) => {
                    let pairs = GROUPS.iter().flat_map(|group| BLOCK_SIZES.map(|size| (*group, size)));
                    pairs.for_each(|(group, size)| add(group, size, group % 2 == 0));
                }
                (false, Arch(90)) => (3 * shape..3 * shape + 3).for_each(nth),
                (false, _) => nth(shape),
            }
        }
    }
    all
}

/// The kinds of a kernel's parameters as PTX declares them.
fn parameters(ptx: &str, kernel: &str) -> Vec<String> {
    let start = ptx.find(&format!(".entry {kernel}(")).unwrap_or_else(|| panic!("no entry {kernel}"));
    let list = ptx[start..].split(')').next().unwrap();
    let kind = |line: &str| line.split_whitespace().find(|word| is_type(word)).map(str::to_owned);
    list.lines().filter(|line| line.contains(".param")).filter_map(kind).collect()
}

fn is_type(word: &str) -> bool {
    [".u64", ".b64", ".u32", ".b32", ".f32"].contains(&word)
}

fn expected(entry: &Entry) -> Vec<&'static str> {
    let kind = |kind| match kind {
        ParameterKind::Pointer | ParameterKind::U64 => ".u64",
        ParameterKind::U32 => ".u32",
        ParameterKind::F32 => ".f32",
    };
    entry.parameters.iter().map(|parameter| kind(parameter.kind)).collect()
}

/// What the assembler says of a module.
#[derive(Debug, Default)]
struct Report {
    spilled_bytes: u32,
    kernels: BTreeMap<String, Used>,
}

#[derive(Debug, Default)]
struct Used {
    registers: u32,
    /// Declared in the kernel; comes on top of what the launch asks for.
    static_shared_bytes: u32,
}

impl Report {
    /// Of lines such as `Compiling entry function 'embed' for 'sm_90a'`, `0 bytes spill stores, 0 bytes spill
    /// loads` and `Used 16 registers, used 1 barriers, 64 bytes smem`.
    fn read(log: &str) -> Self {
        let mut report = Self::default();
        let mut kernel = String::new();
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                kernel = rest.split('\'').next().unwrap().to_owned();
            }
            report.spilled_bytes +=
                number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
            if line.contains("Used ") {
                let used = Used {
                    registers: number_before(line, " registers"),
                    static_shared_bytes: number_before(line, " bytes smem"),
                };
                report.kernels.insert(kernel.clone(), used);
            }
        }
        report
    }
}

fn number_before(line: &str, text: &str) -> u32 {
    let Some((before, _)) = line.split_once(text) else { return 0 };
    before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

impl Used {
    fn fits(&self, launch: &Launch, info: &GpuInfo, title: &str) {
        let shared = self.static_shared_bytes + launch.shared_bytes;
        assert!(shared <= info.shared_bytes_per_block, "{title}: {shared} bytes of shared memory");
        // Registers are given out to warps in units of 8 a thread.
        let registers = self.registers.next_multiple_of(8) * launch.block;
        // The grid of one multiprocessor is as many blocks as should fit on it.
        let blocks = if title.starts_with("decode") { launch.grid[0] } else { 1 };
        assert!(registers * blocks <= 65_536, "{title}: {registers} registers a block, {blocks} blocks");
    }
}

/// NVIDIA's run-time compiler, as far as it is needed here.
struct Nvrtc {
    library: *mut c_void,
}

// SAFETY: a handle whose functions may be called from every thread, each on its own program.
unsafe impl Sync for Nvrtc {}

type Program = *mut c_void;

struct Compiled {
    ptx: String,
    log: String,
}

impl Nvrtc {
    fn open(folder: &Path) -> Self {
        let find = |start: &str| {
            let entries =
                std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
            let mut paths = entries.map(|entry| entry.unwrap().path());
            let is_it =
                |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(start);
            paths.find(is_it).unwrap_or_else(|| panic!("no {start}* in {}", folder.display()))
        };
        // Loaded first, so that the compiler finds its own part without a search path.
        dlopen(&find("libnvrtc-builtins.so"));
        Self { library: dlopen(&find("libnvrtc.so")) }
    }

    /// # Safety
    /// `F` is the C function's type.
    unsafe fn function<F: Copy>(&self, name: &str) -> F {
        let name = CString::new(name).unwrap();
        // SAFETY: a live handle and a terminated name.
        let found = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?} in libnvrtc");
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        // SAFETY: the caller's.
        unsafe { std::mem::transmute_copy(&found) }
    }

    /// Machine code, PTX and log of a module, or the log alone if it does not compile.
    fn compile(&self, module: &Module, target: &str) -> Result<Compiled, String> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
        let source = CString::new(module.source()).unwrap();
        let name = CString::new(module.file.name).unwrap();
        let mut options = module.options(target);
        options.push("--ptxas-options=-v".to_owned());
        // A cached result has no log.
        options.push("--no-cache".to_owned());
        let options: Vec<_> = options.into_iter().map(|option| CString::new(option).unwrap()).collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: signatures are those of nvrtc.h; all strings are terminated and outlive the calls.
        unsafe {
            let create: Create = self.function("nvrtcCreateProgram");
            assert_eq!(create(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()), 0);
            let compile: Compile = self.function("nvrtcCompileProgram");
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.text(program, "nvrtcGetProgramLog");
            let output = match status {
                0 => {
                    assert!(!self.bytes(program, "nvrtcGetCUBIN").is_empty(), "no machine code");
                    Ok(Compiled { ptx: self.text(program, "nvrtcGetPTX"), log })
                }
                _ => Err(log),
            };
            let destroy: Destroy = self.function("nvrtcDestroyProgram");
            destroy(&mut program);
            output
        }
    }

    /// # Safety
    /// `name` is one of the getters whose size is told by a function of the same name with `Size`.
    unsafe fn bytes(&self, program: Program, name: &str) -> Vec<u8> {
        // SAFETY: the caller's.
        unsafe {
            let size: unsafe extern "C" fn(Program, *mut usize) -> c_int =
                self.function(&format!("{name}Size"));
            let get: unsafe extern "C" fn(Program, *mut u8) -> c_int = self.function(name);
            let mut length = 0;
            assert_eq!(size(program, &mut length), 0, "{name}Size");
            let mut bytes = vec![0; length];
            assert_eq!(get(program, bytes.as_mut_ptr()), 0, "{name}");
            bytes
        }
    }

    /// # Safety
    /// As [`Nvrtc::bytes`], and what is got is text.
    unsafe fn text(&self, program: Program, name: &str) -> String {
        // SAFETY: the caller's.
        let bytes = unsafe { self.bytes(program, name) };
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
    }
}

fn dlopen(path: &Path) -> *mut c_void {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: NVIDIA's library; its initialisers are trusted as the test's user trusts it.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    // SAFETY: after a failure `dlerror` gives a text.
    assert!(!handle.is_null(), "{}", unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy());
    handle
}
