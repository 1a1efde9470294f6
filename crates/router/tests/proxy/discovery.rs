//! Replicas that come and go under load, for every place where they may be listed; and what happens when that place is
//! away or talks nonsense.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use servelab_router::{Dns, KubernetesService, Question, RouterOptions, Source};
use servelab_telemetry::Secret;
use tempfile::TempDir;

use crate::dns_server::DnsServer;
use crate::kubernetes_api::{KubernetesApi, SERVICE, Trouble};
use crate::util::{Backend, Behaviour, Routed, options, until};

const QUICK: Duration = Duration::from_millis(50);

fn from(source: Source) -> RouterOptions {
    RouterOptions { sources: vec![source], ..options(&[]) }
}

/// Requests that go on until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    /// Answers of each client.
    answered: Vec<Arc<AtomicUsize>>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(routed: &Routed) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let answered = Arc::new(AtomicUsize::new(0));
            let (stop, count, request) =
                (stop.clone(), answered.clone(), routed.ask(number.is_multiple_of(2)));
            let task = tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let answer = request.try_clone().unwrap().send().await.unwrap();
                    assert_eq!(answer.status().as_u16(), 200);
                    answer.bytes().await.unwrap();
                    count.fetch_add(1, Ordering::SeqCst);
                }
            });
            (answered, task)
        };
        let (answered, clients) = (0..4).map(client).unzip();
        Self { stop, answered, clients }
    }

    /// Waits until every client has that many more answers.
    async fn goes_on(&self, count: usize) {
        let now = || self.answered.iter().map(|answered| answered.load(Ordering::SeqCst));
        let before: Vec<usize> = now().collect();
        until(async || now().zip(&before).all(|(now, before)| now >= before + count)).await;
    }

    /// Stops, and fails if any request did.
    async fn ends(self) {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

async fn has_ready(routed: &Routed, count: u64) {
    let ready = async || {
        let health = routed.health().await;
        health["replicas"] == count && health["replicas_ready"] == count
    };
    until(ready).await;
}

/// One replica, a second one joins, the first one leaves, all under load: no request fails, and the one that left gets
/// nothing new.
async fn changes_under_load(
    options: RouterOptions,
    [first, second]: [&Backend; 2],
    list: impl AsyncFn(&Routed, &[&Backend]),
) {
    let routed = Routed::start(options, 0).await;
    list(&routed, &[first]).await;
    has_ready(&routed, 1).await;
    let load = Load::start(&routed);
    load.goes_on(5).await;
    list(&routed, &[first, second]).await;
    has_ready(&routed, 2).await;
    until(async || second.came() > 10).await;
    list(&routed, &[second]).await;
    has_ready(&routed, 1).await;
    // What was on its way there has ended once every client has two answers more.
    load.goes_on(2).await;
    let came = first.came();
    load.goes_on(10).await;
    assert_eq!(first.came(), came, "it has left");
    load.ends().await;
}

fn two() -> (Backend, Backend) {
    (Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer))
}

/// Two on one port, at different addresses of this machine.
fn two_on_one_port() -> (Backend, Backend, u16) {
    let first = Backend::on("127.0.0.1:0".parse().unwrap(), Behaviour::Answer);
    let port = first.address.port();
    (first, Backend::on(SocketAddr::new([127, 0, 0, 2].into(), port), Behaviour::Answer), port)
}

fn ips(backends: &[&Backend]) -> Vec<IpAddr> {
    backends.iter().map(|backend| backend.address.ip()).collect()
}

#[tokio::test]
async fn replicas_named_by_an_administrator_come_and_go_under_load() {
    let (first, second) = two();
    let options = RouterOptions { admin_key: Some(Secret::new("admin")), ..options(&[]) };
    changes_under_load(options, [&first, &second], async |routed, now| {
        let answer = routed.get("/replicas").send().await.unwrap().json::<Value>().await.unwrap();
        let url = |backend: &&Backend| format!("http://{}", backend.address);
        let wanted: BTreeSet<String> = now.iter().map(url).collect();
        let known = answer["replicas"].as_array().unwrap().iter();
        let known: BTreeSet<String> = known.map(|known| known["url"].as_str().unwrap().to_owned()).collect();
        let change = async |method: http::Method, url: &String| {
            let request = routed.client.request(method, format!("{}/replicas", routed.base));
            let answer = request.bearer_auth("admin").json(&json!({"url": url})).send().await.unwrap();
            assert!(answer.status().is_success());
        };
        for url in wanted.difference(&known) {
            change(http::Method::POST, url).await;
        }
        for url in known.difference(&wanted) {
            change(http::Method::DELETE, url).await;
        }
    })
    .await;
}

