//! The ledger as a table in Markdown.

use super::lines::{Cells, summary};
use super::row::Topic;
use super::view::LedgerView;
use crate::report::escape::markdown as escaped;

/// The whole document.
pub fn text(view: &LedgerView) -> String {
    let mut out = format!(
        "# The numbers that people quote about LLM serving\n\nLimits: {}. {}.\n",
        escaped(&view.limits_of()),
        summary(view)
    );
    let mut topic: Option<Topic> = None;
    for row in &view.rows {
        if topic != Some(row.topic) {
            topic = Some(row.topic);
            out += &format!("\n## {}\n\n", row.topic.title());
            out += "| id | quoted | arithmetic of the quote | limit | measured here | verdict |\n";
            out += "| --- | --- | --- | --- | --- | --- |\n";
        }
        let cells = Cells::new(row);
        out += &format!(
            "| {} | {} | {} | {} | {} | **{}**: {} |\n",
            escaped(&row.id),
            cell(&cells.quoted),
            cell(&cells.arithmetic),
            cell(&cells.limits),
            cell(&cells.measured),
            row.standing.word(),
            escaped(&row.verdict)
        );
    }
    out += "\nTPn: tensor parallel over n GPUs. B: sequences in a batch. L: tokens of context of each.\n";
    out
}

fn cell(paragraphs: &[String]) -> String {
    let paragraphs: Vec<String> = paragraphs.iter().map(|text| escaped(text)).collect();
    paragraphs.join("<br>")
}
