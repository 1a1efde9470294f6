//! The router hears from real replicas what they hold.

use std::net::TcpListener;

use serde_json::{Value, json};

use crate::util::{Server, servelab};

const REPLICA: &[&str] =
    &["--threads", "1", "--kv-blocks", "40", "--max-model-len", "256", "--max-running", "4"];

async fn router(replica: &Server, flags: &[&str]) -> Server {
    let mut command =
        servelab(&["route", "--port", "0", "--health-interval", "100ms", "--replica", &replica.base]);
    command.args(flags);
    let router = Server::spawn(command);
    router.wait_until_ready().await;
    let is_known = |seen: &Value| seen["kv_events"] == "precise" && seen["parity"] == "kept";
    until_seen(&router, "precise, and in its own tokens", is_known).await;
    router
}

async fn until_seen(router: &Server, what: &str, is: impl Fn(&Value) -> bool) {
    let seen = async || {
        let all: Value = serde_json::from_str(&router.get("/replicas").await.1).unwrap();
        is(&all["replicas"][0])
    };
    router.until(what, seen).await;
}

fn tokens(first: u32) -> Vec<u32> {
    (first..first + 128).collect()
}

fn body(first: u32) -> Value {
    json!({"prompt": tokens(first), "max_tokens": 1, "temperature": 0})
}

/// Sends a prompt through the router: what the router believed to be there, and what was.
async fn ask(router: &Server, first: u32) -> (u64, u64) {
    let answer = router.ok("/v1/completions", &body(first)).await;
    let decisions: Value = serde_json::from_str(&router.get("/decisions?limit=1").await.1).unwrap();
    let believed = decisions["decisions"][0]["matched_tokens"].as_u64().unwrap();
    (believed, answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0))
}

fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// A prompt that the router has never seen, an eviction that it did not cause, and a reset.
async fn hears_everything(replica: &Server, router: &Server, next: u32) {
    let (believed, cached) = ask(router, 0).await;
    assert_eq!((believed, cached), (112, 112), "one token is always computed, and with it its block");
    // Behind the router's back, until the first prompt has gone.
    for number in 0..6 {
        replica.ok("/v1/completions", &body(next + 200 * number)).await;
    }
    let batches = async || {
        let all: Value = serde_json::from_str(&router.get("/replicas").await.1).unwrap();
        all["replicas"][0]["kv_batches"].as_u64().unwrap()
    };
    router.until("all of them are heard", async || batches().await >= 6).await;
    let (believed, cached) = ask(router, 0).await;
    assert_eq!(believed, cached, "what was evicted is not believed to be there");
    let heard = batches().await;
    replica.ok("/reset_prefix_cache", &json!({})).await;
    router.until("the reset is heard", async || batches().await > heard).await;
    assert_eq!(ask(router, next).await, (0, 0));
}

#[tokio::test]
async fn a_router_that_comes_late_knows_what_is_cached_and_hears_what_goes() {
    let replica = Server::start(REPLICA).await;
    replica.ok("/v1/completions", &body(0)).await;
    let router = router(&replica, &[]).await;
    hears_everything(&replica, &router, 1000).await;
}

#[tokio::test]
async fn the_same_over_zeromq_with_a_replay_of_what_was_before() {
    let (publish, replay) = (free_port(), free_port());
    let (to, from) = (format!("tcp://127.0.0.1:{publish}"), format!("tcp://127.0.0.1:{replay}"));
    let flags = ["--kv-events-zmq", to.as_str(), "--kv-events-replay", from.as_str()];
    let replica = Server::start(&[REPLICA, &flags[..]].concat()).await;
    replica.ok("/v1/completions", &body(0)).await;
    let flags = [
        "--kv-events",
        "zmq",
        "--kv-events-zmq-port",
        publish.as_str(),
        "--kv-events-replay-port",
        replay.as_str(),
    ];
    let router = router(&replica, &flags).await;
    hears_everything(&replica, &router, 1000).await;
}
