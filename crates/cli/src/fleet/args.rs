//! What was typed for `servelab sim`. What it means together is decided in `settings.rs`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use servelab_bench::result::SloLimit;
use servelab_sim::Dtype;

use crate::bench::args::{OnOff, Step, WorkloadArgs};
use crate::size::TimeSpan;

#[derive(Args, Clone, Debug, Default)]
pub struct FleetArgs {
    #[command(flatten)]
    pub replica: ReplicaArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub workload: WorkloadArgs,
    #[command(flatten)]
    pub scaling: ScalingArgs,
    #[command(flatten)]
    pub router: RouterArgs,
    #[command(flatten)]
    pub faults: FaultArgs,
    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Args, Clone, Debug, Default)]
pub struct ReplicaArgs {
    /// Name of a known shape, a config.json, or a folder that holds one [default: llama-3.1-8b].
    #[arg(long, value_name = "NAME|FILE", help_heading = "Replica")]
    pub model: Option<String>,
    /// Number format of the weights: bf16, f16, fp8 or f32 [default: bf16].
    #[arg(long, help_heading = "Replica")]
    pub dtype: Option<Dtype>,
    /// Number format of keys and values [default: bf16].
    #[arg(long, value_name = "DTYPE", help_heading = "Replica")]
    pub kv_dtype: Option<Dtype>,
    /// Name of a known GPU, or a profile (TOML), calibrated or not [default: h100].
    #[arg(long, value_name = "NAME|FILE", help_heading = "Replica")]
    pub hardware: Option<String>,
    /// GPUs of one replica [default: the fewest that the model fits on].
    #[arg(long, value_name = "GPUS", help_heading = "Replica")]
    pub tp: Option<u32>,
    /// Share of a GPU's memory that the engine may use [default: 0.9].
    #[arg(long, value_name = "SHARE", help_heading = "Replica")]
    pub gpu_memory_utilization: Option<f64>,
    /// As for servelab serve [default: 16].
    #[arg(long, value_name = "TOKENS", help_heading = "Replica")]
    pub block_size: Option<u32>,
    /// As for servelab serve [default: 256].
    #[arg(long, value_name = "COUNT", help_heading = "Replica")]
    pub max_running: Option<u32>,
    /// As for servelab serve [default: 2048].
    #[arg(long, value_name = "TOKENS", help_heading = "Replica")]
    pub max_batched_tokens: Option<u32>,
    /// As for servelab serve [default: 512].
    #[arg(long, value_name = "COUNT", help_heading = "Replica")]
    pub max_waiting: Option<u32>,
    /// As for servelab serve [default: what the model and its memory allow].
    #[arg(long, value_name = "TOKENS", help_heading = "Replica")]
    pub max_model_len: Option<u32>,
    /// Forget the blocks of ended sequences.
    #[arg(long, help_heading = "Replica")]
    pub no_prefix_cache: bool,
    /// Let the real engine take every single step. Gives the same result, later.
    #[arg(long, help_heading = "Replica")]
    pub exact: bool,
}

#[derive(Args, Clone, Debug, Default)]
pub struct LoadArgs {
    /// Requests a second; what that means is --shape's business [default: the workload's own, else 1].
    #[arg(long, value_name = "REQ/S", help_heading = "Load")]
    pub rate: Option<f64>,
    /// How the rate goes over time [default: steady].
    #[arg(long, help_heading = "Load")]
    pub shape: Option<Shape>,
    /// The highest rate over --rate: of a day, at most 2 [default: 1.8]; of a spike [default: 10].
    #[arg(long, value_name = "FACTOR", help_heading = "Load")]
    pub peak: Option<f64>,
    /// How long a day is [default: 24h, or --duration if that is shorter].
    #[arg(long, value_name = "TIME", help_heading = "Load")]
    pub period: Option<TimeSpan>,
    /// With --rate: a Poisson process that is on and off, for exponential times with these means.
    #[arg(long, value_name = "ON,OFF", help_heading = "Load")]
    pub on_off: Option<OnOff>,
    /// Rates one after the other, such as 2x60s,20x30s,2x60s; 2-20x60s goes from one to the other.
    #[arg(long, value_name = "RATExTIME,..", value_delimiter = ',', help_heading = "Load")]
    pub steps: Vec<Step>,
    /// So many users, each of whom asks, reads the answer, and asks again.
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub users: Option<u32>,
    /// How long a user reads, exponential with this mean; 0: all of them always wait for an answer [default: 30s].
    #[arg(long, value_name = "TIME", help_heading = "Load")]
    pub think_time: Option<TimeSpan>,
    /// For how long requests are sent, in virtual time [default: 1h, or all of --steps].
    #[arg(long, value_name = "TIME", help_heading = "Load")]
    pub duration: Option<TimeSpan>,
    /// What was promised: METRIC=TIME[@pNN] with ttft, tpot or e2el, separated by commas
    /// [default: ttft=1s@p95].
    #[arg(long, value_name = "LIMIT,..", value_delimiter = ',', help_heading = "Load")]
    pub slo: Vec<SloLimit>,
}

