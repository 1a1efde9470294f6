//! The fast replica beside the real engine.

use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use servelab_engine::EngineConfig;
use servelab_sim::{CostModel, Dtype, HardwareProfile, ModelShape, SlidingWindow};

use super::*;

/// A small model, so that a step's time depends on every term.
fn shape(sliding_window: Option<SlidingWindow>) -> ModelShape {
    ModelShape {
        name: "small".into(),
        layers: 4,
        hidden: 256,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        intermediate: 512,
        vocabulary: 1000,
        tied_embeddings: false,
        max_context_tokens: 4096,
        sliding_window,
        parameters: 2_000_000,
        weight_dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
    }
}

fn kind(random: &mut ChaCha8Rng) -> ReplicaKind {
    let hardware = HardwareProfile::named("l4").unwrap();
    let window = random.random_bool(0.2).then_some(SlidingWindow { layers: 2, tokens: 40 });
    let max_running = random.random_range(1..12);
    ReplicaKind {
        cost: CostModel::new(&shape(window), &hardware, 1).unwrap(),
        engine: EngineConfig {
            block_size: [4, 8, 16][random.random_range(0..3)],
            num_blocks: random.random_range(40..160),
            max_model_len: 4096,
            max_batched_tokens: max_running.max(random.random_range(8..200)),
            max_running,
            max_waiting: random.random_range(5..60),
            prefix_cache: random.random_bool(0.8),
        },
        gpus: 1,
        weight_bytes: 4e6,
    }
}

/// Requests with their arrivals: some share a beginning, some come at the same moment.
fn asks(random: &mut ChaCha8Rng, kind: &ReplicaKind) -> Vec<(Duration, Ask)> {
    let (block_size, room) = (kind.engine.block_size, kind.engine.num_blocks * kind.engine.block_size);
    let gap_micros = [100, 2000, 20_000][random.random_range(0..3)];
    let mut at = Duration::ZERO;
    let ask = |number| {
        if random.random_bool(0.7) {
            at += Duration::from_micros(random.random_range(0..gap_micros));
        }
        let (shared, own) = (random.random_range(0..60), random.random_range(1..60));
        let family = random.random_range(0..3) * 1000;
        let start = number as u32 * 100_000;
        let prompt: Vec<u32> = (family..family + shared).chain(start..start + own).collect();
        let most = (room - prompt.len() as u32).min(150);
        let output = random.random_range(1..most.max(2));
        (at, Ask::new(number, number, prompt.into(), output, block_size))
    };
    (0..80).map(ask).collect()
}

/// All that a replica shows of a workload: notes, and its gauges and counters at odd moments.
fn shown(kind: &ReplicaKind, asks: &[(Duration, Ask)], is_exact: bool) -> String {
    let mut replica = Replica::new(kind, is_exact).unwrap();
    let (mut notes, mut shown) = (Vec::new(), String::new());
    let mut advance = |replica: &mut Replica, until: Duration| {
        while let Some(next) = replica.next().filter(|next| *next <= until) {
            replica.advance(next, &mut notes);
            replica.check_integrity().unwrap();
        }
    };
    for (at, ask) in asks {
        advance(&mut replica, *at);
        let is_taken = replica.add(*at, ask);
        let later = *at + Duration::from_micros(37);
        advance(&mut replica, later);
        replica.sync(later);
        let cached = replica.cached_tokens(ask);
        shown += &format!("{is_taken} {cached} {:?} {:?}\n", replica.gauges(), replica.counters());
    }
    advance(&mut replica, Duration::MAX);
    shown += &format!("{:?} {:?}\n", replica.gauges(), replica.counters());
    notes.iter().for_each(|note| shown += &format!("{note:?}\n"));
    shown
}

/// Every note at the same nanosecond, every gauge and counter equal, with prefixes shared, prompts in chunks, queues
/// that are full and sequences that are preempted.
#[test]
fn the_fast_replica_is_the_engine() {
    let (mut preempted, mut hits) = (0, 0);
    for seed in 0..60 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let kind = kind(&mut random);
        let asks = asks(&mut random, &kind);
        let [fast, exact] = [false, true].map(|is_exact| shown(&kind, &asks, is_exact));
        for (line, (fast, exact)) in fast.lines().zip(exact.lines()).enumerate() {
            assert_eq!(fast, exact, "seed {seed}, line {line}");
        }
        assert_eq!(fast.len(), exact.len(), "seed {seed}");
        preempted += fast.matches("Preempted").count();
        hits += fast.lines().filter(|line| line.contains("cached_tokens: 3")).count();
    }
    assert!(
        preempted > 50 && hits > 50,
        "{preempted} preemptions, {hits} hits: the workloads show too little"
    );
}

/// The steps in between are not looked at one by one: most of a long answer is one call.
#[test]
fn a_long_answer_takes_few_calls() {
    let kind = ReplicaKind { engine: EngineConfig { num_blocks: 1000, ..engine() }, ..kind(&mut random(1)) };
    let mut replica = Replica::new(&kind, false).unwrap();
    assert!(replica.add(Duration::ZERO, &Ask::new(1, 1, Arc::from([1, 2, 3]), 1000, 16)));
    let (mut calls, mut notes) = (0, Vec::new());
    while let Some(next) = replica.next() {
        replica.advance(next, &mut notes);
        calls += 1;
    }
    assert_eq!(replica.counters().generated_tokens, 1000);
    assert!(calls < 12, "{calls} calls");
}

fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn engine() -> EngineConfig {
    EngineConfig {
        block_size: 16,
        num_blocks: 100,
        max_model_len: 4096,
        max_batched_tokens: 512,
        max_running: 8,
        max_waiting: 100,
        prefix_cache: true,
    }
}
