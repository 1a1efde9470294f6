//! Bounds on what a template computes.
//!
//! Fuel counts instructions, but one instruction may double a text (`x ~ x`), compare two trees or repeat a list
//! a hundred million times. So the compiled instructions are rewritten before they run: around each one that
//! makes or reads values of any size stands a filter call that measures them.
//!
//! What holds then, whatever the template says:
//! - Every value has at most [`MAX_VALUE_BYTES`] of text and [`MAX_NODES`] parts (a part that occurs twice
//!   counts twice) in at most [`MAX_DEPTH`] levels, and does not change after it was made. Only a namespace
//!   changes, and a namespace may not stand within another value.
//! - No value is lazy: slices, sums and `items()` are lists as soon as they are made.
//! - The sum of all that was made and read is bounded ([`super::bounds`]).

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::bounds::{
    Bounded, CHAR_WORK, MAX_DEPTH, MAX_VALUE_BYTES, limit_reached, spend_produced, spend_work,
};
use super::python;

/// Parts of one value: items, keys and what they contain.
const MAX_NODES: usize = 1 << 20;
/// What a part counts in bytes.
const NODE_BYTES: usize = 32;

// The names cannot be written in a template: an identifier does not start with a digit.
const MADE: &str = "0made";
const READ: &str = "0read";
const READ_ITEMS: &str = "0read_items";
const ATTRIBUTE: &str = "0attribute";
const CONCAT: &str = "0concat";
const MULTIPLY: &str = "0multiply";
const SLICE: &str = "0slice";

/// Adds the filters that the guarded instructions call.
pub(crate) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter(MADE, made);
    environment.add_filter(READ, |state: &mut State, value: Value| read(state, &value).map(|()| value));
    environment
        .add_filter(READ_ITEMS, |state: &mut State, value: Value| read_items(state, &value).map(|()| value));
    environment.add_filter(ATTRIBUTE, attribute);
    environment.add_filter(CONCAT, concat);
    environment.add_filter(MULTIPLY, multiply);
    environment.add_filter(SLICE, slice);
}

/// The same program with the measurements around its instructions.
pub(crate) fn guarded<'source>(original: &Instructions<'source>) -> Instructions<'source> {
    let count = (0..).take_while(|&index| original.get(index).is_some()).count() as u32;
    let groups: Vec<Group> = (0..count).filter_map(|index| guard_one(original, index)).collect();
    let mut starts = Vec::with_capacity(groups.len() + 1);
    let mut next = 0;
    for group in &groups {
        starts.push(next);
        next += (group.before.len() + 1 + group.after.len()) as u32;
    }
    starts.push(next);
    let mut program = Instructions::new(original.name(), original.source());
    for (index, group) in groups.into_iter().enumerate() {
        let line = original.get_line(index as u32).map_or(0, |line| u16::try_from(line).unwrap_or(u16::MAX));
        let moved = retarget(group.instruction, &starts);
        for instruction in group.before.into_iter().chain([moved]).chain(group.after) {
            program.add_with_line(instruction, line);
        }
    }
    program
}

/// One instruction and what is put around it.
struct Group<'source> {
    before: Vec<Instruction<'source>>,
    instruction: Instruction<'source>,
    after: Vec<Instruction<'source>>,
}

fn guard_one<'source>(program: &Instructions<'source>, index: u32) -> Option<Group<'source>> {
    use Instruction as I;
    let instruction = program.get(index)?.clone();
    let filter = |name| I::ApplyFilter(name, Some(1), !0);
    let below = |name| vec![I::Swap, I::ApplyFilter(name, Some(1), !0), I::Swap];
    let (before, instruction, after) = match instruction {
        I::EmitRaw(raw) => {
            // Counted like any value that is made; constants are not measured when they are loaded.
            (vec![I::LoadConst(Value::from(raw)), filter(MADE), I::DiscardTop], I::EmitRaw(raw), vec![])
        }
        I::StringConcat => (vec![], I::ApplyFilter(CONCAT, Some(2), !0), vec![]),
        I::Mul => (vec![], I::ApplyFilter(MULTIPLY, Some(2), !0), vec![]),
        I::Slice => (vec![], I::ApplyFilter(SLICE, Some(4), !0), vec![filter(MADE)]),
        I::SetAttr(name) => (below(ATTRIBUTE), I::SetAttr(name), vec![]),
        I::PushLoop(flags) => (vec![filter(READ_ITEMS)], I::PushLoop(flags), vec![]),
        I::GetItem if !has_text_key(program, index) => (below(READ_ITEMS), I::GetItem, vec![]),
        // The right operand suffices: a comparison ends with the shorter one, and `in` searches the right one.
        compare @ (I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::CompareAndPreserve(_)) => {
            (vec![filter(READ)], compare, vec![])
        }
        I::In => (vec![filter(READ)], I::In, vec![]),
        test @ I::PerformTest(_, Some(2..), _) => (vec![filter(READ)], test, vec![]),
        making @ (I::Add
        | I::BuildList(_)
        | I::BuildTuple(_)
        | I::BuildMap(_)
        | I::ApplyFilter(..)
        | I::CallFunction(..)
        | I::CallMethod(..)
        | I::CallObject(_)
        | I::EndCapture) => (vec![], making, vec![filter(MADE)]),
        other => (vec![], other, vec![]),
    };
    Some(Group { before, instruction, after })
}

