//! Two results beside each other: what differs, whether they may be compared at all, and by how much each figure
//! differs, with an interval.
//!
//! The ratio of two means over repeats has an interval on the logarithmic scale: the relative standard errors of both
//! sides add up by their squares (delta method), with the degrees of freedom of Welch and Satterthwaite (Welch 1947).

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::report::number::{count, shown};
use crate::result::{BenchResult, Endpoint, Header, Interval, Point, TargetInfo};
use crate::stats::student_t;
use crate::vllm;

/// Keys of vLLM's benchmark, what they are called here, and whether more is better.
const FIGURES: &[(&str, &str, bool)] = &[
    ("request_throughput", "requests/s", true),
    ("output_throughput", "output tokens/s", true),
    ("total_token_throughput", "tokens/s, in and out", true),
    ("request_goodput", "goodput, requests/s", true),
    ("mean_ttft_ms", "TTFT mean, ms", false),
    ("median_ttft_ms", "TTFT p50, ms", false),
    ("p99_ttft_ms", "TTFT p99, ms", false),
    ("median_tpot_ms", "TPOT p50, ms", false),
    ("p99_tpot_ms", "TPOT p99, ms", false),
    ("mean_itl_ms", "ITL mean, ms", false),
    ("p99_itl_ms", "ITL p99, ms", false),
    ("median_e2el_ms", "E2EL p50, ms", false),
    ("p99_e2el_ms", "E2EL p99, ms", false),
];

/// B against A.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Why the two must not be compared. Empty: they may.
    pub obstacles: Vec<Obstacle>,
    /// What else differs: most likely what is compared.
    pub differences: Vec<Difference>,
    /// The loads that both have.
    pub levels: Vec<Level>,
    /// Loads that only one of them has.
    pub unmatched: Vec<String>,
}

/// Something that makes a comparison meaningless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Obstacle {
    Differs(Difference),
    /// One of the sides, `A` or `B`, must not be quoted.
    Faulty {
        side: char,
        fault: String,
    },
    NoCommonLoad,
}

/// One circumstance that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub what: String,
    pub a: String,
    pub b: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Level {
    pub load: String,
    pub rows: Vec<Row>,
    pub failed: (u64, u64),
}

/// One figure on both sides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub key: &'static str,
    pub name: &'static str,
    pub more_is_better: bool,
    pub a: f64,
    pub b: f64,
    pub ratio: Option<Ratio>,
    pub verdict: Verdict,
}

/// B divided by A.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    pub ratio: f64,
    /// The 95 % interval; `None` if one side has a single repeat.
    pub interval: Option<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Better,
    Worse,
    /// The interval holds 1.
    WithinNoise,
    /// A single repeat says nothing about noise.
    Unknown,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::WithinNoise => "within noise",
            Self::Unknown => "noise unknown",
        }
    }

    fn of(ratio: Option<Ratio>, more_is_better: bool) -> Self {
        let Some(Ratio { interval: Some((low, high)), .. }) = ratio else { return Self::Unknown };
        match (low > 1.0, high < 1.0) {
            (false, false) => Self::WithinNoise,
            (is_more, _) if is_more == more_is_better => Self::Better,
            _ => Self::Worse,
        }
    }
}

/// Compares B with A.
pub fn compare(a: &BenchResult, b: &BenchResult) -> Comparison {
    let circumstances = |of: fn(&Header) -> Circumstances| differences(&of(&a.header), &of(&b.header));
    let mut obstacles: Vec<Obstacle> = circumstances(fixed).into_iter().map(Obstacle::Differs).collect();
    for (side, result) in [('A', a), ('B', b)] {
        obstacles.extend(result.faults().into_iter().map(|fault| Obstacle::Faulty { side, fault }));
    }
    let levels: Vec<Level> = a
        .points
        .iter()
        .filter_map(|point| Some(level(point, b.points.iter().find(|other| other.load == point.load)?)))
        .collect();
    if levels.is_empty() {
        obstacles.push(Obstacle::NoCommonLoad);
    }
    let only = |side: char, one: &BenchResult, other: &BenchResult| {
        let lonely = one.points.iter().filter(|point| other.points.iter().all(|o| o.load != point.load));
        lonely.map(|point| format!("{} (only {side})", point.load)).collect::<Vec<_>>()
    };
    let unmatched = [only('A', a, b), only('B', b, a)].concat();
    Comparison { obstacles, differences: circumstances(free), levels, unmatched }
}

// ---- circumstances ----

type Circumstances = Vec<(String, String)>;

