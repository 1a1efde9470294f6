//! What is drawn in a plot.

use std::fmt::Write;

use serde::Serialize;

use super::frame::Frame;
use super::{Anchor, Ink, Key, Plot, Svg};
use crate::report::{escape, number};

/// Of a label, about.
const CHAR_WIDTH: f64 = 6.8;
/// Longer lines are thinned: a plot has no more columns that anybody could see.
const MAX_POINTS: usize = 400;
/// Lines of fewer points show where the points are.
const MARKED_POINTS: usize = 40;

/// How a layer is drawn, and how the legend shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    Line,
    Dashed,
    Dotted,
    Area,
    Bars,
    Point,
    Hollow,
    /// A bar with a hole.
    Gap,
}

impl Mark {
    fn class(self) -> &'static str {
        match self {
            Self::Line => "line",
            Self::Dashed => "line dashed",
            Self::Dotted => "line dotted",
            Self::Area => "area",
            Self::Bars => "bar",
            Self::Point => "point",
            Self::Hollow => "hollow",
            Self::Gap => "gap",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Dot {
    pub x: f64,
    pub y: f64,
    /// Stands beside it.
    pub label: String,
    pub hover: String,
}

/// A bar that lies, in parts.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its middle on the y axis, and how high it is there.
    pub y: f64,
    pub height: f64,
    /// From, to, and how the part looks.
    pub parts: Vec<(f64, f64, &'static str)>,
    pub hover: String,
}

#[derive(Clone, Debug)]
pub enum Layer {
    /// Lines, or an area below one. A line that is named and not on the right tells its values to the pointer.
    Line {
        name: String,
        ink: Ink,
        mark: Mark,
        points: Vec<(f64, f64)>,
        on_right: bool,
    },
    /// From, to, height, and what hovering shows.
    Bars {
        name: String,
        ink: Ink,
        bars: Vec<(f64, f64, f64, String)>,
    },
    /// Bars that lie below each other.
    Rows {
        rows: Vec<Row>,
    },
    Dots {
        name: String,
        ink: Ink,
        mark: Mark,
        dots: Vec<Dot>,
    },
    /// At x from a low to a high value.
    Intervals {
        ink: Ink,
        intervals: Vec<(f64, f64, f64)>,
    },
    /// A part of the x axis that is something else.
    Shade {
        from: f64,
        to: f64,
        label: String,
    },
    /// A vertical line; its label stands at that share of the height.
    Upright {
        at: f64,
        label: String,
        label_height: f64,
    },
    /// A horizontal line.
    Level {
        at: f64,
        label: String,
    },
}

impl Layer {
    pub fn line(name: &str, ink: Ink, mark: Mark, points: Vec<(f64, f64)>) -> Self {
        Self::Line { name: name.into(), ink, mark, points: thinned(points), on_right: false }
    }

    pub fn key(&self) -> Option<Key> {
        let (name, ink, mark) = match self {
            Self::Line { name, ink, mark, .. } | Self::Dots { name, ink, mark, .. } => (name, *ink, *mark),
            Self::Bars { name, ink, .. } => (name, *ink, Mark::Bars),
            Self::Rows { .. }
            | Self::Intervals { .. }
            | Self::Shade { .. }
            | Self::Upright { .. }
            | Self::Level { .. } => return None,
        };
        (!name.is_empty()).then(|| Key { name: name.clone(), ink, mark })
    }

    pub fn draw(&self, svg: &mut Svg, frame: &Frame, plot: &Plot) {
        let place = Place { frame, plot };
        match self {
            Self::Line { name, ink, mark, points, on_right } => {
                let places = points.iter().map(|point| place.of(*point, *on_right)).collect::<Vec<_>>();
                draw_line(svg, frame, (*ink, *mark), &places, &probe(name, points, *on_right));
            }
            Self::Bars { ink, bars, .. } => draw_bars(svg, &place, *ink, bars),
            Self::Rows { rows } => rows.iter().for_each(|row| draw_row(svg, &place, row)),
            Self::Dots { ink, mark, dots, .. } => draw_dots(svg, &place, (*ink, *mark), dots),
            Self::Intervals { ink, intervals } => draw_intervals(svg, &place, *ink, intervals),
            Self::Shade { from, to, label } => draw_shade(svg, &place, (*from, *to), label),
            Self::Upright { at, label, label_height } => {
                let (at, height) = (place.x(*at), frame.bottom - label_height * (frame.bottom - frame.top));
                svg.line("rule", (at, frame.top), (at, frame.bottom));
                let (start, anchor) = beside(frame, at, label, 5.0);
                draw_chip(svg, (start, height), anchor, label);
            }
            Self::Level { at, label } => {
                let at = place.y(*at);
                svg.line("rule", (frame.left, at), (frame.right, at));
                draw_chip(svg, (frame.right - 4.0, at - 6.0), Anchor::End, label);
            }
        }
    }
}

/// Where values lie.
struct Place<'a> {
    frame: &'a Frame,
    plot: &'a Plot,
}

impl Place<'_> {
    fn x(&self, value: f64) -> f64 {
        self.frame.x(&self.plot.x, value)
    }

