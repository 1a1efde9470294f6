//! Everything that the CUDA device asks of a GPU, as one small trait.
//!
//! Two things implement it: the driver, and an emulator that runs the same kernel sources on the CPU,
//! so that kernels, launches and the runner around them are tested where there is no GPU.
//!
//! Work is put on a *stream* and runs in order there; the calls return before it is done unless they
//! say that they wait. Errors of work that was put on a stream earlier may come out of any later call.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use super::kernels::{Entry, Module, ParameterKind};

/// A GPU, or something that behaves like one.
pub trait Gpu: Send + Sync + 'static {
    /// Device memory, freed when dropped.
    type Memory: Memory;
    /// Page-locked host memory, freed when dropped.
    type Pinned: Pinned;
    /// A queue of work.
    type Stream: Send + Sync;
    /// A compiled kernel file.
    type Module: Send + Sync;
    /// An entry point of a module, ready to launch.
    type Kernel: Send + Sync;
    /// A point in a stream.
    type Event: Send + Sync;
    /// A recorded sequence of work.
    type Graph: Send + Sync;

    /// What kind of GPU this is.
    fn info(&self) -> &GpuInfo;

    /// Bytes of device memory that can still be allocated, by anybody.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn free_bytes(&self) -> Result<u64, GpuError>;

    /// Device memory with undefined content, aligned to 256 bytes. 0 bytes are allowed.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`].
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, GpuError>;

    /// Page-locked host memory, zeroed.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`].
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned, GpuError>;

    /// A new stream. It waits for no other.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn stream(&self) -> Result<Self::Stream, GpuError>;

    /// Waits until all that was put on the stream is done.
    ///
    /// # Errors
    /// [`GpuError::Lost`] if some of it failed.
    fn synchronise(&self, stream: &Self::Stream) -> Result<(), GpuError>;

    /// Copies host memory to the device. `from` may be reused when the call returns.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if `to` is shorter than `from`; [`GpuError::Lost`].
    fn upload(&self, stream: &Self::Stream, from: &[u8], to: Span<'_>) -> Result<(), GpuError>;

    /// Copies device memory to the host, and waits for it.
    ///
    /// # Errors
    /// As [`Gpu::upload`].
    fn download(&self, stream: &Self::Stream, from: Span<'_>, to: &mut [u8]) -> Result<(), GpuError>;

    /// Puts a copy of part of `from` to the device on the stream. Waits for nothing: [`Pinned::bytes_mut`]
    /// does. May be captured.
    ///
    /// # Errors
    /// As [`Gpu::upload`].
    fn upload_pinned(
        &self,
        stream: &Self::Stream,
        from: &Self::Pinned,
        part: Range<usize>,
        to: Span<'_>,
    ) -> Result<(), GpuError>;

    /// Puts a copy of `from` to the start of `to` on the stream. Waits for nothing: [`Pinned::bytes`] does.
    /// May be captured.
    ///
    /// # Errors
    /// As [`Gpu::upload`].
    fn download_pinned(
        &self,
        stream: &Self::Stream,
        from: Span<'_>,
        to: &Self::Pinned,
    ) -> Result<(), GpuError>;

    /// Copies within device memory. The two must not overlap.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if the lengths differ; [`GpuError::Lost`].
    fn copy(&self, stream: &Self::Stream, from: Span<'_>, to: Span<'_>) -> Result<(), GpuError>;

    /// Sets every byte.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn fill(&self, stream: &Self::Stream, to: Span<'_>, byte: u8) -> Result<(), GpuError>;

    /// Compiles a kernel file for this GPU, or finds it compiled.
    ///
    /// # Errors
    /// [`GpuError::Compile`] with the compiler's log.
    fn load(&self, module: &Module) -> Result<Self::Module, GpuError>;

    /// An entry point of a module, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if the module lacks it or the GPU has less shared memory.
    fn kernel(
        &self,
        module: &Self::Module,
        entry: &'static Entry,
        shared_bytes: u32,
    ) -> Result<Self::Kernel, GpuError>;

    /// Puts a kernel on the stream.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if arguments are not those of the kernel's [`Entry`] ([`check_arguments`]) or the
    /// geometry is impossible. Nothing was launched then and the GPU is as before.
    ///
    /// # Safety
    /// The kernel must stay within the memory that the arguments name, for the geometry and the content
    /// that they have when it runs; and that memory must live until then.
    unsafe fn launch(
        &self,
        stream: &Self::Stream,
        kernel: &Self::Kernel,
        launch: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<(), GpuError>;

    /// Puts a matrix product on the stream. Sums are f32.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if a span is shorter than its matrix ([`Product::check`]), or the formats
    /// are not supported together.
    ///
    /// # Safety
    /// The memory must live until the product is computed.
    unsafe fn multiply(&self, stream: &Self::Stream, product: &Product<'_>) -> Result<(), GpuError>;

    /// Marks the point in the stream where the work put on it so far is done.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn record(&self, stream: &Self::Stream) -> Result<Self::Event, GpuError>;

    /// Waits until the event has passed.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn wait(&self, event: &Self::Event) -> Result<(), GpuError>;

    /// Lets the later work of `stream` wait for an event of another stream.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn wait_on(&self, stream: &Self::Stream, event: &Self::Event) -> Result<(), GpuError>;

    /// The time between two events, the GPU's clock. Waits for both.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn seconds_between(&self, from: &Self::Event, to: &Self::Event) -> Result<f64, GpuError>;

    /// Records what `work` puts on the stream instead of running it. Addresses, geometry and arguments are
    /// recorded as they are; what stands in memory is read when the graph runs. All memory that is named
    /// must live as long as the graph.
    ///
    /// # Errors
    /// What `work` fails with, or [`GpuError::Refused`] if it did something that cannot be recorded
    /// (waiting, allocating).
    fn capture(
        &self,
        stream: &Self::Stream,
        work: &mut dyn FnMut() -> Result<(), GpuError>,
    ) -> Result<Self::Graph, GpuError>;

    /// Puts a recorded sequence on the stream.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    fn replay(&self, stream: &Self::Stream, graph: &Self::Graph) -> Result<(), GpuError>;
}

/// A piece of device memory.
pub trait Memory: Send + Sync {
    fn address(&self) -> u64;
    fn bytes(&self) -> usize;

    /// All of it.
    fn span(&self) -> Span<'_> {
        Span { address: self.address(), bytes: self.bytes(), memory: PhantomData }
    }
}

/// A piece of page-locked host memory. Both views wait for the copies that were put on streams.
pub trait Pinned: Send {
    fn bytes(&self) -> &[u8];
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Part of a piece of device memory, which must live as long. Copies share it: what runs on the GPU
/// is ordered by streams and not by the borrow checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span<'a> {
    address: u64,
    bytes: usize,
    memory: PhantomData<&'a ()>,
}

impl<'a> Span<'a> {
    /// No memory: the null pointer, for arguments that are optional.
    pub const NONE: Span<'static> = Span { address: 0, bytes: 0, memory: PhantomData };

    pub fn address(self) -> u64 {
        self.address
    }

    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// The part `range`, in bytes.
    ///
    /// # Panics
    /// If it is not within this span.
    pub fn part(self, range: Range<usize>) -> Span<'a> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        Span { address: self.address + range.start as u64, bytes: range.len(), memory: PhantomData }
    }
}

/// What a GPU is, as far as launches depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    pub name: String,
    pub arch: Arch,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory of one block of threads, opted in.
    pub shared_bytes_per_block: u32,
    pub shared_bytes_per_multiprocessor: u32,
    pub l2_bytes: u64,
    pub memory_bytes: u64,
}

