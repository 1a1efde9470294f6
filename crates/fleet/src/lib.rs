//! A fleet in virtual time: requests, router, replicas, autoscaler and faults, without a GPU and without waiting.
//!
//! Everything that decides is the real thing: the router's choice, the engine's scheduler and block pool, the load
//! generator's workloads and arrivals. What is simulated is time: a step takes what the cost model of `servelab_sim`
//! says, a pod starts in stages. [`run`] is the queue of events; the same settings give the same result, to the bit.
//!
//! - [`settings`] and [`traffic`]: what is simulated
//! - [`replica`]: one replica, as the real engine and as its fast equal
//! - [`gateway`], [`pods`], `requests.rs`, `lifecycle.rs`: what happens to requests and to pods
//! - [`scaler`], [`scrape`] and [`metrics_server`]: what the autoscaler sees and says
//! - [`series`] and [`outcome`]: what remains

pub mod counters;
pub mod exposition;
pub mod gateway;
mod lifecycle;
pub mod metrics_server;
pub mod outcome;
pub mod page;
pub mod pods;
pub mod replica;
mod requests;
pub mod run;
pub mod scaler;
pub mod scrape;
pub mod search;
pub mod series;
pub mod settings;
pub mod text;
pub mod traffic;

pub use outcome::{Failure, Outcome};
pub use replica::ReplicaKind;
pub use run::{Run, simulate};
pub use scaler::Scaler;
pub use settings::{
    FaultSettings, NodeSettings, PodSettings, RouterSettings, Settings, SettingsError, StartStages,
};
pub use traffic::Load;
