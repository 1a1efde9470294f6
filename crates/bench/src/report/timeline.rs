//! Who ran when: a row for each request. The picture of continuous batching: rows that decode side by side, new ones
//! that begin where old ones end, and the pauses of all when a long prompt is computed.

use super::details::{Details, Span};
use super::document::Figure;
use super::number;
use super::plot::{Axis, Ink, Key, Layer, Mark, Plot, Row, Scale, WIDE};
use crate::result::Repeat;

/// Of all rows together.
const MAX_HEIGHT: f64 = 760.0;
const MAX_ROW_HEIGHT: f64 = 15.0;
/// Of a row, filled by its bar.
const FILLED: f64 = 0.78;

/// `None` if no records of the repeat are known.
pub fn figure(details: &Details, point: usize, repeat: &Repeat) -> Option<Figure> {
    let spans = details.timeline(point, repeat.repeat);
    let from = spans.iter().map(|span| span.scheduled).reduce(f64::min)?;
    let to = spans.iter().map(|span| span.end).reduce(f64::max)?;
    let rows = spans.len() as f64;
    let x = Axis::new("time since the start of the repeat (s)", Scale::between(from, to));
    let mut plot = Plot::new(x, Axis::new("request", Scale::between(0.0, rows)));
    plot.y.ticks = row_names(&spans);
    (plot.width, plot.height) = (WIDE, 72.0 + (MAX_ROW_HEIGHT * rows).min(MAX_HEIGHT));
    let all = spans.iter().enumerate();
    let row = |(at, span): (usize, &&Span)| Row {
        y: rows - at as f64 - 0.5,
        height: FILLED,
        parts: parts(span),
        hover: hover(span),
    };
    plot.layers.push(Layer::Rows { rows: all.map(row).collect() });
    let mut figure = Figure::new("Requests over time", caption(&spans, repeat), &plot);
    figure.keys = keys(&spans);
    figure.is_wide = true;
    Some(figure)
}

/// Some numbers of requests, the first at the top.
fn row_names(spans: &[&Span]) -> Vec<(f64, String)> {
    let step = spans.len().div_ceil(8).max(1);
    let named = spans.iter().enumerate().step_by(step);
    named.map(|(at, span)| ((spans.len() - at) as f64 - 0.5, span.index.to_string())).collect()
}

/// What a request did until then: each part from the end of the one before.
fn parts(span: &Span) -> Vec<(f64, f64, &'static str)> {
    let mut parts = Vec::new();
    let mut at = span.scheduled;
    let mut until = |time: Option<f64>, class| {
        if let Some(time) = time.filter(|time| *time > at) {
            parts.push((at, time, class));
            at = time;
        }
    };
    until(span.sent, "grey");
    until(span.started, "amber");
    until(span.first_token, if span.started.is_some() { "purple" } else { "amber" });
    let last = match (span.failure.is_some(), span.is_cut, span.first_token.is_some()) {
        (true, ..) => "red",
        (false, true, _) => "grey",
        (false, false, true) => "blue",
        (false, false, false) => "amber",
    };
    until(Some(span.end), last);
    parts.extend(span.pauses.iter().map(|(at, length)| (*at, at + length, "pause")));
    parts
}

fn hover(span: &Span) -> String {
    let ms = |from: f64, to: f64| number::short(1000.0 * (to - from).max(0.0));
    let mut out =
        format!("request {}: {} tokens in, {} out", span.index, span.input_tokens, span.output_tokens);
    if let Some(sent) = span.sent {
        out += &format!("; sent after {} ms", ms(span.scheduled, sent));
    }
    match (span.sent, span.started, span.first_token) {
        (Some(sent), Some(started), Some(first)) => {
            out += &format!("; queue {} ms, prefill {} ms", ms(sent, started), ms(started, first));
        }
        (Some(sent), _, Some(first)) => out += &format!("; queue and prefill {} ms", ms(sent, first)),
        _ => {}
    }
    if let Some(first) = span.first_token {
        out += &format!("; decode {} ms", ms(first, span.end));
    }
    if let Some(failure) = span.failure {
        out += &format!("; failed: {failure}");
    } else if span.is_cut {
        out += "; given up when the run was ended";
    }
    out
}

fn keys(spans: &[&Span]) -> Vec<Key> {
    let key = |name: &str, ink| Key { name: name.into(), ink, mark: Mark::Bars };
    let mut keys = Vec::new();
    if spans.iter().any(|span| span.sent.is_some_and(|sent| sent - span.scheduled > 0.001)) {
        keys.push(key("waits in the client", Ink::Grey));
    }
    if spans.iter().any(|span| span.started.is_some()) {
        keys.extend([key("queue", Ink::Amber), key("prefill", Ink::Purple)]);
    } else {
        keys.push(key("queue and prefill, until the first token", Ink::Amber));
    }
    keys.push(key("decode", Ink::Blue));
    if spans.iter().any(|span| !span.pauses.is_empty()) {
        keys.push(Key { name: "pause between two tokens".into(), ink: Ink::Blue, mark: Mark::Gap });
    }
    if spans.iter().any(|span| span.failure.is_some()) {
        keys.push(key("failed", Ink::Red));
    }
    keys
}

fn caption(spans: &[&Span], repeat: &Repeat) -> String {
    let all = repeat.metrics.requests + repeat.metrics.cut;
    let which = match (spans.len() as u64) < all {
        true => format!("The first {} of {} measured requests", spans.len(), number::count(all)),
        false => format!("All {} measured requests", spans.len()),
    };
    format!(
        "{which} of repeat {}, in the order of their arrival. A pause is a gap of at least three times the request's mean.",
        repeat.repeat
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span() -> Span {
        Span {
            index: 4,
            scheduled: 1.0,
            sent: Some(1.5),
            started: None,
            first_token: Some(2.0),
            end: 5.0,
            pauses: vec![(3.0, 0.5)],
            input_tokens: 10,
            output_tokens: 20,
            failure: None,
            is_cut: false,
        }
    }

    #[test]
    fn a_request_is_its_parts() {
        let decoding = [(1.0, 1.5, "grey"), (1.5, 2.0, "amber"), (2.0, 5.0, "blue"), (3.0, 3.5, "pause")];
        assert_eq!(parts(&span()), decoding);
        let started = Span { started: Some(1.7), pauses: Vec::new(), ..span() };
        assert_eq!(parts(&started)[1..3], [(1.5, 1.7, "amber"), (1.7, 2.0, "purple")]);
        let failed = Span { first_token: None, failure: Some("stall"), pauses: Vec::new(), ..span() };
        assert_eq!(parts(&failed), [(1.0, 1.5, "grey"), (1.5, 5.0, "red")]);
        let refused = Span { sent: None, end: 1.0, ..failed };
        assert_eq!(parts(&refused), []);
    }

    #[test]
    fn the_pointer_is_told_the_times() {
        let expected =
            "request 4: 10 tokens in, 20 out; sent after 500 ms; queue and prefill 500 ms; decode 3000 ms";
        assert_eq!(hover(&span()), expected);
    }
}
