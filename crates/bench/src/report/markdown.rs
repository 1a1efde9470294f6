//! A document as Markdown. Pictures are named only; the tables beside them hold their numbers.

use super::document::{
    Bar, Block, Cell, Column, Document, Fact, Figure, Section, Table, Tile, Tone, Verdict,
};
use super::escape;

pub fn text(document: &Document) -> String {
    let mut out = format!("# {}\n", escaped(&document.title));
    out += &facts(&document.summary);
    out += &verdict(&document.verdict);
    out += &tiles(&document.tiles);
    for section in &document.sections {
        out += &self::section(section);
    }
    out
}

fn escaped(text: &str) -> String {
    escape::markdown(text)
}

fn verdict(verdict: &Verdict) -> String {
    let mut out = format!("\n**{}.**\n\n", escaped(&verdict.headline));
    for reason in &verdict.reasons {
        out += &format!("- {}\n", escaped(reason));
    }
    for note in &verdict.notes {
        out += &format!("- Note: {}\n", escaped(note));
    }
    out
}

fn tiles(tiles: &[Tile]) -> String {
    let row = |tile: &Tile| {
        let value = format!("{} {}", tile.value, tile.unit);
        vec![tile.label.as_str().into(), value.trim_end().into(), tile.note.as_str().into()]
    };
    let columns = vec![Column::text(""), Column::number("value"), Column::text("")];
    table(&Table { caption: String::new(), columns, rows: tiles.iter().map(row).collect() })
}

fn section(section: &Section) -> String {
    let mut out = format!("\n## {}\n", escaped(&section.title));
    for block in &section.blocks {
        out += &match block {
            Block::Text { text } => format!("\n{}\n", escaped(text)),
            Block::Facts { facts } => self::facts(facts),
            Block::Table { table } => self::table(table),
            Block::Bars { bars } => self::bars(bars),
            Block::Figures { figures } => self::figures(figures),
        };
    }
    out
}

fn facts(facts: &[Fact]) -> String {
    let line = |fact: &Fact| format!("- **{}**: {}\n", escaped(&fact.name), escaped(&fact.value));
    format!("\n{}", facts.iter().map(line).collect::<String>())
}

fn bars(bars: &[Bar]) -> String {
    let line = |bar: &Bar| format!("- {}: {}\n", escaped(&bar.label), escaped(&bar.text));
    format!("\n{}", bars.iter().map(line).collect::<String>())
}

fn figures(figures: &[Figure]) -> String {
    let titles: Vec<&str> = figures.iter().map(|figure| figure.title.as_str()).collect();
    format!("\nPictures in report.html: {}.\n", escaped(&titles.join("; ")))
}

fn table(table: &Table) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    let mut out = String::from("\n");
    if !table.caption.is_empty() {
        out += &format!("{}\n\n", escaped(&table.caption));
    }
    let titles: Vec<String> = table.columns.iter().map(|column| escaped(&column.title)).collect();
    out += &format!("| {} |\n", titles.join(" | "));
    let rules: Vec<&str> =
        table.columns.iter().map(|column| if column.is_number { "---:" } else { "---" }).collect();
    out += &format!("| {} |\n", rules.join(" | "));
    for row in &table.rows {
        let cells: Vec<String> = row.iter().map(cell).collect();
        out += &format!("| {} |\n", cells.join(" | "));
    }
    out
}

/// What is wrong is bold, as colours are lost.
fn cell(cell: &Cell) -> String {
    let text = escaped(&cell.text);
    if cell.tone == Tone::Bad && !text.is_empty() { format!("**{text}**") } else { text }
}
