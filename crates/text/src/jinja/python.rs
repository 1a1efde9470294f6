//! Values as Python has them: dictionaries whose methods win over their keys, `str()`, `repr()` and `json.dumps`.

use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::bounds::Bounded;
use super::methods;

/// A JSON value as the template sees it.
pub(crate) fn to_value(json: serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(b),
        serde_json::Value::Number(number) => to_number(&number),
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(items) => {
            Value::from(items.into_iter().map(to_value).collect::<Vec<Value>>())
        }
        serde_json::Value::Object(fields) => {
            Value::from_object(Dict(Value::from_pairs(fields.into_iter().map(|(k, v)| (k, to_value(v))))))
        }
    }
}

fn to_number(number: &serde_json::Number) -> Value {
    match (number.as_i64(), number.as_u64()) {
        (Some(integer), _) => Value::from(integer),
        (_, Some(integer)) => Value::from(integer),
        _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
    }
}

/// A dictionary from the request. In minijinja a key `items` would hide the method `items()`; in Python it does
/// not, and JSON schemas have such keys.
#[derive(Debug)]
struct Dict(Value);

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.as_object()?.get_value(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.0.as_object().map_or(Enumerator::Empty, |map| map.enumerate())
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        methods::call(state, &self.0, method, args)
    }
}

/// `str(value)`.
pub(crate) fn write_str(out: &mut Bounded, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.push(text),
        None if value.is_undefined() => Ok(()),
        None => write_repr(out, value),
    }
}

/// `repr(value)`.
pub(crate) fn write_repr(out: &mut Bounded, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => out.push(&float(as_float(value)?)),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            out.push(open)?;
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                out.push(if count > 0 { ", " } else { "" })?;
                out.nested(|out| write_repr(out, &item?))?;
                count += 1;
            }
            out.push(if value.is_tuple() && count == 1 { "," } else { "" })?;
            out.push(close)
        }
        ValueKind::Map if value.as_object().is_some_and(|object| object.try_iter_pairs().is_some()) => {
            out.push("{")?;
            for (count, (key, item)) in pairs(value).enumerate() {
                out.push(if count > 0 { ", " } else { "" })?;
                out.nested(|out| write_repr(out, &key))?;
                out.push(": ")?;
                out.nested(|out| write_repr(out, &item))?;
            }
            out.push("}")
        }
        _ => write!(out, "{value:?}").map_err(|_| out.error()),
    }
}

/// The pairs of a map; nothing for other values.
pub(crate) fn pairs(value: &Value) -> impl Iterator<Item = (Value, Value)> {
    value.as_object().and_then(|object| object.try_iter_pairs()).into_iter().flatten()
}

/// `repr` of a float: the shortest digits that read back, in scientific notation below 1e-4 and from 1e16.
pub(crate) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let magnitude = number.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let scientific = format!("{number:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn as_float(value: &Value) -> Result<f64, Error> {
    f64::try_from(value.clone())
}

/// transformers' `tojson`: `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(crate) fn tojson(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let (positional, kwargs) = split_kwargs(args)?;
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?.map(|value| indentation(&value)).transpose()?;
    let separators = argument(2, "separators")?;
    let sort = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let default_comma = if indent.is_some() { "," } else { ", " };
    let (comma, colon) = match separators {
        Some(pair) => (text_at(&pair, 0)?, text_at(&pair, 1)?),
        None => (default_comma.to_owned(), ": ".to_owned()),
    };
    let mut writer = Json { out: Bounded::value(), ascii, sort, indent, comma, colon, depth: 0 };
    writer.write(value)?;
    Ok(Value::from(writer.out.text))
}

/// Splits the keyword arguments from the end of a call's arguments.
pub(crate) fn split_kwargs(args: &[Value]) -> Result<(&[Value], Kwargs), Error> {
    match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => Ok((rest, Kwargs::try_from(last.clone())?)),
        _ => Ok((args, Kwargs::from_iter(std::iter::empty::<(&str, Value)>()))),
    }
}

