//! What the server tells about itself: its models, its version, the counters of its prefix cache.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use crate::client::{Client, Failure, Reply};
use crate::result::{ModelInfo, PrefixCacheDelta};

/// Facts kept of each answer, and bytes of each.
const MAX_FACTS: usize = 24;
const MAX_FACT_CHARS: usize = 120;

const MODELS: &str = "/v1/models";

/// Between two questions whether the server is ready.
const READY_EVERY: Duration = Duration::from_millis(200);

/// Why a run cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerError {
    #[error("{url}: {failure}")]
    NoAnswer { url: String, failure: Failure },
    #[error("{url} answers {path} with {status}: {message}")]
    Refused { url: String, path: String, status: u16, message: String },
    #[error("{url} was not ready within {} s: {why}", limit.as_secs_f64())]
    NotReady { url: String, limit: Duration, why: String },
    #[error("{url} answers {path} with something that is no {expected}")]
    NotUnderstood { url: String, path: String, expected: &'static str },
    #[error("{url} serves {served}, and not --model {asked}; name one of them, or none to take the first")]
    NoSuchModel { url: String, served: String, asked: String },
    #[error("{url} does not take token ids at /v1/completions ({reason}); give --prompt-form words")]
    NoTokenIds { url: String, reason: String },
    #[error("{url} has no /tokenize that would tell ids of its vocabulary; give --prompt-form words")]
    NoTokenizer { url: String },
}

impl ServerError {
    /// Whether other settings would have helped, and not another server.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NoSuchModel { .. } | Self::NoTokenIds { .. } | Self::NoTokenizer { .. })
    }
}

/// The counters of a prefix cache, in tokens since the server started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixCounters {
    /// In front of the names of all metrics.
    pub prefix: String,
    pub queries: u64,
    pub hits: u64,
}

/// Sends a small request, and gives its answer whatever its status.
///
/// # Errors
/// If there is no answer.
pub(crate) async fn ask(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Result<Reply, ServerError> {
    let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
    client
        .call(method, path, body)
        .await
        .map_err(|failure| ServerError::NoAnswer { url: client.target().to_string(), failure })
}

/// The answer to a question that has to succeed.
async fn get(client: &Client, path: &str) -> Result<Reply, ServerError> {
    let reply = ask(client, Method::GET, path, None).await?;
    if reply.status.is_success() { Ok(reply) } else { Err(refusal(client, path, &reply)) }
}

/// The refusal behind an answer that is no success.
pub(crate) fn refusal(client: &Client, path: &str, reply: &Reply) -> ServerError {
    ServerError::Refused {
        url: client.target().to_string(),
        path: path.to_owned(),
        status: reply.status.as_u16(),
        message: reply.message(),
    }
}

/// Waits until the server takes requests.
///
/// # Errors
/// If it does not within `limit`: what it said last.
pub async fn wait_until_ready(client: &Client, limit: Duration) -> Result<(), ServerError> {
    let begin = Instant::now();
    loop {
        let Err(why) = ready(client).await else { return Ok(()) };
        if begin.elapsed() + READY_EVERY > limit {
            let url = client.target().to_string();
            return Err(ServerError::NotReady { url, limit, why: why.to_string() });
        }
        tokio::time::sleep(READY_EVERY).await;
    }
}

/// As `/ready` says; a server without it is ready when it lists its models.
///
/// # Errors
/// Why it is not.
pub(crate) async fn ready(client: &Client) -> Result<(), ServerError> {
    let answer = match get(client, "/ready").await {
        Err(ServerError::Refused { status: 404, .. }) => get(client, MODELS).await,
        answer => answer,
    };
    answer.map(drop)
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    root: Option<String>,
    max_model_len: Option<u32>,
}

/// The model asked for, or the first that is served.
///
/// # Errors
/// If the server does not answer, does not list models, or does not serve this one.
pub async fn model(client: &Client, asked: Option<&str>) -> Result<ModelInfo, ServerError> {
    let reply = get(client, MODELS).await?;
    let url = client.target().to_string();
    let models: Models = serde_json::from_slice(&reply.body).map_err(|_| ServerError::NotUnderstood {
        url: url.clone(),
        path: MODELS.into(),
        expected: "list of models",
    })?;
    let served: Vec<String> = models.data.iter().take(8).map(|model| shortened(&model.id)).collect();
    let found = models.data.into_iter().find(|model| asked.is_none_or(|asked| asked == model.id));
    let Some(model) = found else {
        let served = if served.is_empty() { "no model".into() } else { served.join(", ") };
        return Err(ServerError::NoSuchModel { url, served, asked: asked.unwrap_or("the first").to_owned() });
    };
    Ok(ModelInfo { id: model.id, root: model.root, dtype: None, max_model_len: model.max_model_len })
}

/// Version, commit and the layout of the KV cache, as far as the server tells them.
pub async fn facts(client: &Client) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    if let Some(reply) = success(client, "/version").await
        && let Ok(Value::Object(version)) = serde_json::from_slice(&reply.body)
    {
        let texts = version.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?)));
        facts.extend(texts.map(|(name, value)| (shortened(&name), shortened(value))).take(MAX_FACTS));
    }
    if let Some(reply) = success(client, "/metrics").await {
        let text = String::from_utf8_lossy(&reply.body);
        let line = text.lines().find(|line| !line.starts_with('#') && line.contains("cache_config_info{"));
        let labels = line.map(|line| labels(line).take(MAX_FACTS)).into_iter().flatten();
        facts.extend(labels.map(|(name, value)| (format!("cache_{}", shortened(name)), shortened(value))));
    }
    facts
}

