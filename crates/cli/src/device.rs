//! Which device computes, and why, in one line.

use std::path::Path;
use std::sync::Arc;

use servelab_model::EngineKind;
use servelab_model::cuda::driver::{CudaGpu, OpenError};
use servelab_model::cuda::gpu::{Gpu, GpuInfo};

use crate::settings::{DeviceChoice, EngineSettings};
use crate::simulated::SimulatedSettings;
use crate::size::ByteSize;

/// What computes.
#[derive(Clone)]
pub enum Device {
    Cpu,
    Cuda(Arc<CudaGpu>),
    Sim(Box<SimulatedSettings>),
}

/// A device with the reason why it was taken.
#[derive(Clone)]
pub struct Chosen {
    pub device: Device,
    /// Whether the CPU may stand in for a GPU that has no kernels for the model.
    pub may_change: bool,
    pub reason: String,
}

/// `--device cuda` and no GPU.
#[derive(Debug, thiserror::Error)]
#[error("--device cuda: {0}; or use --device cpu")]
pub struct NoGpu(OpenError);

/// The GPU, if one was asked for or is there.
///
/// # Errors
/// If one was asked for and cannot be used.
pub fn choose(settings: &EngineSettings) -> Result<Chosen, NoGpu> {
    let cpu = |reason: String| Chosen { device: Device::Cpu, may_change: false, reason };
    if settings.device == DeviceChoice::Cpu {
        return Ok(cpu("as asked for".to_owned()));
    }
    if let Some(simulated) = &settings.simulated {
        let (reason, device) = (simulated.describe(), Device::Sim(simulated.clone()));
        return Ok(Chosen { device, may_change: false, reason });
    }
    if settings.kind == EngineKind::Naive {
        return Ok(cpu("the naive engine computes there".to_owned()));
    }
    match (open(settings.gpu.library_folder.as_deref()), settings.device) {
        (Ok(gpu), choice) => Ok(Chosen {
            reason: describe(gpu.info()),
            device: Device::Cuda(gpu),
            may_change: choice == DeviceChoice::Auto,
        }),
        (Err(error), DeviceChoice::Cuda) => Err(NoGpu(error)),
        (Err(error), _) => Ok(cpu(error.to_string())),
    }
}

fn open(folder: Option<&Path>) -> Result<Arc<CudaGpu>, OpenError> {
    CudaGpu::open(folder).map(Arc::new)
}

/// Such as `NVIDIA H100 80GB HBM3, compute capability 9.0, 79.1 GiB`.
pub fn describe(info: &GpuInfo) -> String {
    format!("{}, compute capability {}, {}", info.name, info.arch, ByteSize(info.memory_bytes))
}

impl Chosen {
    /// `cpu`, `cuda` or `sim`.
    pub fn name(&self) -> &'static str {
        match self.device {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Sim(_) => "sim",
        }
    }
}
