//! What a run gave, as a table for a terminal.

use servelab_bench::report::number;

use crate::outcome::Outcome;

/// Titles, and whether they stand above numbers.
pub const COLUMNS: [(&str, bool); 13] = [
    ("scaler", false),
    ("requests", true),
    ("failed", true),
    ("within SLO", true),
    ("TTFT p50, s", true),
    ("TTFT p95, s", true),
    ("TTFT p99, s", true),
    ("TPOT p50, ms", true),
    ("replicas, mean", true),
    ("most", true),
    ("turns", true),
    ("GPU-hours", true),
    ("dollars", true),
];

/// One for each of [`COLUMNS`].
pub fn cells(outcome: &Outcome) -> Vec<String> {
    let ttft = outcome.ttft_seconds;
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number::shown);
    vec![
        outcome.scaler.clone(),
        number::count(outcome.requests),
        number::count(outcome.failed()),
        number::percent(outcome.good_share),
        seconds(ttft.map(|ttft| ttft.p50)),
        seconds(ttft.map(|ttft| ttft.p95)),
        seconds(ttft.map(|ttft| ttft.p99)),
        seconds(outcome.tpot_seconds.map(|tpot| tpot.p50 * 1e3)),
        number::shown(outcome.mean_ready),
        outcome.most_ready.to_string(),
        outcome.turns.to_string(),
        number::shown(outcome.gpu_hours),
        number::shown(outcome.dollars),
    ]
}

/// The table, then what was broken and why requests failed.
pub fn table(outcomes: &[Outcome]) -> String {
    let titles: Vec<String> = COLUMNS.iter().map(|(title, _)| (*title).to_owned()).collect();
    let rows: Vec<Vec<String>> = [titles].into_iter().chain(outcomes.iter().map(cells)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let mut lines: Vec<String> = rows.iter().map(|row| line(row, &widths)).collect();
    for outcome in outcomes {
        lines.push(String::new());
        lines.push(format!("{}:", outcome.scaler));
        for limit in &outcome.slo {
            let word = if limit.is_kept { "kept" } else { "broken" };
            lines.push(format!("  {} {word}: {} within", limit.limit, number::percent(limit.share)));
        }
        lines.push(format!(
            "  cache hits {} of the prompt tokens, {} preemptions, {} retries, {} pods started",
            number::percent(outcome.hit_rate),
            number::count(outcome.preemptions),
            number::count(outcome.retries),
            number::count(outcome.pods_started)
        ));
        let failures = outcome.failures.iter();
        let failures: Vec<String> = failures
            .map(|(failure, count)| format!("{} {}", number::count(*count), failure.name()))
            .collect();
        if !failures.is_empty() {
            lines.push(format!("  failed: {}", failures.join(", ")));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn line(row: &[String], widths: &[usize]) -> String {
    let cells = row.iter().zip(widths).zip(COLUMNS).map(|((cell, width), (_, is_number))| match is_number {
        true => format!("{cell:>width$}"),
        false => format!("{cell:<width$}"),
    });
    cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
}
