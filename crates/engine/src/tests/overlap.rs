//! Steps planned while the one before is under way. The fuzz tests run all workloads in both ways; here stands what is
//! particular to two steps at once.

use std::sync::Arc;

use super::harness::*;
use crate::{Event, FinishReason, Request, RequestId, RunnerError, SamplingParams, StopConditions};

fn overlapped() -> Checked {
    Checked::taking(2, config(32))
}

fn tokens(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Token { .. })).count()
}

#[test]
fn a_token_is_computed_before_anybody_knows_it() {
    let mut checked = overlapped();
    checked.add(request(1, &prompt(1, 6), 4)).unwrap();
    // The first call submits the prompt and the step after it, and waits for the prompt.
    let report = checked.step();
    assert_eq!((report.prefill_tokens, report.decode_tokens, tokens(&report.events)), (6, 0, 1));
    for _ in 0..3 {
        let report = checked.step();
        assert_eq!((report.decode_tokens, tokens(&report.events)), (1, 1));
    }
    // That the fourth token is the last was known, so nothing was computed in vain.
    assert!(!checked.engine.has_work());
    assert_eq!(checked.engine.runner().steps(), 4);
    checked.check_answers();
}

#[test]
fn a_stop_token_costs_one_row() {
    let mut checked = overlapped();
    let stop = StopConditions { max_tokens: 9, min_tokens: 0, stop_token_ids: Arc::new([7]) };
    checked.engine.runner_mut().force(1, 7);
    checked.add(Request { stop, ..request(1, &prompt(1, 6), 9) }).unwrap();
    checked.add(request(2, &prompt(2, 6), 5)).unwrap();
    checked.finish(20);
    checked.check_answers();
    assert_eq!(checked.outcome(1).finished[&0], FinishReason::Stop(Some(7)));
    let computed: u32 = checked.trace.iter().map(|trace| trace.decode_tokens).sum();
    // The first request decodes one token that was wanted and one that was not, the second four.
    assert_eq!(computed, 1 + 1 + 4);
}

#[test]
fn penalties_wait_for_the_token_that_they_look_at() {
    let mut checked = overlapped();
    let sampling = SamplingParams { repetition_penalty: 1.3, ..SamplingParams::greedy() };
    checked.add(Request { sampling: Arc::new(sampling), ..request(1, &prompt(1, 6), 5) }).unwrap();
    checked.add(request(2, &prompt(2, 6), 5)).unwrap();
    checked.finish(30);
    checked.check_answers();
    assert_eq!(checked.outcome(1).tokens[&0].len(), 5);
}

#[test]
fn choices_fork_when_their_prompt_is_known_to_be_computed() {
    let mut checked = overlapped();
    checked.add(choices(1, &prompt(1, 7), 6, 3)).unwrap();
    checked.finish(20);
    checked.check_answers();
    let [a, b, c] = [0, 1, 2].map(|choice| &checked.outcome(1).tokens[&choice]);
    assert!(a != b && b != c);
}

/// A stop string and an abort between two steps, with a step under way that computes for both.
#[test]
fn what_is_under_way_for_the_ended_is_dropped() {
    let mut checked = overlapped();
    for id in 1..4 {
        checked.add(request(id, &prompt(id as u32, 6), 12)).unwrap();
    }
    checked.step();
    checked.step();
    assert!(checked.engine.finish_choice(RequestId(1), 0));
    assert!(checked.engine.abort(RequestId(2)));
    checked.check();
    let report = checked.step();
    assert_eq!(report.decode_tokens, 3, "the step was under way for all");
    assert_eq!(tokens(&report.events), 1, "two of its answers were dropped");
    checked.finish(20);
    checked.check_answers();
    assert_eq!(checked.outcome(1).finished[&0], FinishReason::Stop(None));
    assert_eq!(checked.outcome(2).finished[&0], FinishReason::Abort);
    assert_eq!(checked.outcome(3).finished[&0], FinishReason::Length);
}

/// Nothing waits or runs any more, and a step is still under way: it is collected, and its blocks are free already.
#[test]
fn a_step_for_nobody_is_collected() {
    let mut checked = overlapped();
    checked.add(request(1, &prompt(1, 6), 12)).unwrap();
    checked.step();
    assert!(checked.engine.abort(RequestId(1)));
    assert_eq!(checked.engine.stats().blocks_held, 0);
    checked.finish(2);
    assert_eq!(checked.engine.runner().steps(), 2);
    checked.add(request(1, &prompt(1, 6), 3)).unwrap();
    checked.finish(10);
    assert_eq!(checked.outcome(1).finished[&0], FinishReason::Length);
}

/// Blocks that a failed step filled are found by nobody, although the step after it was under way.
#[test]
fn a_failed_step_ends_its_requests_and_not_those_of_the_next() {
    for number in 0..2 {
        let mut checked = overlapped();
        checked.engine.runner_mut().fail(number, RunnerError::Step("out of memory".into()));
        checked.add(request(1, &prompt(1, 14), 3)).unwrap();
        checked.add(request(2, &prompt(2, 14), 3)).unwrap();
        checked.finish(20);
        checked.check_answers();
        let ends: Vec<_> = (1..3).map(|id| checked.outcome(id).finished[&0].clone()).collect();
        assert!(ends.contains(&FinishReason::Error("out of memory".into())), "{ends:?}");
        checked.add(request(3, &prompt(1, 14), 3)).unwrap();
        checked.finish(20);
        checked.check_answers();
    }
}

#[test]
fn a_lost_device_ends_what_is_under_way() {
    for number in 0..4 {
        let mut checked = overlapped();
        for id in 0..4 {
            checked.add(request(id, &prompt(id as u32, 9), 6)).unwrap();
        }
        checked.engine.runner_mut().fail(number, RunnerError::Fatal("device lost".into()));
        while checked.engine.has_work() {
            let report = checked.step();
            assert_eq!(report.fatal.is_some(), !checked.engine.has_work());
        }
        for id in 0..4 {
            assert_eq!(checked.outcome(id).finished[&0], FinishReason::Error("device lost".into()));
        }
        assert_eq!(checked.engine.stats().blocks_cached, 0);
    }
}

#[test]
fn a_preempted_sequence_takes_nothing_of_the_step_that_was_under_way() {
    for num_blocks in 7..12 {
        let mut checked =
            Checked::taking(2, crate::EngineConfig { prefix_cache: false, ..config(num_blocks) });
        for id in 0..4 {
            checked.add(request(id, &prompt(id as u32, 4), 22)).unwrap();
        }
        checked.finish(400);
        checked.check_answers();
        assert!(checked.engine.stats().preemptions > 0);
    }
}
