//! The settings as validated: every default filled in, every combination that cannot work refused.
//! What depends on the model's shape or on the machine is decided later, in [`crate::plan`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use servelab_model::cuda::runner::Ways;
use servelab_model::{EngineKind, KvDtype, LoadFormat, ModelError, ModelSource, PoolSize, WeightDtype};
use servelab_server::kv_events::zmq::KvZmqOptions;
use servelab_telemetry::{LogError, LogFormat, Secret};
use servelab_wire::kv_events::zmq::Encoding;

use crate::args::{self, Typed};
use crate::open_files;
use crate::secrets::{self, SecretError};
use crate::simulated::{SimulatedError, SimulatedSettings};

/// What `servelab serve` does. Ready to use.
pub struct Settings {
    pub model: ModelSettings,
    pub network: NetworkSettings,
    pub engine: EngineSettings,
    /// In front of every metric's name. Default `servelab_`.
    pub metrics_prefix: String,
    /// Default `info`.
    pub log_level: String,
    /// Default human.
    pub log_format: LogFormat,
    /// Said once logs are set up.
    pub warnings: Vec<String>,
}

/// What to load and from where.
pub struct ModelSettings {
    /// Default: the embedded demo model.
    pub source: ModelSource,
    /// At least one. Default: `demo`, the hub id, or the name of the folder.
    pub served_names: Vec<String>,
    /// Default: as the checkpoint stores them. Of 8-bit weights, what they are read as.
    pub dtype: Option<WeightDtype>,
    /// In tokens. Default: the model's context, or what the KV cache holds.
    pub max_model_len: Option<u32>,
    /// Of dummy weights, and of random draws that a request does not seed. Default 0.
    pub seed: u64,
    /// Default: as the hub's own tools have it, from the environment.
    pub hub_endpoint: Option<String>,
    pub hub_cache: Option<PathBuf>,
    pub hub_token: Option<Secret>,
}

/// What clients meet.
pub struct NetworkSettings {
    /// Default `127.0.0.1`.
    pub host: String,
    /// 0 takes a free one. Default 8000.
    pub port: u16,
    /// None lets everybody in.
    pub api_keys: Vec<Secret>,
    /// Default 4096, or what the limit on open files leaves room for.
    pub max_connections: usize,
    /// In bytes. Default 8 MiB.
    pub max_body_bytes: usize,
    /// Default 30 s.
    pub drain_timeout: Duration,
    /// Default 120 s.
    pub stall_timeout: Duration,
    /// Default: KV events are not published over ZeroMQ.
    pub kv_zmq: Option<KvZmqOptions>,
}

/// How to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSettings {
    /// Default auto.
    pub device: DeviceChoice,
    /// What is so on a GPU, if the model is computed on one, or on a simulated one.
    pub gpu: GpuSettings,
    /// With `--device sim`.
    pub simulated: Option<Box<SimulatedSettings>>,
    /// Default paged.
    pub kind: EngineKind,
    /// 0: one a core, which is the default.
    pub threads: usize,
    /// Tokens per block, a power of two from 8 to 256. Default 16.
    pub block_size: u32,
    pub kv_size: KvSize,
    /// `None`, the default: as fits the weights, see [`KvDtype::suiting`].
    pub kv_dtype: Option<KvDtype>,
    /// In tokens; at least `max_running`. Default 512. The naive engine has its own.
    pub max_batched_tokens: u32,
    /// Sequences. Default 64, with the naive engine 1.
    pub max_running: u32,
    /// Requests beyond those that run. Default 512.
    pub max_waiting: u32,
    /// Default on, with the naive engine off.
    pub prefix_cache: bool,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
    Sim,
}

