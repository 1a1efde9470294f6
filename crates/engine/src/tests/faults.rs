//! One named test for each fault that was seen in another engine and concerns the scheduler.

use std::sync::Arc;

use super::harness::*;
use crate::block_hash::weakened;
use crate::{
    AdmissionError, EngineConfig, Event, FinishReason, Request, RequestId, RunnerError, SamplingParams,
    StopConditions,
};

/// vllm#39734: a request within the context but larger than the pool blocked the queue forever.
#[test]
fn a_request_larger_than_the_pool_is_refused_at_once() {
    let mut checked = Checked::new(config(4));
    // 16 slots: 10 + 7 - 1 tokens fit, the last one generated needs no slot.
    checked.add(request(1, &prompt(1, 10), 7)).unwrap();
    let refused = checked.add(request(2, &prompt(1, 10), 8));
    assert_eq!(refused, Err(AdmissionError::NeverFits { needed: 5, num_blocks: 4 }));
    checked.finish(20);
    checked.check_answers();
}

/// The same for several choices, which share the full blocks of the prompt and nothing else.
#[test]
fn choices_that_never_fit_together_are_refused() {
    let mut checked = Checked::new(config(7));
    // 2 shared blocks, and each choice 2 of its own: the rest of the prompt and the output.
    let refused = checked.add(choices(1, &prompt(1, 10), 7, 3));
    assert_eq!(refused, Err(AdmissionError::NeverFits { needed: 8, num_blocks: 7 }));
    checked.add(choices(2, &prompt(1, 10), 7, 2)).unwrap();
    checked.finish(40);
    checked.check_answers();
}

/// nano-vllm#114: a full prefix hit, or a prompt of exactly one block, gave a step without tokens.
#[test]
fn a_full_prefix_hit_still_computes_a_token() {
    for len in [1, 3, 4, 5, 8, 12] {
        let mut checked = Checked::new(config(8));
        for id in 0..3 {
            checked.add(request(id, &prompt(1, len), 4)).unwrap();
            checked.finish(20);
        }
        checked.check_answers();
        let hit = (len - 1) / 4 * 4;
        assert_eq!(checked.outcome(0).cached_tokens, [0]);
        assert_eq!(checked.outcome(2).cached_tokens, [hit]);
        assert_eq!(checked.engine.stats().prefix_hit_tokens, 2 * u64::from(hit));
        assert_eq!(checked.engine.stats().prefix_query_tokens, 3 * u64::from(len));
    }
}

/// pegainfer#85, mistral.rs#1470: the engine hung under KV pressure.
#[test]
fn pressure_on_the_pool_never_hangs() {
    for num_blocks in 6..12 {
        let mut checked = Checked::new(EngineConfig { prefix_cache: false, ..config(num_blocks) });
        for id in 0..8 {
            checked.add(request(id, &prompt(id as u32, 8), 16)).unwrap();
        }
        checked.finish(8 * 24);
        checked.check_answers();
        assert!(checked.engine.stats().preemptions > 0);
    }
}

