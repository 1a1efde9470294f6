use futures::StreamExt;
use serde_json::{Value, json};

use crate::util::{Server, greedy};

const ABORTED: &str = "servelab_request_success_total{finished_reason=\"abort\",model_name=\"demo\"}";

/// So much work that it cannot be done before the client is gone.
fn long_request() -> Value {
    let mut body = greedy("The scheduler", 1500);
    body["n"] = json!(16);
    body["temperature"] = json!(1);
    body
}

async fn running(server: &Server) -> usize {
    server.engine_state().await["running"].as_array().unwrap().len()
}

#[tokio::test]
async fn a_stream_that_is_closed_frees_its_blocks() {
    let server = Server::start(&[]).await;
    let mut stream = server.open_stream("/v1/completions", &long_request()).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    assert!(running(&server).await > 0);
    drop(stream);
    server.until_idle().await;
    assert_eq!(server.metric(ABORTED).await, Some(1.0), "it was given up, not finished");
}

#[tokio::test]
async fn a_client_that_waits_for_the_whole_answer_and_goes_away_frees_its_blocks() {
    let server = Server::start(&[]).await;
    let request = server.client.post(server.url("/v1/completions")).json(&long_request()).send();
    let waiting = tokio::spawn(request);
    server.until("running", async || running(&server).await > 0).await;
    waiting.abort();
    server.until_idle().await;
    assert_eq!(server.metric(ABORTED).await, Some(1.0), "it was given up, not finished");
}

#[tokio::test]
async fn a_client_that_goes_away_in_the_queue_leaves_it() {
    let server = Server::start(&["--max-running", "16", "--kv-blocks", "2000"]).await;
    let mut stream = server.open_stream("/v1/completions", &long_request()).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    let request = server.client.post(server.url("/v1/completions")).json(&greedy("Hello", 8));
    let queued = tokio::spawn(request.header("x-request-id", "queued").send());
    let waits = async || {
        let state = server.engine_state().await;
        state["waiting"].as_array().unwrap().iter().any(|sequence| sequence["request_id"] == "queued")
    };
    server.until("waiting", waits).await;
    queued.abort();
    server.until("out of the queue", async || !waits().await).await;
    assert!(running(&server).await > 0, "the other one goes on");
}

#[tokio::test]
async fn a_reader_that_does_not_read_slows_only_itself() {
    let server = Server::start(&[]).await;
    let slow = server.open_stream("/v1/completions", &long_request()).await;
    for _ in 0..3 {
        assert!(!server.complete("Hello", 8).await.is_empty());
    }
    drop(slow);
    server.until_idle().await;
}
