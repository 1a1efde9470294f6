//! What was measured, where and when; the figures that matter most; and whether they may be quoted.

use super::document::{Fact, Section, Tile, Tone, Verdict, definition};
use super::limits;
use super::number::{count, percent, shown};
use crate::result::{ArrivalClock, BenchResult, Header, Metrics, Point, PromptForm, Repeat, TargetInfo};

/// Faults that are listed at the top.
const MAX_FAULTS: usize = 6;

pub fn title(header: &Header) -> String {
    header.label.clone().unwrap_or_else(|| format!("{}: {}", header.model.id, header.workload.name))
}

/// What, where and when in short; the rest is at the end of the report.
pub fn summary(header: &Header) -> Vec<Fact> {
    let dtype = header.model.dtype.as_ref().map_or(String::new(), |dtype| format!(", {dtype}"));
    let hardware = header.hardware.as_deref().unwrap_or("hardware not stated");
    let gpus =
        header.gpus.map_or(String::new(), |gpus| format!(", {gpus} GPU{}", if gpus == 1 { "" } else { "s" }));
    let place = match &header.target {
        TargetInfo::Http { url, .. } => url.as_str(),
        TargetInfo::Offline { .. } => "the engine in the process of the load generator",
    };
    let workload = &header.workload;
    let settings =
        workload.settings.iter().map(|(name, value)| format!(", {} {value}", name.replace('_', " ")));
    vec![
        Fact::new("what", format!("{}{dtype}", header.model.id)),
        Fact::new("where", format!("{hardware}{gpus}; {place}")),
        Fact::new(
            "asked",
            format!("{}{}, seed {}", workload.name, settings.collect::<String>(), workload.seed),
        ),
        Fact::new("when", format!("{}, {}", date(header.started_unix_seconds), tool(header))),
        Fact::new("command", header.command.join(" ")),
    ]
}

fn tool(header: &Header) -> String {
    let commit = header.tool_commit.as_deref().unwrap_or("unknown");
    format!("servelab {}, commit {commit}", header.tool_version)
}

