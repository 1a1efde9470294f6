//! Matrix products with cuBLASLt.
//!
//! cuBLASLt has many kernels for a product and a model that guesses which is fastest; the guess is often some
//! per cent off. So the first time a shape occurs its likeliest candidates are timed, with the caches emptied
//! between runs as they are when a whole model runs, and the fastest is kept, on disk too: the next start finds
//! it there. Numbers of rows are put into classes, or every length of a prompt would be a shape of its own.
//!
//! cuBLASLt counts columns first: a row-major `out [rows, outputs] = x [rows, inputs] * weights^T` is its
//! `D [outputs x rows] = A^T [outputs x inputs] * B [inputs x rows]` with A the weights and B the activations.
//!
//! All products share one workspace, so they must be put on one stream at a time.
#![allow(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::fmt::Write;
use std::mem::MaybeUninit;
use std::ptr::from_ref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result;
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasStatus_t,
    cudaDataType,
};

use super::disk_cache::{DiskCache, Key};
use super::driver::{Context, CudaGpu, DeviceMemory, Stream};
use super::gpu::{Format, Gpu, GpuError, GpuInfo, Memory, Product, Span};
use super::libraries::Libraries;

/// Memory that an algorithm may use for partial sums: what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms of a shape that are timed.
const CANDIDATES: usize = 8;
/// Timed runs of each; the fastest counts.
const RUNS: usize = 3;

/// cuBLASLt with the algorithms found so far.
pub(super) struct Products {
    handle: Handle,
    workspace: DeviceMemory,
    algorithms: Mutex<Algorithms>,
    store: Store,
}

struct Handle(cublasLtHandle_t);

// SAFETY: cuBLASLt's handle may be used by several threads at once (its documentation, "Thread safety").
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by `Products::new`.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

#[derive(Default)]
struct Algorithms {
    best: HashMap<Shape, cublasLtMatmulAlgo_t>,
    /// Exact numbers of rows that the algorithm of their class is known to take; those that it does not take have
    /// one of their own.
    checked: HashSet<(Shape, usize)>,
    exact: HashMap<(Shape, usize), cublasLtMatmulAlgo_t>,
    /// Found since they were last kept on disk.
    is_new: bool,
    /// Written between timed runs, to empty the caches. Freed when the algorithms are kept.
    flush: Option<DeviceMemory>,
}

/// Most exact numbers of rows that are remembered; then all are forgotten.
const MOST_CHECKED: usize = 1 << 14;

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    row_class: usize,
    inputs: usize,
    outputs: usize,
    format: Format,
    out_format: Format,
    has_bias: bool,
}

impl Shape {
    fn of(product: &Product<'_>) -> Self {
        Self {
            row_class: row_class(product.rows),
            inputs: product.inputs,
            outputs: product.outputs,
            format: product.format,
            out_format: product.out_format,
            has_bias: product.bias != Span::NONE,
        }
    }
}

/// The largest number of rows that shares an algorithm with this one: sizes of recorded decode steps up to 256,
/// powers of two beyond.
pub(super) fn row_class(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(16),
        _ => rows.next_power_of_two(),
    }
}

impl Products {
    pub(super) fn new(
        context: &Arc<Context>,
        info: &GpuInfo,
        libraries: &Libraries,
    ) -> Result<Self, GpuError> {
        context.enter()?;
        let handle = result::create_handle().map_err(|error| failed("cublasLtCreate", error.0))?;
        let handle = Handle(handle);
        let workspace = context.allocate(WORKSPACE_BYTES)?;
        let store = Store::new(info, libraries);
        let best = store.read();
        Ok(Self {
            handle,
            workspace,
            algorithms: Mutex::new(Algorithms { best, ..Algorithms::default() }),
            store,
        })
    }