/// How to compute on a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuSettings {
    /// Default: where the libraries are found.
    pub library_folder: Option<PathBuf>,
    /// Default 0.9 of the GPU's memory for everything.
    pub pool: PoolSize,
    /// Default both on.
    pub ways: Ways,
    /// Default off.
    pub fp8_weights: bool,
    /// Default off.
    pub fp8_kv: bool,
    /// The format of keys and values that was asked for, if it has 16 bits or more: it has to be the weights'.
    pub kv_dtype: Option<&'static str>,
    /// Settings that were given and mean nothing on a CPU, should the model be computed there.
    pub given: Vec<&'static str>,
    /// In tokens; at least `max_running`. Default 2048.
    pub max_batched_tokens: u32,
    /// Sequences. Default 256.
    pub max_running: u32,
}

/// How large the KV cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// As the model and the free memory suggest.
    Suggested,
    Blocks(u32),
    Bytes(u64),
}

/// A setting that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("--{name} is {value}; it must be {rule}")]
    Range { name: &'static str, value: String, rule: &'static str },
    #[error("--{0} is for --kv-events-zmq, which is not given; give it too, or leave this out")]
    WithoutKvEvents(&'static str),
    #[error("--kv-blocks and --kv-memory both size the KV cache; give one of them")]
    KvSizeTwice,
    #[error(
        "--max-batched-tokens {tokens} is less than --max-running {running}, so that not every running sequence \
         gets its token in each step; raise the one or lower the other"
    )]
    BatchTooSmall { tokens: u32, running: u32 },
    #[error(
        "--{name} {value} does not go with --engine naive, {reason}; leave it out, or use --engine paged"
    )]
    NotNaive { name: &'static str, value: String, reason: &'static str },
    #[error(
        "--max-connections {connections} does not fit: this process may open {limit} files, which leaves {room} \
         connections; lower it, or raise the limit (ulimit -n)"
    )]
    OpenFiles { connections: u32, limit: u64, room: u64 },
    #[error("--{name} {value} does not go with --device {device}, {reason}; leave it out")]
    OtherDevice { name: &'static str, value: String, device: &'static str, reason: &'static str },
    #[error("--{name} is for models of a hub, and {model} is none; leave it out")]
    NotAHubModel { name: &'static str, model: String },
    #[error(transparent)]
    Simulated(#[from] SimulatedError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl Settings {
    /// Fills in defaults and checks what can be checked without model and machine. `api_keys_variable` is
    /// the content of [`secrets::API_KEYS_VARIABLE`]; files of keys and tokens are read here.
    ///
    /// # Errors
    /// The first setting that cannot work, alone or with another.
    pub fn new(typed: Typed, api_keys_variable: Option<&str>) -> Result<Self, SettingsError> {
        let metrics_prefix = typed.metrics_prefix.clone().unwrap_or_else(|| "servelab_".to_owned());
        ensure(
            servelab_telemetry::is_prefix(&metrics_prefix),
            "metrics-prefix",
            &metrics_prefix,
            PREFIX_RULE,
        )?;
        let log_level = typed.log_level.clone().unwrap_or_else(|| "info".to_owned());
        servelab_telemetry::check_level(&log_level)?;
        let log_format = match typed.log_format {
            Some(args::LogFormat::Json) => LogFormat::Json,
            Some(args::LogFormat::Human) | None => LogFormat::Human,
        };
        Ok(Self {
            warnings: warnings(&typed),
            model: ModelSettings::new(&typed)?,
            network: NetworkSettings::new(&typed, api_keys_variable)?,
            engine: EngineSettings::new(&typed)?,
            metrics_prefix,
            log_level,
            log_format,
        })
    }
}

const PREFIX_RULE: &str = "letters, digits, '_' and ':', no digit first, such as servelab_ or vllm:";

impl ModelSettings {
    fn new(typed: &Typed) -> Result<Self, SettingsError> {
        let format = match typed.load_format {
            Some(args::LoadFormat::Dummy) => LoadFormat::Dummy,
            // A simulated device needs the shape alone.
            _ if typed.device == Some(args::Device::Sim) => LoadFormat::Dummy,
            Some(args::LoadFormat::Auto) | None => LoadFormat::Auto,
        };
        let source = ModelSource::parse(typed.model.as_deref(), format, typed.revision.as_deref())?;
        refuse_hub_settings(typed, &source)?;
        let max_model_len = at_least("max-model-len", typed.max_model_len, 2, "at least 2 tokens")?;
        Ok(Self {
            served_names: served_names(typed, &source)?,
            dtype: dtype(typed.dtype),
            max_model_len,
            seed: typed.seed.unwrap_or(0),
            hub_endpoint: typed.hub_endpoint.clone(),
            hub_cache: typed.hub_cache.clone(),
            hub_token: typed.hub_token_file.as_deref().map(secrets::hub_token).transpose()?,
            source,
        })
    }
}

/// A setting of the hub without a model of the hub would be ignored.
fn refuse_hub_settings(typed: &Typed, source: &ModelSource) -> Result<(), SettingsError> {
    if matches!(source, ModelSource::Hub { .. }) {
        return Ok(());
    }
    let given = [
        ("revision", typed.revision.is_some()),
        ("hub-endpoint", typed.hub_endpoint.is_some()),
        ("hub-cache", typed.hub_cache.is_some()),
        ("hub-token-file", typed.hub_token_file.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(SettingsError::NotAHubModel { name, model: default_name(source) }),
        None => Ok(()),
    }
}

fn default_name(source: &ModelSource) -> String {
    match source {
        ModelSource::Demo => "demo".to_owned(),
        other => other.to_string(),
    }
}

fn served_names(typed: &Typed, source: &ModelSource) -> Result<Vec<String>, SettingsError> {
    let Some(names) = &typed.served_model_name else { return Ok(vec![default_name(source)]) };
    let sane =
        |name: &String| !name.trim().is_empty() && name.len() <= 256 && !name.contains(char::is_control);
    let all_sane = !names.is_empty() && names.iter().all(sane);
    ensure(all_sane, "served-model-name", &names.join(","), "one or more names of 1 to 256 printable bytes")?;
    Ok(names.iter().map(|name| name.trim().to_owned()).collect())
}

fn dtype(typed: Option<args::Dtype>) -> Option<WeightDtype> {
    match typed {
        None | Some(args::Dtype::Auto | args::Dtype::Fp8) => None,
        Some(args::Dtype::F32) => Some(WeightDtype::F32),
        Some(args::Dtype::F16) => Some(WeightDtype::F16),
        Some(args::Dtype::Bf16) => Some(WeightDtype::BF16),
    }
}

impl NetworkSettings {
    fn new(typed: &Typed, api_keys_variable: Option<&str>) -> Result<Self, SettingsError> {
        let host = typed.host.clone().unwrap_or_else(|| "127.0.0.1".to_owned());
        ensure(!host.trim().is_empty(), "host", "empty", "an address or a host name, such as 127.0.0.1")?;
        let connections = at_least("max-connections", typed.max_connections, 1, COUNT_RULE)?;
        let max_body = typed.max_body_bytes.map_or(8 << 20, |size| size.0);
        let in_range = (1024..=1 << 30).contains(&max_body);
        ensure(in_range, "max-body-bytes", &max_body.to_string(), "from 1KiB to 1GiB")?;
        let span = |typed: Option<crate::size::TimeSpan>, default| {
            typed.map_or(Duration::from_secs(default), |span| span.0)
        };
        let stall_timeout = span(typed.stall_timeout, 120);
        let value = format!("{stall_timeout:?}");
        ensure(stall_timeout >= Duration::from_secs(1), "stall-timeout", &value, "at least 1s")?;
        Ok(Self {
            host,
            port: typed.port.unwrap_or(8000),
            api_keys: secrets::api_keys(typed.api_key_file.as_deref(), api_keys_variable)?,
            max_connections: open_files::max_connections(connections)?,
            max_body_bytes: usize::try_from(max_body).unwrap_or(usize::MAX),
            drain_timeout: span(typed.drain_timeout, 30),
            stall_timeout,
            kv_zmq: kv_zmq(typed)?,
        })
    }
}

fn kv_zmq(typed: &Typed) -> Result<Option<KvZmqOptions>, SettingsError> {
    let Some(publish) = typed.kv_events_zmq.clone() else {
        let given = [
            ("kv-events-replay", typed.kv_events_replay.is_some()),
            ("kv-events-topic", typed.kv_events_topic.is_some()),
            ("kv-events-encoding", typed.kv_events_encoding.is_some()),
        ];
        return match given.iter().find(|(_, given)| *given) {
            Some((name, _)) => Err(SettingsError::WithoutKvEvents(name)),
            None => Ok(None),
        };
    };
    let replay = typed.kv_events_replay.clone();
    for (name, address) in [("kv-events-zmq", Some(&publish)), ("kv-events-replay", replay.as_ref())] {
        let Some(address) = address else { continue };
        let parts = address.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':'));
        let sane = parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        ensure(sane, name, address, "tcp://HOST:PORT, such as tcp://127.0.0.1:5557")?;
    }
    let topic = typed.kv_events_topic.clone();
    let long = topic.as_ref().is_some_and(|topic| topic.len() > 1024);
    ensure(!long, "kv-events-topic", "too long", "at most 1024 bytes")?;
    let encoding = match typed.kv_events_encoding {
        Some(args::KvEncoding::Array) => Encoding::Array,
        Some(args::KvEncoding::Map) | None => Encoding::Map,
    };
    Ok(Some(KvZmqOptions { publish, replay, topic, encoding }))
}

impl EngineSettings {
    fn new(typed: &Typed) -> Result<Self, SettingsError> {
        let block_size = typed.block_size.unwrap_or(16);
        let sane = block_size.is_power_of_two() && (8..=256).contains(&block_size);
        ensure(sane, "block-size", &block_size.to_string(), "a power of two from 8 to 256")?;
        let threads = typed.threads.unwrap_or(0);
        let in_range = typed.threads.is_none_or(|threads| (1..=1024).contains(&threads));
        ensure(in_range, "threads", &threads.to_string(), "from 1 to 1024, or left out for one a core")?;
        let device = match typed.device {
            Some(args::Device::Cuda) => DeviceChoice::Cuda,
            Some(args::Device::Cpu) => DeviceChoice::Cpu,
            Some(args::Device::Sim) => DeviceChoice::Sim,
            Some(args::Device::Auto) | None => DeviceChoice::Auto,
        };
        refuse_other_device(typed, device)?;
        let kv_size = kv_size(typed)?;
        let (max_batched_tokens, max_running) = batch(typed, 512, 64)?;
        let settings = Self {
            device,
            gpu: GpuSettings::new(typed, kv_size)?,
            simulated: SimulatedSettings::new(typed)?.map(Box::new),
            kind: EngineKind::Paged,
            threads,
            block_size,
            kv_size,
            kv_dtype: match typed.kv_dtype {
                Some(args::KvDtype::Bf16) => Some(KvDtype::BF16),
                Some(args::KvDtype::F32) => Some(KvDtype::F32),
                Some(args::KvDtype::Auto | args::KvDtype::F16 | args::KvDtype::Fp8) | None => None,
            },
            max_batched_tokens,
            max_running,
            max_waiting: at_least("max-waiting", typed.max_waiting, 1, COUNT_RULE)?.unwrap_or(512),
            prefix_cache: !typed.no_prefix_cache.unwrap_or(false),
        };
        match typed.engine {
            Some(args::Engine::Naive) => naive(typed, settings),
            Some(args::Engine::Paged) | None => Ok(settings),
        }
    }
}

impl GpuSettings {
    fn new(typed: &Typed, kv_size: KvSize) -> Result<Self, SettingsError> {
        let share = typed.gpu_memory_utilization.unwrap_or(0.9);
        let sane = (0.1..=1.0).contains(&share);
        ensure(sane, "gpu-memory-utilization", &share.to_string(), "a share from 0.1 to 1")?;
        let (max_batched_tokens, max_running) = batch(typed, 2048, 256)?;
        let pool = match kv_size {
            KvSize::Suggested => PoolSize::Utilization(share),
            KvSize::Blocks(blocks) => PoolSize::Blocks(blocks),
            KvSize::Bytes(bytes) => PoolSize::Bytes(bytes),
        };
        Ok(Self {
            library_folder: typed.cuda_lib_dir.clone(),
            pool,
            ways: Ways {
                graphs: !typed.no_cuda_graphs.unwrap_or(false),
                overlap: !typed.no_overlap.unwrap_or(false),
            },
            fp8_weights: typed.dtype == Some(args::Dtype::Fp8),
            fp8_kv: typed.kv_dtype == Some(args::KvDtype::Fp8),
            kv_dtype: match typed.kv_dtype {
                Some(args::KvDtype::F32) => Some("f32"),
                Some(args::KvDtype::F16) => Some("f16"),
                Some(args::KvDtype::Bf16) => Some("bf16"),
                Some(args::KvDtype::Auto | args::KvDtype::Fp8) | None => None,
            },
            given: of_gpu_alone(typed).into_iter().filter_map(|(name, value)| value.map(|_| name)).collect(),
            max_batched_tokens,
            max_running,
        })
    }
}

/// A setting that the device has no use for would be ignored.
fn refuse_other_device(typed: &Typed, device: DeviceChoice) -> Result<(), SettingsError> {
    let of_gpu = || {
        let formats = [
            ("dtype", (typed.dtype == Some(args::Dtype::Fp8)).then(|| "fp8".to_owned())),
            ("kv-dtype", narrow_kv(typed).map(str::to_owned)),
        ];
        of_gpu_alone(typed).into_iter().chain(formats).collect()
    };
    let of_cpu = || {
        vec![
            ("threads", typed.threads.map(|threads| threads.to_string())),
            ("kv-dtype", (typed.kv_dtype == Some(args::KvDtype::F32)).then(|| "f32".to_owned())),
            ("dtype", (typed.dtype == Some(args::Dtype::F32)).then(|| "f32".to_owned())),
            ("engine", (typed.engine == Some(args::Engine::Naive)).then(|| "naive".to_owned())),
        ]
    };
    let given = |list: Vec<Given>| list.into_iter().find_map(|(name, value)| Some((name, value?)));
    let (found, device, reason) = match device {
        DeviceChoice::Auto => return Ok(()),
        DeviceChoice::Cpu => (given(of_gpu()), "cpu", "it is for GPUs"),
        DeviceChoice::Cuda => (given(of_cpu()), "cuda", "it is for the CPU"),
        DeviceChoice::Sim => (given(of_weights(typed)), "sim", "which computes nothing"),
    };
    match found {
        Some((name, value)) => Err(SettingsError::OtherDevice { name, value, device, reason }),
        None => Ok(()),
    }
}

/// A setting's name, and its value if it was given.
type Given = (&'static str, Option<String>);

/// The settings that say how a GPU is used.
fn of_gpu_alone(typed: &Typed) -> Vec<Given> {
    vec![
        ("gpu-memory-utilization", typed.gpu_memory_utilization.map(|share| share.to_string())),
        ("cuda-lib-dir", typed.cuda_lib_dir.as_ref().map(|folder| folder.display().to_string())),
        ("no-cuda-graphs", typed.no_cuda_graphs.map(|off| off.to_string())),
        ("no-overlap", typed.no_overlap.map(|off| off.to_string())),
    ]
}

/// The settings of what is only simulated.
fn of_weights(typed: &Typed) -> Vec<Given> {
    vec![
        ("threads", typed.threads.map(|threads| threads.to_string())),
        ("engine", (typed.engine == Some(args::Engine::Naive)).then(|| "naive".to_owned())),
        ("load-format", (typed.load_format == Some(args::LoadFormat::Auto)).then(|| "auto".to_owned())),
        ("cuda-lib-dir", typed.cuda_lib_dir.as_ref().map(|folder| folder.display().to_string())),
        ("no-cuda-graphs", typed.no_cuda_graphs.map(|off| off.to_string())),
    ]
}

/// The formats of keys and values that only a GPU has.
fn narrow_kv(typed: &Typed) -> Option<&'static str> {
    match typed.kv_dtype {
        Some(args::KvDtype::Fp8) => Some("fp8"),
        Some(args::KvDtype::F16) => Some("f16"),
        _ => None,
    }
}

const COUNT_RULE: &str = "from 1 to 1048576";
const MOST: u32 = 1 << 20;

/// Tokens of a step and running sequences: what was typed, and defaults that fit to it.
fn batch(typed: &Typed, tokens: u32, running: u32) -> Result<(u32, u32), SettingsError> {
    let typed_tokens = at_least("max-batched-tokens", typed.max_batched_tokens, 1, COUNT_RULE)?;
    let typed_running = at_least("max-running", typed.max_running, 1, COUNT_RULE)?;
    match (typed_tokens, typed_running) {
        (Some(tokens), Some(running)) if tokens < running => {
            Err(SettingsError::BatchTooSmall { tokens, running })
        }
        (Some(tokens), typed) => Ok((tokens, typed.unwrap_or(running.min(tokens)))),
        (None, typed) => {
            let running = typed.unwrap_or(running);
            Ok((tokens.max(running), running))
        }
    }
}

/// The naive engine computes one whole request at a time in a cache of its own.
fn naive(typed: &Typed, paged: EngineSettings) -> Result<EngineSettings, SettingsError> {
    let refused = |name, value: String, reason| Err(SettingsError::NotNaive { name, value, reason });
    if let Some(running) = typed.max_running.filter(|&running| running != 1) {
        return refused("max-running", running.to_string(), "which serves one request at a time");
    }
    if let Some(tokens) = typed.max_batched_tokens {
        return refused("max-batched-tokens", tokens.to_string(), "which computes a prompt in one piece");
    }
    if typed.no_prefix_cache == Some(false) {
        return refused("no-prefix-cache", "false".to_owned(), "which has no prefix cache");
    }
    let of_blocks = [
        ("kv-blocks", typed.kv_blocks.map(|blocks| blocks.to_string())),
        ("kv-memory", typed.kv_memory.map(|size| size.0.to_string())),
        ("kv-dtype", typed.kv_dtype.map(|dtype| format!("{dtype:?}").to_lowercase())),
        ("block-size", typed.block_size.map(|tokens| tokens.to_string())),
    ];
    if let Some((name, value)) = of_blocks.into_iter().find_map(|(name, value)| Some((name, value?))) {
        return refused(name, value, "which has a cache of its own without blocks");
    }
    Ok(EngineSettings { kind: EngineKind::Naive, max_running: 1, prefix_cache: false, ..paged })
}

fn kv_size(typed: &Typed) -> Result<KvSize, SettingsError> {
    match (typed.kv_blocks, typed.kv_memory) {
        (Some(_), Some(_)) => Err(SettingsError::KvSizeTwice),
        (Some(0), None) => range("kv-blocks", "0", "at least 1"),
        (Some(blocks), None) => Ok(KvSize::Blocks(blocks)),
        (None, Some(size)) => Ok(KvSize::Bytes(size.0)),
        (None, None) => Ok(KvSize::Suggested),
    }
}

fn warnings(typed: &Typed) -> Vec<String> {
    let files = [("api-key-file", &typed.api_key_file), ("hub-token-file", &typed.hub_token_file)];
    let open = |(name, path): &(&str, &Option<PathBuf>)| {
        let path: &Path = path.as_deref()?;
        secrets::is_readable_by_others(path).then(|| {
            format!("--{name} {0}: others than its owner may read it; chmod 600 {0}", path.display())
        })
    };
    files.iter().filter_map(open).collect()
}

fn at_least(
    name: &'static str,
    typed: Option<u32>,
    least: u32,
    rule: &'static str,
) -> Result<Option<u32>, SettingsError> {
    match typed {
        Some(value) if value < least || (rule == COUNT_RULE && value > MOST) => {
            range(name, &value.to_string(), rule)
        }
        other => Ok(other),
    }
}

fn ensure(holds: bool, name: &'static str, value: &str, rule: &'static str) -> Result<(), SettingsError> {
    if holds { Ok(()) } else { range(name, value, rule) }
}

fn range<T>(name: &'static str, value: &str, rule: &'static str) -> Result<T, SettingsError> {
    Err(SettingsError::Range { name, value: value.to_owned(), rule })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{ByteSize, TimeSpan};

    fn settings(change: impl FnOnce(&mut Typed)) -> Result<Settings, SettingsError> {
        let mut typed = Typed::default();
        change(&mut typed);
        Settings::new(typed, None)
    }

    fn refusal(change: impl FnOnce(&mut Typed)) -> String {
        settings(change).err().unwrap().to_string()
    }

    #[test]
    fn nothing_typed_serves_the_demo() {
        let settings = settings(|_| ()).unwrap();
        assert_eq!(settings.model.source, ModelSource::Demo);
        assert_eq!(settings.model.served_names, ["demo"]);
        assert_eq!((settings.network.host.as_str(), settings.network.port), ("127.0.0.1", 8000));
        assert_eq!((settings.engine.max_batched_tokens, settings.engine.max_running), (512, 64));
        assert!(settings.engine.prefix_cache && settings.network.api_keys.is_empty());
        assert_eq!(settings.metrics_prefix, "servelab_");
    }

    #[test]
    fn defaults_make_room_for_what_was_typed() {
        let narrow = settings(|typed| typed.max_batched_tokens = Some(8)).unwrap().engine;
        assert_eq!((narrow.max_batched_tokens, narrow.max_running), (8, 8));
        let wide = settings(|typed| typed.max_running = Some(1000)).unwrap().engine;
        assert_eq!((wide.max_batched_tokens, wide.max_running), (1000, 1000));
    }

    #[test]
    fn single_settings_out_of_range_are_named_with_their_rule() {
        type Change = fn(&mut Typed);
        let cases: [(Change, &str); 11] = [
            (
                |typed| typed.block_size = Some(24),
                "--block-size is 24; it must be a power of two from 8 to 256",
            ),
            (|typed| typed.block_size = Some(512), "--block-size is 512"),
            (|typed| typed.max_batched_tokens = Some(0), "--max-batched-tokens is 0"),
            (|typed| typed.max_running = Some(0), "--max-running is 0"),
            (|typed| typed.max_waiting = Some(u32::MAX), "--max-waiting is 4294967295"),
            (|typed| typed.kv_blocks = Some(0), "--kv-blocks is 0"),
            (|typed| typed.max_model_len = Some(1), "--max-model-len is 1"),
            (|typed| typed.threads = Some(0), "--threads is 0"),
            (|typed| typed.metrics_prefix = Some("7up".into()), "--metrics-prefix is 7up"),
            (|typed| typed.max_connections = Some(0), "--max-connections is 0"),
            (|typed| typed.max_body_bytes = Some(ByteSize(1)), "--max-body-bytes is 1"),
        ];
        for (change, start) in cases {
            let message = refusal(change);
            assert!(message.starts_with(start), "{message}");
        }
        assert!(refusal(|typed| typed.log_level = Some("loud".into())).contains("use error, warn, info"));
        let short = TimeSpan(Duration::from_millis(1));
        assert!(refusal(|typed| typed.stall_timeout = Some(short)).contains("at least 1s"));
    }

    #[test]
    fn settings_that_exclude_each_other_are_refused() {
        let both = |typed: &mut Typed| {
            typed.kv_blocks = Some(4);
            typed.kv_memory = Some(ByteSize(1 << 20));
        };
        assert!(refusal(both).contains("give one of them"));
        let small = |typed: &mut Typed| {
            typed.max_batched_tokens = Some(4);
            typed.max_running = Some(8);
        };
        assert!(refusal(small).contains("--max-batched-tokens 4 is less than --max-running 8"));
        assert!(refusal(|typed| typed.revision = Some("main".into())).contains("demo is none"));
    }

    #[test]
    fn a_gpu_has_defaults_of_its_own() {
        let engine = settings(|_| ()).unwrap().engine;
        assert_eq!(engine.device, DeviceChoice::Auto);
        assert_eq!((engine.gpu.max_batched_tokens, engine.gpu.max_running), (2048, 256));
        assert_eq!(engine.gpu.pool, PoolSize::Utilization(0.9));
        assert_eq!(engine.gpu.ways, Ways { graphs: true, overlap: true });
        let engine = settings(|typed| {
            typed.max_running = Some(8);
            typed.kv_blocks = Some(100);
            typed.no_overlap = Some(true);
            typed.dtype = Some(args::Dtype::Fp8);
        });
        let gpu = engine.unwrap().engine.gpu;
        assert_eq!((gpu.max_batched_tokens, gpu.max_running, gpu.pool), (2048, 8, PoolSize::Blocks(100)));
        assert_eq!((gpu.ways, gpu.fp8_weights), (Ways { graphs: true, overlap: false }, true));
        assert_eq!((gpu.given, gpu.kv_dtype), (vec!["no-overlap"], None));
        assert!(refusal(|typed| typed.gpu_memory_utilization = Some(1.5)).contains("from 0.1 to 1"));
        assert!(refusal(|typed| typed.gpu_memory_utilization = Some(f64::NAN)).contains("from 0.1 to 1"));
    }

    #[test]
    fn settings_of_the_other_device_are_refused() {
        let on = |device, change: fn(&mut Typed)| {
            refusal(|typed| {
                typed.device = Some(device);
                change(typed);
            })
        };
        let cpu = on(args::Device::Cpu, |typed| typed.gpu_memory_utilization = Some(0.5));
        assert!(cpu.contains("--gpu-memory-utilization 0.5 does not go with --device cpu"), "{cpu}");
        let cpu = on(args::Device::Cpu, |typed| typed.kv_dtype = Some(args::KvDtype::Fp8));
        assert!(cpu.contains("--kv-dtype fp8 does not go with --device cpu"), "{cpu}");
        let cuda = on(args::Device::Cuda, |typed| typed.engine = Some(args::Engine::Naive));
        assert!(cuda.contains("--engine naive does not go with --device cuda"), "{cuda}");
        let cuda = on(args::Device::Cuda, |typed| typed.threads = Some(4));
        assert!(cuda.contains("--threads 4 does not go with --device cuda"), "{cuda}");
    }

    #[test]
    fn the_naive_engine_refuses_what_it_would_ignore() {
        let with = |change: fn(&mut Typed)| {
            settings(|typed| {
                typed.engine = Some(args::Engine::Naive);
                change(typed);
            })
        };
        let engine = with(|_| ()).unwrap().engine;
        assert_eq!((engine.kind, engine.max_running, engine.prefix_cache), (EngineKind::Naive, 1, false));
        let changes: [fn(&mut Typed); 5] = [
            |typed| typed.max_running = Some(2),
            |typed| typed.max_batched_tokens = Some(64),
            |typed| typed.kv_blocks = Some(64),
            |typed| typed.kv_dtype = Some(args::KvDtype::Bf16),
            |typed| typed.no_prefix_cache = Some(false),
        ];
        for change in changes {
            let message = with(change).err().unwrap().to_string();
            assert!(message.contains("does not go with --engine naive"), "{message}");
        }
    }

    #[test]
    fn names_can_be_given() {
        let names = vec!["lab".to_owned(), " other ".to_owned()];
        let settings = settings(|typed| typed.served_model_name = Some(names)).unwrap();
        assert_eq!(settings.model.served_names, ["lab", "other"]);
        assert!(refusal(|typed| typed.served_model_name = Some(vec![String::new()])).contains("printable"));
    }

    #[test]
    fn keys_come_from_the_environment_if_no_file_is_named() {
        let settings = Settings::new(Typed::default(), Some("a,b")).unwrap();
        assert_eq!(settings.network.api_keys.len(), 2);
        assert!(Settings::new(Typed::default(), Some("")).is_err(), "an empty list must not open the server");
    }

    #[test]
    fn a_model_that_is_nowhere_is_named() {
        assert!(refusal(|typed| typed.model = Some("/no/such/folder".into())).contains("/no/such/folder"));
    }
}
