//! A GPU made of one CPU thread: runs the kernel sources as they are, checks what they touch, and is as
//! strict about launches, streams and graphs as a driver. For tests only; it does not ship.
//!
//! Integration tests take it in by path; it finds what it builds on beside itself:
//!
//! ```ignore
//! #[path = "../src/cuda/emulator/mod.rs"]
//! mod emulator;
//! use servelab_model::cuda::{gpu, kernels};
//! ```
//!
//! [`compiler`] turns a kernel file into a library with the system's C++ compiler, `emulator.h` and
//! `runtime.cpp` are what it is compiled with. Work is done when it is put on a stream.
//!
//! The folder `libraries` has the same behind NVIDIA's own interfaces, for tests of the driver and of the program.

mod compiler;
mod memory;
mod product;

use std::ffi::CStr;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::compiler::{Compiler, Library};
use self::memory::{Allocations, Block};
use super::gpu::{
    Arch, Argument, Gpu, GpuError, GpuInfo, Launch, Memory, Pinned, Product, Span, check_arguments,
};
use super::kernels::{Entry, Module, ParameterKind};

/// See the module.
pub struct Emulator {
    info: GpuInfo,
    compiler: Compiler,
    allocations: Arc<Allocations>,
    /// The first error that a GPU would not have survived.
    lost: Mutex<Option<GpuError>>,
    seed: AtomicU64,
    conflicts: AtomicU64,
    /// After how many more launches one fails, and how.
    failure: Mutex<Option<(u32, GpuError)>>,
}

impl Emulator {
    /// An emulated GPU. `seed` decides in which order threads and blocks run.
    ///
    /// # Errors
    /// In words, if the machine has no C++ compiler.
    pub fn new(seed: u64) -> Result<Self, String> {
        let info = GpuInfo {
            name: "emulator".to_owned(),
            arch: Arch(90),
            multiprocessors: 3,
            shared_bytes_per_block: 227 << 10,
            shared_bytes_per_multiprocessor: 228 << 10,
            l2_bytes: 50 << 20,
            memory_bytes: 1 << 30,
        };
        Ok(Self {
            compiler: Compiler::find()?,
            allocations: Arc::new(Allocations::new(info.memory_bytes)),
            info,
            lost: Mutex::default(),
            seed: AtomicU64::new(seed),
            conflicts: AtomicU64::new(0),
            failure: Mutex::default(),
        })
    }

    /// The same with another compute capability.
    pub fn with_arch(mut self, arch: Arch) -> Self {
        self.info.arch = arch;
        self
    }

    /// Lets a launch fail after so many good ones. A sticky error stays; any other is the only one.
    pub fn fail_after(&self, launches: u32, error: GpuError) {
        *lock(&self.failure) = Some((launches, error));
    }

