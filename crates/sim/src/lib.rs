//! What a named GPU can do with a model, as arithmetic.
//!
//! - [`hardware`] and [`shape`]: the numbers of a GPU and of a model
//! - [`formulas`]: the closed forms F1 to F10, one function each
//! - [`roofline`]: bytes, operations and least time of one step of a batch
//! - [`assumptions`] and [`planner`]: from daily users to GPUs, with what the usual shortcuts would have got wrong
//! - [`whiteboard`]: the plan as one would write it down
//!
//! All of it is pure: no clock, no randomness, no files.

pub mod assumptions;
pub mod dtype;
pub mod formulas;
pub mod hardware;
pub mod numbers;
mod pace;
pub mod planner;
pub mod roofline;
pub mod shape;
mod shortcuts;
pub mod whiteboard;

pub use assumptions::Assumptions;
pub use dtype::Dtype;
pub use hardware::{HardwareError, HardwareProfile, Interconnect};
pub use planner::{CapacityPlan, PlanError, plan};
pub use roofline::{Limit, Roofline, RooflineError, SequenceWork, StepCost};
pub use shape::{ModelShape, ShapeError, SlidingWindow};
pub use shortcuts::Warning;
