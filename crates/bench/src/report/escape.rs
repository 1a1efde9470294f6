//! Text that others chose, such as a model's name or an error's message, as text: it can neither end an element or
//! an attribute, nor become Markdown, nor hide behind control characters.

use std::borrow::Cow;

/// For HTML, SVG and XML, in elements and in quoted attributes.
pub fn html(text: &str) -> Cow<'_, str> {
    if !text.contains(|c: char| matches!(c, '&' | '<' | '>' | '"' | '\'') || is_hidden(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            hidden if is_hidden(hidden) => out.push('\u{fffd}'),
            plain => out.push(plain),
        }
    }
    Cow::Owned(out)
}

/// For a line or a table cell of Markdown.
pub fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '$' => out.extend(['\\', c]),
            '\n' | '\r' | '\t' => out.push(' '),
            hidden if is_hidden(hidden) => out.push('\u{fffd}'),
            plain => out.push(plain),
        }
    }
    out
}

/// Characters that no XML may hold, and those that turn the direction of what is around them.
fn is_hidden(c: char) -> bool {
    let is_control = c.is_control() && !matches!(c, '\n' | '\r' | '\t');
    is_control || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_ends_an_element_or_an_attribute() {
        assert_eq!(html("a plain name"), "a plain name");
        assert_eq!(
            html("</script><img src='x' onerror=\"1\">&\u{0}"),
            "&lt;/script&gt;&lt;img src=&#39;x&#39; onerror=&quot;1&quot;&gt;&amp;\u{fffd}"
        );
        assert_eq!(html("a\u{202e}b"), "a\u{fffd}b");
    }

    #[test]
    fn nothing_becomes_markdown() {
        assert_eq!(markdown("a|b\n# [x](y) <b>"), "a\\|b \\# \\[x\\](y) &lt;b&gt;");
    }
}
