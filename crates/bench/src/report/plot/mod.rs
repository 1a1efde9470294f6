//! Plots as SVG: a frame with two axes, and layers of lines, bars and points in it.
//!
//! Made here and not by a library, because a report must look right on a dark screen, on a light one and on paper, in
//! one file that needs no network and no script: the pictures are vectors coloured by the page's style sheet.
//! Libraries either draw on a canvas (uPlot), which a script has to do again for each of the three, or write their
//! colours into the picture (plotters). The script of the page only adds what hovering shows.

mod frame;
mod layer;
mod scale;
mod svg;

pub use layer::{Dot, Layer, Mark, Row, thinned};
pub use scale::Scale;
pub use svg::{Anchor, Svg};

use serde::Serialize;

use super::number;

/// A colour of the style sheet; told apart by people who are colour-blind too (after Okabe and Ito 2008).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ink {
    Blue,
    Orange,
    Green,
    Purple,
    Amber,
    Red,
    Grey,
}

impl Ink {
    /// The class that gives it.
    pub fn class(self) -> &'static str {
        match self {
            Self::Blue => "blue",
            Self::Orange => "orange",
            Self::Green => "green",
            Self::Purple => "purple",
            Self::Amber => "amber",
            Self::Red => "red",
            Self::Grey => "grey",
        }
    }
}

/// Width of a plot over the whole page.
pub const WIDE: f64 = 1240.0;

#[derive(Clone, Debug)]
pub struct Axis {
    /// With its unit.
    pub label: String,
    pub scale: Scale,
    /// Values that get a tick, and its label; round ones if there are none.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    pub fn new(label: impl Into<String>, scale: Scale) -> Self {
        Self { label: label.into(), scale, ticks: Vec::new() }
    }
}

/// An entry of a legend.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Key {
    pub name: String,
    pub ink: Ink,
    pub mark: Mark,
}

/// A plot, not drawn yet. Later layers lie above earlier ones.
#[derive(Clone, Debug)]
pub struct Plot {
    pub width: f64,
    pub height: f64,
    pub x: Axis,
    pub y: Axis,
    /// A second vertical axis; layers say whether they belong to it.
    pub right: Option<Axis>,
    pub layers: Vec<Layer>,
}

impl Plot {
    /// Half a page wide.
    pub fn new(x: Axis, y: Axis) -> Self {
        Self { width: 600.0, height: 290.0, x, y, right: None, layers: Vec::new() }
    }

    /// The legend: every layer that has a name.
    pub fn keys(&self) -> Vec<Key> {
        self.layers.iter().filter_map(Layer::key).collect()
    }

    /// Draws it; `label` is what a screen reader says.
    pub fn svg(&self, label: &str) -> String {
        let mut svg = Svg::new(self.width, self.height, label);
        let frame = frame::Frame::new(self);
        frame.draw_grid(&mut svg, self);
        for layer in &self.layers {
            layer.draw(&mut svg, &frame, self);
        }
        frame.draw_axes(&mut svg, self);
        svg.finish()
    }
}

/// A value at a tick.
fn tick_label(value: f64) -> String {
    match value.abs() {
        millions if millions >= 1e6 => format!("{}M", number::short(value / 1e6)),
        thousands if thousands >= 1e4 => format!("{}k", number::short(value / 1e3)),
        _ => number::short(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_short() {
        for (value, label) in
            [(0.0, "0"), (0.25, "0.25"), (0.1 + 0.2, "0.3"), (12_500.0, "12.5k"), (2e6, "2M")]
        {
            assert_eq!(tick_label(value), label);
        }
    }

    #[test]
    fn a_plot_draws_its_layers_and_lists_them() {
        let mut plot = Plot::new(
            Axis::new("time (s)", Scale::between(0.0, 10.0)),
            Axis::new("ms", Scale::from_zero([5.0])),
        );
        plot.layers.push(Layer::line("p50 <b>", Ink::Blue, Mark::Line, vec![(0.0, 1.0), (10.0, 5.0)]));
        let svg = plot.svg("latency");
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
        assert!(svg.contains("p50 &lt;b&gt;") && !svg.contains("<b>"), "{svg}");
        assert_eq!(plot.keys(), [Key { name: "p50 <b>".into(), ink: Ink::Blue, mark: Mark::Line }]);
    }
}
