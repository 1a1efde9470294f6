//! What Kubernetes' horizontal pod autoscaler and KEDA decide, as arithmetic without a cluster: time is an argument,
//! samples come from a store in memory, and the answer is a number of replicas with the reason for it.
//!
//! [`Manifest::read`] takes a real ScaledObject or HorizontalPodAutoscaler, [`Autoscaler`] follows it. Every fact is
//! from the sources of Kubernetes 1.36 (`pkg/controller/podautoscaler`), KEDA 2.20 (`pkg/scaling`, `pkg/fallback`) and
//! Prometheus 3 (`promql`); the file of each says which. Whatever a manifest asks for and is not here is refused by
//! name.

pub mod behavior;
pub mod formula;
pub mod hpa;
pub mod keda;
pub mod manifest;
pub mod promql;
pub mod quantity;
pub mod replicas;
pub mod scaler;
pub mod store;

pub use manifest::{Manifest, ManifestError};
pub use scaler::{Autoscaler, Pod};
pub use store::SampleStore;
