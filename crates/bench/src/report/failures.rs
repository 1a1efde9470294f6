//! What failed, by class.

use std::collections::BTreeMap;

use super::document::{Bar, Cell, Column, Section, Table, Tone};
use super::number::{count, percent};
use crate::result::BenchResult;

/// Longest example that is shown.
const MAX_EXAMPLE_CHARS: usize = 300;

pub fn section(result: &BenchResult) -> Section {
    let mut section = Section::new("failures", "Failures");
    let (failed, requests) = result.points.iter().fold((0, 0), |(failed, requests), point| {
        (failed + point.metrics.failed, requests + point.metrics.requests)
    });
    section.text(match failed {
        0 => format!("None of the {} measured requests failed.", count(requests)),
        failed => format!(
            "{} of {} measured requests failed. They stay in the denominators, and have no latency.",
            count(failed),
            count(requests)
        ),
    });
    section.bars(bars(result));
    section.table(table(result));
    section
}

fn bars(result: &BenchResult) -> Vec<Bar> {
    let mut classes: BTreeMap<&str, u64> = BTreeMap::new();
    let repeats = result.points.iter().flat_map(|point| &point.repeats);
    for failure in repeats.flat_map(|repeat| &repeat.failures) {
        *classes.entry(&failure.name).or_default() += failure.all;
    }
    let most = classes.values().copied().max().unwrap_or(0).max(1);
    let total: u64 = classes.values().sum();
    let mut classes: Vec<(&str, u64)> = classes.into_iter().collect();
    classes.sort_by_key(|(_, amount)| std::cmp::Reverse(*amount));
    let bar = |(name, amount): (&str, u64)| {
        let text =
            format!("{} ({} of the failures)", count(amount), percent(amount as f64 / total.max(1) as f64));
        Bar::new(name, amount as f64 / most as f64, text, Tone::Bad)
    };
    classes.into_iter().map(bar).collect()
}

fn table(result: &BenchResult) -> Table {
    let mut table = Table {
        caption: "All phases; the examples are what the first of each said.".into(),
        columns: vec![
            Column::text("Load"),
            Column::number("repeat"),
            Column::text("class"),
            Column::number("measured"),
            Column::number("all"),
            Column::text("example"),
        ],
        rows: Vec::new(),
    };
    for point in &result.points {
        for repeat in &point.repeats {
            for failure in &repeat.failures {
                let mut example: String = failure.example.chars().take(MAX_EXAMPLE_CHARS).collect();
                if example.len() < failure.example.len() {
                    example.push_str(" ...");
                }
                table.rows.push(vec![
                    Cell::from(point.load.to_string()),
                    repeat.repeat.to_string().into(),
                    failure.name.clone().into(),
                    count(failure.measured).into(),
                    count(failure.all).into(),
                    example.into(),
                ]);
            }
        }
    }
    table
}