/// A compute capability: 9.0 is `Arch(90)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch(pub u32);

impl Arch {
    /// The least that the kernels need: bf16 matrix instructions and asynchronous copies.
    pub const LEAST: Self = Self(80);

    /// Whether 8-bit floats are converted in hardware.
    pub fn has_fp8(self) -> bool {
        self >= Self(89)
    }

    /// NVRTC's name of the target. Hopper's own instructions are in the target with the `a`.
    pub fn target(self) -> String {
        match self {
            Self(90) => "sm_90a".to_owned(),
            Self(number) => format!("sm_{number}"),
        }
    }
}

/// How a kernel is laid out over the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks of threads.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// Whether the hardware takes it: at most 1,024 threads in whole warps, 2^31 - 1 by 65,535 by 65,535
    /// blocks, none of them 0.
    ///
    /// # Errors
    /// [`GpuError::Refused`] that says which number is out of range.
    pub fn check(&self, kernel: &'static str) -> Result<(), GpuError> {
        let [x, y, z] = self.grid;
        let refused = |reason| Err(GpuError::Refused { what: kernel.to_owned(), reason });
        if self.block == 0 || self.block > 1024 || !self.block.is_multiple_of(32) {
            return refused(format!("{} threads a block; 32 to 1024, in whole warps", self.block));
        }
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
            return refused(format!("a grid of {x} x {y} x {z} blocks; 1 to 2147483647 x 65535 x 65535"));
        }
        Ok(())
    }
}

