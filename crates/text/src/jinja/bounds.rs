//! How much a template may use: every bound with its value.

use std::fmt;

use minijinja::{Error, ErrorKind, State};

/// Instructions of one rendering. A message of the busiest templates takes a few hundred.
pub(crate) const FUEL: u64 = 5_000_000;
/// Size of a template's source; the longest of known models have about 20 KiB.
pub(crate) const MAX_SOURCE_BYTES: usize = 128 << 10;
/// Size of what stands between one pair of braces, without the texts in it. The code generator takes time with
/// the square of the operators in an expression: as many as fit here take some hundredths of a second.
pub(crate) const MAX_TAG_BYTES: usize = 4 << 10;
/// Bytes of one value while it is worked on, and of the prompt.
pub(crate) const MAX_VALUE_BYTES: usize = 16 << 20;
/// Bytes that one rendering may produce, prompt and intermediate values together.
pub(crate) const MAX_PRODUCED_BYTES: usize = 256 << 20;
/// Bytes that the operations of one rendering may read.
pub(crate) const MAX_WORK_BYTES: usize = 1 << 30;
/// What a byte of text counts that is read as a character and not as a block of memory.
pub(crate) const CHAR_WORK: usize = 4;
/// Nesting of values. JSON from a request has at most 128 levels.
pub(crate) const MAX_DEPTH: usize = 160;

/// What one rendering has used so far; lives in the engine's state.
#[derive(Debug, Default)]
struct Used {
    produced: usize,
    work: usize,
}

/// Marks an error as a bound that was reached.
#[derive(Debug, Clone)]
pub(crate) struct LimitReached(pub(crate) String);

impl fmt::Display for LimitReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "limit of {} reached", self.0)
    }
}

impl std::error::Error for LimitReached {}

/// The error for a bound that was reached.
pub(crate) fn limit_reached(limit: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, "limit reached").with_source(LimitReached(limit))
}

/// Counts bytes that an operation made.
pub(crate) fn spend_produced(state: &mut State, bytes: usize) -> Result<(), Error> {
    let used = state.get_or_insert_extension(Used::default());
    used.produced = used.produced.saturating_add(bytes);
    match used.produced <= MAX_PRODUCED_BYTES {
        true => spend_work(state, bytes),
        false => Err(limit_reached(format!("{MAX_PRODUCED_BYTES} bytes produced by one rendering"))),
    }
}

/// Counts bytes that an operation read.
pub(crate) fn spend_work(state: &mut State, bytes: usize) -> Result<(), Error> {
    let used = state.get_or_insert_extension(Used::default());
    used.work = used.work.saturating_add(bytes);
    match used.work <= MAX_WORK_BYTES {
        true => Ok(()),
        false => Err(limit_reached(format!("{MAX_WORK_BYTES} bytes of work in one rendering"))),
    }
}

/// Text that is being written, of bounded length and nesting.
#[derive(Debug)]
pub(crate) struct Bounded {
    pub(crate) text: String,
    limit: usize,
    depth: usize,
}

impl Bounded {
    /// For one value.
    pub(crate) fn value() -> Bounded {
        Bounded { text: String::new(), limit: MAX_VALUE_BYTES, depth: 0 }
    }

    pub(crate) fn push(&mut self, text: &str) -> Result<(), Error> {
        if text.len() > self.limit - self.text.len() {
            return Err(self.error());
        }
        self.text.push_str(text);
        Ok(())
    }

    /// Writes something one level deeper.
    pub(crate) fn nested(
        &mut self,
        write: impl FnOnce(&mut Bounded) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.enter()?;
        write(self)?;
        self.leave();
        Ok(())
    }

    pub(crate) fn enter(&mut self) -> Result<(), Error> {
        self.depth += 1;
        match self.depth <= MAX_DEPTH {
            true => Ok(()),
            false => Err(limit_reached(format!("{MAX_DEPTH} levels of nesting"))),
        }
    }

    pub(crate) fn leave(&mut self) {
        self.depth -= 1;
    }

    pub(crate) fn error(&self) -> Error {
        limit_reached(format!("{} bytes of one value", self.limit))
    }
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text).map_err(|_| fmt::Error)
    }
}
