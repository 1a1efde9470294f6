//! The ledger for a terminal of 100 columns: four columns, and the verdict below them.

use super::lines::{Cells, summary, wrap};
use super::row::{Standing, Topic};
use super::view::{FigureView, LedgerView, RowView};

/// No line is longer, in characters.
pub const WIDTH: usize = 100;
/// Of the columns, with [`GAP`] between them.
const COLUMNS: [usize; 4] = [23, 25, 23, 23];
const GAP: usize = 2;
const INDENT: usize = 2;

/// The whole table. With `detail` each formula stands below its row with its numbers put in.
pub fn text(view: &LedgerView, detail: bool, colour: bool) -> String {
    let paint = Paint { colour };
    let mut lines =
        vec![paint.bold("The numbers that people quote about LLM serving, and what is true of them")];
    lines.extend(wrap(&format!("{}.", summary(view)), WIDTH));
    lines.extend(wrap(&format!("Limits: {}.", view.limits_of()), WIDTH));
    let mut topic: Option<Topic> = None;
    for row in &view.rows {
        if topic != Some(row.topic) {
            topic = Some(row.topic);
            lines.extend([String::new(), paint.bold(&ruled(row.topic.title()))]);
            let limit: String = format!("limit, {}", view.model).chars().take(COLUMNS[2]).collect();
            lines.push(paint.dim(&columns(["quoted", "arithmetic of the quote", &limit, "measured here"])));
        }
        lines.push(String::new());
        lines.extend(row_lines(row, paint));
        if detail {
            lines.extend(detail_lines(row, paint));
        }
    }
    lines.extend([
        String::new(),
        "TPn: tensor parallel over n GPUs. B: sequences in a batch. L: tokens of context of each.".to_owned(),
        "Formulas with their numbers: --row ID, or --format html. Measure: servelab numbers run.".to_owned(),
    ]);
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn ruled(title: &str) -> String {
    format!("-- {title} {}", "-".repeat(WIDTH.saturating_sub(title.chars().count() + 4)))
}

fn columns(cells: [&str; 4]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.into_iter().zip(COLUMNS) {
        line.push_str(&format!("{cell:<width$}{:GAP$}", ""));
    }
    line.trim_end().to_owned()
}

fn row_lines(row: &RowView, paint: Paint) -> Vec<String> {
    let cells = Cells::new(row);
    let texts = [&cells.quoted, &cells.arithmetic, &cells.limits, &cells.measured];
    let mut wrapped: Vec<Vec<String>> = Vec::new();
    for (column, (paragraphs, width)) in texts.into_iter().zip(COLUMNS).enumerate() {
        // A quote is one paragraph and needs no mark of where the next begins.
        let wrap = if column == 0 { wrap } else { hanging };
        wrapped.push(paragraphs.iter().flat_map(|text| wrap(text, width)).collect());
    }
    let height = wrapped.iter().map(Vec::len).max().unwrap_or(0);
    let mut lines = vec![paint.bold(&row.id)];
    for at in 0..height {
        let cell = |column: usize| wrapped[column].get(at).map_or("", String::as_str);
        lines.push(columns([cell(0), cell(1), cell(2), cell(3)]));
    }
    let verdict = format!("{}: {}", row.standing.word(), row.verdict);
    for (at, line) in wrap(&verdict, WIDTH - INDENT).into_iter().enumerate() {
        let indent = " ".repeat(INDENT);
        let word = row.standing.word();
        match line.strip_prefix(word).filter(|_| at == 0) {
            Some(rest) => lines.push(format!("{indent}{}{rest}", paint.standing(row.standing, word))),
            None => lines.push(format!("{indent}{line}")),
        }
    }
    lines
}

/// A paragraph whose later lines are indented by one, so that the next one is seen to begin.
fn hanging(text: &str, width: usize) -> Vec<String> {
    let lines = wrap(text, width - 1).into_iter().enumerate();
    lines.map(|(at, line)| if at == 0 { line } else { format!(" {line}") }).collect()
}

fn detail_lines(row: &RowView, paint: Paint) -> Vec<String> {
    let mut lines = Vec::new();
    for (title, figures) in [("arithmetic", &row.arithmetic), ("limit", &row.limits)] {
        for figure in figures {
            lines.push(String::new());
            lines.extend(figure_lines(title, figure).into_iter().map(|line| format!("  {line}")));
        }
    }
    if !row.published.is_empty() {
        lines.push(String::new());
    }
    for published in &row.published {
        let text = format!("{} ({}): {}", published.kind.word(), published.source, published.text);
        lines.extend(wrap(&text, WIDTH - 4).into_iter().map(|line| format!("  {line}")));
    }
    for view in &row.measured {
        lines.extend([String::new(), format!("  {}", paint.bold(&format!("measured: {}", view.place())))]);
        for finding in &view.findings {
            let because = finding.prediction.as_ref().map(|prediction| prediction.because.as_str());
            let mut texts = vec![format!("{}: {}", finding.label, finding.measured_text())];
            texts.extend(finding.comparison_text());
            texts.extend(because.map(|because| format!("because {because}")));
            texts.extend(finding.note.clone());
            for text in texts {
                lines.extend(wrap(&text, WIDTH - 6).into_iter().map(|line| format!("    {line}")));
            }
        }
    }
    lines.push(String::new());
    lines.extend(
        wrap(&format!("to measure: {}", row.how), WIDTH - 4).into_iter().map(|line| format!("  {line}")),
    );
    lines
}

fn figure_lines(title: &str, figure: &FigureView) -> Vec<String> {
    let mut lines = wrap(&format!("{title}: {}", figure.line()), WIDTH - 4);
    if let FigureView::Computed { formula, general, substituted, text, .. } = figure {
        let name = if formula.is_empty() { String::new() } else { format!("{formula}: ") };
        lines.extend(
            wrap(&format!("{name}{general}"), WIDTH - 8).into_iter().map(|line| format!("    {line}")),
        );
        let numbers = format!("= {substituted} = {text}");
        lines.extend(wrap(&numbers, WIDTH - 8).into_iter().map(|line| format!("    {line}")));
    }
    lines
}

/// Colours, where the output is a terminal that wants them.
#[derive(Clone, Copy)]
struct Paint {
    colour: bool,
}

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    fn standing(self, standing: Standing, text: &str) -> String {
        let code = match standing {
            Standing::Holds => "1;32",
            Standing::Depends => "1;33",
            Standing::Wrong => "1;31",
            Standing::Open => "1;36",
        };
        self.with(code, text)
    }
}
