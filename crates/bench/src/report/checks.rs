//! Whether the figures can be trusted: the client's lag, Little's law, and what the server's cache gave away.

use super::document::{Cell, Column, Section, Table, Tone};
use super::number::{count, percent, shown};
use crate::result::{ArrivalClock, BenchResult, Repeat};

pub fn section(result: &BenchResult) -> Section {
    let mut section = Section::new("checks", "Can the figures be trusted?");
    section.text(
        "A client that cannot follow measures itself. So every repeat is checked: how late requests were sent and \
         bytes were read, whether the requests counted live agree with those of the records, and how many prompt \
         tokens the server had not to compute.",
    );
    section.table(table(result));
    if let Some(clock) =
        result.points.iter().flat_map(|point| &point.repeats).map(|repeat| repeat.client.clock).next()
    {
        section.text(format!("Times of tokens {}.", clock_text(clock)));
    }
    section
}

/// Where the times of tokens come from.
pub fn clock_text(clock: ArrivalClock) -> &'static str {
    match clock {
        ArrivalClock::Kernel => {
            "are the kernel's, of the arrival of their packets: a client that reads late does not lengthen them"
        }
        ArrivalClock::Read => "are those of the reads: a client that reads late lengthens them",
        ArrivalClock::Step => "are the ends of the engine's steps",
    }
}

fn table(result: &BenchResult) -> Table {
    let mut table = Table {
        caption: String::new(),
        columns: vec![
            Column::text("Load"),
            Column::number("repeat"),
            Column::number("send lag p99, ms"),
            Column::number("limit, ms"),
            Column::number("read lag p99, ms"),
            Column::text("client"),
            Column::number("in flight, live"),
            Column::number("rate x residence"),
            Column::text("Little's law"),
            Column::text("prefix cache"),
        ],
        rows: Vec::new(),
    };
    for point in &result.points {
        for repeat in &point.repeats {
            let load = point.load.to_string();
            table.rows.push(row(load, repeat));
        }
    }
    table
}

fn row(load: String, repeat: &Repeat) -> Vec<Cell> {
    let client = &repeat.client;
    let followed = match &client.bound {
        None if client.clock == ArrivalClock::Step => Cell::from("none: in process"),
        None => Cell::toned("kept up", Tone::Good),
        Some(reason) => Cell::toned(format!("client-bound: {reason}"), Tone::Bad),
    };
    let law = &repeat.littles_law;
    let deviation = format!("{} apart", percent(law.deviation));
    vec![
        load.into(),
        repeat.repeat.to_string().into(),
        shown(client.send_lag_p99_ms).into(),
        shown(client.send_lag_limit_ms).into(),
        shown(client.read_lag_p99_ms).into(),
        followed,
        shown(law.mean_in_flight).into(),
        shown(law.rate_times_residence).into(),
        Cell::toned(deviation, if law.holds { Tone::Good } else { Tone::Bad }),
        cache(repeat).into(),
    ]
}

fn cache(repeat: &Repeat) -> String {
    let Some(delta) = &repeat.prefix_cache else { return "no counters".into() };
    format!(
        "{} of {} tokens found, {}",
        count(delta.hit_tokens),
        count(delta.query_tokens),
        percent(delta.hit_rate())
    )
}
