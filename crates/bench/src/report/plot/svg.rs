//! The few shapes that plots are made of, as SVG text. Colours are classes of the page's style sheet, so that the
//! same picture is right on a light screen, on a dark one and on paper.

use std::fmt::{self, Write};

use crate::report::escape;

/// A coordinate with a tenth of a pixel.
struct At(f64);

impl fmt::Display for At {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0 * 10.0).round() as i64;
        if tenths % 10 == 0 {
            write!(out, "{}", tenths / 10)
        } else {
            write!(out, "{:.1}", tenths as f64 / 10.0)
        }
    }
}

/// Where a text stands at its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// An SVG under way.
#[derive(Debug)]
pub struct Svg(String);

impl Svg {
    /// `label` is what a screen reader says.
    pub fn new(width: f64, height: f64, label: &str) -> Self {
        let mut svg = Self(String::with_capacity(8192));
        svg.put(format_args!(
            r#"<svg viewBox="0 0 {} {}" width="{0}" height="{1}" role="img" aria-label="{}">"#,
            At(width),
            At(height),
            escape::html(label)
        ));
        svg
    }

    pub fn finish(mut self) -> String {
        self.0.push_str("</svg>");
        self.0
    }

    fn put(&mut self, text: fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.0.write_fmt(text);
    }

    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let [x1, y1, x2, y2] = [x1, y1, x2, y2].map(At);
        self.put(format_args!(r#"<line class="{class}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>"#));
    }

    /// `hover` is shown when the pointer is over it.
    pub fn rect(
        &mut self,
        class: &str,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        hover: Option<&str>,
    ) {
        let [x, y, width, height] = [x, y, width, height].map(At);
        self.put(format_args!(r#"<rect class="{class}" x="{x}" y="{y}" width="{width}" height="{height}""#));
        self.close("rect", hover);
    }

    pub fn circle(&mut self, class: &str, (x, y): (f64, f64), radius: f64, hover: Option<&str>) {
        let [x, y, radius] = [x, y, radius].map(At);
        self.put(format_args!(r#"<circle class="{class}" cx="{x}" cy="{y}" r="{radius}""#));
        self.close("circle", hover);
    }

    fn close(&mut self, name: &str, hover: Option<&str>) {
        match hover {
            Some(text) => self.put(format_args!("><title>{}</title></{name}>", escape::html(text))),
            None => self.put(format_args!("/>")),
        }
    }

    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => r#" text-anchor="middle""#,
            Anchor::End => r#" text-anchor="end""#,
        };
        let (x, y, text) = (At(x), At(y), escape::html(text));
        self.put(format_args!(r#"<text class="{class}" x="{x}" y="{y}"{anchor}>{text}</text>"#));
    }

    /// Straight lines from point to point; `attributes` are written as they are.
    pub fn path(&mut self, class: &str, points: &[(f64, f64)], attributes: &str) {
        self.put(format_args!(r#"<path class="{class}"{attributes} d=""#));
        for (number, &(x, y)) in points.iter().enumerate() {
            let command = if number == 0 { 'M' } else { 'L' };
            self.put(format_args!("{command}{} {}", At(x), At(y)));
        }
        self.put(format_args!("\"/>"));
    }

    /// Everything until [`Self::end_group`] shows `hover` under the pointer.
    pub fn group(&mut self, hover: &str) {
        self.put(format_args!("<g><title>{}</title>", escape::html(hover)));
    }

    pub fn end_group(&mut self) {
        self.put(format_args!("</g>"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_short_and_texts_escaped() {
        let mut svg = Svg::new(10.0, 20.0, "a & b");
        svg.rect("c1", (1.0, 2.04), (3.25, -0.04), Some("<b>"));
        svg.path("c2", &[(0.0, 1.0), (2.5, 3.0)], "");
        svg.text("tick", (1.0, 1.0), Anchor::Middle, "5");
        assert_eq!(
            svg.finish(),
            "<svg viewBox=\"0 0 10 20\" width=\"10\" height=\"20\" role=\"img\" aria-label=\"a &amp; b\">\
             <rect class=\"c1\" x=\"1\" y=\"2\" width=\"3.3\" height=\"0\"><title>&lt;b&gt;</title></rect>\
             <path class=\"c2\" d=\"M0 1L2.5 3\"/><text class=\"tick\" x=\"1\" y=\"1\" text-anchor=\"middle\">5</text></svg>"
        );
    }
}
