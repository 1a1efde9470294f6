//! Reports that people show: one HTML file with plots, and the same as Markdown.
//!
//! A result becomes a [`Document`] of sections, and that is written as HTML (`html.rs`) or as Markdown
//! (`markdown.rs`). The pictures are drawn here as SVG (`plot/`). The page loads nothing: style sheet, script and
//! pictures are in the file.

mod checks;
pub mod details;
mod distributions;
pub mod document;
pub mod escape;
mod failures;
mod header;
mod html;
mod level;
mod limits;
mod markdown;
pub mod number;
mod over_time;
pub mod plot;
mod sweep;
mod timeline;

pub use details::Details;
pub use document::Document;

use document::{Fact, Section};

use crate::definitions::DEFINITIONS;
use crate::result::BenchResult;

/// Levels of load that are shown in full. More would make the file large and nobody look at it.
const MAX_LEVELS: usize = 12;

/// `report.html`.
pub fn html(result: &BenchResult, details: &Details) -> String {
    html::page(&document(result, details))
}

/// `report.md`.
pub fn markdown(result: &BenchResult, details: &Details) -> String {
    markdown::text(&document(result, details))
}

/// What both say.
pub fn document(result: &BenchResult, details: &Details) -> Document {
    let mut sections = Vec::new();
    sections.extend(sweep::section(result));
    sections.extend(result.search.as_ref().map(sweep::search_section));
    sections.push(limits::section(result));
    sections.extend(levels(result, details));
    sections.push(failures::section(result));
    sections.push(checks::section(result));
    sections.push(header::section(&result.header));
    sections.push(definitions());
    Document {
        title: header::title(&result.header),
        subtitle: header::subtitle(&result.header),
        verdict: header::verdict(result),
        tiles: header::tiles(result),
        sections,
    }
}

/// The levels in full. Of several, the one with the highest throughput is open, the others are folded.
fn levels(result: &BenchResult, details: &Details) -> Vec<Section> {
    let best = result.best_point();
    let is_best = |number: usize| best.is_some_and(|best| std::ptr::eq(best, &result.points[number]));
    let mut shown = evenly(result.points.len(), MAX_LEVELS);
    let best = (0..result.points.len()).find(|number| is_best(*number));
    if let Some(best) = best.filter(|best| !shown.contains(best)) {
        shown.push(best);
        shown.sort_unstable();
    }
    let section = |number: usize| {
        let mut section = level::section(&result.points[number], number, details);
        section.is_folded = !is_best(number);
        section
    };
    shown.into_iter().map(section).collect()
}

/// At most `most` of the numbers below `count`, the first and the last among them.
fn evenly(count: usize, most: usize) -> Vec<usize> {
    if count <= most {
        return (0..count).collect();
    }
    (0..most).map(|at| at * (count - 1) / (most - 1)).collect()
}

fn definitions() -> Section {
    let mut section = Section::new("definitions", "What the words mean");
    section.text("Other tools give the same names to other things; these are the definitions used here.");
    section.facts(DEFINITIONS.iter().map(|(word, meaning)| Fact::new(*word, *meaning)).collect());
    section
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