/// One argument of a launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument<'a> {
    Memory(Span<'a>),
    U32(u32),
    U64(u64),
    F32(f32),
}

impl Argument<'_> {
    pub fn kind(self) -> ParameterKind {
        match self {
            Self::Memory(_) => ParameterKind::Pointer,
            Self::U32(_) => ParameterKind::U32,
            Self::U64(_) => ParameterKind::U64,
            Self::F32(_) => ParameterKind::F32,
        }
    }

    /// The bits as the kernel reads them; the first 4 bytes of U32 and F32 (little endian).
    pub fn bits(self) -> u64 {
        match self {
            Self::Memory(span) => span.address,
            Self::U32(value) => u64::from(value),
            Self::U64(value) => value,
            Self::F32(value) => u64::from(value.to_bits()),
        }
    }
}

/// That arguments are as many as a kernel has parameters, and of their kinds. Implementations of
/// [`Gpu::launch`] call this first.
///
/// # Errors
/// [`GpuError::Refused`] that names the first one that differs.
pub fn check_arguments(entry: &Entry, arguments: &[Argument<'_>]) -> Result<(), GpuError> {
    let refused = |reason| Err(GpuError::Refused { what: entry.name.to_owned(), reason });
    if arguments.len() != entry.parameters.len() {
        return refused(format!("{} arguments for {} parameters", arguments.len(), entry.parameters.len()));
    }
    let pairs = entry.parameters.iter().zip(arguments);
    match pairs.clone().find(|(parameter, argument)| parameter.kind != argument.kind()) {
        None => Ok(()),
        Some((parameter, argument)) => {
            refused(format!("{argument:?} for the parameter {} {:?}", parameter.name, parameter.kind))
        }
    }
}

/// Number formats of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    BF16,
    F16,
    /// 8 bits: 4 of exponent, 3 of mantissa; no infinity, largest 448 (Micikevicius et al. 2022).
    E4M3,
    F32,
}

impl Format {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::E4M3 => 1,
            Self::BF16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// `out [rows, outputs] = x [rows, inputs] * weights [outputs, inputs]^T + bias [outputs]`, all row-major.
///
/// Formats that have to be supported: `x` and `weights` both BF16 or both F16 and `out` the same or F32;
/// on GPUs with 8-bit floats, `x` and `weights` E4M3 and `out` F32.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub x: Span<'a>,
    pub weights: Span<'a>,
    /// In the format of `out`; [`Span::NONE`] for none.
    pub bias: Span<'a>,
    pub out: Span<'a>,
    /// Of `x` and `weights`.
    pub format: Format,
    pub out_format: Format,
}

impl Product<'_> {
    /// That each span holds its matrix, and that the formats go together.
    ///
    /// # Errors
    /// [`GpuError::Refused`] that says which does not.
    pub fn check(&self) -> Result<(), GpuError> {
        let Self { rows, inputs, outputs, .. } = *self;
        let refused = |reason| Err(GpuError::Refused { what: "matrix product".to_owned(), reason });
        let together = match self.format {
            Format::BF16 | Format::F16 => self.out_format == self.format || self.out_format == Format::F32,
            Format::E4M3 => self.out_format == Format::F32,
            Format::F32 => false,
        };
        if !together {
            return refused(format!("{:?} in, {:?} out", self.format, self.out_format));
        }
        let spans = [
            ("x", self.x, rows * inputs * self.format.bytes()),
            ("weights", self.weights, outputs * inputs * self.format.bytes()),
            ("out", self.out, rows * outputs * self.out_format.bytes()),
            ("bias", self.bias, if self.bias == Span::NONE { 0 } else { outputs * self.out_format.bytes() }),
        ];
        match spans.into_iter().find(|(_, span, bytes)| span.bytes < *bytes) {
            None => Ok(()),
            Some((name, span, bytes)) => refused(format!("{name} has {} bytes, not {bytes}", span.bytes)),
        }
    }
}

