//! Prefill and decode speed of a model shape with dummy weights, through the real engine.
//!
//! `cargo run --release -p servelab-model --example decode_speed -- --preset smollm2-135m --dtype bf16`
//!
//! With `--write-checkpoint FOLDER` it writes the same weights as a safetensors checkpoint instead, so
//! that other programs can be measured on them.
#![expect(clippy::print_stdout, reason = "a command that prints a table")]

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use serde::Serialize;
use servelab_engine::{
    Engine, EngineConfig, Event, FinishReason, ModelRunner, Request, RequestId, SamplingParams,
    StopConditions,
};
use servelab_model::cpu::{Kernels, limits};
use servelab_model::{
    EngineKind, KvDtype, LoadFormat, ModelConfig, ModelSource, OpenOptions, Prepared, RunnerOptions,
    WeightDtype, dummy, presets,
};

#[derive(Parser)]
#[command(about = "Measures prefill and decode of a model shape with dummy weights")]
struct Arguments {
    /// Shape preset, or the path of a config.json
    #[arg(long, default_value = "smollm2-135m")]
    preset: String,
    /// Weights in f32, f16 or bf16
    #[arg(long, default_value = "bf16", value_parser = dtype)]
    dtype: WeightDtype,
    /// KV cache in f32 even where the weights are bf16
    #[arg(long)]
    kv_f32: bool,
    /// 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Prompt tokens, of the prefill measurement and in front of each decoding sequence
    #[arg(long, default_value_t = 512)]
    prompt: u32,
    /// Tokens decoded per sequence
    #[arg(long, default_value_t = 64)]
    decode: u32,
    #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
    batches: Vec<u32>,
    /// paged, naive or both
    #[arg(long, value_delimiter = ',', default_value = "paged,naive")]
    engines: Vec<String>,
    /// Each measurement is the best of that many
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also write the results there, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the dummy weights as a checkpoint folder and measure nothing
    #[arg(long)]
    write_checkpoint: Option<PathBuf>,
}

fn dtype(text: &str) -> Result<WeightDtype, String> {
    let all = [WeightDtype::F32, WeightDtype::F16, WeightDtype::BF16];
    all.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| "one of f32, f16, bf16".to_owned())
}

#[derive(Serialize)]
struct Report {
    preset: String,
    dtype: &'static str,
    kv_dtype: &'static str,
    threads: usize,
    /// Prompt tokens in front of each decoding sequence, and tokens decoded after them.
    prompt: u32,
    decode: u32,
    kernels: &'static str,
    parameters: u64,
    memory_read_gb_per_second: f64,
    f32_gflop_per_second: f64,
    bf16_gflop_per_second: Option<f64>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    engine: &'static str,
    /// `prefill` or `decode`.
    phase: &'static str,
    /// Prompt tokens of a prefill, sequences of a decode.
    size: u32,
    tokens_per_second: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let source = ModelSource::parse(Some(&arguments.preset), LoadFormat::Dummy, None)?;
    if let Some(folder) = &arguments.write_checkpoint {
        let json = match std::fs::read(&arguments.preset) {
            Ok(json) => json,
            Err(_) => presets::config_json(&arguments.preset)?,
        };
        dummy::write_checkpoint(folder, &json, &ModelConfig::parse(&json, None)?, arguments.seed)?;
        println!("wrote {}", folder.display());
        return Ok(());
    }
    let mut report = describe(&arguments, &source)?;
    for engine in &arguments.engines {
        let rows = match engine.as_str() {
            "paged" => measure(&arguments, &source, EngineKind::Paged)?,
            "naive" => measure(&arguments, &source, EngineKind::Naive)?,
            other => return Err(format!("engine {other:?}; allowed: paged, naive").into()),
        };
        report.rows.extend(rows);
    }
    print(&report);
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// The machine's limits, measured in the same run.
fn describe(arguments: &Arguments, source: &ModelSource) -> Result<Report, Box<dyn Error>> {
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let (kernels, _) = Kernels::select(threads);
    let limits = limits::measure(&kernels, 256 << 20);
    let prepared = Prepared::open(source, OpenOptions::default())?;
    Ok(Report {
        preset: arguments.preset.clone(),
        dtype: arguments.dtype.name(),
        kv_dtype: kv_dtype(arguments).name(),
        threads,
        prompt: arguments.prompt,
        decode: arguments.decode,
        kernels: kernels.level().name(),
        parameters: prepared.config().num_parameters(),
        memory_read_gb_per_second: limits.read_bytes_per_second / 1e9,
        f32_gflop_per_second: limits.f32_flops_per_second / 1e9,
        bf16_gflop_per_second: limits.bf16_flops_per_second.map(|rate| rate / 1e9),
        rows: Vec::new(),
    })
}

fn kv_dtype(arguments: &Arguments) -> KvDtype {
    if arguments.kv_f32 { KvDtype::F32 } else { KvDtype::suiting(arguments.dtype) }
}

type AnyEngine = Engine<Box<dyn ModelRunner + Send>>;

fn measure(
    arguments: &Arguments,
    source: &ModelSource,
    kind: EngineKind,
) -> Result<Vec<Row>, Box<dyn Error>> {
    let name = if kind == EngineKind::Paged { "paged" } else { "naive" };
    let (mut engine, vocab) = build(arguments, source, kind)?;
    let best = |once: &mut dyn FnMut() -> Result<f64, Box<dyn Error>>| {
        (0..arguments.repeat.max(1)).try_fold(0.0_f64, |best, _| Ok::<_, Box<dyn Error>>(best.max(once()?)))
    };
    let mut rows = Vec::new();
    let tokens_per_second = best(&mut || prefill(&mut engine, arguments.prompt, vocab))?;
    rows.push(Row { engine: name, phase: "prefill", size: arguments.prompt, tokens_per_second });
    for size in &arguments.batches {
        let tokens_per_second =
            best(&mut || decode(&mut engine, *size, arguments.prompt, arguments.decode, vocab))?;
        rows.push(Row { engine: name, phase: "decode", size: *size, tokens_per_second });
    }
    Ok(rows)
}

fn build(
    arguments: &Arguments,
    source: &ModelSource,
    kind: EngineKind,
) -> Result<(AnyEngine, u32), Box<dyn Error>> {
    // The baseline runs in the format that candle is fastest in.
    let dtype = (kind == EngineKind::Paged).then_some(arguments.dtype);
    let prepared =
        Prepared::open(source, OpenOptions { dtype, seed: arguments.seed, ..OpenOptions::default() })?;
    let vocab = prepared.config().vocab_size as u32;
    let most = arguments.batches.iter().copied().max().unwrap_or(1).max(1);
    let longest = arguments.prompt + arguments.decode + 2;
    let block_size = 16;
    let num_blocks = most * longest.div_ceil(block_size);
    let options = RunnerOptions {
        engine: kind,
        num_blocks,
        block_size,
        max_model_len: longest,
        // All prompts in one step, so that all sequences decode from the same step on.
        max_batched_tokens: longest.max(most * arguments.prompt),
        threads: arguments.threads,
        kv_dtype: kv_dtype(arguments),
    };
    let config = EngineConfig {
        block_size,
        num_blocks,
        max_model_len: longest,
        max_batched_tokens: options.max_batched_tokens,
        max_running: if kind == EngineKind::Paged { most } else { 1 },
        max_waiting: most,
        prefix_cache: false,
    };
    Ok((Engine::new(config, prepared.into_runner(&options)?.runner)?, vocab))
}

fn request(id: u32, prompt: u32, max_tokens: u32, vocab: u32) -> Request {
    let token = |position: u32| (id * 7919 + position * 104_729 + 1) % vocab;
    Request {
        id: RequestId(u64::from(id)),
        prompt: (0..prompt).map(token).collect(),
        n: 1,
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: Arc::new([]) },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    }
}

