//! The same numbers as Hugging Face transformers, and the same answer however a request is computed.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]

mod common;

use common::*;
use servelab_engine::{BlockId, EngineConfig, FinishReason, ModelRunner, RunnerError, SamplingParams, Step};
use servelab_model::{EngineKind, KvDtype, ModelError, RunnerOptions, WeightDtype};

const F32: Option<WeightDtype> = Some(WeightDtype::F32);

/// What candle-transformers does not compute as the checkpoint means it, and so has to be refused.
const NOT_NAIVE: &[(&str, &str)] = &[
    ("llama-mqa-head-dim", "head_dim"),
    ("llama-bias", "attention_bias"),
    ("llama-old-config", "linear"),
    ("llama-rope-linear", "linear"),
    ("llama-rope-yarn", "yarn"),
    ("qwen3-rope-yarn-mscale", "yarn"),
    ("mistral-window", "sliding window"),
    ("qwen2-window", "sliding window"),
];

fn check_against_transformers(name: &str, kind: EngineKind) {
    let options = runner_options(kind);
    let expected = expected(name);
    let mut model = load(name, F32, &options).unwrap();
    let step = prompt_step(&expected.prompt, score_all(&expected.prompt));
    let output = model.runner.run(&step).unwrap();
    for (row, (found, logits)) in output.rows.iter().zip(&expected.prompt_logits).enumerate() {
        assert_close(found.logprobs.as_ref().unwrap(), logits, &format!("{name}, prompt row {row}"));
    }
    let mut engine = engine(model, engine_config(&options));
    let answer = answer(&mut engine, request(1, &expected.prompt, 32));
    assert_eq!(answer.tokens, expected.greedy_tokens, "{name}");
    assert_eq!(answer.finish, Some(FinishReason::Length));
    for (row, (found, logits)) in answer.logprobs.iter().zip(&expected.greedy_logits).enumerate() {
        assert_close(found, logits, &format!("{name}, greedy row {row}"));
    }
}

#[test]
fn the_paged_engine_computes_what_transformers_computes() {
    for name in fixtures() {
        check_against_transformers(&name, EngineKind::Paged);
    }
}

#[test]
fn the_naive_engine_computes_it_too_or_says_why_not() {
    for name in fixtures() {
        match NOT_NAIVE.iter().find(|(refused, _)| *refused == name) {
            None => check_against_transformers(&name, EngineKind::Naive),
            Some((_, why)) => match load(&name, F32, &runner_options(EngineKind::Naive)).map(|_| ()) {
                Err(ModelError::NaiveUnsupported { feature }) => assert!(feature.contains(why), "{feature}"),
                other => panic!("{name}: {other:?}"),
            },
        }
    }
}

/// Answers must be equal to the bit, log-probabilities included, so the format that the fixtures are
/// stored in is used, and with it the fastest kernels of this machine.
fn same_answers(name: &str, kv_dtype: KvDtype) {
    let options = RunnerOptions { kv_dtype, ..runner_options(EngineKind::Paged) };
    let prompt = expected(name).prompt;
    let fresh = |options: &RunnerOptions| engine(load(name, None, options).unwrap(), engine_config(options));
    let alone = answer(&mut fresh(&options), request(1, &prompt, 32));
    assert_eq!(alone.tokens.len(), 32);

    // In a batch of 16 of different lengths that join and leave.
    let mut batched = fresh(&options);
    batched.add(request(1, &prompt, 32)).unwrap();
    for other in 2..=16 {
        let start = other as usize * 3 % 40;
        batched.add(request(other, &prompt[start..], 5 + 2 * other as u32)).unwrap();
    }
    let answers = run(&mut batched);
    assert_eq!(answers.len(), 16);
    assert_eq!(answers[&(1, 0)], alone, "{name}: in a batch");

    // In chunks of 7 tokens.
    let chunks = RunnerOptions { max_batched_tokens: 7, ..options.clone() };
    let config = EngineConfig { max_running: 2, ..engine_config(&chunks) };
    let mut chunked = engine(load(name, None, &chunks).unwrap(), config);
    assert_eq!(answer(&mut chunked, request(1, &prompt, 32)), alone, "{name}: in chunks of 7");

    // With a warm prefix cache.
    let mut warm = fresh(&options);
    answer(&mut warm, request(1, &prompt, 32));
    assert_eq!(warm.stats().prefix_hit_tokens, 0);
    assert_eq!(answer(&mut warm, request(2, &prompt, 32)), alone, "{name}: from the prefix cache");
    assert!(warm.stats().prefix_hit_tokens > 0);

    // After a preemption: two sequences of 96 tokens do not fit into nine blocks of 16.
    let small = RunnerOptions { num_blocks: 9, ..options };
    for prefix_cache in [false, true] {
        let config = EngineConfig { prefix_cache, ..engine_config(&small) };
        let mut tight = engine(load(name, None, &small).unwrap(), config);
        let mut other = prompt.clone();
        other.reverse();
        tight.add(request(2, &other, 32)).unwrap();
        tight.add(request(1, &prompt, 32)).unwrap();
        let answers = run(&mut tight);
        assert!(tight.stats().preemptions > 0);
        assert_eq!(answers[&(1, 0)], alone, "{name}: after a preemption");
    }
}

