//! The language of `scalingModifiers.formula`, as far as arithmetic goes: numbers, names of triggers, `+ - * / %`,
//! comparisons, `&& || !`, `a ? b : c`, and min, max, abs, ceil, floor, round. KEDA takes all of the language expr;
//! the rest is refused by name.

use std::collections::BTreeMap;

/// A formula that cannot be read or computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("scalingModifiers.formula: {0}")]
pub struct FormulaError(String);

/// A formula as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Formula {
    root: Node,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Number(f64),
    Name(String),
    Negated(Box<Node>),
    Not(Box<Node>),
    Binary(&'static str, Box<Node>, Box<Node>),
    Choice(Box<Node>, Box<Node>, Box<Node>),
    Call(String, Vec<Node>),
}

/// Operators by how strongly they bind, weakest first.
const LEVELS: [&[&str]; 5] =
    [&["||"], &["&&"], &["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];
const FUNCTIONS: [&str; 6] = ["min", "max", "abs", "ceil", "floor", "round"];
/// Deeper ones are somebody's joke.
const MOST_DEPTH: usize = 64;

impl Formula {
    /// # Errors
    /// What cannot be read.
    pub fn parse(text: &str) -> Result<Self, FormulaError> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let root = parser.choice()?;
        match parser.rest().chars().next() {
            None => Ok(Self { root }),
            Some(other) => Err(FormulaError(format!("{other:?} is not understood in {text:?}"))),
        }
    }

    /// The names of triggers in it.
    pub fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        collect(&self.root, &mut names);
        names
    }

    /// With values for all names; true is 1 and false 0.
    ///
    /// # Errors
    /// A name without a value.
    pub fn value(&self, values: &BTreeMap<String, f64>) -> Result<f64, FormulaError> {
        evaluate(&self.root, values)
    }
}

fn collect<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
    match node {
        Node::Number(_) => {}
        Node::Name(name) => names.push(name),
        Node::Negated(inner) | Node::Not(inner) => collect(inner, names),
        Node::Binary(_, left, right) => [left, right].into_iter().for_each(|node| collect(node, names)),
        Node::Choice(a, b, c) => [a, b, c].into_iter().for_each(|node| collect(node, names)),
        Node::Call(_, arguments) => arguments.iter().for_each(|node| collect(node, names)),
    }
}

fn evaluate(node: &Node, values: &BTreeMap<String, f64>) -> Result<f64, FormulaError> {
    let value = |node: &Node| evaluate(node, values);
    Ok(match node {
        Node::Number(number) => *number,
        Node::Name(name) => *values
            .get(name)
            .ok_or_else(|| FormulaError(format!("no trigger is called {name}; give one that name")))?,
        Node::Negated(inner) => -value(inner)?,
        Node::Not(inner) => f64::from(value(inner)? == 0.0),
        Node::Choice(condition, then, otherwise) => {
            value(if value(condition)? != 0.0 { then } else { otherwise })?
        }
        Node::Binary(operator, left, right) => binary(operator, value(left)?, value(right)?),
        Node::Call(name, arguments) => {
            let arguments = arguments.iter().map(value).collect::<Result<Vec<f64>, _>>()?;
            call(name, &arguments)
        }
    })
}

fn binary(operator: &str, left: f64, right: f64) -> f64 {
    match operator {
        "+" => left + right,
        "-" => left - right,
        "*" => left * right,
        "/" => left / right,
        "%" => left % right,
        "<" => f64::from(left < right),
        ">" => f64::from(left > right),
        "<=" => f64::from(left <= right),
        ">=" => f64::from(left >= right),
        "==" => f64::from(left == right),
        "!=" => f64::from(left != right),
        "&&" => f64::from(left != 0.0 && right != 0.0),
        _ => f64::from(left != 0.0 || right != 0.0),
    }
}

