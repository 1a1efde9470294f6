use std::time::Duration;

use servelab_bench::arrivals::ArrivalShape;
use servelab_fleet::{
    Load, NodeSettings, Outcome, PodSettings, Scaler, Settings, StartStages, simulate, traffic,
};
use servelab_sim::autoscale::Manifest;

use super::small;

/// A ScaledObject with one query.
fn manifest(spec: &str, query: &str, metric_type: &str, threshold: &str) -> Manifest {
    Manifest::parse(&format!(
        "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata:\n  name: test\nspec:\n  scaleTargetRef:\n    \
         name: servelab\n  pollingInterval: 5\n{spec}  triggers:\n    - type: prometheus\n      metricType: \
         {metric_type}\n      metadata:\n        serverAddress: http://prometheus\n        query: {query}\n        \
         threshold: \"{threshold}\"\n"
    ))
    .unwrap()
}

fn run(load: ArrivalShape, seconds: u64, initial: u32, manifest: Manifest) -> Outcome {
    let mut settings = small::settings(initial, 1.0, seconds, 5);
    // What was held while the first pod started comes to it at once.
    settings.kind.engine.max_waiting = 1000;
    let nodes = NodeSettings { initial: 16, most: 16, ..settings.pods.nodes };
    // Longer than the autoscaler's period: pods start while it looks again.
    let stages = StartStages { warm_up: Duration::from_secs(40), ..settings.pods.stages };
    let pods = PodSettings { nodes, stages, ..settings.pods };
    let settings = Settings {
        load: Load::Open(load),
        workload: small::independent(),
        duration: Duration::from_secs(seconds),
        pods,
        ..settings
    };
    simulate(settings, Scaler::manifest("test", manifest, initial)).unwrap()
}

const IN_FLIGHT: &str = "sum(servelab_router_requests_in_flight)";

#[test]
fn a_fleet_that_sleeps_is_woken_by_what_the_router_holds_and_sleeps_again() {
    let spec = "  minReplicaCount: 0\n  maxReplicaCount: 4\n  cooldownPeriod: 30\n";
    let outcome = run(traffic::from_zero(3.0, 900.0), 900, 0, manifest(spec, IN_FLIGHT, "AverageValue", "8"));
    assert_eq!(outcome.failed(), 0, "{:?}", outcome.failures);
    let rows = &outcome.rows;
    assert!(rows.iter().take_while(|row| row.seconds < 80.0).all(|row| row.ready == 0));
    assert!(rows.iter().any(|row| row.held > 0) && outcome.most_ready >= 1);
    assert_eq!(rows.last().map(|row| row.ready), Some(0), "it sleeps again: {:?}", outcome.log);
    let waited = outcome.ttft_seconds.unwrap().p99;
    assert!(waited > 3.0, "somebody waited for the first pod: {waited} s");
}

/// At zero replicas nobody exports the replicas' metrics.
#[test]
fn a_metric_of_the_replicas_never_wakes_them() {
    let spec = "  minReplicaCount: 0\n  maxReplicaCount: 4\n";
    let query = "sum(servelab_num_requests_waiting)";
    let outcome = run(ArrivalShape::poisson(1.0), 300, 0, manifest(spec, query, "AverageValue", "5"));
    assert_eq!((outcome.completed, outcome.most_ready), (0, 0));
    assert!(outcome.failed() > 200);
}

#[test]
fn a_queue_grows_the_fleet_and_its_end_shrinks_it() {
    let spec = "  minReplicaCount: 1\n  maxReplicaCount: 12\n";
    let query = "sum(servelab_num_requests_waiting)";
    let outcome = run(traffic::spike(3.0, 20.0, 1200.0), 1200, 1, manifest(spec, query, "AverageValue", "5"));
    assert!(outcome.most_ready > 3, "{:?}", outcome.log);
    assert_eq!(outcome.rows.last().map(|row| row.wanted), Some(1), "{:?}", outcome.log);
}

/// A ratio multiplies the ready pods again and again, while those that it asked for still start.
#[test]
fn value_overshoots_where_average_value_does_not() {
    let most = |metric_type: &str| {
        let spec = "  minReplicaCount: 1\n  maxReplicaCount: 30\n";
        let query = "sum(servelab_router_requests_in_flight)";
        let outcome = run(ArrivalShape::poisson(20.0), 200, 2, manifest(spec, query, metric_type, "8"));
        outcome.rows.iter().map(|row| row.wanted).max().unwrap()
    };
    let (value, average) = (most("Value"), most("AverageValue"));
    assert!(value > average + 2, "Value wants {value}, AverageValue {average}");
}

/// From the second replica on the query has two elements, and the fleet stays as it is.
#[test]
fn a_query_without_a_sum_is_stuck_at_two() {
    let spec = "  minReplicaCount: 1\n  maxReplicaCount: 12\n";
    let query = "servelab_num_requests_waiting";
    let outcome = run(ArrivalShape::poisson(60.0), 240, 1, manifest(spec, query, "AverageValue", "30"));
    let wanted = outcome.rows.iter().map(|row| row.wanted);
    let settled: Vec<u32> = wanted.skip(outcome.rows.len() / 2).collect();
    assert!(settled.windows(2).all(|pair| pair[0] == pair[1]) && settled[0] > 1, "{settled:?}");
    assert!(outcome.log.iter().any(|line| line.text.contains("elements, and one is wanted")));
}

#[test]
fn the_same_manifest_gives_the_same_bytes() {
    let json = || {
        let manifest = Manifest::parse(servelab_fleet::scaler::preset("queue").unwrap()).unwrap();
        serde_json::to_string(&run(traffic::spike(2.0, 10.0, 300.0), 300, 1, manifest)).unwrap()
    };
    assert_eq!(json(), json());
}
