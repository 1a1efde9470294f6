//! An API server of Kubernetes, as far as EndpointSlices go: lists, watches from a version on, bookmarks, and the
//! failures that real ones have. Objects are those of `k8s-openapi`.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::stream;
use http::{HeaderMap, StatusCode};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub const NAMESPACE: &str = "serving";
pub const SERVICE: &str = "servelab";

/// How requests fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trouble {
    #[default]
    None,
    /// Every request gets this status.
    Status(u16),
    /// Lists and watches say what is no JSON.
    Garbage,
}

#[derive(Default)]
struct Cluster {
    slices: BTreeMap<String, Value>,
    version: u64,
    /// What happened, by version; versions up to `forgotten` are not there any more.
    events: Vec<(u64, Value)>,
    forgotten: u64,
    trouble: Trouble,
    lists: usize,
    watches: usize,
    /// The last request's token.
    token: String,
}

struct Shared {
    cluster: Mutex<Cluster>,
    /// Moves with every change; watches that were made before the last cut end.
    changes: watch::Sender<u64>,
    cuts: watch::Sender<u64>,
}

pub struct KubernetesApi {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl KubernetesApi {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            cluster: Mutex::new(Cluster { version: 10, ..Cluster::default() }),
            changes: watch::Sender::new(0),
            cuts: watch::Sender::new(0),
        });
        let path = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices";
        let router = Router::new().route(path, get(serve)).with_state(shared.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared, task }
    }

    /// A kubeconfig that leads here, with a token and a namespace.
    pub fn write_kubeconfig(&self, path: &Path) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {"token": "a-token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        });
        std::fs::write(path, config.to_string()).unwrap();
    }

    fn cluster<T>(&self, with: impl FnOnce(&mut Cluster) -> T) -> T {
        let out = with(&mut self.shared.cluster.lock().unwrap());
        self.shared.changes.send_modify(|count| *count += 1);
        out
    }

    /// Writes a slice of the service: endpoints by address, port and conditions, each a pod of its own.
    pub fn put(&self, name: &str, endpoints: &[(SocketAddr, Value)]) {
        let port = endpoints.first().map_or(8000, |(address, _)| address.port());
        let list: Vec<Value> = endpoints
            .iter()
            .map(|(address, conditions)| {
                assert_eq!(address.port(), port, "a slice has one port for all of its pods");
                json!({
                    "addresses": [address.ip().to_string()], "conditions": conditions,
                    "targetRef": {"kind": "Pod", "name": address.to_string(), "uid": address.to_string()},
                })
            })
            .collect();
        let is_v6 = endpoints.first().is_some_and(|(address, _)| address.is_ipv6());
        self.cluster(|cluster| {
            cluster.version += 1;
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": name, "namespace": NAMESPACE, "resourceVersion": cluster.version.to_string(),
                    "labels": {"kubernetes.io/service-name": SERVICE},
                },
                "addressType": if is_v6 { "IPv6" } else { "IPv4" },
                "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
                "endpoints": list,
            });
            // As the real types have it, and no other way.
            let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
            let slice = serde_json::to_value(slice).unwrap();
            let kind = if cluster.slices.contains_key(name) { "MODIFIED" } else { "ADDED" };
            cluster.events.push((cluster.version, json!({"type": kind, "object": slice})));
            cluster.slices.insert(name.to_owned(), slice);
        });
    }

    pub fn delete(&self, name: &str) {
        self.cluster(|cluster| {
            cluster.version += 1;
            let mut slice = cluster.slices.remove(name).unwrap();
            slice["metadata"]["resourceVersion"] = cluster.version.to_string().into();
            cluster.events.push((cluster.version, json!({"type": "DELETED", "object": slice})));
        });
    }

    pub fn trouble(&self, trouble: Trouble) {
        self.cluster(|cluster| cluster.trouble = trouble);
        self.cut();
    }

    /// The connection of every watch breaks.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|count| *count += 1);
    }

    /// Every watch breaks, and what happened so far cannot be watched any more: 410 Gone.
    pub fn forget(&self) {
        self.cluster(|cluster| {
            cluster.version += 1;
            cluster.forgotten = cluster.version;
            cluster.events.clear();
        });
        self.cut();
    }

    pub fn lists(&self) -> usize {
        self.shared.cluster.lock().unwrap().lists
    }

    pub fn watches(&self) -> usize {
        self.shared.cluster.lock().unwrap().watches
    }

    pub fn token(&self) -> String {
        self.shared.cluster.lock().unwrap().token.clone()
    }
}