#[tokio::test]
async fn replicas_in_a_file_come_and_go_under_load() {
    let (first, second) = two();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("replicas");
    let list = async |_: &Routed, now: &[&Backend]| {
        let lines: String = now.iter().map(|backend| format!("{}\n", backend.address)).collect();
        std::fs::write(folder.path().join("new"), lines).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
    };
    changes_under_load(from(Source::File(path.clone())), [&first, &second], list).await;
}

#[tokio::test]
async fn replicas_behind_a_name_come_and_go_under_load() {
    let (first, second, port) = two_on_one_port();
    let server = DnsServer::start().await;
    let question = Question::Addresses { name: "fleet.test.".into(), port };
    let dns = Dns { question, server: Some(server.address), interval: QUICK };
    let list = async |_: &Routed, now: &[&Backend]| server.set_addresses("fleet.test.", &ips(now)).await;
    changes_under_load(from(Source::Dns(dns)), [&first, &second], list).await;
}

#[tokio::test]
async fn replicas_in_srv_records_come_and_go_under_load() {
    let (first, second) = two();
    let server = DnsServer::start().await;
    server.set_addresses("localhost.test.", &["127.0.0.1".parse().unwrap()]).await;
    let list = async |_: &Routed, now: &[&Backend]| {
        let service = |backend: &&Backend| (1, backend.address.port(), "localhost.test.");
        let mut services: Vec<_> = now.iter().map(service).collect();
        // The second choice, a host that is not there, and the one that says: no such service.
        services.extend([(2, 1, "localhost.test."), (1, 1, "gone.test."), (1, 1, ".")]);
        server.set_services("_http._tcp.fleet.test.", &services).await;
    };
    let question = Question::Services { name: "_http._tcp.fleet.test.".into() };
    let dns = Dns { question, server: Some(server.address), interval: QUICK };
    changes_under_load(from(Source::Dns(dns)), [&first, &second], list).await;
}

#[tokio::test]
async fn a_name_server_that_is_away_or_knows_nothing_changes_nothing() {
    let (first, _second, port) = two_on_one_port();
    let server = DnsServer::start().await;
    let (name, address) = ("fleet.test.", server.address);
    let question = Question::Addresses { name: name.into(), port };
    let dns = Dns { question, server: Some(address), interval: QUICK };
    server.set_addresses(name, &ips(&[&first])).await;
    let routed = Routed::start(from(Source::Dns(dns)), 1).await;
    server.set_addresses(name, &[]).await;
    tokio::time::sleep(10 * QUICK).await;
    server.stop().await;
    tokio::time::sleep(10 * QUICK).await;
    assert_eq!(routed.health().await["replicas_ready"], 1);
    let back = DnsServer::on(address).await;
    back.set_addresses(name, &["127.0.0.3".parse().unwrap()]).await;
    until(async || routed.health().await["replicas_ready"] == 0).await;
}

/// A cluster, and the way to it.
struct Cluster {
    api: KubernetesApi,
    kubeconfig: PathBuf,
    _folder: TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let api = KubernetesApi::start().await;
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("config");
        api.write_kubeconfig(&kubeconfig);
        Self { api, kubeconfig, _folder: folder }
    }

    fn source(&self, port: &str) -> Source {
        Source::Kubernetes(KubernetesService {
            namespace: None,
            name: SERVICE.to_owned(),
            port: port.parse().unwrap(),
            kubeconfig: Some(self.kubeconfig.clone()),
        })
    }
}

fn ready() -> Value {
    json!({"ready": true, "serving": true, "terminating": false})
}

fn ends() -> Value {
    json!({"ready": false, "serving": true, "terminating": true})
}

#[tokio::test]
async fn replicas_behind_a_service_of_kubernetes_come_and_go_under_load() {
    let (first, second, _) = two_on_one_port();
    let cluster = Cluster::start().await;
    let list = async |_: &Routed, now: &[&Backend]| {
        let endpoints: Vec<_> = now.iter().map(|backend| (backend.address, ready())).collect();
        cluster.api.put("servelab-abc", &endpoints);
    };
    changes_under_load(from(cluster.source("http")), [&first, &second], list).await;
    assert_eq!((cluster.api.lists(), cluster.api.token()), (1, "Bearer a-token".to_owned()));
}