/// Whether the key of this `GetItem` is a text that stands in the template: the commonest case, and cheap.
fn has_text_key(program: &Instructions, index: u32) -> bool {
    let previous = index.checked_sub(1).and_then(|index| program.get(index));
    matches!(previous, Some(Instruction::LoadConst(key)) if key.as_str().is_some())
}

/// Moves jump targets to where their instructions are now.
fn retarget<'source>(instruction: Instruction<'source>, starts: &[u32]) -> Instruction<'source> {
    use Instruction as I;
    let to = |target: u32| starts.get(target as usize).copied().unwrap_or(u32::MAX);
    match instruction {
        I::Jump(target) => I::Jump(to(target)),
        I::JumpIfFalse(target) => I::JumpIfFalse(to(target)),
        I::JumpIfFalseOrPop(target) => I::JumpIfFalseOrPop(to(target)),
        I::JumpIfTrueOrPop(target) => I::JumpIfTrueOrPop(to(target)),
        I::Iterate(target) => I::Iterate(to(target)),
        I::BuildMacro(name, target, flags) => I::BuildMacro(name, to(target), flags),
        other => other,
    }
}

/// The engine's formatter: prints as Python does.
pub(crate) fn emit(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let mut text = Bounded::value();
    match value.as_str() {
        Some(plain) => {
            spend_produced(state, plain.len())?;
            return out.write_str(plain).map_err(Error::from);
        }
        None => python::write_str(&mut text, value)?,
    }
    spend_produced(state, text.text.len())?;
    out.write_str(&text.text).map_err(Error::from)
}

/// Counts a value that is about to be read through and through.
pub(crate) fn read(state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => spend_work(state, text.len()),
        None => {
            let size = measure(value)?;
            spend_work(state, size.bytes + size.nodes * NODE_BYTES)
        }
    }
}

/// Counts a value whose text or items, but not what is in them, are about to be read.
pub(crate) fn read_items(state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => spend_work(state, text.len() * CHAR_WORK),
        None => spend_work(state, value.len().unwrap_or(0) * NODE_BYTES),
    }
}

/// Takes a value that was just made: makes it a list if it is lazy, measures and counts it.
fn made(state: &mut State, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        if text.len() > MAX_VALUE_BYTES {
            return Err(limit_reached(format!("{MAX_VALUE_BYTES} bytes of one value")));
        }
        spend_produced(state, text.len())?;
        return Ok(value);
    }
    let value = match value.kind() {
        ValueKind::Iterable if !value.is_tuple() => Value::from(collect(value.try_iter()?.checked())?),
        ValueKind::Seq | ValueKind::Map => value,
        _ => return Ok(value),
    };
    let size = measure(&value)?;
    spend_work(state, size.nodes * NODE_BYTES)?;
    spend_produced(state, value.len().unwrap_or(0) * NODE_BYTES)?;
    Ok(value)
}

fn collect(items: impl Iterator<Item = Result<Value, Error>>) -> Result<Vec<Value>, Error> {
    let mut list = Vec::new();
    for item in items {
        if list.len() == MAX_NODES {
            return Err(limit_reached(format!("{MAX_NODES} parts of one value")));
        }
        list.push(item?);
    }
    Ok(list)
}

/// The size of a value with everything in it.
#[derive(Default)]
struct Size {
    bytes: usize,
    nodes: usize,
}

fn measure(value: &Value) -> Result<Size, Error> {
    let mut size = Size::default();
    add_size(&mut size, value, 0)?;
    Ok(size)
}

