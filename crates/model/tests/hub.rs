//! Downloads from a server on this machine that answers as the model hub does.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::folder;
use servelab_model::hub::{HubId, HubOptions, fetch};
use servelab_model::{LoadFormat, ModelError, ModelSource, OpenOptions, Prepared};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, and what it was asked.
#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Token without which nothing is given.
    token: Option<String>,
    /// Send no more than that many bytes of a file, and say that this was all.
    cut: Option<usize>,
    downloads: Vec<String>,
}

struct Hub {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    /// Serves a fixture's files as `lab/tiny`, branch `main`.
    fn start(fixture: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = std::fs::read_dir(folder(fixture)).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap())
        });
        let state = Arc::new(Mutex::new(State { files: files.collect(), ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &shared);
            }
        });
        Self { endpoint, state }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache: Some(cache.to_owned()),
            token: Some("from-the-caller".to_owned()),
            progress: None,
        }
    }

    fn fetch(&self, cache: &Path) -> Result<std::path::PathBuf, ModelError> {
        fetch(&HubId::parse("lab/tiny").unwrap(), "main", self.options(cache))
    }

    fn downloads(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().downloads)
    }
}

/// Reads one request and answers it.
fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let headers: HashMap<String, String> = lines
        .map_while(|line| line.ok().filter(|line| !line.is_empty()))
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())))
        .collect();
    let mut state = state.lock().unwrap();
    let token = headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let (status, extra, body) = if state.token.is_some() && state.token.as_deref() != token {
        ("401 Unauthorized", String::new(), Vec::new())
    } else if path == "/api/models/lab/tiny/revision/main" {
        let siblings: Vec<_> =
            state.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes();
        ("200 OK", String::new(), body)
    } else if let Some(name) = path.strip_prefix("/lab/tiny/resolve/main/") {
        resolve(&mut state, name, headers.get("range"))
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let mut stream = stream;
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn resolve(state: &mut State, name: &str, range: Option<&String>) -> (&'static str, String, Vec<u8>) {
    let Some(content) = state.files.get(name).cloned() else {
        return ("404 Not Found", String::new(), Vec::new());
    };
    let (start, end) = range.unwrap().strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let mut end = end.parse::<usize>().map_or(content.len(), |last| last + 1);
    if end > 1 {
        state.downloads.push(name.to_owned());
        end = state.cut.map_or(end, |cut| end.min(cut));
    }
    let size = content.len();
    let extra = format!(
        "ETag: \"etag-of-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{size}\r\n",
        end.max(1) - 1
    );
    ("206 Partial Content", extra, content[start.min(end)..end].to_vec())
}

#[test]
fn a_sharded_checkpoint_is_downloaded_once_and_then_found_in_the_cache() {
    let hub = Hub::start("llama-sharded");
    let cache = tempfile::tempdir().unwrap();
    let source = ModelSource::parse(Some("lab/tiny"), LoadFormat::Auto, None).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let report = Arc::clone(&seen);
    let mut options = hub.options(cache.path());
    options.progress = Some(Box::new(move |download| report.lock().unwrap().push(download.clone())));
    let prepared = Prepared::open(&source, OpenOptions { hub: options, ..OpenOptions::default() }).unwrap();
    assert_eq!(prepared.config().num_layers, 2);
    assert_eq!(source.to_string(), "lab/tiny");
    let mut downloads = hub.downloads();
    downloads.sort();
    let shards = (1..=3).map(|shard| format!("model-{shard:05}-of-00003.safetensors"));
    let wanted: Vec<String> = ["config.json"]
        .map(String::from)
        .into_iter()
        .chain(
            // generation_config.json is written by transformers beside config.json.
            hub.state
                .lock()
                .unwrap()
                .files
                .contains_key("generation_config.json")
                .then(|| "generation_config.json".to_owned()),
        )
        .chain(shards)
        .chain(["model.safetensors.index.json".to_owned()])
        .collect();
    assert_eq!(downloads, wanted);
    let last = seen.lock().unwrap().last().cloned().unwrap();
    assert!(last.total_bytes > 0 && last.downloaded_bytes == last.total_bytes, "{last:?}");

    hub.fetch(cache.path()).unwrap();
    assert_eq!(hub.downloads(), Vec::<String>::new());
}

#[test]
fn without_a_network_the_cache_serves_and_an_empty_one_says_what_to_do() {
    let hub = Hub::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let folder = hub.fetch(cache.path()).unwrap();
    // Nobody listens at the address of a listener that was dropped.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let offline =
        |cache: &Path| HubOptions { endpoint: Some(format!("http://{nobody}")), ..hub.options(cache) };
    let id = HubId::parse("lab/tiny").unwrap();
    assert_eq!(fetch(&id, "main", offline(cache.path())).unwrap(), folder);
    let empty = tempfile::tempdir().unwrap();
    let message = fetch(&id, "main", offline(empty.path())).unwrap_err().to_string();
    assert!(message.contains("lab/tiny") && message.contains("HF_ENDPOINT"), "{message}");
}

#[test]
fn unknown_and_gated_repositories_are_told_apart() {
    let hub = Hub::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let unknown = HubId::parse("lab/nothing").unwrap();
    let message = fetch(&unknown, "main", hub.options(cache.path())).unwrap_err().to_string();
    assert!(message.contains("no such repository"), "{message}");
    hub.fetch(cache.path()).unwrap();
    hub.state.lock().unwrap().token = Some("another".to_owned());
    // The cached copy is no answer to a refusal.
    let message = hub.fetch(cache.path()).unwrap_err().to_string();
    assert!(message.contains("HF_TOKEN"), "{message}");
    hub.state.lock().unwrap().token = Some("from-the-caller".to_owned());
    hub.fetch(cache.path()).unwrap();
}

#[test]
fn a_download_that_ends_early_is_not_kept() {
    let hub = Hub::start("llama");
    let cache = tempfile::tempdir().unwrap();
    hub.state.lock().unwrap().cut = Some(100);
    let message = hub.fetch(cache.path()).unwrap_err().to_string();
    assert!(message.contains("100 of"), "{message}");
    hub.state.lock().unwrap().cut = None;
    let folder = hub.fetch(cache.path()).unwrap();
    let source = ModelSource::Folder(folder);
    Prepared::open(&source, OpenOptions::default()).unwrap();
}

#[test]
fn ids_and_revisions_that_could_leave_the_cache_are_refused() {
    for id in ["..", "a/..", "../a", "a/b/c", "", "a/", "/a", "a b", "a/b?c", ".hidden", "a--b/c", "a\\b"] {
        assert!(HubId::parse(id).is_err(), "{id}");
    }
    for id in ["gpt2", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B_x"] {
        assert_eq!(HubId::parse(id).unwrap().to_string(), id);
    }
    for revision in ["../x", "a/../../b", "/etc", "", "a b", "x?y"] {
        assert!(ModelSource::parse(Some("a/b"), LoadFormat::Auto, Some(revision)).is_err(), "{revision}");
    }
    ModelSource::parse(Some("a/b"), LoadFormat::Auto, Some("refs/pr/3")).unwrap();
}
