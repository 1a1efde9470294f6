//! Functions.

use std::collections::BTreeMap;
use std::time::Duration;

use promql_parser::parser::Expr;

use super::eval::{Evaluation, map};
use super::{QueryError, Value};
use crate::store::Labels;

type Samples = [(Duration, f64)];

const KNOWN: [&str; 21] = [
    "rate",
    "increase",
    "irate",
    "avg_over_time",
    "max_over_time",
    "min_over_time",
    "sum_over_time",
    "count_over_time",
    "last_over_time",
    "histogram_quantile",
    "vector",
    "scalar",
    "clamp",
    "clamp_min",
    "clamp_max",
    "abs",
    "ceil",
    "floor",
    "round",
    "absent",
    "time",
];

pub fn is_known(name: &str) -> bool {
    KNOWN.contains(&name)
}

pub fn call(evaluation: &Evaluation<'_>, name: &str, arguments: &[Box<Expr>]) -> Result<Value, QueryError> {
    if let [argument] = arguments
        && let Expr::MatrixSelector(matrix) = argument.as_ref()
    {
        let over = over_range(name);
        let ranges = evaluation.ranges(matrix).into_iter();
        let (now, range) = (evaluation.now, matrix.range);
        let computed = ranges.filter_map(|(labels, samples)| Some((labels, over(&samples, now, range)?)));
        return Ok(Value::Vector(computed.collect()));
    }
    let values =
        arguments.iter().map(|argument| evaluation.value(argument)).collect::<Result<Vec<_>, _>>()?;
    let number = |at: usize| match values.get(at) {
        Some(Value::Scalar(number)) => Ok(*number),
        _ => Err(QueryError::Evaluation(format!("{name} wants a number as argument {}", at + 1))),
    };
    let first = || values.first().cloned().unwrap_or(Value::Vector(Vec::new()));
    match name {
        "vector" => Ok(Value::Vector(vec![(Labels::new(), number(0)?)])),
        "time" => Ok(Value::Scalar(evaluation.now.as_secs_f64())),
        "scalar" => Ok(Value::Scalar(match first() {
            Value::Vector(elements) if elements.len() == 1 => elements[0].1,
            _ => f64::NAN,
        })),
        "absent" => Ok(match first() {
            Value::Vector(elements) if elements.is_empty() => Value::Vector(vec![(Labels::new(), 1.0)]),
            _ => Value::Vector(Vec::new()),
        }),
        "histogram_quantile" => {
            let quantile = number(0)?;
            let Some(Value::Vector(buckets)) = values.get(1) else {
                return Err(QueryError::Evaluation("histogram_quantile wants buckets".to_owned()));
            };
            Ok(Value::Vector(histogram_quantile(quantile, buckets)))
        }
        "clamp" => {
            let (least, most) = (number(1)?, number(2)?);
            Ok(map(first(), |value| value.min(most).max(least)))
        }
        "clamp_min" => number(1).map(|least| map(first(), |value| value.max(least))),
        "clamp_max" => number(1).map(|most| map(first(), |value| value.min(most))),
        "abs" => Ok(map(first(), f64::abs)),
        "ceil" => Ok(map(first(), f64::ceil)),
        "floor" => Ok(map(first(), f64::floor)),
        "round" => Ok(map(first(), |value| (value + 0.5).floor())),
        _ => Err(QueryError::Evaluation(format!("{name} wants a range, such as [1m]"))),
    }
}

fn over_range(name: &str) -> fn(&Samples, Duration, Duration) -> Option<f64> {
    match name {
        "rate" => |samples, now, range| Some(extrapolated(samples, now, range)? / range.as_secs_f64()),
        "increase" => extrapolated,
        "irate" => |samples, _, _| {
            let [.., (before, from), (last, to)] = samples else { return None };
            let grown = if to < from { *to } else { to - from };
            Some(grown / (*last - *before).as_secs_f64())
        },
        "avg_over_time" => {
            |samples, _, _| Some(samples.iter().map(|(_, value)| value).sum::<f64>() / samples.len() as f64)
        }
        "max_over_time" => |samples, _, _| samples.iter().map(|(_, value)| *value).reduce(f64::max),
        "min_over_time" => |samples, _, _| samples.iter().map(|(_, value)| *value).reduce(f64::min),
        "sum_over_time" => |samples, _, _| Some(samples.iter().map(|(_, value)| value).sum()),
        "count_over_time" => |samples, _, _| Some(samples.len() as f64),
        "last_over_time" => |samples, _, _| samples.last().map(|(_, value)| *value),
        _ => |_, _, _| None,
    }
}

/// How much a counter grew over the range, extrapolated to its ends unless they are further away than a sample would
/// be, and never below zero (`extrapolatedRate`).
fn extrapolated(samples: &Samples, now: Duration, range: Duration) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    if samples.len() < 2 {
        return None;
    }
    let resets: f64 = samples.windows(2).filter(|pair| pair[1].1 < pair[0].1).map(|pair| pair[0].1).sum();
    let grown = last.1 - first.1 + resets;
    let sampled = (last.0 - first.0).as_secs_f64();
    let between = sampled / (samples.len() - 1) as f64;
    let start = now.as_secs_f64() - range.as_secs_f64();
    let near = |gap: f64| if gap < between * 1.1 { gap } else { between / 2.0 };
    let mut before = near(first.0.as_secs_f64() - start);
    if grown > 0.0 && first.1 >= 0.0 {
        before = before.min(sampled * (first.1 / grown));
    }
    let after = near((now - last.0).as_secs_f64());
    Some(grown * (sampled + before + after) / sampled)
}

/// Of classic histograms, one for each set of labels besides `le` (`bucketQuantile`).
fn histogram_quantile(quantile: f64, buckets: &[(Labels, f64)]) -> Vec<(Labels, f64)> {
    let mut histograms: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for (labels, count) in buckets {
        let mut labels = labels.clone();
        let Some(bound) = labels.remove("le").and_then(|bound| bound.parse().ok()) else { continue };
        histograms.entry(labels).or_default().push((bound, *count));
    }
    histograms.into_iter().map(|(labels, buckets)| (labels, bucket_quantile(quantile, buckets))).collect()
}

fn bucket_quantile(quantile: f64, mut buckets: Vec<(f64, f64)>) -> f64 {
    if quantile < 0.0 {
        return f64::NEG_INFINITY;
    }
    if quantile > 1.0 {
        return f64::INFINITY;
    }
    buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
    // Counts of several scrapes may come out of step; a bucket holds what the ones below it hold.
    let mut most = 0.0_f64;
    for (_, count) in &mut buckets {
        most = most.max(*count);
        *count = most;
    }
    let Some((last, total)) = buckets.last().copied() else { return f64::NAN };
    if last != f64::INFINITY || buckets.len() < 2 || total == 0.0 || quantile.is_nan() {
        return f64::NAN;
    }
    let rank = quantile * total;
    let at = buckets.iter().position(|(_, count)| *count >= rank).unwrap_or(buckets.len() - 1);
    if at == buckets.len() - 1 {
        return buckets[at - 1].0;
    }
    let (end, count) = buckets[at];
    let (start, below) = match at.checked_sub(1) {
        Some(before) => buckets[before],
        None if end <= 0.0 => return end,
        None => (0.0, 0.0),
    };
    start + (end - start) * (rank - below) / (count - below)
}
