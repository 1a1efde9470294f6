use servelab_bench::arrivals::ArrivalShape;
use servelab_fleet::{Failure, Load, RouterSettings, Scaler, Settings, simulate, traffic};

use super::small;

/// Whoever looks into every cache and every queue has no excuse: the mean time in queues falls with every replica more.
#[test]
fn more_replicas_never_raise_the_mean_queue_time_under_the_oracle() {
    for seed in 0..3 {
        let queue = |replicas| {
            let settings = small::settings(replicas, 9.0, 200, seed);
            let router = RouterSettings { is_oracle: true, ..settings.router };
            let settings = Settings { router, workload: small::independent(), ..settings };
            simulate(settings, Scaler::fixed(replicas)).unwrap().mean_queue_seconds
        };
        let times: Vec<f64> = (1..=6).map(queue).collect();
        assert!(times.windows(2).all(|pair| pair[1] <= pair[0]), "seed {seed}: {times:?}");
        assert!(times[0] > 3.0 * times[5], "seed {seed}: {times:?}: one replica has no queue");
    }
}

/// Nobody is ever ready: requests are held, as many as may be and as long as may be, and then refused.
#[test]
fn a_fleet_of_nobody_refuses_everybody() {
    let settings = small::settings(0, 20.0, 300, 1);
    let router = RouterSettings { max_held: 100, ..settings.router };
    let outcome = simulate(Settings { router, ..settings }, Scaler::fixed(0)).unwrap();
    assert_eq!((outcome.completed, outcome.failed()), (0, outcome.requests));
    let most_held = outcome.rows.iter().map(|row| row.held).max();
    assert_eq!(most_held, Some(100));
    assert!(outcome.failures[&Failure::HeldTooLong] >= 100 && outcome.failures[&Failure::TooManyHeld] > 1000);
    assert!((300.0..420.5).contains(&outcome.seconds), "the last was held to its end: {}", outcome.seconds);
    assert_eq!((outcome.gpu_hours, outcome.ttft_seconds), (0.0, None));
}

#[test]
fn users_who_think_are_bounded_by_their_number() {
    let think = std::time::Duration::from_secs(5);
    let load = Load::Users { users: 40, think };
    let outcome = simulate(Settings { load, ..small::settings(2, 1.0, 300, 1) }, Scaler::fixed(2)).unwrap();
    assert_eq!(outcome.failed(), 0);
    let most = outcome.rows.iter().map(|row| row.running + row.queued + row.router_waiting).max();
    assert!(most <= Some(40), "{most:?}");
    // Each asks again after some five seconds and an answer: a little less than eight a second.
    let rate = outcome.requests as f64 / 300.0;
    assert!((3.0..8.0).contains(&rate), "{rate}");
}

#[test]
fn a_pool_that_is_too_small_for_a_request_refuses_it_and_serves_the_others() {
    let mut settings = small::settings(1, 2.0, 60, 1);
    settings.kind.engine.num_blocks = 30;
    let outcome = simulate(settings, Scaler::fixed(1)).unwrap();
    assert!(outcome.failures[&Failure::TooLarge] > 0 && outcome.completed > 0, "{:?}", outcome.failures);
}

/// A fleet that is larger than what one router knows has several.
#[test]
fn three_hundred_replicas_have_two_routers() {
    let load = Load::Open(ArrivalShape::poisson(300.0));
    let settings = Settings { load, workload: small::independent(), ..small::settings(300, 1.0, 5, 1) };
    let nodes = servelab_fleet::NodeSettings { initial: 150, most: 150, ..settings.pods.nodes };
    let pods = servelab_fleet::PodSettings { nodes, ..settings.pods };
    let outcome = simulate(Settings { pods, ..settings }, Scaler::fixed(300)).unwrap();
    assert_eq!((outcome.most_ready, outcome.failed()), (300, 0));
}

#[test]
fn a_spike_shows_where_it_is() {
    let load = Load::Open(traffic::spike(1.0, 10.0, 240.0));
    let outcome = simulate(Settings { load, ..small::settings(4, 1.0, 240, 1) }, Scaler::fixed(4)).unwrap();
    let mean = |from: f64, to: f64| {
        let rows = outcome.rows.iter().filter(|row| (from..to).contains(&row.seconds));
        let rates: Vec<f64> = rows.map(|row| row.offered_per_second).collect();
        rates.iter().sum::<f64>() / rates.len() as f64
    };
    assert!(mean(62.0, 139.0) > 4.0 * mean(2.0, 59.0), "{} {}", mean(62.0, 139.0), mean(2.0, 59.0));
}
