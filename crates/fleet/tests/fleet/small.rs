use std::time::Duration;

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::result::{Slo, SloLimit, SloMetric};
use servelab_bench::workload::lengths::Span;
use servelab_bench::workload::{Workload, WorkloadOptions};
use servelab_engine::EngineConfig;
use servelab_fleet::{
    FaultSettings, Load, NodeSettings, PodSettings, ReplicaKind, RouterSettings, Settings, StartStages,
};
use servelab_sim::{CostModel, Dtype, HardwareProfile, ModelShape};

/// A model of which an L4 computes a prompt in milliseconds.
pub fn shape() -> ModelShape {
    ModelShape {
        name: "small".into(),
        layers: 16,
        hidden: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 8192,
        vocabulary: 128_256,
        tied_embeddings: true,
        max_context_tokens: 8192,
        sliding_window: None,
        parameters: 1_235_814_400,
        weight_dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
    }
}

pub fn kind() -> ReplicaKind {
    let hardware = HardwareProfile::named("l4").unwrap();
    ReplicaKind {
        cost: CostModel::new(&shape(), &hardware, 1).unwrap(),
        engine: EngineConfig {
            block_size: 16,
            num_blocks: 600,
            max_model_len: 4096,
            max_batched_tokens: 512,
            max_running: 16,
            max_waiting: 64,
            prefix_cache: true,
        },
        gpus: 1,
        weight_bytes: shape().weight_bytes(),
    }
}

/// Conversations of one to three turns behind a shared beginning.
pub fn workload() -> Workload {
    let options = WorkloadOptions {
        name: Some("multi-turn".into()),
        turns: Some(Span { least: 1, most: 3 }),
        input: Some(Span { least: 20, most: 300 }),
        output: Some(Span { least: 5, most: 120 }),
        turn_think_time: Some(Duration::from_secs(2)),
        prefix_tokens: Some(200),
        ..WorkloadOptions::default()
    };
    Workload::new(&options).unwrap()
}

/// Prompts that share nothing.
pub fn independent() -> Workload {
    let options = WorkloadOptions {
        name: Some("random".into()),
        input: Some(Span { least: 50, most: 500 }),
        output: Some(Span { least: 10, most: 100 }),
        ..WorkloadOptions::default()
    };
    Workload::new(&options).unwrap()
}

pub fn settings(replicas: u32, rate: f64, seconds: u64, seed: u64) -> Settings {
    let limit = SloLimit { metric: SloMetric::Ttft, limit_ms: 1000.0, percentile: 95.0 };
    Settings {
        seed,
        kind: kind(),
        is_exact: false,
        load: Load::Open(ArrivalShape::poisson(rate)),
        workload: workload(),
        duration: Duration::from_secs(seconds),
        router: RouterSettings { index_bytes: 4 << 20, ..RouterSettings::default() },
        network_time: Duration::ZERO,
        pods: PodSettings {
            initial: replicas,
            stages: StartStages {
                schedule: Duration::from_secs(1),
                image: Duration::from_secs(10),
                load: Duration::from_secs(2),
                warm_up: Duration::from_secs(1),
            },
            nodes: NodeSettings {
                gpus_per_node: 2,
                initial: replicas.div_ceil(2),
                most: 20,
                start: Duration::from_secs(20),
            },
            termination_grace: Duration::from_secs(20),
        },
        faults: FaultSettings::default(),
        scrape_interval: Duration::from_secs(5),
        model_name: "small".into(),
        slo: Slo { limits: vec![limit] },
        dollars_per_gpu_hour: 1.0,
    }
}
