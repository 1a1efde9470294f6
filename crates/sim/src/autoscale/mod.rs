//! What KEDA and the Horizontal Pod Autoscaler do, as arithmetic: time, metrics and pods are arguments.
//!
//! - [`manifest`] reads a ScaledObject, or a HorizontalPodAutoscaler, as it is given to Kubernetes; [`adapter`] the
//!   rules of prometheus-adapter, which make metrics of pods from queries
//! - [`keda`] is KEDA's operator: from zero to one and back, fallback; [`hpa`] what is between one and the most
//! - [`promql`] answers the triggers' queries from [`samples`], which somebody scrapes
//! - [`formula`] is the language of `scalingModifiers`
//!
//! Each function names the function of Kubernetes 1.36 or KEDA 2.20 that it follows.

use std::time::Duration;

pub mod adapter;
pub mod formula;
pub mod hpa;
pub mod keda;
pub mod manifest;
pub mod promql;
pub mod samples;

pub use adapter::Adapter;
pub use keda::{Autoscaler, ScaleTo};
pub use manifest::{Manifest, ManifestError};
pub use samples::SampleStore;

/// The pods of the Deployment as the controllers see them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodCounts {
    /// Replicas that the Deployment asks for.
    pub wanted: u32,
    /// Pods that there are and that are not going: ready, starting and pending ones.
    pub existing: u32,
    pub ready: u32,
    /// Of the existing ones, those whose container runs, ready or not, by the value of their label `pod`.
    pub running: Vec<String>,
    /// The existing ones as an autoscaler on CPU sees them; nothing where none is asked.
    pub cpu: Vec<CpuPod>,
}

/// A pod and the CPU that metrics-server says it uses.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuPod {
    /// `status.startTime`, if a node has taken it in.
    pub began: Option<Duration>,
    /// Its container runs: it is not pending.
    pub is_running: bool,
    pub is_ready: bool,
    /// When its condition Ready changed last.
    pub readiness_changed: Duration,
    pub usage: Option<CpuUsage>,
}

/// What metrics-server knows of a pod.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpuUsage {
    /// When it was read, and the time before that over which it is the mean.
    pub at: Duration,
    pub window: Duration,
    /// Over what the pod asks for.
    pub percent: f64,
}
