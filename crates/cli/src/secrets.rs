//! Keys and tokens, from files or the environment. Their text goes nowhere but into [`Secret`].

use std::path::{Path, PathBuf};

use servelab_telemetry::Secret;

/// Where API keys come from if no file is named.
pub const API_KEYS_VARIABLE: &str = "SERVELAB_API_KEYS";

/// Longest key in bytes; the server compares all keys at this length.
pub const MAX_KEY_BYTES: usize = 256;

/// Why keys could not be read. Never holds any of their text.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{origin} holds no key; give at least one, or leave it out to let everybody in")]
    NoKey { origin: String },
    #[error("key number {number} in {origin} is longer than {MAX_KEY_BYTES} bytes; shorten it")]
    TooLong { origin: String, number: usize },
    #[error("{} holds no token; put the hub's access token into its first line", .0.display())]
    NoToken(PathBuf),
    #[error("{} is empty; put the URL of Redis into its first line", .0.display())]
    NoUrl(PathBuf),
}

/// The API keys of the file, else those of the environment, else none.
///
/// # Errors
/// If the file cannot be read, or if one of the two is given and holds no usable key: that must not
/// silently open the server to everybody.
pub fn api_keys(file: Option<&Path>, variable: Option<&str>) -> Result<Vec<Secret>, SecretError> {
    match (file, variable) {
        (Some(path), _) => keys_of(&path.display().to_string(), read(path)?.lines().map(without_comment)),
        (None, Some(list)) => keys_of(API_KEYS_VARIABLE, list.split(',')),
        (None, None) => Ok(Vec::new()),
    }
}

/// The first line of the file that holds the hub's token.
///
/// # Errors
/// If the file cannot be read or is empty.
pub fn hub_token(path: &Path) -> Result<Secret, SecretError> {
    first_line(path)?.ok_or_else(|| SecretError::NoToken(path.to_owned()))
}

/// The first line of the file that holds the URL of Redis, which may have a password in it.
///
/// # Errors
/// If the file cannot be read or is empty.
pub fn redis_url(path: &Path) -> Result<Secret, SecretError> {
    first_line(path)?.ok_or_else(|| SecretError::NoUrl(path.to_owned()))
}

fn first_line(path: &Path) -> Result<Option<Secret>, SecretError> {
    let text = read(path)?;
    Ok(text.lines().map(str::trim).find(|line| !line.is_empty()).map(Secret::new))
}

/// Whether others than its owner may read the file.
#[cfg(unix)]
pub fn is_readable_by_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
pub fn is_readable_by_others(_path: &Path) -> bool {
    false
}

fn read(path: &Path) -> Result<String, SecretError> {
    std::fs::read_to_string(path).map_err(|source| SecretError::Read { path: path.to_owned(), source })
}

/// A key may contain `#`; a comment begins a line or follows a space.
fn without_comment(line: &str) -> &str {
    match line.trim_start().strip_prefix('#') {
        Some(_) => "",
        None => line.split(" #").next().unwrap_or(line),
    }
}

fn keys_of<'a>(origin: &str, texts: impl Iterator<Item = &'a str>) -> Result<Vec<Secret>, SecretError> {
    let keys: Vec<&str> = texts.map(str::trim).filter(|key| !key.is_empty()).collect();
    if keys.is_empty() {
        return Err(SecretError::NoKey { origin: origin.to_owned() });
    }
    if let Some(at) = keys.iter().position(|key| key.len() > MAX_KEY_BYTES) {
        return Err(SecretError::TooLong { origin: origin.to_owned(), number: at + 1 });
    }
    Ok(keys.into_iter().map(Secret::new).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposed(keys: Vec<Secret>) -> Vec<String> {
        keys.iter().map(|key| key.expose().to_owned()).collect()
    }

    #[test]
    fn a_file_has_one_key_a_line_and_comments() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "# team a\nfirst\n\n  sec#ond  # until May\n\t# old\n").unwrap();
        assert_eq!(exposed(api_keys(Some(&path), Some("ignored")).unwrap()), ["first", "sec#ond"]);
    }

    #[test]
    fn the_environment_has_a_list() {
        assert_eq!(exposed(api_keys(None, Some("a, b,,")).unwrap()), ["a", "b"]);
        assert!(api_keys(None, None).unwrap().is_empty());
    }

    #[test]
    fn given_and_empty_does_not_open_the_server() {
        let error = api_keys(None, Some(" ,")).unwrap_err().to_string();
        assert!(error.contains(API_KEYS_VARIABLE), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "# none yet\n").unwrap();
        assert!(api_keys(Some(&path), None).is_err());
    }

    #[test]
    fn errors_hold_no_key() {
        let error = api_keys(None, Some(&format!("short,{}", "x".repeat(300)))).unwrap_err().to_string();
        assert!(error.contains("key number 2") && !error.contains("xxx"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn open_permissions_are_noticed() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "key").unwrap();
        for (mode, open) in [(0o600, false), (0o644, true), (0o640, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_readable_by_others(&path), open, "{mode:o}");
        }
    }
}