/// Each on a port of its own, so in a slice of its own.
#[tokio::test]
async fn several_slices_are_one_service_of_both_address_families() {
    let (first, second) = (Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer));
    let third = Backend::on("[::1]:0".parse().unwrap(), Behaviour::Answer);
    let cluster = Cluster::start().await;
    cluster.api.put("a", &[(first.address, ready())]);
    cluster.api.put("b", &[(second.address, ready())]);
    let routed = Routed::start(from(cluster.source("http")), 2).await;
    cluster.api.put("c", &[(third.address, ready())]);
    has_ready(&routed, 3).await;
    cluster.api.delete("a");
    has_ready(&routed, 2).await;
    let load = Load::start(&routed);
    until(async || second.came() > 0 && third.came() > 0).await;
    load.ends().await;
    assert_eq!(first.came(), 0);
}

#[tokio::test]
async fn a_pod_that_ends_gets_nothing_new_and_finishes_what_it_has() {
    let (ending, other, _) = two_on_one_port();
    ending.behave(Behaviour::Stall);
    let cluster = Cluster::start().await;
    cluster.api.put("a", &[(ending.address, ready())]);
    let routed = Routed::start(from(cluster.source("http")), 1).await;
    let streaming = routed.ask(true).send().await.unwrap();
    cluster.api.put("a", &[(ending.address, ends()), (other.address, ready())]);
    until(async || routed.get("/replicas").send().await.unwrap().text().await.unwrap().contains("127.0.0.2"))
        .await;
    has_ready(&routed, 1).await;
    for _ in 0..10 {
        assert_eq!(routed.ask(false).send().await.unwrap().headers()["x-backend"], other.name());
    }
    assert_eq!((ending.came(), ending.inside()), (1, 1), "its stream goes on");
    drop(streaming);
    until(async || ending.inside() == 0).await;
}

/// Through each kind of trouble the replicas stay and requests are answered; when it is over, what changed is seen.
#[tokio::test]
async fn an_api_server_in_trouble_changes_nothing_and_is_followed_again() {
    let (first, second, _) = two_on_one_port();
    let cluster = Cluster::start().await;
    cluster.api.put("a", &[(first.address, ready())]);
    let routed = Routed::start(from(cluster.source("http")), 1).await;
    let load = Load::start(&routed);
    let troubles = [
        Trouble::Status(500),
        Trouble::Status(403),
        Trouble::Status(503),
        Trouble::Status(410),
        Trouble::Garbage,
    ];
    let mut only = [&first, &second].into_iter().cycle();
    for trouble in troubles {
        let asked = cluster.api.lists() + cluster.api.watches();
        cluster.api.trouble(trouble);
        until(async || cluster.api.lists() + cluster.api.watches() > asked + 1).await;
        load.goes_on(3).await;
        assert_eq!(routed.health().await["replicas_ready"], 1, "{trouble:?}");
        let now = only.next().unwrap();
        cluster.api.put("a", &[(now.address, ready())]);
        cluster.api.trouble(Trouble::None);
        let url = format!("http://{}", now.address);
        until(async || {
            let known = routed.get("/replicas").send().await.unwrap().json::<Value>().await.unwrap();
            known["replicas"].as_array().unwrap().iter().all(|replica| replica["url"] == *url)
        })
        .await;
        has_ready(&routed, 1).await;
    }
    load.ends().await;
}

#[tokio::test]
async fn broken_watches_go_on_and_forgotten_ones_list_anew() {
    let (first, second, _) = two_on_one_port();
    let cluster = Cluster::start().await;
    cluster.api.put("a", &[(first.address, ready())]);
    let routed = Routed::start(from(cluster.source("http")), 1).await;
    until(async || cluster.api.watches() == 1).await;
    cluster.api.cut();
    until(async || cluster.api.watches() >= 2).await;
    assert_eq!(cluster.api.lists(), 1, "it goes on where it was");
    cluster.api.put("a", &[(first.address, ready()), (second.address, ready())]);
    has_ready(&routed, 2).await;
    cluster.api.forget();
    until(async || cluster.api.lists() == 2).await;
    cluster.api.put("a", &[(second.address, ready())]);
    has_ready(&routed, 1).await;
}

#[tokio::test]
async fn without_a_cluster_the_router_says_what_to_give() {
    let source = |kubeconfig: PathBuf| {
        Source::Kubernetes(KubernetesService {
            namespace: None,
            name: SERVICE.to_owned(),
            port: "http".parse().unwrap(),
            kubeconfig: Some(kubeconfig),
        })
    };
    let error = servelab_router::Server::bind(from(source("/nowhere/config".into()))).await.err().unwrap();
    let error = error.to_string();
    assert!(error.contains("--replicas-kubernetes: the kubeconfig /nowhere/config: "), "{error}");
}
