//! One repeat over time: latencies, concurrency, tokens, requests.

use super::document::Figure;
use super::number;
use super::plot::{Axis, Ink, Layer, Mark, Plot, Scale, WIDE};
use crate::result::{Bucket, Load, Point, Repeat, Spread};

/// The figures of a repeat; none if it has no series.
pub fn figures(point: &Point, repeat: &Repeat) -> Vec<Figure> {
    let series = &repeat.series;
    let sound = series.bucket_seconds > 0.0 && series.bucket_seconds.is_finite();
    if !sound || series.buckets.is_empty() {
        return Vec::new();
    }
    let mut figures = vec![
        latency(repeat, "TTFT over time", "of the requests whose first token came then", |b| b.ttft_ms),
        latency(repeat, "ITL over time", "of the gaps between tokens that ended then", |b| b.itl_ms),
        in_flight(point, repeat),
        tokens(repeat),
    ];
    // In a closed loop one arrives when another completes.
    if matches!(point.load, Load::Open { .. }) {
        figures.push(requests(repeat));
    }
    figures
}

/// A plot over the time of a repeat, with what was not measured shaded.
fn plot(repeat: &Repeat, y: Axis) -> Plot {
    let seconds = repeat.series.buckets.len() as f64 * repeat.series.bucket_seconds;
    let x = Axis::new("time since the start of the repeat (s)", Scale::between(0.0, seconds));
    let mut plot = Plot::new(x, y);
    let (start, end) = repeat.window_seconds;
    if start > 0.0 && start < seconds {
        plot.layers.push(Layer::Shade { from: 0.0, to: start, label: "warm-up, cut".into() });
    }
    if end > start && end < seconds {
        plot.layers.push(Layer::Shade { from: end, to: seconds, label: "cool-down, cut".into() });
    }
    plot
}

/// A value of each bucket, at its middle.
fn line(repeat: &Repeat, of: impl Fn(&Bucket) -> Option<f64>) -> Vec<(f64, f64)> {
    let width = repeat.series.bucket_seconds;
    let buckets = repeat.series.buckets.iter().enumerate();
    let values = buckets.filter_map(|(at, bucket)| Some(((at as f64 + 0.5) * width, of(bucket)?)));
    values.filter(|(_, value)| value.is_finite()).collect()
}

fn latency(repeat: &Repeat, title: &str, what: &str, of: fn(&Bucket) -> Option<Spread>) -> Figure {
    let percentile = |value: fn(Spread) -> f64| line(repeat, move |bucket| of(bucket).map(value));
    let lines = [
        ("p95", Ink::Amber, Mark::Dashed, percentile(|spread| spread.p95)),
        ("p99", Ink::Orange, Mark::Dotted, percentile(|spread| spread.p99)),
        ("p50", Ink::Blue, Mark::Line, percentile(|spread| spread.median)),
    ];
    let highest = lines[1].3.iter().map(|point| point.1);
    let mut plot = plot(repeat, Axis::new("ms", Scale::from_zero(highest)));
    for (name, ink, mark, points) in lines {
        plot.layers.push(Layer::line(name, ink, mark, points));
    }
    let caption =
        format!("Percentiles {what}, in steps of {} s.", number::short(repeat.series.bucket_seconds));
    Figure::new(title, caption, &plot)
}

fn in_flight(point: &Point, repeat: &Repeat) -> Figure {
    let points = line(repeat, |bucket| Some(bucket.mean_in_flight));
    let wanted = match point.load {
        Load::Closed { concurrency, .. } => Some(f64::from(concurrency)),
        Load::Open { max_concurrency, .. } => max_concurrency.map(f64::from),
    };
    let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);
    let wanted = wanted.filter(|wanted| *wanted <= 2.0 * highest);
    let scale = Scale::from_zero([highest, 1.1 * wanted.unwrap_or(0.0)]);
    let mut plot = plot(repeat, Axis::new("requests", scale));
    plot.layers.push(Layer::line("in flight", Ink::Green, Mark::Area, points));
    if let Some(at) = wanted {
        plot.layers.push(Layer::Level { at, label: format!("load: {}", number::short(at)) });
    }
    let caption = "Requests that were sent and had not ended, averaged over each step.";
    Figure::new("Concurrency over time", caption, &plot)
}

fn tokens(repeat: &Repeat) -> Figure {
    let width = repeat.series.bucket_seconds;
    let points = line(repeat, |bucket| Some(bucket.output_tokens / width));
    let scale = Scale::from_zero(points.iter().map(|point| point.1));
    let mut plot = plot(repeat, Axis::new("tokens/s", scale));
    plot.layers.push(Layer::line("output tokens", Ink::Blue, Mark::Area, points));
    let mean = repeat.metrics.output_throughput;
    plot.layers.push(Layer::Level { at: mean, label: format!("measured: {}", number::shown(mean)) });
    Figure::new("Output tokens per second over time", "By the time of their arrival at the client.", &plot)
}

fn requests(repeat: &Repeat) -> Figure {
    let width = repeat.series.bucket_seconds;
    let rate = |of: fn(&Bucket) -> u32| line(repeat, move |bucket| Some(f64::from(of(bucket)) / width));
    let lines = [
        ("arrived", Ink::Purple, Mark::Dashed, rate(|bucket| bucket.arrived)),
        ("completed", Ink::Green, Mark::Line, rate(|bucket| bucket.completed)),
        ("failed", Ink::Red, Mark::Dotted, rate(|bucket| bucket.failed)),
    ];
    let highest = lines.iter().flat_map(|line| line.3.iter().map(|point| point.1));
    let mut plot = plot(repeat, Axis::new("requests/s", Scale::from_zero(highest)));
    let has_failures = repeat.series.buckets.iter().any(|bucket| bucket.failed > 0);
    for (name, ink, mark, points) in lines {
        if name != "failed" || has_failures {
            plot.layers.push(Layer::line(name, ink, mark, points));
        }
    }
    let caption = "Arrivals are those of the schedule. Where they stay above what completes, a queue grows.";
    plot.width = WIDE;
    Figure { is_wide: true, ..Figure::new("Arrivals and completions over time", caption, &plot) }
}
