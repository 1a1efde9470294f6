use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use serde::Deserialize;
use servelab_sim::autoscale::hpa::{
    Behavior, CpuGroups, Limits, Memory, Policy, PolicyKind, Rules, Select, Tolerances, group_pods,
    per_pod_replicas, pods_replicas, ratio_replicas, resource_replicas,
};
use servelab_sim::autoscale::promql::{Query, Value};
use servelab_sim::autoscale::{Adapter, Autoscaler, CpuPod, CpuUsage, Manifest, PodCounts, SampleStore};

#[derive(Deserialize)]
struct Cases {
    ratio: Vec<Case<(u32, u32, f64, f64, u32)>>,
    per_pod: Vec<Case<(u32, f64, f64, u32)>>,
    resource: Vec<Case<(u32, u32, u32, Vec<f64>, f64, u32)>>,
    pods: Vec<Case<(u32, u32, u32, Vec<f64>, f64, u32)>>,
    decide: Vec<Decide>,
}

#[derive(Deserialize)]
struct Case<T> {
    reference: String,
    case: T,
}

#[derive(Deserialize)]
struct Decide {
    reference: String,
    behavior: String,
    min: u32,
    max: u32,
    steps: Vec<(u64, u32, u32, u32)>,
}

fn behavior(name: &str) -> Option<Behavior> {
    let (up, down) = (Rules::default_up(), Rules::default_down());
    let policy = |kind, value, seconds| Policy { kind, value, period: Duration::from_secs(seconds) };
    Some(match name {
        "none" => return None,
        "default" => Behavior { up, down },
        "one-a-minute-down" => {
            let policies = vec![policy(PolicyKind::Pods, 1, 60)];
            Behavior { up, down: Rules { stabilization: Duration::ZERO, policies, ..down } }
        }
        "never-down" => Behavior { up, down: Rules { select: Select::Disabled, ..down } },
        "least-up" => {
            let policies = vec![policy(PolicyKind::Pods, 2, 15), policy(PolicyKind::Percent, 100, 15)];
            Behavior { up: Rules { select: Select::Min, policies, ..up }, down }
        }
        "slow-up" => Behavior { up: Rules { stabilization: Duration::from_secs(60), ..up }, down },
        other => panic!("{other}"),
    })
}

#[test]
fn the_arithmetic_is_what_its_sources_say() {
    let cases: Cases = toml::from_str(include_str!("autoscale_cases.toml")).unwrap();
    let tolerances = Tolerances::of(None);
    for Case { reference, case: (current, ready, usage, target, replicas) } in &cases.ratio {
        assert_eq!(ratio_replicas(*current, *ready, *usage, *target, tolerances), *replicas, "{reference}");
    }
    for Case { reference, case: (existing, usage, target, replicas) } in &cases.per_pod {
        assert_eq!(per_pod_replicas(*existing, *usage, *target, tolerances), *replicas, "{reference}");
    }
    for Case { reference, case: (current, unready, missing, percents, target, replicas) } in &cases.resource {
        let cpu = CpuGroups { percents: percents.clone(), unready: *unready, missing: *missing };
        let found = resource_replicas(*current, &cpu, *target, tolerances);
        assert_eq!(found, Some(*replicas), "{reference}");
    }
    for Case { reference, case: (current, pending, missing, values, target, replicas) } in &cases.pods {
        let found = pods_replicas(*current, values, *pending, *missing, (target * 1e3).round(), tolerances);
        assert_eq!(found, Some(*replicas), "{reference}");
    }
    assert_eq!(pods_replicas(3, &[], 1, 2, 4e3, tolerances), None);
    for Decide { reference, behavior: name, min, max, steps } in &cases.decide {
        let limits = Limits { min: *min, max: *max, behavior: behavior(name) };
        let mut memory = Memory::default();
        for (seconds, current, proposal, replicas) in steps {
            let found = memory.decide(Duration::from_secs(*seconds), *current, *proposal, &limits);
            assert_eq!(found, *replicas, "{reference}, at {seconds} s");
        }
    }
    let averages = cases.per_pod.len() + cases.resource.len() + cases.pods.len();
    let all = cases.ratio.len() + averages + cases.decide.len();
    assert!(all >= 40, "{all} cases");
}

