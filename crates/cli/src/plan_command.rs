//! `servelab plan`: from daily users to GPUs, as one would write it on a whiteboard.
//!
//! The arithmetic is that of `servelab_sim::planner`; here names and files become its inputs.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use servelab_model::hub::HubOptions;
use servelab_model::{DummyShape, ModelConfig, ModelError, ModelSource, presets};
use servelab_sim::{
    Assumptions, CapacityPlan, Dtype, HardwareError, HardwareProfile, ModelShape, PlanError, SlidingWindow,
    plan, whiteboard,
};

use crate::plan_simulate::{self, SimulateArgs};
use crate::size::ByteSize;

const DEFAULT: Assumptions = Assumptions::DEFAULT;
/// A hardware profile is a few lines.
const MOST_PROFILE_BYTES: u64 = 1 << 16;

/// What was typed. Every default is an assumption that somebody may doubt.
#[derive(Args, Clone, Debug)]
pub struct PlanCommand {
    /// Name of a known shape, a config.json, or a folder that holds one.
    #[arg(long, value_name = "NAME|FILE", default_value = "llama-3.1-70b", help_heading = "Model")]
    model: String,
    /// Number format of the weights: bf16, f16, fp8 or f32.
    #[arg(long, default_value_t = Dtype::Bf16, help_heading = "Model")]
    dtype: Dtype,
    /// Number format of keys and values.
    #[arg(long, value_name = "DTYPE", default_value_t = Dtype::Bf16, help_heading = "Model")]
    kv_dtype: Dtype,

    /// Name of a known GPU, a profile (TOML), or measured with the three numbers below.
    #[arg(long, value_name = "NAME|FILE", default_value = "h100", help_heading = "Hardware")]
    hardware: String,
    /// Memory of one GPU, such as 80GB, in place of the profile's.
    #[arg(long, value_name = "SIZE", help_heading = "Hardware")]
    gpu_memory: Option<ByteSize>,
    /// Memory bandwidth of one GPU in bytes/s, such as 2.9e12, in place of the profile's.
    #[arg(long, value_name = "BYTES/S", help_heading = "Hardware")]
    bandwidth: Option<f64>,
    /// Dense FLOP/s of one GPU with weights of --dtype, such as 700e12, in place of the profile's.
    #[arg(long, value_name = "FLOP/S", help_heading = "Hardware")]
    flops: Option<f64>,
    /// Degree of tensor parallelism; the next one that fits if this does not
    /// [default: the smallest that fits].
    #[arg(long, value_name = "COUNT", help_heading = "Hardware")]
    gpus_per_replica: Option<u32>,
    /// Dollars for one GPU and hour [default: an assumption that the profile holds].
    #[arg(long, value_name = "DOLLARS", help_heading = "Hardware")]
    price: Option<f64>,

