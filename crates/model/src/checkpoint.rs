//! Safetensors files, one or many, mapped into memory and checked against the configuration before
//! anything is computed.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::config::{ModelConfig, WeightDtype};
use crate::error::ModelError;
use crate::weights::{HEAD, TensorData, expected_tensors};

/// Where weights lie: files on disk, or bytes within the binary.
#[derive(Clone, Debug)]
pub enum WeightFiles {
    Paths(Vec<PathBuf>),
    Embedded(&'static [u8]),
}

/// Opened safetensors files. Every tensor's place was checked against the size of its file.
pub struct Checkpoint {
    files: Vec<Bytes>,
    tensors: HashMap<String, Place>,
}

enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

/// A tensor within a file.
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// [`ModelError::Io`], or [`ModelError::Safetensors`] for a header that is broken, too large or
    /// that points outside its file.
    pub fn open(files: &WeightFiles) -> Result<Self, ModelError> {
        let mut checkpoint = Self { files: Vec::new(), tensors: HashMap::new() };
        match files {
            WeightFiles::Embedded(bytes) => checkpoint.add("the embedded model", Bytes::Embedded(bytes))?,
            WeightFiles::Paths(paths) => {
                for path in paths {
                    checkpoint.add(&path.display().to_string(), Bytes::Mapped(map(path)?))?;
                }
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, name: &str, bytes: Bytes) -> Result<(), ModelError> {
        let broken = |reason: String| ModelError::Safetensors { file: name.to_owned(), reason };
        let (header, metadata) =
            SafeTensors::read_metadata(bytes.as_slice()).map_err(|e| broken(e.to_string()))?;
        let data_start = header + size_of::<u64>();
        for (tensor, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            if bytes.as_slice().get(range.clone()).is_none() {
                return Err(broken(format!("tensor {tensor} lies beyond the end of the file")));
            }
            let place =
                Place { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), bytes: range };
            if self.tensors.insert(tensor.clone(), place).is_some() {
                return Err(broken(format!("tensor {tensor} is also in another file of the checkpoint")));
            }
        }
        self.files.push(bytes);
        Ok(())
    }

    /// Checks that every tensor of the configuration is there in the right shape and a supported
    /// dtype, and that no tensor is there that would change the maths.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`], [`ModelError::TensorDtype`] or
    /// [`ModelError::UnexpectedTensors`].
    pub fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let expected: BTreeMap<_, _> =
            expected_tensors(config).into_iter().map(|spec| (spec.name, spec.shape)).collect();
        for (name, shape) in &expected {
            self.tensor(name, shape)?;
        }
        let mut extra: Vec<&String> =
            self.tensors.keys().filter(|name| !expected.contains_key(*name) && !is_harmless(name)).collect();
        extra.sort();
        let (refused, ignored): (Vec<&String>, Vec<&String>) =
            extra.into_iter().partition(|name| name.starts_with("model.") || name.starts_with("lm_head."));
        if !refused.is_empty() {
            return Err(ModelError::UnexpectedTensors { names: first_few(&refused) });
        }
        if !ignored.is_empty() {
            tracing::warn!(tensors = ?first_few(&ignored), count = ignored.len(), "ignoring tensors outside the model");
        }
        Ok(())
    }

    /// One tensor, borrowed from the mapped file.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`] or [`ModelError::TensorDtype`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorData<'_>, ModelError> {
        let missing = || ModelError::MissingTensor { name: name.to_owned(), shape: shape.to_vec() };
        let place = self.tensors.get(name).ok_or_else(missing)?;
        if place.shape != shape {
            return Err(ModelError::TensorShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: place.shape.clone(),
            });
        }
        let dtype = weight_dtype(place.dtype).ok_or_else(|| ModelError::TensorDtype {
            name: name.to_owned(),
            found: format!("{:?}", place.dtype),
        })?;
        let bytes = &self.files[place.file].as_slice()[place.bytes.clone()];
        Ok(TensorData { dtype, shape: shape.to_vec(), bytes: Cow::Borrowed(bytes) })
    }

    /// The number format that most of the bytes are stored in; F32 for an empty checkpoint.
    pub fn dtype(&self) -> WeightDtype {
        let bytes_in = |dtype: WeightDtype| -> usize {
            let of_dtype = self.tensors.values().filter(|t| weight_dtype(t.dtype) == Some(dtype));
            of_dtype.map(|t| t.bytes.len()).sum()
        };
        let mut best = WeightDtype::F32;
        for dtype in [WeightDtype::F16, WeightDtype::BF16] {
            if bytes_in(dtype) > bytes_in(best) {
                best = dtype;
            }
        }
        best
    }
}

/// Buffers that older transformers saved, and the copy of a tied embedding.
fn is_harmless(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name == HEAD
}

fn first_few(names: &[&String]) -> Vec<String> {
    names.iter().take(8).map(|name| name.chars().take(200).collect()).collect()
}

fn weight_dtype(dtype: Dtype) -> Option<WeightDtype> {
    match dtype {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::F16 => Some(WeightDtype::F16),
        Dtype::BF16 => Some(WeightDtype::BF16),
        _ => None,
    }
}

#[expect(unsafe_code, reason = "memory maps are unsafe by nature")]
fn map(path: &Path) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    // SAFETY: the map is read only and private to this process. It is undefined behaviour only if
    // another process changes the file while it is read, as with every reader of safetensors; the
    // map is dropped as soon as the weights are packed, before the first request.
    unsafe { Mmap::map(&file) }.map_err(|source| ModelError::Io { path: path.to_owned(), source })
}

/// The part of `model.safetensors.index.json` that is needed.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The names of the files that an index of a sharded checkpoint lists, each once.
///
/// # Errors
/// [`ModelError::Json`], or [`ModelError::IndexEscapes`] for a name that is not a plain file name:
/// an index must not make the server read files elsewhere.
pub fn shard_names(index: &[u8]) -> Result<Vec<String>, ModelError> {
    let index: Index = serde_json::from_slice(index)
        .map_err(|source| ModelError::Json { file: "model.safetensors.index.json".to_owned(), source })?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort_unstable();
    names.dedup();
    match names.iter().find(|name| !is_plain_file_name(name)) {
        Some(name) => Err(ModelError::IndexEscapes { name: name.chars().take(200).collect() }),
        None => Ok(names),
    }
}

fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
    plain && !name.contains(['/', '\\', '\0']) && name.ends_with(".safetensors")
}
