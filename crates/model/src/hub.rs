//! Checkpoints of the model hub: found in the shared cache, or downloaded into it.

use std::fmt;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::checkpoint::shard_names;
use crate::error::ModelError;
use crate::source::{INDEX, SINGLE};

/// Files that are taken along where the repository has them.
const OPTIONAL: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// A repository on the hub: `owner/name`, or `name` for a few old ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId(String);

impl HubId {
    /// # Errors
    /// [`ModelError::HubId`] for anything but one or two parts of letters, digits, `-`, `_` and `.`.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let parts: Vec<&str> = text.split('/').collect();
        let is_part = |part: &&str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if parts.len() <= 2 && parts.iter().all(is_part) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ModelError::HubId { id: text.chars().take(200).collect() })
        }
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A branch, tag or commit that is safe to use in a path and a URL.
pub(crate) fn check_revision(revision: &str) -> Result<String, ModelError> {
    let plain = revision.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    let safe = !revision.starts_with(['/', '.']) && !revision.contains("..") && !revision.ends_with('/');
    if plain && safe && (1..=200).contains(&revision.len()) {
        return Ok(revision.to_owned());
    }
    Err(ModelError::Option {
        option: "--revision",
        value: format!("{:?}", revision.chars().take(200).collect::<String>()),
        rule: "a branch, tag or commit".to_owned(),
    })
}

/// How far the download of one file has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    pub file: String,
    pub downloaded_bytes: u64,
    pub total_bytes: u64,
}

/// Called as bytes arrive; at most some thousand times per file.
pub type OnProgress = Box<dyn FnMut(&Download) + Send>;

/// How to reach the hub. What is not given is taken from the usual places.
#[derive(Default)]
pub struct HubOptions {
    /// Default: `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// Default: the `hub` folder in `HF_HOME`, else `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
    /// Default: `HF_TOKEN`, else the file `token` beside the cache folder.
    pub token: Option<String>,
    pub progress: Option<OnProgress>,
}

/// Makes sure that all files of a checkpoint are in the cache and returns their folder. Without a
/// network a complete cached checkpoint is used as it is.
///
/// # Errors
/// [`ModelError::Hub`] if the hub cannot be reached and the cache has no checkpoint, if the
/// repository is unknown, gated or without safetensors, or if a download breaks off.
pub fn fetch(id: &HubId, revision: &str, mut options: HubOptions) -> Result<PathBuf, ModelError> {
    let mut progress = options.progress.take();
    let repository = Repository::new(id, revision, options)?;
    let listing = match repository.remote.info() {
        Ok(info) => info,
        Err(error) => return repository.cached_checkpoint(&error),
    };
    let has = |file: &str| listing.siblings.iter().any(|sibling| sibling.rfilename == file);
    let snapshot = repository.cached.pointer_path(&listing.sha);
    let mut get = |file: &str| repository.get(file, &snapshot, &mut progress);
    let config = get("config.json")?;
    for file in OPTIONAL.iter().filter(|file| has(file)) {
        get(file)?;
    }
    if has(INDEX) {
        let index = get(INDEX)?;
        let bytes = std::fs::read(&index).map_err(|source| ModelError::Io { path: index, source })?;
        for shard in shard_names(&bytes)? {
            get(&shard)?;
        }
    } else if has(SINGLE) {
        get(SINGLE)?;
    } else {
        return Err(
            repository.error("it has no safetensors weights; choose a repository that has".to_owned())
        );
    }
    Ok(folder_of(&config))
}

/// One repository, at the hub and in the cache.
struct Repository<'a> {
    id: &'a HubId,
    revision: &'a str,
    remote: ApiRepo,
    cached: CacheRepo,
}

