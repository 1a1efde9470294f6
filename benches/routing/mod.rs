//! How good the router's choices are: a fleet in virtual time over the real picker, the real engines and the real
//! block pools.

pub mod bounds;
pub mod replica;
pub mod run;
pub mod scenario;
