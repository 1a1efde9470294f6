//! The CUDA runner on the emulator: the same engine, decoder, kernels, launches and graphs as on a GPU, beside the
//! CPU's runner.
//!
//! The two differ by rounding: activations are bf16 here and f32 there. So log-probabilities are compared within
//! [`TOLERANCE`], and tokens are equal up to a place where two candidates are closer than that.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]

#[allow(unsafe_code, dead_code)]
#[path = "../src/cuda/emulator/mod.rs"]
mod emulator;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use emulator::Emulator;
use servelab_engine::{
    BlockId, Engine, EngineConfig, Event, FinishReason, LogitsRow, ModelRunner, Request, RequestId,
    SamplingParams, SequenceId, Step, StepSequence, StopConditions, TokenLogprobs, Want,
};
use servelab_model::cpu::KvDtype;
use servelab_model::cpu::runner::{CpuOptions, CpuRunner};
use servelab_model::cuda::compare::{CompareSizes, Comparison, Numbers, compare_cpu};
use servelab_model::cuda::examine::{Effort, Finding, examine};
use servelab_model::cuda::kernels::{Element, KvElement};
use servelab_model::cuda::ops::{CudaOptions, GpuTime};
use servelab_model::cuda::runner::{CudaModel, CudaRunner, Ways};
// The emulator finds these beside itself.
use servelab_model::cuda::{gpu, kernels};
use servelab_model::dummy::DummyWeights;
use servelab_model::weights::Weights;
use servelab_model::{ModelConfig, WeightDtype};

/// Of log-probabilities; logits are within about 1 of each other.
const TOLERANCE: f32 = 0.02;
/// With 8 bits for keys and values, or for weights and activations too.
const FP8_TOLERANCE: f32 = 0.12;

const VOCABULARY: usize = 200;
const BLOCKS: usize = 40;

/// A model that the emulator computes in a fraction of a second.
fn config(change: &str) -> ModelConfig {
    let base = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 200, "hidden_size": 96,
        "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false}"#;
    let mut json: serde_json::Value = serde_json::from_str(base).unwrap();
    let change: serde_json::Value = serde_json::from_str(change).unwrap();
    json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    ModelConfig::parse(json.to_string().as_bytes(), None).unwrap()
}

const QWEN2: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "head_dim": null, "hidden_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 1}"#;
const QWEN3: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": true}"#;
const MISTRAL: &str = r#"{"architectures": ["MistralForCausalLM"], "sliding_window": 24}"#;

fn weights() -> Weights {
    Weights::Dummy(DummyWeights { seed: 3 })
}

fn options() -> CudaOptions {
    CudaOptions {
        element: Element::BF16,
        fp8_weights: false,
        kv: KvElement::Same,
        block_size: 16,
        max_batched_tokens: 64,
        max_sequences: 6,
        max_model_len: 256,
    }
}

/// `None`, loudly, where there is no C++ compiler.
fn cuda(
    config: &ModelConfig,
    options: CudaOptions,
    ways: Ways,
    blocks: usize,
) -> Option<CudaRunner<Emulator>> {
    let emulator = Arc::new(Emulator::or_skip("the CUDA runner", 5)?);
    let model = CudaModel::load(emulator, config, &weights(), options, Box::new(|_, _| ())).unwrap();
    Some(model.into_runner(blocks, ways).unwrap())
}

fn cpu(config: &ModelConfig) -> CpuRunner {
    let options = CpuOptions {
        num_blocks: BLOCKS,
        block_size: 16,
        max_batched_tokens: 64,
        threads: 2,
        kv_dtype: KvDtype::BF16,
    };
    CpuRunner::new(config, &weights(), WeightDtype::BF16, options).unwrap()
}

fn engine<R: ModelRunner>(
    runner: R,
    blocks: usize,
    max_batched_tokens: u32,
    prefix_cache: bool,
) -> Engine<R> {
    let config = EngineConfig {
        block_size: 16,
        num_blocks: blocks as u32,
        max_model_len: 256,
        max_batched_tokens,
        max_running: 6,
        max_waiting: 64,
        prefix_cache,
    };
    Engine::new(config, runner).unwrap()
}

