//! What a run gave, as one self-contained page: several autoscalers side by side, everything over one time axis.

use servelab_bench::report::document::{
    Cell, Column, Document, Fact, Figure, Section, Table, Tile, Tone, Verdict,
};
use servelab_bench::report::number;
use servelab_bench::report::plot::{Axis, Dot, Ink, Layer, Mark, Plot, Scale, WIDE};
use servelab_bench::result::SloMetric;

use crate::outcome::Outcome;
use crate::search::Search;
use crate::series::{Latency, Row};
use crate::settings::Settings;
use crate::text;

/// Lines of a log that the page shows.
const MOST_LINES: usize = 250;

/// What stands above all: what was simulated.
#[derive(Clone, Debug)]
pub struct Heading {
    pub title: String,
    /// Names and values, such as the model and the hardware.
    pub facts: Vec<(String, String)>,
    /// What a reader must not forget.
    pub notes: Vec<String>,
}

/// The page.
///
/// # Errors
/// If the template does not fit, which the tests rule out.
pub fn html(
    heading: &Heading,
    settings: &Settings,
    outcomes: &[Outcome],
) -> Result<String, servelab_bench::report::PageError> {
    servelab_bench::report::page(&document(heading, settings, outcomes))
}

/// The page of a search: what was tried, and the smallest fleet that kept the SLO over time, or else the largest.
///
/// # Errors
/// If the template does not fit, which the tests rule out.
pub fn search_html(
    heading: &Heading,
    settings: &Settings,
    search: &Search,
) -> Result<String, servelab_bench::report::PageError> {
    let chosen = search.tried.iter().find(|(replicas, _)| Some(*replicas) == search.smallest);
    let shown: Vec<Outcome> =
        chosen.or(search.tried.last()).map(|(_, outcome)| outcome.clone()).into_iter().collect();
    let mut document = document(heading, settings, &shown);
    document.sections.insert(0, tried(settings, search));
    servelab_bench::report::page(&document)
}

/// The p95 of the time to first token by the size of the fleet, and all figures of each.
fn tried(settings: &Settings, search: &Search) -> Section {
    let mut section = Section::new("tried", "Fleets that were tried");
    let dot = |(replicas, outcome): &(u32, Outcome)| {
        let ttft = outcome.ttft_seconds?;
        let word = if outcome.slo_is_kept() { "kept" } else { "broken" };
        let hover = format!("{replicas} replicas: p95 {} s, SLO {word}", number::shown(ttft.p95));
        Some(Dot { x: f64::from(*replicas), y: ttft.p95, label: replicas.to_string(), hover })
    };
    let of = |is_kept: bool| {
        let tried = search.tried.iter().filter(move |(_, outcome)| outcome.slo_is_kept() == is_kept);
        tried.filter_map(dot).collect::<Vec<Dot>>()
    };
    let limits = settings.slo.limits.iter().filter(|limit| limit.metric == SloMetric::Ttft);
    let limits: Vec<(f64, String)> =
        limits.map(|limit| (limit.limit_ms / 1e3, format!("p{} within", limit.percentile))).collect();
    let heights = search.tried.iter().filter_map(|(_, outcome)| Some(outcome.ttft_seconds?.p95));
    let sizes = search.tried.iter().map(|(replicas, _)| f64::from(*replicas));
    let mut plot = Plot::new(
        Axis::new("replicas", Scale::from_zero(sizes)),
        Axis::new("TTFT p95, seconds", Scale::log(heights.chain(limits.iter().map(|limit| limit.0)))),
    );
    plot.width = WIDE;
    for (name, ink, mark, is_kept) in
        [("SLO broken", Ink::Red, Mark::Hollow, false), ("SLO kept", Ink::Green, Mark::Point, true)]
    {
        plot.layers.push(Layer::Dots { name: name.into(), ink, mark, dots: of(is_kept) });
    }
    plot.layers.extend(limits.into_iter().map(|(at, label)| Layer::Level { at, label }));
    let caption = "Each point is a simulation of the whole load.";
    section.figures([Figure {
        is_wide: true,
        ..Figure::new("Time to first token by size of the fleet", caption, &plot)
    }]);
    let outcomes: Vec<Outcome> = search.tried.iter().map(|(_, outcome)| outcome.clone()).collect();
    section.blocks.extend(comparison(&outcomes).blocks);
    section
}

