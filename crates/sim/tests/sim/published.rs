//! The estimate of data sheets, uncalibrated, against figures that others have published.
//!
//! `cargo test --release -p servelab-sim --test sim published -- --nocapture` prints the tables.

#![allow(clippy::print_stdout, reason = "the tables are what people read")]

use servelab_engine::EngineConfig;
use servelab_sim::cost::CostModel;
use servelab_sim::replay::{Arrivals, Length, Load, Measured, replay};
use servelab_sim::{Dtype, HardwareProfile, ModelShape, kv_pool};

use crate::models::{llama_8b, llama_70b};

/// TensorRT-LLM 1.0, `docs/source/performance/perf-overview.md`, Llama 3.1 8B and 3.3 70B in FP8: output tokens a
/// second of the whole replica, all requests sent at once, each with as many tokens in and out as stands here.
/// `[8B on H200, 8B on H100, 70B on H200, 70B on two H100]`
const THROUGHPUT: [(u32, u32, [f64; 4]); 10] = [
    (128, 128, [27_911.0, 28_312.0, 3803.0, 6378.0]),
    (128, 2048, [26_221.0, 22_714.0, 4336.0, 6651.0]),
    (128, 4096, [18_027.0, 14_325.0, 2872.0, 4199.0]),
    (500, 2000, [20_770.0, 17_660.0, 3666.0, 5222.0]),
    (1000, 1000, [17_744.0, 15_220.0, 2909.0, 4205.0]),
    (1000, 2000, [16_828.0, 13_899.0, 2994.0, 4146.0]),
    (2048, 128, [3538.0, 3450.0, 442.0, 762.0]),
    (2048, 2048, [12_194.0, 9305.0, 2003.0, 3082.0]),
    (5000, 500, [3902.0, 3459.0, 566.0, 898.0]),
    (20_000, 2000, [1804.0, 1351.0, 283.0, 437.0]),
];

/// The replicas of the columns.
fn replicas() -> [(&'static str, ModelShape, &'static str, u32); 4] {
    let fp8 = |shape| ModelShape { weight_dtype: Dtype::Fp8, kv_dtype: Dtype::Fp8, ..shape };
    [
        ("8B on H200", fp8(llama_8b()), "h200", 1),
        ("8B on H100", fp8(llama_8b()), "h100", 1),
        ("70B on H200", fp8(llama_70b()), "h200", 1),
        ("70B on 2 H100", fp8(llama_70b()), "h100", 2),
    ]
}

/// A replica with this much of its memory for everything.
fn measure(shape: &ModelShape, hardware: &str, gpus: u32, running: u32, load: Load) -> Measured {
    let hardware = HardwareProfile::named(hardware).unwrap();
    let pool = kv_pool(shape, &hardware, gpus, 0.95, 32, 1).unwrap();
    let config = EngineConfig {
        block_size: 32,
        num_blocks: pool.num_blocks,
        max_model_len: 2,
        max_batched_tokens: 8192,
        max_running: running,
        max_waiting: 1,
        prefix_cache: false,
    };
    replay(config, CostModel::new(shape, &hardware, gpus).unwrap(), 2, load).unwrap()
}

fn load(concurrency: u32, requests: u32, input_tokens: u32, output_tokens: u32) -> Load {
    Load {
        arrivals: Arrivals::Closed(concurrency),
        requests,
        warm_up: 0,
        input_tokens: Length::exactly(input_tokens),
        output_tokens: Length::exactly(output_tokens),
        request_seconds: 0.0,
    }
}

/// Fewer requests than were measured, so that a test ends: enough for some turns of the largest batch.
fn all_at_once(shape: &ModelShape, hardware: &str, gpus: u32, input_tokens: u32, output_tokens: u32) -> f64 {
    let pool = kv_pool(shape, &HardwareProfile::named(hardware).unwrap(), gpus, 0.95, 32, 1).unwrap();
    let fitting = pool.num_blocks * 32 / (input_tokens + output_tokens);
    let requests = 4 * fitting.min(2048);
    let load = load(requests, requests, input_tokens, output_tokens);
    measure(shape, hardware, gpus, 2048, load).output_tokens_per_second
}

