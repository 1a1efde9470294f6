//! [`Gpu`] on NVIDIA's driver: contexts, memory, streams, events, launches and graphs, each call checked.
//!
//! Handles are freed when dropped. All of it lives in the device's primary context, which every call makes
//! current on its thread first, so that objects may be used from any thread. The driver's own functions are
//! safe to call from several threads at once.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUevent, CUevent_flags, CUfunction, CUfunction_attribute,
    CUgraph, CUgraphExec, CUmodule, CUresult, CUstream, CUstream_flags, CUstreamCaptureMode,
};

use super::gpu::{
    Arch, Argument, Gpu, GpuError, GpuInfo, Launch, Memory, Pinned, Product, Span, check_arguments,
};
use super::kernels::{Entry, Module, ParameterKind};
use super::libraries::{Libraries, Missing, find_driver};
use super::nvrtc::Compiler;
use super::products::Products;

/// An NVIDIA GPU.
pub struct CudaGpu {
    // Dropped before the context that it lives in.
    products: Products,
    context: Arc<Context>,
    info: GpuInfo,
    libraries: Libraries,
    compiler: Compiler,
}

impl CudaGpu {
    /// The first GPU that the driver shows, with the libraries of `folder`, or those that are found.
    ///
    /// # Errors
    /// What is missing, in one line that says what to do.
    pub fn open(folder: Option<&Path>) -> Result<Self, OpenError> {
        // Whether there is a GPU comes before what it would need.
        find_driver()?;
        let context = Arc::new(Context::retain()?);
        let info = context.info()?;
        if info.arch < Arch::LEAST {
            return Err(OpenError::TooOld { name: info.name, arch: info.arch });
        }
        let libraries = Libraries::find(folder)?;
        let compiler = Compiler::new(libraries.nvrtc.version);
        let products = Products::new(&context, &info, &libraries).map_err(|error| match error {
            GpuError::OutOfMemory { .. } => OpenError::Full,
            other => other.into(),
        })?;
        Ok(Self { products, context, info, libraries, compiler })
    }

    pub fn libraries(&self) -> &Libraries {
        &self.libraries
    }

    /// Compiles kernels side by side, so that [`Gpu::load`] finds them on disk.
    ///
    /// # Errors
    /// [`GpuError::Compile`].
    pub fn prepare(&self, modules: &[Module]) -> Result<(), GpuError> {
        self.compiler.prepare(modules, self.info.arch)
    }

    /// Keeps the algorithms that were found for products, for the next start.
    pub fn keep_algorithms(&self) {
        self.products.keep();
    }
}

impl OpenError {
    /// Whether there is a GPU that could be used if something were put right.
    pub fn can_be_fixed(&self) -> bool {
        !matches!(self, Self::Missing(Missing::Driver | Missing::Gpu(_)) | Self::TooOld { .. })
    }
}

/// Why a GPU cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("{name} has compute capability {arch}; 8.0 or later is needed (A100, RTX 30 and newer)")]
    TooOld { name: String, arch: Arch },
    #[error("the GPU has no memory left for one more program; stop what uses it (nvidia-smi shows it)")]
    Full,
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// The primary context of a device.
pub(super) struct Context {
    device: CUdevice,
    handle: CUcontext,
}

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

thread_local! {
    /// The context that is current on this thread, as far as this module made it so.
    static CURRENT: Cell<CUcontext> = const { Cell::new(null_mut()) };
}