fn document(heading: &Heading, settings: &Settings, outcomes: &[Outcome]) -> Document {
    let mut sections = vec![comparison(outcomes)];
    sections.extend(over_time(settings, outcomes));
    sections.extend(outcomes.iter().enumerate().map(|(at, outcome)| log(at, outcome, outcomes.len() > 1)));
    Document {
        brand: "servelab sim",
        title: heading.title.clone(),
        summary: heading.facts.iter().map(|(name, value)| Fact::new(name, value)).collect(),
        verdict: verdict(heading, outcomes),
        tiles: outcomes.first().filter(|_| outcomes.len() == 1).map(tiles).unwrap_or_default(),
        sections,
    }
}

fn verdict(heading: &Heading, outcomes: &[Outcome]) -> Verdict {
    let kept = outcomes.iter().filter(|outcome| outcome.slo_is_kept()).count();
    let headline = match (outcomes, kept) {
        ([_], 1) => "The SLO was kept".to_owned(),
        ([_], _) => "The SLO was broken".to_owned(),
        (all, kept) => format!("{kept} of {} kept the SLO", all.len()),
    };
    let reason = |outcome: &Outcome| {
        let limits = outcome.slo.iter().map(|limit| {
            let word = if limit.is_kept { "kept" } else { "broken" };
            format!("{} {word} ({} within)", limit.limit, number::percent(limit.share))
        });
        let limits: Vec<String> = limits.collect();
        format!("{}: {}; {} failed", outcome.scaler, limits.join(", "), number::count(outcome.failed()))
    };
    Verdict {
        is_sound: kept > 0,
        headline,
        reasons: outcomes.iter().map(reason).collect(),
        notes: heading.notes.clone(),
    }
}

fn tiles(outcome: &Outcome) -> Vec<Tile> {
    let tile = |label: &str, value: String, unit: &str, note: String, tone| Tile {
        label: label.into(),
        value,
        unit: unit.into(),
        note,
        definition: None,
        tone,
    };
    let ttft = outcome.ttft_seconds.unwrap_or_default();
    let good = if outcome.slo_is_kept() { Tone::Good } else { Tone::Bad };
    vec![
        tile("TTFT p95", number::shown(ttft.p95), "s", format!("p50 {} s", number::shown(ttft.p50)), good),
        tile(
            "within the SLO",
            number::percent(outcome.good_share),
            "",
            format!("of {} requests", number::count(outcome.requests)),
            good,
        ),
        tile(
            "replicas",
            number::shown(outcome.mean_ready),
            "on average",
            format!("{} at most", outcome.most_ready),
            Tone::Plain,
        ),
        tile(
            "GPU-hours",
            number::shown(outcome.gpu_hours),
            "",
            format!("{} dollars", number::shown(outcome.dollars)),
            Tone::Plain,
        ),
    ]
}

fn comparison(outcomes: &[Outcome]) -> Section {
    let mut section = Section::new("result", "Result");
    let column = |(title, is_number): &(&str, bool)| match is_number {
        true => Column::number(title),
        false => Column::text(title),
    };
    let rows = outcomes.iter().map(|outcome| {
        let tone = if outcome.slo_is_kept() { Tone::Good } else { Tone::Bad };
        let cells = text::cells(outcome).into_iter().enumerate();
        cells.map(|(at, cell)| if at == 3 { Cell::toned(cell, tone) } else { cell.into() }).collect()
    });
    section.table(Table {
        caption: "Requests that failed count as outside of every limit. Turns: how often the scaler went from more to \
                  fewer or back. GPU-hours are those that pods held, from their node to their end."
            .into(),
        columns: text::COLUMNS.iter().map(column).collect(),
        rows: rows.collect(),
    });
    section
}

