//! The settings as typed: on the command line, or in the file that `--config` names. Nothing here is
//! checked beyond its type; see [`crate::settings`] for what they mean together.

use std::path::PathBuf;

use clap::builder::{Styles, styling::AnsiColor};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::bench::args::BenchCommand;
use crate::doctor::DoctorCommand;
use crate::numbers_command::NumbersCommand;
use crate::plan_command::PlanCommand;
use crate::route::args::RouteCommand;
use crate::sim_command::SimCommand;
use crate::size::{ByteSize, TimeSpan};
use crate::traces::TypedTraces;
use crate::up::args::UpCommand;

const EXIT_CODES: &str = "Exit codes: 0 ended as asked, 1 failed while running, 2 wrong usage or settings.";
const DOCTOR_EXIT_CODES: &str = "Exit codes: 0 all is well, 1 something has to be fixed, 2 wrong usage.";
const STYLES: Styles =
    Styles::styled().header(AnsiColor::Green.on_default().bold()).literal(AnsiColor::Cyan.on_default());

/// A runnable reference lab for LLM serving.
#[derive(Parser)]
#[command(name = "servelab", version, styles = STYLES, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve a model over the OpenAI API. No model named: the embedded demo model.
    #[command(after_help = EXIT_CODES)]
    Serve(Box<ServeCommand>),
    /// Route requests to the replica where each finishes soonest, often the one that holds its prefix.
    #[command(after_help = crate::route::args::EXAMPLES)]
    Route(Box<RouteCommand>),
    /// Start replicas, the router in front of them and a load on this machine, with one page to look at.
    #[command(after_help = crate::up::args::EXAMPLES)]
    Up(UpCommand),
    /// Show what hardware and libraries are here, and check every kernel against plain loops.
    #[command(after_help = DOCTOR_EXIT_CODES)]
    Doctor(DoctorCommand),
    /// Plan capacity: daily users to QPS, tokens/s and GPUs, formula by formula.
    #[command(after_help = EXIT_CODES)]
    Plan(Box<PlanCommand>),
    /// Load a server, or the engine in this process, and measure what it does.
    #[command(after_help = crate::bench::args::EXAMPLES)]
    Bench(Box<BenchCommand>),
    /// Show the numbers that people quote beside the limit and what was measured here; run measures them.
    #[command(after_help = crate::numbers_command::EXAMPLES)]
    Numbers(Box<NumbersCommand>),
    /// Simulate a fleet behind its router in virtual time; calibrate fits a device to measured points.
    #[command(after_help = crate::sim_command::EXAMPLES)]
    Sim(Box<SimCommand>),
}

