//! Programs that find the emulated libraries in the place of NVIDIA's. Taken in by path by the tests that start them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the libraries, unless they are there; `None`, loudly, where that cannot be done. A CI that sets `CI` has what
/// it takes, and fails.
pub fn build(script: &str, into: &str) -> Option<PathBuf> {
    let reason = match Command::new(script).arg(into).output() {
        Ok(built) if built.status.success() => {
            return Some(PathBuf::from(String::from_utf8_lossy(&built.stdout).trim()));
        }
        Ok(built) => String::from_utf8_lossy(&built.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("CI").is_none(), "{script}: {reason}");
    // Not `eprintln`: what a test prints is shown only if it fails.
    let _ = writeln!(std::io::stderr(), "\nSKIPPED a test on an emulated GPU: {reason}");
    None
}

/// Lets a program find them, with these settings (`cuda.cpp`). Its cache is the folder `cache`, in which only the
/// compiled kernels are those of earlier programs: which algorithms products take is found anew.
pub fn set_up(command: &mut Command, libraries: &Path, settings: &str, cache: &Path) -> std::io::Result<()> {
    let kernels = libraries.join("kernels");
    let own = cache.join("servelab");
    std::fs::create_dir_all(&kernels)?;
    std::fs::create_dir_all(&own)?;
    std::os::unix::fs::symlink(kernels, own.join("kernels"))?;
    command.env("LD_LIBRARY_PATH", libraries).env("EMULATED_GPU", settings).env("XDG_CACHE_HOME", cache);
    Ok(())
}
