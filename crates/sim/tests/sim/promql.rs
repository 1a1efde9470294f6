//! The PromQL subset beside the real one: what it says of a set of series is given to `promtool test rules` as what is
//! to be expected.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use servelab_sim::autoscale::SampleStore;
use servelab_sim::autoscale::promql::{Query, Value};

/// Scrape interval of the series below, in seconds.
const INTERVAL: u64 = 15;

/// Name, labels, and the values of one scrape after the other; no value where the target was gone.
struct Series {
    name: &'static str,
    labels: &'static [(&'static str, &'static str)],
    values: Vec<Option<f64>>,
}

fn series() -> Vec<Series> {
    let gauge = |values: &[f64]| values.iter().copied().map(Some).collect::<Vec<_>>();
    let grow = |from: f64, by: f64, count: usize| -> Vec<Option<f64>> {
        (0..count).map(|at| Some(from + by * at as f64)).collect()
    };
    let mut gone = gauge(&[1.0; 10]);
    gone.extend([None; 31]);
    let mut reset = grow(100.0, 7.0, 20);
    reset.extend(grow(0.0, 7.0, 21));
    let of = |name, labels, values| Series { name, labels, values };
    vec![
        of("waiting", &[("instance", "a"), ("model", "m1")], grow(0.0, 0.5, 41)),
        of("waiting", &[("instance", "b"), ("model", "m1")], grow(20.0, -0.25, 41)),
        of("waiting", &[("instance", "c"), ("model", "m2")], grow(3.0, 0.0, 41)),
        of("running", &[("instance", "a"), ("model", "m1")], grow(8.0, 0.0, 41)),
        of("running", &[("instance", "b"), ("model", "m1")], grow(6.0, 0.0, 41)),
        of("gone", &[("instance", "g")], gone),
        of("requests_total", &[("instance", "a")], grow(5.0, 3.0, 41)),
        of("requests_total", &[("instance", "b")], reset),
        of("ttft_bucket", &[("instance", "a"), ("le", "0.1")], grow(0.0, 1.0, 41)),
        of("ttft_bucket", &[("instance", "a"), ("le", "0.5")], grow(0.0, 4.0, 41)),
        of("ttft_bucket", &[("instance", "a"), ("le", "2")], grow(0.0, 5.0, 41)),
        of("ttft_bucket", &[("instance", "a"), ("le", "+Inf")], grow(0.0, 5.5, 41)),
        of("idle_bucket", &[("instance", "a"), ("le", "1")], grow(3.0, 0.0, 41)),
        of("idle_bucket", &[("instance", "a"), ("le", "+Inf")], grow(3.0, 0.0, 41)),
    ]
}

const QUERIES: &[&str] = &[
    "sum(waiting)",
    "waiting",
    "sum by (model) (waiting)",
    "sum without (instance) (waiting)",
    "avg(waiting{model=\"m1\"})",
    "max(waiting) - min(waiting)",
    "count(waiting{instance=~\"a|b\"})",
    "sum(waiting{model=\"none\"})",
    "sum(waiting{model=\"none\"}) or vector(0)",
    "sum(running) + sum(waiting{model=\"none\"}) or vector(0)",
    "(sum(waiting{model=\"none\"}) or vector(0)) + (sum(running) or vector(0))",
    "gone",
    "sum(gone) or vector(7)",
    "waiting > 10",
    "waiting > bool 10",
    "10 < waiting",
    "-sum(running)",
    "rate(requests_total[1m])",
    "sum(rate(requests_total[2m])) * 60",
    "increase(requests_total[5m])",
    "avg_over_time(waiting[1m])",
    "max_over_time(waiting{instance=\"a\"}[2m])",
    "min_over_time(waiting[90s])",
    "sum_over_time(running[1m])",
    "count_over_time(gone[5m])",
    "histogram_quantile(0.95, sum by (le) (rate(ttft_bucket[1m])))",
    "histogram_quantile(0.5, ttft_bucket)",
    "clamp(sum(waiting), 1, 5) + clamp_min(vector(2), 3) + clamp_max(vector(9), 4)",
    "ceil(sum(waiting) / 7) + floor(vector(2.5)) + round(vector(2.5)) + abs(vector(-1))",
    "scalar(sum(running)) * waiting",
    "waiting / on (instance, model) running",
    "waiting - on (instance) running",
    "waiting > on (instance) running",
    "waiting > bool ignoring (model) running",
    "sum by (model) (waiting) / ignoring (instance) sum by (model) (running)",
    "waiting and on (model) running",
    "waiting unless on (model) running",
    "running or on (instance) waiting",
];

fn store() -> SampleStore {
    let mut store = SampleStore::default();
    for Series { name, labels, values } in series() {
        for (at, value) in values.iter().enumerate() {
            let now = Duration::from_secs(at as u64 * INTERVAL);
            match value {
                Some(value) => store.record(now, labels[0].1, name, &labels[1..], *value),
                None if values[at - 1].is_some() => store.target_gone(now, labels[0].1),
                None => {}
            }
        }
    }
    store
}

/// What promtool is to find, in its own notation.
fn expected(value: &Value) -> String {
    let elements = match value {
        Value::Scalar(number) => vec![(String::from("{}"), *number)],
        Value::Vector(elements) => {
            let labels = |labels: &servelab_sim::autoscale::samples::Labels| {
                let pairs = labels.iter().map(|(name, value)| format!("{name}=\"{value}\""));
                format!("{{{}}}", pairs.collect::<Vec<_>>().join(","))
            };
            elements.iter().map(|element| (labels(&element.labels), element.value)).collect()
        }
    };
    let mut text = String::new();
    for (labels, value) in elements {
        let value = if value.is_nan() { ".nan".to_owned() } else { value.to_string() };
        write!(text, "\n          - labels: '{labels}'\n            value: {value}").unwrap();
    }
    if text.is_empty() { " []".to_owned() } else { text }
}

#[test]
fn the_real_prometheus_says_the_same() {
    let store = store();
    let mut text =
        format!("evaluation_interval: {INTERVAL}s\ntests:\n  - interval: {INTERVAL}s\n    input_series:\n");
    for Series { name, labels, values } in series() {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
        let values: Vec<String> = (0..values.len())
            .map(|at| match values[at] {
                Some(value) => value.to_string(),
                None if values[at - 1].is_some() => "stale".to_owned(),
                None => "_".to_owned(),
            })
            .collect();
        writeln!(
            text,
            "      - series: '{name}{{{}}}'\n        values: '{}'",
            labels.join(","),
            values.join(" ")
        )
        .unwrap();
    }
    text.push_str("    promql_expr_test:\n");
    for query in QUERIES {
        // In millionths, since promtool compares to the last bit; and without names, which only selectors keep.
        let compared = format!("round(({query}) * 1000000)");
        // Between scrapes: Prometheus 2 counts a sample at a range's oldest moment, Prometheus 3 and this do not.
        for seconds in [127, 293, 598] {
            let value = Query::parse(&compared).unwrap().at(Duration::from_secs(seconds), &store).unwrap();
            let query = compared.replace('\'', "''");
            writeln!(
                text,
                "      - expr: '{query}'\n        eval_time: {seconds}s\n        exp_samples:{}",
                expected(&value)
            )
            .unwrap();
        }
    }
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("promql.yml");
    std::fs::write(&file, text).unwrap();
    match Command::new("promtool").args(["test", "rules"]).arg(&file).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        }
        Err(error) => eprintln!("NOT CHECKED against a real Prometheus: promtool cannot be run: {error}"),
    }
}
