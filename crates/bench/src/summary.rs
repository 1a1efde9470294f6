//! A result as text: what a terminal shows after a run.

use std::fmt::Write;

use crate::definitions::DEFINITIONS;
use crate::result::{
    ArrivalClock, BenchResult, Distribution, Header, Metrics, Point, PromptForm, Repeat, Search, TargetInfo,
};

/// Columns of the text.
const WIDTH: usize = 100;
/// Faults shown: most often every repeat has the same.
const MAX_FAULTS: usize = 3;

/// The whole text, with the definitions of its words.
pub fn text(result: &BenchResult) -> String {
    let mut out = header(&result.header);
    if let [point] = &result.points[..] {
        out += &single(point);
    } else {
        out += &ladder(&result.points);
    }
    for point in &result.points {
        out += &limits(point);
    }
    if let Some(found) = &result.search {
        out += &search(found);
    }
    out += &failures(&result.points);
    out += &faults(result);
    out += "\nDefinitions\n";
    for (word, meaning) in DEFINITIONS {
        out += &wrapped(&format!("  {word:<15}"), meaning);
    }
    out
}

/// A paragraph with `label` in front of it and its lines aligned behind.
fn wrapped(label: &str, text: &str) -> String {
    let indent = label.chars().count() + 1;
    let mut out = label.to_owned();
    let mut column = indent - 1;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column + 1 + length > WIDTH && column > indent {
            out += &format!("\n{:indent$}", "");
            column = indent;
        } else {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += length;
    }
    out + "\n"
}

fn header(header: &Header) -> String {
    let mut out = String::new();
    let place = match &header.target {
        TargetInfo::Http { url, endpoint, .. } => format!("{} at {url}{}", header.model.id, endpoint.path()),
        TargetInfo::Offline { .. } => format!("{} in this process, without HTTP", header.model.id),
    };
    out += &wrapped("Target   ", &place);
    if let Some(hardware) = &header.hardware {
        out += &wrapped("Hardware ", hardware);
    }
    let workload = &header.workload;
    let settings: Vec<String> =
        workload.settings.iter().map(|(name, value)| format!("{} {value}", name.replace('_', " "))).collect();
    let form = match workload.prompt_form {
        PromptForm::TokenIds => "prompts as token ids",
        PromptForm::Words => "prompts as words of one token each",
        PromptForm::EstimatedWords => "prompts as words, their lengths estimated",
        PromptForm::Given => "prompts as given",
    };
    let salted =
        if workload.salted { "salted" } else { "NOT salted: may measure the cache of an earlier run" };
    let temperature =
        workload.temperature.map_or("the server's temperature".into(), |t| format!("temperature {t}"));
    let eos = if workload.ignore_eos { ", ignore_eos" } else { "" };
    let mut parts = vec![workload.name.clone()];
    parts.extend(settings);
    out += &wrapped(
        "Workload ",
        &format!("{}; seed {}, {salted}; {form}; {temperature}{eos}", parts.join(", "), workload.seed),
    );
    if let Some(slo) = &header.slo {
        out += &wrapped("SLO      ", &slo.to_string());
    }
    out
}

fn single(point: &Point) -> String {
    let metrics = &point.metrics;
    let mut out = wrapped("Load     ", &load(point));
    out += "\n";
    let mut completed = format!("{} of {} completed", metrics.completed, metrics.requests);
    if metrics.cut > 0 {
        let _ = write!(completed, ", {} given up when the run was ended", metrics.cut);
    }
    out += &wrapped("Requests  ", &format!("{completed} in {:.2} s", metrics.duration_seconds));
    let with = |key: &str, value: f64, unit: &str| match point.intervals.get(key) {
        Some(interval) => format!("{} +/- {} {unit}", number(value), number(interval.half_width)),
        None => format!("{} {unit}", number(value)),
    };
    let rates = [
        with("request_throughput", metrics.request_throughput, "req/s"),
        with("output_throughput", metrics.output_throughput, "output tok/s"),
        with("total_token_throughput", metrics.total_token_throughput, "tok/s in all"),
    ];
    out += &wrapped("Throughput", &rates.join("; "));
    out += &wrapped(
        "In flight ",
        &format!("{} on average, {} at most", number(metrics.mean_in_flight), metrics.peak_in_flight),
    );
    out += &wrapped("Tokens    ", &tokens(metrics));
    if let (Some(goodput), Some(share)) = (metrics.request_goodput, metrics.slo_attainment) {
        let text = format!("{} req/s; {:.2} % of the requests kept the SLO", number(goodput), 100.0 * share);
        out += &wrapped("Goodput   ", &text);
    }
    out += "\n";
    out += &latencies(point);
    out += &checks(point);
    out
}

