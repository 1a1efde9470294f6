//! Clients that go away, clients that do not read, and too many of them.

use std::time::Duration;

use serde_json::{Value, json};
use servelab_telemetry::FinishedReason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{Replica, Setup, chat, completion, events, streamed_text};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn slow(setup: &mut Setup) {
    setup.step_time = Duration::from_millis(1);
    setup.engine.max_running = 1;
}

/// Sends a request over a socket of its own, to be dropped at will.
async fn raw(replica: &Replica, path: &str, body: &Value) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(replica.address).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    stream
}

async fn until_running(replica: &Replica) {
    replica.until("/state", |answer| answer.json()["engine"]["running"] != json!([])).await;
}

fn aborted(replica: &Replica) -> u64 {
    replica.metrics.request_success.of(FinishedReason::Abort).get()
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_blocks() {
    let replica = Replica::with(slow).await;
    let bodies = [
        (CHAT, chat(json!({"max_tokens": 4000}))),
        (CHAT, chat(json!({"max_tokens": 4000, "stream": true}))),
        (CHAT, chat(json!({"max_tokens": 4000, "stream": true, "stop": "never said"}))),
        (COMPLETIONS, completion(json!({"max_tokens": 4000}))),
        (COMPLETIONS, completion(json!({"max_tokens": 4000, "prompt": ["a", "b", "c"], "stream": true}))),
    ];
    let mut expected = 0;
    for (path, body) in bodies {
        let before = replica.control.steps();
        let client = raw(&replica, path, &body).await;
        until_running(&replica).await;
        drop(client);
        replica.until_idle().await;
        assert!(replica.control.steps() - before < 4000, "{body}: it was computed to its end");
        expected += body["prompt"].as_array().map_or(1, |prompts| prompts.len() as u64);
        assert_eq!(aborted(&replica), expected, "{body}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_the_queue() {
    let replica = Replica::with(slow).await;
    let running = replica.posting(CHAT, &chat(json!({"max_tokens": 1500})));
    until_running(&replica).await;
    let queued = raw(&replica, CHAT, &chat(json!({"max_tokens": 1500, "stream": true}))).await;
    let waiting = |count: usize| {
        replica.until("/state", move |answer| {
            answer.json()["engine"]["waiting"].as_array().unwrap().len() == count
        })
    };
    waiting(1).await;
    drop(queued);
    waiting(0).await;
    assert_eq!(aborted(&replica), 1);
    assert!(!running.is_finished());
    assert_eq!(running.await.unwrap().json()["usage"]["completion_tokens"], 1500);
}

#[tokio::test]
async fn a_slow_reader_slows_only_itself() {
    let replica = Replica::start().await;
    let more = json!({"max_tokens": 4000, "stream": true, "logprobs": true, "top_logprobs": 20});
    let mut slow = raw(&replica, CHAT, &chat(more)).await;
    // Megabytes wait for a client that has read nothing; the engine is done with it all the same.
    let finished = &replica.metrics.request_success;
    replica.until("/live", |_| finished.of(FinishedReason::Length).get() == 1).await;
    assert!(replica.control.steps() >= 4000);
    let quick = replica.post(CHAT, &chat(json!({"max_tokens": 50}))).await;
    assert_eq!(quick.json()["usage"]["completion_tokens"], 50);
    let mut text = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while !text.ends_with(b"\r\n0\r\n\r\n") {
        let read = slow.read(&mut buffer).await.unwrap();
        assert!(read > 0, "the server closed the connection");
        text.extend_from_slice(&buffer[..read]);
    }
    let finished = String::from_utf8_lossy(&text).matches("\"finish_reason\":\"length\"").count();
    assert_eq!(finished, 1);
    assert!(String::from_utf8_lossy(&text).contains("data: [DONE]"));
}

#[tokio::test]
async fn a_stop_string_stops_the_engine_though_nobody_reads() {
    let replica = Replica::with(|setup| {
        setup.step_time = Duration::from_millis(1);
        setup.script.resize(600, u32::from(b'x'));
        setup.script.extend([u32::from(b'Z'); 3]);
    })
    .await;
    let more =
        json!({"max_tokens": 4000, "stream": true, "stop": "ZZZ", "logprobs": true, "top_logprobs": 20});
    let client = raw(&replica, CHAT, &chat(more)).await;
    until_running(&replica).await;
    replica.until_idle().await;
    assert!(replica.control.steps() < 4000);
    assert_eq!(replica.metrics.request_success.of(FinishedReason::Stop).get(), 1);
    drop(client);
}

#[tokio::test]
async fn one_too_many() {
    let replica = Replica::with(|setup| {
        setup.engine.max_running = 1;
        setup.max_waiting = 1;
    })
    .await;
    replica.control.pause();
    let body = chat(json!({}));
    let mut all: Vec<_> = (0..3).map(|_| replica.posting(CHAT, &body)).collect();
    let (refused, at, _) = futures::future::select_all(&mut all).await;
    let refused = refused.unwrap();
    assert_eq!((refused.status, &refused.error()["type"]), (429, &json!("rate_limit_error")));
    assert_eq!(refused.error()["code"], "queue_full");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let ready = replica.get("/ready").await;
    assert_eq!(ready.status, 200, "a full queue is no reason to restart a replica");
    replica.control.resume();
    drop(all.remove(at));
    for answer in all {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    let later = replica.post(CHAT, &body).await;
    assert_eq!(later.status, 200, "the places are free again");
}

#[tokio::test]
async fn a_burst_within_the_bound_is_served() {
    let replica = Replica::with(|setup| setup.max_waiting = 100).await;
    let body = chat(json!({"max_tokens": 20, "stream": true}));
    let all: Vec<_> = (0..100).map(|_| replica.posting(CHAT, &body)).collect();
    for answer in all {
        let answer = answer.await.unwrap();
        assert_eq!(streamed_text(&answer.text), "Hello wörld. Hello ".chars().take(19).collect::<String>());
        assert_eq!(events(&answer.text).last().map(String::as_str), Some("[DONE]"));
    }
    replica.until_idle().await;
}