    /// Keeps what was found on disk, and frees what finding it took.
    pub(super) fn keep(&self) {
        let mut algorithms = self.lock();
        algorithms.flush = None;
        if std::mem::take(&mut algorithms.is_new) {
            self.store.write(&algorithms.best);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Algorithms> {
        self.algorithms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Safety
    /// That of [`Gpu::multiply`].
    pub(super) unsafe fn multiply(
        &self,
        gpu: &CudaGpu,
        stream: &Stream,
        product: &Product<'_>,
    ) -> Result<(), GpuError> {
        if product.rows == 0 || product.outputs == 0 {
            return Ok(());
        }
        let call = Call::new(self, product)?;
        let algorithm = self.algorithm(gpu, stream, product, &call)?;
        // SAFETY: the caller's; spans were compared with the shapes.
        unsafe { call.run(stream, &algorithm) }
    }

    fn algorithm(
        &self,
        gpu: &CudaGpu,
        stream: &Stream,
        product: &Product<'_>,
        call: &Call<'_>,
    ) -> Result<cublasLtMatmulAlgo_t, GpuError> {
        let shape = Shape::of(product);
        let exact = (shape, product.rows);
        let mut algorithms = self.lock();
        if let Some(algorithm) = algorithms.exact.get(&exact) {
            return Ok(*algorithm);
        }
        if let Some(algorithm) = algorithms.best.get(&shape).copied() {
            if algorithms.checked.contains(&exact) {
                return Ok(algorithm);
            }
            if algorithms.checked.len() + algorithms.exact.len() >= MOST_CHECKED {
                algorithms.checked.clear();
                algorithms.exact.clear();
            }
            if call.takes(&algorithm) {
                algorithms.checked.insert(exact);
                return Ok(algorithm);
            }
            let guess = call.candidates(1)?[0];
            algorithms.exact.insert(exact, guess);
            return Ok(guess);
        }
        let candidates = call.candidates(CANDIDATES)?;
        // Nothing can be timed while a graph is recorded. The step was run before that, so this is for tests.
        if stream.is_capturing() || candidates.len() == 1 {
            return Ok(candidates[0]);
        }
        let best = Self::fastest(gpu, stream, call, &candidates, &mut algorithms)?;
        algorithms.best.insert(shape, best);
        algorithms.checked.insert(exact);
        algorithms.is_new = true;
        Ok(best)
    }

    /// The candidate with the shortest run. Each computes the same product, so it does no harm that it is
    /// computed several times.
    fn fastest(
        gpu: &CudaGpu,
        stream: &Stream,
        call: &Call<'_>,
        candidates: &[cublasLtMatmulAlgo_t],
        algorithms: &mut Algorithms,
    ) -> Result<cublasLtMatmulAlgo_t, GpuError> {
        if algorithms.flush.is_none() {
            // Without room for it the choice is a little worse.
            algorithms.flush = gpu.allocate(2 * gpu.info().l2_bytes as usize).ok();
        }
        let mut best = (f64::INFINITY, candidates[0]);
        for candidate in candidates {
            // SAFETY: as in `multiply`.
            if let Err(error) = unsafe { call.run(stream, candidate) } {
                if error.is_sticky() {
                    return Err(error);
                }
                continue;
            }
            for _ in 0..RUNS {
                if let Some(flush) = &algorithms.flush {
                    gpu.fill(stream, flush.span(), 0)?;
                }
                let start = gpu.record(stream)?;
                // SAFETY: as above.
                unsafe { call.run(stream, candidate) }?;
                let end = gpu.record(stream)?;
                let seconds = gpu.seconds_between(&start, &end)?;
                if seconds < best.0 {
                    best = (seconds, *candidate);
                }
            }
        }
        Ok(best.1)
    }
}

fn failed(operation: &str, status: cublasStatus_t) -> GpuError {
    let reason = format!("{status:?}");
    match status {
        // A kernel of the library crashed: the context is lost.
        cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED | cublasStatus_t::CUBLAS_STATUS_MAPPING_ERROR => {
            GpuError::Lost { operation: operation.to_owned(), reason }
        }
        _ => GpuError::Refused { what: operation.to_owned(), reason },
    }
}

fn data_type(format: Format) -> cudaDataType {
    match format {
        Format::BF16 => cudaDataType::CUDA_R_16BF,
        Format::F16 => cudaDataType::CUDA_R_16F,
        Format::E4M3 => cudaDataType::CUDA_R_8F_E4M3,
        Format::F32 => cudaDataType::CUDA_R_32F,
    }
}

/// `CUBLAS_OP_T` of `cublasOperation_t`, which these bindings lack.
const TRANSPOSE: i32 = 1;

/// A product as cuBLASLt describes it.
struct Call<'p> {
    products: &'p Products,
    operation: Operation,
    weights: Layout,
    x: Layout,
    out: Layout,
    addresses: [u64; 3],
}

impl<'p> Call<'p> {
    fn new(products: &'p Products, product: &Product<'_>) -> Result<Self, GpuError> {
        let Product { rows, inputs, outputs, .. } = *product;
        let (of_inputs, of_out) = (data_type(product.format), data_type(product.out_format));
        let operation = Operation::new()?;
        use cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE as BIAS_TYPE, CUBLASLT_MATMUL_DESC_BIAS_POINTER as BIAS,
            CUBLASLT_MATMUL_DESC_EPILOGUE as EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA as TRANSPOSE_A,
        };
        operation.set(TRANSPOSE_A, &TRANSPOSE)?;
        if product.bias != Span::NONE {
            operation.set(EPILOGUE, &cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            operation.set(BIAS_TYPE, &of_out)?;
            operation.set(BIAS, &product.bias.address())?;
        }
        Ok(Self {
            products,
            operation,
            weights: Layout::new(of_inputs, inputs, outputs)?,
            x: Layout::new(of_inputs, inputs, rows)?,
            out: Layout::new(of_out, outputs, rows)?,
            addresses: [product.weights.address(), product.x.address(), product.out.address()],
        })
    }

    /// Whether an algorithm that was found for other rows takes these.
    fn takes(&self, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let mut found = MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: live descriptors; the result is plain numbers, and written before it is read.
        unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                self.products.handle.0,
                self.operation.0,
                self.weights.0,
                self.x.0,
                self.out.0,
                self.out.0,
                algorithm,
                found.as_mut_ptr(),
            );
            status == cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && found.assume_init().workspaceSize <= WORKSPACE_BYTES
        }
    }

