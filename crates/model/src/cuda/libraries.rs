//! Where the driver, NVRTC and cuBLASLt lie on this machine.
//!
//! Nothing is linked: a machine without any of them runs the same binary. The driver comes with the operating
//! system. The other two come with a toolkit or with Python packages, which is where most machines with a GPU
//! have them: so their folders are searched besides what the loader knows. A library is loaded by its path
//! once; the loader then answers to its name for everybody in the process, which is how `cudarc` finds it.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsString, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};

use cudarc::{cublaslt, driver, nvrtc};

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    Driver,
    Nvrtc,
    CublasLt,
}

impl Library {
    /// Without the version behind it.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so",
            Self::Nvrtc => "libnvrtc.so",
            Self::CublasLt => "libcublasLt.so",
        }
    }

    /// As people call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Nvrtc => "NVRTC",
            Self::CublasLt => "cuBLASLt",
        }
    }

    /// Whether the loader finds it by a name that the bindings know. If so the bindings take it now: cuBLASLt is so
    /// large that opening it only to look would be felt.
    fn answers(self) -> bool {
        // SAFETY: opens NVIDIA's libraries, whose initialisers are trusted as the driver is.
        unsafe {
            match self {
                Self::Driver => driver::sys::is_culib_present() && taken(driver::sys::culib()),
                Self::Nvrtc => nvrtc::sys::is_culib_present() && taken(nvrtc::sys::culib()),
                Self::CublasLt => cublaslt::sys::is_culib_present() && taken(cublaslt::sys::culib()),
            }
        }
    }

    /// The file that answers; to be asked of a library that is there.
    fn path(self) -> Option<PathBuf> {
        // SAFETY: the libraries are there, and the symbols' addresses are not called.
        unsafe {
            let (library, symbol) = match self {
                Self::Driver => (driver::sys::culib(), c"cuInit"),
                Self::Nvrtc => (nvrtc::sys::culib(), c"nvrtcVersion"),
                Self::CublasLt => (cublaslt::sys::culib(), c"cublasLtGetVersion"),
            };
            let address = *library.get::<*const c_void>(symbol.to_bytes()).ok()?;
            let mut info = std::mem::zeroed::<libc::Dl_info>();
            if libc::dladdr(address, &mut info) == 0 || info.dli_fname.is_null() {
                return None;
            }
            let name = CStr::from_ptr(info.dli_fname).to_str().ok()?;
            Some(std::fs::canonicalize(name).unwrap_or_else(|_| name.into()))
        }
    }
}

/// A library that is loaded for good.
fn taken<L>(_: &'static L) -> bool {
    true
}

/// Why there is no GPU to compute on, in one line that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error(
        "no NVIDIA driver (libcuda.so.1) was found; install it, or give the container its GPU (docker run --gpus all)"
    )]
    Driver,
    #[error("the NVIDIA driver finds no GPU ({0}); see whether nvidia-smi does, and CUDA_VISIBLE_DEVICES")]
    Gpu(String),
    #[error(
        "{}.{major} was not found; pip install {package}, or name its folder with --cuda-lib-dir",
        library.file_name()
    )]
    Library { library: Library, major: u32, package: &'static str },
    #[error(
        "{} of CUDA {version} is newer than the driver, which is made for {driver}; install one of CUDA {}, or a \
         newer driver",
        library.file_name(), driver.major
    )]
    DriverTooOld { library: Library, version: Version, driver: Version },
    #[error("--cuda-lib-dir {} has no {}", folder.display(), library.file_name())]
    NotInFolder { library: Library, folder: PathBuf },
    #[error(
        "the loader takes {} in place of the one in --cuda-lib-dir {}; set LD_LIBRARY_PATH to that folder too",
        path.display(), folder.display()
    )]
    NotTaken { folder: PathBuf, path: PathBuf },
}

/// Of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A library that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub library: Library,
    pub version: Version,
    /// `None` where the loader does not tell.
    pub path: Option<PathBuf>,
}

/// All that CUDA needs, loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Libraries {
    /// Its version is the newest CUDA that it is made for.
    pub driver: Found,
    pub nvrtc: Found,
    pub cublas_lt: Found,
}

