//! Evaluates an expression at one moment.

use std::collections::BTreeMap;
use std::time::Duration;

use promql_parser::parser::{
    AggregateExpr, BinModifier, BinaryExpr, Expr, LabelModifier, MatrixSelector, VectorSelector,
};

use super::functions;
use super::{LOOKBACK, QueryError, Value};
use crate::store::{Labels, Sample, SampleStore, Samples};

type Elements = Vec<(Labels, f64)>;

pub struct Evaluation<'a> {
    pub now: Duration,
    pub store: &'a SampleStore,
}

impl Evaluation<'_> {
    pub fn value(&self, expr: &Expr) -> Result<Value, QueryError> {
        match expr {
            Expr::NumberLiteral(number) => Ok(Value::Scalar(number.val)),
            Expr::Paren(paren) => self.value(&paren.expr),
            Expr::Unary(unary) => Ok(map(self.value(&unary.expr)?, |value| -value)),
            Expr::VectorSelector(selector) => Ok(Value::Vector(self.instant(selector))),
            Expr::Aggregate(aggregate) => self.aggregate(aggregate),
            Expr::Binary(binary) => self.binary(binary),
            Expr::Call(call) => functions::call(self, call.func.name, &call.args.args),
            Expr::MatrixSelector(_) | Expr::Subquery(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {
                Err(QueryError::Evaluation("a range stands where a value is wanted".to_owned()))
            }
        }
    }

    /// The series' newest values that are not too old.
    fn instant(&self, selector: &VectorSelector) -> Elements {
        let newest = |samples: &Samples| {
            let last = samples.iter().rev().find(|sample| sample.at <= self.now)?;
            (last.at + LOOKBACK > self.now).then_some(last.value)?
        };
        let found = self.matching(selector);
        found.filter_map(|(labels, samples)| Some((labels.clone(), newest(samples)?))).collect()
    }

    /// The samples of each series within the range, its oldest moment left out.
    pub fn ranges(&self, matrix: &MatrixSelector) -> Vec<(Labels, Vec<(Duration, f64)>)> {
        let inside = |sample: &&Sample| sample.at <= self.now && sample.at + matrix.range > self.now;
        let found = self.matching(&matrix.vs).map(|(labels, samples)| {
            let samples = samples.iter().filter(inside);
            (labels.clone(), samples.filter_map(|sample| Some((sample.at, sample.value?))).collect())
        });
        found.filter(|(_, samples): &(Labels, Vec<_>)| !samples.is_empty()).collect()
    }

    fn matching<'a>(
        &'a self,
        selector: &'a VectorSelector,
    ) -> impl Iterator<Item = (&'a Labels, &'a Samples)> {
        let matches = |labels: &Labels| {
            let label = |name: &str| labels.get(name).map_or("", String::as_str);
            selector.matchers.matchers.iter().all(|matcher| matcher.is_match(label(&matcher.name)))
        };
        let name = selector.name.as_deref().unwrap_or_default();
        self.store.named(name).filter(move |(labels, _)| matches(labels))
    }

    fn aggregate(&self, aggregate: &AggregateExpr) -> Result<Value, QueryError> {
        let Value::Vector(elements) = self.value(&aggregate.expr)? else {
            return Err(QueryError::Evaluation(format!("{} of a single number", aggregate.op)));
        };
        let mut groups: BTreeMap<Labels, Vec<f64>> = BTreeMap::new();
        for (labels, value) in elements {
            groups.entry(group(&labels, aggregate.modifier.as_ref())).or_default().push(value);
        }
        let combine = combination(&aggregate.op.to_string());
        let combined = groups.into_iter().map(|(labels, values)| (labels, combine(&values)));
        Ok(Value::Vector(combined.collect()))
    }

    fn binary(&self, binary: &BinaryExpr) -> Result<Value, QueryError> {
        let operator = binary.op.to_string();
        let returns_bool = binary.modifier.as_ref().is_some_and(|modifier| modifier.return_bool);
        let compute = |left: f64, right: f64| operate(&operator, left, right, returns_bool);
        match (self.value(&binary.lhs)?, self.value(&binary.rhs)?) {
            (Value::Scalar(left), Value::Scalar(right)) => {
                Ok(Value::Scalar(operate(&operator, left, right, true).unwrap_or(f64::NAN)))
            }
            (Value::Vector(elements), Value::Scalar(right)) => {
                Ok(filter_map(elements, |left| compute(left, right)))
            }
            (Value::Scalar(left), Value::Vector(elements)) => Ok(filter_map(elements, |right| {
                let computed = compute(left, right)?;
                // A comparison that filters keeps the element's own value, whichever side it stands on.
                Some(if is_comparison(&operator) && !returns_bool { right } else { computed })
            })),
            (Value::Vector(left), Value::Vector(right)) => {
                let modifier = binary.modifier.as_ref();
                match operator.as_str() {
                    "and" | "or" | "unless" => Ok(Value::Vector(set(&operator, left, right, modifier))),
                    _ => matched(&operator, left, &right, modifier, compute),
                }
            }
        }
    }
}

