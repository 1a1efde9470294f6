//! How a latency is distributed: bars of how many, a line of how many so far.

use super::document::Figure;
use super::number;
use super::plot::{Axis, Ink, Layer, Mark, Plot, Scale, thinned};
use crate::histogram::Histogram;
use crate::result::Distribution;

const BARS: usize = 48;
/// Samples whose 99th percentile is that many times the first get a logarithmic axis.
const WIDE: f64 = 12.0;

/// A bar of so many percent leaves the others no room.
const TOWERING: f64 = 60.0;

/// From, to, and how much of the sample lies between.
type Part = (f64, f64, f64);

/// Of a latency in milliseconds; `None` if nothing was measured. `samples` is the same one by one, if it is known:
/// without it the picture is drawn from the percentiles, a hundredth at a time.
pub fn figure(name: &str, numbers: &Distribution, samples: Option<&Histogram>) -> Option<Figure> {
    let parts = match samples.filter(|histogram| histogram.count() > 0) {
        Some(histogram) => parts_of_histogram(histogram),
        None => parts_of_percentiles(&numbers.percentiles),
    };
    let total: f64 = parts.iter().map(|part| part.2).sum();
    if numbers.count == 0 || total.is_nan() || total <= 0.0 {
        return None;
    }
    let scale = scale(numbers);
    let bars = bars(&parts, scale, total);
    let (shares, unit) = shares(&bars);
    let mut plot = Plot::new(
        Axis::new(format!("{name} (ms{})", if is_log(scale) { ", logarithmic" } else { "" }), scale),
        Axis::new(format!("share of {} ({unit})", what(name)), shares),
    );
    plot.right = Some(Axis::new("at most that long (%)", Scale::between(0.0, 100.0)));
    let shown = |(from, to, share): &Part| {
        let text =
            format!("{} to {} ms: {}", number::shown(*from), number::shown(*to), number::percent(*share));
        (*from, *to, 100.0 * share, text)
    };
    let bars = bars.iter().filter(|bar| bar.2 > 0.0).map(shown).collect();
    plot.layers.push(Layer::Bars { name: format!("share of {}", what(name)), ink: Ink::Blue, bars });
    plot.layers.push(Layer::Line {
        name: "at most that long".into(),
        ink: Ink::Orange,
        mark: Mark::Line,
        points: cumulative(&parts, scale, total),
        on_right: true,
    });
    // Each label stands to the right of its line and below the cumulative one.
    for (label, at, label_height) in
        [("p50", numbers.median, 0.41), ("p90", numbers.p90, 0.79), ("p99", numbers.p99, 0.89)]
    {
        let label = format!("{label} {}", number::shown(at));
        plot.layers.push(Layer::Upright { at, label, label_height });
    }
    let caption = format!(
        "{} {}: mean {} ms, standard deviation {} ms, longest {} ms.",
        number::count(numbers.count),
        what(name),
        number::shown(numbers.mean),
        number::shown(numbers.std),
        number::shown(numbers.max)
    );
    Some(Figure::new(format!("{name}: distribution"), caption, &plot))
}

/// The axis of the bars, in percent. Where one bar towers over all, as between the steps of a steady batch, only a
/// logarithmic one shows the others.
fn shares(bars: &[Part]) -> (Scale, &'static str) {
    let percents: Vec<f64> = bars.iter().map(|bar| 100.0 * bar.2).filter(|percent| *percent > 0.0).collect();
    let highest = percents.iter().copied().fold(0.0, f64::max);
    if highest < TOWERING {
        return (Scale::from_zero(percents), "%");
    }
    let lowest = percents.iter().copied().fold(highest, f64::min).max(0.01);
    (Scale::Log { min: lowest / 2.0, max: 100.0 }, "%, logarithmic")
}

fn what(name: &str) -> &'static str {
    if name == "ITL" { "gaps" } else { "requests" }
}

fn is_log(scale: Scale) -> bool {
    matches!(scale, Scale::Log { .. })
}

