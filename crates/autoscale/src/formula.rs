//! The formula of KEDA's scaling modifiers: arithmetic, comparisons, `&&`, `||`, `!`, `c ? a : b` and a few functions
//! over the values of named triggers.
//!
//! KEDA evaluates it with the library expr (expr-lang.org), of which this is the part that scaling needs; anything
//! else is refused when the manifest is read.

use std::collections::BTreeMap;

use thiserror::Error;

/// Deepest nesting of a formula.
const MAX_DEPTH: u32 = 64;

#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "formula {formula:?}: {problem} at byte {at}; allowed are numbers, trigger names, + - * / % **, comparisons, \
     && || !, c ? a : b, min, max, abs, ceil, floor and round"
)]
pub struct FormulaError {
    formula: String,
    problem: String,
    at: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Number(f64),
    Trigger(String),
    Not(Box<Node>),
    Minus(Box<Node>),
    Binary(&'static str, Box<Node>, Box<Node>),
    Choice(Box<Node>, Box<Node>, Box<Node>),
    Call(&'static str, Vec<Node>),
}

/// A formula that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Formula(Node);

/// Binary operators, the loosest first.
const LEVELS: [&[&str]; 7] =
    [&["||"], &["&&"], &["==", "!="], &["<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"], &["**"]];
const FUNCTIONS: [(&str, std::ops::RangeInclusive<usize>); 6] =
    [("min", 1..=16), ("max", 1..=16), ("abs", 1..=1), ("ceil", 1..=1), ("floor", 1..=1), ("round", 1..=1)];

impl Formula {
    /// Reads a formula; `triggers` are the names that it may use.
    pub fn parse(text: &str, triggers: &[&str]) -> Result<Self, FormulaError> {
        let mut parser = Parser { text, at: 0, depth: 0, triggers };
        let node = parser.choice()?;
        parser.blank();
        if parser.at < text.len() { Err(parser.error("something unexpected")) } else { Ok(Self(node)) }
    }

    /// Its value; truth is 1 and falsehood 0.
    pub fn value(&self, triggers: &BTreeMap<String, f64>) -> f64 {
        value(&self.0, triggers)
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
    triggers: &'a [&'a str],
}

impl Parser<'_> {
    fn error(&self, problem: &str) -> FormulaError {
        FormulaError { formula: self.text.to_owned(), problem: problem.to_owned(), at: self.at }
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn blank(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn take(&mut self, token: &str) -> bool {
        self.blank();
        let found = self.rest().starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn need(&mut self, token: &str) -> Result<(), FormulaError> {
        if self.take(token) { Ok(()) } else { Err(self.error(&format!("{token:?} is missing"))) }
    }

    fn choice(&mut self) -> Result<Node, FormulaError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error("too deep a nesting"));
        }
        let condition = self.binary(0)?;
        let node = if self.take("?") {
            let yes = self.choice()?;
            self.need(":")?;
            let no = self.choice()?;
            Node::Choice(condition.into(), yes.into(), no.into())
        } else {
            condition
        };
        self.depth -= 1;
        Ok(node)
    }

    fn binary(&mut self, level: usize) -> Result<Node, FormulaError> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        while let Some(operator) = self.operator(operators) {
            let right = self.binary(level + 1)?;
            left = Node::Binary(operator, left.into(), right.into());
        }
        Ok(left)
    }

