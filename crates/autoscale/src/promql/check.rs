//! Refuses what the evaluation does not have, before anything runs.

use std::time::Duration;

use promql_parser::parser::{BinaryExpr, Expr, VectorMatchCardinality, VectorSelector};

use super::LOOKBACK;
use super::functions;

const AGGREGATIONS: [&str; 5] = ["sum", "avg", "min", "max", "count"];
const OPERATORS: [&str; 15] =
    ["+", "-", "*", "/", "%", "^", "==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"];

/// How far back the expression looks, or what in it is not supported.
pub fn reach(expr: &Expr) -> Result<Duration, String> {
    match expr {
        Expr::NumberLiteral(_) => Ok(Duration::ZERO),
        Expr::Paren(paren) => reach(&paren.expr),
        Expr::Unary(unary) => reach(&unary.expr),
        Expr::VectorSelector(selector) => check_selector(selector).map(|()| LOOKBACK),
        Expr::MatrixSelector(matrix) => check_selector(&matrix.vs).map(|()| matrix.range),
        Expr::Aggregate(aggregate) => {
            let name = aggregate.op.to_string();
            if !AGGREGATIONS.contains(&name.as_str()) {
                return Err(format!("the aggregation {name}"));
            }
            reach(&aggregate.expr)
        }
        Expr::Binary(binary) => check_binary(binary),
        Expr::Call(call) => {
            if !functions::is_known(call.func.name) {
                return Err(format!("the function {}", call.func.name));
            }
            let reaches = call.args.args.iter().map(|argument| reach(argument));
            reaches.collect::<Result<Vec<_>, _>>().map(|all| all.into_iter().max().unwrap_or_default())
        }
        Expr::Subquery(_) => Err("a subquery".to_owned()),
        Expr::StringLiteral(_) => Err("a string".to_owned()),
        Expr::Extension(_) => Err("an extension".to_owned()),
    }
}

fn check_selector(selector: &VectorSelector) -> Result<(), String> {
    if selector.name.is_none() {
        return Err("a selector without the metric's name".to_owned());
    }
    if selector.offset.is_some() || selector.at.is_some() {
        return Err("offset or @".to_owned());
    }
    if !selector.matchers.or_matchers.is_empty() {
        return Err("matchers with or".to_owned());
    }
    Ok(())
}

fn check_binary(binary: &BinaryExpr) -> Result<Duration, String> {
    let name = binary.op.to_string();
    if !OPERATORS.contains(&name.as_str()) {
        return Err(format!("the operator {name}"));
    }
    if let Some(modifier) = &binary.modifier
        && matches!(
            modifier.card,
            VectorMatchCardinality::ManyToOne(_) | VectorMatchCardinality::OneToMany(_)
        )
    {
        return Err("group_left or group_right".to_owned());
    }
    Ok(reach(&binary.lhs)?.max(reach(&binary.rhs)?))
}