impl Context {
    fn retain() -> Result<Self, OpenError> {
        let no_gpu = |result: CUresult| Missing::Gpu(name_of(result));
        let (mut count, mut device, mut handle) = (0, 0, null_mut());
        // SAFETY: the driver is there; all pointers are to variables of this function.
        unsafe {
            let initialised = sys::cuInit(0);
            if initialised != CUresult::CUDA_SUCCESS {
                return Err(no_gpu(initialised).into());
            }
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            if count == 0 {
                return Err(no_gpu(CUresult::CUDA_ERROR_NO_DEVICE).into());
            }
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, 0))?;
            let retained = sys::cuDevicePrimaryCtxRetain(&mut handle, device);
            if retained == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(OpenError::Full);
            }
            check("cuDevicePrimaryCtxRetain", retained)?;
        }
        Ok(Self { device, handle })
    }

    /// Makes it current on this thread.
    pub(super) fn enter(&self) -> Result<(), GpuError> {
        if CURRENT.get() == self.handle {
            return Ok(());
        }
        // SAFETY: retained until `self` is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.handle) })?;
        CURRENT.set(self.handle);
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, GpuError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: variables of this function.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    /// See [`Gpu::allocate`].
    pub(super) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DeviceMemory, GpuError> {
        self.enter()?;
        let mut address = 0;
        // The driver refuses 0 bytes.
        // SAFETY: a variable of this function.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(GpuError::OutOfMemory { wanted_bytes: bytes as u64, free_bytes: self.free_bytes()? })
            }
            result => {
                check("cuMemAlloc", result)?;
                Ok(DeviceMemory { context: Arc::clone(self), address, bytes })
            }
        }
    }

    fn info(&self) -> Result<GpuInfo, GpuError> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE as L2,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as OF_BLOCK,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as OF_MULTIPROCESSOR,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let number = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: the device exists.
            let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
            check("cuDeviceGetAttribute", result).map(|()| value as u32)
        };
        let (mut name, mut bytes) = ([0 as c_char; 256], 0usize);
        // SAFETY: the device exists, and the name is cut to the buffer and terminated.
        let name = unsafe {
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), 256, self.device))?;
            check("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut bytes, self.device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        Ok(GpuInfo {
            name,
            arch: Arch(10 * number(MAJOR)? + number(MINOR)?),
            multiprocessors: number(MULTIPROCESSORS)?,
            shared_bytes_per_block: number(OF_BLOCK)?,
            shared_bytes_per_multiprocessor: number(OF_MULTIPROCESSOR)?,
            l2_bytes: u64::from(number(L2)?),
            memory_bytes: bytes as u64,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, and everything in it is gone: it all holds this.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        CURRENT.set(null_mut());
    }
}

/// Device memory.
pub struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl Memory for DeviceMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `allocate`. The driver waits for work that is under way.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Page-locked memory, and the last copy that reads or writes it.
pub struct PinnedMemory {
    context: Arc<Context>,
    pointer: *mut u8,
    bytes: usize,
    copied: Event,
}

// SAFETY: plain memory; who touches it when is ordered by `copied`.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// An error comes out of the next call that uses the stream.
    fn wait(&self) {
        if self.context.enter().is_ok() {
            // SAFETY: a live event. One that was never recorded has passed.
            let _ = unsafe { sys::cuEventSynchronize(self.copied.handle) };
        }
    }
}

impl Pinned for PinnedMemory {
    fn bytes(&self) -> &[u8] {
        self.wait();
        // SAFETY: allocated with this length and zeroed; no copy is under way.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.wait();
        // SAFETY: as above, and this is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        self.wait();
        // SAFETY: allocated by `pinned`.
        let _ = unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
    }
}

/// A queue of work.
pub struct Stream {
    context: Arc<Context>,
    handle: CUstream,
    capturing: AtomicBool,
}

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn handle(&self) -> CUstream {
        self.handle
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Relaxed)
    }

    /// What waits or touches host memory cannot be recorded.
    fn must_not_capture(&self, what: &str) -> Result<(), GpuError> {
        match self.is_capturing() {
            false => Ok(()),
            true => Err(refused(what, "the stream is being captured".to_owned())),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created by `stream`. Work that is under way goes on.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// Machine code of a kernel file.
pub struct LoadedModule {
    context: Arc<Context>,
    handle: CUmodule,
    title: String,
}

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for LoadedModule {}
// SAFETY: as above.
unsafe impl Sync for LoadedModule {}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: loaded by `load`; kernels hold it.
            let _ = unsafe { sys::cuModuleUnload(self.handle) };
        }
    }
}

/// An entry point with its signature.
pub struct Kernel {
    _module: Arc<LoadedModule>,
    handle: CUfunction,
    entry: &'static Entry,
    shared_bytes: u32,
}

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A point in a stream.
pub struct Event {
    context: Arc<Context>,
    handle: CUevent,
}

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Arc<Context>, flags: CUevent_flags) -> Result<Self, GpuError> {
        context.enter()?;
        let mut handle = null_mut();
        // SAFETY: a variable of this function.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, flags as u32) })?;
        Ok(Self { context: Arc::clone(context), handle })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created by `new`; the driver keeps it while it is waited for.
            let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

/// A recorded sequence, ready to run.
pub struct Graph {
    context: Arc<Context>,
    handle: CUgraphExec,
}

// SAFETY: a handle; it is launched by one thread at a time, on one stream.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: instantiated by `capture`. The driver waits for runs that are under way.
            let _ = unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}

impl Gpu for CudaGpu {
    type Memory = DeviceMemory;
    type Pinned = PinnedMemory;
    type Stream = Stream;
    type Module = Arc<LoadedModule>;
    type Kernel = Kernel;
    type Event = Event;
    type Graph = Graph;