fn text_at(pair: &Value, index: usize) -> Result<String, Error> {
    let item = pair.get_item_by_index(index)?;
    let text = item.as_str().map(str::to_owned);
    text.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "separators must be a pair of strings"))
}

/// `indent` is a number of spaces or the text itself.
fn indentation(value: &Value) -> Result<String, Error> {
    const WIDEST: i64 = 64;
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let width = if value.kind() == ValueKind::Bool {
        i64::from(value.is_true())
    } else {
        i64::try_from(value.clone())?
    };
    match usize::try_from(width.max(0)) {
        Ok(width) if width as i64 <= WIDEST => Ok(" ".repeat(width)),
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("indent={width} is wider than {WIDEST}"))),
    }
}

/// Python's `json.dumps`.
struct Json {
    out: Bounded,
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
    depth: usize,
}

impl Json {
    fn write(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push("null"),
            ValueKind::Bool => self.out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let number = number_text(value)?;
                self.out.push(&number)
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value),
            ValueKind::Map => self.map(value),
            other => Err(Error::new(
                ErrorKind::BadSerialization,
                format!("a value of type {other} has no JSON form"),
            )),
        }
    }

    fn list(&mut self, value: &Value) -> Result<(), Error> {
        let mut empty = true;
        self.out.push("[")?;
        self.depth += 1;
        for item in value.try_iter()?.checked() {
            self.seam(empty)?;
            empty = false;
            let item = item?;
            self.inner(&item)?;
        }
        self.close(empty, "]")
    }

    fn map(&mut self, value: &Value) -> Result<(), Error> {
        let mut entries: Vec<(String, Value)> =
            pairs(value).map(|(key, item)| Ok((key_text(&key)?, item))).collect::<Result<_, Error>>()?;
        if self.sort {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.out.push("{")?;
        self.depth += 1;
        for (index, (key, item)) in entries.iter().enumerate() {
            self.seam(index == 0)?;
            self.string(key)?;
            let colon = std::mem::take(&mut self.colon);
            let pushed = self.out.push(&colon);
            self.colon = colon;
            pushed?;
            self.inner(item)?;
        }
        self.close(entries.is_empty(), "}")
    }

    fn inner(&mut self, item: &Value) -> Result<(), Error> {
        self.out.enter()?;
        self.write(item)?;
        self.out.leave();
        Ok(())
    }

    /// Between two items, or before the first.
    fn seam(&mut self, first: bool) -> Result<(), Error> {
        if !first {
            self.out.push(&self.comma)?;
        }
        self.new_line()
    }

    fn close(&mut self, empty: bool, bracket: &str) -> Result<(), Error> {
        self.depth -= 1;
        if !empty {
            self.new_line()?;
        }
        self.out.push(bracket)
    }

    fn new_line(&mut self) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        self.out.push("\n")?;
        (0..self.depth).try_for_each(|_| self.out.push(indent))
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.out.push("\"")?;
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            let Some(escape) = self.escape(c) else { continue };
            self.out.push(&text[plain..at])?;
            self.out.push(&escape)?;
            plain = at + c.len_utf8();
        }
        self.out.push(&text[plain..])?;
        self.out.push("\"")
    }

    fn escape(&self, c: char) -> Option<String> {
        Some(match c {
            '"' => "\\\"".into(),
            '\\' => "\\\\".into(),
            '\n' => "\\n".into(),
            '\r' => "\\r".into(),
            '\t' => "\\t".into(),
            '\u{8}' => "\\b".into(),
            '\u{c}' => "\\f".into(),
            c if (c as u32) < 0x20 => format!("\\u{:04x}", c as u32),
            c if self.ascii && !c.is_ascii() => {
                c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
            }
            _ => return None,
        })
    }
}

fn number_text(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    Ok(match as_float(value)? {
        number if number.is_nan() => "NaN".into(),
        number if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        number => float(number),
    })
}

/// A key as `json.dumps` writes it.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => number_text(key),
        other => Err(Error::new(
            ErrorKind::BadSerialization,
            format!("a value of type {other} cannot be a JSON key"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        for (number, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (123456.789, "123456.789"),
        ] {
            assert_eq!(float(number), expected);
        }
    }
}
