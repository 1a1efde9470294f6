//! Filters that differ from minijinja's: as Python's, or with a bound.

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::bounds::{Bounded, limit_reached, spend_produced};
use super::guard::{read, read_items};
use super::{methods, python};

/// Widest indentation of the `indent` filter.
const MAX_INDENT: usize = 64;

/// Adds them; takes away what has no use in a chat and no bound.
pub(crate) fn add_to(environment: &mut Environment<'static>) {
    for unbounded in ["batch", "slice", "pprint", "chain", "zip", "lines"] {
        environment.remove_filter(unbounded);
    }
    environment.add_filter("tojson", |state: &mut State, value: &Value, args: Rest<ValueOrKwargs>| {
        read(state, value)?;
        python::tojson(value, &args.into_values())
    });
    environment.add_filter("string", |state: &mut State, value: &Value| {
        read(state, value)?;
        let mut out = Bounded::value();
        python::write_str(&mut out, value)?;
        Ok::<Value, Error>(Value::from(out.text))
    });
    environment.add_filter("join", join);
    environment.add_filter(
        "replace",
        |state: &mut State, text: &Value, old: &str, new: &str, count: Option<i64>| {
            let text = text_of(state, text)?;
            methods::replace(&text, old, new, count.unwrap_or(-1))
        },
    );
    environment.add_filter("indent", indent);
    environment.add_filter("format", |state: &mut State, format: &str, args: Rest<Value>| {
        methods::bounded_format(format)?;
        args.iter().try_for_each(|value| read(state, value))?;
        minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, format, &args)
    });
    environment.add_filter("list", |state: &mut State, value: &Value| {
        // A text becomes one value per character.
        spend_produced(state, value.as_str().map_or(0, |text| text.len() * size_of::<Value>() * 2))?;
        filters::list(state, value.clone())
    });
    metered(environment);
}

/// minijinja's own filters whose time grows with what the values contain.
fn metered(environment: &mut Environment<'static>) {
    let deep: [(&'static str, Value); 5] = [
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
        ("groupby", Value::from_function(filters::groupby)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("sum", Value::from_function(filters::sum)),
    ];
    for (name, filter) in deep {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|value| read(state, value))?;
            filter.call(state, &args)
        });
    }
    let shallow: [(&'static str, Value); 18] = [
        ("lower", Value::from_function(filters::lower)),
        ("upper", Value::from_function(filters::upper)),
        ("title", Value::from_function(filters::title)),
        ("capitalize", Value::from_function(filters::capitalize)),
        ("trim", Value::from_function(filters::trim)),
        ("split", Value::from_function(filters::split)),
        ("reverse", Value::from_function(filters::reverse)),
        ("escape", Value::from_function(filters::escape)),
        ("e", Value::from_function(filters::escape)),
        ("length", Value::from_function(filters::length)),
        ("count", Value::from_function(filters::length)),
        ("last", Value::from_function(filters::last)),
        ("min", Value::from_function(filters::min)),
        ("max", Value::from_function(filters::max)),
        ("select", Value::from_function(filters::select)),
        ("reject", Value::from_function(filters::reject)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
    ];
    for (name, filter) in shallow {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|value| read_items(state, value))?;
            filter.call(state, &args)
        });
    }
}

fn text_of(state: &mut State, value: &Value) -> Result<String, Error> {
    read(state, value)?;
    let mut out = Bounded::value();
    python::write_str(&mut out, value)?;
    Ok(out.text)
}

/// `join(separator="", attribute=None)`.
fn join(
    state: &mut State,
    items: &Value,
    separator: Option<&str>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    read(state, items)?;
    let separator =
        separator.map_or_else(|| kwargs.get::<Option<String>>("d"), |s| Ok(Some(s.to_owned())))?;
    let attribute =
        attribute.map_or_else(|| kwargs.get::<Option<String>>("attribute"), |a| Ok(Some(a.to_owned())))?;
    kwargs.assert_all_used()?;
    let separator = separator.unwrap_or_default();
    match attribute {
        None => methods::join(items, &separator),
        Some(name) => {
            let picked: Result<Vec<Value>, Error> =
                items.try_iter()?.checked().map(|item| item?.get_attr(&name)).collect();
            methods::join(&Value::from(picked?), &separator)
        }
    }
}

/// `indent(width=4, first=False, blank=False)`.
fn indent(state: &mut State, text: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let text = text_of(state, text)?;
    let args = args.into_values();
    let (positional, kwargs) = python::split_kwargs(&args)?;
    let argument = |index: usize, name: &str| match positional.get(index) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let width = argument(0, "width")?.unwrap_or(Value::from(4));
    let first = argument(1, "first")?.is_some_and(|value| value.is_true());
    let blank = argument(2, "blank")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let prefix = match (width.as_str(), width.as_usize()) {
        (Some(prefix), _) => prefix.to_owned(),
        (None, Some(width)) if width <= MAX_INDENT => " ".repeat(width),
        (None, Some(_)) => return Err(limit_reached(format!("{MAX_INDENT} spaces of indentation"))),
        (None, None) if width.kind() == ValueKind::Number => String::new(),
        (None, None) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "width must be a number or a string"));
        }
    };
    indent_lines(&text, &prefix, first, blank)
}

fn indent_lines(text: &str, prefix: &str, first: bool, blank: bool) -> Result<String, Error> {
    let mut out = Bounded::value();
    for (index, line) in text.split('\n').enumerate() {
        out.push(if index > 0 { "\n" } else { "" })?;
        let wanted = if index == 0 { first } else { blank || !line.is_empty() };
        out.push(if wanted { prefix } else { "" })?;
        out.push(line)?;
    }
    Ok(out.text)
}