    fn info(&self) -> &GpuInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, GpuError> {
        self.context.free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceMemory, GpuError> {
        self.context.allocate(bytes)
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedMemory, GpuError> {
        let copied = Event::new(&self.context, CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        let mut pointer = null_mut();
        // SAFETY: a variable of this function.
        let result = unsafe { sys::cuMemHostAlloc(&mut pointer, bytes.max(1), 0) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(refused("page-locked memory", format!("the host has no room for {bytes} bytes")));
        }
        check("cuMemHostAlloc", result)?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: allocated with this length.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(PinnedMemory { context: Arc::clone(&self.context), pointer, bytes, copied })
    }

    fn stream(&self) -> Result<Stream, GpuError> {
        self.context.enter()?;
        let mut handle = null_mut();
        // SAFETY: a variable of this function.
        let result =
            unsafe { sys::cuStreamCreate(&mut handle, CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
        check("cuStreamCreate", result)?;
        Ok(Stream { context: Arc::clone(&self.context), handle, capturing: AtomicBool::new(false) })
    }

    fn synchronise(&self, stream: &Stream) -> Result<(), GpuError> {
        stream.must_not_capture("synchronise")?;
        self.context.enter()?;
        // SAFETY: a live stream.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.handle) })
    }

    fn upload(&self, stream: &Stream, from: &[u8], to: Span<'_>) -> Result<(), GpuError> {
        stream.must_not_capture("upload")?;
        same_length("upload", from.len(), to.bytes())?;
        if from.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the span's memory is as long, and lives. The driver may read `from` later than the call
        // returns, so this waits.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), from.as_ptr().cast(), from.len(), stream.handle)
        };
        check("cuMemcpyHtoD", result)?;
        self.synchronise(stream)
    }

    fn download(&self, stream: &Stream, from: Span<'_>, to: &mut [u8]) -> Result<(), GpuError> {
        stream.must_not_capture("download")?;
        same_length("download", to.len(), from.bytes())?;
        if to.is_empty() {
            return self.synchronise(stream);
        }
        self.context.enter()?;
        // SAFETY: both are as long; this waits until it is done.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.address(), to.len(), stream.handle)
        };
        check("cuMemcpyDtoH", result)?;
        self.synchronise(stream)
    }

    fn upload_pinned(
        &self,
        stream: &Stream,
        from: &PinnedMemory,
        part: Range<usize>,
        to: Span<'_>,
    ) -> Result<(), GpuError> {
        stream.must_not_capture("upload")?;
        if part.start > part.end || part.end > from.bytes {
            return Err(refused("upload", format!("{part:?} of {} bytes", from.bytes)));
        }
        same_length("upload", part.len(), to.bytes())?;
        if part.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: within both, and neither is freed before the event has passed.
        unsafe {
            let start = from.pointer.add(part.start).cast::<c_void>();
            let result = sys::cuMemcpyHtoDAsync_v2(to.address(), start, part.len(), stream.handle);
            check("cuMemcpyHtoDAsync", result)?;
            check("cuEventRecord", sys::cuEventRecord(from.copied.handle, stream.handle))
        }
    }

    fn download_pinned(&self, stream: &Stream, from: Span<'_>, to: &PinnedMemory) -> Result<(), GpuError> {
        stream.must_not_capture("download")?;
        if from.bytes() > to.bytes {
            return Err(refused("download", format!("{} bytes into {}", from.bytes(), to.bytes)));
        }
        if from.bytes() == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: as above. Nobody has a reference to the content: both views would have to be given up
        // before `to` can be named here mutably, and they wait for the event.
        unsafe {
            let result =
                sys::cuMemcpyDtoHAsync_v2(to.pointer.cast(), from.address(), from.bytes(), stream.handle);
            check("cuMemcpyDtoHAsync", result)?;
            check("cuEventRecord", sys::cuEventRecord(to.copied.handle, stream.handle))
        }
    }

    fn copy(&self, stream: &Stream, from: Span<'_>, to: Span<'_>) -> Result<(), GpuError> {
        same_length("copy", from.bytes(), to.bytes())?;
        if from.bytes() == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: both are as long, and spans are of live memory.
        let result =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), to.bytes(), stream.handle) };
        check("cuMemcpyDtoDAsync", result)
    }