impl<'a> Repository<'a> {
    fn new(id: &'a HubId, revision: &'a str, options: HubOptions) -> Result<Self, ModelError> {
        let failed =
            |reason: String| ModelError::Hub { id: id.to_string(), revision: revision.to_owned(), reason };
        let cache = match options.cache {
            Some(path) => Cache::new(std::path::absolute(&path).map_err(|e| failed(e.to_string()))?),
            None => Cache::from_env(),
        };
        let endpoint = options.endpoint.or_else(|| std::env::var("HF_ENDPOINT").ok());
        let token = options.token.or_else(|| std::env::var("HF_TOKEN").ok()).or_else(|| cache.token());
        let api = api(&cache, endpoint, token).map_err(|e| failed(e.to_string()))?;
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_owned());
        Ok(Self { id, revision, remote: api.repo(repo.clone()), cached: cache.repo(repo) })
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Hub { id: self.id.to_string(), revision: self.revision.to_owned(), reason }
    }

    /// The file from the cache if it belongs to the hub's present commit, else downloaded.
    fn get(
        &self,
        file: &str,
        snapshot: &Path,
        progress: &mut Option<OnProgress>,
    ) -> Result<PathBuf, ModelError> {
        let present = snapshot.join(file);
        if present.is_file() {
            return Ok(present);
        }
        let mut total = 0;
        let meter = Meter { state: Download::new(file), reported: 0, total: &mut total, report: progress };
        let path = self
            .remote
            .download_with_progress(file, meter)
            .map_err(|e| self.error(format!("{file}: {}", explain(&e))))?;
        self.check_size(&path, file, total)?;
        Ok(path)
    }

    /// A connection that closes early leaves a short file that would be taken for good later on.
    fn check_size(&self, path: &Path, file: &str, expected: u64) -> Result<(), ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        if bytes == expected {
            return Ok(());
        }
        // The snapshot is a link to the blob: neither may stay.
        let blob = path.canonicalize().map_err(io)?;
        std::fs::remove_file(&blob).map_err(io)?;
        std::fs::remove_file(path).or_else(|e| if path.exists() { Err(e) } else { Ok(()) }).map_err(io)?;
        Err(self.error(format!("{file}: the download ended after {bytes} of {expected} bytes; try again")))
    }

    /// What the cache holds, if that is complete, since the hub did not answer.
    fn cached_checkpoint(&self, error: &ApiError) -> Result<PathBuf, ModelError> {
        let complete = || {
            let config = self.cached.get("config.json")?;
            match self.cached.get(INDEX) {
                Some(index) => {
                    let shards = shard_names(&std::fs::read(index).ok()?).ok()?;
                    shards.iter().all(|shard| self.cached.get(shard).is_some()).then_some(config)
                }
                None => self.cached.get(SINGLE).map(|_| config),
            }
        };
        match (is_refusal(error), complete()) {
            (false, Some(config)) => {
                tracing::warn!(id = %self.id, reason = %explain(error), "using the cached checkpoint");
                Ok(folder_of(&config))
            }
            _ => Err(self.error(explain(error))),
        }
    }
}

fn api(cache: &Cache, endpoint: Option<String>, token: Option<String>) -> Result<Api, ApiError> {
    let builder = ApiBuilder::from_cache(cache.clone()).with_progress(false).with_token(token);
    match endpoint {
        Some(endpoint) => builder.with_endpoint(endpoint.trim_end_matches('/').to_owned()).build(),
        None => builder.build(),
    }
}

fn folder_of(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new(".")).to_owned()
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Some(*code),
            _ => None,
        },
        ApiError::TooManyRetries(inner) => status(inner),
        _ => None,
    }
}

/// The hub answered and said no; a cached copy is no answer to that.
fn is_refusal(error: &ApiError) -> bool {
    matches!(status(error), Some(401 | 403 | 404))
}

fn explain(error: &ApiError) -> String {
    match status(error) {
        Some(401 | 403) => {
            "the hub refuses access; accept the model's terms there and set HF_TOKEN".to_owned()
        }
        Some(404) => {
            "the hub knows no such repository, revision or file; check --model and --revision".to_owned()
        }
        _ => format!("{error}; check the network, HF_ENDPOINT, or give a local folder"),
    }
}

impl Download {
    fn new(file: &str) -> Self {
        Self { file: file.to_owned(), downloaded_bytes: 0, total_bytes: 0 }
    }
}

/// Passes hf-hub's progress on, thinned out to a thousandth of the file at a time.
struct Meter<'a> {
    state: Download,
    reported: u64,
    total: &'a mut u64,
    report: &'a mut Option<OnProgress>,
}

impl Meter<'_> {
    fn report(&mut self) {
        self.reported = self.state.downloaded_bytes;
        if let Some(report) = self.report {
            report(&self.state);
        }
    }
}

impl Progress for Meter<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        self.state.total_bytes = size as u64;
        self.state.downloaded_bytes = 0;
        *self.total = size as u64;
        self.report();
    }

    fn update(&mut self, size: usize) {
        self.state.downloaded_bytes += size as u64;
        if self.state.downloaded_bytes - self.reported > self.state.total_bytes / 1000 {
            self.report();
        }
    }

    fn finish(&mut self) {
        self.report();
    }
}
