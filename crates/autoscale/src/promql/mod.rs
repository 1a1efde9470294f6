//! The part of PromQL that autoscaling queries use, over a [`SampleStore`].
//!
//! Parsed by promql-parser; evaluated as Prometheus 3 does (`promql/engine.go`, `functions.go`, `quantile.go`):
//! instant selectors look back five minutes and stop at a staleness marker, `rate` extrapolates to the range's ends.
//! What is not here (subqueries, offsets, `@`, group_left, most functions) is refused by name when a query is read.

mod check;
mod eval;
mod functions;

use std::time::Duration;

use promql_parser::parser::Expr;
use thiserror::Error;

use crate::store::{Labels, SampleStore};

/// How far an instant selector looks back for a series' last sample.
pub const LOOKBACK: Duration = Duration::from_secs(300);

/// Elements with their labels, or one number.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Scalar(f64),
    Vector(Vec<(Labels, f64)>),
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum QueryError {
    #[error("query {query:?} cannot be read: {reason}")]
    Syntax { query: String, reason: String },
    #[error("query {query:?}: {feature} is not simulated; allowed are {ALLOWED}")]
    Unsupported { query: String, feature: String },
    #[error("{0}")]
    Evaluation(String),
}

const ALLOWED: &str = "selectors with label matchers, sum, avg, min, max and count (by, without), arithmetic, \
comparisons, and, or, unless (on, ignoring), rate, increase, irate, the functions over time, histogram_quantile, \
vector, scalar, clamp, clamp_min, clamp_max, abs, ceil, floor, round and absent";

/// A query that was read and can be evaluated.
#[derive(Clone, Debug)]
pub struct Query {
    text: String,
    expr: Expr,
    reach: Duration,
}

impl Query {
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        let syntax = |reason: String| QueryError::Syntax { query: text.to_owned(), reason };
        let expr = promql_parser::parser::parse(text).map_err(syntax)?;
        let unsupported = |feature| QueryError::Unsupported { query: text.to_owned(), feature };
        let reach = check::reach(&expr).map_err(unsupported)?;
        Ok(Self { text: text.to_owned(), expr, reach })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// How far back it looks at most.
    pub fn reach(&self) -> Duration {
        self.reach
    }

    /// Its value at a moment.
    pub fn at(&self, now: Duration, store: &SampleStore) -> Result<Value, QueryError> {
        eval::Evaluation { now, store }.value(&self.expr)
    }
}
