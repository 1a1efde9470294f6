//! What was typed for `servelab bench`. What it means together is decided in `settings.rs`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use servelab_bench::result::SloLimit;
use servelab_bench::workload::lengths::Span;
use servelab_bench::workload::{Fit, WorkloadOptions};

use super::reports::Action;
use crate::args::{Device, Dtype, Engine, KvDtype, LoadFormat, OtlpProtocol, Typed};
use crate::size::{ByteSize, TimeSpan};

/// Shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  servelab bench --concurrency 16 --requests 200           random prompts, 512 tokens in, 128 out
  servelab bench --concurrency 1,2,4,8,16,32 --out run     a ladder; run/report.html shows it
  servelab bench compare before after                      two such folders, figure by figure
  servelab bench --rate 4 --workload azure-chat --lengths clip --duration 60s
  servelab bench --find-rate --slo ttft=500ms,tpot=50ms@p95
  servelab bench --workload engine-comparison              the comparison that other engines publish
  servelab bench --trace conversation_trace.jsonl --trace-speed 10
  servelab bench --offline --model smollm2-135m --load-format dummy --concurrency 16

Exit codes: 0 the figures stand, 1 they do not (client-bound, nothing completed, faster than physics) or the run
failed, 2 wrong usage or settings.";

#[derive(Args, Clone, Debug, Default)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchCommand {
    #[command(subcommand)]
    pub action: Option<Action>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub workload: WorkloadArgs,
    #[command(flatten)]
    pub report: ReportArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Args, Clone, Debug, Default)]
