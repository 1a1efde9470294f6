//! What deploy/ tells the binary to do, done by the binary. The manifests around it are checked by tests/deploy.

use std::path::Path;

use serde_json::Value;

use crate::util::{Server, has_sent_its_load, run, servelab};

/// An API server that nobody is behind.
const NO_CLUSTER: &str = "
apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: 'http://127.0.0.1:1'}}]
contexts: [{name: none, context: {cluster: none, user: none, namespace: servelab}}]
users: [{name: none, user: {}}]
current-context: none
";

fn deploy() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy"))
}

fn config(folder: &str, file: &str) -> String {
    let path = deploy().join("kustomize").join(folder).join(file);
    path.to_str().unwrap().to_owned()
}

fn compose() -> Value {
    let path = deploy().join("compose.yaml");
    serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A command of the compose file with this machine's address in place of the container's.
fn command(value: &Value, replaced: &[(&str, &str)]) -> Vec<String> {
    let words = value.as_array().unwrap().iter().map(|word| word.as_str().unwrap());
    let replace = |word: &str| {
        let found = replaced.iter().find(|(old, _)| *old == word);
        found.map_or(word, |(_, new)| new).to_owned()
    };
    words.map(replace).collect()
}

#[tokio::test]
async fn a_replica_starts_with_the_settings_of_base_and_laptop() {
    for folder in ["base", "overlays/local", "overlays/sim"] {
        let server =
            Server::start(&["--config", &config(folder, "servelab.toml"), "--host", "127.0.0.1"]).await;
        assert_eq!(server.get("/ready").await.0, 200);
        assert!(!server.complete("Hello", 2).await.is_empty());
    }
}

/// Where there is no GPU and no weights, the settings are read all the same, and the folder is what is missed.
#[test]
fn the_settings_of_the_gpu_are_understood() {
    let path = config("overlays/gpu", "servelab.toml");
    let (code, _, errors) = run(servelab(&["serve", "--port", "0", "--device", "cpu", "--config", &path]));
    assert_ne!(code, 0);
    assert!(errors.contains("/models/current"), "{errors}");
    assert!(!errors.contains("servelab.toml"), "{errors}");
}

/// With the settings of each overlay and a cluster that does not answer, the router is ready and says that it has no
/// replica.
#[tokio::test]
async fn a_router_starts_with_the_settings_of_every_overlay() {
    for folder in ["base", "overlays/local", "overlays/gpu", "overlays/sim"] {
        let file = config(folder, "router.toml");
        let cluster = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(cluster.path(), NO_CLUSTER).unwrap();
        let kubeconfig = cluster.path().to_str().unwrap();
        let command =
            ["route", "--config", &file, "--host", "127.0.0.1", "--port", "0", "--kubeconfig", kubeconfig];
        let router = Server::spawn(servelab(&command));
        router.wait_until_ready().await;
        let (_, text) = router.get("/ready").await;
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["replicas_ready"], 0, "{text}");
    }
}

#[tokio::test]
async fn the_commands_of_the_compose_file_work_together() {
    let compose = compose();
    let serve = command(&compose["x-replica"]["command"], &[("0.0.0.0", "127.0.0.1")]);
    assert_eq!(serve[0], "serve");
    let flags: Vec<&str> = serve[1..].iter().map(String::as_str).collect();
    let (one, two) = tokio::join!(Server::start(&flags), Server::start(&flags));
    let replaced = [
        ("--host=0.0.0.0", "--port=0"),
        ("--replica=http://replica-1:8000", &format!("--replica={}", one.base)),
        ("--replica=http://replica-2:8000", &format!("--replica={}", two.base)),
    ];
    let route = command(&compose["services"]["router"]["command"], &replaced);
    let router = Server::spawn(servelab(&route.iter().map(String::as_str).collect::<Vec<_>>()));
    router
        .until("both replicas are ready", async || {
            router.get("/ready").await.1.contains(r#""replicas_ready":2"#)
        })
        .await;
    let short = [("http://router:8080", router.base.as_str()), ("60s", "1s")];
    let load = command(&compose["services"]["load"]["command"], &short);
    assert!(load.contains(&router.base) && load.contains(&"1s".to_owned()), "{load:?}");
    let arguments: Vec<String> = load.into_iter().chain(["--quiet".to_owned()]).collect();
    let (code, out, errors) = tokio::task::spawn_blocking(move || {
        run(servelab(&arguments.iter().map(String::as_str).collect::<Vec<_>>()))
    })
    .await
    .unwrap();
    assert!(has_sent_its_load(code, &errors), "{out}\n{errors}");
    for replica in [&one, &two] {
        let served = replica.metric("servelab_generation_tokens_total{model_name=\"demo\"}").await;
        assert!(served > Some(0.0), "the router left one out: {served:?}");
    }
}
