//! The ledger of quoted numbers: each claim about LLM serving that people repeat, its arithmetic, the limit of a
//! given model and hardware, what others measured, what was measured here, and a verdict.
//!
//! - [`row`]: a row as the data file has it; [`calculation`] and [`evaluate`]: its formulas
//! - [`view`]: the ledger for one model and hardware, with measurements beside it
//! - [`terminal`], [`markdown`], [`html`]: the view as text

pub mod calculation;
pub mod evaluate;
pub mod html;
pub mod lines;
pub mod markdown;
mod plot;
pub mod row;
pub mod terminal;
pub mod unit;
pub mod view;

use std::collections::BTreeMap;

use serde::Deserialize;
use servelab_sim::{ModelShape, ShapeError};

pub use self::evaluate::{Chosen, Computed, EvaluationError};
pub use self::row::{Needs, Row, Standing};
pub use self::unit::Unit;
pub use self::view::LedgerView;

use self::evaluate::Inputs;

const DATA: &str = include_str!("../../data/ledger.toml");

/// All rows, and the models that they name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    #[serde(rename = "model")]
    pub models: BTreeMap<String, ModelShape>,
    #[serde(rename = "row")]
    pub rows: Vec<Row>,
}

/// Data that is no ledger, or a row that is not in it.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("the ledger's data, line {line}: {message}")]
    Toml { line: usize, message: String },
    #[error("the ledger's data: {0}")]
    Shape(#[from] ShapeError),
    #[error("the ledger's data: two rows are called {0:?}")]
    Twice(String),
    #[error("the ledger has no row {id:?}; there are {known}")]
    NoRow { id: String, known: String },
}

impl Ledger {
    /// The ledger that this program carries.
    ///
    /// # Errors
    /// None with the data that this crate is built with, which a test reads.
    pub fn load() -> Result<Self, LedgerError> {
        Self::parse(DATA)
    }

    fn parse(text: &str) -> Result<Self, LedgerError> {
        let ledger: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
            LedgerError::Toml { line, message: error.message().replace('\n', " ") }
        })?;
        for model in ledger.models.values() {
            model.validate()?;
        }
        for (at, row) in ledger.rows.iter().enumerate() {
            if ledger.rows[..at].iter().any(|other| other.id == row.id) {
                return Err(LedgerError::Twice(row.id.clone()));
            }
        }
        Ok(ledger)
    }

    /// # Errors
    /// If there is no such row; the known ones are listed.
    pub fn row(&self, id: &str) -> Result<&Row, LedgerError> {
        self.rows.iter().find(|row| row.id == id).ok_or_else(|| {
            let known: Vec<&str> = self.rows.iter().map(|row| row.id.as_str()).collect();
            LedgerError::NoRow { id: id.to_owned(), known: known.join(", ") }
        })
    }

    /// What calculations need, for a model and hardware that a reader chose.
    pub fn inputs<'a>(&'a self, chosen: &'a Chosen) -> Inputs<'a> {
        Inputs { models: &self.models, chosen }
    }
}

#[cfg(test)]
mod tests;