#[test]
fn a_request_is_answered_the_same_in_whatever_batch_chunk_or_cache() {
    for name in ["llama", "llama-f32", "llama-f16", "mistral-window", "qwen3"] {
        same_answers(name, KvDtype::F32);
    }
    same_answers("qwen2-window", KvDtype::BF16);
}

#[test]
fn forked_choices_share_the_prompt_and_go_their_own_ways() {
    let options = runner_options(EngineKind::Paged);
    let prompt = &expected("llama").prompt[..41];
    let sampled = |id, n| {
        let mut request = request(id, prompt, 24);
        request.n = n;
        let sampling = SamplingParams { temperature: 1.5, seed: 77, ..(*request.sampling).clone() };
        request.sampling = sampling.into();
        request
    };
    let mut together = engine(load("llama", None, &options).unwrap(), engine_config(&options));
    together.add(sampled(1, 4)).unwrap();
    let choices = run(&mut together);
    assert_eq!(choices.len(), 4);
    assert_ne!(choices[&(1, 0)].tokens, choices[&(1, 1)].tokens);
    // The first choice alone is the first choice of four: the draw depends on seed and choice only.
    let mut alone = engine(load("llama", None, &options).unwrap(), engine_config(&options));
    assert_eq!(answer(&mut alone, sampled(9, 1)), choices[&(1, 0)]);
}

#[test]
fn prompt_logprobs_are_those_of_the_prompt_tokens() {
    for kind in [EngineKind::Paged, EngineKind::Naive] {
        let options = runner_options(kind);
        let expected = expected("llama-tied");
        let mut engine = engine(load("llama-tied", F32, &options).unwrap(), engine_config(&options));
        let mut request = request(1, &expected.prompt, 1);
        let sampling = SamplingParams { prompt_logprobs: Some(3), ..(*request.sampling).clone() };
        request.sampling = sampling.into();
        let logprobs = answer(&mut engine, request).prompt_logprobs;
        assert_eq!(logprobs.len(), expected.prompt.len());
        assert_eq!(logprobs[0], None);
        for (position, found) in logprobs.iter().enumerate().skip(1) {
            let (found, logits) = (found.as_ref().unwrap(), &expected.prompt_logits[position - 1]);
            let target = logits[expected.prompt[position] as usize];
            let normaliser = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
            assert!((f64::from(found.logprob) - (f64::from(target) - normaliser)).abs() < 1e-3);
            assert_eq!(found.rank as usize, 1 + logits.iter().filter(|x| **x > target).count());
            assert_eq!(found.top.len(), 3);
        }
    }
}

#[test]
fn a_step_that_points_outside_is_refused_and_the_runner_goes_on() {
    let mut model = load("llama", F32, &runner_options(EngineKind::Paged)).unwrap();
    let prompt = [5, 6, 7];
    let good = prompt_step(&prompt, score_all(&prompt));
    let before = model.runner.run(&good).unwrap();
    let mut broken = Vec::new();
    let changes: [fn(&mut Step); 10] = [
        |s| s.tokens[1] = 96,
        |s| s.slots[2] = 256 * 16,
        |s| s.blocks[0].0 = 256,
        |s| s.rows[0].row = 3,
        |s| s.positions[2] = 3,
        |s| s.sequences[0].context_len = 17,
        |s| s.sequences[0].blocks = 0..9,
        |s| s.sequences[0].tokens = 1..4,
        |s| s.copies.push((BlockId(0), BlockId(256))),
        |s| {
            s.slots.pop();
        },
    ];
    for change in changes {
        let mut step = good.clone();
        change(&mut step);
        broken.push(step);
    }
    broken.push(prompt_step(&[1; 257], Vec::new()));
    for step in broken {
        assert!(matches!(model.runner.run(&step), Err(RunnerError::Step(_))), "{step:?}");
    }
    assert_eq!(model.runner.run(&good).unwrap(), before);
}
