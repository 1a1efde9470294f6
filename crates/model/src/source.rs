//! Where a model comes from, and the files of it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::checkpoint::{WeightFiles, shard_names};
use crate::error::ModelError;
use crate::hub::{self, HubId, HubOptions};
use crate::{demo, presets};

const MIB: u64 = 1 << 20;

/// Which model to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder with config.json, safetensors and tokenizer files.
    Folder(PathBuf),
    /// A repository of the model hub.
    Hub { id: HubId, revision: String },
    /// The model within the binary.
    Demo,
    /// Random weights in the shape of a preset or of a config.json.
    Dummy(DummyShape),
}

/// The shape of a model with random weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DummyShape {
    /// One of [`presets::names`].
    Preset(String),
    /// A config.json, or a folder that holds one (whose tokenizer files are then used).
    Path(PathBuf),
}

/// `--load-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// Weights of the checkpoint.
    #[default]
    Auto,
    /// Random weights in the model's shape.
    Dummy,
}

impl ModelSource {
    /// Reads what was typed as `--model` (nothing: the demo), `--load-format` and `--revision`.
    ///
    /// # Errors
    /// [`ModelError::HubId`] for text that is neither an existing folder nor a hub id, and
    /// [`ModelError::UnknownPreset`] for an unknown shape of dummy weights.
    pub fn parse(
        model: Option<&str>,
        format: LoadFormat,
        revision: Option<&str>,
    ) -> Result<Self, ModelError> {
        match (model, format) {
            (None, LoadFormat::Auto) => Ok(Self::Demo),
            (None, LoadFormat::Dummy) => Ok(Self::Dummy(DummyShape::Preset("demo".to_owned()))),
            (Some(model), LoadFormat::Dummy) if Path::new(model).exists() => {
                Ok(Self::Dummy(DummyShape::Path(PathBuf::from(model))))
            }
            (Some(model), LoadFormat::Dummy) => {
                presets::config_json(model)?;
                Ok(Self::Dummy(DummyShape::Preset(model.to_owned())))
            }
            (Some(model), LoadFormat::Auto) if Path::new(model).is_dir() => {
                Ok(Self::Folder(PathBuf::from(model)))
            }
            (Some(model), LoadFormat::Auto) => {
                let revision = hub::check_revision(revision.unwrap_or("main"))?;
                Ok(Self::Hub { id: HubId::parse(model)?, revision })
            }
        }
    }

    /// Finds the files; downloads them where the source is a hub and they are not cached.
    ///
    /// # Errors
    /// [`ModelError::MissingFile`], [`ModelError::Io`], [`ModelError::FileTooLarge`],
    /// [`ModelError::Hub`] and what the index of a sharded checkpoint can be wrong with.
    pub fn resolve(&self, hub_options: HubOptions) -> Result<ModelFiles, ModelError> {
        match self {
            Self::Folder(folder) => from_folder(folder, Weighing::Needed),
            Self::Hub { id, revision } => {
                let folder = hub::fetch(id, revision, hub_options)?;
                from_folder(&folder, Weighing::Needed)
            }
            Self::Demo => Ok(ModelFiles {
                config: demo::CONFIG.to_vec(),
                text: demo::text_files(),
                weights: WeightOrigin::Files(demo::weights()),
            }),
            Self::Dummy(DummyShape::Preset(name)) => Ok(ModelFiles {
                config: presets::config_json(name)?,
                text: if name == "demo" { demo::text_files() } else { TextFiles::default() },
                weights: WeightOrigin::Dummy,
            }),
            Self::Dummy(DummyShape::Path(path)) if path.is_dir() => from_folder(path, Weighing::Dummy),
            Self::Dummy(DummyShape::Path(path)) => Ok(ModelFiles {
                config: read(path, 4 * MIB)?,
                text: TextFiles::default(),
                weights: WeightOrigin::Dummy,
            }),
        }
    }
}

impl fmt::Display for ModelSource {
    /// The name under which the model is served where the user gives none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) | Self::Dummy(DummyShape::Path(path)) => {
                let name = path.canonicalize().unwrap_or_else(|_| path.clone());
                write!(f, "{}", name.file_name().unwrap_or(name.as_os_str()).to_string_lossy())
            }
            Self::Hub { id, .. } => write!(f, "{id}"),
            Self::Demo => f.write_str("servelab-demo"),
            Self::Dummy(DummyShape::Preset(name)) => f.write_str(name),
        }
    }
}

