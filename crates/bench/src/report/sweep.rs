//! Several levels of load beside each other: the table, what load does to throughput and latency, and the Pareto
//! curve of throughput against speed for one user.

use super::document::{Cell, Column, Figure, Section, Table, Tone};
use super::level;
use super::number::{self, shown};
use super::plot::{Axis, Dot, Ink, Layer, Mark, Plot, Scale};
use crate::result::{BenchResult, Load, Metrics, Point, Search};

/// A limit that lies farther above what was measured would flatten the plot.
const MAX_LIMIT_ABOVE: f64 = 4.0;
/// Share of the axis that the label of a tick takes.
const TICK_ROOM: f64 = 0.09;
/// Loads that are farther apart get a logarithmic axis.
const WIDE: f64 = 8.0;

/// `None` for a single level.
pub fn section(result: &BenchResult) -> Option<Section> {
    if result.points.len() < 2 {
        return None;
    }
    let mut section = Section::new("levels", "Levels of load");
    section.table(table(result));
    if result.points.len() > level::MAX_SHOWN {
        section.text("Below, some of the levels are shown in full.");
    }
    if let Some(ladder) = Ladder::of(&result.points) {
        section.figures([ladder.throughput(), ladder.tpot(), ladder.ttft(), pareto(result)]);
    } else {
        section.figures([pareto(result)]);
    }
    Some(section)
}

fn table(result: &BenchResult) -> Table {
    let columns = [
        "req/s",
        "out tok/s",
        "in flight",
        "TTFT p50, ms",
        "TTFT p99, ms",
        "TPOT p50, ms",
        "ITL p99, ms",
        "failed",
    ];
    let mut table = Table {
        caption: "One row a level, all repeats of it pooled.".into(),
        columns: std::iter::once(Column::text("Load")).chain(columns.map(Column::number)).collect(),
        rows: Vec::new(),
    };
    let in_full = level::in_full(result);
    for (number, point) in result.points.iter().enumerate() {
        let metrics = &point.metrics;
        let tone = if metrics.failed > 0 { Tone::Bad } else { Tone::Plain };
        let link = in_full.contains(&number).then(|| level::id(number));
        let mut row = vec![Cell { link, ..Cell::from(point.load.to_string()) }];
        row.extend(
            [
                metrics.request_throughput,
                metrics.output_throughput,
                metrics.mean_in_flight,
                metrics.ttft_ms.median,
                metrics.ttft_ms.p99,
                metrics.tpot_ms.median,
                metrics.itl_ms.p99,
            ]
            .map(|value| Cell::from(shown(value))),
        );
        row.push(Cell::toned(number::count(metrics.failed), tone));
        table.rows.push(row);
    }
    table
}

/// Levels along one axis, in its order.
struct Ladder<'a> {
    levels: Vec<(f64, &'a Point)>,
    label: &'static str,
}

impl<'a> Ladder<'a> {
    /// `None` if the levels have no common measure.
    fn of(points: &'a [Point]) -> Option<Self> {
        let concurrency = |point: &Point| match point.load {
            Load::Closed { concurrency, .. } => Some(f64::from(concurrency)),
            Load::Open { .. } => None,
        };
        let rate = |point: &Point| match point.load {
            Load::Open { rate, .. } => rate,
            Load::Closed { .. } => None,
        };
        let all = |of: &dyn Fn(&Point) -> Option<f64>| -> Option<Vec<(f64, &'a Point)>> {
            let mut levels: Vec<_> =
                points.iter().map(|point| Some((of(point)?, point))).collect::<Option<_>>()?;
            levels.sort_by(|a, b| a.0.total_cmp(&b.0));
            Some(levels)
        };
        let closed =
            all(&concurrency).map(|levels| Self { levels, label: "concurrency (requests in flight)" });
        closed.or_else(|| all(&rate).map(|levels| Self { levels, label: "rate of arrivals (requests/s)" }))
    }

    /// From 0: only so does throughput show where it saturates.
    fn linear_x(&self) -> Axis {
        Axis::new(self.label, Scale::from_zero(self.levels.iter().map(|level| level.0)))
    }

    fn x(&self) -> Axis {
        let values: Vec<f64> = self.levels.iter().map(|level| level.0).collect();
        let (low, high) = (values[0], values[values.len() - 1]);
        let is_wide = low > 0.0 && high / low >= WIDE;
        let scale = if is_wide { Scale::log(values.iter().copied()) } else { Scale::from_zero([high]) };
        let mut axis = Axis::new(self.label, scale);
        if is_wide {
            axis.ticks =
                apart(&values, scale).into_iter().map(|value| (value, number::short(value))).collect();
        }
        axis
    }

    fn line(&self, of: impl Fn(&Metrics) -> f64) -> Vec<(f64, f64)> {
        let measured = self.levels.iter().filter(|(_, point)| point.metrics.completed > 0);
        measured.map(|(x, point)| (*x, of(&point.metrics))).collect()
    }

    /// What the hardware allows at each level.
    fn limit(&self, metric: &str) -> Vec<(f64, f64)> {
        self.levels.iter().filter_map(|(x, point)| Some((*x, limit(point, metric)?))).collect()
    }