/// The table, its mean absolute error and its worst.
fn throughputs(which: impl Fn(u32, &str) -> bool) -> (f64, f64) {
    let mut errors = Vec::new();
    println!("| in/out | replica | published tok/s | estimated | error |\n| --- | --- | --- | --- | --- |");
    for (input, output, published) in THROUGHPUT {
        for ((name, shape, hardware, gpus), published) in replicas().iter().zip(published) {
            if which(output, name) {
                let estimated = all_at_once(shape, hardware, *gpus, input, output);
                let error = estimated / published - 1.0;
                let percent = 100.0 * error;
                println!("| {input}/{output} | {name} | {published:.0} | {estimated:.0} | {percent:+.0} % |");
                errors.push(error);
            }
        }
    }
    let mean = errors.iter().map(|error| error.abs()).sum::<f64>() / errors.len() as f64;
    let worst = errors.iter().map(|error| error.abs()).fold(0.0, f64::max);
    println!("mean of the absolute errors {:.0} %, worst {:.0} %", 100.0 * mean, 100.0 * worst);
    (mean, worst)
}

/// The part that is quick: the 8B with short answers, the 70B on two GPUs.
#[test]
fn published_throughputs_are_estimated_within_a_quarter() {
    let (mean, worst) = throughputs(|output, name| output <= 500 || name == "70B on 2 H100");
    assert!(mean < 0.1 && worst < 0.25, "mean {mean:.3}, worst {worst:.3}");
}

#[test]
#[ignore = "takes a minute with --release"]
fn all_published_throughputs_are_estimated_within_a_quarter() {
    let (mean, worst) = throughputs(|_, _| true);
    assert!(mean < 0.1 && worst < 0.25, "mean {mean:.3}, worst {worst:.3}");
}

/// Throughputs of one GPU as NVIDIA's AIConfigurator predicts them for bf16, and the ranges in which TPOT at low load
/// was measured or is predicted: the ledger of quoted numbers.
#[test]
fn predicted_throughputs_and_low_load_latencies() {
    let cases = [
        (llama_70b(), 4, 32, 2000, 500, 302.0),
        (llama_70b(), 4, 128, 2000, 500, 545.0),
        (llama_70b(), 4, 256, 1000, 1000, 1297.0),
        (llama_8b(), 1, 32, 2000, 500, 2565.0),
        (llama_8b(), 1, 128, 2000, 500, 4374.0),
    ];
    println!("| model | GPUs | B | in/out | predicted tok/s/GPU | estimated | error |");
    for (shape, gpus, concurrency, input_tokens, output_tokens, predicted) in cases {
        let load = load(concurrency, 4 * concurrency, input_tokens, output_tokens);
        let measured = measure(&shape, "h100", gpus, concurrency, load);
        let estimated = measured.output_tokens_per_second / f64::from(gpus);
        let error = estimated / predicted - 1.0;
        println!(
            "| {} | {gpus} | {concurrency} | {input_tokens}/{output_tokens} | {predicted:.0} | {estimated:.0} | {:+.0} % |",
            shape.name,
            100.0 * error
        );
        assert!(error.abs() < 0.35, "{}: {estimated} against {predicted}", shape.name);
    }
    println!("| model | hardware | predicted TPOT ms | measured | estimated |");
    for (shape, hardware, gpus, predicted, measured) in [
        (llama_8b(), "h100", 1, 6.14, "7.2 to 9.0"),
        (llama_70b(), "h100", 4, 15.0, "17 to 20"),
        (llama_8b(), "h200", 1, 4.91, "-"),
    ] {
        let load = load(1, 2, 200, 100);
        let estimated = 1e3 * measure(&shape, hardware, gpus, 64, load).tpot_seconds;
        println!("| {} | {gpus} {hardware} | {predicted} | {measured} | {estimated:.2} |", shape.name);
        assert!((0.8..1.2).contains(&(estimated / predicted)), "{}: {estimated}", shape.name);
    }
}