/// `groupPods` (replica_calculator.go), and what the documentation says of the two periods.
#[test]
fn pods_that_have_just_begun_do_not_count() {
    let second = Duration::from_secs;
    let usage = |at| CpuUsage { at: second(at), window: second(15), percent: 70.0 };
    let running = |began, changed, is_ready, usage| CpuPod {
        began: Some(second(began)),
        is_running: true,
        is_ready,
        readiness_changed: second(changed),
        usage,
    };
    let pending = CpuPod { is_running: false, ..running(900, 900, false, None) };
    for (what, pod, expected) in [
        ("pending", pending.clone(), "unready"),
        (
            "pending, and what its container used before",
            CpuPod { usage: Some(usage(990)), ..pending },
            "unready",
        ),
        ("no usage yet", running(900, 960, true, None), "missing"),
        ("young and not ready", running(900, 900, false, Some(usage(990))), "unready"),
        ("young, read partly before it was ready", running(900, 980, true, Some(usage(990))), "unready"),
        ("young, read since", running(900, 975, true, Some(usage(990))), "counts"),
        ("old, read partly before it was ready", running(700, 980, true, Some(usage(990))), "counts"),
        ("old, was never ready", running(600, 600, false, Some(usage(990))), "unready"),
        ("old, is ready no more", running(600, 980, false, Some(usage(990))), "counts"),
        (
            "not taken in by a node",
            CpuPod { began: None, ..running(0, 0, false, Some(usage(990))) },
            "unready",
        ),
    ] {
        let CpuGroups { percents, unready, missing } = group_pods(second(1000), &[pod]);
        let found = match (percents.as_slice(), unready, missing) {
            ([70.0], 0, 0) => "counts",
            ([], 1, 0) => "unready",
            ([], 0, 1) => "missing",
            other => panic!("{what}: {other:?}"),
        };
        assert_eq!(found, expected, "{what}");
    }
}

/// What the controller's own code answered: `controller/cases_test.go` asks it.
#[test]
fn the_arithmetic_is_that_of_the_controller() {
    let tolerances = Tolerances::of(None);
    let cases = include_str!("controller/cases.tsv").lines();
    for line in cases.clone() {
        let fields: Vec<&str> = line.split('\t').collect();
        let whole = |at: usize| fields[at].parse::<u32>().unwrap();
        let number = |at: usize| fields[at].parse::<f64>().unwrap();
        let list =
            |at: usize| -> Vec<f64> { fields[at].split(',').map(|value| value.parse().unwrap()).collect() };
        let found = match fields[0] {
            "ratio" => Some(ratio_replicas(whole(1), whole(2), number(3), number(4), tolerances)),
            "per_pod" => Some(per_pod_replicas(whole(1), number(2), number(3), tolerances)),
            "pods" => {
                pods_replicas(whole(1), &list(4), whole(2), whole(3), (number(5) * 1e3).round(), tolerances)
            }
            "resource" => {
                let cpu = CpuGroups { percents: list(4), unready: whole(2), missing: whole(3) };
                resource_replicas(whole(1), &cpu, number(5), tolerances)
            }
            other => panic!("{other}"),
        };
        assert_eq!(found, Some(whole(fields.len() - 1)), "{line}");
    }
    assert!(cases.count() >= 400);
}