fn date(unix_seconds: u64) -> String {
    let at = i64::try_from(unix_seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    at.map_or("at an unknown time".into(), |at| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

// ---- the figures that matter most ----

/// Of the point with the highest throughput; none if nothing completed.
pub fn tiles(result: &BenchResult) -> Vec<Tile> {
    let Some(point) = result.best_point().filter(|point| point.metrics.completed > 0) else {
        return Vec::new();
    };
    let metrics = &point.metrics;
    let mut tiles = vec![
        throughput(point),
        latency("TTFT", &metrics.ttft_ms, ""),
        latency("TPOT", &metrics.tpot_ms, &speed(metrics)),
        latency("ITL", &metrics.itl_ms, ""),
        requests(metrics),
    ];
    tiles.extend(goodput(metrics));
    tiles.extend(of_limit(point));
    tiles
}

fn tile(label: &str, value: String, unit: &str, note: String) -> Tile {
    let definition = definition(label);
    Tile { label: label.into(), value, unit: unit.into(), note, definition, tone: Tone::Plain }
}

fn throughput(point: &Point) -> Tile {
    let interval = point.intervals.get("output_throughput");
    let note = interval.map_or(String::new(), |interval| format!("+/- {}, ", shown(interval.half_width)));
    let value = shown(point.metrics.output_throughput);
    let mut tile = tile("output throughput", value, "tokens/s", format!("{note}{}", point.load));
    tile.definition = definition("throughput");
    tile
}

fn latency(name: &str, values: &crate::result::Distribution, more: &str) -> Tile {
    tile(&format!("{name} p50"), shown(values.median), "ms", format!("p99 {} ms{more}", shown(values.p99)))
}

fn speed(metrics: &Metrics) -> String {
    match metrics.tpot_ms.median {
        tpot if tpot > 0.0 => format!("; {} tokens/s for one user", shown(1000.0 / tpot)),
        _ => String::new(),
    }
}

fn requests(metrics: &Metrics) -> Tile {
    let note = format!("of {}; {} failed", count(metrics.requests), count(metrics.failed));
    let tone = if metrics.failed > 0 { Tone::Bad } else { Tone::Plain };
    Tile { tone, ..tile("completed", count(metrics.completed), "requests", note) }
}

fn goodput(metrics: &Metrics) -> Option<Tile> {
    let note =
        metrics.slo_attainment.map_or(String::new(), |share| format!("{} kept the SLO", percent(share)));
    Some(tile("goodput", shown(metrics.request_goodput?), "requests/s", note))
}

fn of_limit(point: &Point) -> Option<Tile> {
    let known = point.limits.as_ref()?;
    let row = known.rows.iter().find(|row| row.metric == "output_throughput")?;
    let note = format!("limit {} tokens/s, {}", shown(row.limit), known.hardware);
    let plain = tile("of the limit", percent(limits::share(row)), "", note);
    Some(if row.beaten {
        Tile { tone: Tone::Bad, note: "FASTER THAN PHYSICS".into(), ..plain }
    } else {
        plain
    })
}

// ---- whether they may be quoted ----

pub fn verdict(result: &BenchResult) -> Verdict {
    let faults = result.faults();
    let completed: u64 = result.points.iter().map(|point| point.metrics.completed).sum();
    let notes = notes(result);
    if completed == 0 {
        let mut reasons = vec!["no request completed, so there are no latencies; see the failures".into()];
        reasons.extend(first(faults));
        return Verdict { is_sound: false, headline: "Nothing was measured".into(), reasons, notes };
    }
    if !faults.is_empty() {
        return Verdict {
            is_sound: false,
            headline: "Do not quote these figures".into(),
            reasons: first(faults),
            notes,
        };
    }
    Verdict { is_sound: true, headline: "The checks hold".into(), reasons: reasons(result), notes }
}

/// The first of many faults, and how many there are: all of them stand in the section of checks.
fn first(mut faults: Vec<String>) -> Vec<String> {
    let more = faults.len().saturating_sub(MAX_FAULTS);
    if more > 0 {
        faults.truncate(MAX_FAULTS);
        faults.push(format!("and {more} more; see the checks and the limits below"));
    }
    faults
}

fn repeats(result: &BenchResult) -> impl Iterator<Item = &Repeat> {
    result.points.iter().flat_map(|point| &point.repeats)
}

fn reasons(result: &BenchResult) -> Vec<String> {
    let worst = |of: fn(&Repeat) -> f64| repeats(result).map(of).fold(0.0, f64::max);
    let send_lag = shown(worst(|repeat| repeat.client.send_lag_p99_ms));
    let read_lag = shown(worst(|repeat| repeat.client.read_lag_p99_ms));
    let client = match repeats(result).all(|repeat| repeat.client.clock == ArrivalClock::Step) {
        true => format!("requests came to the engine between two steps, p99 {send_lag} ms after their time"),
        false => format!(
            "the client kept up: p99 of the send lag at most {send_lag} ms, of the read lag at most {read_lag} ms"
        ),
    };
    let mut reasons = vec![
        client,
        format!(
            "Little's law holds in every repeat: at most {} apart",
            percent(worst(|repeat| repeat.littles_law.deviation))
        ),
    ];
    if result.points.iter().any(|point| point.limits.is_some()) {
        reasons.push("no figure is faster than physics".into());
    }
    reasons
}

/// What a reader has to know, though it is no fault.
fn notes(result: &BenchResult) -> Vec<String> {
    let header = &result.header;
    let mut notes = Vec::new();
    let mut note = |applies: bool, text: &str| notes.extend(applies.then(|| text.to_owned()));
    let has_one = result.points.iter().any(|point| point.repeats.len() < 2);
    note(has_one, "a level with a single repeat says nothing about how much its figures scatter");
    note(repeats(result).any(|repeat| repeat.interrupted), "the run was ended early");
    note(
        !header.workload.salted,
        "prompts were not salted: the server may have kept the cache of an earlier run",
    );
    note(
        shares_machine(header),
        "load generator and server ran on one machine and shared its cores: both were slower for it",
    );
    note(
        header.hardware.is_none(),
        "the hardware under the model is not stated, so there is no limit to compare with",
    );
    let reads = repeats(result).any(|repeat| repeat.client.clock == ArrivalClock::Read);
    note(reads, "times of tokens are those of the reads: a client that reads late lengthens them");
    let lacks_gaps = result.points.iter().any(|point| point.metrics.requests_without_gaps > 0);
    note(lacks_gaps, "there were too many gaps between tokens to keep: ITL leaves some requests out");
    let failed: u64 = result.points.iter().map(|point| point.metrics.failed).sum();
    note(failed > 0, "requests failed; their latencies are missing from the distributions");
    notes
}

/// Whether the server answers at an address of the machine that the load came from.
fn shares_machine(header: &Header) -> bool {
    match &header.target {
        TargetInfo::Http { url, .. } => {
            let host = url.split_once("://").map_or(url.as_str(), |parts| parts.1);
            ["127.", "localhost", "[::1]"].iter().any(|local| host.starts_with(local))
        }
        TargetInfo::Offline { .. } => false,
    }
}

// ---- circumstances ----

pub fn section(header: &Header) -> Section {
    let mut section = Section::new("circumstances", "What was measured, where and when");
    section.facts(target(header));
    section.facts(workload(header));
    section.facts(machine(header));
    section
}

fn target(header: &Header) -> Vec<Fact> {
    let model = &header.model;
    let mut facts = vec![Fact::new("model", model.id.as_str())];
    let mut add = |name: &str, value: Option<String>| facts.extend(value.map(|value| Fact::new(name, value)));
    add("model from", model.root.clone());
    add("number format", model.dtype.clone());
    add("context", model.max_model_len.map(|tokens| format!("{} tokens", count(u64::from(tokens)))));
    add("hardware", Some(header.hardware.clone().unwrap_or_else(|| "not stated".into())));
    add("GPUs of a replica", header.gpus.map(|gpus| gpus.to_string()));
    let settings = match &header.target {
        TargetInfo::Http { url, endpoint, server } => {
            add("server", Some(format!("{url}{}", endpoint.path())));
            server
        }
        TargetInfo::Offline { engine } => {
            add("engine", Some("in the process of the load generator, without HTTP and without text".into()));
            engine
        }
    };
    facts.extend(settings.iter().map(|(name, value)| Fact::new(name.replace('_', " "), value.as_str())));
    facts
}

fn workload(header: &Header) -> Vec<Fact> {
    let workload = &header.workload;
    let form = match workload.prompt_form {
        PromptForm::TokenIds => "token ids: lengths are exact",
        PromptForm::Words => "words of one token each",
        PromptForm::EstimatedWords => "words, whose mean number of tokens was measured",
        PromptForm::Given => "the user's own",
    };
    let salted = if workload.salted { "prompts differ from run to run" } else { "NOT salted" };
    let temperature = workload.temperature.map_or("the server's default".into(), |value| value.to_string());
    let mut facts = vec![Fact::new("workload", workload.name.as_str())];
    if !workload.description.is_empty() {
        facts.push(Fact::new("that is", workload.description.as_str()));
    }
    facts.extend(
        workload.settings.iter().map(|(name, value)| Fact::new(name.replace('_', " "), value.as_str())),
    );
    facts.push(Fact::new("prompts", format!("{form}; {salted}")));
    facts.push(Fact::new("seed", workload.seed.to_string()));
    facts.push(Fact::new("temperature", temperature));
    facts.push(Fact::new("ignore_eos", if workload.ignore_eos { "yes" } else { "no" }));
    facts.extend(header.slo.as_ref().map(|slo| Fact::new("SLO", slo.to_string())));
    facts
}

fn machine(header: &Header) -> Vec<Fact> {
    let client = &header.client;
    let mut facts = vec![
        Fact::new("measured", date(header.started_unix_seconds)),
        Fact::new("load generator", tool(header)),
        Fact::new("load came from", format!("{}, {} cores, {}", client.cpu, client.cores, client.os)),
        Fact::new(
            "time-outs",
            format!(
                "connect {} s, first byte {} s, idle {} s, whole answer {} s",
                client.connect_timeout_seconds,
                client.first_byte_timeout_seconds,
                client.idle_timeout_seconds,
                client.total_timeout_seconds
            ),
        ),
        Fact::new("command", header.command.join(" ")),
    ];
    if shares_machine(header) {
        facts
            .push(Fact::new("shared", "load generator and server ran on this machine, and shared its cores"));
    }
    facts.extend(header.metadata.iter().map(|(name, value)| Fact::new(name.as_str(), value.as_str())));
    facts
}
