//! What the scheduler promises, one promise a test.

use std::sync::Arc;
use std::time::Duration;

use super::harness::*;
use crate::{EngineConfig, Event, FinishReason, Request, RequestId, SamplingParams};

fn scheduled(events: &[Event]) -> Vec<u64> {
    let ids = events.iter().filter_map(|event| match event {
        Event::Scheduled { request, .. } => Some(request.0),
        _ => None,
    });
    ids.collect()
}

#[test]
fn decodes_go_first_and_prompts_fill_the_rest_of_the_budget() {
    let mut checked = Checked::new(EngineConfig { max_batched_tokens: 10, ..config(32) });
    checked.add(request(1, &prompt(1, 6), 20)).unwrap();
    let report = checked.step();
    assert_eq!((report.decode_tokens, report.prefill_tokens), (0, 6));
    checked.add(request(2, &prompt(2, 12), 20)).unwrap();
    checked.add(request(3, &prompt(3, 9), 20)).unwrap();
    let steps = [(1, 9), (1, 9), (2, 3), (3, 0)];
    for expected in steps {
        let report = checked.step();
        assert_eq!((report.decode_tokens, report.prefill_tokens), expected);
    }
    checked.finish(30);
    checked.check_answers();
}

#[test]
fn smaller_priorities_go_first_and_arrival_decides_among_equals() {
    let mut checked = Checked::new(EngineConfig { max_running: 1, ..config(32) });
    let of = |id, priority, arrival| Request {
        priority,
        arrival: Duration::from_secs(arrival),
        ..request(id, &prompt(id as u32, 3), 2)
    };
    for request in [of(1, 5, 1), of(2, 0, 3), of(3, 0, 2), of(4, -1, 4), of(5, 0, 3)] {
        checked.add(request).unwrap();
    }
    let mut order = Vec::new();
    while checked.engine.has_work() {
        order.extend(scheduled(&checked.step().events));
    }
    assert_eq!(order, [4, 3, 2, 5, 1]);
}

/// A long prompt at the head is not overtaken by short ones that would fit.
#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    let mut checked = Checked::new(config(10));
    checked.add(request(0, &prompt(9, 12), 10)).unwrap();
    checked.step();
    checked.add(request(1, &prompt(1, 30), 4)).unwrap();
    let mut order = Vec::new();
    for id in 2..12 {
        checked.add(request(id, &prompt(id as u32, 3), 2)).unwrap();
        order.extend(scheduled(&checked.step().events));
    }
    while checked.engine.has_work() {
        order.extend(scheduled(&checked.step().events));
    }
    assert_eq!(order, (1..12).collect::<Vec<_>>());
    checked.check_answers();
}

/// One prefill for all choices; their prompt blocks are shared, the partial one until it is written.
#[test]
fn choices_share_the_prompt_and_copy_its_last_block_on_write() {
    let mut checked = Checked::new(config(16));
    checked.add(choices(1, &prompt(1, 10), 5, 3)).unwrap();
    let report = checked.step();
    assert_eq!(report.prefill_tokens, 10);
    assert_eq!(checked.engine.stats().blocks_held, 3, "all shared");
    let snapshot = checked.engine.snapshot();
    assert_eq!(snapshot.blocks.iter().filter(|state| **state == 4).count(), 3, "held by three");
    checked.step();
    assert_eq!(checked.engine.trace().copies, 2, "the last holder writes in place");
    assert_eq!(checked.engine.stats().blocks_held, 5);
    checked.finish(20);
    checked.check_answers();
    let tokens = &checked.outcome(1).tokens;
    assert!(tokens[&0] != tokens[&1] && tokens[&1] != tokens[&2]);
}

#[test]
fn choices_of_one_request_reserve_their_places() {
    let mut checked = Checked::new(EngineConfig { max_running: 4, ..config(32) });
    checked.add(choices(1, &prompt(1, 30), 5, 3)).unwrap();
    checked.add(choices(2, &prompt(2, 4), 5, 2)).unwrap();
    checked.add(request(3, &prompt(3, 4), 5)).unwrap();
    assert_eq!(scheduled(&checked.step().events), [1]);
    assert_eq!(scheduled(&checked.step().events), [], "one place is free, and two are wanted");
    checked.finish(40);
    checked.check_answers();
}

#[test]
fn a_stop_string_ends_one_choice_only() {
    let mut checked = Checked::new(config(16));
    checked.add(choices(1, &prompt(1, 6), 6, 2)).unwrap();
    assert!(!checked.engine.finish_choice(RequestId(1), 0), "nothing was generated yet");
    checked.step();
    assert!(checked.engine.finish_choice(RequestId(1), 1));
    assert!(!checked.engine.finish_choice(RequestId(1), 1));
    checked.finish(20);
    checked.check_answers();
    assert_eq!(checked.outcome(1).finished[&1], FinishReason::Stop(None));
    assert_eq!(checked.outcome(1).finished[&0], FinishReason::Length);
    assert_eq!(checked.outcome(1).tokens[&1].len(), 1);
}

#[test]
fn scores_cover_the_whole_prompt_in_chunks_and_with_a_warm_cache() {
    let mut checked = Checked::new(EngineConfig { max_batched_tokens: 8, ..config(16) });
    let sampling = SamplingParams { prompt_logprobs: Some(2), ..SamplingParams::greedy() };
    for id in 0..2 {
        let scored = Request { n: 2, sampling: Arc::new(sampling.clone()), ..request(id, &prompt(1, 19), 3) };
        checked.add(scored).unwrap();
        checked.finish(20);
    }
    checked.check_answers();
    assert_eq!(checked.outcome(1).cached_tokens, [0], "all rows have to be computed");
    assert_eq!(checked.engine.stats().prefix_query_tokens, 0);
    checked.add(request(2, &prompt(1, 19), 3)).unwrap();
    checked.finish(20);
    assert_eq!(checked.outcome(2).cached_tokens, [16], "but they are there for others");
}