    fn fill(&self, stream: &Stream, to: Span<'_>, byte: u8) -> Result<(), GpuError> {
        if to.bytes() == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: a span of live memory.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(to.address(), byte, to.bytes(), stream.handle)
        })
    }

    fn load(&self, module: &Module) -> Result<Arc<LoadedModule>, GpuError> {
        let code = self.compiler.machine_code(module, self.info.arch)?;
        self.context.enter()?;
        let mut handle = null_mut();
        // SAFETY: the image tells its own length, and the driver checks it.
        let result = unsafe { sys::cuModuleLoadData(&mut handle, code.as_ptr().cast()) };
        check(&format!("cuModuleLoadData of {}", module.title()), result)?;
        Ok(Arc::new(LoadedModule { context: Arc::clone(&self.context), handle, title: module.title() }))
    }

    fn kernel(
        &self,
        module: &Arc<LoadedModule>,
        entry: &'static Entry,
        shared_bytes: u32,
    ) -> Result<Kernel, GpuError> {
        self.context.enter()?;
        let name = CString::new(entry.name).map_err(|error| refused(entry.name, error.to_string()))?;
        let mut handle = null_mut();
        // SAFETY: a live module and a terminated name.
        let result = unsafe { sys::cuModuleGetFunction(&mut handle, module.handle, name.as_ptr()) };
        check(&format!("{} of {}", entry.name, module.title), result)?;
        if shared_bytes > 0 {
            use CUfunction_attribute::{
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT,
                CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as CARVEOUT,
            };
            // Per cent of the memory that shared memory and cache divide: what these kernels read goes past the
            // cache, and as many of their blocks shall be resident as fit.
            const ALL: c_int = 100;
            for (attribute, value) in [(LIMIT, shared_bytes as c_int), (CARVEOUT, ALL)] {
                // SAFETY: a live function.
                let result = unsafe { sys::cuFuncSetAttribute(handle, attribute, value) };
                check(&format!("{shared_bytes} bytes of shared memory for {}", entry.name), result)?;
            }
        }
        Ok(Kernel { _module: Arc::clone(module), handle, entry, shared_bytes })
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
        self.context.enter()?;
        // The driver reads as many bytes as the parameter has, from the start of each word (little endian).
        debug_assert!(kernel.entry.parameters.iter().all(|parameter| bytes_of(parameter.kind) <= 8));
        let mut words: [u64; MOST_ARGUMENTS] = [0; MOST_ARGUMENTS];
        let mut pointers: [*mut c_void; MOST_ARGUMENTS] = [null_mut(); MOST_ARGUMENTS];
        if arguments.len() > MOST_ARGUMENTS {
            return Err(refused(kernel.entry.name, format!("{} arguments", arguments.len())));
        }
        for ((argument, word), pointer) in arguments.iter().zip(&mut words).zip(&mut pointers) {
            *word = argument.bits();
            *pointer = std::ptr::from_mut(word).cast();
        }
        let [x, y, z] = launch.grid;
        // SAFETY: the arguments are those of the signature, which was compared with the source; the rest is the
        // caller's.
        let result = unsafe {
            sys::cuLaunchKernel(
                kernel.handle,
                x,
                y,
                z,
                launch.block,
                1,
                1,
                launch.shared_bytes,
                stream.handle,
                pointers.as_mut_ptr(),
                null_mut(),
            )
        };
        check(kernel.entry.name, result)
    }

    unsafe fn multiply(&self, stream: &Stream, product: &Product<'_>) -> Result<(), GpuError> {
        product.check()?;
        self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { self.products.multiply(self, stream, product) }
    }

    fn record(&self, stream: &Stream) -> Result<Event, GpuError> {
        stream.must_not_capture("record")?;
        let event = Event::new(&self.context, CUevent_flags::CU_EVENT_DEFAULT)?;
        // SAFETY: both are alive.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.handle, stream.handle) })?;
        Ok(event)
    }

    fn wait(&self, event: &Event) -> Result<(), GpuError> {
        self.context.enter()?;
        // SAFETY: a live event.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(event.handle) })
    }

    fn wait_on(&self, stream: &Stream, event: &Event) -> Result<(), GpuError> {
        stream.must_not_capture("wait")?;
        self.context.enter()?;
        // SAFETY: both are alive.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream.handle, event.handle, 0) })
    }

    fn seconds_between(&self, from: &Event, to: &Event) -> Result<f64, GpuError> {
        self.wait(from)?;
        self.wait(to)?;
        let mut milliseconds = 0.0f32;
        // SAFETY: both are alive and were recorded with their time.
        check("cuEventElapsedTime", unsafe { elapsed(&mut milliseconds, from.handle, to.handle) })?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn capture(
        &self,
        stream: &Stream,
        work: &mut dyn FnMut() -> Result<(), GpuError>,
    ) -> Result<Graph, GpuError> {
        stream.must_not_capture("capture")?;
        self.context.enter()?;
        const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.handle, MODE) })?;
        stream.capturing.store(true, Ordering::Relaxed);
        let outcome = work();
        stream.capturing.store(false, Ordering::Relaxed);
        let mut recorded = null_mut();
        // SAFETY: the capture was begun above, on this thread. It has to be ended whatever `work` said.
        let ended = unsafe { sys::cuStreamEndCapture(stream.handle, &mut recorded) };
        let recorded = Recorded(recorded);
        outcome?;
        check("cuStreamEndCapture", ended)?;
        let mut handle = null_mut();
        // SAFETY: a graph that was recorded without an error.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut handle, recorded.0, 0) };
        check("cuGraphInstantiate", result)?;
        let graph = Graph { context: Arc::clone(&self.context), handle };
        // What the first run would have to bring to the GPU.
        // SAFETY: both are alive.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(graph.handle, stream.handle) })?;
        Ok(graph)
    }

    fn replay(&self, stream: &Stream, graph: &Graph) -> Result<(), GpuError> {
        stream.must_not_capture("replay")?;
        self.context.enter()?;
        // SAFETY: both are alive, and what the graph names lives as long: see `capture`.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.handle, stream.handle) })
    }
}

