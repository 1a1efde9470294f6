//! The real driver interface without a GPU: `CudaGpu` on NVIDIA's three libraries as the emulator plays them
//! (`emulator/libraries`). The doctor's checks go through every call that is made of the real ones; and each mistake
//! that those libraries would punish now and then is punished every time.
//!
//! The loader finds the libraries by the environment, so each test runs its other half in a process of its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]
#![allow(unsafe_code, reason = "the driver is called with mistakes that the safe side does not allow")]

use std::ffi::c_void;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUgraph, CUresult, CUstream, CUstreamCaptureMode};
use servelab_model::cuda::driver::CudaGpu;
use servelab_model::cuda::examine::{Effort, Finding, examine};
use servelab_model::cuda::gpu::{Argument, Gpu, GpuError, Launch, Memory, Pinned};
use servelab_model::cuda::kernels::{Entry, KernelFile, Module, Parameter, ParameterKind};

#[path = "../src/cuda/emulator/libraries/command.rs"]
mod command;

/// Runs the ignored test `inner` with the emulated libraries and these settings. Gives what it wrote.
fn on_emulated_libraries(inner: &str, settings: &str) -> Option<String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda/emulator/libraries/build.sh");
    let libraries = command::build(script, env!("CARGO_TARGET_TMPDIR"))?;
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([inner, "--exact", "--ignored", "--nocapture"]);
    command::set_up(&mut command, &libraries, settings, cache.path()).unwrap();
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{settings}: {text}");
    Some(text)
}

#[test]
fn every_check_of_the_doctor_passes() {
    for settings in ["order=late,seed=11", "order=random,arch=89,seed=12"] {
        let Some(text) = on_emulated_libraries("checks", settings) else { return };
        assert!(!text.contains("emulated GPU: "), "the driver complains: {text}");
    }
}

#[test]
#[ignore = "the other half of every_check_of_the_doctor_passes"]
fn checks() {
    let gpu = Arc::new(CudaGpu::open(None).unwrap());
    assert_eq!(gpu.info().name, "emulated GPU");
    let before = gpu.free_bytes().unwrap();
    let mut findings = Vec::new();
    examine(&gpu, Effort::SMALL, &mut |finding| findings.push(finding));
    let faults: Vec<String> = findings.iter().filter_map(Finding::fault).collect();
    assert!(faults.is_empty() && findings.len() > 50, "{faults:#?}");
    gpu.keep_algorithms();
    assert_eq!(gpu.free_bytes().unwrap(), before, "all memory is given back");
}

#[test]
fn mistakes_show() {
    let _ = on_emulated_libraries("mistakes", "order=late");
}

/// A context, and two streams that have nothing to do.
struct Bare {
    gpu: CudaGpu,
    streams: [CUstream; 2],
}

