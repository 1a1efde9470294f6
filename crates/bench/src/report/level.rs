//! One level of load in full: the summary, its repeats, and the pictures of the repeat that stands for it.

use super::details::Details;
use super::document::{Cell, Column, Fact, Section, Table, Tone};
use super::number::{self, count, percent};
use super::{distributions, over_time, timeline};
use crate::result::{BenchResult, Distribution, Metrics, Point, Repeat};

/// Levels that are shown in full. More would make the file large and nobody look at it.
pub const MAX_SHOWN: usize = 12;

/// The levels that are shown in full: the best, the first, the last and some between.
pub fn in_full(result: &BenchResult) -> Vec<usize> {
    let mut numbers = evenly(result.points.len(), MAX_SHOWN);
    numbers.extend((0..result.points.len()).find(|number| is_best(result, *number)));
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Whether it is the level that stands for the whole.
pub fn is_best(result: &BenchResult, number: usize) -> bool {
    result.best_point().is_some_and(|best| std::ptr::eq(best, &result.points[number]))
}

/// At most `most` of the numbers below `count`, the first and the last among them.
fn evenly(count: usize, most: usize) -> Vec<usize> {
    if count <= most {
        return (0..count).collect();
    }
    (0..most).map(|at| at * (count - 1) / (most - 1).max(1)).collect()
}

/// Of the link to the section of a level.
pub fn id(number: usize) -> String {
    format!("level-{number}")
}

/// Of the point with that number.
pub fn section(point: &Point, number: usize, details: &Details) -> Section {
    let mut section = Section::new(id(number), format!("Load: {}", point.load));
    section.facts(facts(point));
    section.table(latencies(point));
    let samples = details.samples(number);
    section.figures(
        [
            distributions::figure("TTFT", &point.metrics.ttft_ms, samples.map(|samples| &samples.ttft)),
            distributions::figure("ITL", &point.metrics.itl_ms, samples.map(|samples| &samples.itl)),
        ]
        .into_iter()
        .flatten(),
    );
    section.table(repeats(point));
    if let Some(repeat) = typical(&point.repeats) {
        if point.repeats.len() > 1 {
            section.text(format!(
                "Below is repeat {}, whose throughput is the median of the {}.",
                repeat.repeat,
                point.repeats.len()
            ));
        }
        section.figures(timeline::figure(details, number, repeat));
        section.figures(over_time::figures(point, repeat));
    }
    section
}

/// The repeat whose throughput is the median, of those that were not cut short if there are any.
pub fn typical(repeats: &[Repeat]) -> Option<&Repeat> {
    let is_whole = |repeat: &&Repeat| !repeat.interrupted && repeat.metrics.completed > 0;
    let mut whole: Vec<&Repeat> = repeats.iter().filter(is_whole).collect();
    whole.sort_by(|a, b| a.metrics.output_throughput.total_cmp(&b.metrics.output_throughput));
    whole.get(whole.len().saturating_sub(1) / 2).copied().or(repeats.first())
}

/// A pooled figure with the interval of its mean over the repeats.
fn with_interval(point: &Point, key: &str, value: f64, unit: &str) -> String {
    match point.intervals.get(key) {
        Some(interval) => {
            format!("{} +/- {} {unit}", number::shown(value), number::shown(interval.half_width))
        }
        None => format!("{} {unit}", number::shown(value)),
    }
}

fn facts(point: &Point) -> Vec<Fact> {
    let metrics = &point.metrics;
    let mut facts = vec![
        Fact::new("requests", requests(point)),
        Fact::new(
            "request throughput",
            with_interval(point, "request_throughput", metrics.request_throughput, "requests/s"),
        ),
        Fact::new("output throughput", output(point)),
        Fact::new(
            "total throughput",
            with_interval(
                point,
                "total_token_throughput",
                metrics.total_token_throughput,
                "tokens/s, in and out",
            ),
        ),
        Fact::new(
            "in flight",
            format!(
                "{} on average, {} at most",
                number::shown(metrics.mean_in_flight),
                count(u64::from(metrics.peak_in_flight))
            ),
        ),
        Fact::new("tokens of a request", tokens(metrics)),
    ];
    if metrics.prompt_tokens > 0 {
        let share = metrics.cached_prompt_tokens as f64 / metrics.prompt_tokens as f64;
        facts.push(Fact::new(
            "cached",
            format!("{} of the prompt tokens, by the answers' usage", percent(share)),
        ));
    }
    if let (Some(goodput), Some(share)) = (metrics.request_goodput, metrics.slo_attainment) {
        let goodput = with_interval(point, "request_goodput", goodput, "requests/s");
        facts.push(Fact::new(
            "goodput",
            format!("{goodput}; {} of the requests kept the SLO", percent(share)),
        ));
    }
    facts
}

fn requests(point: &Point) -> String {
    let metrics = &point.metrics;
    let sum = |of: fn(&Repeat) -> u64| point.repeats.iter().map(of).sum::<u64>();
    let mut out = format!("{} of {} completed", count(metrics.completed), count(metrics.requests));
    if metrics.cut > 0 {
        out += &format!(", {} given up when the run was ended", count(metrics.cut));
    }
    out += &format!(
        "; {} in {} s; {} requests of warm-up and {} of cool-down are cut",
        match point.repeats.len() {
            1 => "1 repeat".to_owned(),
            repeats => format!("{repeats} repeats"),
        },
        number::shown(metrics.duration_seconds),
        count(sum(|repeat| repeat.warm_up_requests)),
        count(sum(|repeat| repeat.cool_down_requests))
    );
    out
}

fn output(point: &Point) -> String {
    let metrics = &point.metrics;
    let mean = with_interval(point, "output_throughput", metrics.output_throughput, "tokens/s");
    format!("{mean}; {} in the best second", number::shown(metrics.peak_output_tokens_per_second))
}

fn tokens(metrics: &Metrics) -> String {
    let one = |tokens: &Distribution| match tokens.min == tokens.max {
        true => number::shown(tokens.mean),
        false => format!("{} on average ({} to {})", number::shown(tokens.mean), tokens.min, tokens.max),
    };
    format!("in {}; out {}", one(&metrics.input_tokens), one(&metrics.output_tokens))
}

fn latencies(point: &Point) -> Table {
    let metrics = &point.metrics;
    let numbers = ["mean", "+/-", "p50", "p90", "p95", "p99", "p99.9", "max"].map(Column::number);
    let mut table = Table {
        caption: "Latencies in milliseconds, of the requests that completed.".into(),
        columns: std::iter::once(Column::text("ms")).chain(numbers).collect(),
        rows: Vec::new(),
    };
    for (name, key, values) in [
        ("TTFT", "ttft", &metrics.ttft_ms),
        ("TTFT from send", "ttft_from_send", &metrics.ttft_from_send_ms),
        ("TPOT", "tpot", &metrics.tpot_ms),
        ("ITL", "itl", &metrics.itl_ms),
        ("E2EL", "e2el", &metrics.e2el_ms),
        ("client queue", "client_queue_time", &metrics.client_queue_ms),
        ("send lag", "send_lag", &metrics.send_lag_ms),
        ("connect", "", &metrics.connect_ms),
    ] {
        let is_idle = key == "client_queue_time" && values.max == 0.0;
        if values.count == 0 || is_idle {
            continue;
        }
        let interval = point.intervals.get(&format!("mean_{key}_ms"));
        let half_width = interval.map_or("-".into(), |interval| number::shown(interval.half_width));
        let Distribution { mean, median, p90, p95, p99, p99_9, max, .. } = values;
        let mut row = vec![Cell::term(name), number::shown(*mean).into(), half_width.into()];
        row.extend([median, p90, p95, p99, p99_9, max].map(|value| Cell::from(number::shown(*value))));
        table.rows.push(row);
    }
    table
}

/// The repeats beside each other, with what speaks for and against each.
fn repeats(point: &Point) -> Table {
    let columns = [
        "repeat",
        "req/s",
        "out tok/s",
        "TTFT p50, ms",
        "TTFT p99, ms",
        "TPOT p50, ms",
        "ITL p99, ms",
        "failed",
    ];
    let mut table = Table {
        caption: "Repeats, each a run of its own.".into(),
        columns: columns.into_iter().map(Column::number).chain([Column::text("verdict")]).collect(),
        rows: Vec::new(),
    };
    for repeat in &point.repeats {
        let metrics = &repeat.metrics;
        let mut row = vec![Cell::from(repeat.repeat.to_string())];
        row.extend(
            [
                metrics.request_throughput,
                metrics.output_throughput,
                metrics.ttft_ms.median,
                metrics.ttft_ms.p99,
                metrics.tpot_ms.median,
                metrics.itl_ms.p99,
            ]
            .map(|value| Cell::from(number::shown(value))),
        );
        row.push(count(metrics.failed).into());
        row.push(verdict(repeat));
        table.rows.push(row);
    }
    table
}

fn verdict(repeat: &Repeat) -> Cell {
    let faults = repeat.faults();
    match (faults.is_empty(), repeat.interrupted) {
        (true, false) => Cell::toned("sound", Tone::Good),
        (true, true) => Cell::from("ended early"),
        (false, _) => Cell::toned(faults.join("; "), Tone::Bad),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_many_levels_are_shown() {
        assert_eq!(evenly(3, 12), [0, 1, 2]);
        assert_eq!(evenly(100, 4), [0, 33, 66, 99]);
    }
}