/// How the rate goes over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// The same all the time; arrivals as the workload has them, else Poisson.
    Steady,
    /// A day: --rate on average, a low at its beginning and end, --peak times that in its middle.
    Diurnal,
    /// --rate, and for a third of the time --peak times that.
    Spike,
    /// Nothing for a tenth of the time, --rate for four tenths, nothing again.
    FromZero,
}

#[derive(Args, Clone, Debug, Default)]
pub struct ScalingArgs {
    /// What scales the fleet: a ScaledObject or HorizontalPodAutoscaler (YAML), or one that comes with the program:
    /// queue, concurrency, from-zero, kv-use, ttft, gpu-utilisation, cpu, overshoot, never-wakes. Several are compared
    /// side by side.
    #[arg(long, value_name = "FILE|NAME", help_heading = "Scaling")]
    pub scaler: Vec<String>,
    /// Rules of prometheus-adapter (its configuration, or the values of its Helm chart), which give a
    /// HorizontalPodAutoscaler its metrics of pods.
    #[arg(long, value_name = "FILE", requires = "scaler", help_heading = "Scaling")]
    pub prometheus_adapter: Option<PathBuf>,
    /// Replicas that are ready when it begins [default: 1, or as few as the scaler may have]; without --scaler the
    /// number stays as it is.
    #[arg(long, value_name = "COUNT", help_heading = "Scaling")]
    pub replicas: Option<u32>,
    /// Value of the label model_name, which queries ask for [default: the model's name].
    #[arg(long, value_name = "NAME", help_heading = "Scaling")]
    pub served_model_name: Option<String>,
    /// How often Prometheus reads the metrics [default: 5s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub scrape_interval: Option<TimeSpan>,
    /// From the moment at which a node has room until the container is made [default: 1s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub schedule_time: Option<TimeSpan>,
    /// Pulling the image, on a node that has not had it [default: 60s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub image_time: Option<TimeSpan>,
    /// Loading the weights [default: their bytes at 2 GB/s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub load_time: Option<TimeSpan>,
    /// From then until it is ready [default: 20s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub warm_up_time: Option<TimeSpan>,
    /// What a pod may take to finish its requests when it has to go [default: 60s].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub termination_grace: Option<TimeSpan>,
    /// GPUs of a node [default: 8, or --tp if that is more].
    #[arg(long, value_name = "GPUS", help_heading = "Scaling")]
    pub gpus_per_node: Option<u32>,
    /// Nodes that are there when it begins [default: as many as the most replicas need].
    #[arg(long, value_name = "COUNT", help_heading = "Scaling")]
    pub nodes: Option<u32>,
    /// Most nodes that there can be [default: as many as the most replicas need].
    #[arg(long, value_name = "COUNT", help_heading = "Scaling")]
    pub most_nodes: Option<u32>,
    /// From the moment at which a pod finds no room until a new node is there [default: 3m].
    #[arg(long, value_name = "TIME", help_heading = "Scaling")]
    pub node_time: Option<TimeSpan>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct RouterArgs {
    /// As for servelab route, or oracle: the policy cost with a look into every cache [default: cost].
    #[arg(long, value_name = "POLICY", help_heading = "Router")]
    pub policy: Option<String>,
    /// Requests that are held while no replica is ready [default: 1000].
    #[arg(long, value_name = "COUNT", help_heading = "Router")]
    pub max_held: Option<usize>,
    /// How long [default: 120s].
    #[arg(long, value_name = "TIME", help_heading = "Router")]
    pub hold_timeout: Option<TimeSpan>,
    /// What each request waits besides: from the client through the router to a replica and back [default: 0].
    #[arg(long, value_name = "TIME", help_heading = "Router")]
    pub network_time: Option<TimeSpan>,
    /// Requests that each ready replica has at once; more wait in the router [default: 512].
    #[arg(long, value_name = "COUNT", help_heading = "Router")]
    pub max_in_flight_per_replica: Option<usize>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct FaultArgs {
    /// Replicas that crash, one at random each time [default: 0].
    #[arg(long, value_name = "COUNT", help_heading = "Faults")]
    pub crashes_per_hour: Option<f64>,
    /// Replicas that router and Prometheus do not reach for a while, one at random each time [default: 0].
    #[arg(long, value_name = "COUNT", help_heading = "Faults")]
    pub partitions_per_hour: Option<f64>,
    /// How long [default: 30s].
    #[arg(long, value_name = "TIME", help_heading = "Faults")]
    pub partition_time: Option<TimeSpan>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct ReportArgs {
    /// Dollars for one GPU and hour [default: an assumption that the profile holds].
    #[arg(long, value_name = "DOLLARS", help_heading = "Report")]
    pub price: Option<f64>,
    /// File for the page with the plots.
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub out: Option<PathBuf>,
    /// Print everything as JSON.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
}