pub fn map(value: Value, compute: impl Fn(f64) -> f64) -> Value {
    match value {
        Value::Scalar(number) => Value::Scalar(compute(number)),
        Value::Vector(elements) => {
            Value::Vector(elements.into_iter().map(|(labels, value)| (labels, compute(value))).collect())
        }
    }
}

fn filter_map(elements: Elements, compute: impl Fn(f64) -> Option<f64>) -> Value {
    let kept = elements.into_iter().filter_map(|(labels, value)| Some((labels, compute(value)?)));
    Value::Vector(kept.collect())
}

/// The labels that name an element's group.
fn group(labels: &Labels, modifier: Option<&LabelModifier>) -> Labels {
    let Some(modifier) = modifier else { return Labels::new() };
    let named = |name: &String| modifier.labels().labels.contains(name);
    let kept = labels.iter().filter(|(name, _)| named(name) == modifier.is_include());
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The labels by which two elements find each other.
fn signature(labels: &Labels, modifier: Option<&BinModifier>) -> Labels {
    match modifier.and_then(|modifier| modifier.matching.as_ref()) {
        Some(matching) => group(labels, Some(matching)),
        None => labels.clone(),
    }
}

fn combination(name: &str) -> fn(&[f64]) -> f64 {
    match name {
        "sum" => |values| values.iter().sum(),
        "avg" => |values| values.iter().sum::<f64>() / values.len() as f64,
        "count" => |values| values.len() as f64,
        // Something that is no number loses to any number.
        "min" => |values| values.iter().copied().fold(f64::NAN, f64::min),
        _ => |values| values.iter().copied().fold(f64::NAN, f64::max),
    }
}

fn is_comparison(operator: &str) -> bool {
    matches!(operator, "==" | "!=" | ">" | "<" | ">=" | "<=")
}

/// `None` where a comparison does not hold and filters.
fn operate(operator: &str, left: f64, right: f64, returns_bool: bool) -> Option<f64> {
    let compared = |holds: bool| match (returns_bool, holds) {
        (true, _) => Some(f64::from(u8::from(holds))),
        (false, true) => Some(left),
        (false, false) => None,
    };
    match operator {
        "+" => Some(left + right),
        "-" => Some(left - right),
        "*" => Some(left * right),
        "/" => Some(left / right),
        "%" => Some(left % right),
        "^" => Some(left.powf(right)),
        "==" => compared(left == right),
        "!=" => compared(left != right),
        ">" => compared(left > right),
        "<" => compared(left < right),
        ">=" => compared(left >= right),
        _ => compared(left <= right),
    }
}

fn set(operator: &str, left: Elements, right: Elements, modifier: Option<&BinModifier>) -> Elements {
    let sign = |labels: &Labels| signature(labels, modifier);
    match operator {
        "or" => {
            let known: Vec<Labels> = left.iter().map(|(labels, _)| sign(labels)).collect();
            let others = right.into_iter().filter(|(labels, _)| !known.contains(&sign(labels)));
            left.into_iter().chain(others).collect()
        }
        _ => {
            let known: Vec<Labels> = right.iter().map(|(labels, _)| sign(labels)).collect();
            let wants = operator == "and";
            left.into_iter().filter(|(labels, _)| known.contains(&sign(labels)) == wants).collect()
        }
    }
}

/// One element on each side at most.
fn matched(
    operator: &str,
    left: Elements,
    right: &Elements,
    modifier: Option<&BinModifier>,
    compute: impl Fn(f64, f64) -> Option<f64>,
) -> Result<Value, QueryError> {
    let ambiguous = || QueryError::Evaluation(format!("several elements match on one side of {operator}"));
    let mut by_signature: BTreeMap<Labels, f64> = BTreeMap::new();
    for (labels, value) in right {
        if by_signature.insert(signature(labels, modifier), *value).is_some() {
            return Err(ambiguous());
        }
    }
    let mut found: BTreeMap<Labels, f64> = BTreeMap::new();
    for (labels, value) in left {
        let signed = signature(&labels, modifier);
        let Some(other) = by_signature.get(&signed) else { continue };
        if found.contains_key(&signed) {
            return Err(ambiguous());
        }
        if let Some(computed) = compute(value, *other) {
            found.insert(signed, computed);
        }
    }
    Ok(Value::Vector(found.into_iter().collect()))
}
