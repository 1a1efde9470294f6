//! From kernel source to machine code, with NVIDIA's run-time compiler and a cache on disk.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::ptr::{null, null_mut};

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use rayon::prelude::*;

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

    /// Machine code for a GPU; compiled once for each text, options, target and version of the compiler. For a GPU
    /// that is newer than the compiler it is PTX, which the driver translates.
    ///
    /// # Errors
    /// [`GpuError::Compile`] with the compiler's log, or what it cannot compile for.
    pub fn machine_code(&self, module: &Module, arch: Arch) -> Result<Vec<u8>, GpuError> {
        let target = target(arch, &known_targets());
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
        modules.par_iter().try_for_each(|module| self.machine_code(module, arch).map(drop))
    }

    /// A compiler that is older than the GPU says nothing but that it does not know the option.
    fn explain(&self, arch: Arch, log: String) -> String {
        let known = known_targets();
        match known.iter().any(|other| *other <= arch) || known.is_empty() {
            true => log,
            false => format!(
                "NVRTC {} knows no GPU of compute capability {arch}; install another one (pip install \
                 nvidia-cuda-nvrtc)",
                self.version
            ),
        }
    }
}

/// NVRTC's name of the target: the GPU itself if the compiler knows it, else the newest instruction set before it.
fn target(arch: Arch, known: &[Arch]) -> String {
    match known.iter().filter(|other| **other < arch).max() {
        Some(newest) if !known.contains(&arch) => format!("compute_{}", newest.0),
        _ => arch.target(),
    }
}

/// Compute capabilities that the compiler knows; none if it does not tell.
fn known_targets() -> Vec<Arch> {
    targets().unwrap_or_default().into_iter().map(Arch).collect()
}

/// As 90 for 9.0.
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
        let code = output(program.0, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN);
        // A target that is only an instruction set has none; the text ends with a zero, as the driver wants it.
        let code = code.or_else(|| output(program.0, sys::nvrtcGetPTXSize, sys::nvrtcGetPTX));
        code.ok_or_else(|| "the compiler gave no machine code".to_owned())
    }
}

/// One of the program's outputs, if it is there.
///
/// # Safety
/// The program must be alive, and the two functions tell size and content of the same.
unsafe fn output(
    program: nvrtcProgram,
    size: unsafe fn(nvrtcProgram, *mut usize) -> nvrtcResult,
    get: unsafe fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
) -> Option<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the caller's, and the buffer is as long as the library says.
    unsafe {
        ok(size(program, &mut bytes))?;
        let mut code = vec![0u8; bytes];
        ok(get(program, code.as_mut_ptr().cast()))?;
        (!code.is_empty()).then_some(code)
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

    #[test]
    fn a_gpu_newer_than_the_compiler_gets_the_newest_instructions_before_it() {
        let known = [Arch(75), Arch(80), Arch(89), Arch(90)];
        assert_eq!(target(Arch(90), &known), "sm_90a");
        assert_eq!(target(Arch(80), &known), "sm_80");
        assert_eq!(target(Arch(86), &known), "compute_80");
        assert_eq!(target(Arch(120), &known), "compute_90");
        assert_eq!(target(Arch(20), &known), "sm_20", "the compiler says why not");
        assert_eq!(target(Arch(90), &[]), "sm_90a");
    }

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

        // A GPU that this compiler cannot know gets text that its driver translates.
        let text = compiler.machine_code(&module, Arch(990)).unwrap();
        assert_eq!(text.last(), Some(&0));
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(".target sm_") && text.contains(".entry embed"), "{}", &text[..200]);
    }
}