    /// At least one algorithm, likeliest first.
    fn candidates(&self, most: usize) -> Result<Vec<cublasLtMatmulAlgo_t>, GpuError> {
        let preference = self.preference()?;
        let mut found = vec![MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed(); most];
        let mut count: c_int = 0;
        // SAFETY: live descriptors, and room for as many results as asked for.
        let found = unsafe {
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.products.handle.0,
                self.operation.0,
                self.weights.0,
                self.x.0,
                self.out.0,
                self.out.0,
                preference.0,
                most as c_int,
                found.as_mut_ptr().cast(),
                &mut count,
            );
            status.result().map_err(|error| failed("cublasLtMatmulAlgoGetHeuristic", error.0))?;
            found.truncate(count as usize);
            found.into_iter().map(|result| result.assume_init()).collect::<Vec<_>>()
        };
        let usable = found.iter().filter(|result| result.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = usable.map(|result| result.algo).collect();
        match algorithms.is_empty() {
            false => Ok(algorithms),
            true => Err(failed("matrix product", cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        }
    }

    fn preference(&self) -> Result<Preference, GpuError> {
        use cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as WORKSPACE,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as OF_A,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES as OF_B,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES as OF_C,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as OF_D,
        };
        let preference = Preference::new()?;
        preference.set(WORKSPACE, &(WORKSPACE_BYTES as u64))?;
        let alignment = |address: u64| 1u32 << address.trailing_zeros().min(8);
        let [weights, x, out] = self.addresses.map(alignment);
        for (attribute, bytes) in [(OF_A, weights), (OF_B, x), (OF_C, out), (OF_D, out)] {
            preference.set(attribute, &bytes)?;
        }
        Ok(preference)
    }

    /// # Safety
    /// That of [`Gpu::multiply`].
    unsafe fn run(&self, stream: &Stream, algorithm: &cublasLtMatmulAlgo_t) -> Result<(), GpuError> {
        let (one, zero) = (1.0f32, 0.0f32);
        let [weights, x, out] = self.addresses.map(|address| address as *mut c_void);
        // SAFETY: the caller's, live descriptors, and a workspace of the size that was preferred.
        let outcome = unsafe {
            result::matmul(
                self.products.handle.0,
                self.operation.0,
                from_ref(&one).cast(),
                from_ref(&zero).cast(),
                weights,
                self.weights.0,
                x,
                self.x.0,
                out,
                self.out.0,
                out,
                self.out.0,
                algorithm,
                self.products.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                stream.handle().cast(),
            )
        };
        outcome.map_err(|error| failed("cublasLtMatmul", error.0))
    }
}

/// A product's descriptor with f32 sums.
struct Operation(cublasLtMatmulDesc_t);

impl Operation {
    fn new() -> Result<Self, GpuError> {
        let (sums, factors) = (cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F);
        let created = result::create_matmul_desc(sums, factors);
        created.map(Self).map_err(|error| failed("cublasLtMatmulDescCreate", error.0))
    }

