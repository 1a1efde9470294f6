//! The picture of a batch ladder: throughput over batch, measured, fitted and predicted.

use servelab_sim::numbers::short;

use crate::experiments::Ladder;
use crate::report::plot::{Axis, Dot, Ink, Key, Layer, Mark, Plot, Scale};

/// Points of the fitted curve.
const CURVE_POINTS: usize = 60;

/// The drawing and its legend.
pub fn ladder(ladder: &Ladder) -> (String, Vec<Key>) {
    let batches = ladder.points.iter().map(|point| point.sequences);
    let x = Scale::log(batches.chain([1.0, 2.0 * ladder.half_batch.clamp(1.0, 1e4)]));
    let rates = ladder.points.iter().map(|point| point.tokens_per_second);
    let y = Scale::from_zero(rates.chain(ladder.predicted.iter().map(|(_, rate)| *rate)));
    let mut plot = Plot::new(Axis::new("sequences in the batch", x), Axis::new("output tokens/s", y));
    plot.width = 760.0;
    plot.x.ticks = ticks(x);
    plot.layers.push(Layer::line("fit", Ink::Blue, Mark::Line, fitted(ladder, x)));
    plot.layers.push(Layer::line("roofline", Ink::Grey, Mark::Dashed, ladder.predicted.clone()));
    let dots = ladder.points.iter().map(|point| Dot {
        x: point.sequences,
        y: point.tokens_per_second,
        label: String::new(),
        hover: format!("B = {:.0}: {:.0} tokens/s", point.sequences, point.tokens_per_second),
    });
    plot.layers.push(Layer::Dots {
        name: "measured".to_owned(),
        ink: Ink::Orange,
        mark: Mark::Point,
        dots: dots.collect(),
    });
    let label = format!("B_half {}", short(ladder.half_batch));
    plot.layers.push(Layer::Upright { at: ladder.half_batch, label, label_height: 0.95 });
    (plot.svg("throughput over batch size"), plot.keys())
}

/// Powers of two.
fn ticks(x: Scale) -> Vec<(f64, String)> {
    let (least, most) = x.ends();
    let powers = (0..20).map(|power| f64::from(1_u32 << power));
    powers
        .filter(|value| (least..=most).contains(value))
        .map(|value| (value, format!("{value:.0}")))
        .collect()
}

fn fitted(ladder: &Ladder, x: Scale) -> Vec<(f64, f64)> {
    let rate = |batch: f64| ladder.most_tokens_per_second * batch / (batch + ladder.half_batch);
    x.edges(CURVE_POINTS).into_iter().map(|batch| (batch, rate(batch))).collect()
}
