//! What is simulated. Durations are virtual time.

use std::time::Duration;

use servelab_bench::result::Slo;
use servelab_bench::workload::Workload;
use servelab_router::choice::policy::Policy;

use crate::replica::ReplicaKind;
use crate::traffic::Load;

#[derive(Clone, Debug)]
pub struct Settings {
    /// Of arrivals, lengths, the router's ties, and faults.
    pub seed: u64,
    pub kind: ReplicaKind,
    /// The real engine takes every step, in place of the fast replica.
    pub is_exact: bool,
    pub load: Load,
    pub workload: Workload,
    /// Requests are sent for so long; what has begun then ends as it would.
    pub duration: Duration,
    pub router: RouterSettings,
    /// What a request waits besides what the replicas and their calibration know of: from the client through the router
    /// and back.
    pub network_time: Duration,
    pub pods: PodSettings,
    pub faults: FaultSettings,
    /// How often Prometheus reads the metrics of router and replicas.
    pub scrape_interval: Duration,
    /// As the label `model_name` says.
    pub model_name: String,
    pub slo: Slo,
    pub dollars_per_gpu_hour: f64,
}

/// The router, as `servelab route` has it.
#[derive(Clone, Copy, Debug)]
pub struct RouterSettings {
    pub policy: Policy,
    /// The policy `cost` looks into the caches instead of guessing.
    pub is_oracle: bool,
    /// Requests that are held while no replica is ready, and how long.
    pub max_held: usize,
    pub hold_timeout: Duration,
    /// Requests at the replicas for each that is ready; more wait in the router.
    pub max_in_flight_per_replica: usize,
    pub max_waiting: usize,
    /// Attempts at other replicas after the first.
    pub max_retries: u32,
    /// How often replicas are asked how they are, and how long they may take to say so.
    pub probe_interval: Duration,
    pub probe_timeout: Duration,
    /// How long a stream may be silent.
    pub idle_timeout: Duration,
    /// Memory of the index of prefixes, of each router.
    pub index_bytes: usize,
}

impl Default for RouterSettings {
    fn default() -> Self {
        Self {
            policy: Policy::Cost,
            is_oracle: false,
            max_held: 1000,
            hold_timeout: Duration::from_secs(120),
            max_in_flight_per_replica: 512,
            max_waiting: 4096,
            max_retries: 3,
            probe_interval: Duration::from_secs(1),
            probe_timeout: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(60),
            index_bytes: 64 << 20,
        }
    }
}

/// How pods come and go.
#[derive(Clone, Copy, Debug)]
pub struct PodSettings {
    /// Ready when the simulation begins.
    pub initial: u32,
    pub stages: StartStages,
    pub nodes: NodeSettings,
    /// How long a pod that is to go may finish what it has.
    pub termination_grace: Duration,
}

/// From the moment at which a node has room until the pod is ready.
#[derive(Clone, Copy, Debug)]
pub struct StartStages {
    pub schedule: Duration,
    /// On a node that has not run a pod before.
    pub image: Duration,
    pub load: Duration,
    pub warm_up: Duration,
}

#[derive(Clone, Copy, Debug)]
pub struct NodeSettings {
    pub gpus_per_node: u32,
    /// There when the simulation begins, with the image on their disks.
    pub initial: u32,
    /// Most that there can be.
    pub most: u32,
    /// From the moment at which a pod finds no room until a new node is there.
    pub start: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct FaultSettings {
    /// Of the fleet; one ready pod at random each time. Its container is started anew.
    pub crashes_per_hour: f64,
    /// Of the fleet; the router and Prometheus do not reach the pod for so long.
    pub partitions_per_hour: f64,
    pub partition: Duration,
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{name} is {value}; it must be {rule}")]
    Range { name: &'static str, value: String, rule: &'static str },
    #[error(transparent)]
    Engine(#[from] servelab_engine::ConfigError),
    #[error(
        "the workload {0} is text, and only a tokenizer knows how many tokens that is; use one with given lengths"
    )]
    Text(String),
    #[error(
        "a replica needs {gpus} GPUs and a node has {gpus_per_node}; give nodes of at least {gpus}, or fewer GPUs to a \
         replica"
    )]
    Node { gpus: u32, gpus_per_node: u32 },
}

/// Most pods of a fleet.
pub const MAX_PODS: u32 = 10_000;
const MAX_RETRIES: u32 = 100;
const MAX_NETWORK_TIME: Duration = Duration::from_secs(60);
/// A month.
const MAX_DURATION: Duration = Duration::from_secs(31 * 86_400);

impl Settings {
    /// # Errors
    /// The first setting that cannot be.
    pub fn validate(&self) -> Result<(), SettingsError> {
        self.kind.engine.validate()?;
        if self.workload.is_given {
            return Err(SettingsError::Text(self.workload.name.clone()));
        }
        let (gpus, gpus_per_node) = (self.kind.gpus, self.pods.nodes.gpus_per_node);
        if gpus > gpus_per_node {
            return Err(SettingsError::Node { gpus, gpus_per_node });
        }
        let seconds = |duration: Duration| format!("{} s", duration.as_secs_f64());
        let wrong = |name, value, rule| Err(SettingsError::Range { name, value, rule });
        if self.duration.is_zero() || self.duration > MAX_DURATION {
            return wrong("the duration", seconds(self.duration), "above 0 and at most 31 days");
        }
        if self.pods.initial > MAX_PODS {
            return wrong("the number of replicas", self.pods.initial.to_string(), "at most 10000");
        }
        if self.router.max_retries > MAX_RETRIES {
            return wrong("the number of retries", self.router.max_retries.to_string(), "at most 100");
        }
        if self.network_time > MAX_NETWORK_TIME {
            return wrong("the network's time", seconds(self.network_time), "at most a minute");
        }
        for (name, value) in [
            ("the scrape interval", self.scrape_interval),
            ("the router's probe interval", self.router.probe_interval),
        ] {
            if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&value) {
                return wrong(name, seconds(value), "from 100 ms to an hour");
            }
        }
        for (name, value) in [
            ("crashes an hour", self.faults.crashes_per_hour),
            ("partitions an hour", self.faults.partitions_per_hour),
        ] {
            if !(0.0..=1e5).contains(&value) {
                return wrong(name, value.to_string(), "from 0 to 100000");
            }
        }
        Ok(())
    }
}
