//! Methods of Python's strings, dictionaries and lists. What minijinja-contrib has is taken from there; where it
//! differs from Python, or has no bound, it is here.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::bounds::{Bounded, CHAR_WORK, MAX_VALUE_BYTES, limit_reached, spend_produced, spend_work};
use super::python::{split_kwargs, write_str};

/// Items that one value may have: a split of a long text by one character.
const MAX_SPLIT_ITEMS: usize = 1 << 20;

/// Calls a method of a Python object.
pub(crate) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let texts = std::iter::once(value).chain(args).filter_map(Value::as_str);
    let work: usize = texts.map(str::len).sum();
    // These two look at one end only, at whatever length.
    let short = matches!(method, "startswith" | "endswith");
    spend_work(state, if short { 0 } else { work * CHAR_WORK })?;
    let result = match value.as_str() {
        Some(text) => match string_method(text, method, args)? {
            Some(result) => result,
            None => unknown_method_callback(state, value, method, args)?,
        },
        None if value.kind() == ValueKind::Seq && method == "index" => list_index(value, args)?,
        None => unknown_method_callback(state, value, method, args)?,
    };
    spend_produced(state, result.as_str().map_or(0, str::len))?;
    Ok(result)
}

/// The methods that are done here; `None` for the rest.
fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "split" | "rsplit" => split(text, method == "rsplit", args)?,
        "splitlines" => split_lines(text, args)?,
        "partition" | "rpartition" => partition(text, method == "rpartition", args)?,
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            Value::from(replace(text, old, new, count.unwrap_or(-1))?)
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            Value::from(join(items, text)?)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "title" => Value::from(title(text)),
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => Value::from(text.chars().flat_map(swap_case).collect::<String>()),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            Value::from(zfill(text, bounded_width(width)?))
        }
        "ljust" | "rjust" | "center" => Value::from(justify(text, method, args)?),
        "index" => {
            let (what,): (&str,) = from_args(args)?;
            let at = text.find(what).ok_or_else(|| invalid("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "format" => {
            bounded_format(text)?;
            return Ok(None);
        }
        _ => return Ok(None),
    }))
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

fn list_index(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (what,): (&Value,) = from_args(args)?;
    for (index, item) in list.try_iter()?.checked().enumerate() {
        if item? == *what {
            return Ok(Value::from(index));
        }
    }
    Err(invalid("value is not in the list"))
}

/// `str.split` and `str.rsplit`, with `sep` and `maxsplit` by place or name.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (positional, kwargs) = split_kwargs(args)?;
    let argument = |index: usize, name: &str| match positional.get(index) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let separator = argument(0, "sep")?.filter(|value| !value.is_none());
    let limit = argument(1, "maxsplit")?.map(i64::try_from).transpose()?.unwrap_or(-1);
    kwargs.assert_all_used()?;
    let splits = usize::try_from(limit).unwrap_or(usize::MAX - 1).min(MAX_SPLIT_ITEMS);
    let parts: Vec<&str> = match separator.as_ref().map(|value| value.as_str()) {
        Some(Some("")) => return Err(invalid("empty separator")),
        Some(Some(separator)) if from_right => {
            let mut parts: Vec<&str> = text.rsplitn(splits + 1, separator).collect();
            parts.reverse();
            parts
        }
        Some(Some(separator)) => text.splitn(splits + 1, separator).collect(),
        Some(None) => return Err(invalid("the separator must be a string or none")),
        None => split_whitespace(text, splits, from_right),
    };
    match parts.len() > MAX_SPLIT_ITEMS {
        true => Err(limit_reached(format!("{MAX_SPLIT_ITEMS} parts of one split"))),
        false => Ok(parts.into_iter().map(Value::from).collect()),
    }
}

/// Splits at runs of white space at most `splits` times; what is left then keeps the white space at its far end.
fn split_whitespace(text: &str, splits: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_right { rest.trim_end() } else { rest.trim_start() };
        if rest.is_empty() {
            break;
        }
        let cut = match from_right {
            true => rest.rfind(char::is_whitespace).map(|at| {
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                (&rest[at + width..], &rest[..at])
            }),
            false => rest.find(char::is_whitespace).map(|at| rest.split_at(at)),
        };
        let (part, remaining) = cut.filter(|_| parts.len() < splits).unwrap_or((rest, ""));
        parts.push(part);
        rest = remaining;
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`: Python ends a line at more characters than `\n`.
fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (positional, kwargs) = split_kwargs(args)?;
    let keep = match positional.first() {
        Some(value) => value.is_true(),
        None => kwargs.get::<Option<bool>>("keepends")?.unwrap_or(false),
    };
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let width = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(Value::from(&rest[..if keep { at + width } else { at }]));
        rest = &rest[at + width..];
        if lines.len() > MAX_SPLIT_ITEMS {
            return Err(limit_reached(format!("{MAX_SPLIT_ITEMS} lines of one text")));
        }
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    Ok(Value::from(lines))
}

fn partition(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let found = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// `str.replace`, refused before it would produce more than a value may hold.
pub(crate) fn replace(text: &str, old: &str, new: &str, count: i64) -> Result<String, Error> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let matches = text.matches(old).take(count).count();
    let size = matches.saturating_mul(new.len()).saturating_add(text.len());
    if size > MAX_VALUE_BYTES {
        return Err(limit_reached(format!("{MAX_VALUE_BYTES} bytes of one value")));
    }
    Ok(text.replacen(old, new, count))
}

/// `separator.join(items)`; items that are no strings are printed, as Jinja's `join` does.
pub(crate) fn join(items: &Value, separator: &str) -> Result<String, Error> {
    let mut out = Bounded::value();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        if index > 0 {
            out.push(separator)?;
        }
        write_str(&mut out, &item?)?;
    }
    Ok(out.text)
}

/// `str.title`: a letter after anything that is no letter is upper case.
fn title(text: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match after_letter {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        after_letter = c.is_alphabetic();
    }
    out
}

fn swap_case(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

fn zfill(text: &str, width: usize) -> String {
    let (sign, digits) = match text.chars().next() {
        Some('+' | '-') => text.split_at(1),
        _ => ("", text),
    };
    format!("{sign}{}{digits}", "0".repeat(width.saturating_sub(text.chars().count())))
}

fn justify(text: &str, method: &str, args: &[Value]) -> Result<String, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    let fill = fill.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(invalid("the fill character must be exactly one character long"));
    }
    let width = bounded_width(width)?;
    let missing = width.saturating_sub(text.chars().count());
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // CPython's rule for odd amounts.
        _ => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn bounded_width(width: usize) -> Result<usize, Error> {
    match width <= MAX_SPLIT_ITEMS {
        true => Ok(width),
        false => Err(limit_reached(format!("{MAX_SPLIT_ITEMS} characters of padding"))),
    }
}

/// Refuses format strings with a width or precision of five digits: they would be padding without bound.
pub(crate) fn bounded_format(format: &str) -> Result<(), Error> {
    let mut digits = 0;
    for c in format.chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        if digits >= 5 {
            return Err(limit_reached("9999 characters of one format field".into()));
        }
    }
    match format.contains('*') {
        true => Err(invalid("`*` in a format string is not supported; write the width as a number")),
        false => Ok(()),
    }
}