pub struct TargetArgs {
    /// Address of any OpenAI-compatible server [default: http://127.0.0.1:8000].
    #[arg(long, help_heading = "Target")]
    pub url: Option<String>,
    /// Measure the engine in this process, without HTTP.
    #[arg(long, help_heading = "Target")]
    pub offline: bool,
    /// Name of the model at the server [default: the first it serves]; with --offline as for servelab serve.
    #[arg(long, value_name = "NAME", help_heading = "Target")]
    pub model: Option<String>,
    /// Where requests go [default: completions, and chat for --workload multi-turn].
    #[arg(long, help_heading = "Target")]
    pub endpoint: Option<Endpoint>,
    /// How prompts travel; auto: token ids where the server takes them, else words [default: auto].
    #[arg(long, value_name = "FORM", help_heading = "Target")]
    pub prompt_form: Option<Form>,
    /// File whose first line is the API key [default: SERVELAB_API_KEY, else OPENAI_API_KEY].
    #[arg(long, value_name = "FILE", help_heading = "Target")]
    pub api_key_file: Option<PathBuf>,
    /// With an https address: PEM file of the authorities to trust [default: the public ones].
    #[arg(long, value_name = "FILE", help_heading = "Target")]
    pub ca_file: Option<PathBuf>,
    /// Sampling temperature [default: the workload's, mostly 0].
    #[arg(long, help_heading = "Target")]
    pub temperature: Option<f64>,
    /// Ask for answers of exactly the wanted length [default: yes, but for --prompts].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Target")]
    pub ignore_eos: Option<bool>,
    /// JSON object whose fields are added to every request.
    #[arg(long, value_name = "JSON", help_heading = "Target")]
    pub extra_body: Option<String>,
    /// How long to wait for a server that is not ready yet [default: not at all].
    #[arg(long, value_name = "TIME", help_heading = "Target")]
    pub wait_ready: Option<TimeSpan>,
    /// Longest time until a connection is made [default: 10s].
    #[arg(long, value_name = "TIME", help_heading = "Target")]
    pub connect_timeout: Option<TimeSpan>,
    /// Longest time from sending to the first byte of an answer [default: 600s].
    #[arg(long, value_name = "TIME", help_heading = "Target")]
    pub first_byte_timeout: Option<TimeSpan>,
    /// Longest time without a byte in the middle of an answer [default: 120s].
    #[arg(long, value_name = "TIME", help_heading = "Target")]
    pub idle_timeout: Option<TimeSpan>,
    /// Longest time for a whole answer [default: 1h].
    #[arg(long, value_name = "TIME", help_heading = "Target")]
    pub total_timeout: Option<TimeSpan>,
    /// Send a span of each request to this collector, as http://HOST:4317, and let the server go on below it
    /// [default: no traces].
    #[arg(long, value_name = "URL", help_heading = "Traces")]
    pub otlp_endpoint: Option<String>,
    /// grpc, or http for protobuf over HTTP [default: grpc for port 4317, else http].
    #[arg(long, value_name = "PROTOCOL", help_heading = "Traces")]
    pub otlp_protocol: Option<OtlpProtocol>,
    /// Share of requests that are traced, 0 to 1 [default: 1].
    #[arg(long, value_name = "SHARE", help_heading = "Traces")]
    pub trace_sample_ratio: Option<f64>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct LoadArgs {
    /// Closed loop: so many clients, each sending its next request when the last one has ended. Several
    /// numbers, separated by commas, make a ladder.
    #[arg(long, value_name = "CLIENTS", value_delimiter = ',', help_heading = "Load")]
    pub concurrency: Vec<u32>,
    /// How long a client of a closed loop waits between an answer and its next request [default: 0].
    #[arg(long, value_name = "TIME", help_heading = "Load")]
    pub think_time: Option<TimeSpan>,
    /// Open loop: so many requests a second, whatever became of the earlier ones; inf: all at once. Several
    /// numbers, separated by commas, make a ladder.
    #[arg(long, value_name = "REQ/S", value_delimiter = ',', help_heading = "Load")]
    pub rate: Vec<f64>,
    /// Shape of the gamma distribution of the intervals, as vLLM's: 1 is a Poisson process, less is burstier,
    /// inf makes equal intervals [default: the workload's, mostly 1].
    #[arg(long, value_name = "SHAPE", help_heading = "Load")]
    pub burstiness: Option<f64>,
    /// With --rate: a Poisson process that is on and off, for exponential times with these means.
    #[arg(long, value_name = "ON,OFF", help_heading = "Load")]
    pub on_off: Option<OnOff>,
    /// Rates one after the other, such as 2x60s,20x30s,2x60s; 2-20x60s goes from one to the other.
    #[arg(long, value_name = "RATExTIME,..", value_delimiter = ',', help_heading = "Load")]
    pub steps: Vec<Step>,
    /// Search for the highest rate that keeps --slo, from this one.
    #[arg(long, value_name = "REQ/S", num_args = 0..=1, default_missing_value = "1", help_heading = "Load")]
    pub find_rate: Option<f64>,
    /// Open loop: more in flight wait in the client, as with vLLM's benchmark [default: none waits].
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub max_concurrency: Option<u32>,
    /// Open loop: more in flight is a failure [default: 4096].
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub max_in_flight: Option<u32>,
    /// Requests that are measured, in each repeat [default: 100, or all of a trace].
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub requests: Option<u64>,
    /// Measure for that long, in each repeat, in place of --requests.
    #[arg(long, value_name = "TIME", help_heading = "Load")]
    pub duration: Option<TimeSpan>,
    /// What comes before and is cut: a number of requests, or a time with its unit [default: one request of
    /// each client, or a tenth of what is measured].
    #[arg(long, value_name = "COUNT|TIME", help_heading = "Load")]
    pub warm_up: Option<Amount>,
    /// Do not keep up the load until the last measured request has ended.
    #[arg(long, help_heading = "Load")]
    pub no_cool_down: bool,
    /// How often each load is run [default: 3, for --find-rate 1].
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub repeats: Option<u32>,
    /// What was promised, for goodput and --find-rate: METRIC=TIME[@pNN] with ttft, tpot or e2el, separated by
    /// commas; without a percentile it is the 99th.
    #[arg(long, value_name = "LIMIT,..", value_delimiter = ',', help_heading = "Load")]
    pub slo: Vec<SloLimit>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct WorkloadArgs {
    /// random, azure-chat, azure-code, mooncake-conversation, mooncake-synthetic, shared-prefix,
    /// prefix-repetition, multi-turn or engine-comparison [default: random].
    #[arg(long, value_name = "NAME", help_heading = "Workload")]
    pub workload: Option<String>,
    /// Tokens of a prompt, without its shared prefix: a number, or a range such as 100:1024.
    #[arg(long, value_name = "TOKENS", help_heading = "Workload")]
    pub input_tokens: Option<Span>,
    /// Tokens of an answer: a number or a range.
    #[arg(long, value_name = "TOKENS", help_heading = "Workload")]
    pub output_tokens: Option<Span>,
    /// Shared prefixes to choose from.
    #[arg(long, value_name = "COUNT", help_heading = "Workload")]
    pub prefixes: Option<u32>,
    /// Tokens of each shared prefix.
    #[arg(long, value_name = "TOKENS", help_heading = "Workload")]
    pub prefix_tokens: Option<u32>,
    /// Turns of a conversation: a number or a range.
    #[arg(long, value_name = "COUNT", help_heading = "Workload")]
    pub turns: Option<Span>,
    /// How long a user thinks between an answer and the next turn.
    #[arg(long, value_name = "TIME", help_heading = "Workload")]
    pub turn_think_time: Option<TimeSpan>,
    /// File of prompts: one a line, or JSON lines with prompt and output_tokens.
    #[arg(long, value_name = "FILE", help_heading = "Workload")]
    pub prompts: Option<PathBuf>,
    /// Trace to replay, in Mooncake's or Azure's columns, as JSON lines or CSV.
    #[arg(long, value_name = "FILE", help_heading = "Workload")]
    pub trace: Option<PathBuf>,
    /// How much faster than recorded [default: 1].
    #[arg(long, value_name = "FACTOR", help_heading = "Workload")]
    pub trace_speed: Option<f64>,
    /// What becomes of a workload that is longer than the server's context [default: refuse].
    #[arg(long, value_name = "HOW", help_heading = "Workload")]
    pub lengths: Option<Lengths>,
    /// Of lengths, sharing, arrivals and, with --offline, dummy weights [default: 0].
    #[arg(long, help_heading = "Workload")]
    pub seed: Option<u64>,
    /// Send the same prompts in every run: a second run then measures the cache of the first.
    #[arg(long, help_heading = "Workload")]
    pub no_salt: bool,
}

impl WorkloadArgs {
    pub fn options(&self) -> WorkloadOptions {
        let typed = self.clone();
        WorkloadOptions {
            name: typed.workload,
            input: typed.input_tokens,
            output: typed.output_tokens,
            prefixes: typed.prefixes,
            prefix_tokens: typed.prefix_tokens,
            turns: typed.turns,
            turn_think_time: typed.turn_think_time.map(|time| time.0),
            prompts_file: typed.prompts,
            trace_file: typed.trace,
            trace_speed: typed.trace_speed,
        }
    }

    pub fn fit(&self) -> Fit {
        match self.lengths {
            None | Some(Lengths::Refuse) => Fit::Refuse,
            Some(Lengths::Clip) => Fit::Clip,
            Some(Lengths::Scale) => Fit::Scale,
        }
    }
}

#[derive(Args, Clone, Debug, Default)]
pub struct ReportArgs {
    /// Folder for report.html, report.md, result.json, requests.jsonl and, for a ladder, vllm/.
    #[arg(long, value_name = "FOLDER", help_heading = "Report")]
    pub out: Option<PathBuf>,
    /// Print result.json in place of the summary, and nothing while it runs.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    /// Show nothing while it runs.
    #[arg(long, help_heading = "Report")]
    pub quiet: bool,
    /// Adds vLLM's per-request lists (input_lens, ttfts, itls, ...) to result.json.
    #[arg(long, help_heading = "Report")]
    pub save_detailed: bool,
    /// What to call this run.
    #[arg(long, help_heading = "Report")]
    pub label: Option<String>,
    /// Something to keep with the figures, such as clocks=1980MHz; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Report")]
    pub metadata: Vec<String>,
    /// Hardware under the model, with --offline --device sim in place of it: a GPU (h100, h200, a100-80, l4, ...), a profile (TOML), or measured for this
    /// machine. Puts what it allows beside what was measured.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Report")]
    pub hardware: Option<String>,
    /// With --hardware: GPUs of the replica [default: 1].
    #[arg(long, value_name = "COUNT", help_heading = "Report")]
    pub gpus: Option<u32>,
    /// With --hardware and --url: shape of the model, a name or a config.json.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Report")]
    pub model_shape: Option<String>,
    /// With --hardware and --url: number format of its weights [default: bf16].
    #[arg(long, value_name = "DTYPE", help_heading = "Report")]
    pub weight_dtype: Option<servelab_sim::Dtype>,
}

/// With `--offline`: the settings of `servelab serve` that make the engine.
#[derive(Args, Clone, Debug, Default)]
pub struct EngineArgs {
    /// As for servelab serve.
    #[arg(long, value_name = "FORMAT", help_heading = "Engine (--offline)")]
    pub load_format: Option<LoadFormat>,
    /// As for servelab serve.
    #[arg(long, help_heading = "Engine (--offline)")]
    pub dtype: Option<Dtype>,
    /// As for servelab serve.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine (--offline)")]
    pub max_model_len: Option<u32>,
    /// As for servelab serve.
    #[arg(long, help_heading = "Engine (--offline)")]
    pub device: Option<Device>,
    /// As for servelab serve.
    #[arg(long, help_heading = "Engine (--offline)")]
    pub engine: Option<Engine>,
    /// As for servelab serve.
    #[arg(long, value_name = "COUNT", help_heading = "Engine (--offline)")]
    pub threads: Option<usize>,
    /// As for servelab serve.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine (--offline)")]
    pub block_size: Option<u32>,
    /// As for servelab serve.
    #[arg(long, value_name = "COUNT", help_heading = "Engine (--offline)")]
    pub kv_blocks: Option<u32>,
    /// As for servelab serve.
    #[arg(long, value_name = "SIZE", help_heading = "Engine (--offline)")]
    pub kv_memory: Option<ByteSize>,
    /// As for servelab serve.
    #[arg(long, value_name = "DTYPE", help_heading = "Engine (--offline)")]
    pub kv_dtype: Option<KvDtype>,
    /// As for servelab serve.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine (--offline)")]
    pub max_batched_tokens: Option<u32>,
    /// As for servelab serve.
    #[arg(long, value_name = "COUNT", help_heading = "Engine (--offline)")]
    pub max_running: Option<u32>,
    /// As for servelab serve.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Engine (--offline)")]
    pub no_prefix_cache: Option<bool>,
    /// As for servelab serve.
    #[arg(long, value_name = "SHARE", help_heading = "Engine (--offline)")]
    pub gpu_memory_utilization: Option<f64>,
    /// As for servelab serve.
    #[arg(long, value_name = "FOLDER", help_heading = "Engine (--offline)")]
    pub cuda_lib_dir: Option<PathBuf>,
    /// As for servelab serve.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Engine (--offline)")]
    pub no_cuda_graphs: Option<bool>,
    /// As for servelab serve.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "Engine (--offline)")]
    pub no_overlap: Option<bool>,
}

impl EngineArgs {
    /// The settings of `servelab serve`; none given gives the default.
    pub fn typed(&self) -> Typed {
        let Self {
            load_format,
            dtype,
            max_model_len,
            device,
            engine,
            threads,
            block_size,
            kv_blocks,
            kv_memory,
            kv_dtype,
            max_batched_tokens,
            max_running,
            no_prefix_cache,
            gpu_memory_utilization,
            cuda_lib_dir,
            no_cuda_graphs,
            no_overlap,
        } = self.clone();
        Typed {
            load_format,
            dtype,
            max_model_len,
            device,
            engine,
            threads,
            block_size,
            kv_blocks,
            kv_memory,
            kv_dtype,
            max_batched_tokens,
            max_running,
            no_prefix_cache,
            gpu_memory_utilization,
            cuda_lib_dir,
            no_cuda_graphs,
            no_overlap,
            ..Typed::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    Completions,
    Chat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    Auto,
    TokenIds,
    Words,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lengths {
    /// Too long is an error.
    Refuse,
    /// Answers are cut to half the context, prompts to what is left.
    Clip,
    /// All lengths shrink by one factor.
    Scale,
}

/// A number of requests, or a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    Requests(u64),
    Time(TimeSpan),
}

impl std::str::FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(requests) = text.parse() {
            return Ok(Self::Requests(requests));
        }
        let wrong =
            |_| format!("{text:?} is neither a number of requests nor a time with a unit, such as 10s");
        text.parse().map(Self::Time).map_err(wrong)
    }
}

/// Mean times on and off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OnOff {
    pub on: TimeSpan,
    pub off: TimeSpan,
}

impl std::str::FromStr for OnOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no pair of times; give two such as 60s,20s");
        let (on, off) = text.split_once(',').ok_or_else(wrong)?;
        Ok(Self { on: on.parse().map_err(|_| wrong())?, off: off.parse().map_err(|_| wrong())? })
    }
}

/// A rate for some time, or a ramp between two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub from_rate: f64,
    pub to_rate: f64,
    pub time: TimeSpan,
}

impl std::str::FromStr for Step {
    type Err = String;

    /// Reads `5x30s` and `5-50x30s`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no step; give a rate and a time such as 5x30s, or a ramp such as 5-50x30s")
        };
        let (rates, time) = text.split_once('x').ok_or_else(wrong)?;
        let (from, to) = rates.split_once('-').unwrap_or((rates, rates));
        let rate = |text: &str| text.trim().parse::<f64>().map_err(|_| wrong());
        Ok(Self { from_rate: rate(from)?, to_rate: rate(to)?, time: time.parse().map_err(|_| wrong())? })
    }
}
