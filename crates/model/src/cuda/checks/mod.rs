//! Every kernel against plain loops in f64, on whatever [`Gpu`] there is: an emulator in the tests, a real one
//! in `servelab doctor`.
//!
//! Inputs are random, outputs are poisoned first, and what a kernel must not touch is looked at afterwards.
//! On a real GPU each kernel is also timed at a size that is well beyond the caches.

mod attention;
mod fp8;
mod numbers;
mod product;
mod rope;
mod rows;
mod sampling;

use super::geometry::{DecodeTile, PrefillTile};
use super::gpu::{Gpu, GpuError, GpuInfo, Memory, Span};
use super::kernels::{Element, KvElement, Module, Specialisation};
use super::words::{Words, bytes_of, bytes_of_mut};

pub use attention::{decode, prefill};
pub use fp8::fp8;
pub use product::products;
pub use rope::rope;
pub use rows::{copies, norms, silu};
pub use sampling::sampling;

/// How much is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// What an emulator does in seconds.
    Small,
    /// Long contexts, whole vocabularies, and times.
    Full,
}

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    pub kernel: &'static str,
    /// Shape and formats in words.
    pub case: String,
    /// Largest difference, relative to the largest value; infinite if something is NaN or was touched that must
    /// not be.
    pub error: f64,
    pub tolerance: f64,
    /// Bytes that the kernel has to read and write at least.
    pub bytes: u64,
    /// Operations that it has to do at least: two for each product that is summed.
    pub flops: u64,
    /// Of one launch, where it was timed.
    pub seconds: Option<f64>,
}

impl Check {
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// Receives each outcome as it comes.
pub type Report<'a> = &'a mut dyn FnMut(Check);

/// Runs all checks.
///
/// # Errors
/// What the GPU fails with; a wrong result is no error but a [`Check`] that has not passed.
pub fn run<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    copies(gpu, size, report)?;
    norms(gpu, size, report)?;
    silu(gpu, size, report)?;
    rope(gpu, size, report)?;
    decode(gpu, size, report)?;
    prefill(gpu, size, report)?;
    sampling(gpu, size, report)?;
    products(gpu, size, report)?;
    if gpu.info().arch.has_fp8() {
        fp8(gpu, size, report)?;
    }
    Ok(())
}

/// The kernels that take longest to compile, for whoever wants to compile them side by side beforehand.
pub fn modules(info: &GpuInfo) -> Vec<Module> {
    let of_shape = |shape: Shape| shape.specialisation(info).modules(info.arch);
    let mut modules: Vec<Module> = shapes(info).into_iter().flat_map(of_shape).collect();
    let mut seen = std::collections::HashSet::new();
    modules.retain(|module| seen.insert(module.title()));
    modules
}

/// A GPU with a stream, and what every check does with it.
struct Checker<'g, G: Gpu> {
    gpu: &'g G,
    stream: G::Stream,
    size: Size,
}

impl<'g, G: Gpu> Checker<'g, G> {
    fn new(gpu: &'g G, size: Size) -> Result<Self, GpuError> {
        Ok(Self { gpu, stream: gpu.stream()?, size })
    }

    fn upload<T: Words>(&self, values: &[T]) -> Result<G::Memory, GpuError> {
        let memory = self.gpu.allocate(size_of_val(values))?;
        self.gpu.upload(&self.stream, bytes_of(values), memory.span())?;
        Ok(memory)
    }

    /// NaN in every format.
    fn poisoned(&self, bytes: usize) -> Result<G::Memory, GpuError> {
        let memory = self.gpu.allocate(bytes)?;
        self.gpu.fill(&self.stream, memory.span(), 0xff)?;
        Ok(memory)
    }

    fn zeroed(&self, bytes: usize) -> Result<G::Memory, GpuError> {
        let memory = self.gpu.allocate(bytes)?;
        self.gpu.fill(&self.stream, memory.span(), 0)?;
        Ok(memory)
    }

    fn download<T: Words>(&self, span: Span<'_>) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::default(); span.bytes() / size_of::<T>()];
        let bytes = values.len() * size_of::<T>();
        self.gpu.download(&self.stream, span.part(0..bytes), bytes_of_mut(&mut values))?;
        Ok(values)
    }

    /// Seconds of one `launch`: the mean of some after a few to warm up. `None` on an emulator.
    fn time(&self, mut launch: impl FnMut() -> Result<(), GpuError>) -> Result<Option<f64>, GpuError> {
        const WARM_UP: u32 = 3;
        const TIMED: u32 = 20;
        if self.size == Size::Small {
            return Ok(None);
        }
        (0..WARM_UP).try_for_each(|_| launch())?;
        let start = self.gpu.record(&self.stream)?;
        (0..TIMED).try_for_each(|_| launch())?;
        let end = self.gpu.record(&self.stream)?;
        Ok(Some(self.gpu.seconds_between(&start, &end)? / f64::from(TIMED)))
    }

    fn specialisation(&self, shape: Shape) -> Specialisation {
        shape.specialisation(self.gpu.info())
    }

    fn shapes(&self) -> Vec<Shape> {
        shapes(self.gpu.info())
    }
}

/// The shapes that attention and cache writes are checked in: every head size, group, block size and format
/// at least once.
fn shapes(info: &GpuInfo) -> Vec<Shape> {
    use Element::{BF16, F16};
    use KvElement::{E4M3, Same};
    let all = [
        (BF16, Same, 32, 2, 32),
        (BF16, Same, 64, 1, 16),
        (F16, Same, 80, 2, 32),
        (BF16, Same, 96, 4, 64),
        (BF16, Same, 128, 5, 16),
        (F16, Same, 256, 7, 32),
        (BF16, Same, 128, 8, 64),
        (F16, Same, 64, 12, 16),
        (F16, E4M3, 32, 3, 16),
        (BF16, E4M3, 64, 4, 16),
        (F16, E4M3, 80, 3, 32),
        (BF16, E4M3, 96, 6, 64),
        (F16, E4M3, 128, 8, 16),
        (BF16, E4M3, 256, 1, 32),
    ];
    let has_fp8 = info.arch.has_fp8();
    all.into_iter()
        .filter(|(_, kv, ..)| *kv == Same || has_fp8)
        .map(|(element, kv, head_dim, group, block_size)| Shape { element, kv, head_dim, group, block_size })
        .collect()
}

/// What attention kernels are specialised for.
#[derive(Clone, Copy, Debug)]
struct Shape {
    element: Element,
    kv: KvElement,
    head_dim: u32,
    group: u32,
    block_size: u32,
}

impl Shape {
    /// For this GPU; the fields that a check does not look at are those of a small model.
    fn specialisation(self, info: &GpuInfo) -> Specialisation {
        let Self { element, kv, head_dim, group, block_size } = self;
        Specialisation {
            element,
            kv,
            hidden: 64,
            head_dim,
            group,
            block_size,
            head_norms: false,
            decode: DecodeTile::choose(info, head_dim, kv),
            prefill: PrefillTile::choose(head_dim),
        }
    }

    fn name(&self) -> String {
        let Self { element, kv, head_dim, group, block_size } = self;
        let kv = match kv {
            KvElement::Same => "",
            KvElement::E4M3 => ", e4m3 cache",
        };
        format!("{element:?}{kv}, head {head_dim}, group {group}, blocks of {block_size}")
    }
}