impl Drop for KubernetesApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    State(shared): State<Arc<Shared>>,
    UrlPath(namespace): UrlPath<String>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    assert_eq!(namespace, NAMESPACE);
    assert_eq!(query["labelSelector"], format!("kubernetes.io/service-name={SERVICE}"));
    let watches = query.get("watch").is_some_and(|value| value == "true");
    let trouble = {
        let mut cluster = shared.cluster.lock().unwrap();
        cluster.token = headers["authorization"].to_str().unwrap().to_owned();
        if watches {
            cluster.watches += 1
        } else {
            cluster.lists += 1
        }
        cluster.trouble
    };
    match trouble {
        Trouble::Status(code) => {
            (StatusCode::from_u16(code).unwrap(), axum::Json(status(code))).into_response()
        }
        Trouble::Garbage => "<html>not what you expect</html>\n".into_response(),
        Trouble::None if watches => watch_from(shared, query["resourceVersion"].parse().unwrap()),
        Trouble::None => {
            let cluster = shared.cluster.lock().unwrap();
            let list = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList",
                "metadata": {"resourceVersion": cluster.version.to_string()},
                "items": cluster.slices.values().collect::<Vec<_>>(),
            });
            axum::Json(list).into_response()
        }
    }
}

fn status(code: u16) -> Value {
    let reason = if code == 410 { "Expired" } else { "Forbidden" };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "as the test says",
        "reason": reason, "code": code,
    })
}

struct Watch {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
    cuts: watch::Receiver<u64>,
    seen: u64,
}

/// What happened after that version, then what happens, with bookmarks in between, until the watch is cut.
fn watch_from(shared: Arc<Shared>, seen: u64) -> Response {
    let forgotten = shared.cluster.lock().unwrap().forgotten;
    if seen < forgotten {
        let gone = json!({"type": "ERROR", "object": status(410)});
        return format!("{gone}\n").into_response();
    }
    let (changes, cuts) = (shared.changes.subscribe(), shared.cuts.subscribe());
    let lines = stream::unfold(Watch { shared, changes, cuts, seen }, async |mut watch| {
        loop {
            if watch.cuts.has_changed().unwrap() {
                watch.cuts.mark_unchanged();
                return Some((Err(io::Error::other("cut")), watch));
            }
            let (events, version) = {
                let cluster = watch.shared.cluster.lock().unwrap();
                let new = cluster.events.iter().filter(|(version, _)| *version > watch.seen);
                (new.map(|(_, event)| format!("{event}\n")).collect::<String>(), cluster.version)
            };
            watch.seen = watch.seen.max(version);
            if !events.is_empty() {
                return Some((Ok(events), watch));
            }
            let quiet = tokio::time::sleep(Duration::from_millis(200));
            let is_quiet = tokio::select! {
                _ = watch.changes.changed() => false,
                changed = watch.cuts.changed() => {
                    changed.unwrap();
                    watch.cuts.mark_changed();
                    continue;
                }
                () = quiet => true,
            };
            if is_quiet {
                let version = watch.seen.to_string();
                let object = json!({
                    "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "", "endpoints": [],
                    "metadata": {"resourceVersion": version},
                });
                return Some((Ok(format!("{}\n", json!({"type": "BOOKMARK", "object": object}))), watch));
            }
        }
    });
    Response::new(Body::from_stream(lines))
}
