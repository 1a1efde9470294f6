//! A file with one address a line, `#` begins a comment. Read again when its content changes, however it was replaced:
//! a Kubernetes ConfigMap swaps a symbolic link, which a watch on the file would not see.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::Members;
use crate::replicas::address::{Address, BadAddress};

/// How often it is looked at.
const INTERVAL: Duration = Duration::from_millis(500);
/// Longest file.
const MAX_BYTES: u64 = 1 << 20;

/// Why the list stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("line {number}: {error}")]
    Line { number: usize, error: BadAddress },
}

/// Never returns.
pub async fn follow(members: &Members, number: usize, path: &Path) {
    let mut before = None;
    let mut complained = false;
    loop {
        match read(path).await {
            Ok(addresses) => {
                complained = false;
                if before.as_ref() != Some(&addresses) {
                    members.set(number, addresses.clone());
                    before = Some(addresses);
                }
            }
            Err(error) if !complained => {
                tracing::error!(path = %path.display(), "the list of replicas {error}; the last one that could be read stays");
                complained = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// # Errors
/// If it cannot be read, or a line is no address.
pub async fn read(path: &Path) -> Result<BTreeSet<Address>, FileError> {
    if tokio::fs::metadata(path).await?.len() > MAX_BYTES {
        return Err(FileError::TooLong);
    }
    parse(&tokio::fs::read_to_string(path).await?)
}

fn parse(text: &str) -> Result<BTreeSet<Address>, FileError> {
    let lines =
        text.lines().enumerate().map(|(at, line)| (at + 1, line.split('#').next().unwrap_or("").trim()));
    let address =
        |(number, line): (usize, &str)| line.parse().map_err(|error| FileError::Line { number, error });
    lines.filter(|(_, line)| !line.is_empty()).map(address).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::discovery::tests::members;

    #[test]
    fn lines_are_addresses_and_the_wrong_one_is_named() {
        assert_eq!(parse("# all\nhttp://a:1 # first\n\n b:2\n").unwrap().len(), 2);
        let error = parse("http://a:1\nhttp://a\n").unwrap_err().to_string();
        assert!(error.starts_with("line 2: ") && error.contains("port is missing"), "{error}");
    }

    #[tokio::test]
    async fn a_change_is_followed_and_a_broken_file_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("replicas");
        let (members, registry) = members();
        let following = {
            let (members, path) = (Arc::clone(&members), path.clone());
            tokio::spawn(async move { follow(&members, 0, &path).await })
        };
        let reaches = async |content: &str, count: usize| {
            std::fs::write(folder.path().join("new"), content).unwrap();
            std::fs::rename(folder.path().join("new"), &path).unwrap();
            let reached = async {
                while registry.len() != count {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), reached).await.unwrap();
        };
        reaches("127.0.0.1:1\n", 1).await;
        reaches("127.0.0.1:1\n127.0.0.1:2\n127.0.0.1:3\n", 3).await;
        reaches("garbage\n", 3).await;
        tokio::time::sleep(2 * INTERVAL).await;
        assert_eq!(registry.len(), 3);
        reaches("127.0.0.1:3\n", 1).await;
        following.abort();
    }
}
