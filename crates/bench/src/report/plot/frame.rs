//! The rectangle that a plot is drawn in, with its grid, ticks and the names of its axes.

use super::{Anchor, Axis, Plot, Svg, tick_label};

const TOP: f64 = 30.0;
const BOTTOM: f64 = 42.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 18.0;
/// With a second axis on the right.
const RIGHT_WITH_AXIS: f64 = 52.0;

/// Where values lie in the picture.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

impl Frame {
    pub fn new(plot: &Plot) -> Self {
        let margin = if plot.right.is_some() { RIGHT_WITH_AXIS } else { RIGHT };
        Self { left: LEFT, right: plot.width - margin, top: TOP, bottom: plot.height - BOTTOM }
    }

    pub fn x(&self, axis: &Axis, value: f64) -> f64 {
        self.left + axis.scale.place(value) * (self.right - self.left)
    }

    pub fn y(&self, axis: &Axis, value: f64) -> f64 {
        self.bottom - axis.scale.place(value) * (self.bottom - self.top)
    }

    pub fn draw_grid(&self, svg: &mut Svg, plot: &Plot) {
        for tick in ticks(&plot.y, 5) {
            let y = self.y(&plot.y, tick.0);
            svg.line("grid", (self.left, y), (self.right, y));
        }
    }

    /// Drawn last, so that nothing hides the line at the bottom.
    pub fn draw_axes(&self, svg: &mut Svg, plot: &Plot) {
        svg.line("axis", (self.left, self.bottom), (self.right, self.bottom));
        for (value, label) in ticks(&plot.x, 7) {
            let x = self.x(&plot.x, value);
            svg.line("axis", (x, self.bottom), (x, self.bottom + 4.0));
            svg.text("tick", (x, self.bottom + 18.0), Anchor::Middle, &label);
        }
        for (value, label) in ticks(&plot.y, 5) {
            svg.text("tick", (self.left - 8.0, self.y(&plot.y, value) + 4.0), Anchor::End, &label);
        }
        // Upright, above its axis: easier to read from afar than a text turned by a quarter.
        svg.text("name", (6.0, 14.0), Anchor::Start, &plot.y.label);
        svg.text("name", ((self.left + self.right) / 2.0, plot.height - 6.0), Anchor::Middle, &plot.x.label);
        if let Some(axis) = &plot.right {
            for (value, label) in ticks(axis, 5) {
                svg.text("tick", (self.right + 8.0, self.y(axis, value) + 4.0), Anchor::Start, &label);
            }
            svg.text("name", (plot.width - 6.0, 14.0), Anchor::End, &axis.label);
        }
    }
}

/// Values and labels of an axis.
fn ticks(axis: &Axis, wanted: usize) -> Vec<(f64, String)> {
    if !axis.ticks.is_empty() {
        return axis.ticks.clone();
    }
    axis.scale.ticks(wanted).into_iter().map(|value| (value, tick_label(value))).collect()
}