fn load(point: &Point) -> String {
    let Some(first) = point.repeats.first() else { return point.load.to_string() };
    let sum = |of: fn(&Repeat) -> u64| point.repeats.iter().map(of).sum::<u64>();
    let repeats = point.repeats.len();
    let around = match (sum(|repeat| repeat.warm_up_requests), sum(|repeat| repeat.cool_down_requests)) {
        (0, 0) => "no warm-up, no cool-down".to_owned(),
        (before, after) => format!("{before} requests of warm-up and {after} of cool-down are cut"),
    };
    let measured = first.metrics.requests;
    format!("{}; {repeats} x {measured} requests; {around}", point.load)
}

fn tokens(metrics: &Metrics) -> String {
    let shown = |distribution: &Distribution| {
        format!("{} on average ({} to {})", number(distribution.mean), distribution.min, distribution.max)
    };
    let mut out = format!("in {}; out {}", shown(&metrics.input_tokens), shown(&metrics.output_tokens));
    if metrics.prompt_tokens > 0 {
        let share = 100.0 * metrics.cached_prompt_tokens as f64 / metrics.prompt_tokens as f64;
        let _ = write!(out, "; {share:.1} % of the prompt tokens were cached, by the answers' usage");
    }
    out
}

fn latencies(point: &Point) -> String {
    let metrics = &point.metrics;
    let mut out = format!(
        "{:<16}{:>10}{:>9}{:>10}{:>10}{:>10}{:>10}{:>11}\n",
        "Latency, ms", "mean", "+/-", "p50", "p90", "p95", "p99", "max"
    );
    for (name, key, distribution) in [
        ("TTFT", "ttft", &metrics.ttft_ms),
        ("TTFT from send", "ttft_from_send", &metrics.ttft_from_send_ms),
        ("TPOT", "tpot", &metrics.tpot_ms),
        ("ITL", "itl", &metrics.itl_ms),
        ("E2EL", "e2el", &metrics.e2el_ms),
        ("Client queue", "client_queue_time", &metrics.client_queue_ms),
        ("Send lag", "send_lag", &metrics.send_lag_ms),
    ] {
        if distribution.count == 0 || (key == "client_queue_time" && distribution.max == 0.0) {
            continue;
        }
        let interval = point.intervals.get(&format!("mean_{key}_ms"));
        let half_width = interval.map_or("-".into(), |interval| number(interval.half_width));
        let Distribution { mean, median, p90, p95, p99, max, .. } = distribution;
        let [mean, median, p90, p95, p99, max] =
            [mean, median, p90, p95, p99, max].map(|value| number(*value));
        let _ = writeln!(
            out,
            "{name:<16}{mean:>10}{half_width:>9}{median:>10}{p90:>10}{p95:>10}{p99:>10}{max:>11}"
        );
    }
    if metrics.requests_without_gaps > 0 {
        let text = format!(
            "leaves out {} requests: there were too many gaps to keep",
            metrics.requests_without_gaps
        );
        out += &wrapped("ITL", &text);
    }
    out
}

fn checks(point: &Point) -> String {
    let mut out = String::from("\n");
    let worst = |of: fn(&Repeat) -> f64| point.repeats.iter().map(of).fold(0.0, f64::max);
    let Some(first) = point.repeats.first() else { return out };
    let clock = match first.client.clock {
        ArrivalClock::Kernel => "times of tokens are the kernel's, of the arrival of their packets",
        ArrivalClock::Read => "times of tokens are those of the reads",
        ArrivalClock::Step => "times of tokens are the ends of steps",
    };
    let client = format!(
        "send lag p99 {} ms (limit {}), read lag p99 {} ms; {clock}",
        number(worst(|repeat| repeat.client.send_lag_p99_ms)),
        number(worst(|repeat| repeat.client.send_lag_limit_ms)),
        number(worst(|repeat| repeat.client.read_lag_p99_ms)),
    );
    out += &wrapped("Client    ", &client);
    let little = format!(
        "{} in flight, rate x residence {}; {:.2} % apart at most",
        number(first.littles_law.mean_in_flight),
        number(first.littles_law.rate_times_residence),
        100.0 * worst(|repeat| repeat.littles_law.deviation)
    );
    out += &wrapped("Little    ", &little);
    let deltas: Vec<_> = point.repeats.iter().filter_map(|repeat| repeat.prefix_cache.as_ref()).collect();
    if let Some(delta) = deltas.first() {
        let queries: u64 = deltas.iter().map(|delta| delta.query_tokens).sum();
        let hits: u64 = deltas.iter().map(|delta| delta.hit_tokens).sum();
        let rate = 100.0 * hits as f64 / (queries.max(1)) as f64;
        let text = format!(
            "{}prefix_cache_*: {hits} of {queries} prompt tokens found, {rate:.1} %",
            delta.metrics_prefix
        );
        out += &wrapped("Cache     ", &text);
    }
    out
}