async fn success(client: &Client, path: &str) -> Option<Reply> {
    let reply = ask(client, Method::GET, path, None).await.ok()?;
    (reply.status == StatusCode::OK).then_some(reply)
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_FACT_CHARS).collect()
}

/// The counters now; `None` if the server has none.
pub async fn prefix_counters(client: &Client) -> Option<PrefixCounters> {
    let reply = success(client, "/metrics").await?;
    read_prefix_counters(&String::from_utf8_lossy(&reply.body))
}

/// What has been counted since `before`. `None` if there is nothing to compare with, or the server was started anew.
pub fn change(before: Option<PrefixCounters>, after: Option<PrefixCounters>) -> Option<PrefixCacheDelta> {
    let (before, after) = (before?, after?);
    Some(PrefixCacheDelta {
        query_tokens: after.queries.checked_sub(before.queries)?,
        hit_tokens: after.hits.checked_sub(before.hits)?,
        metrics_prefix: after.prefix,
    })
}

/// Finds the two counters behind whatever prefix: `servelab_`, `vllm:`, or `vllm:gpu_` of older versions. Caches of
/// other things (`external_`, `mm_`) have longer prefixes, so that the shortest is the one.
fn read_prefix_counters(text: &str) -> Option<PrefixCounters> {
    type Counts = (Option<f64>, Option<f64>);
    let mut found: BTreeMap<(usize, &str), Counts> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = sample(line) else { continue };
        if let Some(prefix) = name.strip_suffix("prefix_cache_queries_total") {
            *found.entry((prefix.len(), prefix)).or_default().0.get_or_insert(0.0) += value;
        } else if let Some(prefix) = name.strip_suffix("prefix_cache_hits_total") {
            *found.entry((prefix.len(), prefix)).or_default().1.get_or_insert(0.0) += value;
        }
    }
    found.into_iter().find_map(|((_, prefix), counts)| {
        let (queries, hits) = (counts.0?, counts.1?);
        Some(PrefixCounters { prefix: shortened(prefix), queries: queries as u64, hits: hits as u64 })
    })
}

/// Name and value of a line of Prometheus' text format.
fn sample(line: &str) -> Option<(&str, f64)> {
    let end = line.find(['{', ' '])?;
    // Label values may hold blanks and braces; the value stands behind the last brace.
    let rest = line.rfind('}').map_or(&line[end..], |brace| &line[brace + 1..]);
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((&line[..end], value))
}

/// The labels of a line, as far as their values have no escapes.
fn labels(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let inner = line
        .find('{')
        .zip(line.rfind('}'))
        .map_or("", |(open, close)| line.get(open + 1..close).unwrap_or(""));
    inner.split("\",").filter_map(|pair| {
        let (name, value) = pair.split_once("=\"")?;
        Some((name.trim(), value.trim_end_matches('"')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_behind_any_prefix_and_added_up() {
        let vllm = "# HELP vllm:prefix_cache_queries_total x\n\
            vllm:external_prefix_cache_queries_total{engine=\"0\"} 7.0\n\
            vllm:external_prefix_cache_hits_total{engine=\"0\"} 7.0\n\
            vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"a {b} c\"} 1.5e+06\n\
            vllm:prefix_cache_queries_total{engine=\"1\",model_name=\"a\"} 10\n\
            vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"a\"} 5\n";
        let expected = PrefixCounters { prefix: "vllm:".into(), queries: 1_500_010, hits: 5 };
        assert_eq!(read_prefix_counters(vllm), Some(expected));
        let ours = "servelab_prefix_cache_queries_total 8\nservelab_prefix_cache_hits_total 0\n";
        assert_eq!(read_prefix_counters(ours).unwrap().prefix, "servelab_");
        for none in ["", "servelab_prefix_cache_queries_total 8\n", "garbage\n{}\n x"] {
            assert_eq!(read_prefix_counters(none), None, "{none}");
        }
    }

    #[test]
    fn the_change_is_what_was_counted_in_between() {
        let at = |queries, hits| Some(PrefixCounters { prefix: "vllm:".into(), queries, hits });
        let delta = change(at(10, 4), at(110, 54)).unwrap();
        assert_eq!((delta.query_tokens, delta.hit_tokens, delta.hit_rate()), (100, 50, 0.5));
        assert_eq!(change(at(10, 4), at(5, 4)), None, "a server that was started anew");
        assert_eq!(change(None, at(5, 4)), None);
    }

    #[test]
    fn labels_become_facts() {
        let line = "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"512\"} 1";
        assert_eq!(labels(line).collect::<Vec<_>>(), [("block_size", "16"), ("num_gpu_blocks", "512")]);
        assert_eq!(labels("no labels 1").count(), 0);
    }
}