impl Libraries {
    /// Finds and loads them; in `folder` first, where one is given.
    ///
    /// # Errors
    /// The first one that is missing.
    pub fn find(folder: Option<&Path>) -> Result<Self, Missing> {
        let driver = find_driver()?;
        let folders = Folders::of_this_machine(folder);
        let nvrtc = folders.find(Library::Nvrtc, driver.version)?;
        let cublas_lt = folders.find(Library::CublasLt, driver.version)?;
        Ok(Self { driver, nvrtc, cublas_lt })
    }

    /// In the order of use.
    pub fn all(&self) -> [&Found; 3] {
        [&self.driver, &self.nvrtc, &self.cublas_lt]
    }
}

/// NVRTC alone, which compiles without a driver: for tests and for the doctor.
///
/// # Errors
/// If it is missing.
pub fn find_nvrtc(folder: Option<&Path>) -> Result<Found, Missing> {
    Folders::of_this_machine(folder).find(Library::Nvrtc, NEWEST)
}

const NEWEST: Version = Version { major: 13, minor: 99 };
/// The loader's names that `cudarc` knows end in these.
const MAJORS: [u32; 2] = [13, 12];

/// The driver alone: it tells whether there is a GPU at all.
pub(super) fn find_driver() -> Result<Found, Missing> {
    // Where containers and Windows' Linux keep it and the loader may not look.
    const PLACES: [&str; 3] = ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64", "/run/opengl-driver/lib"];
    let mut places = PLACES.iter().map(|place| Path::new(place).join("libcuda.so.1"));
    while !Library::Driver.answers() {
        let Some(place) = places.next() else { return Err(Missing::Driver) };
        open(&place);
    }
    let mut number = 0;
    // SAFETY: the library is there, and may be asked this before it is initialised.
    if unsafe { driver::sys::cuDriverGetVersion(&mut number) } != driver::sys::CUresult::CUDA_SUCCESS {
        return Err(Missing::Driver);
    }
    let version = Version { major: number as u32 / 1000, minor: number as u32 % 1000 / 10 };
    Ok(Found { library: Library::Driver, version, path: Library::Driver.path() })
}

/// Where libraries may lie, likeliest first.
struct Folders {
    /// Named by the user: nothing else is taken.
    given: Option<PathBuf>,
    searched: Vec<PathBuf>,
}

impl Folders {
    fn of_this_machine(given: Option<&Path>) -> Self {
        let searched = searched_folders(|name| std::env::var_os(name));
        Self { given: given.map(Path::to_owned), searched }
    }

    /// Loads a library that the driver can work with.
    fn find(&self, library: Library, driver: Version) -> Result<Found, Missing> {
        match &self.given {
            Some(folder) => {
                let file = newest(library, std::slice::from_ref(folder), driver)
                    .ok_or_else(|| Missing::NotInFolder { library, folder: folder.clone() })?;
                open_with_parts(&file);
            }
            // What the loader finds by itself is what the machine's owner set up.
            None if library.answers() => {}
            None => {
                let file = newest(library, &self.searched, driver).ok_or_else(|| missing(library, driver))?;
                open_with_parts(&file);
            }
        }
        if !library.answers() {
            return Err(missing(library, driver));
        }
        let path = library.path();
        if let (Some(folder), Some(path)) = (&self.given, &path) {
            check_taken(folder, path)?;
        }
        let version = version(library);
        if version.major > driver.major {
            return Err(Missing::DriverTooOld { library, version, driver });
        }
        Ok(Found { library, version, path })
    }
}

/// The bindings ask the loader by name, and a toolkit that it knows of answers to another name first.
fn check_taken(folder: &Path, path: &Path) -> Result<(), Missing> {
    let folder_of = path.parent().unwrap_or(path);
    match std::fs::canonicalize(folder) {
        // A file of the folder may be a link to elsewhere.
        Ok(real) if folder_of != real && !links_to(&real, path) => {
            Err(Missing::NotTaken { folder: folder.to_owned(), path: path.to_owned() })
        }
        _ => Ok(()),
    }
}

fn links_to(folder: &Path, path: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|file| std::fs::canonicalize(file).is_ok_and(|real| real == path))
}

fn missing(library: Library, driver: Version) -> Missing {
    let major = driver.major.min(MAJORS[0]);
    let package = match (library, major) {
        (Library::Nvrtc, 12) => "nvidia-cuda-nvrtc-cu12",
        (Library::Nvrtc, _) => "nvidia-cuda-nvrtc",
        (Library::CublasLt | Library::Driver, 12) => "nvidia-cublas-cu12",
        (Library::CublasLt | Library::Driver, _) => "nvidia-cublas",
    };
    Missing::Library { library, major, package }
}