    /// Daily active users, such as 250k or 10M.
    #[arg(long, value_name = "USERS", default_value = "1M", value_parser = users, help_heading = "Load")]
    dau: f64,
    /// Sessions of one user and day.
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT.sessions_per_user, help_heading = "Load")]
    sessions_per_user: f64,
    /// Requests of one session.
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT.requests_per_session, help_heading = "Load")]
    requests_per_session: f64,
    /// Requests of one user and day, in place of the two above.
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["sessions_per_user", "requests_per_session"],
          help_heading = "Load")]
    requests_per_user: Option<f64>,
    /// Mean prompt, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT.input_tokens, help_heading = "Load")]
    input_tokens: u64,
    /// Share of the input that is in the prefix cache.
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT.cached_share, help_heading = "Load")]
    cached_share: f64,
    /// Mean answer, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT.output_tokens, help_heading = "Load")]
    output_tokens: u64,
    /// Rate at the peak over the mean rate [default: 3, with a warning].
    #[arg(long, value_name = "FACTOR", help_heading = "Load")]
    peak: Option<f64>,

    /// Share of a GPU's memory that the engine may use.
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT.memory_utilisation, help_heading = "Engine")]
    utilisation: f64,
    /// Memory of one GPU for activations, graphs and workspaces.
    #[arg(long, value_name = "SIZE", default_value = "1.25GB", help_heading = "Engine")]
    activations: ByteSize,
    /// Share of the peak FLOP/s that prefill reaches.
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT.mfu, help_heading = "Engine")]
    mfu: f64,
    /// Floor of a decode step over the time that it really takes.
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT.decode_efficiency, help_heading = "Engine")]
    decode_efficiency: f64,
    /// Most requests that run at once on a replica [default: what its memory holds].
    #[arg(long, value_name = "COUNT", help_heading = "Engine")]
    max_running: Option<u32>,
    /// GPUs over those that the peak keeps busy.
    #[arg(long, value_name = "FACTOR", default_value_t = DEFAULT.headroom, help_heading = "Engine")]
    headroom: f64,

    #[command(flatten)]
    simulation: SimulateArgs,

    /// Print all numbers as JSON.
    #[arg(long)]
    json: bool,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--model: {0}")]
    Model(#[from] ModelError),
    #[error("--hardware: {0}")]
    Hardware(#[from] HardwareError),
    #[error("--hardware: cannot read {}: {source}", path.display())]
    ReadProfile { path: PathBuf, source: std::io::Error },
    #[error("--hardware: {} is no profile: {source}", path.display())]
    Profile { path: PathBuf, source: HardwareError },
    #[error("--hardware: {} is no profile: it has more than {MOST_PROFILE_BYTES} bytes", path.display())]
    ProfileTooLarge { path: PathBuf },
    #[error("--hardware measured needs --gpu-memory, --bandwidth and --flops; give all three")]
    Measured,
    #[error("--{flag} is {value}; it must be {rule}")]
    Range { flag: &'static str, value: f64, rule: &'static str },
    #[error(transparent)]
    Plan(PlanError),
    #[error(transparent)]
    Simulate(#[from] plan_simulate::Error),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

impl Error {
    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Simulate(error) => error.is_usage(),
            other => !matches!(other, Self::Write(_)),
        }
    }
}

/// Writes the plan to `out`, or the fleet that a simulation finds.
///
/// # Errors
/// If a name is unknown, a file is wrong, an assumption is impossible, or the model fits nowhere.
pub fn run(command: &PlanCommand, out: &mut impl Write) -> Result<(), Error> {
    let plan = make(command)?;
    if command.simulation.simulate {
        return Ok(plan_simulate::run(&command.simulation, &plan, command.json, out)?);
    }
    if command.json {
        serde_json::to_writer_pretty(&mut *out, &plan).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", text(&plan))?;
    }
    Ok(out.flush()?)
}

fn make(command: &PlanCommand) -> Result<CapacityPlan, Error> {
    let model = named_shape(&command.model, command.dtype, command.kv_dtype)?;
    let hardware = hardware(command)?;
    plan(&model, &hardware, &assumptions(command)).map_err(|error| match error {
        PlanError::Range { field, value, rule } => match flag(command, field) {
            Some(flag) => Error::Range { flag, value, rule },
            None => Error::Plan(error),
        },
        other => Error::Plan(other),
    })
}

/// The flag that sets a field of [`Assumptions`].
fn flag(command: &PlanCommand, field: &str) -> Option<&'static str> {
    Some(match field {
        "daily_users" => "dau",
        "sessions_per_user" => "sessions-per-user",
        "requests_per_session" if command.requests_per_user.is_some() => "requests-per-user",
        "requests_per_session" => "requests-per-session",
        "input_tokens" => "input-tokens",
        "cached_share" => "cached-share",
        "output_tokens" => "output-tokens",
        "peak_factor" => "peak",
        "memory_utilisation" => "utilisation",
        "activation_bytes_per_gpu" => "activations",
        "mfu" => "mfu",
        "decode_efficiency" => "decode-efficiency",
        "headroom" => "headroom",
        "gpus_per_replica" => "gpus-per-replica",
        "max_running" => "max-running",
        "dollars_per_gpu_hour" => "price",
        _ => return None,
    })
}

/// The whiteboard, then what it would have got wrong with the usual shortcuts.
fn text(plan: &CapacityPlan) -> String {
    let mut lines = whiteboard::lines(plan);
    if !plan.warnings.is_empty() {
        lines.extend([String::new(), "Where a shortcut would have gone wrong:".to_owned()]);
        lines.extend(whiteboard::warning_lines(plan));
    }
    lines.extend([
        String::new(),
        "Every assumption is a flag: servelab plan --help".to_owned(),
        String::new(),
    ]);
    lines.join("\n")
}

