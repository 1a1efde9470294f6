//! From a kernel file to a library, with the system's C++ compiler.

use std::ffi::{CStr, CString, c_char, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::super::kernels::Module;

const HEADER: &str = include_str!("emulator.h");
const RUNTIME: &str = include_str!("runtime.cpp");

/// Contraction of a product and a sum would round otherwise than the GPU is told to; aliasing rules are not
/// CUDA's.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    // A fortified longjmp takes jumps between fibers for an attack.
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
];

/// A call before each load and store: as GCC spells it, as Clang does, and none.
const CHECKS: &[&[&str]] = &[
    &[
        "-fsanitize=kernel-address",
        "--param=asan-instrumentation-with-call-threshold=0",
        "--param=asan-stack=0",
        "--param=asan-globals=0",
    ],
    &[
        "-fsanitize=kernel-address",
        "-mllvm",
        "-asan-instrumentation-with-call-threshold=0",
        "-mllvm",
        "-asan-stack=0",
        "-mllvm",
        "-asan-globals=0",
    ],
    &[],
];

/// The compiler of this machine and what it can do.
#[derive(Clone, Debug)]
pub struct Compiler {
    program: String,
    version: String,
    checks: &'static [&'static str],
}

impl Compiler {
    /// The one that `CXX` names, or `c++`.
    pub fn find() -> Result<Self, String> {
        static FOUND: OnceLock<Result<Compiler, String>> = OnceLock::new();
        FOUND.get_or_init(Self::probe).clone()
    }

    fn probe() -> Result<Self, String> {
        if !cfg!(target_os = "linux") {
            return Err("the emulator is written for Linux".to_owned());
        }
        let program = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let output = Command::new(&program).arg("--version").output();
        let output = output.map_err(|error| format!("no C++ compiler: {program}: {error}"))?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut compiler = Self { program, version, checks: &[] };
        let source = "int probe(int* at) { return *at; }";
        for checks in CHECKS {
            let Ok(object) = compiler.object("probe", source, checks) else { continue };
            // Some compilers take flags that they do not know.
            if checks.is_empty() || calls(&object, "__asan_load4_noabort") {
                compiler.checks = checks;
                return Ok(compiler);
            }
        }
        Err(format!("{} --version answers but it compiles nothing", compiler.program))
    }

    /// Whether loads and stores of kernels are checked.
    pub fn checks_accesses(&self) -> bool {
        !self.checks.is_empty()
    }

    /// The library of a module; compiled once for each text, also across runs.
    pub fn compile(&self, module: &Module) -> Result<Library, String> {
        let mut source = module.source_after(&format!("{HEADER}\nnamespace {{"), "emulator.h");
        source.push_str("\n}  // namespace\n");
        for entry in module.file.entries {
            source.push_str(&format!("EXPORT_KERNEL({})\n", entry.name));
        }
        let name = module.file.name.trim_end_matches(".cu");
        let kernel = self.object(name, &source, self.checks)?;
        let runtime = self.object("runtime", RUNTIME, &[])?;
        let library = self.cached(name, "so", &[&source, RUNTIME], |out| {
            let mut command = Command::new(&self.program);
            command.args(["-shared", "-Wl,-Bsymbolic"]).args([&kernel, &runtime]).arg("-o").arg(out);
            command
        })?;
        Library::open(&library)
    }

    fn object(&self, name: &str, source: &str, checks: &[&str]) -> Result<PathBuf, String> {
        let folder = folder();
        std::fs::write(folder.join("emulator.h"), HEADER).map_err(|error| error.to_string())?;
        self.cached(name, "o", &[source, HEADER, &checks.join(" ")], |out| {
            let text = out.with_extension("cpp");
            let written = std::fs::write(&text, source);
            debug_assert!(written.is_ok(), "{written:?}");
            let mut command = Command::new(&self.program);
            command.args(FLAGS).args(checks).arg("-I").arg(&folder);
            command.arg("-c").arg(text).arg("-o").arg(out);
            command
        })
    }

    /// The file that `command` makes, unless it was made before from the same `parts`.
    fn cached(
        &self,
        name: &str,
        extension: &str,
        parts: &[&str],
        command: impl FnOnce(&Path) -> Command,
    ) -> Result<PathBuf, String> {
        let mut hasher = DefaultHasher::new();
        (&self.program, &self.version, FLAGS, self.checks, parts).hash(&mut hasher);
        let stem = format!("{name}-{:016x}", hasher.finish());
        let done = folder().join(format!("{stem}.{extension}"));
        if done.exists() {
            return Ok(done);
        }
        // Another process may be making the same: each under a name of its own, and the last rename wins.
        let own = format!("{stem}-{}-{:?}.{extension}", std::process::id(), std::thread::current().id());
        let own = folder().join(own.replace(['(', ')'], ""));
        let output = command(&own).output().map_err(|error| format!("{}: {error}", self.program))?;
        let _ = std::fs::remove_file(own.with_extension("cpp"));
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        std::fs::rename(&own, &done).map_err(|error| error.to_string())?;
        Ok(done)
    }
}

/// Whether an object file names a function.
fn calls(object: &Path, function: &str) -> bool {
    let bytes = std::fs::read(object).unwrap_or_default();
    bytes.windows(function.len()).any(|window| window == function.as_bytes())
}

/// Where compiled files are kept: below the target folder.
fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulator");
    let made = std::fs::create_dir_all(&folder);
    debug_assert!(made.is_ok(), "{made:?}");
    folder
}

/// A compiled kernel file. Stays loaded until the process ends.
pub struct Library {
    handle: *mut c_void,
    pub run: unsafe extern "C" fn(*mut super::RawLaunch),
}

// SAFETY: the handle is only given to `dlsym`, which may be called from every thread.
unsafe impl Send for Library {}
// SAFETY: as above; `run_launch` takes a lock.
unsafe impl Sync for Library {}

impl Library {
    fn open(path: &Path) -> Result<Self, String> {
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: the library was compiled from our own sources; its initialisers do nothing.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failure `dlerror` gives a text.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(reason.to_string_lossy().into_owned());
        }
        let run = symbol(handle, "run_launch").ok_or("no run_launch in an emulated kernel")?;
        // SAFETY: `runtime.cpp` declares it so.
        let run =
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut super::RawLaunch)>(run) };
        Ok(Self { handle, run })
    }

    /// What calls a kernel, and the kinds of its parameters.
    pub fn entry(&self, name: &str) -> Option<(unsafe extern "C" fn(*const u64), String)> {
        let call = symbol(self.handle, &format!("call_{name}"))?;
        let signature = symbol(self.handle, &format!("signature_{name}"))?;
        // SAFETY: `EXPORT_KERNEL` of `emulator.h` declares both so, and the text is a constant.
        unsafe {
            let call = std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const u64)>(call);
            let signature =
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const c_char>(signature);
            Some((call, CStr::from_ptr(signature()).to_string_lossy().into_owned()))
        }
    }
}

fn symbol(handle: *mut c_void, name: &str) -> Option<*mut c_void> {
    let name = CString::new(name).ok()?;
    // SAFETY: a live handle and a terminated name.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
