//! Replicas behind a service of Kubernetes, from its EndpointSlices: listed once, then watched, and listed anew every
//! few minutes. The router hears of a pod that ends before the pod does, which no name can tell.

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::Status;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config};
use rand::Rng;

use super::Members;
use super::endpoint_slices::{Slices, Unlisted};
use crate::options::KubernetesService;
use crate::replicas::address::Address;

/// How long the API server lets a watch run before it is renewed, in seconds. One that says nothing for a little longer
/// is given up, so that a connection that died without a word is noticed.
const WATCH_SECONDS: u32 = 60;
/// A list that was changed without a word is right again after that.
const RELIST: Duration = Duration::from_secs(600);
/// The pause after a failure; each further one waits twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long the API server may say nothing at all.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the API server cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    #[error("the kubeconfig {path}: {error}")]
    Kubeconfig { path: String, error: KubeconfigError },
    #[error(
        "there is neither a kubeconfig nor a service account of a pod ({0}); name one with --kubeconfig FILE"
    )]
    Nowhere(#[from] InferConfigError),
    #[error("the API server's client cannot be set up: {0}")]
    Client(#[from] kube::Error),
}

/// One service, and where to ask for it.
pub struct Watched {
    api: Api<EndpointSlice>,
    namespace: String,
    service: KubernetesService,
}

impl Watched {
    /// Finds the API server. Asks it nothing yet.
    ///
    /// # Errors
    /// If no cluster is configured here, or wrongly.
    pub async fn new(service: KubernetesService) -> Result<Self, KubernetesError> {
        let mut config = match &service.kubeconfig {
            None => Config::infer().await?,
            Some(path) => read(path).await?,
        };
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(SILENCE);
        let namespace = service.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let api = Api::namespaced(Client::try_from(config)?, &namespace);
        Ok(Self { api, namespace, service })
    }
}

async fn read(path: &Path) -> Result<Config, KubernetesError> {
    let wrong = |error| KubernetesError::Kubeconfig { path: path.display().to_string(), error };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)
}

/// Never returns. While the API server cannot be asked, the replicas stay.
pub async fn follow(members: &Members, number: usize, watched: &Watched) {
    let mut follower = Follower { members, number, watched, slices: Slices::default(), told: None };
    let mut failures = Failures::default();
    loop {
        let _ = tokio::time::timeout(RELIST, follower.watch(&mut failures)).await;
    }
}

struct Follower<'a> {
    members: &'a Members,
    number: usize,
    watched: &'a Watched,
    slices: Slices,
    /// What the last list left out, so that it is said once.
    told: Option<(BTreeSet<Address>, Unlisted)>,
}

impl Follower<'_> {
    async fn watch(&mut self, failures: &mut Failures) {
        let Watched { api, service, .. } = self.watched;
        let config = watcher::Config::default()
            .labels(&format!("kubernetes.io/service-name={}", service.name))
            .timeout(WATCH_SECONDS);
        let mut events = pin!(watcher(api.clone(), config));
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    // The beginning of a list says nothing of whether it will come.
                    if !matches!(event, Event::Init) {
                        failures.end();
                    }
                    if self.slices.apply(event) {
                        self.tell();
                    }
                }
                Err(error) => failures.pause(&self.watched.namespace, &service.name, &error).await,
            }
        }
    }

    fn tell(&mut self) {
        let now = self.slices.addresses(&self.watched.service.port);
        if self.told.as_ref() == Some(&now) {
            return;
        }
        let (addresses, unlisted) = &now;
        let service = &self.watched.service.name;
        if !unlisted.is_empty() && self.told.as_ref().map(|told| &told.1) != Some(unlisted) {
            tracing::warn!(service, port = %self.watched.service.port, "{unlisted}");
        }
        self.members.set(self.number, addresses.clone());
        self.told = Some(now);
    }
}

/// Failures in a row.
#[derive(Default)]
struct Failures {
    count: u32,
    /// What was said of them, so that each kind is said once.
    told: BTreeSet<&'static str>,
}

impl Failures {
    fn end(&mut self) {
        if !std::mem::take(self).told.is_empty() {
            tracing::info!("the API server answers again");
        }
    }

    /// One alone is usual: a watch ends, or is too old to go on.
    async fn pause(&mut self, namespace: &str, service: &str, error: &watcher::Error) {
        self.count = self.count.saturating_add(1);
        let status = status(error);
        let help = help(status);
        if self.count > 1 && self.told.insert(help) {
            // Its own text has all of the answer twice.
            let error = status.map_or_else(
                || error.to_string(),
                |status| format!("{} {}: {}", status.code, status.reason, status.message),
            );
            tracing::warn!(namespace, service, error, "the EndpointSlices cannot be followed; {help}");
        }
        let pause = (FIRST_PAUSE * 2_u32.pow((self.count - 1).min(16))).min(LONGEST_PAUSE);
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
    }
}

/// What the API server answered, if it did.
fn status(error: &watcher::Error) -> Option<&Status> {
    use kube::Error::Api;
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(Api(status))
        | WatchStartFailed(Api(status))
        | WatchFailed(Api(status))
        | WatchError(status) => Some(status),
        _ => None,
    }
}

fn help(status: Option<&Status>) -> &'static str {
    match status.map(|status| status.code) {
        Some(401) => {
            "the API server does not take this token or certificate: is it this cluster's, and not expired?"
        }
        Some(403) => "the service account needs list and watch on endpointslices of discovery.k8s.io there",
        Some(404) => "this API server has no discovery.k8s.io/v1, which came with Kubernetes 1.21",
        _ => "the replicas stay",
    }
}
