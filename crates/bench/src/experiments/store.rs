//! The file of measurements: a JSON object a line, the newest last. It is only ever added to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::measurement::{Measurement, SCHEMA_VERSION};

/// A measurement has some kilobytes; these are years of them.
const MOST_BYTES: u64 = 64 << 20;

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} has more than {MOST_BYTES} bytes; keep its newest lines, or give another file with --results", path.display())]
    TooLarge { path: PathBuf },
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    pub measurements: Vec<Measurement>,
    /// Lines, from 1, that are no measurement of this version: of a newer program, or cut short.
    pub skipped: Vec<usize>,
}

/// All measurements of a file; none if there is no such file.
///
/// # Errors
/// If it cannot be read, or is larger than it should be.
pub fn read(path: &Path) -> Result<Stored, StoreError> {
    let failed = |source| StoreError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stored::default()),
        Err(error) => return Err(failed(error)),
    };
    if file.metadata().map_err(failed)?.len() > MOST_BYTES {
        return Err(StoreError::TooLarge { path: path.to_owned() });
    }
    let mut stored = Stored::default();
    for (at, line) in BufReader::new(file.take(MOST_BYTES)).split(b'\n').enumerate() {
        let line = line.map_err(failed)?;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice::<Measurement>(&line) {
            Ok(found) if found.schema_version == SCHEMA_VERSION => stored.measurements.push(found),
            _ => stored.skipped.push(at + 1),
        }
    }
    Ok(stored)
}

/// Adds a measurement; makes the file and its folder if they are not there.
///
/// # Errors
/// If it cannot be written.
pub fn add(path: &Path, measurement: &Measurement) -> Result<(), StoreError> {
    let failed = |source| StoreError::Write { path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(failed)?;
    // A line that was cut short must not take this one with it.
    let mut line = if ends_in_a_line(&mut file).map_err(failed)? { Vec::new() } else { vec![b'\n'] };
    serde_json::to_writer(&mut line, measurement).map_err(|error| failed(error.into()))?;
    line.push(b'\n');
    // One write, so that two programs do not mix their lines.
    file.write_all(&line).map_err(failed)
}

/// Whether the file is empty or its last line is whole.
fn ends_in_a_line(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Whether measurements can be added; better known before they are made.
///
/// # Errors
/// If the file cannot be made or opened.
pub fn check(path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Write { path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    OpenOptions::new().create(true).append(true).open(path).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use servelab_sim::{Dtype, HardwareProfile};

    use super::*;
    use crate::experiments::{Circumstances, ExperimentId, Origin};
    use crate::ledger::Ledger;

    fn measurement(unix_seconds: u64) -> Measurement {
        Measurement {
            schema_version: SCHEMA_VERSION,
            experiment: ExperimentId::KvBytes,
            unix_seconds,
            took_seconds: 1.5,
            circumstances: Circumstances {
                hardware: "h".into(),
                is_gpu: false,
                limits: HardwareProfile::measured(1e10, 2e10, Dtype::Bf16, 5e11).unwrap(),
                model: Ledger::load().unwrap().models["llama-3.1-8b"].clone(),
                weights: "random weights".into(),
                busy_share: Some(0.5),
                origin: Origin { os: "linux".into(), tool_version: "0.1.0".into(), tool_commit: None },
            },
            server_flags: vec!["--kv-memory".into(), "1MiB".into()],
            findings: Vec::new(),
            ladder: None,
        }
    }

    #[test]
    fn what_was_added_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/results.jsonl");
        assert_eq!(read(&path).unwrap(), Stored::default());
        check(&path).unwrap();
        for at in [1, 2] {
            add(&path, &measurement(at)).unwrap();
        }
        assert_eq!(read(&path).unwrap().measurements, [measurement(1), measurement(2)]);
    }

    #[test]
    fn lines_that_are_not_understood_are_skipped_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        add(&path, &measurement(1)).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"experiment\": \"kv-by\n\n\xff\xfe\n").unwrap();
        let mut newer = serde_json::to_value(measurement(9)).unwrap();
        newer["schema_version"] = 99.into();
        write!(file, "{newer}\n{{\"cut").unwrap();
        add(&path, &measurement(2)).unwrap();
        let stored = read(&path).unwrap();
        assert_eq!(stored.measurements.len(), 2);
        assert_eq!(stored.skipped, [2, 4, 5, 6]);
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("cannot read "), "{error}");
        let below_a_file = folder.path().join("file/results.jsonl");
        fs::write(folder.path().join("file"), "x").unwrap();
        assert!(check(&below_a_file).unwrap_err().to_string().starts_with("cannot write "));
        let large = folder.path().join("large");
        File::create(&large).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(matches!(read(&large), Err(StoreError::TooLarge { .. })));
    }
}
