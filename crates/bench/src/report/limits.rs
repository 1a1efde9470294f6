//! Measured against what the hardware allows, with a flag where physics is broken.

use super::document::{Bar, Cell, Column, Section, Table, Tone};
use super::number::{percent, shown};
use crate::result::{BenchResult, LimitRow, Point};

pub fn section(result: &BenchResult) -> Section {
    let mut section = Section::new("limits", "Measured against the limit");
    let known: Vec<(&Point, &LimitRow)> = result
        .points
        .iter()
        .flat_map(|point| {
            point.limits.iter().flat_map(move |limits| limits.rows.iter().map(move |row| (point, row)))
        })
        .collect();
    let Some(limits) = result.points.iter().find_map(|point| point.limits.as_ref()) else {
        section.text(
            "No limits are known: say which hardware serves which model (--hardware, --model-shape) to see what \
             physics allows beside what was measured.",
        );
        return section;
    };
    section.text(format!(
        "{} on {}, by the roofline: a step reads the weights and the keys and values of its sequences, and computes \
         its products; it takes at least as long as the slower of the two. 100 % is the limit. A figure beyond it is \
         wrong, or the stated hardware or model is.",
        limits.model, limits.hardware
    ));
    let best = result.best_point();
    if let Some(best) = best.filter(|_| result.points.len() > 1) {
        section.text(format!("At the level with the highest throughput, {}:", best.load));
    }
    let of_best = known.iter().filter(|(point, _)| best.is_some_and(|best| std::ptr::eq(*point, best)));
    section.bars(of_best.map(|(_, row)| bar(row)).collect());
    section.table(table(&known));
    section
}

/// How much of the possible was reached: 1 is the limit.
pub fn share(row: &LimitRow) -> f64 {
    if row.is_floor { row.limit / row.measured } else { row.measured / row.limit }
}

/// What the metrics of limits are called.
pub fn name(metric: &str) -> &str {
    match metric {
        "median_tpot_ms" => "TPOT p50",
        "mean_ttft_ms" => "TTFT mean",
        "output_throughput" => "output tokens/s",
        other => other,
    }
}

fn bar(row: &LimitRow) -> Bar {
    let flag = if row.beaten { ", FASTER THAN PHYSICS" } else { "" };
    let tone = if row.beaten { Tone::Bad } else { Tone::Plain };
    Bar::new(name(&row.metric), share(row), format!("{} of the limit{flag}", percent(share(row))), tone)
}

fn table(known: &[(&Point, &LimitRow)]) -> Table {
    let mut table = Table {
        caption: "Floors bound latencies from below, ceilings bound throughput from above.".into(),
        columns: vec![
            Column::text("Load"),
            Column::text("figure"),
            Column::number("measured"),
            Column::number("limit"),
            Column::number("of the limit"),
            Column::text("why"),
        ],
        rows: Vec::new(),
    };
    for (point, row) in known {
        let bound = if row.is_floor { "at least" } else { "at most" };
        let of_limit = match row.beaten {
            true => Cell::toned(format!("{} FASTER THAN PHYSICS", percent(share(row))), Tone::Bad),
            false => Cell::from(percent(share(row))),
        };
        table.rows.push(vec![
            point.load.to_string().into(),
            Cell::term(name(&row.metric)),
            shown(row.measured).into(),
            format!("{bound} {}", shown(row.limit)).into(),
            of_limit,
            row.because.clone().into(),
        ]);
    }
    table
}