/// What can go wrong on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// The GPU is as before.
    #[error(
        "the GPU has no room for {wanted_bytes} bytes, {free_bytes} are free; lower --gpu-memory-utilization \
         or the sizes of the batch, or stop what else uses the GPU"
    )]
    OutOfMemory { wanted_bytes: u64, free_bytes: u64 },
    /// A call that was wrong in itself and had no effect. The GPU is as before.
    #[error("{what} was refused: {reason}")]
    Refused { what: String, reason: String },
    /// A kernel file that the compiler does not take.
    #[error("{file} does not compile for {target}: {log}")]
    Compile { file: &'static str, target: String, log: String },
    /// A sticky error: the context is lost, and every later call fails with it too.
    #[error("the GPU failed during {operation}: {reason}; the process has to be restarted")]
    Lost { operation: String, reason: String },
}

impl GpuError {
    /// Whether no later call can succeed.
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 10, self.0 % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernels::Parameter;

    const ENTRY: Entry = Entry {
        name: "scale",
        parameters: &[
            Parameter { name: "out", kind: ParameterKind::Pointer },
            Parameter { name: "factor", kind: ParameterKind::F32 },
        ],
    };

    fn reason(result: Result<(), GpuError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn arguments_are_compared_with_the_signature() {
        let out = Argument::Memory(Span::NONE);
        assert_eq!(check_arguments(&ENTRY, &[out, Argument::F32(2.0)]), Ok(()));
        assert!(reason(check_arguments(&ENTRY, &[out])).contains("1 arguments for 2 parameters"));
        assert!(reason(check_arguments(&ENTRY, &[out, Argument::U32(2)])).contains("factor F32"));
    }

    #[test]
    fn impossible_geometry_is_refused() {
        let launch = |grid, block| Launch { grid, block, shared_bytes: 0 };
        assert_eq!(launch([1 << 20, 65_535, 1], 1024).check("scale"), Ok(()));
        assert!(reason(launch([1, 1, 1], 48).check("scale")).contains("48 threads"));
        assert!(reason(launch([0, 1, 1], 32).check("scale")).contains("0 x 1 x 1"));
        assert!(reason(launch([1, 65_536, 1], 32).check("scale")).contains("65536"));
    }

    #[test]
    fn parts_stay_within_their_span() {
        let span = Span { address: 256, bytes: 64, memory: PhantomData };
        assert_eq!((span.part(16..32).address(), span.part(16..32).bytes()), (272, 16));
        assert!(std::panic::catch_unwind(|| span.part(60..65)).is_err());
    }

    #[test]
    fn products_need_room_and_formats_that_go_together() {
        let span = |bytes| Span { address: 256, bytes, memory: PhantomData };
        let product = Product {
            rows: 2,
            inputs: 8,
            outputs: 4,
            x: span(32),
            weights: span(64),
            bias: Span::NONE,
            out: span(16),
            format: Format::BF16,
            out_format: Format::BF16,
        };
        assert_eq!(product.check(), Ok(()));
        assert!(reason(Product { out_format: Format::F32, ..product }.check()).contains("out has 16"));
        assert!(reason(Product { bias: span(6), ..product }.check()).contains("bias has 6 bytes, not 8"));
        assert!(reason(Product { out_format: Format::F16, ..product }.check()).contains("BF16 in, F16 out"));
    }

    #[test]
    fn architectures_have_names() {
        assert_eq!((Arch(80).target(), Arch(90).target()), ("sm_80".to_owned(), "sm_90a".to_owned()));
        assert_eq!((Arch(89).to_string(), Arch(100).to_string()), ("8.9".to_owned(), "10.0".to_owned()));
        assert!(Arch(89).has_fp8() && !Arch(80).has_fp8());
    }
}