/// Longest argument list of a kernel.
const MOST_ARGUMENTS: usize = 16;

fn bytes_of(kind: ParameterKind) -> usize {
    match kind {
        ParameterKind::Pointer | ParameterKind::U64 => 8,
        ParameterKind::U32 | ParameterKind::F32 => 4,
    }
}

/// A graph that is not instantiated; null if the capture failed.
struct Recorded(CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: recorded by `capture`; what was instantiated from it is a copy.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// The milliseconds between two events. The bindings have only the function of 12.8 and later, which drivers
/// before that lack; the first one is in all of them.
///
/// # Safety
/// Both events are alive.
unsafe fn elapsed(milliseconds: &mut f32, from: CUevent, to: CUevent) -> CUresult {
    type Function = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;
    // SAFETY: the driver is there, and this is the function's type in cuda.h of every version.
    unsafe {
        match sys::culib().get::<Function>(b"cuEventElapsedTime") {
            Ok(function) => function(milliseconds, from, to),
            Err(_) => CUresult::CUDA_ERROR_NOT_FOUND,
        }
    }
}

fn refused(what: &str, reason: String) -> GpuError {
    GpuError::Refused { what: what.to_owned(), reason }
}

fn same_length(what: &str, one: usize, other: usize) -> Result<(), GpuError> {
    if one == other { Ok(()) } else { Err(refused(what, format!("{one} bytes and {other} bytes"))) }
}

/// The first error after which the context was lost, so that every later call tells of the cause and not of
/// its consequence.
static LOST: Mutex<Option<GpuError>> = Mutex::new(None);

pub(super) fn check(operation: &str, result: CUresult) -> Result<(), GpuError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut lost = LOST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(first) = &*lost {
        return Err(first.clone());
    }
    let reason = name_of(result);
    if !is_sticky(result) {
        return Err(refused(operation, reason));
    }
    let error = GpuError::Lost { operation: operation.to_owned(), reason };
    *lost = Some(error.clone());
    Err(error)
}

/// Errors after which the context is unusable, as the reference of `CUresult` says of each, and those of a GPU
/// that is broken or gone.
fn is_sticky(result: CUresult) -> bool {
    matches!(
        result as u32,
        // Deinitialised; unavailable; uncorrectable errors of memory and links.
        4 | 46 | 214 | 220 | 226
        // Illegal address; time-out; context destroyed; assert; hardware stack; illegal instruction; misaligned or
        // invalid address; program counter; launch failed; tensor leak.
        | 700 | 702 | 709 | 710 | 714
            ..=719 | 721
        // Unknown.
        | 999
    )
}

/// Name and text of an error.
fn name_of(result: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver is there; the text is a constant of it.
        unsafe {
            let _ = get(result, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{name}: {text}"),
        _ => format!("error {}", result as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::FILES;
    use super::*;

    #[test]
    fn every_kernel_has_room_for_its_arguments() {
        let most = FILES.iter().flat_map(|file| file.entries).map(|entry| entry.parameters.len()).max();
        assert!(most.unwrap() <= MOST_ARGUMENTS);
    }

    #[test]
    fn what_destroys_the_context_is_told_from_what_was_refused() {
        use CUresult::*;
        for sticky in [CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_ECC_UNCORRECTABLE] {
            assert!(is_sticky(sticky));
        }
        for refused in [
            CUDA_ERROR_INVALID_VALUE,
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            CUDA_ERROR_OUT_OF_MEMORY,
            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        ] {
            assert!(!is_sticky(refused));
        }
    }
}