/// Of NVRTC or cuBLASLt.
fn version(library: Library) -> Version {
    match library {
        Library::Nvrtc => {
            let (mut major, mut minor): (c_int, c_int) = (0, 0);
            // SAFETY: the library is there.
            let _ = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
            Version { major: major as u32, minor: minor as u32 }
        }
        Library::CublasLt | Library::Driver => {
            // Written 130200; before 13, cuBLAS 12.9.1 is 120901.
            // SAFETY: the library is there.
            let number = unsafe { cublaslt::sys::cublasLtGetVersion() } as u32;
            Version { major: number / 10_000, minor: number / 100 % 100 }
        }
    }
}

/// The file of the newest version that is no newer than the driver's; the first such folder of several.
fn newest(library: Library, folders: &[PathBuf], driver: Version) -> Option<PathBuf> {
    let majors = MAJORS.into_iter().filter(|major| *major <= driver.major);
    let file = |major: u32| {
        let name = format!("{}.{major}", library.file_name());
        folders.iter().map(|folder| folder.join(&name)).find(|file| file.exists())
    };
    majors.into_iter().find_map(file)
}

/// The folders of toolkits and Python packages. `variable` gives the environment's variables.
fn searched_folders(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = Vec::new();
    prefixes.extend(["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| Some(variable(name)?.into())));
    // A Python that runs as `python3` keeps its packages beside its own folder.
    let path = variable("PATH").unwrap_or_default();
    prefixes.extend(std::env::split_paths(&path).flat_map(|bin| prefixes_of_python(&bin)));
    prefixes.extend(variable("HOME").map(|home| PathBuf::from(home).join(".local")));
    let mut folders = Vec::new();
    for prefix in prefixes {
        for packages in ["site-packages", "dist-packages"] {
            folders.extend(expand(&prefix, &["lib", "python3*", packages, "nvidia", "*", "lib"]));
        }
    }
    folders.extend(variable("CONDA_PREFIX").map(|prefix| PathBuf::from(prefix).join("lib")));
    folders.extend(variable("CUDA_HOME").map(|home| PathBuf::from(home).join("lib64")));
    folders.extend(expand(Path::new("/usr/local"), &["cuda*", "lib64"]));
    folders.extend(expand(Path::new("/usr/local"), &["cuda*", "targets", "*", "lib"]));
    let mut seen = std::collections::HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

/// Where a `python3` in this folder may keep its packages: beside the folder, and beside whatever the name is
/// linked to, link by link, because that of an environment is itself a link to the system's.
fn prefixes_of_python(bin: &Path) -> Vec<PathBuf> {
    const MOST_LINKS: usize = 8;
    let mut prefixes = Vec::new();
    let mut file = bin.join("python3");
    for _ in 0..MOST_LINKS {
        prefixes.extend(file.parent().and_then(Path::parent).map(Path::to_owned));
        let Ok(target) = std::fs::read_link(&file) else { break };
        file = file.parent().unwrap_or(Path::new("/")).join(target);
    }
    prefixes
}

/// The folders below `root` whose names match, one part a level; a `*` at the end of a part stands for
/// anything.
fn expand(root: &Path, parts: &[&str]) -> Vec<PathBuf> {
    let Some((part, rest)) = parts.split_first() else { return vec![root.to_owned()] };
    let Some(start) = part.strip_suffix('*') else {
        let next = root.join(part);
        return if next.is_dir() { expand(&next, rest) } else { Vec::new() };
    };
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut names: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start) && entry.path().is_dir())
        .map(|entry| entry.path())
        .collect();
    // The highest version first.
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.iter().flat_map(|next| expand(next, rest)).collect()
}

/// NVRTC opens a part of itself by name when it compiles first: found here, because it lies beside it.
fn open_with_parts(file: &Path) {
    let folder = file.parent().unwrap_or(Path::new("/"));
    if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc.")) {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let parts = entries.map(|entry| entry.path());
        let is_part = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so"))
        };
        parts.filter(is_part).for_each(|part| open(&part));
    }
    open(file);
}