#[derive(Args)]
pub struct ServeCommand {
    #[command(flatten)]
    pub typed: Typed,
    /// TOML file with any of these settings, named as the flags without the dashes in front
    /// (max-running = 32). Flags go before it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Every setting of `servelab serve`, each as it was typed or absent. Flags and file share it.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Typed {
    /// Folder of a checkpoint in Hugging Face's format, or a hub id such as owner/name; with
    /// --load-format dummy the name of a shape or a config.json [default: the embedded demo model].
    #[arg(long, value_name = "FOLDER|HUB-ID", help_heading = "Model")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id [default: main].
    #[arg(long, help_heading = "Model")]
    pub revision: Option<String>,
    /// auto: the checkpoint's weights; dummy: random weights of the model's shape, drawn from --seed, to
    /// measure speed without a download [default: auto].
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    pub load_format: Option<LoadFormat>,
    /// Number format of the weights; auto: as the checkpoint stores them, on a GPU bf16 for f32; fp8: the layers'
    /// weights in 8 bits with a scale for each output, on GPUs that have them [default: auto].
    #[arg(long, help_heading = "Model")]
    pub dtype: Option<Dtype>,
    /// Names under which clients ask for the model, separated by commas; answers carry the one asked for,
    /// metrics the first [default: demo, the hub id, or the name of the folder].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Model")]
    pub served_model_name: Option<Vec<String>>,
    /// Longest sequence, prompt and output together, in tokens [default: the model's context, or what the
    /// KV cache can hold if that is less].
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    pub max_model_len: Option<u32>,
    /// Address of the model hub [default: HF_ENDPOINT, else https://huggingface.co].
    #[arg(long, value_name = "URL", help_heading = "Model")]
    pub hub_endpoint: Option<String>,
    /// Folder that downloads go to [default: the hub folder in HF_HOME, else ~/.cache/huggingface/hub].
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub hub_cache: Option<PathBuf>,
    /// File that holds the hub's access token [default: HF_TOKEN, else the token file of the hub's own tools].
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub hub_token_file: Option<PathBuf>,

    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, help_heading = "Network")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one and prints it [default: 8000].
    #[arg(long, help_heading = "Network")]
    pub port: Option<u16>,
    /// File with API keys, one a line, # begins a comment; clients must present one of them
    /// [default: the keys in SERVELAB_API_KEYS, separated by commas, else everybody may come in].
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    pub api_key_file: Option<PathBuf>,
    /// Most connections at once; one more gets a 503 [default: 4096, or what the limit on open files allows].
    #[arg(long, value_name = "COUNT", help_heading = "Network")]
    pub max_connections: Option<u32>,
    /// Largest request body [default: 8MiB].
    #[arg(long, value_name = "SIZE", help_heading = "Network")]
    pub max_body_bytes: Option<ByteSize>,
    /// How long running requests may go on after SIGTERM [default: 30s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    pub drain_timeout: Option<TimeSpan>,
    /// /live and /ready fail when there is work and no step ended for that long [default: 120s].
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    pub stall_timeout: Option<TimeSpan>,

    /// Also publish what the prefix cache gains and loses over ZeroMQ, as vLLM does, at this address,
    /// tcp://HOST:PORT. It knows no keys, and tells the tokens of prompts [default: only GET /kv/events].
    #[arg(long, value_name = "ADDRESS", help_heading = "KV events")]
    pub kv_events_zmq: Option<String>,
    /// Where subscribers ask for what they missed, tcp://HOST:PORT [default: nowhere].
    #[arg(long, value_name = "ADDRESS", help_heading = "KV events")]
    pub kv_events_replay: Option<String>,
    /// First frame of every batch [default: kv@ADDRESS@MODEL, with the address that the server listens on].
    #[arg(long, value_name = "TEXT", help_heading = "KV events")]
    pub kv_events_topic: Option<String>,
    /// How batches are written: map as newer versions of vLLM, array as older ones [default: map].
    #[arg(long, value_name = "FORMAT", help_heading = "KV events")]
    pub kv_events_encoding: Option<KvEncoding>,

    /// Where to compute; auto takes an NVIDIA GPU if there is one that the model can be computed on; sim computes
    /// nothing and takes the time of --hardware [default: auto].
    #[arg(long, help_heading = "Engine")]
    pub device: Option<Device>,
    /// paged: continuous batching over a paged KV cache; naive: candle-transformers' model, one request at
    /// a time, the baseline [default: paged].
    #[arg(long, help_heading = "Engine")]
    pub engine: Option<Engine>,
    /// Threads that compute on the CPU [default: one a core].
    #[arg(long, value_name = "COUNT", help_heading = "Engine")]
    pub threads: Option<usize>,
    /// Tokens per KV block: a power of two from 8 to 256, on a GPU from 16 to 64 [default: 16].
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    pub block_size: Option<u32>,
    /// Blocks of the KV cache [default: see --kv-memory].
    #[arg(long, value_name = "COUNT", help_heading = "Engine")]
    pub kv_blocks: Option<u32>,
    /// Memory for the KV cache [default: 1024 tokens for each running sequence, at least one context, at
    /// most a quarter of the free memory; on a GPU see --gpu-memory-utilization].
    #[arg(long, value_name = "SIZE", help_heading = "Engine")]
    pub kv_memory: Option<ByteSize>,
    /// Number format of the KV cache; auto: bf16 where the weights are bf16, else f32, on a GPU as the weights;
    /// fp8: 8 bits, on GPUs that have them [default: auto].
    #[arg(long, value_name = "DTYPE", help_heading = "Engine")]
    pub kv_dtype: Option<KvDtype>,
    /// Most tokens computed in one step; bounds how long a prompt can hold up the others [default: 512, on
    /// a GPU 2048].
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    pub max_batched_tokens: Option<u32>,
    /// Most sequences that run at once [default: 64, on a GPU 256].
    #[arg(long, value_name = "COUNT", help_heading = "Engine")]
    pub max_running: Option<u32>,
    /// Most requests that wait beyond those that run; one more gets a 429 [default: 512].
    #[arg(long, value_name = "COUNT", help_heading = "Engine")]
    pub max_waiting: Option<u32>,
    /// Compute every prompt anew [default: reuse the KV blocks of equal prefixes].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Engine")]
    pub no_prefix_cache: Option<bool>,
    /// Of every random draw that a request does not seed itself, and of dummy weights [default: 0].
    #[arg(long, help_heading = "Engine")]
    pub seed: Option<u64>,

    /// Share of the GPU's memory that weights, activations and KV cache take together, 0.1 to 1 [default: 0.9].
    #[arg(long, value_name = "SHARE", help_heading = "GPU")]
    pub gpu_memory_utilization: Option<f64>,
    /// Folder of libnvrtc and libcublasLt [default: where the loader, Python packages and toolkits have them].
    #[arg(long, value_name = "FOLDER", help_heading = "GPU")]
    pub cuda_lib_dir: Option<PathBuf>,
    /// Launch every kernel of a decode step [default: replay recorded steps].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "GPU")]
    pub no_cuda_graphs: Option<bool>,
    /// Prepare a step when the one before has ended [default: while it runs].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "GPU")]
    pub no_overlap: Option<bool>,

    /// With --device sim: a GPU (l4, a100, l40s, h100, h200, b200, ...) or a profile (TOML), such as servelab sim
    /// calibrate writes [default: h100].
    #[arg(long, value_name = "NAME|FILE", help_heading = "Simulated device")]
    pub hardware: Option<String>,
    /// With --device sim: GPUs that share the model [default: 1].
    #[arg(long, value_name = "GPUS", help_heading = "Simulated device")]
    pub tp: Option<u32>,
    /// With --device sim: how many times as fast as the device; inf: steps take no time, which leaves that of
    /// the server [default: 1].
    #[arg(long, value_name = "FACTOR", help_heading = "Simulated device")]
    pub speed: Option<f64>,
    /// With --device sim: the device is lost so long after the model is there, as a GPU that falls off the bus: whoever
    /// asks from then on gets an error, and the server exits with 1 [default: never].
    #[arg(long, value_name = "TIME", help_heading = "Simulated device")]
    pub lost_after: Option<TimeSpan>,

    /// In front of every metric's name; vllm: gives vLLM's own names [default: servelab_].
    #[arg(long, value_name = "PREFIX", help_heading = "Metrics and logs")]
    pub metrics_prefix: Option<String>,
    /// error, warn, info, debug, trace or off, with exceptions for single crates as in
    /// info,servelab_server=debug [default: info].
    #[arg(long, value_name = "LEVEL", help_heading = "Metrics and logs")]
    pub log_level: Option<String>,
    /// Lines for people or JSON objects, on standard error [default: human].
    #[arg(long, value_name = "FORMAT", help_heading = "Metrics and logs")]
    pub log_format: Option<LogFormat>,

    /// Where spans go, as http://HOST:4317 [default: OTEL_EXPORTER_OTLP_ENDPOINT, else no traces].
    #[arg(long, value_name = "URL", help_heading = "Traces")]
    pub otlp_endpoint: Option<String>,
    /// grpc, or http for protobuf over HTTP [default: grpc for port 4317, else http].
    #[arg(long, value_name = "PROTOCOL", help_heading = "Traces")]
    pub otlp_protocol: Option<OtlpProtocol>,
    /// Share of requests that are traced, 0 to 1; one that comes with a trace is traced if its sender traces it
    /// [default: OTEL_TRACES_SAMPLER, else 1].
    #[arg(long, value_name = "SHARE", help_heading = "Traces")]
    pub trace_sample_ratio: Option<f64>,
    /// Record the text of prompts too [default: never].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Traces")]
    pub trace_prompts: Option<bool>,
}