proptest! {
    /// Whatever is proposed when, the bounds hold, and the same calls give the same replicas.
    #[test]
    fn bounds_hold(proposals in prop::collection::vec(0_u32..200, 1..60), min in 1_u32..5, more in 0_u32..50, named: bool) {
        let limits = Limits { min, max: min + more, behavior: behavior(if named { "default" } else { "none" }) };
        let run = || {
            let (mut memory, mut current, mut all) = (Memory::default(), min, Vec::new());
            for (at, proposal) in proposals.iter().enumerate() {
                current = memory.decide(Duration::from_secs(15 * at as u64), current, *proposal, &limits);
                all.push(current);
            }
            all
        };
        prop_assert!(run().iter().all(|replicas| (min..=min + more).contains(replicas)));
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn more_usage_never_wants_fewer(existing in 1_u32..50, usage in 0.0..1e4, more in 0.0..1e4, target in 0.1..100.0) {
        let of = |usage| per_pod_replicas(existing, usage, target, Tolerances::of(None));
        prop_assert!(of(usage) <= of(usage + more));
    }
}

// ---- PromQL ----

fn store() -> SampleStore {
    let mut store = SampleStore::default();
    for scrape in 0..=12_u32 {
        let now = Duration::from_secs(5 * u64::from(scrape));
        for (target, queue) in [("a", 3.0), ("b", 7.0)] {
            let labels = [("model_name", "demo")];
            store.record(now, target, "queue", &labels, queue);
            store.record(now, target, "tokens_total", &labels, f64::from(scrape) * 10.0);
            for (le, share) in [("0.1", 0.5), ("1", 0.9), ("+Inf", 1.0)] {
                let count = f64::from(scrape) * 20.0 * share;
                store.record(now, target, "ttft_bucket", &[("model_name", "demo"), ("le", le)], count);
            }
        }
    }
    store
}

fn values(query: &str, seconds: u64, store: &SampleStore) -> Vec<f64> {
    match Query::parse(query).unwrap().at(Duration::from_secs(seconds), store).unwrap() {
        Value::Scalar(value) => vec![value],
        Value::Vector(vector) => vector.iter().map(|element| element.value).collect(),
    }
}

#[test]
fn queries_give_what_prometheus_gives() {
    let store = store();
    for (query, expected) in [
        ("queue", vec![3.0, 7.0]),
        ("sum(queue)", vec![10.0]),
        ("sum(queue{model_name=\"demo\"}) + sum(queue{model_name=~\"d.*\"})", vec![20.0]),
        ("sum by (instance) (queue) > 5", vec![7.0]),
        ("max(queue) - min(queue) * 2", vec![1.0]),
        ("avg(queue) / count(queue)", vec![2.5]),
        ("sum(queue{model_name=\"other\"})", vec![]),
        ("sum(queue{model_name=\"other\"}) + sum(queue) or vector(0)", vec![0.0]),
        ("(sum(queue{model_name=\"other\"}) or vector(0)) + (sum(queue) or vector(0))", vec![10.0]),
        ("sum(rate(tokens_total[1m]))", vec![4.0]),
        ("increase(tokens_total{instance=\"a\"}[30s])", vec![60.0]),
        ("avg_over_time(queue{instance!=\"a\"}[20s])", vec![7.0]),
        ("histogram_quantile(0.5, sum by (le) (rate(ttft_bucket[1m])))", vec![0.1]),
        ("histogram_quantile(0.7, sum by (le) (rate(ttft_bucket[1m])))", vec![0.55]),
        ("histogram_quantile(0.99, sum by (le) (rate(ttft_bucket[1m])))", vec![1.0]),
        ("clamp_max(sum(queue), 4)", vec![4.0]),
        ("scalar(sum(queue)) * 2", vec![20.0]),
        ("-sum(queue) unless sum(absent_metric)", vec![-10.0]),
    ] {
        let found = values(query, 60, &store);
        let equal = found.len() == expected.len()
            && found.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() < 1e-9);
        assert!(equal, "{query}: {found:?}, and not {expected:?}");
    }
    assert!(
        values("histogram_quantile(0.9, sum by (le) (rate(ttft_bucket[1m]) * 0))", 60, &store)[0].is_nan()
    );
}

#[test]
fn a_series_ends_with_its_target_or_after_five_minutes() {
    let mut store = store();
    assert_eq!(values("sum(queue)", 359, &store), [10.0]);
    assert!(values("sum(queue)", 360, &store).is_empty());
    store.target_gone(Duration::from_secs(65), "b");
    assert_eq!(values("sum(queue)", 64, &store), [10.0]);
    assert_eq!(values("sum(queue)", 66, &store), [3.0]);
}