/// What must be the same.
fn fixed(header: &Header) -> Circumstances {
    let option = |value: &Option<String>| value.clone().unwrap_or_else(|| "not stated".into());
    let workload = &header.workload;
    let target = match &header.target {
        TargetInfo::Http { endpoint: Endpoint::Chat, .. } => "chat over HTTP",
        TargetInfo::Http { endpoint: Endpoint::Completions, .. } => "completions over HTTP",
        TargetInfo::Offline { .. } => "the engine without HTTP",
    };
    let mut all: Circumstances = [
        ("model", header.model.id.clone()),
        ("number format", option(&header.model.dtype)),
        ("hardware", option(&header.hardware)),
        ("GPUs of a replica", header.gpus.map_or("not stated".into(), |gpus| gpus.to_string())),
        ("machine of the load generator", format!("{}, {} cores", header.client.cpu, header.client.cores)),
        ("target", target.into()),
        ("workload", workload.name.clone()),
        ("seed", workload.seed.to_string()),
        ("salt", if workload.salted { "yes" } else { "no" }.into()),
        ("form of the prompts", format!("{:?}", workload.prompt_form)),
        ("ignore_eos", workload.ignore_eos.to_string()),
        ("temperature", workload.temperature.map_or("the server's".into(), |value| value.to_string())),
        ("SLO", header.slo.as_ref().map_or("none".into(), ToString::to_string)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    all.extend(named("workload's ", &workload.settings));
    all
}

/// What may differ, and is worth to know.
fn free(header: &Header) -> Circumstances {
    let commit = header.tool_commit.as_deref().unwrap_or("unknown");
    let mut all: Circumstances = [
        ("load generator", format!("{}, commit {commit}", header.tool_version)),
        ("model from", header.model.root.clone().unwrap_or_default()),
        ("context", header.model.max_model_len.map_or("unknown".into(), |tokens| tokens.to_string())),
        ("system of the load generator", header.client.os.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    match &header.target {
        TargetInfo::Http { url, server, .. } => {
            all.push(("url".into(), url.clone()));
            all.extend(named("server's ", server));
        }
        TargetInfo::Offline { engine } => all.extend(named("engine's ", engine)),
    }
    all.extend(named("", &header.metadata));
    all
}

fn named(before: &str, settings: &BTreeMap<String, String>) -> Circumstances {
    settings
        .iter()
        .map(|(name, value)| (format!("{before}{}", name.replace('_', " ")), value.clone()))
        .collect()
}

/// Those that are not the same, or on one side only.
fn differences(a: &[(String, String)], b: &[(String, String)]) -> Vec<Difference> {
    let find = |all: &[(String, String)], name: &str| {
        all.iter().find(|other| other.0 == name).map_or("-".to_owned(), |other| other.1.clone())
    };
    let mut names: Vec<&String> = a.iter().map(|one| &one.0).collect();
    names.extend(b.iter().map(|one| &one.0).filter(|name| a.iter().all(|one| one.0 != **name)));
    let all =
        names.into_iter().map(|name| Difference { what: name.clone(), a: find(a, name), b: find(b, name) });
    all.filter(|difference| difference.a != difference.b).collect()
}

// ---- figures ----

fn level(a: &Point, b: &Point) -> Level {
    let (keys_a, keys_b) = (vllm::metric_keys(&a.metrics), vllm::metric_keys(&b.metrics));
    let row = |&(key, name, more_is_better): &(&'static str, &'static str, bool)| {
        let value = |point: &Point, keys: &serde_json::Map<String, serde_json::Value>| {
            point.intervals.get(key).map(|interval| interval.mean).or_else(|| keys.get(key)?.as_f64())
        };
        let (value_a, value_b) = (value(a, &keys_a)?, value(b, &keys_b)?);
        let ratio = (value_a > 0.0 && value_b > 0.0).then(|| Ratio {
            ratio: value_b / value_a,
            interval: a
                .intervals
                .get(key)
                .zip(b.intervals.get(key))
                .and_then(|(a, b)| interval_of_ratio(a, b)),
        });
        let verdict = Verdict::of(ratio, more_is_better);
        Some(Row { key, name, more_is_better, a: value_a, b: value_b, ratio, verdict })
    };
    let failed = (a.metrics.failed, b.metrics.failed);
    Level { load: a.load.to_string(), rows: FIGURES.iter().filter_map(row).collect(), failed }
}

/// Of `b` divided by `a`; see the module. `None` if it cannot be told.
fn interval_of_ratio(a: &Interval, b: &Interval) -> Option<(f64, f64)> {
    // Variance of the mean, relative to it, and its degrees of freedom.
    let relative = |interval: &Interval| {
        let degrees = interval.repeats.checked_sub(1).filter(|degrees| *degrees > 0)?;
        let error = interval.half_width / student_t(degrees as usize) / interval.mean;
        error.is_finite().then_some((error * error, f64::from(degrees)))
    };
    let ((a_variance, a_degrees), (b_variance, b_degrees)) = (relative(a)?, relative(b)?);
    let variance = a_variance + b_variance;
    let degrees = variance * variance / (a_variance.powi(2) / a_degrees + b_variance.powi(2) / b_degrees);
    // Without any scatter there is nothing to divide by, and nothing to add.
    let width = if variance > 0.0 { student_t(degrees.max(1.0) as usize) * variance.sqrt() } else { 0.0 };
    let ratio = b.mean / a.mean;
    Some((ratio * (-width).exp(), ratio * width.exp()))
}

// ---- as text ----

impl std::fmt::Display for Obstacle {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Differs(Difference { what, a, b }) => write!(out, "{what}: {a} and {b}"),
            Self::Faulty { side, fault } => write!(out, "{side} must not be quoted: {fault}"),
            Self::NoCommonLoad => out.write_str("no level of load is in both"),
        }
    }
}

impl Comparison {
    /// The table that a terminal shows, 100 columns wide. `names` are those of A and B.
    pub fn text(&self, names: [&str; 2]) -> String {
        let mut out = format!("A  {}\nB  {}\n", names[0], names[1]);
        if !self.obstacles.is_empty() {
            out += "\nNot comparable, compared all the same\n";
            self.obstacles.iter().for_each(|obstacle| out += &format!("  ! {obstacle}\n"));
        }
        if !self.differences.is_empty() {
            out += "\nWhat differs\n";
            for Difference { what, a, b } in &self.differences {
                out += &format!("  {what}: {a} | {b}\n");
            }
        }
        self.levels.iter().for_each(|level| out += &level.text());
        if !self.unmatched.is_empty() {
            out += &format!("\nLeft out: {}\n", self.unmatched.join(", "));
        }
        out += "\nRatios are B / A of the means over the repeats, with their 95 % interval; within noise: the \
                interval\nholds 1. Of twenty figures that are the same, one is expected to look different.\n";
        out
    }
}

impl Level {
    fn text(&self) -> String {
        let mut out = format!("\n{}\n", self.load);
        let _ = writeln!(
            out,
            "  {:<22}{:>11}{:>11}{:>9}  {:<16}  verdict",
            "", "A", "B", "B / A", "95 % interval"
        );
        for row in &self.rows {
            let ratio = row.ratio.map_or("-".into(), |ratio| format!("{:.3}", ratio.ratio));
            let interval = row.ratio.and_then(|ratio| ratio.interval);
            let interval = interval.map_or("-".into(), |(low, high)| format!("{low:.3} to {high:.3}"));
            let (name, verdict) = (row.name, row.verdict.name());
            let _ = writeln!(
                out,
                "  {name:<22}{:>11}{:>11}{ratio:>9}  {interval:<16}  {verdict}",
                shown(row.a),
                shown(row.b)
            );
        }
        let (a, b) = (count(self.failed.0), count(self.failed.1));
        let _ = writeln!(out, "  {:<22}{a:>11}{b:>11}", "failed requests");
        out
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, Normal};

    use super::*;
    use crate::stats;

    /// Three repeats each, scattered by 5 % around 100 and 120: the interval holds 1.2 in 95 of 100 cases. Of 4,000,
    /// three standard errors are 1.1 percentage points.
    #[test]
    fn the_interval_holds_the_true_ratio_as_often_as_it_says() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut sample = |mean: f64| {
            let normal = Normal::new(mean, 0.05 * mean).unwrap();
            let repeats: Vec<f64> = (0..3).map(|_| normal.sample(&mut random)).collect();
            stats::interval(&repeats).unwrap()
        };
        let trials = 4000;
        let held = (0..trials).filter(|_| {
            let (low, high) = interval_of_ratio(&sample(100.0), &sample(120.0)).unwrap();
            low <= 1.2 && 1.2 <= high
        });
        let share = held.count() as f64 / f64::from(trials);
        assert!((0.935..=0.985).contains(&share), "{share}");
    }

    #[test]
    fn a_single_repeat_has_no_interval_and_no_scatter_has_no_width() {
        let interval = |half_width, repeats| Interval { mean: 2.0, half_width, repeats };
        assert_eq!(interval_of_ratio(&interval(0.1, 3), &interval(0.0, 1)), None);
        assert_eq!(interval_of_ratio(&interval(0.0, 3), &interval(0.0, 3)), Some((1.0, 1.0)));
    }

    #[test]
    fn more_is_not_always_better() {
        let ratio = |low, high| Some(Ratio { ratio: 1.0, interval: Some((low, high)) });
        assert_eq!(Verdict::of(ratio(1.1, 1.3), true), Verdict::Better);
        assert_eq!(Verdict::of(ratio(1.1, 1.3), false), Verdict::Worse);
        assert_eq!(Verdict::of(ratio(0.8, 0.9), false), Verdict::Better);
        assert_eq!(Verdict::of(ratio(0.9, 1.1), true), Verdict::WithinNoise);
        assert_eq!(Verdict::of(Some(Ratio { ratio: 2.0, interval: None }), true), Verdict::Unknown);
    }
}
