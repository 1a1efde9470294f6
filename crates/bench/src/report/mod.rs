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
pub(crate) mod html;
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

use std::path::Path;
use std::{fs, io};

use document::{Fact, Section};

use crate::definitions::DEFINITIONS;
use crate::output::OutputError;
use crate::result::BenchResult;

/// `report.html`.
///
/// # Errors
/// If the page's template does not fit, which the tests rule out.
pub fn html(result: &BenchResult, details: &Details) -> Result<String, minijinja::Error> {
    html::page(&document(result, details))
}

/// Why there is no page.
pub type PageError = minijinja::Error;

/// A document as one self-contained page.
///
/// # Errors
/// If the page's template does not fit, which the tests rule out.
pub fn page(document: &Document) -> Result<String, PageError> {
    html::page(document)
}

/// `report.md`.
pub fn markdown(result: &BenchResult, details: &Details) -> String {
    markdown::text(&document(result, details))
}

/// Writes both reports into a folder.
///
/// # Errors
/// The file that cannot be written.
pub fn write(folder: &Path, result: &BenchResult, details: &Details) -> Result<(), OutputError> {
    let document = document(result, details);
    let page = html::page(&document).map_err(io::Error::other);
    for (name, text) in [("report.html", page), ("report.md", Ok(markdown::text(&document)))] {
        let path = folder.join(name);
        text.and_then(|text| fs::write(&path, text)).map_err(|source| OutputError { path, source })?;
    }
    Ok(())
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
        brand: "servelab bench",
        title: header::title(&result.header),
        summary: header::summary(&result.header),
        verdict: header::verdict(result),
        tiles: header::tiles(result),
        sections,
    }
}

/// Levels in full. Of several, the one with the highest throughput is open, the others are folded.
fn levels(result: &BenchResult, details: &Details) -> Vec<Section> {
    let section = |number: usize| {
        let mut section = level::section(&result.points[number], number, details);
        section.is_folded = !level::is_best(result, number);
        section
    };
    level::in_full(result).into_iter().map(section).collect()
}

fn definitions() -> Section {
    let mut section = Section::new("definitions", "What the words mean");
    section.text("Other tools give the same names to other things; these are the definitions used here.");
    section.facts(DEFINITIONS.iter().map(|(word, meaning)| Fact::new(*word, *meaning)).collect());
    section
}