fn assumptions(command: &PlanCommand) -> Assumptions {
    let (sessions_per_user, requests_per_session) = match command.requests_per_user {
        Some(requests) => (1.0, requests),
        None => (command.sessions_per_user, command.requests_per_session),
    };
    Assumptions {
        daily_users: command.dau,
        sessions_per_user,
        requests_per_session,
        input_tokens: command.input_tokens,
        cached_share: command.cached_share,
        output_tokens: command.output_tokens,
        peak_factor: command.peak,
        memory_utilisation: command.utilisation,
        activation_bytes_per_gpu: command.activations.0 as f64,
        mfu: command.mfu,
        decode_efficiency: command.decode_efficiency,
        headroom: command.headroom,
        gpus_per_replica: command.gpus_per_replica,
        max_running: command.max_running,
        dollars_per_gpu_hour: command.price,
    }
}

/// A number of people: `250000`, `250k`, `10M`, `1.5B`.
fn users(text: &str) -> Result<f64, String> {
    let factors = [('k', 1e3), ('K', 1e3), ('M', 1e6), ('B', 1e9)];
    let found = factors.iter().find_map(|(unit, factor)| Some((text.strip_suffix(*unit)?, factor)));
    let (number, factor) = found.unwrap_or((text, &1.0));
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number * factor),
        _ => Err(format!("{text:?} is no number of users; give one such as 250000, 250k or 10M")),
    }
}

/// The shape of that name, or of a config.json or a folder that holds one.
///
/// # Errors
/// If there is no such name or file, or the file is wrong.
pub fn named_shape(model: &str, weight_dtype: Dtype, kv_dtype: Dtype) -> Result<ModelShape, Error> {
    let known = presets::names().contains(&model);
    let path = Path::new(model);
    let source = match known {
        true => DummyShape::Preset(model.to_owned()),
        false if path.is_dir() => DummyShape::Path(path.join("config.json")),
        false if path.exists() => DummyShape::Path(path.to_owned()),
        // The complaint lists the known names.
        false => DummyShape::Preset(model.to_owned()),
    };
    let files = ModelSource::Dummy(source).resolve(HubOptions::default())?;
    let config = ModelConfig::parse(&files.config, None)?;
    Ok(shape_of(model, &config, weight_dtype, kv_dtype))
}

/// What the arithmetic needs of a model.
pub fn shape_of(name: &str, config: &ModelConfig, weight_dtype: Dtype, kv_dtype: Dtype) -> ModelShape {
    let sliding_layers = config.windows.iter().flatten().count() as u64;
    ModelShape {
        name: name.to_owned(),
        layers: config.num_layers as u64,
        hidden: config.hidden_size as u64,
        heads: config.num_heads as u64,
        kv_heads: config.num_kv_heads as u64,
        head_dim: config.head_dim as u64,
        intermediate: config.intermediate_size as u64,
        vocabulary: config.vocab_size as u64,
        tied_embeddings: config.tie_word_embeddings,
        max_context_tokens: config.max_position_embeddings as u64,
        sliding_window: config
            .shortest_window()
            .map(|tokens| SlidingWindow { layers: sliding_layers, tokens: tokens as u64 }),
        parameters: config.num_parameters(),
        weight_dtype,
        kv_dtype,
    }
}

fn hardware(command: &PlanCommand) -> Result<HardwareProfile, Error> {
    let numbers = (command.gpu_memory, command.bandwidth, command.flops);
    if command.hardware == "measured" {
        let (Some(memory), Some(bandwidth), Some(flops)) = numbers else { return Err(Error::Measured) };
        return Ok(HardwareProfile::measured(memory.0 as f64, bandwidth, command.dtype, flops)?);
    }
    let mut profile = named_or_file(&command.hardware)?;
    if numbers != (None, None, None) {
        profile.name = format!("{} (changed)", profile.name);
        profile.memory_bytes = command.gpu_memory.map_or(profile.memory_bytes, |size| size.0 as f64);
        profile.bandwidth_bytes_per_second = command.bandwidth.unwrap_or(profile.bandwidth_bytes_per_second);
        if let Some(flops) = command.flops {
            profile.flops_per_second.insert(command.dtype, flops);
        }
        profile.source.push_str("; with numbers of the command line");
    }
    Ok(profile)
}