    fn y(&self, value: f64) -> f64 {
        self.frame.y(&self.plot.y, value)
    }

    fn of(&self, point: (f64, f64), on_right: bool) -> (f64, f64) {
        let axis = self.plot.right.as_ref().filter(|_| on_right).unwrap_or(&self.plot.y);
        (self.x(point.0), self.frame.y(axis, point.1))
    }
}

fn draw_bars(svg: &mut Svg, place: &Place<'_>, ink: Ink, bars: &[(f64, f64, f64, String)]) {
    let class = format!("bar {}", ink.class());
    for (from, to, height, hover) in bars {
        let (left, right, top) = (place.x(*from), place.x(*to), place.y(*height));
        let size = ((right - left - 1.0).max(0.5), place.frame.bottom - top);
        svg.rect(&class, (left + 0.5, top), size, Some(hover));
    }
}

fn draw_row(svg: &mut Svg, place: &Place<'_>, row: &Row) {
    let (top, bottom) = (place.y(row.y + row.height / 2.0), place.y(row.y - row.height / 2.0));
    svg.group(&row.hover);
    for (from, to, class) in &row.parts {
        let (left, right) = (place.x(*from), place.x(*to));
        svg.rect(class, (left, top), ((right - left).max(0.4), bottom - top), None);
    }
    svg.end_group();
}

/// A point whose label would lie on another's goes without; the pointer still finds it.
fn draw_dots(svg: &mut Svg, place: &Place<'_>, (ink, mark): (Ink, Mark), dots: &[Dot]) {
    let class = format!("{} {}", mark.class(), ink.class());
    let mut labelled: Vec<(f64, f64)> = Vec::new();
    for dot in dots {
        let at = place.of((dot.x, dot.y), false);
        svg.circle(&class, at, 5.0, Some(&dot.hover));
        let is_near = |other: &(f64, f64)| (at.0 - other.0).abs() < 24.0 && (at.1 - other.1).abs() < 13.0;
        if !labelled.iter().any(is_near) {
            draw_dot_label(svg, place.frame, at, &dot.label);
            labelled.push(at);
        }
    }
}

fn draw_intervals(svg: &mut Svg, place: &Place<'_>, ink: Ink, intervals: &[(f64, f64, f64)]) {
    let class = format!("line {}", ink.class());
    for (at, low, high) in intervals {
        let (at, low, high) = (place.x(*at), place.y(*low), place.y(*high));
        svg.line(&class, (at, low), (at, high));
        svg.line(&class, (at - 4.0, low), (at + 4.0, low));
        svg.line(&class, (at - 4.0, high), (at + 4.0, high));
    }
}

/// A narrow part has no room for its name, but the pointer finds it.
fn draw_shade(svg: &mut Svg, place: &Place<'_>, (from, to): (f64, f64), label: &str) {
    let (left, right, frame) = (place.x(from), place.x(to), place.frame);
    svg.rect("shade", (left, frame.top), (right - left, frame.bottom - frame.top), Some(label));
    if right - left > CHAR_WIDTH * label.chars().count() as f64 {
        svg.text("note", ((left + right) / 2.0, frame.top + 12.0), Anchor::Middle, label);
    }
}

