//! A page of results as a file.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot make the page: {0}")]
    Make(String),
}

/// Writes a page, if it could be made.
///
/// # Errors
/// If it could not, or the file cannot be written.
pub fn write(path: &Path, html: Result<String, impl Display>) -> Result<(), PageError> {
    let html = html.map_err(|error| PageError::Make(error.to_string()))?;
    std::fs::write(path, html).map_err(|source| PageError::Write { path: path.to_owned(), source })
}
