//! What every text form of the ledger says in a cell, and how paragraphs are wrapped.

use super::row::{Needs, Standing};
use super::view::{FigureView, LedgerView, MeasuredView, RowView};

/// The paragraphs of each cell of a row.
pub struct Cells {
    pub quoted: Vec<String>,
    pub arithmetic: Vec<String>,
    pub limits: Vec<String>,
    pub measured: Vec<String>,
}

impl Cells {
    pub fn new(row: &RowView) -> Self {
        let lines = |figures: &[FigureView]| figures.iter().map(FigureView::line).collect();
        Self {
            quoted: vec![row.quoted.clone(), format!("({})", row.source.short())],
            arithmetic: lines(&row.arithmetic),
            limits: lines(&row.limits),
            measured: measured(row),
        }
    }
}

fn measured(row: &RowView) -> Vec<String> {
    if row.measured.is_empty() {
        return vec![not_measured(row)];
    }
    let place = |view: &MeasuredView| {
        let findings = view.findings.iter().map(|finding| {
            let comparison = finding.comparison_text().map(|text| format!("; {text}")).unwrap_or_default();
            format!("{}: {}{comparison}", finding.label, finding.measured_text())
        });
        findings.chain([format!("[{}]", view.place())]).collect::<Vec<_>>()
    };
    row.measured.iter().flat_map(place).collect()
}

/// Why there is nothing, and what would help.
pub fn not_measured(row: &RowView) -> String {
    match (row.experiment, row.needs) {
        (Some(_), Needs::ThisMachine | Needs::Fleet) => format!("not yet: servelab numbers run {}", row.id),
        (_, Needs::Nothing) => "arithmetic is enough".to_owned(),
        (_, needs) => format!("needs {}", needs.describe()),
    }
}

/// `26 rows: 3 hold, 10 depend, 12 are wrong, 1 is open`.
pub fn summary(view: &LedgerView) -> String {
    let counts = view.counts().into_iter().filter(|(_, count)| *count > 0);
    let parts: Vec<String> =
        counts.map(|(standing, count)| format!("{count} {}", verb(standing, count))).collect();
    let rows = if view.rows.len() == 1 { "row" } else { "rows" };
    format!("{} {rows}: {}", view.rows.len(), parts.join(", "))
}

fn verb(standing: Standing, count: usize) -> &'static str {
    match (standing, count) {
        (Standing::Holds, 1) => "holds",
        (Standing::Holds, _) => "hold",
        (Standing::Depends, 1) => "depends",
        (Standing::Depends, _) => "depend",
        (Standing::Wrong, 1) => "is wrong",
        (Standing::Wrong, _) => "are wrong",
        (Standing::Open, 1) => "is open",
        (Standing::Open, _) => "are open",
    }
}

/// Lines of at most `width` characters, broken at blanks, and within words that are longer: behind a mark such as
/// an underscore if there is one.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        let used = lines.last().map_or(0, |line| line.chars().count());
        let mut room = width.saturating_sub(used + 1);
        // A word that no line holds may begin in this one.
        let begins_here = rest.len() <= room || (rest.len() > width && room > width / 2);
        if used > 0 && begins_here {
            append(&mut lines, " ");
        } else {
            room = width;
            if used > 0 {
                lines.push(String::new());
            }
        }
        loop {
            let part: String = rest.drain(..cut(&rest, room.max(1))).collect();
            append(&mut lines, &part);
            if rest.is_empty() {
                break;
            }
            lines.push(String::new());
            room = width;
        }
    }
    lines
}

fn append(lines: &mut [String], text: &str) {
    if let Some(line) = lines.last_mut() {
        line.push_str(text);
    }
}

/// How much of a word goes into `room` characters.
fn cut(word: &[char], room: usize) -> usize {
    if word.len() <= room {
        return word.len();
    }
    let mark = word[..room].iter().rposition(|character| !character.is_alphanumeric());
    mark.map_or(room, |mark| mark + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_break_at_blanks() {
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("", 8), [""]);
        assert_eq!(wrap("abcdefghij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrap("ab_cdefgh_ij", 9), ["ab_", "cdefgh_ij"]);
        assert_eq!(wrap("1 ab_cdefghijklmnopq", 9), ["1 ab_", "cdefghijk", "lmnopq"]);
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_nothing_is_lost(text in "[a-c ]{0,80}", width in 1_usize..20) {
            let lines = wrap(&text, width);
            prop_assert!(lines.iter().all(|line| line.chars().count() <= width), "{lines:?}");
            let without = |text: &str| text.replace(' ', "");
            prop_assert_eq!(without(&lines.concat()), without(&text));
        }
    }
}