/// A label on a ground of its own: it may stand on bars and lines.
fn draw_chip(svg: &mut Svg, (x, y): (f64, f64), anchor: Anchor, label: &str) {
    let width = CHAR_WIDTH * label.chars().count() as f64 + 6.0;
    let left = if anchor == Anchor::End { x + 3.0 - width } else { x - 3.0 };
    svg.rect("chip", (left, y - 12.0), (width, 16.0), None);
    svg.text("note strong", (x, y), anchor, label);
}

/// To the right of `x`, or to its left where there is no room.
fn beside(frame: &Frame, x: f64, label: &str, distance: f64) -> (f64, Anchor) {
    let has_room = x + distance + CHAR_WIDTH * label.chars().count() as f64 <= frame.right;
    if has_room { (x + distance, Anchor::Start) } else { (x - distance, Anchor::End) }
}

fn draw_dot_label(svg: &mut Svg, frame: &Frame, (x, y): (f64, f64), label: &str) {
    if !label.is_empty() {
        let (place, anchor) = beside(frame, x, label, 9.0);
        let below = if y < frame.top + 14.0 { 14.0 } else { -6.0 };
        svg.text("note", (place, y + below), anchor, label);
    }
}

fn draw_line(svg: &mut Svg, frame: &Frame, (ink, mark): (Ink, Mark), places: &[(f64, f64)], probe: &str) {
    let (Some(first), Some(last)) = (places.first(), places.last()) else { return };
    if mark == Mark::Area {
        let mut area = places.to_vec();
        area.extend([(last.0, frame.bottom), (first.0, frame.bottom)]);
        svg.path(&format!("area {}", ink.class()), &area, "");
    }
    let class = if mark == Mark::Area { Mark::Line.class() } else { mark.class() };
    svg.path(&format!("{class} {}", ink.class()), places, probe);
    if places.len() <= MARKED_POINTS && mark != Mark::Area {
        for place in places {
            svg.circle(&format!("point {}", ink.class()), *place, 2.5, None);
        }
    }
}

/// What the page's script shows beside the pointer: the name and the values of a line.
fn probe(name: &str, points: &[(f64, f64)], on_right: bool) -> String {
    if name.is_empty() || on_right {
        return String::new();
    }
    let list = |of: fn(&(f64, f64)) -> f64| {
        let mut out = String::new();
        for (at, point) in points.iter().enumerate() {
            // Writing to a string does not fail.
            let _ = write!(out, "{}{}", if at == 0 { "" } else { "|" }, number::short(of(point)));
        }
        out
    };
    format!(
        r#" data-name="{}" data-x="{}" data-y="{}""#,
        escape::html(name),
        list(|point| point.0),
        list(|point| point.1)
    )
}

/// At most [`MAX_POINTS`] of the points: of neighbours the lowest and the highest, so that no peak is lost.
pub fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points;
    }
    let together = (2 * points.len()).div_ceil(MAX_POINTS);
    let mut kept = Vec::with_capacity(MAX_POINTS);
    for points in points.chunks(together) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (points.iter().min_by(by_height), points.iter().max_by(by_height))
        else {
            continue;
        };
        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        kept.push(*first);
        if first != second {
            kept.push(*second);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_peaks() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|at| (f64::from(at), 1.0)).collect();
        (points[777].1, points[50_000].1) = (9.0, -3.0);
        let kept = thinned(points);
        assert!(kept.len() <= MAX_POINTS, "{}", kept.len());
        assert!(kept.contains(&(777.0, 9.0)) && kept.contains(&(50_000.0, -3.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn labels_stay_in_the_frame() {
        let frame = Frame { left: 50.0, right: 500.0, top: 30.0, bottom: 250.0 };
        assert_eq!(beside(&frame, 100.0, "label", 5.0), (105.0, Anchor::Start));
        assert_eq!(beside(&frame, 490.0, "label", 5.0), (485.0, Anchor::End));
    }
}