/// The files of a model, weights not yet read.
#[derive(Debug)]
pub struct ModelFiles {
    /// config.json
    pub config: Vec<u8>,
    pub text: TextFiles,
    pub weights: WeightOrigin,
}

/// What the text side of a server needs. Nothing of it was parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFiles {
    /// tokenizer.json; absent for dummy weights in the shape of a preset.
    pub tokenizer: Option<Vec<u8>>,
    /// tokenizer_config.json
    pub tokenizer_config: Option<Vec<u8>>,
    /// chat_template.jinja (or the template within chat_template.json); where absent,
    /// tokenizer_config.json may hold one.
    pub chat_template: Option<String>,
    /// generation_config.json
    pub generation_config: Option<Vec<u8>>,
}

/// Weights to be read or to be drawn.
#[derive(Clone, Debug)]
pub enum WeightOrigin {
    Files(WeightFiles),
    Dummy,
}

/// Whether a folder has to hold weights.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weighing {
    Needed,
    Dummy,
}

fn from_folder(folder: &Path, weighing: Weighing) -> Result<ModelFiles, ModelError> {
    let config = read_optional(&folder.join("config.json"), 4 * MIB)?;
    let config = config.ok_or_else(|| ModelError::MissingFile {
        place: folder.display().to_string(),
        file: "config.json".to_owned(),
        advice: "give the folder of a checkpoint in Hugging Face's format",
    })?;
    let weights = match weighing {
        Weighing::Dummy => WeightOrigin::Dummy,
        Weighing::Needed => WeightOrigin::Files(WeightFiles::Paths(weight_paths(folder)?)),
    };
    Ok(ModelFiles { config, text: text_files(folder)?, weights })
}

fn weight_paths(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let missing = |file: String| ModelError::MissingFile {
        place: folder.display().to_string(),
        file,
        advice: "weights are read from model.safetensors, or from the files that \
                 model.safetensors.index.json lists",
    };
    let names = match read_optional(&folder.join(INDEX), 64 * MIB)? {
        Some(index) => shard_names(&index)?,
        None => vec![SINGLE.to_owned()],
    };
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    match paths.iter().zip(names).find(|(path, _)| !path.is_file()) {
        Some((_, name)) => Err(missing(name)),
        None => Ok(paths),
    }
}

/// The index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The weights of a checkpoint in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// chat_template.json, an older place for the template.
#[derive(Deserialize)]
struct TemplateJson {
    chat_template: String,
}

/// Reads what a folder has for text: of a checkpoint, or of a tokenizer alone.
///
/// # Errors
/// If a file is there and cannot be read, or is far too large.
pub fn text_files(folder: &Path) -> Result<TextFiles, ModelError> {
    Ok(TextFiles {
        tokenizer: read_optional(&folder.join("tokenizer.json"), 256 * MIB)?,
        tokenizer_config: read_optional(&folder.join("tokenizer_config.json"), 64 * MIB)?,
        chat_template: chat_template(folder)?,
        generation_config: read_optional(&folder.join("generation_config.json"), MIB)?,
    })
}

fn chat_template(folder: &Path) -> Result<Option<String>, ModelError> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read_optional(&path, 4 * MIB)? {
        let not_text =
            |e| ModelError::Io { path, source: std::io::Error::new(std::io::ErrorKind::InvalidData, e) };
        return String::from_utf8(bytes).map(Some).map_err(not_text);
    }
    let Some(bytes) = read_optional(&folder.join("chat_template.json"), 4 * MIB)? else { return Ok(None) };
    let json: TemplateJson = serde_json::from_slice(&bytes)
        .map_err(|source| ModelError::Json { file: "chat_template.json".to_owned(), source })?;
    Ok(Some(json.chat_template))
}

fn read_optional(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, ModelError> {
    if path.is_file() { read(path, limit).map(Some) } else { Ok(None) }
}

/// Reads a whole file that may not be larger than `limit` bytes.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > limit {
        return Err(ModelError::FileTooLarge { path: path.to_owned(), bytes, limit });
    }
    std::fs::read(path).map_err(io)
}