#[test]
fn a_preempted_request_finds_its_own_blocks_again() {
    let mut checked = Checked::new(config(10));
    checked.add(request(1, &prompt(1, 12), 17)).unwrap();
    checked.add(request(2, &prompt(2, 12), 17)).unwrap();
    checked.finish(80);
    checked.check_answers();
    let outcome = checked.outcome(2);
    assert_eq!(outcome.preemptions, 1);
    assert_eq!(outcome.cached_tokens.len(), 2);
    assert!(outcome.cached_tokens[1] > 0, "{:?}", outcome.cached_tokens);
    let stats = checked.engine.stats();
    assert_eq!((stats.preemptions, stats.prefix_query_tokens, stats.prefix_hit_tokens), (1, 24, 0));
}

#[test]
fn no_token_is_computed_twice_without_a_preemption() {
    let mut checked = Checked::new(EngineConfig { prefix_cache: false, max_batched_tokens: 9, ..config(64) });
    for id in 0..6 {
        checked.add(choices(id, &prompt(id as u32, 5 + id as u32), 7, 1 + id as u32 % 2)).unwrap();
    }
    let mut computed = 0;
    while checked.engine.has_work() {
        let report = checked.step();
        computed += report.prefill_tokens + report.decode_tokens;
    }
    assert_eq!(checked.engine.stats().preemptions, 0);
    // Each prompt once, and every token generated but the last of each choice.
    let expected: u32 = (0..6).map(|id| 5 + id + (1 + id % 2) * 6).sum();
    assert_eq!(computed, expected);
}

#[test]
fn salts_do_not_share_blocks() {
    let mut checked = Checked::new(config(32));
    for (id, salt) in [(1, 0), (2, 7), (3, 7)] {
        checked.add(Request { cache_salt: salt, ..request(id, &prompt(1, 9), 2) }).unwrap();
        checked.finish(10);
    }
    let cached = [1, 2, 3].map(|id| checked.outcome(id).cached_tokens[0]);
    assert_eq!(cached, [0, 0, 8]);
}

#[test]
fn equal_prompts_computed_at_once_are_published_once() {
    let mut checked = Checked::new(EngineConfig { max_batched_tokens: 64, ..config(32) });
    for id in 0..3 {
        checked.add(request(id, &prompt(1, 8), 2)).unwrap();
    }
    checked.finish(10);
    checked.check_answers();
    assert_eq!(checked.engine.stats().blocks_cached, 2);
}

#[test]
fn a_reset_forgets_everything_and_disturbs_nobody() {
    let mut checked = Checked::new(config(32));
    assert!(!checked.engine.reset_prefix_cache(), "there was nothing to forget");
    checked.add(request(1, &prompt(1, 8), 10)).unwrap();
    checked.step();
    assert!(checked.engine.reset_prefix_cache());
    checked.add(request(2, &prompt(1, 8), 2)).unwrap();
    checked.finish(20);
    checked.check_answers();
    assert_eq!(checked.outcome(2).cached_tokens, [0]);
    assert_eq!(checked.engine.stats().blocks_cached, 2, "only the second request published");
}

#[test]
fn without_a_prefix_cache_nothing_is_kept() {
    let mut checked = Checked::new(EngineConfig { prefix_cache: false, ..config(32) });
    for id in 0..2 {
        checked.add(request(id, &prompt(1, 12), 2)).unwrap();
        checked.finish(10);
    }
    assert_eq!(checked.outcome(1).cached_tokens, [0]);
    let stats = checked.engine.stats();
    assert_eq!((stats.blocks_cached, stats.prefix_query_tokens), (0, 0));
}

#[test]
fn the_cache_tells_how_much_of_a_prompt_it_holds() {
    let mut checked = Checked::new(config(32));
    checked.add(request(1, &prompt(1, 11), 2)).unwrap();
    checked.finish(10);
    let held = |tokens: &[u32], salt| checked.engine.cached_tokens(tokens, salt);
    assert_eq!(held(&prompt(1, 30), 0), 8, "two of its blocks were full");
    assert_eq!([held(&prompt(1, 7), 0), held(&prompt(2, 11), 0), held(&prompt(1, 11), 7)], [4, 0, 0]);
}

#[test]
fn a_snapshot_shows_who_holds_what_and_who_waits() {
    let mut checked = Checked::new(EngineConfig { max_running: 1, ..config(8) });
    checked.add(request(1, &prompt(1, 9), 4)).unwrap();
    checked.add(Request { priority: 1, ..request(2, &prompt(2, 5), 4) }).unwrap();
    checked.add(request(3, &prompt(3, 5), 4)).unwrap();
    checked.step();
    let snapshot = checked.engine.snapshot();
    let running = &snapshot.running[0];
    assert_eq!((running.request, running.tokens, running.computed), (RequestId(1), 10, 9));
    assert_eq!(running.blocks.len(), 3);
    let waiting: Vec<_> =
        snapshot.waiting.iter().map(|s| (s.request.0, s.priority, s.prompt_tokens)).collect();
    assert_eq!(waiting, [(3, 0, 5), (2, 1, 5)]);
    assert_eq!(snapshot.blocks, [2, 2, 2, 0, 0, 0, 0, 0]);
    assert_eq!((snapshot.steps, snapshot.now), (1, Duration::from_millis(1)));
}
