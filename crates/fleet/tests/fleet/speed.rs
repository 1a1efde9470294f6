use std::time::{Duration, Instant};

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::ledger::Ledger;
use servelab_bench::workload::{Workload, WorkloadOptions};
use servelab_engine::EngineConfig;
use servelab_fleet::{Load, NodeSettings, PodSettings, ReplicaKind, Scaler, Settings, simulate};
use servelab_sim::{CostModel, HardwareProfile, ModelShape, kv_pool};

use super::small;

fn llama_8b() -> ModelShape {
    Ledger::load().unwrap().models["llama-3.1-8b"].clone()
}

fn chat(replicas: u32, rate: f64, seconds: u64) -> Settings {
    let hardware = HardwareProfile::named("h100").unwrap();
    let shape = llama_8b();
    let pool = kv_pool(&shape, &hardware, 1, 0.9, 16, 2048).unwrap();
    let kind = ReplicaKind {
        cost: CostModel::new(&shape, &hardware, 1).unwrap(),
        engine: EngineConfig {
            block_size: 16,
            num_blocks: pool.num_blocks,
            max_model_len: 131_072,
            max_batched_tokens: 2048,
            max_running: 256,
            max_waiting: 512,
            prefix_cache: true,
        },
        gpus: 1,
        weight_bytes: llama_8b().weight_bytes(),
    };
    let options = WorkloadOptions { name: Some("azure-chat".into()), ..WorkloadOptions::default() };
    let base = small::settings(replicas, 1.0, seconds, 1);
    let nodes = NodeSettings { gpus_per_node: 8, initial: replicas.div_ceil(8), ..base.pods.nodes };
    Settings {
        kind,
        load: Load::Open(ArrivalShape::poisson(rate)),
        workload: Workload::new(&options).unwrap(),
        pods: PodSettings { nodes, ..base.pods },
        ..base
    }
}

/// Says how fast this machine simulates: `cargo test --release --workspace --test fleet speed -- --ignored
/// --nocapture`.
#[test]
#[ignore = "prints times, and has nothing to hold"]
fn speed_of_the_8b_chat_workload() {
    for (replicas, rate, seconds) in [(1, 8.0, 600), (8, 64.0, 300), (64, 512.0, 60)] {
        for is_exact in [false, true] {
            let shorter = if is_exact { 10 } else { 1 };
            let duration = Duration::from_secs(seconds / shorter);
            let settings = Settings { is_exact, duration, ..chat(replicas, rate, seconds) };
            let started = Instant::now();
            let outcome = simulate(settings, Scaler::fixed(replicas)).unwrap();
            let wall = started.elapsed().as_secs_f64();
            println!(
                "{replicas} replicas, exact {is_exact}: {} requests in {wall:.2} s, {:.0} a minute; {} failed, {:.0} % busy",
                outcome.requests,
                60.0 * outcome.requests as f64 / wall,
                outcome.failed(),
                100.0 * outcome.rows.iter().map(|row| row.busy).sum::<f64>() / outcome.rows.len() as f64,
            );
        }
    }
}

/// A thousand replicas are there at once, and work.
#[test]
fn a_thousand_replicas_fit_into_memory() {
    let outcome = simulate(chat(1000, 1000.0, 2), Scaler::fixed(1000)).unwrap();
    assert_eq!((outcome.most_ready, outcome.failed()), (1000, 0));
}
