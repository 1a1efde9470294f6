//! `SERVELAB_SIM_SEED=N` runs one seed alone and prints its log; `SERVELAB_SIM_SEEDS=N` says how many to run.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use servelab_bench::arrivals::ArrivalShape;
use servelab_fleet::scaler::presets;
use servelab_fleet::{FaultSettings, Load, Run, Scaler, Settings, traffic};
use servelab_router::choice::policy::Policy;
use servelab_sim::autoscale::Manifest;

use super::small;

/// Events between two checks of everything.
const CHECK_EVERY: u32 = 37;

fn random_settings(random: &mut ChaCha8Rng, seed: u64) -> (Settings, u32) {
    let replicas = random.random_range(0..6);
    let seconds = random.random_range(20..90);
    let mut settings = small::settings(replicas, 1.0, seconds, seed);
    let rate = [0.5, 4.0, 15.0][random.random_range(0..3)];
    settings.load = match random.random_range(0..5) {
        0 => Load::Users { users: random.random_range(1..60), think: Duration::from_secs(2) },
        1 => Load::Open(traffic::spike(rate, 8.0, seconds as f64)),
        2 => Load::Open(ArrivalShape::OnOff { rate, on_seconds: 5.0, off_seconds: 5.0 }),
        _ => Load::Open(ArrivalShape::poisson(rate)),
    };
    settings.is_exact = random.random_bool(0.3);
    if random.random_bool(0.3) {
        settings.workload = small::independent();
    }
    settings.router.policy = Policy::ALL[random.random_range(0..Policy::ALL.len())];
    settings.router.is_oracle = settings.router.policy == Policy::Cost && random.random_bool(0.3);
    settings.router.max_held = random.random_range(0..200);
    settings.router.hold_timeout = Duration::from_secs(random.random_range(1..60));
    settings.router.max_in_flight_per_replica = random.random_range(1..80);
    settings.router.max_waiting = random.random_range(0..100);
    settings.kind.engine.num_blocks = random.random_range(60..600);
    settings.kind.engine.max_waiting = random.random_range(1..64);
    settings.faults = FaultSettings {
        crashes_per_hour: [0.0, 100.0, 600.0][random.random_range(0..3)],
        partitions_per_hour: [0.0, 100.0, 600.0][random.random_range(0..3)],
        partition: Duration::from_secs(random.random_range(1..90)),
    };
    settings.pods.nodes.initial = random.random_range(0..4);
    (settings, replicas)
}

/// Half of the fleets are as large as they are. Of the others some follow a manifest that comes with the program, and
/// some one that is so hasty that pods go while they start, and the fleet sleeps and wakes.
fn random_scaler(random: &mut ChaCha8Rng, replicas: u32) -> Scaler {
    if random.random_bool(0.5) {
        return Scaler::fixed(replicas);
    }
    let presets: Vec<&str> = presets().collect();
    match random.random_range(0..2 * presets.len()) {
        at if at < presets.len() => Scaler::preset(presets[at], replicas).unwrap(),
        _ => Scaler::manifest("hasty", Manifest::parse(&hasty(random)).unwrap(), replicas),
    }
}

fn hasty(random: &mut ChaCha8Rng) -> String {
    let [polling, cooldown, window] = [1..10, 1..20, 0..20].map(|span| random.random_range(span));
    let (least, more, threshold) =
        (random.random_range(0..2), random.random_range(1..12), random.random_range(1..6));
    let most = least + more;
    format!(
        r#"
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {{ name: hasty }}
spec:
  scaleTargetRef: {{ name: servelab-replica }}
  pollingInterval: {polling}
  cooldownPeriod: {cooldown}
  minReplicaCount: {least}
  maxReplicaCount: {most}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior: {{ scaleDown: {{ stabilizationWindowSeconds: {window} }} }}
  triggers:
    - type: prometheus
      metadata:
        serverAddress: http://prometheus:9090
        query: sum(servelab_router_requests_in_flight)
        threshold: "{threshold}"
"#
    )
}

/// Runs a seed to its end, and returns how many requests there were, how many failed, how many faults, and how often the
/// fleet changed its size.
fn run(seed: u64, is_shown: bool) -> Result<[u64; 4], String> {
    let random = &mut ChaCha8Rng::seed_from_u64(seed);
    let (settings, replicas) = random_settings(random, seed);
    let scaler = random_scaler(random, replicas);
    let mut run = Run::new(settings, scaler).map_err(|error| error.to_string())?;
    let mut events = 0_u32;
    while run.step() {
        events += 1;
        if events.is_multiple_of(CHECK_EVERY) {
            run.check_integrity()?;
        }
        if events > 3_000_000 {
            return Err("it does not end".into());
        }
    }
    run.check_integrity()?;
    if run.alive() > 0 {
        return Err(format!("{} requests never ended", run.alive()));
    }
    let outcome = run.finish();
    if is_shown {
        outcome.log.iter().for_each(|line| println!("{:>9.3}  {}", line.seconds, line.text));
        println!("{} requests, {:?}", outcome.requests, outcome.failures);
    }
    match outcome.completed + outcome.failed() {
        ended if ended == outcome.requests => {
            let faults = outcome.crashes + outcome.partitions;
            Ok([outcome.requests, outcome.failed(), faults, outcome.scalings])
        }
        ended => Err(format!("{} requests and {ended} ends", outcome.requests)),
    }
}

/// Engines, router, queues, pods, autoscaler and faults together: no request is lost, none ends twice, no block leaks, nothing
/// hangs.
#[test]
fn random_fleets_lose_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("SERVELAB_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SERVELAB_SIM_SEEDS").unwrap_or(200),
    };
    let is_shown = seeds.end - seeds.start == 1;
    let mut sums = [0; 4];
    for seed in seeds.clone() {
        match std::panic::catch_unwind(|| run(seed, is_shown)) {
            Ok(Ok(counts)) => sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count),
            Ok(Err(breach)) => panic!("seed {seed}: {breach}\nrepeat it with: just sim {seed}"),
            Err(_) => panic!("seed {seed} panicked\nrepeat it with: just sim {seed}"),
        }
    }
    let [requests, failed, faults, scalings] = sums;
    println!(
        "{} seeds: {requests} requests, {failed} failed, {faults} faults, {scalings} changes of size",
        seeds.count()
    );
}