fn call(name: &str, arguments: &[f64]) -> f64 {
    let first = arguments[0];
    match name {
        "min" => arguments.iter().copied().fold(f64::INFINITY, f64::min),
        "max" => arguments.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        "abs" => first.abs(),
        "ceil" => first.ceil(),
        "floor" => first.floor(),
        _ => first.round(),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn rest(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        &self.text[self.at..]
    }

    fn takes(&mut self, word: &str) -> bool {
        let found = self.rest().starts_with(word);
        self.at += if found { word.len() } else { 0 };
        found
    }

    fn expects(&mut self, word: &str) -> Result<(), FormulaError> {
        if self.takes(word) {
            return Ok(());
        }
        Err(FormulaError(format!("{word:?} is missing in {:?}", self.text)))
    }

    fn choice(&mut self) -> Result<Node, FormulaError> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err(FormulaError("it is nested too deeply".into()));
        }
        let condition = self.level(0)?;
        let node = if self.takes("?") {
            let then = self.choice()?;
            self.expects(":")?;
            Node::Choice(Box::new(condition), Box::new(then), Box::new(self.choice()?))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(node)
    }

    fn level(&mut self, level: usize) -> Result<Node, FormulaError> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.level(level + 1)?;
        while let Some(operator) = operators.iter().copied().find(|operator| self.takes(operator)) {
            left = Node::Binary(operator, Box::new(left), Box::new(self.level(level + 1)?));
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Node, FormulaError> {
        let mut signs = Vec::new();
        while signs.len() < MOST_DEPTH
            && let Some(sign) = ["-", "!"].into_iter().find(|sign| self.takes(sign))
        {
            signs.push(sign);
        }
        let wrap = |node, sign| match sign {
            "-" => Node::Negated(Box::new(node)),
            _ => Node::Not(Box::new(node)),
        };
        Ok(signs.into_iter().rev().fold(self.primary()?, wrap))
    }

    fn primary(&mut self) -> Result<Node, FormulaError> {
        if self.takes("(") {
            let inner = self.choice()?;
            self.expects(")")?;
            return Ok(inner);
        }
        let rest = self.rest();
        let end =
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '.').unwrap_or(rest.len());
        let word = &rest[..end];
        self.at += end;
        match word.chars().next() {
            None => Err(FormulaError(format!("something is missing in {:?}", self.text))),
            Some(digit) if digit.is_ascii_digit() || digit == '.' => {
                word.parse().map(Node::Number).map_err(|_| FormulaError(format!("{word:?} is no number")))
            }
            Some(_) if self.takes("(") => self.call(word),
            Some(_) => Ok(Node::Name(word.to_owned())),
        }
    }

    fn call(&mut self, name: &str) -> Result<Node, FormulaError> {
        if !FUNCTIONS.contains(&name) {
            let known = FUNCTIONS.join(", ");
            return Err(FormulaError(format!("the function {name} is not simulated; there are {known}")));
        }
        let mut arguments = vec![self.choice()?];
        while self.takes(",") {
            arguments.push(self.choice()?);
        }
        self.expects(")")?;
        Ok(Node::Call(name.to_owned(), arguments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> f64 {
        let values = BTreeMap::from([("kv".to_owned(), 0.95), ("held".to_owned(), 3.0)]);
        Formula::parse(text).unwrap().value(&values).unwrap()
    }

    #[test]
    fn formulas_are_computed_as_written() {
        assert_eq!(value("kv > 0.9 ? held + 4 : held"), 7.0);
        assert_eq!(value("1 + 2 * 3 - -4 / 2"), 9.0);
        assert_eq!(value("(1 + 2) * max(held, 2, 1) % 5"), 4.0);
        assert_eq!(value("!(held == 3) || kv <= 0.95 && held != 4 ? 1 : 0"), 1.0);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let error = |text: &str| Formula::parse(text).unwrap_err().to_string();
        assert!(error("1 +").contains("missing"));
        assert!(error("sum(1)").contains("sum is not simulated"));
        assert!(error("a @ b").contains("'@'"));
        assert!(error(&"(".repeat(1000)).contains("nested"));
        let missing = Formula::parse("n * 2").unwrap().value(&BTreeMap::new()).unwrap_err();
        assert!(missing.to_string().contains("no trigger is called n"));
    }
}
