//! The settings of `servelab route` as typed: on the command line, or in the file that `--config` names.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::args::{LogFormat, OtlpProtocol};
use crate::size::{ByteSize, TimeSpan};
use crate::traces::TypedTraces;

pub const EXAMPLES: &str = "\
Examples:
  servelab route --replica http://127.0.0.1:8001 --replica http://127.0.0.1:8002
  servelab route --replicas-kubernetes servelab:http
  servelab route --replicas-dns servelab-headless:8000 --api-key-file keys --tokens-per-minute 100000
  curl -H 'x-servelab-decision: 1' ...      the answer tells which replica was chosen and why
  curl http://127.0.0.1:8080/replicas       the replicas as the router sees them; also /decisions, /metrics

Exit codes: 0 ended as asked, 1 failed while running, 2 wrong usage or settings.";

/// See `--kv-events`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvTransport {
    Auto,
    Http,
    Zmq,
    Off,
}

#[derive(Args)]
pub struct RouteCommand {
    #[command(flatten)]
    pub typed: TypedRoute,
    /// TOML file with any of these settings, named as the flags without the dashes in front
    /// (drain-timeout = "60s"). Flags go before it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

macro_rules! typed {
    ($($(#[$attribute:meta])* $field:ident: $type:ty,)+) => {
        /// Every setting of `servelab route`, each as it was typed or absent. Flags and file share it.
        #[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct TypedRoute { $($(#[$attribute])* pub $field: Option<$type>,)+ }

        impl TypedRoute {
            /// These settings, and where one is absent that of `file`.
            pub fn over(self, file: Self) -> Self {
                Self { $($field: self.$field.or(file.$field),)+ }
            }
        }
    };
}

typed! {
    /// Address of a replica, http://HOST:PORT; give it once for each.
    #[arg(long, value_name = "URL", help_heading = "Replicas")]
    replica: Vec<String>,
    /// File with one address a line; followed while it changes.
    #[arg(long, value_name = "FILE", help_heading = "Replicas")]
    replicas_file: PathBuf,
    /// Name whose addresses are all replicas, as that of a headless service; followed while it changes.
    #[arg(long, value_name = "NAME:PORT", help_heading = "Replicas")]
    replicas_dns: Vec<String>,
    /// Name whose SRV records tell host and port of every replica, such as
    /// _http._tcp.servelab-headless.default.svc.cluster.local; followed while it changes.
    #[arg(long, value_name = "NAME", help_heading = "Replicas")]
    replicas_srv: Vec<String>,
    /// How often names are resolved [default: 5s].
    #[arg(long, value_name = "TIME", help_heading = "Replicas")]
    dns_interval: TimeSpan,
    /// Name server to ask, such as a Consul agent's 127.0.0.1:8600 [default: those of /etc/resolv.conf].
    #[arg(long, value_name = "IP:PORT", help_heading = "Replicas")]
    dns_server: String,
    /// Service of Kubernetes whose pods are replicas, followed by its EndpointSlices: a pod that ends gets nothing new
    /// and may finish what it has. PORT is a name or number of the pods. Needs list and watch on endpointslices
    /// of discovery.k8s.io [default namespace: that of the service account].
    #[arg(long, value_name = "[NAMESPACE/]SERVICE:PORT", help_heading = "Replicas")]
    replicas_kubernetes: Vec<String>,
    /// How to reach the cluster [default: KUBECONFIG, else ~/.kube/config, else the pod's service account].
    #[arg(long, value_name = "FILE", help_heading = "Replicas")]
    kubeconfig: PathBuf,
    /// Where a replica says that it is ready [default: /health].
    #[arg(long, value_name = "PATH", help_heading = "Replicas")]
    health_path: String,
    /// How often replicas are asked how they are [default: 1s].
    #[arg(long, value_name = "TIME", help_heading = "Replicas")]
    health_interval: TimeSpan,
    /// How long they may take to say so [default: 2s].
    #[arg(long, value_name = "TIME", help_heading = "Replicas")]
    health_timeout: TimeSpan,
    /// File with the key that replicas ask for; sent in place of the client's [default: the client's passes].
    #[arg(long, value_name = "FILE", help_heading = "Replicas")]
    replica_key_file: PathBuf,

    /// Where replicas tell what their prefix caches hold: http (servelab's GET /kv/events), zmq (vLLM's), auto (http,
    /// else zmq if a port is given), off (guess it by what was sent where) [default: auto].
    #[arg(long, value_name = "NAME", help_heading = "KV events")]
    kv_events: KvTransport,
    /// Port of every replica's publisher, on the host of its address [default: with zmq 5557, as vLLM's; with auto none].
    #[arg(long, value_name = "PORT", help_heading = "KV events")]
    kv_events_zmq_port: u16,
    /// Port where it replays what was missed [default: none; after a gap all is forgotten].
    #[arg(long, value_name = "PORT", help_heading = "KV events")]
    kv_events_replay_port: u16,

    /// Folder with the tokenizer.json that the replicas use, for replicas that do not serve it, as vLLM
    /// [default: what each replica serves].
    #[arg(long, value_name = "DIR", help_heading = "Tokens")]
    tokenizer: PathBuf,
    /// How often replicas are asked whether they tokenise as the router does [default: 60s].
    #[arg(long, value_name = "TIME", help_heading = "Tokens")]
    parity_interval: TimeSpan,
    /// How long a request waits for its tokens; then it is routed without [default: 1s].
    #[arg(long, value_name = "TIME", help_heading = "Tokens")]
    tokenise_timeout: TimeSpan,

    /// cost, round_robin, random, least_requests, power_of_two, peak_ewma, consistent_hash, session or
    /// longest_prefix [default: cost].
    #[arg(long, value_name = "NAME", help_heading = "Choice")]
    policy: String,
    /// Memory for what the replicas hold, taken at the start [default: 256MiB].
    #[arg(long, value_name = "SIZE", help_heading = "Choice")]
    index_memory: ByteSize,
    /// Of the random numbers that break ties [default: 0].
    #[arg(long, help_heading = "Choice")]
    seed: u64,

    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, help_heading = "Network")]
    host: String,
    /// Port to listen on; 0 takes a free one and prints it [default: 8080].
    #[arg(long, help_heading = "Network")]
    port: u16,
    /// Most connections at once; one more gets a 503 [default: 4096, or what the limit on open files allows].
    #[arg(long, value_name = "COUNT", help_heading = "Network")]
    max_connections: u32,
    /// Largest request body [default: 8MiB].
    #[arg(long, value_name = "SIZE", help_heading = "Network")]
    max_body_bytes: ByteSize,
    /// To connect to a replica [default: 2s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    connect_timeout: TimeSpan,
    /// Until a stream says its first word; an answer that comes whole has only the total [default: 120s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    first_byte_timeout: TimeSpan,
    /// Between two words of a stream [default: 60s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    idle_timeout: TimeSpan,
    /// A whole answer [default: 30m].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    total_timeout: TimeSpan,
    /// How long running requests may go on after SIGTERM [default: 30s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    drain_timeout: TimeSpan,
    /// Threads that pass requests on; prompts become tokens on others, for which the rest is meant. More than are busy
    /// cost time, since one wakes the other for every request [default: half of the cores, at least 1].
    #[arg(long, value_name = "COUNT", help_heading = "Network")]
    threads: usize,

    /// Attempts at other replicas when one fails before the first byte [default: 3].
    #[arg(long, value_name = "COUNT", help_heading = "Faults")]
    retries: u32,
    /// Make a second attempt beside one that is slower than this share of the last ones, such as 0.95
    /// [default: never].
    #[arg(long, value_name = "SHARE", help_heading = "Faults")]
    hedge: f64,
    /// Requests that are held while no replica is ready [default: 1000].
    #[arg(long, value_name = "COUNT", help_heading = "Faults")]
    max_held: usize,
    /// How long [default: 120s].
    #[arg(long, value_name = "TIME", help_heading = "Faults")]
    hold_timeout: TimeSpan,
    /// How long the answer to an Idempotency-Key is kept [default: 10m].
    #[arg(long, value_name = "TIME", help_heading = "Faults")]
    idempotency_window: TimeSpan,

    /// File with API keys, one a line, # begins a comment; clients must present one of them
    /// [default: the keys in SERVELAB_API_KEYS, separated by commas, else everybody may come in].
    #[arg(long, value_name = "FILE", help_heading = "Limits")]
    api_key_file: PathBuf,
    /// File with the key that opens POST and DELETE /replicas [default: nobody may].
    #[arg(long, value_name = "FILE", help_heading = "Limits")]
    admin_key_file: PathBuf,
    /// Requests a minute of each key, at this router or with --limits-redis at all of them [default: no limit].
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    requests_per_minute: u64,
    /// Tokens a minute of each key, prompt and answer, at this router or with --limits-redis at all of them
    /// [default: no limit].
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    tokens_per_minute: u64,
    /// Redis in which several routers count together, redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or rediss:// for
    /// TLS. A password is safer in a file [default: each router counts for itself].
    #[arg(long, value_name = "URL", help_heading = "Limits")]
    limits_redis: String,
    /// File with that URL.
    #[arg(long, value_name = "FILE", help_heading = "Limits")]
    limits_redis_file: PathBuf,
    /// How long a request waits for Redis at most [default: 50ms].
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    limits_redis_timeout: TimeSpan,
    /// While Redis does not answer in time: local (each router counts for itself), refuse (503) or allow (nobody
    /// counts) [default: local].
    #[arg(long, value_name = "WHAT", help_heading = "Limits")]
    limits_redis_away: String,
    /// Requests that each ready replica has at once; more wait here, fairly between keys [default: 512].
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    max_in_flight: usize,
    /// Most that wait so [default: 4096].
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    max_waiting: usize,

    /// In front of every metric's name [default: servelab_].
    #[arg(long, value_name = "PREFIX", help_heading = "Metrics and logs")]
    metrics_prefix: String,
    /// error, warn, info, debug, trace or off, with exceptions for single crates as in
    /// info,servelab_router=debug [default: info].
    #[arg(long, value_name = "LEVEL", help_heading = "Metrics and logs")]
    log_level: String,
    /// Lines for people or JSON objects, on standard error [default: human].
    #[arg(long, value_name = "FORMAT", help_heading = "Metrics and logs")]
    log_format: LogFormat,

    /// Where spans go, as http://HOST:4317 [default: OTEL_EXPORTER_OTLP_ENDPOINT, else no traces].
    #[arg(long, value_name = "URL", help_heading = "Traces")]
    otlp_endpoint: String,
    /// grpc, or http for protobuf over HTTP [default: grpc for port 4317, else http].
    #[arg(long, value_name = "PROTOCOL", help_heading = "Traces")]
    otlp_protocol: OtlpProtocol,
    /// Share of requests that are traced, 0 to 1; one that comes with a trace is traced if its sender traces it
    /// [default: OTEL_TRACES_SAMPLER, else 1].
    #[arg(long, value_name = "SHARE", help_heading = "Traces")]
    trace_sample_ratio: f64,
}

impl TypedRoute {
    /// What of them is about traces.
    pub fn traces(&self) -> TypedTraces {
        TypedTraces {
            endpoint: self.otlp_endpoint.clone(),
            protocol: self.otlp_protocol,
            sample_ratio: self.trace_sample_ratio,
            prompts: None,
        }
    }
}