/// Prompt tokens per second of one prompt, the first output token included.
fn prefill(engine: &mut AnyEngine, prompt: u32, vocab: u32) -> Result<f64, Box<dyn Error>> {
    engine.add(request(0, prompt, 1, vocab))?;
    let start = Instant::now();
    while engine.has_work() {
        step(engine)?;
    }
    Ok(f64::from(prompt) / start.elapsed().as_secs_f64())
}

/// Output tokens per second of `batch` sequences that each begin to decode after `prompt` tokens,
/// counted over the steps that decode only.
fn decode(
    engine: &mut AnyEngine,
    batch: u32,
    prompt: u32,
    tokens: u32,
    vocab: u32,
) -> Result<f64, Box<dyn Error>> {
    for id in 0..batch {
        engine.add(request(id, prompt, tokens + 1, vocab))?;
    }
    let (mut decoded, mut seconds) = (0, 0.0);
    while engine.has_work() {
        let start = Instant::now();
        let (prefill_tokens, decode_tokens) = step(engine)?;
        if prefill_tokens == 0 {
            seconds += start.elapsed().as_secs_f64();
            decoded += decode_tokens;
        }
    }
    Ok(f64::from(decoded) / seconds)
}

/// One step; the tokens of prompts and of decodes that it computed.
fn step(engine: &mut AnyEngine) -> Result<(u32, u32), Box<dyn Error>> {
    let report = engine.step(Duration::ZERO);
    for event in report.events {
        if let Event::Finished { reason: FinishReason::Error(message), .. } = event {
            return Err(message.into());
        }
    }
    Ok((report.prefill_tokens, report.decode_tokens))
}

fn print(report: &Report) {
    println!(
        "{} ({:.1}M parameters), weights {}, KV {}, {} threads, kernels {}",
        report.preset,
        report.parameters as f64 / 1e6,
        report.dtype,
        report.kv_dtype,
        report.threads,
        report.kernels
    );
    println!(
        "this machine: memory read {:.1} GB/s, multiply-add in f32 {:.0} GFLOP/s, in bf16 {}\n",
        report.memory_read_gb_per_second,
        report.f32_gflop_per_second,
        report.bf16_gflop_per_second.map_or("as f32".to_owned(), |rate| format!("{rate:.0} GFLOP/s"))
    );
    println!("| engine | phase | size | tokens/s |\n| --- | --- | --- | --- |");
    for row in &report.rows {
        println!("| {} | {} | {} | {:.1} |", row.engine, row.phase, row.size, row.tokens_per_second);
    }
}