    fn set<T>(&self, attribute: cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), GpuError> {
        // SAFETY: a live descriptor, and a value of the attribute's size, which the library checks.
        let set = unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, from_ref(value).cast(), size_of::<T>())
        };
        set.map_err(|error| failed("cublasLtMatmulDescSetAttribute", error.0))
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A matrix, columns first.
struct Layout(cublasLtMatrixLayout_t);

impl Layout {
    fn new(numbers: cudaDataType, height: usize, width: usize) -> Result<Self, GpuError> {
        let created = result::create_matrix_layout(numbers, height as u64, width as u64, height as i64);
        created.map(Self).map_err(|error| failed("cublasLtMatrixLayoutCreate", error.0))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What is allowed of an algorithm.
struct Preference(cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, GpuError> {
        let created = result::create_matmul_pref();
        created.map(Self).map_err(|error| failed("cublasLtMatmulPreferenceCreate", error.0))
    }

    fn set<T>(&self, attribute: cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<(), GpuError> {
        // SAFETY: a live descriptor, and a value of the attribute's size, which the library checks.
        let set = unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, from_ref(value).cast(), size_of::<T>())
        };
        set.map_err(|error| failed("cublasLtMatmulPreferenceSetAttribute", error.0))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// The algorithms of this GPU, driver and library on disk: an algorithm is plain numbers that mean the same to
/// the same version of the library.
struct Store {
    cache: Option<DiskCache>,
    key: Key,
}

impl Store {
    fn new(info: &GpuInfo, libraries: &Libraries) -> Self {
        // SAFETY: the library is there.
        let version = unsafe { sys::cublasLtGetVersion() }.to_string();
        let driver = libraries.driver.version.to_string();
        let key =
            Key::of(&[&info.name, &info.arch.to_string(), &driver, &version, &WORKSPACE_BYTES.to_string()]);
        Self { cache: DiskCache::of_user("products", "txt"), key }
    }

    fn read(&self) -> HashMap<Shape, cublasLtMatmulAlgo_t> {
        let text = self.cache.as_ref().and_then(|cache| cache.get(self.key));
        text.and_then(|text| String::from_utf8(text).ok()).map(|text| parse(&text)).unwrap_or_default()
    }

    fn write(&self, best: &HashMap<Shape, cublasLtMatmulAlgo_t>) {
        if let Some(cache) = &self.cache {
            cache.put(self.key, print(best).as_bytes());
        }
    }
}

const FORMATS: [Format; 4] = [Format::BF16, Format::F16, Format::E4M3, Format::F32];

/// A line a shape: its numbers, then the algorithm's eight.
fn print(best: &HashMap<Shape, cublasLtMatmulAlgo_t>) -> String {
    let place = |format| FORMATS.iter().position(|other| *other == format).unwrap_or(0);
    let mut lines: Vec<String> = Vec::with_capacity(best.len());
    for (shape, algorithm) in best {
        let Shape { row_class, inputs, outputs, format, out_format, has_bias } = *shape;
        let (format, out_format) = (place(format), place(out_format));
        let mut line =
            format!("{row_class} {inputs} {outputs} {format} {out_format} {}", usize::from(has_bias));
        for word in algorithm.data {
            let _ = write!(line, " {word}");
        }
        lines.push(line);
    }
    lines.sort_unstable();
    lines.join("\n")
}

/// The reverse; lines that are none are left out.
fn parse(text: &str) -> HashMap<Shape, cublasLtMatmulAlgo_t> {
    let line = |line: &str| {
        let numbers = line.split(' ').map(|word| word.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
        let (shape, algorithm) = numbers.split_at_checked(6)?;
        let &[row_class, inputs, outputs, format, out_format, has_bias] = shape else { return None };
        let shape = Shape {
            row_class: row_class as usize,
            inputs: inputs as usize,
            outputs: outputs as usize,
            format: *FORMATS.get(format as usize)?,
            out_format: *FORMATS.get(out_format as usize)?,
            has_bias: has_bias == 1,
        };
        Some((shape, cublasLtMatmulAlgo_t { data: algorithm.try_into().ok()? }))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::geometry::graph_ladder;
    use super::*;

    #[test]
    fn recorded_steps_have_classes_of_their_own() {
        for rows in graph_ladder(256) {
            assert_eq!(row_class(rows as usize), rows as usize);
        }
        assert_eq!([3, 257, 2048, 2049].map(row_class), [4, 512, 2048, 4096]);
        assert!((0..10_000).all(|rows| row_class(rows) >= rows));
    }

    #[test]
    fn algorithms_survive_the_way_to_disk() {
        let shape = Shape {
            row_class: 64,
            inputs: 4096,
            outputs: 6144,
            format: Format::BF16,
            out_format: Format::F32,
            has_bias: true,
        };
        let other = Shape { format: Format::E4M3, has_bias: false, ..shape };
        let algorithm = |first| cublasLtMatmulAlgo_t { data: [first, 1, 2, 3, 4, 5, 6, u64::MAX] };
        let best = HashMap::from([(shape, algorithm(7)), (other, algorithm(8))]);
        assert_eq!(parse(&print(&best)), best);
        assert_eq!(parse("").len(), 0);
        assert_eq!(parse("64 4096 6144 0 3 1 1 2 3\nnonsense\n64 1 1 9 0 0 1 1 1 1 1 1 1 1").len(), 0);
    }
}
