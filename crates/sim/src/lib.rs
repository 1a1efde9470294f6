//! What a named GPU can do with a model, as arithmetic.
//!
//! - [`hardware`] and [`shape`]: the numbers of a GPU and of a model
//! - [`formulas`]: the closed forms F1 to F10, one function each
//! - [`roofline`]: bytes, operations and least time of one step of a batch
//! - [`assumptions`] and [`planner`]: from daily users to GPUs, with what the usual shortcuts would have got wrong
//! - [`whiteboard`]: the plan as one would write it down
//!
//! And as a device that only takes time:
//!
//! - [`cost`], [`calibration`] and [`fit`]: how long a step takes, estimated or fitted to what was measured
//! - [`device`]: a runner for the engine, with its clock, its KV memory and its answers in `device_*`
//! - [`device_pool`]: how much the device's memory holds
//! - [`replay`]: a load over the engine in virtual time
//!
//! And what decides how many replicas there are: [`autoscale`], KEDA and the Horizontal Pod Autoscaler.
//!
//! All but the device's clock is pure: no time, no randomness, no files.

pub mod assumptions;
pub mod autoscale;
pub mod calibration;
pub mod cost;
pub mod device;
pub mod device_answers;
mod device_chain;
pub mod device_clock;
pub mod device_pool;
pub mod dtype;
pub mod fit;
pub mod formulas;
pub mod hardware;
mod least_squares;
pub mod numbers;
mod pace;
pub mod planner;
pub mod replay;
pub mod roofline;
pub mod shape;
mod shortcuts;
pub mod whiteboard;

pub use assumptions::Assumptions;
pub use calibration::{Calibration, CalibrationError};
pub use cost::{CostModel, StepSums};
pub use device::{DeviceOptions, SimulatedDevice};
pub use device_answers::Answers;
pub use device_clock::{Pace, VirtualClock};
pub use device_pool::{DoesNotFit, KvPool, kv_pool};
pub use dtype::Dtype;
pub use hardware::{HardwareError, HardwareProfile, Interconnect};
pub use planner::{CapacityPlan, PlanError, plan};
pub use roofline::{Limit, Roofline, RooflineError, SequenceWork, StepCost};
pub use shape::{ModelShape, ShapeError, SlidingWindow};
pub use shortcuts::Warning;
