//! From kernel source to machine code, with NVIDIA's run-time compiler and a cache on disk.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::ptr::{null, null_mut};

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::disk_cache::{DiskCache, Key};
use super::gpu::{Arch, GpuError};
use super::kernels::Module;
use super::libraries::Version;

/// NVRTC, which must have been loaded ([`super::libraries`]).
#[derive(Debug)]
pub struct Compiler {
    version: Version,
    cache: Option<DiskCache>,
}

impl Compiler {
    /// With the user's cache, or with none where the user has no folder for it.
    pub fn new(version: Version) -> Self {
        Self::with_cache(version, DiskCache::of_user("kernels", "cubin"))
    }

    pub fn with_cache(version: Version, cache: Option<DiskCache>) -> Self {
        Self { version, cache }
    }

    /// Machine code for a GPU; compiled once for each text, options, target and version of the compiler.
    ///
    /// # Errors
    /// [`GpuError::Compile`] with the compiler's log, or what it cannot compile for.
    pub fn machine_code(&self, module: &Module, arch: Arch) -> Result<Vec<u8>, GpuError> {
        let target = arch.target();
        let (source, options) = (module.source(), module.options(&target));
        let key = Key::of(&[&source, &options.join("\n"), &self.version.to_string()]);
        if let Some(code) = self.cache.as_ref().and_then(|cache| cache.get(key)) {
            return Ok(code);
        }
        let failed = |log| GpuError::Compile { file: module.file.name, target: target.clone(), log };
        let start = std::time::Instant::now();
        let code =
            compile(&source, module.file.name, &options).map_err(|log| failed(self.explain(arch, log)))?;
        tracing::debug!(kernels = module.title(), seconds = start.elapsed().as_secs_f64(), "compiled");
        if let Some(cache) = &self.cache {
            cache.put(key, &code);
        }
        Ok(code)
    }

    /// Compiles several modules at once, so that they come from the cache afterwards. Does nothing without a
    /// cache.
    ///
    /// # Errors
    /// As [`Compiler::machine_code`].
    pub fn prepare(&self, modules: &[Module], arch: Arch) -> Result<(), GpuError> {
        if self.cache.is_none() {
            return Ok(());
        }
        std::thread::scope(|scope| {
            let one = |module| scope.spawn(move || self.machine_code(module, arch).map(drop));
            let threads: Vec<_> = modules.iter().map(one).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })
    }

    /// A compiler that is older than the GPU says nothing but that it does not know the option.
    fn explain(&self, arch: Arch, log: String) -> String {
        match targets() {
            Some(targets) if !targets.contains(&arch.0) => format!(
                "NVRTC {} knows no GPU of compute capability {arch}; install a newer one (pip install \
                 nvidia-cuda-nvrtc)",
                self.version
            ),
            _ => log,
        }
    }
}

/// Compute capabilities that the compiler knows, as 90 for 9.0.
fn targets() -> Option<Vec<u32>> {
    let mut count = 0;
    // SAFETY: the library is there; the list is as long as it says.
    unsafe {
        ok(sys::nvrtcGetNumSupportedArchs(&mut count))?;
        let mut targets = vec![0 as c_int; usize::try_from(count).ok()?];
        ok(sys::nvrtcGetSupportedArchs(targets.as_mut_ptr()))?;
        Some(targets.into_iter().map(|target| target as u32).collect())
    }
}

fn ok(result: nvrtcResult) -> Option<()> {
    (result == nvrtcResult::NVRTC_SUCCESS).then_some(())
}

/// A program that is destroyed when dropped.
struct Program(nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `compile` and not destroyed elsewhere.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// Machine code, or the compiler's log.
fn compile(source: &str, name: &str, options: &[String]) -> Result<Vec<u8>, String> {
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (source, name) = (text(source)?, text(name)?);
    let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(null_mut());
    // SAFETY: all strings are terminated and outlive the calls; no headers are given.
    unsafe {
        let created =
            sys::nvrtcCreateProgram(&mut program.0, source.as_ptr(), name.as_ptr(), 0, null(), null());
        if created != nvrtcResult::NVRTC_SUCCESS {
            return Err(format!("{created:?}"));
        }
        let compiled = sys::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr());
        if compiled != nvrtcResult::NVRTC_SUCCESS {
            return Err(format!("{compiled:?}: {}", log(program.0)));
        }
        let mut bytes = 0;
        let code = ok(sys::nvrtcGetCUBINSize(program.0, &mut bytes)).and_then(|()| {
            let mut code = vec![0u8; bytes];
            ok(sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast())).map(|()| code)
        });
        code.filter(|code| !code.is_empty()).ok_or_else(|| "the compiler gave no machine code".to_owned())
    }
}

/// # Safety
/// The program must be alive.
unsafe fn log(program: nvrtcProgram) -> String {
    let mut bytes = 0;
    // SAFETY: the caller's, and the text is as long as it says.
    unsafe {
        if ok(sys::nvrtcGetProgramLogSize(program, &mut bytes)).is_none() {
            return String::new();
        }
        let mut text = vec![0u8; bytes];
        let _ = sys::nvrtcGetProgramLog(program, text.as_mut_ptr().cast());
        String::from_utf8_lossy(&text).trim_end_matches('\0').trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::super::kernels::ROWS;
    use super::super::libraries;
    use super::*;

    /// With `SERVELAB_NVRTC` as for the test of all kernels (`just kernels`).
    #[test]
    fn the_second_time_the_machine_code_comes_from_disk() {
        let Some(folder) = std::env::var_os("SERVELAB_NVRTC") else {
            let _ = writeln!(std::io::stderr(), "SKIPPED the test of NVRTC's cache: set SERVELAB_NVRTC");
            return;
        };
        let found = libraries::find_nvrtc(Some(Path::new(&folder))).unwrap();
        assert!(found.path.unwrap().starts_with(std::fs::canonicalize(&folder).unwrap()));
        let cache = tempfile::tempdir().unwrap();
        let disk = DiskCache::new(cache.path().to_owned(), "cubin");
        let compiler = Compiler::with_cache(found.version, Some(disk));
        let module = Module::new(&ROWS, vec![]);
        compiler.prepare(&[module.clone(), module.clone()], Arch(90)).unwrap();
        let code = compiler.machine_code(&module, Arch(90)).unwrap();
        assert!(code.starts_with(b"\x7fELF"));
        let files = || std::fs::read_dir(cache.path()).unwrap().count();
        assert_eq!(files(), 1);
        assert_eq!(compiler.machine_code(&module, Arch(80)).map(|other| other == code), Ok(false));
        assert_eq!(files(), 2);
        // A version that does not exist finds nothing in the cache; a damaged file is replaced.
        for entry in std::fs::read_dir(cache.path()).unwrap() {
            std::fs::write(entry.unwrap().path(), "damaged").unwrap();
        }
        assert_eq!(compiler.machine_code(&module, Arch(90)), Ok(code));

        let error = compiler.machine_code(&module, Arch(20)).unwrap_err().to_string();
        assert!(error.contains("knows no GPU of compute capability 2.0"), "{error}");
    }
}
