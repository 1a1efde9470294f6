//! All policies on all workloads along their load ladders, in virtual time.
//!
//! `cargo run --release -p servelab-benches --example routing -- [SCENARIO [POLICY]]`; a table on standard output.
//! Both arguments may be lists with commas, or `all`.
#![allow(clippy::print_stdout)]

use servelab_benches::routing::bounds::shared_cache_hit_rate;
use servelab_benches::routing::replica::ReplicaKind;
use servelab_benches::routing::run::{Arm, Run};
use servelab_benches::routing::scenario::Scenario;

const REPLICAS: u8 = 8;
const SEED: u64 = 1;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let fits = |at: usize, name: &str| {
        wanted.get(at).is_none_or(|list| list == "all" || list.split(',').any(|wanted| wanted == name))
    };
    let kind = ReplicaKind::llama_8b_on_h100();
    println!(
        "# {REPLICAS} replicas, llama-3.1-8b on one H100 each, {} KV blocks of 16 tokens",
        kind.engine.num_blocks
    );
    for scenario in Scenario::all().into_iter().filter(|scenario| fits(0, scenario.name)) {
        println!("\n## {}: {}", scenario.name, scenario.purpose);
        println!("good: TTFT <= {} s, TPOT <= {} s", scenario.ttft_seconds, scenario.tpot_seconds);
        bounds(&scenario, &kind);
        println!(
            "  rate policy            offered  goodput  hit %  guess ttft p50      p99 tpot p50  imbal  preem"
        );
        for rate in scenario.rates {
            for arm in Arm::all().filter(|arm| fits(1, arm.name())) {
                row(&scenario, arm, *rate, &kind);
            }
        }
    }
}

fn row(scenario: &Scenario, arm: Arm, rate: f64, kind: &ReplicaKind) {
    let outcome = Run::new(scenario, arm, rate, kind, REPLICAS, SEED).finish();
    println!(
        "{rate:>6} {:16} {:>8.2} {:>8.2} {:>6.1} {:>6.1} {:>8.3} {:>8.3} {:>8.4} {:>6.3} {:>6}",
        arm.name(),
        outcome.offered,
        outcome.goodput,
        100.0 * outcome.hit_rate,
        100.0 * outcome.predicted_hit_rate,
        outcome.ttft_p50_seconds,
        outcome.ttft_p99_seconds,
        outcome.tpot_p50_seconds,
        outcome.imbalance,
        outcome.preemptions,
    );
}

/// The bounds depend on the prompts alone and not on who routes.
fn bounds(scenario: &Scenario, kind: &ReplicaKind) {
    let mut run = Run::new(scenario, Arm::Oracle, scenario.rates[0], kind, REPLICAS, SEED);
    run.finish();
    let (blocks, size) = (kind.engine.num_blocks as usize, kind.engine.block_size);
    let bound = |capacity| 100.0 * shared_cache_hit_rate(&run.seen, capacity, size);
    println!(
        "hit rate of a shared cache that forgets nothing {:.1} %, of the fleet's size {:.1} %, of one replica's {:.1} %",
        bound(None),
        bound(Some(blocks * usize::from(REPLICAS))),
        bound(Some(blocks))
    );
}
