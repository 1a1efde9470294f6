//! Loading, draining, failing.

use std::time::Duration;

use serde_json::{Value, json};
use servelab_engine::RunnerError;
use servelab_server::ServeError;
use servelab_telemetry::FinishedReason;

use crate::harness::{Replica, chat, events, streamed_text};

const CHAT: &str = "/v1/chat/completions";

async fn until_running(replica: &Replica) {
    replica.until("/state", |answer| answer.json()["engine"]["running"] != json!([])).await;
}

#[tokio::test]
async fn a_replica_answers_while_it_loads() {
    let (load, wait) = std::sync::mpsc::channel();
    let replica = Replica::loading(|setup| setup.load_after = Some(wait)).await;
    assert_eq!(replica.get("/live").await.status, 200);
    assert_eq!(replica.get("/metrics").await.status, 200);
    for path in ["/ready", "/health"] {
        let answer = replica.get(path).await;
        assert_eq!((answer.status, answer.json()), (503, json!({"status": "loading"})));
    }
    let early = replica.post(CHAT, &chat(json!({}))).await;
    assert_eq!((early.status, &early.error()["code"]), (503, &json!("model_loading")));
    assert!(early.header("retry-after").is_some());
    assert_eq!(replica.get("/v1/models").await.status, 503);
    let state = replica.get("/state").await.json();
    assert_eq!((&state["phase"], state.get("engine")), (&json!("loading"), None));
    load.send(()).unwrap();
    replica.until("/ready", |answer| answer.status == 200).await;
    assert_eq!(replica.post(CHAT, &chat(json!({}))).await.status, 200);
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_server() {
    let replica = Replica::loading(|setup| setup.load_error = Some("no such folder")).await;
    let error = replica.ended().await.unwrap_err();
    assert_eq!(error.to_string(), "cannot load the model: no such folder");
    let replica = Replica::loading(|setup| setup.engine.block_size = 17).await;
    assert!(matches!(replica.ended().await, Err(ServeError::Engine(_))));
}

#[tokio::test]
async fn a_signal_while_loading_ends_it_at_once() {
    let (_load, wait) = std::sync::mpsc::channel();
    let mut replica = Replica::loading(|setup| setup.load_after = Some(wait)).await;
    replica.signal();
    replica.ended().await.unwrap();
}

#[tokio::test]
async fn running_requests_finish_while_the_replica_drains() {
    let mut replica = Replica::with(|setup| setup.step_time = Duration::from_millis(1)).await;
    let stream = replica.posting(CHAT, &chat(json!({"max_tokens": 400, "stream": true})));
    let whole = replica.posting(CHAT, &chat(json!({"max_tokens": 400})));
    until_running(&replica).await;
    replica.signal();
    let ready = replica.until("/ready", |answer| answer.status == 503).await;
    assert_eq!(ready.json(), json!({"status": "draining"}));
    assert_eq!(replica.get("/live").await.status, 200);
    let late = replica.post(CHAT, &chat(json!({}))).await;
    assert_eq!((late.status, &late.error()["code"]), (503, &json!("shutting_down")));
    assert!(!stream.is_finished());
    let stream = stream.await.unwrap();
    assert_eq!(events(&stream.text).last().map(String::as_str), Some("[DONE]"));
    assert!(streamed_text(&stream.text).starts_with("Hello wörld. Hello wörld. "));
    assert_eq!(whole.await.unwrap().json()["usage"]["completion_tokens"], 400);
    replica.ended().await.unwrap();
}

#[tokio::test]
async fn what_is_not_done_when_the_time_is_over_ends_with_an_error() {
    let mut replica = Replica::with(|setup| {
        setup.step_time = Duration::from_millis(5);
        setup.drain_timeout = Duration::from_millis(50);
    })
    .await;
    let stream = replica.posting(CHAT, &chat(json!({"max_tokens": 4000, "stream": true})));
    let stopped = replica.posting(CHAT, &chat(json!({"max_tokens": 4000, "stream": true, "stop": "never"})));
    let whole = replica.posting(CHAT, &chat(json!({"max_tokens": 4000})));
    replica.until("/state", |answer| answer.json()["engine"]["running"].as_array().unwrap().len() == 3).await;
    replica.signal();
    for stream in [stream, stopped] {
        let stream = stream.await.unwrap();
        let last: Value = serde_json::from_str(events(&stream.text).last().unwrap()).unwrap();
        assert_eq!((stream.status, &last["error"]["code"]), (200, &json!("shutting_down")), "{last}");
    }
    let whole = whole.await.unwrap();
    assert_eq!((whole.status, &whole.error()["code"]), (503, &json!("shutting_down")));
    let metrics = replica.metrics.clone();
    replica.ended().await.unwrap();
    assert_eq!(metrics.request_success.of(FinishedReason::Abort).get(), 3);
}

#[tokio::test]
async fn a_step_that_hangs_does_not_keep_the_process() {
    let mut replica = Replica::with(|setup| setup.drain_timeout = Duration::from_millis(50)).await;
    replica.control.pause();
    let stream = replica.posting(CHAT, &chat(json!({"stream": true, "max_tokens": 4000})));
    tokio::time::sleep(Duration::from_millis(50)).await;
    replica.signal();
    assert_eq!(stream.await.unwrap().text.matches("shutting_down").count(), 1);
    let control = replica.control.clone();
    replica.ended().await.unwrap();
    control.resume();
}

#[tokio::test]
async fn a_step_that_fails_ends_its_requests_and_nothing_else() {
    let replica = Replica::start().await;
    replica.control.fail(RunnerError::Step("out of luck".into()));
    let answer = replica.post(CHAT, &chat(json!({}))).await;
    assert_eq!((answer.status, &answer.error()["code"]), (500, &json!("model_failed")));
    assert!(!answer.text.contains("out of luck"), "the runner's words are for the log");
    replica.control.fail(RunnerError::Step("again".into()));
    let stream = replica.post(CHAT, &chat(json!({"stream": true}))).await;
    let last: Value = serde_json::from_str(events(&stream.text).last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{}", stream.text);
    assert_eq!(replica.post(CHAT, &chat(json!({}))).await.status, 200);
    assert_eq!(replica.metrics.request_success.of(FinishedReason::Error).get(), 2);
    replica.until_idle().await;
}

#[tokio::test]
async fn a_lost_device_ends_the_server_with_an_error() {
    for panics in [false, true] {
        let replica = Replica::with(|setup| setup.step_time = Duration::from_millis(1)).await;
        let stream = replica.posting(CHAT, &chat(json!({"max_tokens": 4000, "stream": true})));
        let whole = replica.posting(CHAT, &chat(json!({"max_tokens": 4000})));
        replica
            .until("/state", |answer| answer.json()["engine"]["running"].as_array().unwrap().len() == 2)
            .await;
        match panics {
            false => replica.control.fail(RunnerError::Fatal("device lost".into())),
            true => replica.control.panic(),
        }
        let stream = stream.await.unwrap();
        let last: Value = serde_json::from_str(events(&stream.text).last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "model_failed", "{last}");
        let whole = whole.await.unwrap();
        assert!(whole.status >= 500 && whole.error()["code"] == "model_failed", "{whole:?}");
        assert!(matches!(replica.ended().await, Err(ServeError::Runner(_))));
    }
}

#[tokio::test]
async fn an_engine_that_hangs_is_noticed() {
    let replica = Replica::with(|setup| setup.stall_timeout = Duration::from_millis(100)).await;
    assert_eq!(replica.get("/live").await.status, 200, "idle is not stalled");
    replica.control.pause();
    let stuck = replica.posting(CHAT, &chat(json!({})));
    for path in ["/live", "/ready", "/health"] {
        let answer = replica.until(path, |answer| answer.status == 503).await;
        assert_eq!(answer.json(), json!({"status": "stalled"}));
    }
    replica.control.resume();
    assert_eq!(stuck.await.unwrap().status, 200);
    replica.until("/live", |answer| answer.status == 200).await;
    replica.until("/ready", |answer| answer.status == 200).await;
}
