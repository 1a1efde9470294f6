//! The ledger as one HTML page, with everything that it needs in it.

use minijinja::value::{Serde, Value};
use minijinja::{Error, context};
use serde::Serialize;

use super::lines::{not_measured, summary};
use super::plot;
use super::row::Standing;
use super::view::{FigureView, LedgerView, MeasuredView, RowView};
use crate::experiments::Finding;
use crate::report::html::render;
use crate::report::plot::Key;

const PAGE: &str = include_str!("../../assets/ledger.html");
const STYLE: &str = concat!(include_str!("../../assets/report.css"), include_str!("../../assets/ledger.css"));
const SCRIPT: &str = concat!(include_str!("../../assets/report.js"), include_str!("../../assets/ledger.js"));

/// The page. It is well-formed XML too.
///
/// # Errors
/// If the template does not fit, which the tests rule out.
pub fn page(view: &LedgerView) -> Result<String, Error> {
    let page = Page {
        model: &view.model,
        hardware: &view.hardware,
        limits_of: view.limits_of(),
        summary: summary(view),
        counts: view.counts().into_iter().filter(|(_, count)| *count > 0).map(Count::new).collect(),
        claims: claims(view),
    };
    let style = Value::from_safe_string(STYLE.to_owned());
    let script = Value::from_safe_string(SCRIPT.to_owned());
    render("ledger.html", PAGE, context! { page => Value::from(Serde(page)), style, script })
}

#[derive(Serialize)]
struct Page<'a> {
    model: &'a str,
    hardware: &'a str,
    limits_of: String,
    summary: String,
    counts: Vec<Count>,
    claims: Vec<Claim<'a>>,
}

#[derive(Serialize)]
struct Count {
    word: &'static str,
    number: usize,
    meaning: &'static str,
}

impl Count {
    fn new((standing, number): (Standing, usize)) -> Self {
        let meaning = match standing {
            Standing::Holds => "right as it is quoted",
            Standing::Depends => "right in some circumstances, which it does not name",
            Standing::Wrong => "not true",
            Standing::Open => "nothing is quoted; we ask",
        };
        Self { word: standing.word(), number, meaning }
    }
}

/// A row, and the words for its closed lists.
#[derive(Serialize)]
struct Claim<'a> {
    #[serde(flatten)]
    row: &'a RowView,
    /// Where its topic begins.
    heading: Option<&'static str>,
    word: &'static str,
    source_text: &'static str,
    needs_text: &'static str,
    /// Of the closed row: the first limit and the first finding.
    limit_text: String,
    measured_text: String,
    /// How that compares, and where it was.
    measured_more: Option<String>,
    not_measured: String,
    published_words: Vec<&'static str>,
    places: Vec<Place<'a>>,
}

fn claims(view: &LedgerView) -> Vec<Claim<'_>> {
    let mut topic = None;
    let claim = |row: &'_ RowView| {
        let is_new = topic != Some(row.topic);
        topic = Some(row.topic);
        is_new.then(|| row.topic.title())
    };
    let headings: Vec<_> = view.rows.iter().map(claim).collect();
    view.rows.iter().zip(headings).map(|(row, heading)| Claim::new(row, heading)).collect()
}

impl<'a> Claim<'a> {
    fn new(row: &'a RowView, heading: Option<&'static str>) -> Self {
        let newest = row.measured.first();
        let finding = newest.and_then(|view| view.findings.first());
        let more = |view: &MeasuredView, finding: &Finding| {
            let comparison = finding.comparison_text().map(|text| format!("{text}; ")).unwrap_or_default();
            format!("{comparison}{}", view.place())
        };
        Self {
            heading,
            word: row.standing.word(),
            source_text: row.source.describe(),
            needs_text: row.needs.describe(),
            limit_text: row.limits.first().map(FigureView::line).unwrap_or_default(),
            measured_text: finding.map_or_else(
                || not_measured(row),
                |finding| format!("{}: {}", finding.label, finding.measured_text()),
            ),
            measured_more: newest.zip(finding).map(|(view, finding)| more(view, finding)),
            not_measured: not_measured(row),
            published_words: row.published.iter().map(|published| published.kind.word()).collect(),
            places: row.measured.iter().map(Place::new).collect(),
            row,
        }
    }
}

/// What was measured in one place.
#[derive(Serialize)]
struct Place<'a> {
    title: String,
    weights: &'a str,
    commit: Option<&'a str>,
    findings: Vec<Line<'a>>,
    plot: Option<Picture>,
}

#[derive(Serialize)]
struct Line<'a> {
    label: &'a str,
    measured: String,
    comparison: Option<String>,
    because: Option<&'a str>,
    note: Option<&'a str>,
    is_beaten: bool,
}

#[derive(Serialize)]
struct Picture {
    svg: String,
    keys: Vec<Key>,
    caption: String,
}

impl<'a> Place<'a> {
    fn new(view: &'a MeasuredView) -> Self {
        let line = |finding: &'a Finding| Line {
            label: &finding.label,
            measured: finding.measured_text(),
            comparison: finding.comparison_text(),
            because: finding.prediction.as_ref().map(|prediction| prediction.because.as_str()),
            note: finding.note.as_deref(),
            is_beaten: finding.is_beaten(),
        };
        let picture = |ladder| {
            let (svg, keys) = plot::ladder(ladder);
            Picture {
                svg,
                keys,
                caption: format!("contexts of {:.0} tokens on average", ladder.context_tokens),
            }
        };
        Self {
            title: view.place(),
            weights: &view.weights,
            commit: view.commit.as_deref(),
            findings: view.findings.iter().map(line).collect(),
            plot: view.ladder.as_ref().map(picture),
        }
    }
}
