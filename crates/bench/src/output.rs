//! The files of a result: `result.json`, `requests.jsonl`, and for a ladder one file a point in `vllm/`, as vLLM's
//! scripts expect them.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::result::{BenchResult, RequestRecord};
use crate::vllm;

/// A file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct OutputError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// A folder that a benchmark writes to.
pub struct Output {
    folder: PathBuf,
    requests: BufWriter<File>,
}

impl Output {
    /// Makes the folder and begins `requests.jsonl`.
    ///
    /// # Errors
    /// If it cannot be written to. Better known before the benchmark than after it.
    pub fn create(folder: &Path) -> Result<Self, OutputError> {
        let path = folder.join("requests.jsonl");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OutputError { path, source }
        };
        fs::create_dir_all(folder).map_err(failed(folder))?;
        let file = File::create(&path).map_err(failed(&path))?;
        Ok(Self { folder: folder.to_owned(), requests: BufWriter::new(file) })
    }

    /// Adds a line to `requests.jsonl`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn record(&mut self, record: &RequestRecord) -> io::Result<()> {
        serde_json::to_writer(&mut self.requests, record)?;
        self.requests.write_all(b"\n")
    }

    /// Writes `result.json`, with the keys of [`vllm::detailed_keys`] if wanted, and, for several points, a file
    /// for each.
    ///
    /// # Errors
    /// The first file that cannot be written.
    pub fn finish(mut self, result: &BenchResult, detailed: &Map<String, Value>) -> Result<(), OutputError> {
        let failed = |path: PathBuf| move |source| OutputError { path, source };
        self.requests.flush().map_err(failed(self.folder.join("requests.jsonl")))?;
        let document = vllm::document(result, detailed).map_err(io::Error::from);
        self.write("result.json", document)?;
        if result.points.len() > 1 {
            let folder = self.folder.join("vllm");
            fs::create_dir_all(&folder).map_err(failed(folder.clone()))?;
            for (at, point) in result.points.iter().enumerate() {
                let name = format!("vllm/{at:02}-{}.json", file_name(&point.load.to_string()));
                self.write(&name, Ok(Value::Object(vllm::keys(&result.header, point))))?;
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, document: io::Result<Value>) -> Result<(), OutputError> {
        let path = self.folder.join(name);
        let written = document.and_then(|document| {
            let mut text = serde_json::to_vec_pretty(&document)?;
            text.push(b'\n');
            fs::write(&path, text)
        });
        written.map_err(|source| OutputError { path: path.clone(), source })
    }
}

/// Letters, digits and dots of a text, with dashes between.
fn file_name(text: &str) -> String {
    let plain = text.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
    plain.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-").chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_become_names_of_files() {
        assert_eq!(file_name("2.5000 req/s, Poisson"), "2.5000-req-s-Poisson");
        assert_eq!(file_name("../../etc"), "..-..-etc");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Output::create(&file.path().join("x")).err().unwrap().to_string();
        assert!(error.starts_with("cannot write ") && error.contains("/x"), "{error}");
    }
}