    fn count_launch(&self) -> Result<(), GpuError> {
        let mut failure = lock(&self.failure);
        match failure.take() {
            Some((0, error)) => {
                if error.is_sticky() {
                    lock(&self.lost).get_or_insert(error.clone());
                }
                Err(error)
            }
            Some((left, error)) => {
                *failure = Some((left - 1, error));
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// [`Emulator::new`], or a loud word on standard error that the test is skipped.
    pub fn or_skip(test: &str, seed: u64) -> Option<Self> {
        match Self::new(seed) {
            Ok(emulator) => Some(emulator),
            Err(reason) => {
                // Not `eprintln`: what a test prints is shown only if it fails.
                let line = format!("\nSKIPPED {test}: {reason}\n");
                let _ = std::io::stderr().write_all(line.as_bytes());
                None
            }
        }
    }

    /// Rows of matrix loads so far that lay in the banks of another row of the same load.
    pub fn conflicts(&self) -> u64 {
        self.conflicts.load(Ordering::Relaxed)
    }

    /// Whether each load and store of a kernel is checked.
    pub fn checks_accesses(&self) -> bool {
        self.compiler.checks_accesses()
    }

    fn alive(&self) -> Result<(), GpuError> {
        lock(&self.lost).clone().map_or(Ok(()), Err)
    }

    /// The pieces of memory that work names have to exist.
    fn named(&self, what: &str, spans: &[Span<'_>]) -> Result<(), GpuError> {
        match spans.iter().find(|span| !self.allocations.holds(**span)) {
            None => Ok(()),
            Some(span) => Err(refused(what, format!("{span:?} is not within an allocation"))),
        }
    }

    /// Does the work, or records it where the stream captures.
    fn put(&self, stream: &Stream, work: Work) -> Result<(), GpuError> {
        self.alive()?;
        if let Some(recorded) = &mut *lock(&stream.recorded) {
            recorded.push(work);
            return Ok(());
        }
        self.run(&work)
    }

    fn run(&self, work: &Work) -> Result<(), GpuError> {
        self.alive()?;
        match work {
            // SAFETY: both were looked up when the work was put on its stream, and live as long as that asks
            // for; see `Gpu`.
            Work::Copy { from, to, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
            },
            // SAFETY: as above.
            Work::Fill { to, bytes, byte } => unsafe { std::ptr::write_bytes(*to as *mut u8, *byte, *bytes) },
            Work::Multiply(multiply) => multiply(),
            Work::Launch { kernel, launch, words } => return self.run_kernel(kernel, *launch, words),
        }
        Ok(())
    }

    fn run_kernel(&self, kernel: &Kernel, launch: Launch, words: &[u64]) -> Result<(), GpuError> {
        self.count_launch()?;
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let ranges = self.allocations.ranges();
        let mut message = [0u8; 512];
        let mut raw = RawLaunch {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            seed,
            call: kernel.call,
            words: words.as_ptr(),
            word_count: words.len() as u64,
            memory: ranges.as_ptr().cast(),
            memory_count: ranges.len() as u64,
            error: message.as_mut_ptr(),
            error_bytes: message.len() as u64,
            conflicts: 0,
        };
        // SAFETY: the library was compiled from `runtime.cpp`, whose `run_launch` takes this struct and keeps to
        // the lengths in it.
        unsafe { (kernel.library.run)(&mut raw) };
        self.conflicts.fetch_add(raw.conflicts, Ordering::Relaxed);
        let reason = match CStr::from_bytes_until_nul(&message) {
            Ok(text) if !text.is_empty() => Some(text.to_string_lossy().into_owned()),
            _ => self.allocations.broken_guard(),
        };
        let Some(reason) = reason else { return Ok(()) };
        let error = GpuError::Lost { operation: kernel.entry.name.to_owned(), reason };
        lock(&self.lost).get_or_insert(error.clone());
        Err(error)
    }
}

fn refused(what: &str, reason: String) -> GpuError {
    GpuError::Refused { what: what.to_owned(), reason }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A launch as `runtime.cpp` reads it.
#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    block: u32,
    shared_bytes: u32,
    seed: u64,
    call: unsafe extern "C" fn(*const u64),
    words: *const u64,
    word_count: u64,
    memory: *const u8,
    memory_count: u64,
    error: *mut u8,
    error_bytes: u64,
    conflicts: u64,
}

/// What can be put on a stream. Addresses are this process's own.
enum Work {
    Copy { from: u64, to: u64, bytes: usize },
    Fill { to: u64, bytes: usize, byte: u8 },
    Multiply(Box<dyn Fn() + Send + Sync>),
    Launch { kernel: Kernel, launch: Launch, words: Vec<u64> },
}

/// A stream; `Some` while it captures.
#[derive(Default)]
pub struct Stream {
    recorded: Mutex<Option<Vec<Work>>>,
}

impl Stream {
    fn must_not_capture(&self, what: &str) -> Result<(), GpuError> {
        match *lock(&self.recorded) {
            None => Ok(()),
            Some(_) => Err(refused(what, "the stream is being captured".to_owned())),
        }
    }
}

/// A recorded sequence.
pub struct Graph(Vec<Work>);

/// A kernel file as a library.
pub struct EmulatedModule {
    title: String,
    library: Arc<Library>,
}

/// An entry point of a library.
#[derive(Clone)]
pub struct Kernel {
    entry: &'static Entry,
    library: Arc<Library>,
    call: unsafe extern "C" fn(*const u64),
    shared_bytes: u32,
}

/// Host memory.
pub struct PinnedBytes(Vec<u8>);

impl Pinned for PinnedBytes {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Device memory.
pub struct EmulatedMemory {
    block: Block,
    allocations: Arc<Allocations>,
}

impl Memory for EmulatedMemory {
    fn address(&self) -> u64 {
        self.block.address()
    }

    fn bytes(&self) -> usize {
        self.block.bytes()
    }
}

impl Drop for EmulatedMemory {
    fn drop(&mut self) {
        self.allocations.remove(&self.block);
    }
}

impl Gpu for Emulator {
    type Memory = EmulatedMemory;
    type Pinned = PinnedBytes;
    type Stream = Stream;
    type Module = EmulatedModule;
    type Kernel = Kernel;
    type Event = Instant;
    type Graph = Graph;

    fn info(&self) -> &GpuInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, GpuError> {
        self.alive()?;
        Ok(self.allocations.free_bytes())
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatedMemory, GpuError> {
        self.alive()?;
        let block = self.allocations.add(bytes)?;
        Ok(EmulatedMemory { block, allocations: Arc::clone(&self.allocations) })
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedBytes, GpuError> {
        self.alive()?;
        Ok(PinnedBytes(vec![0; bytes]))
    }

    fn stream(&self) -> Result<Stream, GpuError> {
        self.alive()?;
        Ok(Stream::default())
    }

    fn synchronise(&self, stream: &Stream) -> Result<(), GpuError> {
        stream.must_not_capture("synchronise")?;
        self.alive()
    }

    fn upload(&self, stream: &Stream, from: &[u8], to: Span<'_>) -> Result<(), GpuError> {
        stream.must_not_capture("upload")?;
        self.named("upload", &[to])?;
        same_length("upload", from.len(), to.bytes())?;
        self.put(stream, Work::Copy { from: from.as_ptr() as u64, to: to.address(), bytes: from.len() })
    }

    fn download(&self, stream: &Stream, from: Span<'_>, to: &mut [u8]) -> Result<(), GpuError> {
        stream.must_not_capture("download")?;
        self.named("download", &[from])?;
        same_length("download", to.len(), from.bytes())?;
        self.put(stream, Work::Copy { from: from.address(), to: to.as_mut_ptr() as u64, bytes: to.len() })
    }

    fn upload_pinned(
        &self,
        stream: &Stream,
        from: &PinnedBytes,
        part: Range<usize>,
        to: Span<'_>,
    ) -> Result<(), GpuError> {
        self.named("upload", &[to])?;
        let Some(from) = from.0.get(part.clone()) else {
            return Err(refused("upload", format!("{part:?} of {} pinned bytes", from.0.len())));
        };
        same_length("upload", from.len(), to.bytes())?;
        self.put(stream, Work::Copy { from: from.as_ptr() as u64, to: to.address(), bytes: from.len() })
    }

    fn download_pinned(&self, stream: &Stream, from: Span<'_>, to: &PinnedBytes) -> Result<(), GpuError> {
        self.named("download", &[from])?;
        if from.bytes() > to.0.len() {
            return Err(refused("download", format!("{} bytes into {}", from.bytes(), to.0.len())));
        }
        self.put(stream, Work::Copy { from: from.address(), to: to.0.as_ptr() as u64, bytes: from.bytes() })
    }

    fn copy(&self, stream: &Stream, from: Span<'_>, to: Span<'_>) -> Result<(), GpuError> {
        self.named("copy", &[from, to])?;
        same_length("copy", from.bytes(), to.bytes())?;
        if from.address() < to.address() + to.bytes() as u64
            && to.address() < from.address() + from.bytes() as u64
        {
            return Err(refused("copy", "the two overlap".to_owned()));
        }
        self.put(stream, Work::Copy { from: from.address(), to: to.address(), bytes: to.bytes() })
    }

    fn fill(&self, stream: &Stream, to: Span<'_>, byte: u8) -> Result<(), GpuError> {
        self.named("fill", &[to])?;
        self.put(stream, Work::Fill { to: to.address(), bytes: to.bytes(), byte })
    }

    fn load(&self, module: &Module) -> Result<EmulatedModule, GpuError> {
        self.alive()?;
        let library = self.compiler.compile(module).map_err(|log| GpuError::Compile {
            file: module.file.name,
            target: "the emulator".to_owned(),
            log,
        })?;
        Ok(EmulatedModule { title: module.title(), library: Arc::new(library) })
    }

    fn kernel(
        &self,
        module: &EmulatedModule,
        entry: &'static Entry,
        shared_bytes: u32,
    ) -> Result<Kernel, GpuError> {
        self.alive()?;
        let refused = |reason| Err(refused(entry.name, reason));
        let Some((call, letters)) = module.library.entry(entry.name) else {
            return refused(format!("{} has no such kernel", module.title));
        };
        let letter = |kind: ParameterKind| match kind {
            ParameterKind::Pointer => 'p',
            ParameterKind::U32 => 'u',
            ParameterKind::U64 => 'l',
            ParameterKind::F32 => 'f',
        };
        let expected: String = entry.parameters.iter().map(|parameter| letter(parameter.kind)).collect();
        if letters != expected {
            return refused(format!("the source takes {letters}, the table says {expected}"));
        }
        if shared_bytes > self.info.shared_bytes_per_block {
            return refused(format!("{shared_bytes} bytes of shared memory"));
        }
        Ok(Kernel { entry, library: Arc::clone(&module.library), call, shared_bytes })
    }

    unsafe fn launch(
        &self,
        stream: &Stream,
        kernel: &Kernel,
        launch: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<(), GpuError> {
        check_arguments(kernel.entry, arguments)?;
        launch.check(kernel.entry.name)?;
        if launch.shared_bytes > kernel.shared_bytes {
            let reason =
                format!("{} bytes of shared memory, not {}", launch.shared_bytes, kernel.shared_bytes);
            return Err(refused(kernel.entry.name, reason));
        }
        let spans = arguments.iter().filter_map(|argument| match argument {
            Argument::Memory(span) if *span != Span::NONE => Some(*span),
            _ => None,
        });
        self.named(kernel.entry.name, &spans.collect::<Vec<_>>())?;
        let words = arguments.iter().map(|argument| argument.bits()).collect();
        self.put(stream, Work::Launch { kernel: kernel.clone(), launch, words })
    }

    unsafe fn multiply(&self, stream: &Stream, product: &Product<'_>) -> Result<(), GpuError> {
        product.check()?;
        let spans = [product.x, product.weights, product.out, product.bias];
        let spans: Vec<_> = spans.into_iter().filter(|span| *span != Span::NONE).collect();
        self.named("matrix product", &spans)?;
        self.put(stream, Work::Multiply(product::prepare(product)))
    }

    fn record(&self, stream: &Stream) -> Result<Instant, GpuError> {
        stream.must_not_capture("record")?;
        self.alive()?;
        Ok(Instant::now())
    }

    fn wait(&self, _: &Instant) -> Result<(), GpuError> {
        self.alive()
    }

    fn wait_on(&self, stream: &Stream, _: &Instant) -> Result<(), GpuError> {
        stream.must_not_capture("wait")?;
        self.alive()
    }

    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64, GpuError> {
        self.alive()?;
        Ok((*to - *from).as_secs_f64())
    }

    fn capture(
        &self,
        stream: &Stream,
        work: &mut dyn FnMut() -> Result<(), GpuError>,
    ) -> Result<Graph, GpuError> {
        stream.must_not_capture("capture")?;
        *lock(&stream.recorded) = Some(Vec::new());
        let outcome = work();
        let recorded = lock(&stream.recorded).take().unwrap_or_default();
        outcome.map(|()| Graph(recorded))
    }

    fn replay(&self, stream: &Stream, graph: &Graph) -> Result<(), GpuError> {
        stream.must_not_capture("replay")?;
        graph.0.iter().try_for_each(|work| self.run(work))
    }
}

fn same_length(what: &str, one: usize, other: usize) -> Result<(), GpuError> {
    if one == other { Ok(()) } else { Err(refused(what, format!("{one} bytes and {other} bytes"))) }
}
