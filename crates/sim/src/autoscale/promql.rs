//! The part of PromQL that scalers use, over scraped samples.
//!
//! Selectors with matchers, `sum avg max min count [by|without]`, `rate increase *_over_time histogram_quantile vector
//! scalar clamp* abs ceil floor round`, arithmetic, comparisons as filters, `and or unless`, `on` and `ignoring`.
//! Everything else is refused by name. The parser is ours: the one that there is for Rust (promql-parser) brings a
//! parser generator and some sixty crates that are built before it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use regex::Regex;

use super::samples::{Labels, RETENTION, SampleStore};

/// A query that cannot be read, or has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct QueryError(String);

fn wrong<T>(text: impl Into<String>) -> Result<T, QueryError> {
    Err(QueryError(text.into()))
}

/// A query as it was read.
#[derive(Clone, Debug)]
pub struct Query {
    text: String,
    root: Node,
}

#[derive(Clone, Debug)]
enum Node {
    Number(f64),
    Selector { name: String, matchers: Vec<Matcher>, range: Option<Duration> },
    Aggregate { how: String, by: bool, labels: Vec<String>, of: Box<Node> },
    Call(String, Vec<Node>),
    Binary { operation: Operation, left: Box<Node>, right: Box<Node> },
    Negated(Box<Node>),
}

#[derive(Clone, Debug)]
struct Operation {
    operator: &'static str,
    is_bool: bool,
    matching: Matching,
}

/// By which labels elements of two vectors belong together.
#[derive(Clone, Debug)]
struct Matching {
    /// `on` these alone, else `ignoring` them: by all but the name where nothing is said.
    on: bool,
    labels: Vec<String>,
}

#[derive(Clone, Debug)]
struct Matcher {
    label: String,
    value: Pattern,
    is_negated: bool,
}

#[derive(Clone, Debug)]
enum Pattern {
    Equals(String),
    Matches(Regex),
}

impl Matcher {
    fn takes(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.label).map_or("", String::as_str);
        let matched = match &self.value {
            Pattern::Equals(text) => text == value,
            Pattern::Matches(regex) => regex.is_match(value),
        };
        matched != self.is_negated
    }
}

/// An element of an instant vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Element {
    pub labels: Labels,
    pub value: f64,
}

/// What a query gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Scalar(f64),
    Vector(Vec<Element>),
}