#[test]
fn what_is_not_simulated_is_refused_by_name() {
    for (query, part) in [
        ("predict_linear(queue[1m], 60)", "predict_linear is not simulated"),
        ("queue / on (model_name) group_left sum by (model_name) (queue)", "group_left is not simulated"),
        ("queue offset 5m", "offset"),
        ("rate(queue[2h])", "an hour at most"),
        ("sum(queue", "missing"),
        ("{model_name=\"demo\"}", "without a name"),
        ("queue{model_name=~\"(\"}", "no regular expression"),
        ("1 == 1", "bool"),
    ] {
        let parsed = Query::parse(query);
        let error = parsed.and_then(|query| query.at(Duration::ZERO, &SampleStore::default()).map(|_| ()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part), "{query}: {error}");
    }
}

// ---- the operator ----

fn manifest(spec: &str, metadata: &str) -> Manifest {
    annotated("", spec, metadata)
}

fn annotated(annotations: &str, spec: &str, metadata: &str) -> Manifest {
    let text = format!(
        "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata: {{name: test, annotations: {{{annotations}}}}}\n\
         spec:\n  scaleTargetRef: {{name: servelab}}\n{spec}  triggers:\n    - type: prometheus\n      metadata:\n        query: sum(queue)\n        \
         threshold: \"5\"\n{metadata}"
    );
    Manifest::parse(&text).unwrap()
}

/// Ticks until `seconds`, with a queue that is `queue(second)`; none where that is `None`. Pods are ready at once.
fn replicas(
    manifest: Manifest,
    seconds: u64,
    from: u32,
    queue: impl Fn(u64) -> Option<f64>,
) -> BTreeMap<u64, u32> {
    let (mut autoscaler, mut store) = (Autoscaler::new(manifest), SampleStore::default());
    let (mut wanted, mut all) = (from, BTreeMap::new());
    for second in 0..=seconds {
        let now = Duration::from_secs(second);
        match queue(second) {
            Some(queue) => store.record(now, "router", "queue", &[], queue),
            None => store.target_gone(now, "router"),
        }
        while autoscaler.next_wake() <= now {
            let pods = PodCounts { wanted, existing: wanted, ready: wanted, ..PodCounts::default() };
            if let Some(scaled) = autoscaler.tick(now, &store, &pods) {
                wanted = scaled.replicas;
            }
        }
        all.insert(second, wanted);
    }
    all
}

#[test]
fn from_zero_to_one_at_the_poll_to_many_by_the_autoscaler_and_back_after_the_cooldown() {
    let manifest = manifest("  pollingInterval: 10\n  cooldownPeriod: 60\n  maxReplicaCount: 8\n", "");
    let queue = |second| Some(if (12..100).contains(&second) { 32.0 } else { 0.0 });
    let replicas = replicas(manifest, 600, 0, queue);
    assert_eq!([replicas[&19], replicas[&20]], [0, 1]);
    assert_eq!([replicas[&29], replicas[&30], replicas[&45]], [1, 4, 7]);
    // The last poll that found it active was at 90 s; the cooldown does not wait for the stabilization.
    assert_eq!([replicas[&150], replicas[&160]], [7, 0]);
}

#[test]
fn no_data_is_zero_unless_it_is_not_to_be_ignored() {
    let queue = |second| (second < 100).then_some(30.0);
    let spec = "  minReplicaCount: 1\n  maxReplicaCount: 8\n";
    let zero = replicas(manifest(spec, ""), 600, 6, queue);
    assert_eq!([zero[&99], zero[&600]], [6, 1], "the fleet is scaled down while it is busy");
    let error = "        ignoreNullValues: \"false\"\n";
    assert_eq!(replicas(manifest(spec, error), 600, 6, queue)[&600], 6);
    let fallback =
        "  minReplicaCount: 1\n  maxReplicaCount: 8\n  fallback: {failureThreshold: 3, replicas: 4}\n";
    let fallen = replicas(manifest(fallback, error), 600, 2, |second| (second < 20).then_some(10.0));
    assert_eq!(fallen[&600], 4);
}

#[test]
fn a_cached_metric_is_what_the_operator_saw_at_its_last_poll() {
    let spec = "  pollingInterval: 60\n  minReplicaCount: 1\n  maxReplicaCount: 8\n";
    let queue = |second| Some(if second > 60 { 20.0 } else { 5.0 });
    let fresh = replicas(manifest(spec, ""), 200, 1, queue);
    assert_eq!([fresh[&74], fresh[&75]], [1, 4]);
    let cached = replicas(manifest(spec, "      useCachedMetrics: true\n"), 200, 1, queue);
    assert_eq!([cached[&75], cached[&119], cached[&120]], [1, 1, 4]);
}

