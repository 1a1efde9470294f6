//! Results read back from the files that a benchmark wrote.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::result::{BenchResult, SCHEMA_VERSION};

/// A result that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("cannot read {}: {source}; give the folder of a benchmark's --out, or its result.json", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no result of servelab bench: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error(
        "{} has schema version {found}, and this program reads {SCHEMA_VERSION}; measure again, or use the program \
         that wrote it",
        path.display()
    )]
    Schema { path: PathBuf, found: u32 },
}

/// The result in a folder that `--out` named, or in a file.
///
/// # Errors
/// If there is none, or it was written in another form.
pub fn read(path: &Path) -> Result<BenchResult, SavedError> {
    #[derive(Deserialize)]
    struct Version {
        schema_version: u32,
    }
    let path = if path.is_dir() { path.join("result.json") } else { path.to_owned() };
    let open = || {
        File::open(&path)
            .map(BufReader::new)
            .map_err(|source| SavedError::Read { path: path.clone(), source })
    };
    let json = |source: serde_json::Error| SavedError::Json { path: path.clone(), source };
    // First the version alone: another one may have other fields.
    let found = serde_json::from_reader::<_, Version>(open()?).map_err(json)?.schema_version;
    if found != SCHEMA_VERSION {
        return Err(SavedError::Schema { path, found });
    }
    serde_json::from_reader(open()?).map_err(json)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Or a report made anew would show another figure: serde_json's default is off by a last bit at times.
        #[test]
        fn a_number_read_back_is_the_one_written(
            values in proptest::collection::vec(0.0..1e6_f64, 200),
        ) {
            let text = serde_json::to_string(&values).unwrap();
            prop_assert_eq!(serde_json::from_reader::<_, Vec<f64>>(text.as_bytes()).unwrap(), values);
        }
    }

    #[test]
    fn what_is_no_result_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let read = || read(folder.path()).unwrap_err().to_string();
        assert!(read().contains("result.json: No such file"), "{}", read());
        let write = |text: &str| std::fs::write(folder.path().join("result.json"), text).unwrap();
        write("{}");
        assert!(read().contains("no result of servelab bench: missing field `schema_version`"), "{}", read());
        write("{\"schema_version\": 99, \"other\": []}");
        assert!(read().contains("has schema version 99, and this program reads 1"), "{}", read());
        write("{\"schema_version\": 1}");
        assert!(read().contains("missing field `header`"), "{}", read());
    }
}
