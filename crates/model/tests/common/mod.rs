//! Fixtures, and an engine driven to the end of its requests.
#![allow(dead_code, reason = "not every test file uses every helper")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device};
use servelab_engine::{
    BlockId, Engine, EngineConfig, Event, FinishReason, LogitsRow, ModelRunner, Request, RequestId,
    SamplingParams, SequenceId, Step, StepSequence, StopConditions, TokenLogprobs, Want,
};
use servelab_model::{
    EngineKind, KvDtype, LoadedModel, ModelError, ModelSource, OpenOptions, Prepared, RunnerOptions,
    WeightDtype,
};

pub const VOCAB: usize = 96;
pub const BLOCK: u32 = 16;

pub fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// All fixtures in the repository, by name.
pub fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir(folder("")).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("config.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 18, "{names:?}");
    names
}

/// What transformers computed.
pub struct Expected {
    pub prompt: Vec<u32>,
    pub prompt_logits: Vec<Vec<f32>>,
    pub greedy_tokens: Vec<u32>,
    pub greedy_logits: Vec<Vec<f32>>,
}

pub fn expected(name: &str) -> Expected {
    let file = folder(name).join("expected.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let tokens = |name: &str| tensors[name].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    Expected {
        prompt: tokens("prompt"),
        prompt_logits: tensors["prompt_logits"].to_vec2().unwrap(),
        greedy_tokens: tokens("greedy_tokens"),
        greedy_logits: tensors["greedy_logits"].to_vec2().unwrap(),
    }
}

pub fn runner_options(engine: EngineKind) -> RunnerOptions {
    RunnerOptions {
        engine,
        num_blocks: 256,
        block_size: BLOCK,
        max_model_len: 128,
        max_batched_tokens: 256,
        threads: 2,
        kv_dtype: KvDtype::F32,
    }
}

pub fn load(
    name: &str,
    dtype: Option<WeightDtype>,
    options: &RunnerOptions,
) -> Result<LoadedModel, ModelError> {
    let source = ModelSource::Folder(folder(name));
    Prepared::open(&source, OpenOptions { dtype, ..OpenOptions::default() })?.into_runner(options)
}

pub fn engine_config(options: &RunnerOptions) -> EngineConfig {
    EngineConfig {
        block_size: options.block_size,
        num_blocks: options.num_blocks,
        max_model_len: options.max_model_len,
        max_batched_tokens: options.max_batched_tokens,
        max_running: if options.engine == EngineKind::Naive { 1 } else { 32 },
        max_waiting: 64,
        prefix_cache: options.engine != EngineKind::Naive,
    }
}

pub type AnyEngine = Engine<Box<dyn ModelRunner + Send>>;

pub fn engine(model: LoadedModel, config: EngineConfig) -> AnyEngine {
    Engine::new(config, model.runner).unwrap()
}

/// A greedy request that reports the log-probabilities of the whole vocabulary.
pub fn request(id: u64, prompt: &[u32], max_tokens: u32) -> Request {
    let sampling = SamplingParams { logprobs: Some(VOCAB as u32), ..SamplingParams::greedy() };
    Request {
        id: RequestId(id),
        prompt: prompt.into(),
        n: 1,
        sampling: Arc::new(sampling),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: Arc::new([]) },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    }
}

/// What one choice of a request was answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub finish: Option<FinishReason>,
}

/// Steps until nothing is left; answers by request and choice.
pub fn run(engine: &mut AnyEngine) -> BTreeMap<(u64, u32), Answer> {
    let mut answers: BTreeMap<(u64, u32), Answer> = BTreeMap::new();
    while engine.has_work() {
        let report = engine.step(Duration::ZERO);
        engine.check_integrity().unwrap();
        for event in report.events {
            match event {
                Event::Token { request, choice, token, logprobs } => {
                    let answer = answers.entry((request.0, choice)).or_default();
                    answer.tokens.push(token);
                    answer.logprobs.extend(logprobs);
                }
                Event::PromptLogprobs { request, logprobs } => {
                    answers.entry((request.0, 0)).or_default().prompt_logprobs = logprobs;
                }
                Event::Finished { request, choice, reason } => {
                    answers.entry((request.0, choice)).or_default().finish = Some(reason);
                }
                _ => {}
            }
        }
    }
    answers
}

/// Runs one request to its end.
pub fn answer(engine: &mut AnyEngine, request: Request) -> Answer {
    let id = request.id.0;
    engine.add(request).unwrap();
    run(engine).remove(&(id, 0)).unwrap()
}

/// A step over a whole prompt in the first blocks, wanting `rows`.
pub fn prompt_step(prompt: &[u32], rows: Vec<LogitsRow>) -> Step {
    let tokens = prompt.len() as u32;
    Step {
        tokens: prompt.to_vec(),
        positions: (0..tokens).collect(),
        slots: (0..tokens).collect(),
        blocks: (0..tokens.div_ceil(BLOCK)).map(BlockId).collect(),
        sequences: vec![StepSequence {
            id: SequenceId(1),
            tokens: 0..prompt.len(),
            blocks: 0..tokens.div_ceil(BLOCK) as usize,
            context_len: tokens,
        }],
        rows,
        ..Step::default()
    }
}

/// Every row of a prompt, with the log-probabilities of the whole vocabulary.
pub fn score_all(prompt: &[u32]) -> Vec<LogitsRow> {
    let want =
        |row| LogitsRow { row, sequence: SequenceId(1), want: Want::Score { target: 0, top: VOCAB as u32 } };
    (0..prompt.len()).map(want).collect()
}

/// Asserts that log-probabilities are the log-softmax of `logits`, within 1e-4 of the row's largest
/// logit.
pub fn assert_close(found: &TokenLogprobs, logits: &[f32], what: &str) {
    let most = logits.iter().fold(0.0_f64, |most, x| most.max(f64::from(x.abs())));
    let normaliser = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    assert_eq!(found.top.len(), logits.len(), "{what}");
    for (token, logprob) in &found.top {
        let expected = f64::from(logits[*token as usize]) - normaliser;
        let error = (f64::from(*logprob) - expected).abs();
        assert!(error <= 1e-4 * most, "{what}, token {token}: {logprob} against {expected}");
    }
}