    fn intervals(&self, key: &str) -> Vec<(f64, f64, f64)> {
        let known = self.levels.iter().filter_map(|(x, point)| Some((*x, point.intervals.get(key)?)));
        known.map(|(x, i)| (x, (i.mean - i.half_width).max(0.0), i.mean + i.half_width)).collect()
    }

    fn throughput(&self) -> Figure {
        let measured = self.line(|metrics| metrics.output_throughput);
        let highest = measured.iter().map(|point| point.1).fold(0.0, f64::max);
        let limit = self.limit("output_throughput");
        let intervals = self.intervals("output_throughput");
        let is_near = limit.iter().all(|point| point.1 <= MAX_LIMIT_ABOVE * highest);
        let drawn_limit = if is_near { limit.clone() } else { Vec::new() };
        let all =
            measured.iter().chain(&drawn_limit).map(|point| point.1).chain(intervals.iter().map(|i| i.2));
        let mut plot = Plot::new(self.linear_x(), Axis::new("output tokens/s", Scale::from_zero(all)));
        if !drawn_limit.is_empty() {
            plot.layers.push(Layer::line("limit of the hardware", Ink::Grey, Mark::Dashed, drawn_limit));
        }
        plot.layers.push(Layer::line("measured", Ink::Blue, Mark::Line, measured));
        plot.layers.push(Layer::Intervals { ink: Ink::Blue, intervals });
        let mut caption = String::from("Bars are 95 % intervals of the mean over the repeats.");
        match (limit.is_empty(), is_near) {
            (true, _) => caption += " No limit is drawn: hardware or model is not known.",
            (false, false) => caption += " The limit of the hardware lies far above the plot.",
            (false, true) => caption += " No schedule can exceed the limit of the hardware.",
        }
        Figure::new("Throughput against load", caption, &plot)
    }

    fn tpot(&self) -> Figure {
        let caption =
            "Time per output token of a request, after its first. No step can be shorter than its floor.";
        let floor = self.limit("median_tpot_ms");
        self.latency(
            "TPOT against load",
            caption,
            |metrics| (metrics.tpot_ms.median, metrics.tpot_ms.p99),
            floor,
        )
    }

    fn ttft(&self) -> Figure {
        let caption =
            "Time to the first token, from the scheduled arrival. Where it turns upwards a queue begins.";
        self.latency(
            "TTFT against load",
            caption,
            |metrics| (metrics.ttft_ms.median, metrics.ttft_ms.p99),
            Vec::new(),
        )
    }

    fn latency(
        &self,
        title: &str,
        caption: &str,
        of: impl Fn(&Metrics) -> (f64, f64),
        floor: Vec<(f64, f64)>,
    ) -> Figure {
        let (middle, tail) = (self.line(|metrics| of(metrics).0), self.line(|metrics| of(metrics).1));
        let all: Vec<f64> = [&middle, &tail, &floor].into_iter().flatten().map(|point| point.1).collect();
        let low = all.iter().copied().fold(f64::INFINITY, f64::min);
        let high = all.iter().copied().fold(0.0, f64::max);
        let is_wide = low > 0.0 && high / low > 20.0;
        let scale = if is_wide { Scale::log(all) } else { Scale::from_zero(all) };
        let unit = if is_wide { "ms, logarithmic" } else { "ms" };
        let mut plot = Plot::new(self.x(), Axis::new(unit, scale));
        plot.layers.push(Layer::line("p99", Ink::Orange, Mark::Dotted, tail));
        plot.layers.push(Layer::line("p50", Ink::Blue, Mark::Line, middle));
        if !floor.is_empty() {
            plot.layers.push(Layer::line("floor of the hardware", Ink::Grey, Mark::Dashed, floor));
        }
        Figure::new(title, caption, &plot)
    }
}

/// Those of the ascending values that have room for a label.
fn apart(values: &[f64], scale: Scale) -> Vec<f64> {
    let mut kept: Vec<f64> = Vec::new();
    for value in values {
        if kept.last().is_none_or(|last| scale.place(*value) - scale.place(*last) >= TICK_ROOM) {
            kept.push(*value);
        }
    }
    kept
}

fn limit(point: &Point, metric: &str) -> Option<f64> {
    let rows = &point.limits.as_ref()?.rows;
    rows.iter().find(|row| row.metric == metric).map(|row| row.limit).filter(|limit| limit.is_finite())
}