/// One section for each quantity, with a figure for each outcome on the same scales; all in one for a single outcome.
fn over_time(settings: &Settings, outcomes: &[Outcome]) -> Vec<Section> {
    let quantities: [(&str, &str, Draw); 6] = [
        ("traffic", "Traffic", traffic),
        ("replicas", "Replicas", replicas),
        ("queue", "Requests that wait", queue),
        ("ttft", "Time to first token", ttft),
        ("use", "KV cache and GPUs", usage),
        ("money", "GPU-hours", money),
    ];
    if outcomes.len() == 1 {
        let mut section = Section::new("time", "Over time");
        for (_, title, draw) in quantities {
            section.figures(outcomes.iter().map(|outcome| draw(settings, outcomes, outcome, title, true)));
        }
        return vec![section];
    }
    let section = |(id, title, draw): (&str, &str, Draw)| {
        let mut section = Section::new(id, title);
        let figures =
            outcomes.iter().map(|outcome| draw(settings, outcomes, outcome, &outcome.scaler, false));
        section.figures(figures.collect::<Vec<_>>());
        section
    };
    quantities.into_iter().map(section).collect()
}

type Draw = fn(&Settings, &[Outcome], &Outcome, &str, bool) -> Figure;

/// A line of a figure: name, colour, form, values.
type Line = (&'static str, Ink, Mark, Vec<(f64, f64)>);

fn of_rows(outcome: &Outcome, value: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    outcome.rows.iter().map(|row| (row.seconds, value(row))).collect()
}

/// Draws lines over the time of the longest outcome, up to the highest value of all of them.
struct Frame<'a> {
    outcomes: &'a [Outcome],
    unit: &'static str,
    title: &'a str,
    caption: &'static str,
    is_wide: bool,
}

impl Frame<'_> {
    fn draw(&self, scale: Scale, lines: Vec<Line>, layers: Vec<Layer>) -> Figure {
        let seconds = self.outcomes.iter().filter_map(|outcome| Some(outcome.rows.last()?.seconds));
        let axis = Axis::new("time (s)", Scale::between(0.0, seconds.fold(1.0, f64::max)));
        let mut plot = Plot::new(axis, Axis::new(self.unit, scale));
        (plot.width, plot.height) = if self.is_wide { (WIDE, 250.0) } else { (plot.width, plot.height) };
        for (name, ink, mark, points) in lines {
            plot.layers.push(Layer::line(name, ink, mark, points));
        }
        plot.layers.extend(layers);
        Figure { is_wide: self.is_wide, ..Figure::new(self.title, self.caption, &plot) }
    }

    fn scale(&self, value: impl Fn(&Row) -> f64) -> Scale {
        Scale::from_zero(self.outcomes.iter().flat_map(|outcome| outcome.rows.iter().map(&value)))
    }
}

fn traffic(_: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption = "Requests that came, that were answered whole, and that failed.";
    let frame = Frame { outcomes, unit: "requests/s", title, caption, is_wide };
    let scale = frame.scale(|row| row.offered_per_second.max(row.completed_per_second));
    let mut lines = vec![
        ("offered", Ink::Purple, Mark::Dashed, of_rows(outcome, |row| row.offered_per_second)),
        ("completed", Ink::Green, Mark::Line, of_rows(outcome, |row| row.completed_per_second)),
    ];
    if outcome.failed() > 0 {
        lines.push(("failed", Ink::Red, Mark::Dotted, of_rows(outcome, |row| row.failed_per_second)));
    }
    frame.draw(scale, lines, Vec::new())
}

fn replicas(_: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption = "What the autoscaler wants, what is ready, and what is on its way.";
    let frame = Frame { outcomes, unit: "replicas", title, caption, is_wide };
    let scale = frame.scale(|row| f64::from(row.wanted.max(row.ready + row.draining)));
    let lines = vec![
        ("ready", Ink::Green, Mark::Area, of_rows(outcome, |row| f64::from(row.ready))),
        ("starting", Ink::Amber, Mark::Line, of_rows(outcome, |row| f64::from(row.starting + row.pending))),
        ("draining", Ink::Grey, Mark::Dotted, of_rows(outcome, |row| f64::from(row.draining))),
        ("wanted", Ink::Blue, Mark::Dashed, of_rows(outcome, |row| f64::from(row.wanted))),
    ];
    frame.draw(scale, lines, Vec::new())
}