/// The known hardware of that name, or the profile in a file.
///
/// # Errors
/// If there is neither, or the file is wrong.
pub fn named_or_file(name: &str) -> Result<HardwareProfile, Error> {
    let unknown = match HardwareProfile::named(name) {
        Ok(profile) => return Ok(profile),
        Err(unknown) => unknown,
    };
    let path = Path::new(name);
    if !path.exists() {
        return Err(unknown.into());
    }
    let failed = |source| Error::ReadProfile { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MOST_PROFILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MOST_PROFILE_BYTES {
        return Err(Error::ProfileTooLarge { path: path.to_owned() });
    }
    HardwareProfile::parse(&text).map_err(|source| Error::Profile { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn typed(flags: &[&str]) -> PlanCommand {
        let all = ["servelab", "plan"].into_iter().chain(flags.iter().copied());
        match Cli::try_parse_from(all).map(|cli| cli.command) {
            Ok(Some(Command::Plan(command))) => *command,
            Ok(_) => panic!("{flags:?}"),
            Err(error) => panic!("{error}"),
        }
    }

    fn refusal(flags: &[&str]) -> String {
        make(&typed(flags)).unwrap_err().to_string()
    }

    #[test]
    fn the_plan_of_a_70b_for_a_million_users() {
        insta::assert_snapshot!(text(&make(&typed(&[])).unwrap()));
    }

    #[test]
    fn the_plan_of_an_8b_in_fp8_for_a_small_team() {
        let flags = [
            ["--model", "llama-3.1-8b"],
            ["--hardware", "l4"],
            ["--dtype", "fp8"],
            ["--dau", "20k"],
            ["--requests-per-user", "30"],
            ["--cached-share", "0.5"],
            ["--peak", "4"],
            ["--max-running", "32"],
        ];
        insta::assert_snapshot!(text(&make(&typed(&flags.concat())).unwrap()));
    }

    #[test]
    fn json_holds_what_the_text_says() {
        let mut out = Vec::new();
        run(&typed(&["--json"]), &mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let mut out = Vec::new();
        run(&typed(&[]), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("327,680 B/token") && json["memory"]["kv_bytes_per_token"] == 327_680.0);
        assert_eq!(json["warnings"][0]["id"], "fit");
        assert!(text.contains(json["warnings"][0]["text"].as_str().unwrap()));
    }

    /// The shapes that the ledger's figures are computed from.
    #[test]
    fn presets_have_the_parameters_of_the_ledger() {
        let streamed = |name: &str| {
            let shape = named_shape(name, Dtype::Bf16, Dtype::Bf16).unwrap();
            (shape.parameters, shape.streamed_parameters(), shape.kv_bytes_per_token())
        };
        assert_eq!(streamed("llama-3.1-8b"), (8_030_261_248, 7_504_924_672, 131_072.0));
        assert_eq!(streamed("llama-3.1-70b"), (70_553_706_496, 69_503_033_344, 327_680.0));
        // Tied: the embedding is read for the logits.
        let (all, read, _) = streamed("smollm2-135m");
        assert_eq!(all, read);
    }

    #[test]
    fn every_preset_and_every_gpu_make_a_plan() {
        for model in presets::names() {
            for gpu in HardwareProfile::names().unwrap() {
                let plan =
                    make(&typed(&["--model", model, "--hardware", &gpu, "--input-tokens", "1000"])).unwrap();
                let wide = text(&plan).lines().map(|line| line.chars().count()).max();
                assert!(wide <= Some(whiteboard::WIDTH), "{}", text(&plan));
            }
        }
    }

    #[test]
    fn flags_reach_the_assumptions() {
        let flags = [
            ["--dau", "1.5M"],
            ["--requests-per-user", "30"],
            ["--input-tokens", "100"],
            ["--cached-share", "0.25"],
            ["--output-tokens", "50"],
            ["--peak", "5"],
            ["--utilisation", "0.95"],
            ["--activations", "1GB"],
            ["--mfu", "0.4"],
            ["--decode-efficiency", "0.7"],
            ["--max-running", "8"],
            ["--headroom", "1.5"],
            ["--gpus-per-replica", "4"],
            ["--price", "2.5"],
        ];
        let expected = Assumptions {
            daily_users: 1.5e6,
            sessions_per_user: 1.0,
            requests_per_session: 30.0,
            input_tokens: 100,
            cached_share: 0.25,
            output_tokens: 50,
            peak_factor: Some(5.0),
            memory_utilisation: 0.95,
            activation_bytes_per_gpu: 1e9,
            mfu: 0.4,
            decode_efficiency: 0.7,
            headroom: 1.5,
            gpus_per_replica: Some(4),
            max_running: Some(8),
            dollars_per_gpu_hour: Some(2.5),
        };
        assert_eq!(assumptions(&typed(&flags.concat())), expected);
        assert_eq!(assumptions(&typed(&[])), Assumptions::DEFAULT);
    }

    #[test]
    fn people_are_counted_as_people_write_it() {
        assert_eq!(
            ["250000", "250k", "10M", "1.5B"].map(|text| users(text).unwrap()),
            [25e4, 25e4, 1e7, 1.5e9]
        );
        for text in ["", "M", "ten", "1e400", "nan"] {
            assert!(users(text).unwrap_err().contains("250k or 10M"), "{text}");
        }
    }

    #[test]
    fn hardware_comes_from_a_name_a_file_or_numbers() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let profile = "name = \"own\"\nmemory_bytes = 200e9\nbandwidth_bytes_per_second = 1e12\n\
                       flops_per_second = { bf16 = 100e12 }\nsource = \"measured\"\n";
        file.write_all(profile.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        assert_eq!(hardware(&typed(&["--hardware", &path])).unwrap().name, "own");
        file.write_all(b"memory = 1\n").unwrap();
        let wrong = refusal(&["--hardware", &path]);
        assert!(wrong.starts_with(&format!("--hardware: {path} is no profile: line 6: ")), "{wrong}");
        let numbers = ["--gpu-memory", "80GB", "--bandwidth", "2.9e12", "--flops", "700e12"];
        let changed = hardware(&typed(&numbers)).unwrap();
        assert_eq!((changed.memory_bytes, changed.bandwidth_bytes_per_second), (80e9, 2.9e12));
        assert_eq!((changed.arithmetic(Dtype::Bf16).unwrap().1, changed.most_gpus()), (700e12, 8));
        let measured = hardware(&typed(&[&["--hardware", "measured"], &numbers[..]].concat())).unwrap();
        assert_eq!((measured.name.as_str(), measured.most_gpus()), ("measured", 1));
    }

    #[test]
    fn what_cannot_be_is_named_with_its_flag() {
        assert!(
            refusal(&["--model", "gpt-9"])
                .starts_with("--model: unknown shape preset \"gpt-9\"; known: llama")
        );
        assert!(
            refusal(&["--hardware", "tpu"])
                .starts_with("--hardware: unknown hardware \"tpu\"; known: a100-40")
        );
        assert!(refusal(&["--hardware", "measured"]).contains("--gpu-memory, --bandwidth and --flops"));
        assert!(refusal(&["--bandwidth", "1"]).contains("is 1; it must be from 1e3 to 1e18"));
        assert!(refusal(&["--hardware", "/"]).contains("cannot read /"));
        for (flag, value, rule) in [
            ("--dau", "0", "from 1 to 1e10"),
            ("--sessions-per-user", "0", "from 0.001 to 1000"),
            ("--requests-per-session", "2000", "from 0.001 to 1000"),
            ("--requests-per-user", "0", "from 0.001 to 1000"),
            ("--input-tokens", "0", "from 1 to 1e9"),
            ("--cached-share", "1.5", "from 0 to 1"),
            ("--output-tokens", "0", "from 1 to 1e9"),
            ("--peak", "0.5", "from 1 to 100"),
            ("--utilisation", "90", "from 0.01 to 1"),
            ("--activations", "2000TB", "from 0 to 1e15 bytes"),
            ("--mfu", "40", "from 0.01 to 1"),
            ("--decode-efficiency", "0", "from 0.01 to 1"),
            ("--headroom", "0", "from 1 to 10"),
            ("--gpus-per-replica", "0", "from 1 to 1024"),
            ("--max-running", "0", "from 1 to 1e9"),
            ("--price", "1e9", "from 0 to 100000 dollars"),
        ] {
            let message = refusal(&[flag, value]);
            assert!(message.starts_with(&format!("{flag} is ")), "{message}");
            assert!(message.ends_with(&format!("; it must be {rule}")), "{message}");
        }
        let too_many = refusal(&["--dau", "10000M", "--sessions-per-user", "1000"]);
        assert!(too_many.starts_with("requests_per_day is "), "{too_many}");
        assert!(refusal(&["--gpus-per-replica", "3"]).contains("it splits over 1, 2, 4, 8"));
        assert!(
            refusal(&[
                "--hardware",
                "measured",
                "--gpu-memory",
                "16GB",
                "--bandwidth",
                "2e10",
                "--flops",
                "1e12"
            ])
            .contains("1 x measured offer 14.4 GB")
        );
        let both = ["servelab", "plan", "--requests-per-user", "3", "--sessions-per-user", "1"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}