/// Tokens/s of a GPU against tokens/s of a user.
fn pareto(result: &BenchResult) -> Figure {
    let gpus = result.header.gpus.filter(|gpus| *gpus > 0);
    let share = f64::from(gpus.unwrap_or(1));
    let mut dots: Vec<Dot> = result.points.iter().filter_map(|point| dot(point, share)).collect();
    dots.sort_by(|a, b| b.x.total_cmp(&a.x));
    let front = front(&dots);
    let limit = limit_curve(&result.points, share);
    let highest = dots.iter().map(|dot| dot.y).fold(0.0, f64::max);
    let fastest = dots.iter().map(|dot| dot.x).fold(0.0, f64::max);
    let is_near =
        limit.iter().all(|(x, y)| *x <= MAX_LIMIT_ABOVE * fastest && *y <= MAX_LIMIT_ABOVE * highest);
    let limit = if is_near { limit } else { Vec::new() };
    let xs = dots.iter().map(|dot| dot.x).chain(limit.iter().map(|point| point.0));
    let ys = dots.iter().map(|dot| dot.y).chain(limit.iter().map(|point| point.1));
    let per = if gpus.is_some() { "GPU" } else { "replica" };
    let mut plot = Plot::new(
        Axis::new("output tokens/s for one user (1 / median TPOT)", Scale::around(xs)),
        Axis::new(format!("output tokens/s of a {per}"), Scale::from_zero(ys)),
    );
    if !limit.is_empty() {
        plot.layers.push(Layer::line("limit of the hardware", Ink::Grey, Mark::Dashed, limit));
    }
    plot.layers.push(Layer::line(
        "",
        Ink::Blue,
        Mark::Line,
        front.iter().map(|dot| (dot.x, dot.y)).collect(),
    ));
    let (on, off): (Vec<Dot>, Vec<Dot>) =
        dots.into_iter().partition(|dot| front.iter().any(|f| f.x == dot.x && f.y == dot.y));
    if !off.is_empty() {
        plot.layers.push(Layer::Dots {
            name: "another level is better in both".into(),
            ink: Ink::Grey,
            mark: Mark::Hollow,
            dots: off,
        });
    }
    plot.layers.push(Layer::Dots {
        name: "Pareto front".into(),
        ink: Ink::Blue,
        mark: Mark::Point,
        dots: on,
    });
    let caption = format!(
        "Up is cheaper, right is faster for each user. A level of load chooses a point; only a better system moves the curve. Numbers are the levels of load{}.",
        if gpus.is_some() { "" } else { "; the number of GPUs is not known" }
    );
    Figure::new(format!("Throughput of a {per} against speed for a user"), caption, &plot)
}

fn dot(point: &Point, gpus: f64) -> Option<Dot> {
    let tpot = point.metrics.tpot_ms.median;
    if tpot <= 0.0 || !tpot.is_finite() {
        return None;
    }
    let (x, y) = (1000.0 / tpot, point.metrics.output_throughput / gpus);
    let label = match point.load {
        Load::Closed { concurrency, .. } => concurrency.to_string(),
        Load::Open { rate, .. } => rate.map(number::short).unwrap_or_default(),
    };
    let hover = format!("{}: {} tokens/s for a user, {} in all", point.load, shown(x), shown(y));
    Some(Dot { x, y, label, hover })
}

/// Those that no other beats in both, from the fastest on. `dots` come in that order.
fn front(dots: &[Dot]) -> Vec<Dot> {
    let mut front: Vec<Dot> = Vec::new();
    for dot in dots {
        if front.last().is_none_or(|last| dot.y > last.y) {
            front.push(dot.clone());
        }
    }
    front
}

/// The throughput that the hardware allows at the sequences of each level, and what each of them gets of it.
fn limit_curve(points: &[Point], gpus: f64) -> Vec<(f64, f64)> {
    let mut curve: Vec<(f64, f64)> = points
        .iter()
        .filter_map(|point| {
            let limit = limit(point, "output_throughput")?;
            Some((limit / f64::from(point.metrics.peak_in_flight.max(1)), limit / gpus))
        })
        .collect();
    curve.sort_by(|a, b| a.0.total_cmp(&b.0));
    curve
}

/// What a search for the highest rate tried.
pub fn search_section(search: &Search) -> Section {
    let mut section = Section::new("search", "Search for the highest rate that keeps the SLO");
    let best = search.best_rate.map_or("No rate kept the SLO.".to_owned(), |rate| {
        format!("Highest rate that kept the SLO: {} requests/s.", number::short(rate))
    });
    let failed = search.lowest_rate_that_failed.map_or(String::new(), |rate| {
        format!(" Lowest rate that did not: {} requests/s.", number::short(rate))
    });
    section.text(format!("{best}{failed} It ended because {}.", search.ended));
    let mut table = Table {
        caption: format!("In the order of the trials. The search {}.", search.stopping_rule),
        columns: vec![Column::number("rate, req/s"), Column::text("SLO"), Column::text("why")],
        rows: Vec::new(),
    };
    for trial in &search.trials {
        let judged =
            if trial.kept { Cell::toned("kept", Tone::Good) } else { Cell::toned("broken", Tone::Bad) };
        table.rows.push(vec![number::short(trial.rate).into(), judged, trial.reason.clone().into()]);
    }
    section.table(table);
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot_at(x: f64, y: f64) -> Dot {
        Dot { x, y, label: String::new(), hover: String::new() }
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let dots = [(9.0, 1.0), (7.0, 5.0), (6.0, 4.0), (3.0, 8.0)].map(|(x, y)| dot_at(x, y));
        let front: Vec<(f64, f64)> = front(&dots).iter().map(|dot| (dot.x, dot.y)).collect();
        assert_eq!(front, [(9.0, 1.0), (7.0, 5.0), (3.0, 8.0)]);
    }
}
