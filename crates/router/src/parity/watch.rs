//! Asks one replica, again and again, what it tokenises with, and whether the router does it alike.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use servelab_front::prompts::{FILE_NAMES, TextFiles};
use servelab_wire::{Tokenized, TokenizerManifest};

use super::Parity;
use super::canary::{canaries, difference};
use super::tokeniser::{Tokeniser, Tokenisers};
use crate::choice::fleet::TokeniserId;
use crate::replicas::client::Client;
use crate::replicas::registry::{Health, Registry, Replica};

/// Largest file that is fetched; tokenizers of large vocabularies take 10 to 40 MB.
const MAX_FILE_BYTES: usize = 256 << 20;
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// One file or answer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How soon a replica is asked again that gave no clear answer, and the soonest that any is: however many answers raise
/// doubts, they cost it one check in that time.
const SOON: Duration = Duration::from_secs(5);

/// How parity is looked after.
#[derive(Clone, Debug)]
pub struct ParityOptions {
    /// Between two checks of a replica.
    pub interval: Duration,
    /// How long a request waits for its tokens at most.
    pub tokenise_timeout: Duration,
    /// Taken for every replica in place of what it serves: for those that serve nothing, as vLLM.
    pub tokeniser: Option<Arc<Tokeniser>>,
}

impl Default for ParityOptions {
    fn default() -> Self {
        let (interval, tokenise_timeout) = (Duration::from_secs(60), Duration::from_secs(1));
        Self { interval, tokenise_timeout, tokeniser: None }
    }
}

/// What all watches share.
pub struct Watch {
    pub registry: Arc<Registry>,
    pub client: Client,
    /// For replicas that ask for one.
    pub key: Option<HeaderValue>,
    pub options: ParityOptions,
    pub tokenisers: Tokenisers,
}

impl Watch {
    /// Checks until the replica is taken off the list.
    pub async fn follow(self: Arc<Self>, replica: Arc<Replica>) {
        let checks = async {
            loop {
                let interval = self.options.interval;
                if replica.health() != Health::Ready {
                    replica.check_parity.notified().await;
                    continue;
                }
                let parity = self.check(&replica).await;
                let is_clear = !matches!(parity, Parity::Unclear(_));
                self.registry.set_parity(&replica, parity);
                tokio::time::sleep(interval.min(SOON)).await;
                // Ready again, started anew, or doubted: see `Registry`.
                if is_clear {
                    let rest = interval.saturating_sub(SOON);
                    let _ = tokio::time::timeout(rest, replica.check_parity.notified()).await;
                }
            }
        };
        tokio::select! {
            () = checks => {}
            () = replica.removed.cancelled() => {}
        }
    }

    async fn check(&self, replica: &Replica) -> Parity {
        let tokeniser = match &self.options.tokeniser {
            Some(tokeniser) => tokeniser.clone(),
            None => match self.fetch(replica).await {
                Ok(tokeniser) => tokeniser,
                Err(why) => return Parity::Unclear(why),
            },
        };
        match self.compare(replica, &tokeniser).await {
            Ok(None) => Parity::Kept(tokeniser),
            Ok(Some(difference)) => Parity::Lost(difference),
            Err(why) => Parity::Unclear(why),
        }
    }

    /// The tokeniser that the replica serves.
    async fn fetch(&self, replica: &Replica) -> Result<Arc<Tokeniser>, String> {
        let (status, body) = self.ask(replica, "/tokenizer", None, MAX_ANSWER_BYTES).await?;
        if status == StatusCode::NOT_FOUND {
            return Err("it serves no tokenizer; give the router one with --tokenizer".into());
        }
        let body = expect_ok("/tokenizer", status, body)?;
        let manifest: TokenizerManifest =
            serde_json::from_slice(&body).map_err(|error| format!("/tokenizer cannot be read: {error}"))?;
        let revision = u128::from_str_radix(&manifest.revision, 16)
            .map_err(|_| "/tokenizer has no revision of 32 hexadecimal digits".to_owned())?;
        if let Some(known) = self.tokenisers.get(TokeniserId(revision)) {
            return Ok(known);
        }
        let mut files = TextFiles::default();
        for name in FILE_NAMES.iter().filter(|name| manifest.files.iter().any(|file| file.name == **name)) {
            let path = format!("/tokenizer/{name}");
            let (status, content) = self.ask(replica, &path, None, MAX_FILE_BYTES).await?;
            files.put(name, expect_ok(&path, status, content)?);
        }
        if files.revision() != revision {
            return Err("the files of its tokenizer are not those that it announces".into());
        }
        let made = tokio::task::spawn_blocking(move || Tokeniser::new(&files)).await;
        let made = made.map_err(|_| "reading its tokenizer panicked".to_owned())?;
        let tokeniser = made.map_err(|error| format!("its tokenizer cannot be used: {error}"))?;
        let room = "there are too many different tokenizers among the replicas; run a router for each model";
        self.tokenisers.put(Arc::new(tokeniser)).ok_or_else(|| room.to_owned())
    }

    /// The first difference.
    async fn compare(&self, replica: &Replica, tokeniser: &Arc<Tokeniser>) -> Result<Option<String>, String> {
        for canary in canaries() {
            let (tokeniser, body) = (tokeniser.clone(), canary.body.clone());
            let ours = tokio::task::spawn_blocking(move || tokeniser.tokenize(body).ok()).await;
            let ours = ours.map_err(|_| "tokenising a canary panicked".to_owned())?;
            let body = Bytes::from(canary.body.to_string());
            let (status, answer) = self.ask(replica, "/tokenize", Some(body), MAX_ANSWER_BYTES).await?;
            let theirs = match status {
                StatusCode::BAD_REQUEST => None,
                status => Some(tokens(&expect_ok("/tokenize", status, answer)?)?),
            };
            if let Some(difference) = difference(canary.name, &ours, &theirs) {
                return Ok(Some(difference));
            }
        }
        Ok(None)
    }

    async fn ask(
        &self,
        replica: &Replica,
        path: &str,
        body: Option<Bytes>,
        limit: usize,
    ) -> Result<(StatusCode, Bytes), String> {
        let mut request = Request::new(Full::new(body.clone().unwrap_or_default()));
        *request.uri_mut() = replica.address.uri(path).ok_or_else(|| format!("no URL for {path}"))?;
        if body.is_some() {
            *request.method_mut() = Method::POST;
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
        }
        // By the next check it would be stale, and a request must not meet it.
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        if let Some(key) = &self.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.clone());
        }
        let exchange = async {
            let answer = self.client.request(request).await.map_err(|error| format!("{path}: {error}"))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), limit).collect().await;
            Ok((status, body.map_err(|error| format!("{path}: {error}"))?.to_bytes()))
        };
        let late = |_| format!("{path} took longer than {} s", FETCH_TIMEOUT.as_secs());
        tokio::time::timeout(FETCH_TIMEOUT, exchange).await.map_err(late)?
    }
}

fn expect_ok(path: &str, status: StatusCode, body: Bytes) -> Result<Bytes, String> {
    match status {
        StatusCode::OK => Ok(body),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(format!("{path} asks for a key; give the router one with --replica-key-file"))
        }
        status => Err(format!("{path} answers {}", status.as_u16())),
    }
}

fn tokens(body: &[u8]) -> Result<Vec<u32>, String> {
    let answer: Result<Tokenized, _> = serde_json::from_slice(body);
    answer.map(|answer| answer.tokens).map_err(|error| format!("/tokenize cannot be read: {error}"))
}