fn queue(_: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption =
        "In the queues of the replicas, and in the router: held while nobody is ready, or waiting for room.";
    let frame = Frame { outcomes, unit: "requests", title, caption, is_wide };
    let scale = frame.scale(|row| f64::from(row.queued.max(row.router_waiting)));
    let lines = vec![
        ("at the replicas", Ink::Orange, Mark::Line, of_rows(outcome, |row| f64::from(row.queued))),
        ("in the router", Ink::Blue, Mark::Dashed, of_rows(outcome, |row| f64::from(row.router_waiting))),
    ];
    frame.draw(scale, lines, Vec::new())
}

fn ttft(settings: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption = "Of the requests that arrived then, from their arrival at the router. Logarithmic.";
    let frame = Frame { outcomes, unit: "seconds", title, caption, is_wide };
    let all = outcomes.iter().flat_map(|outcome| outcome.ttft_rows.iter().flatten());
    let limits = settings.slo.limits.iter().filter(|limit| limit.metric == SloMetric::Ttft);
    let limits: Vec<(f64, String)> =
        limits.map(|limit| (limit.limit_ms / 1e3, format!("p{} within", limit.percentile))).collect();
    let ends = all.flat_map(|latency| [latency.p50, latency.p99]);
    let scale = Scale::log(ends.chain(limits.iter().map(|limit| limit.0)));
    let line = |value: fn(&Latency) -> f64| {
        let rows = outcome.rows.iter().zip(&outcome.ttft_rows);
        rows.filter_map(|(row, latency)| Some((row.seconds, value(latency.as_ref()?)))).collect()
    };
    let lines = vec![
        ("p50", Ink::Blue, Mark::Line, line(|latency| latency.p50)),
        ("p95", Ink::Amber, Mark::Dashed, line(|latency| latency.p95)),
        ("p99", Ink::Orange, Mark::Dotted, line(|latency| latency.p99)),
    ];
    frame.draw(scale, lines, limits.into_iter().map(|(at, label)| Layer::Level { at, label }).collect())
}

fn usage(_: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption = "KV blocks that sequences hold, mean over the ready replicas and the fullest, and the share of the \
                   time in which the GPUs had something to do.";
    let frame = Frame { outcomes, unit: "percent", title, caption, is_wide };
    let lines = vec![
        ("GPUs busy", Ink::Grey, Mark::Line, of_rows(outcome, |row| 100.0 * row.busy)),
        ("KV, fullest", Ink::Orange, Mark::Dotted, of_rows(outcome, |row| 100.0 * row.kv_usage_most)),
        ("KV, mean", Ink::Purple, Mark::Line, of_rows(outcome, |row| 100.0 * row.kv_usage_mean)),
    ];
    frame.draw(Scale::between(0.0, 100.0), lines, Vec::new())
}

fn money(settings: &Settings, outcomes: &[Outcome], outcome: &Outcome, title: &str, is_wide: bool) -> Figure {
    let caption = "That pods have held since the beginning, their starts included.";
    let frame = Frame { outcomes, unit: "GPU-hours", title, caption, is_wide };
    let lines = vec![("GPU-hours", Ink::Green, Mark::Area, of_rows(outcome, |row| row.gpu_hours))];
    let label = format!(
        "{} dollars at {} an hour",
        number::shown(outcome.dollars),
        number::short(settings.dollars_per_gpu_hour)
    );
    let level = Layer::Level { at: outcome.gpu_hours, label };
    frame.draw(frame.scale(|row| row.gpu_hours), lines, vec![level])
}

/// What the autoscaler said, and what broke.
fn log(at: usize, outcome: &Outcome, is_folded: bool) -> Section {
    let mut section = Section::new(format!("log-{at}"), format!("What happened: {}", outcome.scaler));
    section.is_folded = is_folded || outcome.log.len() > 40;
    let lines = outcome.log.iter().take(MOST_LINES);
    let rows = lines.map(|line| vec![number::shown(line.seconds).into(), line.text.clone().into()]);
    section.table(Table {
        caption: String::new(),
        columns: vec![Column::number("at, s"), Column::text("what")],
        rows: rows.collect(),
    });
    let left_out = outcome.log.len().saturating_sub(MOST_LINES) as u64 + outcome.log_left_out;
    if outcome.log.is_empty() {
        section.text("The autoscaler changed nothing, and nothing broke.");
    } else if left_out > 0 {
        section.text(format!("{left_out} lines more are left out."));
    }
    section
}