fn ladder(points: &[Point]) -> String {
    let wide =
        points.iter().map(|point| point.load.to_string().chars().count()).max().unwrap_or(0).clamp(12, 34);
    let mut out = format!(
        "\n{:<wide$}{:>9}{:>11}{:>9}{:>10}{:>10}{:>9}{:>9}{:>7}\n",
        "Load", "req/s", "out tok/s", "in fl.", "TTFT p50", "TTFT p99", "TPOT p50", "ITL p99", "failed"
    );
    for point in points {
        let metrics = &point.metrics;
        let load: String = point.load.to_string().chars().take(wide).collect();
        let [rate, output, flight, ttft, ttft_tail, tpot, itl] = [
            metrics.request_throughput,
            metrics.output_throughput,
            metrics.mean_in_flight,
            metrics.ttft_ms.median,
            metrics.ttft_ms.p99,
            metrics.tpot_ms.median,
            metrics.itl_ms.p99,
        ]
        .map(number);
        let failed = metrics.failed;
        let _ = writeln!(
            out,
            "{load:<wide$}{rate:>9}{output:>11}{flight:>9}{ttft:>10}{ttft_tail:>10}{tpot:>9}{itl:>9}{failed:>7}"
        );
    }
    out
}

fn limits(point: &Point) -> String {
    let Some(limits) = &point.limits else { return String::new() };
    let mut out = format!("\nLimits of {} on {}, {}\n", limits.model, limits.hardware, point.load);
    for row in &limits.rows {
        let (bound, distance) = match row.is_floor {
            true => ("at least", format!("{} x the floor", number(row.measured / row.limit))),
            false => ("at most", format!("{:.1} % of the ceiling", 100.0 * row.measured / row.limit)),
        };
        let flag = if row.beaten { "  FASTER THAN PHYSICS" } else { "" };
        let (measured, limit) = (number(row.measured), number(row.limit));
        let text = format!("measured {measured}, {bound} {limit} ({distance}){flag}: {}", row.because);
        out += &wrapped(&format!("  {:<20}", row.metric), &text);
    }
    out
}

fn search(search: &Search) -> String {
    let mut out = String::from("\nSearch for the highest rate that keeps the SLO\n");
    for trial in &search.trials {
        let kept = if trial.kept { "kept" } else { "BROKEN" };
        out += &wrapped(&format!("  {:>10.4} req/s  {kept:<7}", trial.rate), &trial.reason);
    }
    let best = search.best_rate.map_or("no rate kept the SLO".into(), |rate| format!("{rate:.4} req/s"));
    out += &wrapped("  Highest: ", &format!("{best}; ended because {}", search.ended));
    out += &wrapped("  Rule:    ", &search.stopping_rule);
    out
}

fn failures(points: &[Point]) -> String {
    let mut out = String::new();
    for point in points {
        for repeat in &point.repeats {
            for failure in &repeat.failures {
                let text = format!(
                    "{} x {} ({} of them measured), for example: {}",
                    failure.all, failure.name, failure.measured, failure.example
                );
                out += &wrapped(&format!("  {}, repeat {}:", point.load, repeat.repeat), &text);
            }
        }
    }
    if out.is_empty() { out } else { format!("\nFailures\n{out}") }
}

fn faults(result: &BenchResult) -> String {
    let faults = result.faults();
    if faults.is_empty() {
        return String::new();
    }
    let mut lines: String = faults.iter().take(MAX_FAULTS).map(|fault| wrapped("  !", fault)).collect();
    if let Some(more) = faults.len().checked_sub(MAX_FAULTS).filter(|more| *more > 0) {
        lines += &format!("  ! and {more} more\n");
    }
    format!("\nDo not quote these figures\n{lines}")
}

/// Three significant digits and more, without an exponent.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        below if below < 0.001 => "<0.001".into(),
        below if below < 10.0 => format!("{value:.3}"),
        below if below < 100.0 => format!("{value:.2}"),
        below if below < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_wrapped_and_aligned() {
        let text = wrapped("  label:", &"word ".repeat(60));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() > 2 && lines.iter().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(lines[0].starts_with("  label: word") && lines[1].starts_with("         word"), "{text}");
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (value, shown) in [
            (0.0, "0"),
            (0.0004, "<0.001"),
            (1.2345, "1.234"),
            (12.345, "12.35"),
            (123.45, "123.5"),
            (12345.6, "12346"),
        ] {
            assert_eq!(number(value), shown);
        }
    }
}