    fn operator(&mut self, operators: &[&'static str]) -> Option<&'static str> {
        self.blank();
        let is_power = self.rest().starts_with("**");
        let found =
            operators.iter().find(|it| self.rest().starts_with(**it) && (is_power == (**it == "**")))?;
        self.at += found.len();
        Some(found)
    }

    fn unary(&mut self) -> Result<Node, FormulaError> {
        let mut wraps: Vec<fn(Box<Node>) -> Node> = Vec::new();
        loop {
            if wraps.len() as u32 > MAX_DEPTH {
                return Err(self.error("too deep a nesting"));
            }
            if self.take("-") {
                wraps.push(Node::Minus);
            } else if self.take("!") {
                wraps.push(Node::Not);
            } else {
                let node = self.primary()?;
                return Ok(wraps.into_iter().rev().fold(node, |node, wrap| wrap(node.into())));
            }
        }
    }

    fn primary(&mut self) -> Result<Node, FormulaError> {
        if self.take("(") {
            let node = self.choice()?;
            self.need(")")?;
            return Ok(node);
        }
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let length = self.rest().find(|c| !is_word(c)).unwrap_or(self.rest().len());
        let word = self.rest()[..length].to_owned();
        if word.is_empty() {
            return Err(self.error("a number or a trigger's name is missing"));
        }
        if word.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            let number = word.parse().map_err(|_| self.error("this is no number"))?;
            self.at += length;
            return Ok(Node::Number(number));
        }
        if self.triggers.contains(&word.as_str()) {
            self.at += length;
            return Ok(Node::Trigger(word));
        }
        let function = FUNCTIONS.iter().find(|(name, _)| *name == word);
        let Some((name, arity)) = function else {
            return Err(self.error(&format!("{word:?} is neither a trigger's name nor a function")));
        };
        self.at += length;
        self.call(name, arity)
    }

    fn call(
        &mut self,
        name: &'static str,
        arity: &std::ops::RangeInclusive<usize>,
    ) -> Result<Node, FormulaError> {
        self.need("(")?;
        let mut arguments = vec![self.choice()?];
        while self.take(",") {
            arguments.push(self.choice()?);
        }
        self.need(")")?;
        if !arity.contains(&arguments.len()) {
            return Err(self.error(&format!("{name} does not take {} arguments", arguments.len())));
        }
        Ok(Node::Call(name, arguments))
    }
}

fn value(node: &Node, triggers: &BTreeMap<String, f64>) -> f64 {
    let of = |node: &Node| value(node, triggers);
    let truth = |holds: bool| f64::from(u8::from(holds));
    match node {
        Node::Number(number) => *number,
        Node::Trigger(name) => triggers.get(name).copied().unwrap_or(f64::NAN),
        Node::Not(node) => truth(of(node) == 0.0),
        Node::Minus(node) => -of(node),
        Node::Choice(condition, yes, no) => of(if of(condition) == 0.0 { no } else { yes }),
        Node::Binary(operator, left, right) => {
            let (left, right) = (of(left), of(right));
            match *operator {
                "+" => left + right,
                "-" => left - right,
                "*" => left * right,
                "/" => left / right,
                "%" => left % right,
                "**" => left.powf(right),
                "==" => truth(left == right),
                "!=" => truth(left != right),
                "<" => truth(left < right),
                ">" => truth(left > right),
                "<=" => truth(left <= right),
                ">=" => truth(left >= right),
                "&&" => truth(left != 0.0 && right != 0.0),
                _ => truth(left != 0.0 || right != 0.0),
            }
        }
        Node::Call(name, arguments) => {
            let mut values = arguments.iter().map(of);
            let first = values.next().unwrap_or(f64::NAN);
            match *name {
                "min" => values.fold(first, f64::min),
                "max" => values.fold(first, f64::max),
                "abs" => first.abs(),
                "ceil" => first.ceil(),
                "floor" => first.floor(),
                _ => first.round(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> f64 {
        let triggers = [("held".to_owned(), 12.0), ("kv".to_owned(), 0.95)].into();
        Formula::parse(text, &["held", "kv"]).unwrap_or_else(|error| panic!("{error}")).value(&triggers)
    }

    #[test]
    fn it_computes_as_expr_does() {
        for (text, expected) in [
            ("kv > 0.9 ? held + 4 : held", 16.0),
            ("kv > 0.9 && held < 10 ? 1 : 0", 0.0),
            ("(held + 2) * 2 - 1", 27.0),
            ("2 + 3 * 2 ** 3", 26.0),
            ("-held / 4", -3.0),
            ("max(held, 20, 3) % 7", 6.0),
            ("!(held == 12) || kv >= 0.95", 1.0),
            ("ceil(kv) + floor(kv) + round(1.5) + abs(-1)", 4.0),
            ("kv<0.5?1:kv<0.99?2:3", 2.0),
        ] {
            assert_eq!(of(text), expected, "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let deep = format!("{}1{}", "(".repeat(5000), ")".repeat(5000));
        let minus = "-".repeat(5000);
        for text in [
            "",
            "held +",
            "other",
            "held; 1",
            "sum(held)",
            "min()",
            "abs(1, 2)",
            "1.2.3",
            "held ? 1",
            &deep,
            &minus,
        ] {
            assert!(Formula::parse(text, &["held"]).is_err(), "{text}");
        }
    }
}
