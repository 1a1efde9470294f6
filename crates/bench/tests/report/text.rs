//! The Markdown report, and the comparison of two results.

use servelab_bench::compare::{Obstacle, Verdict, compare};
use servelab_bench::report;
use servelab_bench::result::BenchResult;

use crate::fixture::{self, HOSTILE};

#[test]
fn the_markdown_says_what_the_page_says() {
    let (result, details) = fixture::ladder(4);
    insta::assert_snapshot!(report::markdown(&result, &details));
}

#[test]
fn hostile_texts_do_not_become_markdown() {
    let (result, details) = fixture::hostile();
    let text = report::markdown(&result, &details);
    assert!(!text.contains('<') && !text.contains("\n| a |"), "{text}");
    // A row has as many cells as its header.
    let cells = |line: &str| line.replace("\\|", "").matches('|').count();
    let tables = text.split("\n\n").filter(|block| block.starts_with('|'));
    for table in tables {
        let widths: Vec<usize> = table.lines().map(cells).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    }
    assert!(text.contains("onerror") && HOSTILE.contains("onerror"));
}

fn changed(change: impl Fn(&mut BenchResult)) -> BenchResult {
    let (mut result, _) = fixture::ladder(2);
    change(&mut result);
    result
}

#[test]
fn a_result_is_within_noise_of_itself() {
    let (result, _) = fixture::ladder(2);
    let comparison = compare(&result, &result);
    assert_eq!(
        (comparison.obstacles.len(), comparison.differences.len(), comparison.levels.len()),
        (0, 0, 2)
    );
    for row in comparison.levels.iter().flat_map(|level| &level.rows) {
        assert_eq!((row.ratio.unwrap().ratio, row.verdict), (1.0, Verdict::WithinNoise), "{row:?}");
    }
}

#[test]
fn what_makes_two_results_incomparable_is_named() {
    let (a, _) = fixture::ladder(2);
    type Change = (&'static str, fn(&mut BenchResult));
    let changes: [Change; 8] = [
        ("model", |b| b.header.model.id = "other".into()),
        ("number format", |b| b.header.model.dtype = None),
        ("hardware", |b| b.header.hardware = Some("L4".into())),
        ("GPUs of a replica", |b| b.header.gpus = Some(2)),
        ("workload's input tokens", |b| {
            b.header.workload.settings.insert("input_tokens".into(), "7".into());
        }),
        ("seed", |b| b.header.workload.seed = 9),
        ("machine of the load generator", |b| b.header.client.cores = 1),
        ("salt", |b| b.header.workload.salted = false),
    ];
    for (what, change) in changes {
        let obstacles = compare(&a, &changed(change)).obstacles;
        let [Obstacle::Differs(difference)] = &obstacles[..] else { panic!("{what}: {obstacles:?}") };
        assert_eq!(difference.what, what);
    }
    let faulty = changed(|b| b.points[0].repeats[0].client.bound = Some("late".into()));
    assert!(matches!(&compare(&a, &faulty).obstacles[..], [Obstacle::Faulty { side: 'B', .. }]));
    let other_load = changed(|b| b.points.clear());
    assert_eq!(compare(&a, &other_load).obstacles, [Obstacle::NoCommonLoad]);
}

#[test]
fn a_comparison_as_text() {
    let (a, _) = fixture::ladder(2);
    let b = changed(|b| {
        b.header.metadata.insert("clocks".into(), "1410 MHz".into());
        b.points.pop();
        let point = &mut b.points[0];
        for (key, interval) in &mut point.intervals {
            interval.mean *= if key.ends_with("_ms") { 1.2 } else { 0.8 };
        }
        point.metrics.failed = 2;
    });
    insta::assert_snapshot!(compare(&a, &b).text(["before", "after"]));
}