#[test]
fn annotations_pause_what_they_name() {
    let spec = "  pollingInterval: 10\n  cooldownPeriod: 30\n  maxReplicaCount: 8\n";
    let run = |annotations: &str, from: u32, queue: f64| {
        let manifest = annotated(annotations, spec, "");
        replicas(manifest, 600, from, |_| Some(queue))[&600]
    };
    assert_eq!([run("", 2, 40.0), run("", 2, 0.0), run("", 0, 40.0)], [8, 0, 8]);
    let paused = "autoscaling.keda.sh/paused: \"true\"";
    assert_eq!([run(paused, 2, 40.0), run(paused, 2, 0.0), run(paused, 0, 40.0)], [2, 2, 0]);
    assert_eq!(run("autoscaling.keda.sh/paused: \"false\"", 2, 40.0), 8);
    let there = "autoscaling.keda.sh/paused-replicas: \"3\"";
    assert_eq!([run(there, 2, 40.0), run(there, 8, 0.0), run(there, 0, 0.0)], [3, 3, 3]);
    let scale_in = "autoscaling.keda.sh/paused-scale-in: \"true\"";
    assert_eq!([run(scale_in, 2, 40.0), run(scale_in, 5, 0.0), run(scale_in, 5, 10.0)], [8, 5, 5]);
    let scale_out = "autoscaling.keda.sh/paused-scale-out: \"true\"";
    assert_eq!([run(scale_out, 2, 40.0), run(scale_out, 2, 0.0), run(scale_out, 0, 40.0)], [2, 0, 0]);
    let forced = "autoscaling.keda.sh/force-activation: \"true\"";
    assert_eq!([run(forced, 0, 0.0), run(forced, 5, 0.0)], [1, 1]);
}

/// The manifest that is shipped, with the adapter's rules that are shipped beside it.
#[test]
fn an_autoscaler_on_a_metric_of_pods_sees_what_the_adapter_offers() {
    let folder =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/kustomize/components/hpa");
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let adapter = Adapter::parse(&text("adapter-values.yaml")).unwrap();
    assert!(adapter.query("another").unwrap_err().to_string().contains("offered: held_requests"));
    let manifest = Manifest::parse_with(&text("hpa.yaml"), &adapter).unwrap();
    assert!(Manifest::parse(&text("hpa.yaml")).unwrap_err().to_string().contains("held_requests"));

    let (mut autoscaler, mut store) = (Autoscaler::new(manifest), SampleStore::default());
    let mut record = |seconds: u64, pod: &str, running: f64, waiting: f64| {
        let labels = [("namespace", "servelab"), ("pod", pod)];
        for (name, value) in [("running", running), ("waiting", waiting)] {
            let name = format!("servelab_num_requests_{name}");
            store.record(Duration::from_secs(seconds), pod, &name, &labels, value);
        }
    };
    record(10, "a", 4.0, 8.0);
    record(10, "b", 4.0, 0.0);
    // One that is going does not count.
    record(10, "gone", 100.0, 100.0);
    let pods = |existing: u32, running: &[&str]| PodCounts {
        wanted: existing,
        existing,
        running: running.iter().map(|&pod| pod.to_owned()).collect(),
        ..PodCounts::default()
    };
    let at = Duration::from_secs(15);
    let scaled = autoscaler.tick(at, &store, &pods(2, &["a", "b"])).unwrap();
    assert_eq!(scaled.replicas, 4, "16 in two pods, 4 for each: {}", scaled.reason);
    let waits = autoscaler.tick(2 * at, &store, &pods(4, &["a", "b"]));
    assert_eq!(waits, None, "two more are on their way");
    assert_eq!(autoscaler.new_complaint(at, &store), None);
    let empty = SampleStore::default();
    assert!(autoscaler.new_complaint(at, &empty).unwrap().contains("no pod has the metric"));
}