/// Up to the longest, or, if that stands far out, to somewhat above the 99th percentile.
fn scale(numbers: &Distribution) -> Scale {
    let low = numbers.percentiles.get(1).copied().unwrap_or(numbers.min);
    let is_wide = low > 0.0 && numbers.p99 / low > WIDE;
    if is_wide {
        return Scale::log([numbers.min.max(low / 4.0), numbers.max]);
    }
    let high = numbers.max.min(1.5 * numbers.p99_9.max(numbers.p99));
    let room = 0.06 * (high - numbers.min).max(0.02 * high);
    Scale::between((numbers.min - room).max(0.0), high + room)
}

fn parts_of_histogram(histogram: &Histogram) -> Vec<Part> {
    let ms = |time: std::time::Duration| 1000.0 * time.as_secs_f64();
    histogram.buckets().map(|(from, to, count)| (ms(from), ms(to), count as f64)).collect()
}

fn parts_of_percentiles(percentiles: &[f64]) -> Vec<Part> {
    percentiles.windows(2).map(|ends| (ends[0], ends[1], 1.0)).collect()
}

/// What lies beyond the axis is in the first and the last bar.
fn bars(parts: &[Part], scale: Scale, total: f64) -> Vec<Part> {
    let edges = scale.edges(BARS);
    let mut bars: Vec<Part> = edges.windows(2).map(|ends| (ends[0], ends[1], 0.0)).collect();
    for &(from, to, amount) in parts {
        let place = |value: f64| scale.place(value) * BARS as f64;
        let (first, last) = (place(from), place(to));
        for (at, bar) in
            bars.iter_mut().enumerate().take(last.ceil() as usize + 1).skip((first as usize).min(BARS - 1))
        {
            bar.2 += amount / total * overlap((first, last), at);
        }
    }
    bars
}

/// How much of a part lies in bar `at`, both in bars since the beginning of the axis.
fn overlap((first, last): (f64, f64), at: usize) -> f64 {
    let at = at as f64;
    if last - first < 1e-9 {
        // A point, or beyond an end of the axis.
        let bar = first.floor().min(BARS as f64 - 1.0);
        return if bar == at { 1.0 } else { 0.0 };
    }
    (last.min(at + 1.0) - first.max(at)).max(0.0) / (last - first)
}

/// In percent.
fn cumulative(parts: &[Part], scale: Scale, total: f64) -> Vec<(f64, f64)> {
    let (min, max) = scale.ends();
    let mut so_far = 0.0;
    let mut points: Vec<(f64, f64)> = vec![(min, 0.0)];
    for (_, to, amount) in parts {
        so_far += amount;
        points.push((*to, 100.0 * so_far / total));
    }
    points.retain(|point| (min..=max).contains(&point.0));
    thinned(points)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stats::distribution;

    #[test]
    fn bars_hold_the_whole_sample() {
        for values in
            [vec![5.0; 10], (1..1000).map(f64::from).collect(), vec![1.0, 1.0, 5000.0], vec![0.0, 3.0]]
        {
            let numbers = distribution(&mut values.clone());
            let mut histogram = Histogram::default();
            values.iter().for_each(|ms| histogram.record(Duration::from_secs_f64(ms / 1000.0)));
            for parts in [parts_of_histogram(&histogram), parts_of_percentiles(&numbers.percentiles)] {
                let total: f64 = parts.iter().map(|part| part.2).sum();
                let sum: f64 = bars(&parts, scale(&numbers), total).iter().map(|bar| bar.2).sum();
                assert!((sum - 1.0).abs() < 1e-9, "{sum} of {numbers:?}");
            }
        }
    }

    #[test]
    fn the_line_ends_at_everything() {
        let numbers = distribution(&mut (1..=100).map(f64::from).collect::<Vec<_>>());
        let line = cumulative(&parts_of_percentiles(&numbers.percentiles), scale(&numbers), 100.0);
        assert!(line.is_sorted_by(|a, b| a.1 <= b.1), "{line:?}");
        assert!((line.last().unwrap().1 - 100.0).abs() < 1e-9, "{line:?}");
    }

    #[test]
    fn nothing_measured_is_no_figure() {
        assert!(figure("TTFT", &Distribution::default(), None).is_none());
    }
}
