//! A report before it is a page or a text: HTML and Markdown are written from the same sections, so that neither says
//! what the other leaves out. Texts are plain; escaping is the writers' business.

use serde::Serialize;

use super::plot::{Key, Plot};
use crate::definitions::DEFINITIONS;

/// Rows of a table that are shown: nobody reads more.
const MAX_ROWS: usize = 300;

#[derive(Clone, Debug, Serialize)]
pub struct Document {
    /// The command that made it.
    pub brand: &'static str,
    pub title: String,
    /// What, where and when in short.
    pub summary: Vec<Fact>,
    pub verdict: Verdict,
    pub tiles: Vec<Tile>,
    pub sections: Vec<Section>,
}

/// Whether the figures may be quoted.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub is_sound: bool,
    pub headline: String,
    /// Why not, or what was checked.
    pub reasons: Vec<String>,
    /// What a reader has to know all the same.
    pub notes: Vec<String>,
}

/// A figure that is read from the last row of a room.
#[derive(Clone, Debug, Serialize)]
pub struct Tile {
    pub label: String,
    pub value: String,
    pub unit: String,
    pub note: String,
    pub definition: Option<&'static str>,
    pub tone: Tone,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tone {
    #[default]
    Plain,
    Good,
    Bad,
}

#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// Of the link to it; letters and dashes.
    pub id: String,
    pub title: String,
    /// Shown only when asked for.
    pub is_folded: bool,
    pub blocks: Vec<Block>,
}

impl Section {
    pub fn new(id: impl Into<String>, title: impl Into<String>) -> Self {
        Self { id: id.into(), title: title.into(), is_folded: false, blocks: Vec::new() }
    }

    pub fn text(&mut self, text: impl Into<String>) {
        self.blocks.push(Block::Text { text: text.into() });
    }

    pub fn facts(&mut self, facts: Vec<Fact>) {
        if !facts.is_empty() {
            self.blocks.push(Block::Facts { facts });
        }
    }

    /// A table without rows is left out, one with more than [`MAX_ROWS`] is cut, and says so.
    pub fn table(&mut self, mut table: Table) {
        if table.rows.len() > MAX_ROWS {
            let all = table.rows.len();
            table.rows.truncate(MAX_ROWS);
            table.caption = format!("{} The first {MAX_ROWS} of {all} rows.", table.caption);
        }
        if !table.rows.is_empty() {
            self.blocks.push(Block::Table { table });
        }
    }

    pub fn bars(&mut self, bars: Vec<Bar>) {
        if !bars.is_empty() {
            self.blocks.push(Block::Bars { bars });
        }
    }

    pub fn figures(&mut self, figures: impl IntoIterator<Item = Figure>) {
        let figures: Vec<Figure> = figures.into_iter().collect();
        if !figures.is_empty() {
            self.blocks.push(Block::Figures { figures });
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Block {
    Text { text: String },
    Facts { facts: Vec<Fact> },
    Table { table: Table },
    Bars { bars: Vec<Bar> },
    Figures { figures: Vec<Figure> },
}

/// A bar beside its name.
#[derive(Clone, Debug, Serialize)]
pub struct Bar {
    pub label: String,
    pub filled_percent: f64,
    pub text: String,
    pub tone: Tone,
}

impl Bar {
    /// `share` is how much of the space it fills; more than 1 is shown as full.
    pub fn new(label: impl Into<String>, share: f64, text: impl Into<String>, tone: Tone) -> Self {
        let filled_percent =
            if share.is_finite() { (1000.0 * share).round().clamp(0.0, 1000.0) / 10.0 } else { 0.0 };
        Self { label: label.into(), filled_percent, text: text.into(), tone }
    }
}

/// A name and what it stands for.
#[derive(Clone, Debug, Serialize)]
pub struct Fact {
    pub name: String,
    pub value: String,
}

impl Fact {
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    pub caption: String,
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Column {
    pub title: String,
    pub is_number: bool,
    pub definition: Option<&'static str>,
}

impl Column {
    pub fn number(title: &str) -> Self {
        Self { title: title.into(), is_number: true, definition: definition(title) }
    }

    pub fn text(title: &str) -> Self {
        Self { title: title.into(), is_number: false, definition: definition(title) }
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    pub text: String,
    pub tone: Tone,
    /// Shown on hovering: what the text means.
    pub definition: Option<&'static str>,
    /// Id of the section that says more.
    pub link: Option<String>,
}

impl Cell {
    pub fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone, ..Self::default() }
    }

    /// A word that is defined.
    pub fn term(word: &str) -> Self {
        Self { text: word.into(), definition: definition(word), ..Self::default() }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), ..Self::default() }
    }
}

/// A plot with its words.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub title: String,
    /// How to read it.
    pub caption: String,
    pub keys: Vec<Key>,
    pub svg: String,
    /// Over the whole width of the page.
    pub is_wide: bool,
}

impl Figure {
    pub fn new(title: impl Into<String>, caption: impl Into<String>, plot: &Plot) -> Self {
        let title = title.into();
        let svg = plot.svg(&title);
        Self { title, caption: caption.into(), keys: plot.keys(), svg, is_wide: false }
    }
}

/// What a word of the reports means: the longest defined word that it begins with.
pub fn definition(title: &str) -> Option<&'static str> {
    let title = title.to_lowercase();
    let begun = DEFINITIONS.iter().filter(|(word, _)| title.starts_with(&word.to_lowercase()));
    begun.max_by_key(|(word, _)| word.len()).map(|(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_find_the_definition_that_fits_best() {
        let [plain, anchored] = ["TTFT p99, ms", "TTFT from send"].map(|word| definition(word).unwrap());
        assert!(plain.starts_with("from the scheduled arrival") && anchored.starts_with("the same from"));
        assert_eq!(definition("repeat"), None);
    }
}
