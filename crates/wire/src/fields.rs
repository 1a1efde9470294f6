//! Reads a JSON object field by field and says precisely what is wrong with a field.

use std::ops::RangeInclusive;

use serde_json::{Map, Number, Value};

/// Something wrong with one field of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FieldError {
    /// Path of the field, e.g. `messages[0].content`.
    pub param: String,
    pub message: String,
}

impl FieldError {
    pub fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: param.into(), message: message.into() }
    }

    /// `NAME must be WANTED; it is VALUE`.
    pub fn wanted(param: impl Into<String>, wanted: &str, value: &Value) -> Self {
        let param = param.into();
        let message = format!("{param} must be {wanted}; it is {}", shown(value));
        Self { param, message }
    }

    /// `NAME is required`.
    pub fn missing(param: impl Into<String>, wanted: &str) -> Self {
        let param = param.into();
        let message = format!("{param} is required: {wanted}");
        Self { param, message }
    }
}

/// The value as a client will recognise it, at most some 60 characters long.
fn shown(value: &Value) -> String {
    const MOST: usize = 60;
    match value {
        Value::Array(items) => format!("a list of {} items", items.len()),
        Value::Object(members) => format!("an object of {} members", members.len()),
        Value::String(text) if text.chars().count() > MOST => {
            let head: String = text.chars().take(MOST).collect();
            format!("{:?}... ({} bytes)", head, text.len())
        }
        other => other.to_string(),
    }
}

/// An object whose fields are taken one by one; what is left at the end is unknown.
/// A field that is null counts as absent, as in OpenAI's API.
#[derive(Debug)]
pub struct Fields {
    object: Map<String, Value>,
    /// Path of the object, with a dot behind it; empty for the body itself.
    path: String,
}

impl Fields {
    /// The fields of a request body.
    ///
    /// # Errors
    /// If `body` is not an object.
    pub fn of_body(body: Value) -> Result<Self, FieldError> {
        match body {
            Value::Object(object) => Ok(Self { object, path: String::new() }),
            other => {
                Err(FieldError::new("", format!("the body must be a JSON object; it is {}", shown(&other))))
            }
        }
    }

    /// The fields of an object that stands at `path`.
    ///
    /// # Errors
    /// If `value` is not an object.
    pub fn of(value: Value, path: &str) -> Result<Self, FieldError> {
        match value {
            Value::Object(object) => Ok(Self { object, path: format!("{path}.") }),
            other => Err(FieldError::wanted(path, "an object", &other)),
        }
    }

    /// The full name of a field of this object.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Takes a field whatever its type. Null is `None`.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.object.swap_remove(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there, and not null.
    pub fn has(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(|value| !value.is_null())
    }

    /// # Errors
    /// If the field is there and no boolean.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, FieldError> {
        self.take(name)
            .map(|value| {
                value.as_bool().ok_or_else(|| FieldError::wanted(self.path(name), "a boolean", &value))
            })
            .transpose()
    }

    /// # Errors
    /// If the field is there and no string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, FieldError> {
        self.take(name)
            .map(|value| match value {
                Value::String(text) => Ok(text),
                other => Err(FieldError::wanted(self.path(name), "a string", &other)),
            })
            .transpose()
    }

    /// # Errors
    /// If the field is there and no whole number within `range`.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, FieldError> {
        self.take(name).map(|value| integer(&value, &self.path(name), range)).transpose()
    }

    /// An integer that fits `u32` because `range` does.
    ///
    /// # Errors
    /// If the field is there and no whole number within `range`.
    pub fn count(&mut self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, FieldError> {
        let range = i64::from(*range.start())..=i64::from(*range.end());
        Ok(self.integer(name, range)?.and_then(|value| u32::try_from(value).ok()))
    }

    /// # Errors
    /// If the field is there and no number within `range`.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, FieldError> {
        self.take(name).map(|value| number(&value, &self.path(name), range)).transpose()
    }

    /// # Errors
    /// If the field is there and no list.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, FieldError> {
        self.take(name)
            .map(|value| match value {
                Value::Array(items) => Ok(items),
                other => Err(FieldError::wanted(self.path(name), "a list", &other)),
            })
            .transpose()
    }

    /// # Errors
    /// If the field is there and no object.
    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, FieldError> {
        self.take(name)
            .map(|value| match value {
                Value::Object(members) => Ok(members),
                other => Err(FieldError::wanted(self.path(name), "an object", &other)),
            })
            .transpose()
    }

    /// What nobody took, nulls included.
    pub fn rest(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.object.iter()
    }

    /// # Errors
    /// If a field is left that is not null.
    pub fn none_left(&self) -> Result<(), FieldError> {
        match self.rest().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let param = self.path(&shortened(name));
                Err(FieldError::new(
                    param.clone(),
                    format!("{param} is not a field of this request; remove it"),
                ))
            }
        }
    }
}

/// A name that a client made up, cut to a length that a message can carry.
pub(crate) fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// # Errors
/// If `value` is no whole number within `range`.
pub fn integer(value: &Value, path: &str, range: RangeInclusive<i64>) -> Result<i64, FieldError> {
    let wanted = || {
        let (least, most) = (*range.start(), *range.end());
        match (least == i64::MIN, most == i64::MAX) {
            (true, true) => "an integer of 64 bits".to_owned(),
            _ => format!("an integer from {least} to {most}"),
        }
    };
    let whole = match value {
        Value::Number(number) => whole(number),
        _ => None,
    };
    whole.filter(|number| range.contains(number)).ok_or_else(|| FieldError::wanted(path, &wanted(), value))
}

/// JSON knows no integers: `16.0` is 16.
fn whole(number: &Number) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: beyond it a double does not hold every integer
    number
        .as_i64()
        .or_else(|| number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= EXACT).map(|f| f as i64))
}

/// # Errors
/// If `value` is no number within `range`.
pub fn number(value: &Value, path: &str, range: RangeInclusive<f64>) -> Result<f32, FieldError> {
    value.as_f64().filter(|number| range.contains(number)).map(|number| number as f32).ok_or_else(|| {
        let wanted = format!("a number from {} to {}", range.start(), range.end());
        FieldError::wanted(path, &wanted, value)
    })
}

/// # Errors
/// If `value` is no list of at most `most` token ids.
pub fn token_ids(value: Value, path: &str, most: usize) -> Result<Vec<u32>, FieldError> {
    let Value::Array(items) = value else {
        return Err(FieldError::wanted(path, "a list of token ids", &value));
    };
    if items.len() > most {
        return Err(FieldError::new(
            path,
            format!("{path} has {} items; at most {most} are allowed", items.len()),
        ));
    }
    items.iter().enumerate().map(|(at, item)| token_id(item, path, at)).collect()
}

fn token_id(value: &Value, path: &str, at: usize) -> Result<u32, FieldError> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| FieldError::wanted(format!("{path}[{at}]"), "a token id", value))
}
