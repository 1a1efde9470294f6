//! Asks a replica, again and again, whether it is ready and what it has to do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use rand::Rng;

use super::client::Client;
use super::exposition;
use super::registry::{Registry, Replica};

/// Most bytes of `/metrics` that are read.
const MAX_METRICS_BYTES: usize = 4 << 20;

/// How replicas are asked.
#[derive(Clone, Debug)]
pub struct ProbeOptions {
    /// Answers 200 when the replica can serve.
    pub health_path: String,
    pub interval: Duration,
    pub timeout: Duration,
    /// Checks in a row that must fail before a replica that was ready is not. One suffices the other way.
    pub fall: u32,
    /// Checks in a row without any answer after which it is taken for lost: requests that wait for its first word are
    /// sent elsewhere. More than `fall`, since a machine that is merely busy is slow to say so.
    pub lost: u32,
    /// In front of the names of metrics, any of these.
    pub metrics_prefixes: Vec<String>,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self {
            health_path: "/health".to_owned(),
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
            fall: 2,
            lost: 5,
            metrics_prefixes: vec!["servelab_".to_owned(), "vllm:".to_owned()],
        }
    }
}

/// Asks until the replica is taken off the list.
pub async fn watch(
    registry: Arc<Registry>,
    replica: Arc<Replica>,
    client: Client,
    options: Arc<ProbeOptions>,
) {
    let asked = async {
        let (mut failures, mut silences) = (0_u32, 0_u32);
        loop {
            let status = health(&client, &replica, &options).await;
            silences = if status.is_some() { 0 } else { silences.saturating_add(1) };
            replica.set_lost(silences >= options.lost);
            if status == Some(StatusCode::OK) {
                failures = 0;
                registry.set_ready(&replica, true);
            } else {
                failures = failures.saturating_add(1);
                if failures >= options.fall {
                    registry.set_ready(&replica, false);
                }
            }
            let text = metrics(&client, &replica, &options).await;
            let now = registry.now();
            let read = text.map(|text| exposition::read(&text, &options.metrics_prefixes, now));
            registry.observe(&replica, read.as_ref());
            tokio::time::sleep(jittered(options.interval)).await;
        }
    };
    tokio::select! {
        () = asked => {}
        () = replica.removed.cancelled() => {}
    }
}

/// Between nine and eleven tenths, so that the probes of many replicas spread.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::rng().random_range(0.9..1.1))
}

/// What it says of itself, if anything.
async fn health(client: &Client, replica: &Replica, options: &ProbeOptions) -> Option<StatusCode> {
    let asked = get(client, replica, &options.health_path, 64 << 10);
    Some(tokio::time::timeout(options.timeout, asked).await.ok()??.0)
}

async fn metrics(client: &Client, replica: &Replica, options: &ProbeOptions) -> Option<String> {
    let asked = get(client, replica, "/metrics", MAX_METRICS_BYTES);
    match tokio::time::timeout(options.timeout, asked).await {
        Ok(Some((StatusCode::OK, body))) => Some(String::from_utf8_lossy(&body).into_owned()),
        _ => None,
    }
}

async fn get(client: &Client, replica: &Replica, path: &str, limit: usize) -> Option<(StatusCode, Bytes)> {
    let request = Request::get(replica.address.uri(path)?).body(Full::default()).ok()?;
    let response = client.request(request).await.ok()?;
    let status = response.status();
    let body = Limited::new(response.into_body(), limit).collect().await.ok()?;
    Some((status, body.to_bytes()))
}