fn prompt(start: usize, length: usize) -> Vec<u32> {
    (0..length).map(|at| ((start * 37 + at * at * 7 + at * 3) % VOCABULARY) as u32).collect()
}

/// Greedy, with the log-probabilities of the 20 likeliest.
fn request(id: u64, prompt: &[u32], max_tokens: u32) -> Request {
    let sampling = SamplingParams { logprobs: Some(20), ..SamplingParams::greedy() };
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

#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
}

fn run<R: ModelRunner>(engine: &mut Engine<R>) -> BTreeMap<(u64, u32), Answer> {
    let mut answers: BTreeMap<(u64, u32), Answer> = BTreeMap::new();
    while engine.has_work() {
        let report = engine.step(Duration::ZERO);
        assert_eq!(report.error, None);
        engine.check_integrity().unwrap();
        for event in report.events {
            match event {
                Event::Token { request, choice, token, logprobs } => {
                    let answer = answers.entry((request.0, choice)).or_default();
                    answer.tokens.push(token);
                    answer.logprobs.extend(logprobs);
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

fn answer<R: ModelRunner>(engine: &mut Engine<R>, request: Request) -> Answer {
    let id = request.id.0;
    engine.add(request).unwrap();
    run(engine).remove(&(id, 0)).unwrap()
}

/// Two greedy answers agree: the same log-probabilities, and the same tokens as long as no two candidates were
/// closer than the tolerance. Gives how many tokens were compared.
fn assert_agree(found: &Answer, expected: &Answer, tolerance: f32, what: &str) -> usize {
    assert_eq!(found.finish, expected.finish, "{what}");
    let pairs = found.tokens.iter().zip(&expected.tokens);
    let rows = found.logprobs.iter().zip(&expected.logprobs);
    for (row, ((mine, theirs), (my_row, their_row))) in pairs.zip(rows).enumerate() {
        let of =
            |token: u32| their_row.top.iter().find(|(other, _)| *other == token).map(|(_, logprob)| *logprob);
        for (token, logprob) in &my_row.top {
            if let Some(other) = of(*token) {
                assert!((logprob - other).abs() <= tolerance, "{what}, row {row}: {logprob} and {other}");
            }
        }
        if mine != theirs {
            let gap = their_row.logprob - of(*mine).expect("the token chosen is among the likeliest");
            assert!(gap <= 2.0 * tolerance, "{what}, row {row}: {mine} and {theirs} differ by {gap}");
            return row;
        }
    }
    found.tokens.len()
}

fn prompt_step(prompt: &[u32]) -> Step {
    let tokens = prompt.len() as u32;
    let want =
        |row| LogitsRow { row, sequence: SequenceId(1), want: Want::Score { target: row as u32, top: 20 } };
    Step {
        tokens: prompt.to_vec(),
        positions: (0..tokens).collect(),
        slots: (0..tokens).collect(),
        blocks: (0..tokens.div_ceil(16)).map(BlockId).collect(),
        sequences: vec![StepSequence {
            id: SequenceId(1),
            tokens: 0..prompt.len(),
            blocks: 0..tokens.div_ceil(16) as usize,
            context_len: tokens,
        }],
        rows: (0..prompt.len()).map(want).collect(),
        ..Step::default()
    }
}

/// The largest difference of a log-probability between GPU and CPU over all rows of a prompt.
fn prompt_error(config: &ModelConfig, options: CudaOptions) -> Option<f32> {
    let mut cuda = cuda(config, options, Ways::default(), BLOCKS)?;
    let step = prompt_step(&prompt(1, 50));
    let (found, expected) = (cuda.run(&step).unwrap(), {
        let mut step = step.clone();
        for row in &mut step.rows {
            if let Want::Score { top, .. } = &mut row.want {
                *top = VOCABULARY as u32;
            }
        }
        cpu(config).run(&step).unwrap()
    });
    let mut worst = 0.0f32;
    for (found, expected) in found.rows.iter().zip(&expected.rows) {
        let (found, expected) = (found.logprobs.as_ref().unwrap(), expected.logprobs.as_ref().unwrap());
        assert_eq!(found.top.len(), 20);
        worst = worst.max((found.logprob - expected.logprob).abs());
        for (token, logprob) in &found.top {
            let (_, other) = expected.top.iter().find(|(other, _)| other == token).unwrap();
            worst = worst.max((logprob - other).abs());
        }
    }
    assert!(worst.is_finite());
    Some(worst)
}

#[test]
fn log_probabilities_are_those_of_the_cpu() {
    for change in ["{}", QWEN2, QWEN3, MISTRAL] {
        for element in [Element::BF16, Element::F16] {
            let Some(error) = prompt_error(&config(change), CudaOptions { element, ..options() }) else {
                return;
            };
            assert!(error <= TOLERANCE, "{element:?} {change}: {error}");
            assert!(error > 0.0, "the two are computed in different formats");
        }
    }
}

#[test]
fn eight_bits_cost_little() {
    for (fp8_weights, kv) in [(false, KvElement::E4M3), (true, KvElement::Same), (true, KvElement::E4M3)] {
        let options = CudaOptions { fp8_weights, kv, ..options() };
        let Some(error) = prompt_error(&config("{}"), options) else { return };
        assert!(error <= FP8_TOLERANCE, "{error}");
        assert!(error > TOLERANCE / 20.0, "8 bits are 16 here: {error}");
    }
}

#[test]
fn a_gpu_without_8_bit_floats_refuses_them_and_computes_the_rest() {
    let Some(emulator) = Emulator::or_skip("8 bits", 5) else { return };
    let emulator = Arc::new(emulator.with_arch(gpu::Arch(80)));
    let load = |options| {
        CudaModel::load(Arc::clone(&emulator), &config("{}"), &weights(), options, Box::new(|_, _| ()))
    };
    for (fp8_weights, kv, what) in
        [(true, KvElement::Same, "fp8 weights"), (false, KvElement::E4M3, "an fp8 KV cache")]
    {
        let error = load(CudaOptions { fp8_weights, kv, ..options() }).err().unwrap().to_string();
        assert!(error.contains(what) && error.contains("compute capability 8.0; 8.9 or later"), "{error}");
    }
    let runner = load(options()).unwrap().into_runner(BLOCKS, Ways::default()).unwrap();
    let answer = answer(&mut engine(runner, BLOCKS, 64, true), request(1, &prompt(1, 20), 4));
    assert_eq!(answer.tokens.len(), 4);
}

#[test]
fn greedy_answers_are_those_of_the_cpu() {
    for change in ["{}", QWEN2, QWEN3, MISTRAL] {
        let config = config(change);
        let expected = answer(&mut engine(cpu(&config), BLOCKS, 64, true), request(1, &prompt(2, 41), 24));
        for graphs in [true, false] {
            let ways = Ways { graphs, ..Ways::default() };
            let Some(runner) = cuda(&config, options(), ways, BLOCKS) else { return };
            let found = answer(&mut engine(runner, BLOCKS, 64, true), request(1, &prompt(2, 41), 24));
            let compared = assert_agree(&found, &expected, TOLERANCE, change);
            assert!(compared >= 4, "{change}: {compared} tokens before two were too close");
        }
    }
}

/// Recorded or not, padded or not, a step gives the same bits.
#[test]
fn graphs_and_padding_change_nothing() {
    let config = config("{}");
    let answers = |graphs: bool| {
        let ways = Ways { graphs, ..Ways::default() };
        let mut engine = engine(cuda(&config, options(), ways, BLOCKS)?, BLOCKS, 64, true);
        // Five sequences are padded to six; as they end, other sizes follow.
        for id in 0..5 {
            engine.add(request(id, &prompt(id as usize, 7 + 5 * id as usize), 4 + 3 * id as u32)).unwrap();
        }
        Some(run(&mut engine))
    };
    let (Some(recorded), Some(direct)) = (answers(true), answers(false)) else { return };
    assert_eq!(recorded.len(), 5);
    assert_eq!(recorded, direct);
}

#[test]
fn a_request_is_answered_the_same_in_whatever_batch_chunk_or_cache() {
    let config = config(QWEN3);
    let fresh = |blocks, tokens, prefix_cache| {
        Some(engine(cuda(&config, options(), Ways::default(), blocks)?, blocks, tokens, prefix_cache))
    };
    let prompt_1 = prompt(1, 45);
    let Some(mut engine) = fresh(BLOCKS, 64, true) else { return };
    let alone = answer(&mut engine, request(1, &prompt_1, 20));
    assert_eq!(alone.tokens.len(), 20);
    let agree = |found: &Answer, what: &str| {
        let compared = assert_agree(found, &alone, TOLERANCE, what);
        assert!(compared >= 4, "{what}: {compared}");
    };

    // From the prefix cache of the same engine.
    agree(&answer(&mut engine, request(2, &prompt_1, 20)), "warm");
    assert!(engine.stats().prefix_hit_tokens > 0);

    let mut batched = fresh(BLOCKS, 64, true).unwrap();
    for id in 2..7 {
        batched.add(request(id, &prompt(id as usize, 10 + 6 * id as usize), 2 + 3 * id as u32)).unwrap();
    }
    batched.add(request(1, &prompt_1, 20)).unwrap();
    agree(&run(&mut batched)[&(1, 0)], "in a batch");

    agree(&answer(&mut fresh(BLOCKS, 7, true).unwrap(), request(1, &prompt_1, 20)), "in chunks of 7");

    // Two sequences of 65 tokens do not fit into seven blocks of 16.
    let mut tight = fresh(7, 64, false).unwrap();
    tight.add(request(2, &prompt(2, 45), 20)).unwrap();
    tight.add(request(1, &prompt_1, 20)).unwrap();
    let answers = run(&mut tight);
    assert!(tight.stats().preemptions > 0);
    agree(&answers[&(1, 0)], "after a preemption");
}

/// The GPU's sampler draws what the CPU's draws from the same logits; here the logits differ by rounding, so
/// that some draws may.
#[test]
fn sampled_answers_depend_on_the_seed_and_not_on_the_batch() {
    let config = config("{}");
    let sampled = |id, seed, n| {
        let sampling = SamplingParams {
            temperature: 0.9,
            top_k: Some(50),
            top_p: 0.95,
            seed,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            logit_bias: vec![(7, -2.0), (9, 3.0)],
            ..SamplingParams::greedy()
        };
        Request { n, sampling: Arc::new(sampling), ..request(id, &prompt(3, 20), 12) }
    };
    let fresh = || Some(engine(cuda(&config, options(), Ways::default(), BLOCKS)?, BLOCKS, 64, true));
    let Some(mut together) = fresh() else { return };
    together.add(sampled(1, 11, 3)).unwrap();
    together.add(sampled(2, 12, 1)).unwrap();
    together.add(sampled(3, 11, 1)).unwrap();
    let answers = run(&mut together);
    assert_eq!(answers[&(1, 0)].tokens, answers[&(3, 0)].tokens, "the same seed");
    assert_ne!(answers[&(1, 0)].tokens, answers[&(2, 0)].tokens);
    assert_ne!(answers[&(1, 0)].tokens, answers[&(1, 1)].tokens);
    let mut alone = fresh().unwrap();
    assert_eq!(answer(&mut alone, sampled(9, 11, 1)).tokens, answers[&(3, 0)].tokens);
    // The CPU's draws from nearly the same logits are nearly all the same.
    let mut cpu = engine(cpu(&config), BLOCKS, 64, true);
    cpu.add(sampled(1, 11, 3)).unwrap();
    let on_cpu = run(&mut cpu);
    let first = |answers: &BTreeMap<(u64, u32), Answer>| {
        (0..3).map(|choice| answers[&(1, choice)].tokens[0]).collect::<Vec<_>>()
    };
    let same = first(&on_cpu).iter().zip(first(&answers)).filter(|(a, b)| **a == *b).count();
    assert!(same >= 2, "{:?} {:?}", first(&on_cpu), first(&answers));
}

#[test]
fn a_step_that_points_outside_is_refused_and_the_runner_goes_on() {
    let config = config("{}");
    let Some(mut cuda) = cuda(&config, options(), Ways::default(), BLOCKS) else { return };
    let good = prompt_step(&prompt(1, 5));
    let before = cuda.run(&good).unwrap();
    type Change = fn(&mut Step);
    let changes: [Change; 7] = [
        |s| s.tokens[1] = VOCABULARY as u32,
        |s| s.slots[2] = (BLOCKS * 16) as u32,
        |s| s.blocks[0].0 = BLOCKS as u32,
        |s| s.rows[0].row = 5,
        |s| s.sequences[0].context_len = 17,
        |s| s.from_last.push(servelab_engine::FromLast { token: 0, answer: 5 }),
        |s| s.copies.push((BlockId(0), BlockId(BLOCKS as u32))),
    ];
    for change in changes {
        let mut step = good.clone();
        change(&mut step);
        assert!(cuda.run(&step).is_err());
        assert_eq!(cuda.run(&good).unwrap(), before);
    }
    let mut empty = good.clone();
    empty.tokens.clear();
    empty.positions.clear();
    empty.slots.clear();
    empty.sequences.clear();
    empty.rows.clear();
    assert_eq!(cuda.run(&empty).unwrap().rows.len(), 0);
}

/// Sizes that are tried at the start, and the pool that is planned from what they left.
#[test]
fn the_pool_is_planned_from_what_a_trial_leaves_free() {
    let config = config("{}");
    let Some(emulator) = Emulator::or_skip("the memory plan", 5) else { return };
    let ways = Ways::default();
    let emulator = Arc::new(emulator);
    let (told, heard) = std::sync::mpsc::channel();
    let progress = Box::new(move |done, total| told.send((done, total)).unwrap());
    let mut model = CudaModel::load(Arc::clone(&emulator), &config, &weights(), options(), progress).unwrap();
    let told: Vec<(u64, u64)> = heard.iter().collect();
    assert!(told.is_sorted() && told.len() == 2 + 4 * 2, "{told:?}");
    // Norms do not count.
    let (done, total) = told[told.len() - 1];
    assert!(done < total && done as f64 > 0.99 * total as f64, "{told:?}");
    let before = gpu::Gpu::free_bytes(&*emulator).unwrap();
    model.try_all_sizes(ways).unwrap();
    assert_eq!(gpu::Gpu::free_bytes(&*emulator).unwrap(), before, "the trial's pool is gone");
    let demand = model.pool_demand(0.02, ways).unwrap();
    let plan = demand.plan().unwrap();
    assert!(model.pool_demand(0.0001, ways).unwrap().plan().is_err());
    let runner = model.into_runner(plan.blocks as usize, ways).unwrap();
    assert_eq!(runner.pool_bytes(), plan.pool_bytes);
    assert_eq!(runner.time(), GpuTime::default(), "the trial does not count");
    let taken = demand.total_bytes - gpu::Gpu::free_bytes(&*emulator).unwrap();
    assert!(taken as f64 <= 0.02 * demand.total_bytes as f64 + 1.0, "{taken} bytes are taken");
    // And not far below it: a block more would not have fitted, but for the words of a step.
    assert!(taken as f64 >= 0.019 * demand.total_bytes as f64, "{taken} bytes are taken");
    let mut engine = engine(runner, plan.blocks as usize, 64, true);
    assert_eq!(answer(&mut engine, request(1, &prompt(1, 20), 5)).tokens.len(), 5);
    let time = engine.runner().time();
    assert!(time.steps >= 5 && time.busy_seconds > 0.0 && time.idle_seconds >= 0.0, "{time:?}");
}

/// Whatever the bounds are: here one sequence, which is shorter than the steps that a larger model is tried with.
#[test]
fn bounds_that_no_step_reaches_are_not_tried() {
    let Some(emulator) = Emulator::or_skip("the trial of small bounds", 5) else { return };
    let options = CudaOptions { max_batched_tokens: 2048, max_sequences: 1, max_model_len: 40, ..options() };
    let model = CudaModel::load(Arc::new(emulator), &config("{}"), &weights(), options, Box::new(|_, _| ()));
    model.unwrap().try_all_sizes(Ways::default()).unwrap();
}

/// All that `servelab doctor` does with a GPU, in small.
#[test]
fn the_doctor_finds_nothing_wrong() {
    let Some(emulator) = Emulator::or_skip("the doctor", 3) else { return };
    let emulator = Arc::new(emulator);
    let mut findings = Vec::new();
    examine(&emulator, Effort::SMALL, &mut |finding| findings.push(finding));
    let faults: Vec<String> = findings.iter().filter_map(Finding::fault).collect();
    assert!(faults.is_empty(), "{faults:#?}");
    let Finding::Limits(limits) = &findings[0] else { panic!("{findings:?}") };
    assert!(limits.copy_bytes_per_second.is_normal() && limits.bf16_flops_per_second.is_normal());
    let kernels: BTreeSet<&str> = findings.iter().filter_map(checked_kernel).collect();
    let entries = kernels::FILES.iter().flat_map(|file| file.entries).map(|entry| entry.name);
    assert!(entries.clone().all(|entry| kernels.contains(entry)), "{kernels:?}");
    let models: Vec<_> = findings.iter().filter_map(compared_model).collect();
    assert_eq!(models.iter().map(|(numbers, _)| *numbers).collect::<Vec<_>>(), Numbers::ALL);
    for (numbers, comparison) in models {
        assert!(
            comparison.logprob_error > 0.0 && comparison.output_tokens == 6,
            "{numbers:?} {comparison:?}"
        );
    }
}

fn lost() -> gpu::GpuError {
    gpu::GpuError::Lost { operation: "decode_attention".to_owned(), reason: "illegal address".to_owned() }
}

fn checked_kernel(finding: &Finding) -> Option<&'static str> {
    match finding {
        Finding::Check(check) => Some(check.kernel),
        _ => None,
    }
}

fn compared_model(finding: &Finding) -> Option<(Numbers, Comparison)> {
    match finding {
        Finding::Model(numbers, comparison) => Some((*numbers, *comparison)),
        _ => None,
    }
}

/// A kernel file that does wrong is found, and so is a GPU that is lost on the way.
#[test]
fn the_doctor_says_what_failed() {
    let Some(emulator) = Emulator::or_skip("the doctor", 3) else { return };
    let emulator = Arc::new(emulator);
    emulator.fail_after(40, lost());
    let mut faults = Vec::new();
    examine(&emulator, Effort::SMALL, &mut |finding| faults.extend(finding.fault()));
    assert!(faults[0].contains("the checks of the kernels ended early"), "{faults:#?}");
    assert!(faults.iter().all(|fault| fault.contains("the process has to be restarted")), "{faults:#?}");
    assert_eq!(faults.len(), 1 + Numbers::ALL.len());
}

/// What becomes of requests when the GPU fails under them.
mod failures {
    use super::*;

    /// An engine with two requests of which each has given a token.
    fn running(ways: Ways) -> Option<(Engine<CudaRunner<Emulator>>, Arc<Emulator>)> {
        let emulator = Arc::new(Emulator::or_skip("failures", 4)?);
        let load = |gpu| CudaModel::load(gpu, &config("{}"), &weights(), options(), Box::new(|_, _| ()));
        let runner = load(Arc::clone(&emulator)).unwrap().into_runner(BLOCKS, ways).unwrap();
        let mut engine = engine(runner, BLOCKS, 64, true);
        for id in 0..2 {
            engine.add(request(id, &prompt(id as usize, 20), 30)).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(engine.step(Duration::ZERO).error, None);
        }
        Some((engine, emulator))
    }

    /// How every request ended, and whether the engine said that its device is lost.
    fn ends(engine: &mut Engine<CudaRunner<Emulator>>) -> (Vec<String>, bool) {
        let (mut ends, mut fatal) = (Vec::new(), false);
        while engine.has_work() {
            let report = engine.step(Duration::ZERO);
            fatal |= report.fatal.is_some();
            engine.check_integrity().unwrap();
            for event in report.events {
                if let Event::Finished { reason, .. } = event {
                    ends.push(format!("{reason:?}"));
                }
            }
        }
        (ends, fatal)
    }

    #[test]
    fn a_sticky_error_ends_all_requests_and_is_fatal() {
        for overlap in [true, false] {
            let Some((mut engine, emulator)) = running(Ways { overlap, ..Ways::default() }) else { return };
            emulator.fail_after(7, lost());
            let (ends, fatal) = ends(&mut engine);
            assert!(fatal && ends.len() == 2, "{ends:?}");
            let told =
                "the GPU failed during decode_attention: illegal address; the process has to be restarted";
            assert!(ends.iter().all(|end| end.contains(told)), "{ends:?}");
            assert_eq!(engine.stats().blocks_held, 0);
        }
    }

    #[test]
    fn a_refused_launch_ends_the_requests_of_its_step_and_no_others() {
        for (graphs, overlap) in [(true, true), (true, false), (false, true), (false, false)] {
            let Some((mut engine, emulator)) = running(Ways { graphs, overlap }) else { return };
            let refused =
                gpu::GpuError::Refused { what: "silu_mul".into(), reason: "out of resources".into() };
            emulator.fail_after(7, refused);
            let (ends, fatal) = ends(&mut engine);
            assert!(!fatal && ends.len() == 2, "{ends:?}");
            assert!(
                ends.iter().all(|end| end.contains("silu_mul was refused: out of resources")),
                "{ends:?}"
            );
            assert_eq!(engine.stats().blocks_held, 0);
            // The next one is served as if nothing had been.
            let after = answer(&mut engine, request(9, &prompt(2, 41), 6));
            let mut alone = super::engine(
                cuda(&config("{}"), options(), Ways::default(), BLOCKS).unwrap(),
                BLOCKS,
                64,
                true,
            );
            assert_agree(
                &after,
                &answer(&mut alone, request(9, &prompt(2, 41), 6)),
                TOLERANCE,
                "after a failure",
            );
        }
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_numbers_and_leaves_no_memory_behind() {
        let Some(emulator) = Emulator::or_skip("out of memory", 4) else { return };
        let emulator = Arc::new(emulator);
        let before = gpu::Gpu::free_bytes(&*emulator).unwrap();
        let model =
            CudaModel::load(Arc::clone(&emulator), &config("{}"), &weights(), options(), Box::new(|_, _| ()))
                .unwrap();
        let error = model.into_runner(1 << 20, Ways::default()).err().unwrap().to_string();
        assert!(error.contains("the GPU has no room for") && error.contains("are free; lower"), "{error}");
        assert_eq!(gpu::Gpu::free_bytes(&*emulator).unwrap(), before);
    }
}

/// The CPU's side of it.
#[test]
fn the_cpu_answers_as_candle_does() {
    let sizes = CompareSizes { output_tokens: 16, ..CompareSizes::FULL };
    let comparison = compare_cpu(sizes, 2).unwrap();
    assert!(comparison.passed() && comparison.output_tokens == 16, "{comparison:?}");
    assert!(comparison.logprob_error > 0.0, "the two are computed in different orders");
}

/// With a step under way while the next is prepared, and without.
#[test]
fn overlap_changes_nothing() {
    let config = config("{}");
    let answers = |overlap: bool| {
        let ways = Ways { overlap, ..Ways::default() };
        let mut engine = engine(cuda(&config, options(), ways, BLOCKS)?, BLOCKS, 64, true);
        for id in 0..4 {
            let mut request = request(id, &prompt(id as usize, 9 + 8 * id as usize), 12);
            // Some end early, which the steps under way do not know.
            request.stop.stop_token_ids = (0..VOCABULARY as u32).filter(|token| token % 3 == 0).collect();
            request.stop.min_tokens = id as u32;
            engine.add(request).unwrap();
        }
        Some(run(&mut engine))
    };
    let (Some(overlapped), Some(plain)) = (answers(true), answers(false)) else { return };
    assert!(overlapped.values().any(|answer| matches!(answer.finish, Some(FinishReason::Stop(_)))));
    for (id, answer) in &plain {
        assert_agree(&overlapped[id], answer, TOLERANCE, "overlapped");
    }
}