const AGGREGATES: [&str; 5] = ["sum", "avg", "max", "min", "count"];
/// With the least and the most arguments.
const FUNCTIONS: [(&str, usize, usize); 17] = [
    ("rate", 1, 1),
    ("increase", 1, 1),
    ("avg_over_time", 1, 1),
    ("max_over_time", 1, 1),
    ("min_over_time", 1, 1),
    ("sum_over_time", 1, 1),
    ("count_over_time", 1, 1),
    ("histogram_quantile", 2, 2),
    ("vector", 1, 1),
    ("scalar", 1, 1),
    ("clamp_min", 2, 2),
    ("clamp_max", 2, 2),
    ("clamp", 3, 3),
    ("abs", 1, 1),
    ("ceil", 1, 1),
    ("floor", 1, 1),
    ("round", 1, 1),
];
/// Operators by how strongly they bind, weakest first.
const LEVELS: [&[&str]; 5] =
    [&["or"], &["and", "unless"], &["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];
const MOST_DEPTH: usize = 64;

impl Query {
    /// # Errors
    /// What cannot be read, or is not simulated.
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let root = parser.level(0)?;
        match parser.rest() {
            "" => Ok(Self { text: text.to_owned(), root }),
            rest => wrong(format!(
                "{:?} is not understood in {text:?}",
                rest.chars().take(20).collect::<String>()
            )),
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it gives at that moment.
    ///
    /// # Errors
    /// If its parts do not go together.
    pub fn at(&self, now: Duration, samples: &SampleStore) -> Result<Value, QueryError> {
        Evaluator { now, samples }.value(&self.root)
    }
}

// ---- reading ----

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

impl<'a> Parser<'a> {
    fn rest(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        &self.text[self.at..]
    }

    /// A word must end where it ends: `or` is not the beginning of `order`.
    fn takes(&mut self, word: &str) -> bool {
        let rest = self.rest();
        let Some(behind) = rest.strip_prefix(word) else { return false };
        if word.starts_with(is_word) && behind.starts_with(is_word) {
            return false;
        }
        self.at += word.len();
        true
    }

    fn expects(&mut self, word: &str) -> Result<(), QueryError> {
        if self.takes(word) { Ok(()) } else { wrong(format!("{word:?} is missing in {:?}", self.text)) }
    }

    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn level(&mut self, level: usize) -> Result<Node, QueryError> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        self.depth += usize::from(level == 0);
        if self.depth > MOST_DEPTH {
            return wrong("the query is nested too deeply");
        }
        let mut left = self.level(level + 1)?;
        while let Some(operator) = operators.iter().copied().find(|operator| self.takes(operator)) {
            let is_bool = self.takes("bool");
            let matching = self.matching()?;
            let right = Box::new(self.level(level + 1)?);
            let operation = Operation { operator, is_bool, matching };
            left = Node::Binary { operation, left: Box::new(left), right };
        }
        self.depth -= usize::from(level == 0);
        Ok(left)
    }

    fn matching(&mut self) -> Result<Matching, QueryError> {
        let on = self.takes("on");
        let labels = if on || self.takes("ignoring") { self.labels()? } else { Vec::new() };
        for word in ["group_left", "group_right"] {
            if self.takes(word) {
                return wrong(format!("matching with {word} is not simulated"));
            }
        }
        Ok(Matching { on, labels })
    }

    fn unary(&mut self) -> Result<Node, QueryError> {
        let is_negated = self.takes("-");
        let node = self.primary()?;
        if self.takes("^") || self.takes("[") || self.takes("@") || self.takes("offset") {
            return wrong(format!("powers, subqueries, @ and offset are not simulated: {:?}", self.text));
        }
        Ok(if is_negated { Node::Negated(Box::new(node)) } else { node })
    }

    fn primary(&mut self) -> Result<Node, QueryError> {
        if self.takes("(") {
            let inner = self.level(0)?;
            self.expects(")")?;
            return Ok(inner);
        }
        let rest = self.rest();
        if rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            self.at += end;
            let number = rest[..end].parse().map(Node::Number);
            return number.or_else(|_| wrong(format!("{:?} is no number", &rest[..end])));
        }
        if rest.starts_with('{') {
            return self.selector("");
        }
        let word = self.word();
        match word {
            "" => wrong(format!("something is missing in {:?}", self.text)),
            _ if AGGREGATES.contains(&word) => self.aggregate(word),
            _ if self.rest().starts_with('(') => self.call(word),
            _ => self.selector(word),
        }
    }

    fn aggregate(&mut self, how: &str) -> Result<Node, QueryError> {
        let mut grouping = self.grouping()?;
        self.expects("(")?;
        let of = Box::new(self.level(0)?);
        self.expects(")")?;
        if grouping.is_none() {
            grouping = self.grouping()?;
        }
        let (by, labels) = grouping.unwrap_or((true, Vec::new()));
        Ok(Node::Aggregate { how: how.to_owned(), by, labels, of })
    }

    fn grouping(&mut self) -> Result<Option<(bool, Vec<String>)>, QueryError> {
        let by = self.takes("by");
        if !by && !self.takes("without") {
            return Ok(None);
        }
        Ok(Some((by, self.labels()?)))
    }

    fn labels(&mut self) -> Result<Vec<String>, QueryError> {
        self.expects("(")?;
        let mut labels = Vec::new();
        while !self.takes(")") {
            match self.word() {
                "" => return wrong(format!("a label is missing in {:?}", self.text)),
                label => labels.push(label.to_owned()),
            }
            self.takes(",");
        }
        Ok(labels)
    }

    fn call(&mut self, name: &str) -> Result<Node, QueryError> {
        let Some((_, least, most)) = FUNCTIONS.iter().find(|(known, ..)| *known == name) else {
            let known: Vec<&str> = FUNCTIONS.iter().map(|(name, ..)| *name).chain(AGGREGATES).collect();
            return wrong(format!("the function {name} is not simulated; there are {}", known.join(", ")));
        };
        self.expects("(")?;
        let mut arguments = vec![self.level(0)?];
        while self.takes(",") {
            arguments.push(self.level(0)?);
        }
        self.expects(")")?;
        match arguments.len() {
            count if (*least..=*most).contains(&count) => Ok(Node::Call(name.to_owned(), arguments)),
            count => wrong(format!("{name} has {least} to {most} arguments, and is given {count}")),
        }
    }

    fn selector(&mut self, name: &str) -> Result<Node, QueryError> {
        let mut name = name.to_owned();
        let mut matchers = Vec::new();
        if self.takes("{") {
            while !self.takes("}") {
                let matcher = self.matcher()?;
                match (&matcher.value, matcher.label.as_str()) {
                    (Pattern::Equals(value), "__name__") if !matcher.is_negated => name.clone_from(value),
                    _ => matchers.push(matcher),
                }
                self.takes(",");
            }
        }
        if name.is_empty() {
            return wrong(format!("a selector without a name is not simulated: {:?}", self.text));
        }
        let range = if self.takes("[") { Some(self.range()?) } else { None };
        Ok(Node::Selector { name, matchers, range })
    }

    fn matcher(&mut self) -> Result<Matcher, QueryError> {
        let label = self.word().to_owned();
        let operators = ["=~", "!~", "!=", "="];
        let operator = operators.into_iter().find(|operator| self.takes(operator));
        let (Some(operator), false) = (operator, label.is_empty()) else {
            return wrong(format!("a matcher such as label=\"value\" is missing in {:?}", self.text));
        };
        let text = self.string()?;
        let value = match operator.ends_with('~') {
            true => match Regex::new(&format!("^(?:{text})$")) {
                Ok(regex) => Pattern::Matches(regex),
                Err(error) => return wrong(format!("{text:?} is no regular expression: {error}")),
            },
            false => Pattern::Equals(text),
        };
        Ok(Matcher { label, value, is_negated: operator.starts_with('!') })
    }

    fn string(&mut self) -> Result<String, QueryError> {
        let rest = self.rest();
        let quote = rest.chars().next().filter(|quote| matches!(quote, '"' | '\'' | '`'));
        let Some(quote) = quote else { return wrong(format!("a string is missing in {:?}", self.text)) };
        let mut text = String::new();
        let mut chars = rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' if quote != '`' => text.extend(chars.next().map(|(_, escaped)| escaped)),
                c if c == quote => {
                    self.at += at + 1;
                    return Ok(text);
                }
                c => text.push(c),
            }
        }
        wrong(format!("a string does not end in {:?}", self.text))
    }

    /// Such as `1m` or `1h30m`.
    fn range(&mut self) -> Result<Duration, QueryError> {
        let word = self.word();
        self.expects("]")?;
        let (mut seconds, mut rest) = (0.0, word);
        while !rest.is_empty() {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (number, unit) = rest.split_at(end);
            let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];
            let unit = units.iter().find(|(name, _)| unit.starts_with(name));
            let (Ok(number), Some((name, factor))) = (number.parse::<f64>(), unit) else {
                return wrong(format!("{word:?} is no range such as 1m"));
            };
            seconds += number * factor;
            rest = &rest[end + name.len()..];
        }
        match Duration::try_from_secs_f64(seconds) {
            Ok(range) if range > Duration::ZERO && range <= RETENTION => Ok(range),
            _ => wrong(format!("a range of {word:?} is not simulated; an hour at most is kept")),
        }
    }
}

// ---- computing ----

struct Evaluator<'a> {
    now: Duration,
    samples: &'a SampleStore,
}

impl Evaluator<'_> {
    fn value(&self, node: &Node) -> Result<Value, QueryError> {
        match node {
            Node::Number(number) => Ok(Value::Scalar(*number)),
            Node::Selector { range: Some(_), name, .. } => {
                wrong(format!("the range of {name} stands where a value is wanted; put rate() around it"))
            }
            Node::Selector { name, matchers, range: None } => Ok(Value::Vector(self.select(name, matchers))),
            Node::Aggregate { how, by, labels, of } => {
                Ok(Value::Vector(aggregate(how, *by, labels, &self.vector(of)?)))
            }
            Node::Call(name, arguments) => self.call(name, arguments),
            Node::Binary { operation, left, right } => {
                binary(operation, self.value(left)?, self.value(right)?)
            }
            Node::Negated(inner) => Ok(match self.value(inner)? {
                Value::Scalar(value) => Value::Scalar(-value),
                Value::Vector(vector) => Value::Vector(mapped(vector, |value| -value)),
            }),
        }
    }

    fn vector(&self, node: &Node) -> Result<Vec<Element>, QueryError> {
        match self.value(node)? {
            Value::Vector(vector) => Ok(vector),
            Value::Scalar(_) => wrong("a number stands where a vector is wanted"),
        }
    }

    fn scalar(&self, node: &Node) -> Result<f64, QueryError> {
        match self.value(node)? {
            Value::Scalar(value) => Ok(value),
            Value::Vector(_) => wrong("a vector stands where a number is wanted"),
        }
    }

    fn select(&self, name: &str, matchers: &[Matcher]) -> Vec<Element> {
        let matching = self
            .samples
            .series(name)
            .filter(|series| matchers.iter().all(|matcher| matcher.takes(&series.labels)));
        let element = |series: &super::samples::Series| {
            let mut labels = series.labels.clone();
            let value = series.at(self.now)?;
            labels.insert("__name__".to_owned(), name.to_owned());
            Some(Element { labels, value })
        };
        matching.filter_map(element).collect()
    }

    fn call(&self, name: &str, arguments: &[Node]) -> Result<Value, QueryError> {
        match name {
            "vector" => {
                let value = self.scalar(&arguments[0])?;
                Ok(Value::Vector(vec![Element { labels: Labels::new(), value }]))
            }
            "scalar" => match self.vector(&arguments[0])?.as_slice() {
                [one] => Ok(Value::Scalar(one.value)),
                _ => Ok(Value::Scalar(f64::NAN)),
            },
            "histogram_quantile" => {
                let quantile = self.scalar(&arguments[0])?;
                Ok(Value::Vector(histogram_quantile(quantile, &self.vector(&arguments[1])?)?))
            }
            "abs" => self.map(&arguments[0], f64::abs),
            "ceil" => self.map(&arguments[0], f64::ceil),
            "floor" => self.map(&arguments[0], f64::floor),
            "round" => self.map(&arguments[0], |value| (value + 0.5).floor()),
            "clamp_min" => {
                let least = self.scalar(&arguments[1])?;
                self.map(&arguments[0], |value| value.max(least))
            }
            "clamp_max" => {
                let most = self.scalar(&arguments[1])?;
                self.map(&arguments[0], |value| value.min(most))
            }
            "clamp" => {
                let (least, most) = (self.scalar(&arguments[1])?, self.scalar(&arguments[2])?);
                self.map(&arguments[0], |value| value.max(least).min(most))
            }
            over_range => self.over_range(over_range, &arguments[0]),
        }
    }

    fn map(&self, node: &Node, change: impl Fn(f64) -> f64) -> Result<Value, QueryError> {
        Ok(Value::Vector(mapped(self.vector(node)?, change)))
    }

    fn over_range(&self, function: &str, node: &Node) -> Result<Value, QueryError> {
        let Node::Selector { name, matchers, range: Some(range) } = node else {
            return wrong(format!("{function} wants a range such as metric[1m]"));
        };
        let matching = self
            .samples
            .series(name)
            .filter(|series| matchers.iter().all(|matcher| matcher.takes(&series.labels)));
        let element = |series: &super::samples::Series| {
            let samples = series.within(self.now, *range);
            let value = match function {
                "rate" => increase(&samples, self.now, *range)? / range.as_secs_f64(),
                "increase" => increase(&samples, self.now, *range)?,
                _ => over_time(function, &samples)?,
            };
            Some(Element { labels: series.labels.clone(), value })
        };
        Ok(Value::Vector(matching.filter_map(element).collect()))
    }
}

/// The same with other values, and without a name.
fn mapped(vector: Vec<Element>, change: impl Fn(f64) -> f64) -> Vec<Element> {
    let element = |mut element: Element| {
        element.labels.remove("__name__");
        element.value = change(element.value);
        element
    };
    vector.into_iter().map(element).collect()
}

fn over_time(function: &str, samples: &[(f64, f64)]) -> Option<f64> {
    let values = samples.iter().map(|(_, value)| *value);
    let count = samples.len() as f64;
    (count > 0.0).then(|| match function {
        "max_over_time" => values.fold(f64::NEG_INFINITY, f64::max),
        "min_over_time" => values.fold(f64::INFINITY, f64::min),
        "sum_over_time" => values.sum(),
        "count_over_time" => count,
        _ => values.sum::<f64>() / count,
    })
}

/// `extrapolatedRate` of Prometheus 3 (`promql/functions.go`), before it is divided by the range.
fn increase(samples: &[(f64, f64)], now: Duration, range: Duration) -> Option<f64> {
    let ([first, .., last], count) = (samples, samples.len()) else { return None };
    let mut increase = last.1 - first.1;
    for pair in samples.windows(2) {
        if pair[1].1 < pair[0].1 {
            // The counter began anew.
            increase += pair[0].1;
        }
    }
    let end = now.as_secs_f64();
    let start = end - range.as_secs_f64();
    let sampled = last.0 - first.0;
    let mean_gap = sampled / (count - 1) as f64;
    let threshold = 1.1 * mean_gap;
    let (mut before, mut after) = (first.0 - start, end - last.0);
    if before >= threshold {
        before = mean_gap / 2.0;
    }
    if increase > 0.0 && first.1 >= 0.0 {
        // A counter is not below 0: it cannot have grown for longer than it took to come here.
        before = before.min(sampled * first.1 / increase);
    }
    if after >= threshold {
        after = mean_gap / 2.0;
    }
    (sampled > 0.0).then(|| increase * (sampled + before + after) / sampled)
}

fn group_of(labels: &Labels, by: bool, named: &[String]) -> Labels {
    let keep = |label: &str| label != "__name__" && named.iter().any(|other| other == label) == by;
    labels
        .iter()
        .filter(|(label, _)| keep(label))
        .map(|(label, value)| (label.clone(), value.clone()))
        .collect()
}

fn aggregate(how: &str, by: bool, named: &[String], vector: &[Element]) -> Vec<Element> {
    let mut groups: BTreeMap<Labels, Vec<f64>> = BTreeMap::new();
    for element in vector {
        groups.entry(group_of(&element.labels, by, named)).or_default().push(element.value);
    }
    // NaN is taken only where there is nothing else.
    let extreme = |values: &[f64], better: fn(f64, f64) -> bool| {
        let choose = |best: f64, value: f64| if best.is_nan() || better(value, best) { value } else { best };
        values.iter().copied().fold(f64::NAN, choose)
    };
    let element = |(labels, values): (Labels, Vec<f64>)| {
        let value = match how {
            "sum" => values.iter().sum(),
            "avg" => values.iter().sum::<f64>() / values.len() as f64,
            "max" => extreme(&values, |value, best| value > best),
            "min" => extreme(&values, |value, best| value < best),
            _ => values.len() as f64,
        };
        Element { labels, value }
    };
    groups.into_iter().map(element).collect()
}

/// `bucketQuantile` of Prometheus (`promql/quantile.go`) for each group of buckets.
fn histogram_quantile(quantile: f64, vector: &[Element]) -> Result<Vec<Element>, QueryError> {
    let mut groups: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for element in vector {
        let Some(bound) = element.labels.get("le").and_then(|bound| bound.parse::<f64>().ok()) else {
            continue;
        };
        let group = group_of(&element.labels, false, &["le".to_owned()]);
        groups.entry(group).or_default().push((bound, element.value));
    }
    let element = |(labels, mut buckets): (Labels, Vec<(f64, f64)>)| {
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        Element { labels, value: bucket_quantile(quantile, &buckets) }
    };
    Ok(groups.into_iter().map(element).collect())
}

fn bucket_quantile(quantile: f64, buckets: &[(f64, f64)]) -> f64 {
    let Some(last) = buckets.last().filter(|last| last.0 == f64::INFINITY && buckets.len() > 1) else {
        return f64::NAN;
    };
    match quantile {
        _ if quantile.is_nan() || last.1 == 0.0 || last.1.is_nan() => return f64::NAN,
        below if below < 0.0 => return f64::NEG_INFINITY,
        above if above > 1.0 => return f64::INFINITY,
        _ => {}
    }
    let mut rank = quantile * last.1;
    let at = buckets[..buckets.len() - 1].partition_point(|bucket| bucket.1 < rank);
    if at == buckets.len() - 1 {
        return buckets[buckets.len() - 2].0;
    }
    if at == 0 && buckets[0].0 <= 0.0 {
        return buckets[0].0;
    }
    let (mut start, end) = (0.0, buckets[at].0);
    let mut count = buckets[at].1;
    if at > 0 {
        start = buckets[at - 1].0;
        count -= buckets[at - 1].1;
        rank -= buckets[at - 1].1;
    }
    start + (end - start) * (rank / count)
}

fn binary(operation: &Operation, left: Value, right: Value) -> Result<Value, QueryError> {
    let Operation { operator, is_bool, .. } = operation;
    match (left, right) {
        (Value::Scalar(left), Value::Scalar(right)) => match compared(operator, left, right) {
            Some(_) if !is_bool => wrong("two numbers are compared with bool only"),
            Some(holds) => Ok(Value::Scalar(f64::from(holds))),
            None => Ok(Value::Scalar(computed(operator, left, right)?)),
        },
        (Value::Vector(left), Value::Scalar(right)) => {
            let pairs = left.into_iter().map(|element| (element.value, right, element));
            combined(operator, *is_bool, pairs)
        }
        (Value::Scalar(left), Value::Vector(right)) => {
            let pairs = right.into_iter().map(|element| (left, element.value, element));
            combined(operator, *is_bool, pairs)
        }
        (Value::Vector(left), Value::Vector(right)) => vectors(operation, left, right),
    }
}

/// `None` for an operator that compares nothing.
fn compared(operator: &str, left: f64, right: f64) -> Option<bool> {
    Some(match operator {
        "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        ">" => left > right,
        "<=" => left <= right,
        ">=" => left >= right,
        _ => return None,
    })
}

fn computed(operator: &str, left: f64, right: f64) -> Result<f64, QueryError> {
    Ok(match operator {
        "+" => left + right,
        "-" => left - right,
        "*" => left * right,
        "/" => left / right,
        "%" => left % right,
        _ => return wrong(format!("{operator} is between vectors only; vector(0) makes one")),
    })
}

/// Left value, right value, and the element that remains. A comparison filters; arithmetic drops the name.
fn combined(
    operator: &str,
    is_bool: bool,
    pairs: impl Iterator<Item = (f64, f64, Element)>,
) -> Result<Value, QueryError> {
    let mut vector = Vec::new();
    for (left, right, mut element) in pairs {
        match compared(operator, left, right) {
            Some(holds) if is_bool => element.value = f64::from(holds),
            Some(true) => {
                vector.push(element);
                continue;
            }
            Some(false) => continue,
            None => element.value = computed(operator, left, right)?,
        }
        element.labels.remove("__name__");
        vector.push(element);
    }
    Ok(Value::Vector(vector))
}

/// Set operators, and what else pairs one element with one (`VectorAnd`, `VectorBinop` of `promql/engine.go`).
fn vectors(operation: &Operation, left: Vec<Element>, right: Vec<Element>) -> Result<Value, QueryError> {
    let Operation { operator, is_bool, matching } = operation;
    let key = |element: &Element| group_of(&element.labels, matching.on, &matching.labels);
    let keys = |elements: &[Element]| elements.iter().map(key).collect::<BTreeSet<Labels>>();
    let kept = |elements: Vec<Element>, others: &BTreeSet<Labels>, is_there: bool| {
        elements.into_iter().filter(|element| others.contains(&key(element)) == is_there).collect::<Vec<_>>()
    };
    match *operator {
        "and" => return Ok(Value::Vector(kept(left, &keys(&right), true))),
        "unless" => return Ok(Value::Vector(kept(left, &keys(&right), false))),
        "or" => {
            let others = kept(right, &keys(&left), false);
            return Ok(Value::Vector(left.into_iter().chain(others).collect()));
        }
        _ => {}
    }
    let of_right: BTreeMap<Labels, f64> = right.iter().map(|element| (key(element), element.value)).collect();
    if of_right.len() < right.len() {
        return wrong("several elements of the right side have the same labels to match by");
    }
    let mut matched = BTreeSet::new();
    let mut pairs = Vec::new();
    for mut element in left {
        let key = key(&element);
        let Some(right) = of_right.get(&key) else { continue };
        if !is_bool && compared(operator, element.value, *right) == Some(false) {
            continue;
        }
        if !matched.insert(key) {
            return wrong("several elements of the left side match the same one of the right side");
        }
        if matching.on {
            element.labels.retain(|label, _| label == "__name__" || matching.labels.contains(label));
        } else {
            element.labels.retain(|label, _| !matching.labels.contains(label));
        }
        pairs.push((element.value, *right, element));
    }
    combined(operator, *is_bool, pairs.into_iter())
}