/// Loads a library for good. Whether it worked shows when it is asked for by name.
fn open(file: &Path) {
    let Ok(name) = CString::new(file.as_os_str().as_encoded_bytes()) else { return };
    // SAFETY: NVIDIA's libraries, from the folders where they are installed or the user said they are.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        tracing::debug!(file = %file.display(), "cannot be loaded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, file: &str) {
        let file = root.join(file);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "").unwrap();
    }

    #[test]
    fn packages_of_the_python_in_use_are_searched_first() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for file in [
            "venv/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "venv/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
            "other/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "home/.local/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ] {
            touch(root.path(), file);
        }
        std::fs::create_dir_all(at("other/bin")).unwrap();
        let folders = searched_folders(|name| match name {
            "VIRTUAL_ENV" => Some(at("venv").into()),
            "PATH" => Some(at("other/bin").into()),
            "HOME" => Some(at("home").into()),
            _ => None,
        });
        let expected = [
            "venv/lib/python3.11/site-packages/nvidia/cublas/lib",
            "venv/lib/python3.11/site-packages/nvidia/cu13/lib",
            "other/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib",
            "home/.local/lib/python3.12/site-packages/nvidia/cu13/lib",
        ];
        assert!(folders.starts_with(&expected.map(at)), "{folders:?}");

        let driver = |major| Version { major, minor: 0 };
        let found = newest(Library::Nvrtc, &folders, driver(13)).unwrap();
        assert_eq!(found, at("venv/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13"));
        let found = newest(Library::Nvrtc, &folders, driver(12)).unwrap();
        assert!(found.ends_with("cuda_nvrtc/lib/libnvrtc.so.12"), "no newer than the driver: {found:?}");
        assert_eq!(newest(Library::Nvrtc, &folders, driver(11)), None);
    }

    #[test]
    fn the_packages_of_a_python_behind_a_link_are_found() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        touch(root.path(), "opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13");
        touch(root.path(), "usr/bin/python3.12");
        std::fs::create_dir_all(at("opt/venv/bin")).unwrap();
        std::fs::create_dir_all(at("local/bin")).unwrap();
        std::os::unix::fs::symlink(at("usr/bin/python3.12"), at("opt/venv/bin/python3")).unwrap();
        std::os::unix::fs::symlink("../../opt/venv/bin/python3", at("local/bin/python3")).unwrap();
        let folders = searched_folders(|name| (name == "PATH").then(|| at("local/bin").into()));
        let found = newest(Library::Nvrtc, &folders, Version { major: 13, minor: 0 }).unwrap();
        let expected = at("opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13");
        assert_eq!(std::fs::canonicalize(found).unwrap(), std::fs::canonicalize(expected).unwrap());
    }

    #[test]
    fn a_folder_that_the_loader_passes_over_is_told() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| std::fs::canonicalize(root.path()).unwrap().join(path);
        touch(root.path(), "given/libnvrtc.so.12");
        touch(root.path(), "elsewhere/libnvrtc.so.13");
        assert_eq!(check_taken(&at("given"), &at("given/libnvrtc.so.12")), Ok(()));
        let error = check_taken(&at("given"), &at("elsewhere/libnvrtc.so.13")).unwrap_err().to_string();
        assert!(error.contains("LD_LIBRARY_PATH") && error.contains("elsewhere"), "{error}");
        std::os::unix::fs::symlink(at("elsewhere/libnvrtc.so.13"), at("given/libnvrtc.so.13")).unwrap();
        assert_eq!(check_taken(&at("given"), &at("elsewhere/libnvrtc.so.13")), Ok(()));
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let text = missing(Library::Nvrtc, Version { major: 12, minor: 8 }).to_string();
        assert!(
            text.contains("libnvrtc.so.12") && text.contains("pip install nvidia-cuda-nvrtc-cu12"),
            "{text}"
        );
        let text = missing(Library::CublasLt, Version { major: 14, minor: 0 }).to_string();
        assert!(text.contains("libcublasLt.so.13") && text.contains("nvidia-cublas,"), "{text}");
        let empty = tempfile::tempdir().unwrap();
        let error = find_nvrtc(Some(empty.path())).unwrap_err();
        assert!(error.to_string().contains("has no libnvrtc.so"), "{error}");
    }

    /// On a machine with a driver there is nothing to see here; CI has none.
    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        match Libraries::find(None) {
            Err(error @ Missing::Driver) => assert!(error.to_string().contains("libcuda.so.1"), "{error}"),
            Err(error) => assert!(Library::Driver.answers(), "{error}"),
            Ok(libraries) => assert!(libraries.driver.version.major >= 12),
        }
    }
}
