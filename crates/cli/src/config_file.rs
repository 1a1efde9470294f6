//! The file that `--config` names.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {message}", path.display())]
    Parse { path: PathBuf, line: usize, message: String },
}

/// Reads the settings of a TOML file.
///
/// # Errors
/// If it cannot be read, is no TOML, or has a key or a value that no setting has; the message names the
/// line and, for an unknown key, all keys there are.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigFileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigFileError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigFileError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
        let message = error.message().replace('\n', " ");
        ConfigFileError::Parse { path: path.to_owned(), line, message }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Typed;

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_what_is_allowed() {
        let error =
            parse::<Typed>(Path::new("lab.toml"), "port = 80\nmax-runing = 4\n").unwrap_err().to_string();
        assert!(error.starts_with("lab.toml, line 2: unknown field `max-runing`"), "{error}");
        assert!(error.contains("`max-running`"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn wrong_values_are_named_with_their_line() {
        for (text, part) in [
            ("port = 99999", "line 1"),
            ("seed = 1\nkv-memory = \"5 bananas\"", "5 bananas"),
            ("device = \"tpu\"", "tpu"),
            ("port = ", "line 1"),
        ] {
            let error = parse::<Typed>(Path::new("lab.toml"), text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read::<Typed>(Path::new("no/such/lab.toml")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read no/such/lab.toml: "), "{error}");
    }
}