fn good(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

#[test]
#[ignore = "the other half of mistakes_show"]
fn mistakes() {
    let gpu = CudaGpu::open(None).unwrap();
    // Makes the context current on this thread.
    gpu.free_bytes().unwrap();
    let mut streams = [null_mut(); 2];
    for stream in &mut streams {
        // SAFETY: a variable of this function.
        good(unsafe { sys::cuStreamCreate(stream, 1) });
    }
    let bare = Bare { gpu, streams };
    bare.a_buffer_that_is_reused_too_early();
    bare.an_answer_that_is_read_too_early();
    bare.a_stream_that_does_not_wait_for_another();
    bare.memory_beyond_an_allocation();
    bare.an_allocation_while_a_graph_is_recorded();
    bare.a_thread_without_a_context();
    bare.a_kernel_that_leaves_its_memory();
}

fn content(gpu: &CudaGpu, memory: &impl Memory) -> Vec<u8> {
    let stream = gpu.stream().unwrap();
    let mut bytes = vec![0; memory.bytes()];
    gpu.download(&stream, memory.span(), &mut bytes).unwrap();
    bytes
}

impl Bare {
    fn device(&self, bytes: &[u8]) -> impl Memory {
        let memory = self.gpu.allocate(bytes.len()).unwrap();
        let stream = self.gpu.stream().unwrap();
        self.gpu.upload(&stream, bytes, memory.span()).unwrap();
        self.gpu.synchronise(&stream).unwrap();
        memory
    }

    /// As the first stream leaves it.
    fn left(&self, memory: &impl Memory) -> Vec<u8> {
        let mut bytes = vec![0; memory.bytes()];
        // SAFETY: as long as the memory; into pageable memory the copy is done when the call returns.
        good(unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                bytes.as_mut_ptr().cast(),
                memory.address(),
                bytes.len(),
                self.streams[0],
            )
        });
        bytes
    }

    fn a_buffer_that_is_reused_too_early(&self) {
        let to = self.device(&[0; 4]);
        let mut buffer = self.gpu.pinned(4).unwrap();
        buffer.bytes_mut().fill(1);
        let start = buffer.bytes_mut().as_mut_ptr();
        // SAFETY: within the buffer, which lives until the copy is done; that it is written before is the point.
        unsafe {
            good(sys::cuMemcpyHtoDAsync_v2(to.address(), start.cast_const().cast(), 4, self.streams[0]));
            start.write_bytes(2, 4);
        }
        assert_eq!(self.left(&to), [2; 4]);
    }

    fn an_answer_that_is_read_too_early(&self) {
        let from = self.device(&[7; 4]);
        let buffer = self.gpu.pinned(4).unwrap();
        let start = buffer.bytes().as_ptr().cast_mut();
        // SAFETY: within both, which live until the stream is done.
        unsafe {
            good(sys::cuMemcpyDtoHAsync_v2(start.cast(), from.address(), 4, self.streams[0]));
            assert_eq!(std::slice::from_raw_parts(start, 4), [0; 4], "not yet");
            good(sys::cuStreamSynchronize(self.streams[0]));
            assert_eq!(std::slice::from_raw_parts(start, 4), [7; 4]);
        }
    }

    fn a_stream_that_does_not_wait_for_another(&self) {
        for waits in [false, true] {
            let (from, to) = (self.device(&[0; 4]), self.device(&[9; 4]));
            let mut event: CUevent = null_mut();
            let [one, other] = self.streams;
            // SAFETY: memory and event live until both streams are done.
            unsafe {
                good(sys::cuEventCreate(&mut event, 0));
                good(sys::cuMemsetD8Async(from.address(), 5, 4, one));
                good(sys::cuEventRecord(event, one));
                if waits {
                    good(sys::cuStreamWaitEvent(other, event, 0));
                }
                good(sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), 4, other));
                good(sys::cuStreamSynchronize(other));
                good(sys::cuStreamSynchronize(one));
                good(sys::cuEventDestroy_v2(event));
            }
            assert_eq!(self.left(&to), [if waits { 5 } else { 0 }; 4]);
        }
    }

    fn memory_beyond_an_allocation(&self) {
        let memory = self.device(&[0; 4]);
        // SAFETY: refused.
        let result = unsafe { sys::cuMemsetD8Async(memory.address(), 1, 5, self.streams[0]) };
        assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
        let error = self.gpu.allocate(1 << 40).err();
        assert!(matches!(error, Some(GpuError::OutOfMemory { .. })), "{error:?}");
    }

    fn an_allocation_while_a_graph_is_recorded(&self) {
        const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let (mut graph, mut address): (CUgraph, u64) = (null_mut(), 0);
        // SAFETY: variables of this function.
        unsafe {
            good(sys::cuStreamBeginCapture_v2(self.streams[0], MODE));
            let refused = sys::cuMemAlloc_v2(&mut address, 4);
            assert_eq!(refused, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            let ended = sys::cuStreamEndCapture(self.streams[0], &mut graph);
            assert_eq!(ended, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        // The same through our own interface, which says so before the driver has to.
        let stream = self.gpu.stream().unwrap();
        let graph = self.gpu.capture(&stream, &mut || self.gpu.synchronise(&stream));
        assert!(matches!(graph, Err(GpuError::Refused { .. })));
        self.gpu.synchronise(&stream).unwrap();
    }

    fn a_thread_without_a_context(&self) {
        let memory = self.device(&[3; 4]);
        std::thread::scope(|scope| {
            let (address, stream) = (memory.address(), self.streams[0] as usize);
            // SAFETY: refused.
            let call =
                move || unsafe { sys::cuMemsetD8Async(address, 1, 4, stream as *mut c_void as CUstream) };
            assert_eq!(scope.spawn(call).join().unwrap(), CUresult::CUDA_ERROR_INVALID_CONTEXT);
            // Our own interface makes it current first.
            let gpu = &self.gpu;
            scope.spawn(|| assert_eq!(content(gpu, &memory), [3; 4])).join().unwrap();
        });
    }

    /// Last: the GPU is lost afterwards.
    fn a_kernel_that_leaves_its_memory(&self) {
        static ENTRY: Entry =
            Entry { name: "beyond", parameters: &[Parameter { name: "out", kind: ParameterKind::Pointer }] };
        static ENTRIES: [&Entry; 1] = [&ENTRY];
        static FILE: KernelFile = KernelFile {
            name: "beyond.cu",
            source: "extern \"C\" __global__ void beyond(float* out) { out[threadIdx.x] = 1.0f; }\n",
            macros: &[],
            options: &[],
            entries: &ENTRIES,
        };
        let module = self.gpu.load(&Module::new(&FILE, vec![])).unwrap();
        let kernel = self.gpu.kernel(&module, &ENTRY, 0).unwrap();
        let stream = self.gpu.stream().unwrap();
        for (threads, is_good) in [(64, true), (96, false)] {
            let out = self.gpu.allocate(256).unwrap();
            let launch = Launch { grid: [1, 1, 1], block: threads, shared_bytes: 0 };
            // SAFETY: the kernel that leaves its memory is stopped before it does.
            unsafe { self.gpu.launch(&stream, &kernel, launch, &[Argument::Memory(out.span())]).unwrap() };
            assert_eq!(self.gpu.synchronise(&stream).is_ok(), is_good, "{threads} threads");
        }
        let later = self.gpu.allocate(4).err().unwrap();
        assert!(later.is_sticky() && later.to_string().contains("CUDA_ERROR_LAUNCH_FAILED"), "{later}");
    }
}