fn add_size(size: &mut Size, value: &Value, depth: usize) -> Result<(), Error> {
    size.nodes += 1;
    size.bytes += value.as_str().map_or(0, str::len);
    if size.nodes > MAX_NODES {
        return Err(limit_reached(format!("{MAX_NODES} parts of one value")));
    }
    if size.bytes > MAX_VALUE_BYTES {
        return Err(limit_reached(format!("{MAX_VALUE_BYTES} bytes of one value")));
    }
    if depth > MAX_DEPTH {
        return Err(limit_reached(format!("{MAX_DEPTH} levels of nesting")));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()?.checked() {
                add_size(size, &item?, depth + 1)?;
            }
        }
        ValueKind::Map if depth > 0 && is_namespace(value) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "a namespace cannot be part of another value; keep it in a variable of its own",
            ));
        }
        ValueKind::Map if is_plain(value) => {
            for (key, item) in python::pairs(value) {
                add_size(size, &key, depth + 1)?;
                add_size(size, &item, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Macros and the loop variable are maps to minijinja; they are not walked through.
fn is_plain(value: &Value) -> bool {
    let name = value.as_object().map(|object| object.type_name()).unwrap_or_default();
    !name.ends_with("::Macro") && !name.ends_with("::Loop")
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// A value on its way into a namespace.
fn attribute(value: Value) -> Result<Value, Error> {
    match is_namespace(&value) {
        true => Err(Error::new(
            ErrorKind::InvalidOperation,
            "a namespace cannot be kept in a namespace; keep it in a variable of its own",
        )),
        false => Ok(value),
    }
}

/// `a ~ b`.
fn concat(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    let mut out = Bounded::value();
    python::write_str(&mut out, a)?;
    python::write_str(&mut out, b)?;
    spend_produced(state, out.text.len())?;
    Ok(Value::from(out.text))
}

/// `a * b`: numbers, or a text or list some times.
fn multiply(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    let is_many = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq);
    if is_many(a) || is_many(b) {
        let (many, times) = if is_many(a) { (a, b) } else { (b, a) };
        return repeat(state, many, times);
    }
    let fault =
        || Error::new(ErrorKind::InvalidOperation, format!("cannot multiply {} by {}", a.kind(), b.kind()));
    let integer = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    if let (Some(a), Some(b)) = (integer(a), integer(b)) {
        let product = a.checked_mul(b).ok_or_else(|| limit_reached("128 bits of an integer".into()))?;
        return Ok(i64::try_from(product).map_or_else(|_| Value::from(product), Value::from));
    }
    let float = |value: &Value| match value.kind() {
        ValueKind::Number | ValueKind::Bool => f64::try_from(value.clone()).map_err(|_| fault()),
        _ => Err(fault()),
    };
    Ok(Value::from(float(a)? * float(b)?))
}

fn repeat(state: &mut State, many: &Value, times: &Value) -> Result<Value, Error> {
    let times = i64::try_from(times.clone())?;
    let times = usize::try_from(times).unwrap_or(0);
    let too_many = || limit_reached(format!("{MAX_VALUE_BYTES} bytes of one value"));
    if let Some(text) = many.as_str() {
        let size =
            text.len().checked_mul(times).filter(|&size| size <= MAX_VALUE_BYTES).ok_or_else(too_many)?;
        spend_produced(state, size)?;
        return Ok(Value::from(text.repeat(times)));
    }
    let items = collect(many.try_iter()?.checked())?;
    items.len().checked_mul(times).filter(|&count| count <= MAX_NODES).ok_or_else(too_many)?;
    let repeated: Vec<Value> = std::iter::repeat_n(items, times).flatten().collect();
    made(state, if many.is_tuple() { Value::from(Tuple::from(repeated)) } else { Value::from(repeated) })
}

/// `value[start:stop:step]` by Python's rules.
fn slice(
    state: &mut State,
    value: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Result<Value, Error> {
    let bound = |value: &Value| match value.is_none() || value.is_undefined() {
        true => Ok(None),
        false => i64::try_from(value.clone()).map(Some),
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "slice step cannot be zero"));
    }
    read_items(state, value)?;
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        let picked = indices(chars.len(), start, stop, step).map(|index| chars[index]);
        return Ok(Value::from(picked.collect::<String>()));
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("a value of type {} cannot be sliced", value.kind()),
        ));
    }
    let items = collect(value.try_iter()?.checked())?;
    let picked: Vec<Value> =
        indices(items.len(), start, stop, step).map(|index| items[index].clone()).collect();
    Ok(if value.is_tuple() { Value::from(Tuple::from(picked)) } else { Value::from(picked) })
}

/// The indices of a slice (CPython's `PySlice_AdjustIndices`).
fn indices(len: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |index: i64| {
        let index = if index < 0 { index.saturating_add(len) } else { index };
        index.clamp(lowest, highest)
    };
    let start = start.map_or(if step > 0 { lowest } else { highest }, clamp);
    let stop = stop.map_or(if step > 0 { highest } else { lowest }, clamp);
    let within = move |index: &i64| if step > 0 { *index < stop } else { *index > stop };
    std::iter::successors(Some(start), move |index| index.checked_add(step))
        .take_while(within)
        .filter_map(|index| usize::try_from(index).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_pick_what_python_picks() {
        let pick = |start, stop, step| indices(5, start, stop, step).collect::<Vec<_>>();
        assert_eq!(pick(None, None, 1), [0, 1, 2, 3, 4]);
        assert_eq!(pick(Some(1), None, 1), [1, 2, 3, 4]);
        assert_eq!(pick(None, None, -1), [4, 3, 2, 1, 0]);
        assert_eq!(pick(Some(-2), None, 1), [3, 4]);
        assert_eq!(pick(None, Some(-1), 2), [0, 2]);
        assert_eq!(pick(Some(3), Some(0), -1), [3, 2, 1]);
        assert_eq!(pick(Some(0), Some(5), -1), [0usize; 0]);
        assert_eq!(pick(Some(i64::MIN), Some(i64::MAX), i64::MAX), [0]);
        assert_eq!(pick(Some(-9), Some(-7), 1), [0usize; 0]);
    }
}