/// llama.cpp#24496: generation went on after the client had gone.
#[test]
fn an_abort_frees_the_blocks_at_once() {
    let mut checked = Checked::new(config(16));
    checked.add(choices(1, &prompt(1, 9), 10, 3)).unwrap();
    checked.step();
    checked.step();
    assert_eq!(checked.engine.stats().running, 3);
    assert!(checked.engine.abort(RequestId(1)));
    let stats = checked.engine.stats();
    assert_eq!((stats.running, stats.blocks_held), (0, 0));
    assert_eq!(checked.add(request(1, &[1], 1)), Err(AdmissionError::DuplicateId(RequestId(1))));
    let ran = checked.engine.runner().steps();
    let report = checked.step();
    let ends = report.events.iter().map(|event| match event {
        Event::Finished { choice, reason: FinishReason::Abort, .. } => *choice,
        other => panic!("{other:?}"),
    });
    assert_eq!(ends.collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(checked.engine.runner().steps(), ran, "nothing was left to compute");
    assert!(!checked.engine.has_work());
    checked.add(request(1, &[1], 1)).unwrap();
}

/// xinfer PR 405: a short hash without a look at the tokens reused another prompt's blocks.
#[test]
fn colliding_hashes_never_share_blocks() {
    weakened::to_bits(1, || {
        let mut checked = Checked::new(config(32));
        for id in 0..12 {
            // Prompts in pairs that share one block or two.
            let mut tokens = prompt(id as u32 / 4, 4);
            tokens.extend(prompt(50 + id as u32 / 2, 7));
            checked.add(request(id, &tokens, 3)).unwrap();
            checked.finish(20);
        }
        checked.check_answers();
    });
}

/// mistral.rs#2250: of several preempted requests the newest was served first.
#[test]
fn preempted_requests_return_in_order_of_arrival() {
    let mut checked = Checked::new(EngineConfig { prefix_cache: false, ..config(9) });
    for id in 0..4 {
        checked.add(request(id, &prompt(id as u32, 4), 28)).unwrap();
    }
    let (mut preempted, mut scheduled) = (Vec::new(), Vec::new());
    while checked.engine.has_work() {
        for event in checked.step().events {
            match event {
                Event::Preempted { request, .. } => preempted.push(request.0),
                Event::Scheduled { request, .. } => scheduled.push(request.0),
                _ => {}
            }
        }
        let waiting: Vec<_> = checked.engine.snapshot().waiting.iter().map(|s| s.request.0).collect();
        assert!(waiting.is_sorted(), "{waiting:?}");
    }
    checked.check_answers();
    assert_eq!(preempted[..2], [3, 2], "the last in goes out first");
    assert_eq!(scheduled[..4], [0, 1, 2, 3]);
    assert!(scheduled[4..].is_sorted(), "{scheduled:?}");
}

/// mini-sglang: over-long requests vanished without a reply.
#[test]
fn an_over_long_request_gets_a_typed_refusal() {
    let mut checked = Checked::new(config(64));
    let error = checked.add(request(1, &prompt(1, 60), 5)).unwrap_err();
    assert_eq!(error, AdmissionError::ContextLength { prompt: 60, max_tokens: 5, max_model_len: 64 });
    assert_eq!(
        error.to_string(),
        "max_tokens 5 + prompt 60 exceeds the context length 64; lower max_tokens to 4 or less"
    );
    let error = checked.add(request(1, &prompt(1, 64), u32::MAX)).unwrap_err();
    assert!(error.to_string().ends_with("shorten the prompt to 63 tokens or less"), "{error}");
    assert_eq!(checked.add(request(1, &[], 5)), Err(AdmissionError::EmptyPrompt));
    let none = Request { n: 0, ..request(1, &[1], 5) };
    assert_eq!(checked.add(none), Err(AdmissionError::Zero { field: "n" }));
    assert_eq!(checked.add(request(1, &[1], 0)), Err(AdmissionError::Zero { field: "max_tokens" }));
    let many = choices(1, &[1], 5, 9);
    assert_eq!(checked.add(many), Err(AdmissionError::TooManyChoices { n: 9, max_running: 8 }));
    assert!(!checked.engine.has_work());
}

/// candle-vllm, mistral.rs: `n`, `seed`, penalties and the ban on early stops were taken and ignored.
#[test]
fn what_the_sampler_needs_reaches_it() {
    let sampling =
        SamplingParams { temperature: 1.0, seed: 5, repetition_penalty: 1.2, ..SamplingParams::greedy() };
    let all: Arc<[u32]> = (0..VOCAB - 1).collect();
    let base = Request {
        n: 3,
        sampling: Arc::new(sampling),
        stop: StopConditions { max_tokens: 8, min_tokens: 4, stop_token_ids: all },
        ..request(1, &prompt(1, 6), 8)
    };
    let mut checked = Checked::new(config(32));
    checked.add(base).unwrap();
    checked.finish(20);
    checked.check_answers();
    for choice in 0..3 {
        // Every token but the last of the vocabulary stops, so the first four can only be that one.
        assert_eq!(checked.outcome(1).tokens[&choice][..4], [VOCAB - 1; 4]);
    }
}

/// TGI#3241: requests that wait must not keep the engine from serving, nor be lost when it is full.
#[test]
fn a_full_queue_refuses_and_goes_on() {
    let mut checked = Checked::new(EngineConfig { max_waiting: 2, max_running: 1, ..config(16) });
    checked.add(request(1, &prompt(1, 4), 3)).unwrap();
    checked.add(request(2, &prompt(2, 4), 3)).unwrap();
    assert_eq!(checked.add(request(3, &prompt(3, 4), 3)), Err(AdmissionError::QueueFull { max_waiting: 2 }));
    checked.step();
    checked.add(request(3, &prompt(3, 4), 3)).unwrap();
    checked.finish(20);
    checked.check_answers();
}

/// xinfer PR 405: a transient error of one step ended the process.
#[test]
fn a_failed_step_ends_its_requests_and_nothing_else() {
    let mut checked = Checked::new(EngineConfig { max_running: 2, ..config(16) });
    for id in 0..3 {
        checked.add(request(id, &prompt(1, 9), 6)).unwrap();
    }
    checked.step();
    checked.engine.runner_mut().fail(0, RunnerError::Step("out of memory".into()));
    let report = checked.step();
    assert_eq!(report.error, Some(RunnerError::Step("out of memory".into())));
    assert_eq!(report.fatal, None);
    checked.finish(30);
    checked.check_answers();
    let error = FinishReason::Error("out of memory".into());
    assert_eq!(checked.outcome(0).finished[&0], error);
    assert_eq!(checked.outcome(1).finished[&0], error);
    assert_eq!(checked.outcome(2).finished[&0], FinishReason::Length);
}

/// A failed step leaves garbage in its slots, and nobody may find it in the cache.
#[test]
fn a_failed_step_publishes_nothing() {
    let mut checked = Checked::new(config(16));
    checked.engine.runner_mut().fail(0, RunnerError::Step("out of memory".into()));
    checked.add(request(1, &prompt(1, 12), 3)).unwrap();
    checked.finish(2);
    assert_eq!(checked.engine.stats().blocks_cached, 0);
    checked.add(request(2, &prompt(1, 12), 3)).unwrap();
    checked.finish(20);
    assert_eq!(checked.outcome(2).cached_tokens, [0]);
    checked.check_answers();
}

#[test]
fn a_lost_device_ends_everything() {
    let mut checked = Checked::new(EngineConfig { max_running: 1, ..config(16) });
    for id in 0..3 {
        checked.add(request(id, &prompt(1, 9), 6)).unwrap();
    }
    checked.step();
    checked.engine.runner_mut().fail(0, RunnerError::Fatal("device lost".into()));
    let report = checked.step();
    assert_eq!(report.fatal, Some(RunnerError::Fatal("device lost".into())));
    assert!(!checked.engine.has_work());
    assert_eq!(checked.engine.stats().blocks_cached, 0, "its memory is gone");
    for id in 0..3 {
        assert_eq!(checked.outcome(id).finished[&0], FinishReason::Error("device lost".into()));
    }
}

/// A runner that answers too few rows must not take the engine down with it.
#[test]
fn a_runner_that_answers_nonsense_is_an_error() {
    struct Mute;
    impl crate::ModelRunner for Mute {
        fn run(&mut self, _: &crate::Step) -> Result<crate::StepOutput, RunnerError> {
            Ok(crate::StepOutput::default())
        }
    }
    let mut engine = crate::Engine::new(config(8), Mute).unwrap();
    engine.add(request(1, &[1, 2], 2)).unwrap();
    let report = engine.step(std::time::Duration::ZERO);
    assert_eq!(report.error, Some(RunnerError::Step("the runner answered 0 rows of 1".into())));
    assert!(!engine.has_work());
    engine.check_integrity().unwrap();
}