#[test]
fn rules_of_the_adapter_that_cannot_be_simulated_are_refused_by_name() {
    let resources = "resources: {overrides: {namespace: {resource: namespace}, pod: {resource: pod}}}";
    for (text, part) in [
        ("rules: {custom: []}".to_owned(), "rules.default is true"),
        ("a: 1".to_owned(), "rules"),
        (
            format!("rules: [{{seriesQuery: '{{a=\"b\"}}', {resources}, metricsQuery: a}}]"),
            "name of a metric",
        ),
        (
            "rules: [{seriesQuery: a, resources: {overrides: {}}, metricsQuery: a}]".to_owned(),
            "namespace and pod",
        ),
        (
            format!("rules: [{{seriesQuery: a, {resources}, name: {{matches: '('}}, metricsQuery: a}}]"),
            "name.matches",
        ),
    ] {
        let error = Adapter::parse(&text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let of = |query: &str| {
        let rule = "name: {matches: '^(.*)_total$'}";
        let text = format!("rules: [{{seriesQuery: a_total, {resources}, {rule}, metricsQuery: '{query}'}}]");
        Adapter::parse(&text).unwrap().query("a")
    };
    let query = of("sum(rate(<<.Series>>{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>)").unwrap();
    assert_eq!(query.text(), "sum(rate(a_total{namespace=\"servelab\"}[1m])) by (pod)");
    assert!(of("<<.LabelValuesByName>>").unwrap_err().to_string().contains("LabelValuesByName"));
    assert!(of("sum(").unwrap_err().to_string().contains("metricsQuery"));
}

#[test]
fn manifests_that_cannot_be_simulated_are_refused_by_name() {
    let refusal = |text: &str| Manifest::parse(text).unwrap_err().to_string();
    let object = |spec: &str| {
        format!(
            "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata: {{name: a}}\nspec:\n  scaleTargetRef: {{name: b}}\n{spec}"
        )
    };
    for (spec, part) in [
        ("  triggers: [{type: kafka, metadata: {}}]\n", "triggers[0].type is kafka"),
        ("  triggers: []\n", "triggers is empty"),
        ("  jobTargetRef: {}\n  triggers: []\n", "jobTargetRef"),
        ("  minReplicaCount: 9\n  maxReplicaCount: 3\n  triggers: []\n", "minReplicaCount is 9"),
        ("  triggers: [{type: prometheus, metadata: {query: a}}]\n", "threshold is missing"),
        ("  triggers: [{type: prometheus, metadata: {query: a, threshold: \"0\"}}]\n", "threshold is 0"),
        ("  triggers: [{type: prometheus, metadata: {query: \"a[\", threshold: \"1\"}}]\n", "metadata.query"),
        (
            "  triggers: [{type: cpu, metricType: Utilization, metadata: {value: \"80\"}}]\n",
            "minReplicaCount is 0",
        ),
    ] {
        let error = refusal(&object(spec));
        assert!(error.contains(part), "{spec}: {error}");
    }
    let annotated = |annotation: &str| {
        let annotations = format!("metadata: {{name: a, annotations: {{{annotation}}}}}");
        refusal(&object("  triggers: []\n").replace("metadata: {name: a}", &annotations))
    };
    assert!(annotated("autoscaling.keda.sh/other: \"1\"").contains("autoscaling.keda.sh/other is 1"));
    assert!(annotated("autoscaling.keda.sh/paused: \"yes\"").contains("paused is \"yes\""));
    assert!(annotated("autoscaling.keda.sh/paused-replicas: many").contains("paused-replicas is \"many\""));
    assert!(refusal("kind: Deployment\n").contains("Deployment"));
    assert!(refusal("a: [").contains("no manifest"));
}

/// Every ScaledObject that is shipped, the broken ones too: what is wrong with them shows when they run.
#[test]
fn the_shipped_manifests_can_be_read() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let mut read = 0;
    for folder in ["keda", "keda/broken", "kustomize/components/keda"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let text = if path.is_file() { std::fs::read_to_string(&path).unwrap() } else { String::new() };
            if text.contains("kind: ScaledObject") {
                Manifest::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                read += 1;
            }
        }
    }
    assert!(read >= 9, "{read} manifests");
}
