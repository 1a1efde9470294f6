use futures::StreamExt;
use serde_json::json;

use crate::util::{Server, events, greedy};

#[tokio::test]
async fn running_requests_finish_after_sigterm() {
    let mut server = Server::start(&[]).await;
    let answer = server.open_stream("/v1/completions", &greedy("The queue", 300)).await;
    server.signal("TERM");
    server.until("told to drain", async || server.log().contains("asked to stop")).await;
    let events = events(answer).await;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert!(!events.iter().any(|event| event.contains("\"error\"")), "{:?}", events.last());
    let status = server.ended().await;
    assert_eq!(status.code(), Some(0), "{}", server.log());
}

#[tokio::test]
async fn what_does_not_finish_in_time_ends_with_an_error_event() {
    let mut server = Server::start(&["--drain-timeout", "0"]).await;
    let mut body = greedy("The queue", 1900);
    body["n"] = json!(8);
    let mut stream = server.open_stream("/v1/completions", &body).await.bytes_stream();
    let mut text = stream.next().await.unwrap().unwrap().to_vec();
    server.signal("TERM");
    while let Some(chunk) = stream.next().await {
        text.extend_from_slice(&chunk.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("\"error\""), "the client is told: {}", &text[text.len().saturating_sub(500)..]);
    assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
}

#[tokio::test]
async fn a_draining_server_is_not_ready_and_takes_nothing_new() {
    let mut server = Server::start(&[]).await;
    let mut body = greedy("The queue", 1900);
    body["n"] = json!(16);
    let mut stream = server.open_stream("/v1/completions", &body).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    server.signal("TERM");
    server.until("not ready", async || server.get("/ready").await.0 == 503).await;
    assert_eq!(server.get("/live").await.0, 200, "it lives until it has drained");
    let (status, answer) = server.post("/v1/completions", &greedy("Hello", 2)).await;
    assert_eq!(status, 503, "{answer}");
    drop(stream);
    assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
}

#[tokio::test]
async fn an_idle_server_ends_at_once() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&[]).await;
        server.signal(signal);
        assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
    }
}