macro_rules! choice {
    ($name:ident { $($variant:ident),+ }) => {
        #[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
        #[serde(rename_all = "lowercase")]
        #[value(rename_all = "lowercase")]
        pub enum $name { $($variant),+ }
    };
}

choice!(LoadFormat { Auto, Dummy });
choice!(Dtype { Auto, F32, F16, Bf16, Fp8 });
choice!(KvDtype { Auto, F32, F16, Bf16, Fp8 });
choice!(Device { Auto, Cpu, Cuda, Sim });
choice!(Engine { Paged, Naive });
choice!(KvEncoding { Map, Array });
choice!(LogFormat { Human, Json });
choice!(OtlpProtocol { Grpc, Http });

impl Typed {
    /// What of them is about traces.
    pub fn traces(&self) -> TypedTraces {
        TypedTraces {
            endpoint: self.otlp_endpoint.clone(),
            protocol: self.otlp_protocol,
            sample_ratio: self.trace_sample_ratio,
            prompts: self.trace_prompts,
        }
    }

    /// These settings, and where one is absent that of `file`. The size of the KV cache is one decision:
    /// a flag for it replaces whichever of its two settings the file holds.
    pub fn over(self, file: Self) -> Self {
        let sized = self.kv_blocks.is_some() || self.kv_memory.is_some();
        let (kv_blocks, kv_memory) =
            if sized { (self.kv_blocks, self.kv_memory) } else { (file.kv_blocks, file.kv_memory) };
        Self {
            model: self.model.or(file.model),
            revision: self.revision.or(file.revision),
            load_format: self.load_format.or(file.load_format),
            dtype: self.dtype.or(file.dtype),
            served_model_name: self.served_model_name.or(file.served_model_name),
            max_model_len: self.max_model_len.or(file.max_model_len),
            hub_endpoint: self.hub_endpoint.or(file.hub_endpoint),
            hub_cache: self.hub_cache.or(file.hub_cache),
            hub_token_file: self.hub_token_file.or(file.hub_token_file),
            host: self.host.or(file.host),
            port: self.port.or(file.port),
            api_key_file: self.api_key_file.or(file.api_key_file),
            max_connections: self.max_connections.or(file.max_connections),
            max_body_bytes: self.max_body_bytes.or(file.max_body_bytes),
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
            stall_timeout: self.stall_timeout.or(file.stall_timeout),
            kv_events_zmq: self.kv_events_zmq.or(file.kv_events_zmq),
            kv_events_replay: self.kv_events_replay.or(file.kv_events_replay),
            kv_events_topic: self.kv_events_topic.or(file.kv_events_topic),
            kv_events_encoding: self.kv_events_encoding.or(file.kv_events_encoding),
            device: self.device.or(file.device),
            engine: self.engine.or(file.engine),
            threads: self.threads.or(file.threads),
            block_size: self.block_size.or(file.block_size),
            kv_blocks,
            kv_memory,
            kv_dtype: self.kv_dtype.or(file.kv_dtype),
            max_batched_tokens: self.max_batched_tokens.or(file.max_batched_tokens),
            max_running: self.max_running.or(file.max_running),
            max_waiting: self.max_waiting.or(file.max_waiting),
            no_prefix_cache: self.no_prefix_cache.or(file.no_prefix_cache),
            seed: self.seed.or(file.seed),
            gpu_memory_utilization: self.gpu_memory_utilization.or(file.gpu_memory_utilization),
            cuda_lib_dir: self.cuda_lib_dir.or(file.cuda_lib_dir),
            no_cuda_graphs: self.no_cuda_graphs.or(file.no_cuda_graphs),
            no_overlap: self.no_overlap.or(file.no_overlap),
            hardware: self.hardware.or(file.hardware),
            tp: self.tp.or(file.tp),
            speed: self.speed.or(file.speed),
            lost_after: self.lost_after.or(file.lost_after),
            metrics_prefix: self.metrics_prefix.or(file.metrics_prefix),
            log_level: self.log_level.or(file.log_level),
            log_format: self.log_format.or(file.log_format),
            otlp_endpoint: self.otlp_endpoint.or(file.otlp_endpoint),
            otlp_protocol: self.otlp_protocol.or(file.otlp_protocol),
            trace_sample_ratio: self.trace_sample_ratio.or(file.trace_sample_ratio),
            trace_prompts: self.trace_prompts.or(file.trace_prompts),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn typed(flags: &[&str]) -> Typed {
        let all = ["servelab", "serve"].into_iter().chain(flags.iter().copied());
        match Cli::try_parse_from(all).map(|cli| cli.command) {
            Ok(Some(Command::Serve(serve))) => serve.typed,
            _ => panic!("{flags:?}"),
        }
    }

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    /// A setting that only one of the two could set would be found here.
    #[test]
    fn a_file_can_set_whatever_a_flag_can() {
        let mut command = Cli::command();
        command.build();
        let serve = command.find_subcommand("serve").unwrap();
        let longs = serve.get_arguments().filter_map(|argument| argument.get_long());
        let mut flags: Vec<&str> = longs.filter(|long| !["config", "help"].contains(long)).collect();
        let error = toml::from_str::<Typed>("no-such-key = 1").unwrap_err().to_string();
        let listed = error.split("expected one of").nth(1).unwrap();
        let mut keys: Vec<&str> = listed.split('`').skip(1).step_by(2).collect();
        flags.sort_unstable();
        keys.sort_unstable();
        assert_eq!(flags, keys);
    }

    #[test]
    fn flags_go_before_the_file() {
        let file: Typed =
            toml::from_str("port = 1\nseed = 7\nkv-blocks = 10\ndrain-timeout = \"5s\"").unwrap();
        let merged = typed(&["--port", "2", "--kv-memory", "1MiB"]).over(file);
        assert_eq!((merged.port, merged.seed), (Some(2), Some(7)));
        assert_eq!((merged.kv_blocks, merged.kv_memory), (None, Some(ByteSize(1 << 20))));
        assert_eq!(merged.drain_timeout.unwrap().0.as_secs(), 5);
    }

    #[test]
    fn a_switch_can_be_undone() {
        assert_eq!(typed(&["--no-prefix-cache"]).no_prefix_cache, Some(true));
        assert_eq!(typed(&["--no-prefix-cache=false"]).no_prefix_cache, Some(false));
    }
}
