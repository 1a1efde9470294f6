//! Status, headers and body pass as they are.

use futures::StreamExt;
use serde_json::Value;

use crate::util::{Backend, Behaviour, PATIENCE, Routed, until};

#[tokio::test]
async fn an_answer_passes_unchanged() {
    let backend = Backend::start(Behaviour::Answer);
    let routed = Routed::before(&[&backend]).await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = routed.ask(false).header("x-request-id", "r-1").header("traceparent", traceparent);
    let answer = request.header("authorization", "Bearer mine").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["x-request-id"]), (200, &"r-1".parse().unwrap()));
    assert_eq!(answer.headers()["x-backend"], backend.name());
    assert!(!answer.headers().contains_key("x-servelab-decision"), "only for those who ask");
    assert_eq!(answer.json::<Value>().await.unwrap()["choices"][0]["text"], "yes");
    let headers = backend.headers();
    assert_eq!((&headers["x-request-id"], &headers["traceparent"]), (&"r-1".into(), &traceparent.into()));
    assert_eq!(
        (&headers["authorization"], &headers["host"]),
        (&"Bearer mine".into(), &backend.address.to_string().into())
    );
}

#[tokio::test]
async fn an_error_of_the_replica_is_the_clients() {
    let backend = Backend::start(Behaviour::Status(400));
    let routed = Routed::before(&[&backend]).await;
    for streams in [false, true] {
        let answer = routed.ask(streams).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 400);
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["message"], "as the test says");
    }
    assert_eq!(backend.came(), 2, "it is not tried again");
}

#[tokio::test]
async fn a_stream_passes_byte_for_byte_and_as_it_comes() {
    let backend = Backend::start(Behaviour::Answer);
    let routed = Routed::before(&[&backend]).await;
    let answer = routed.ask(true).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let expected =
        "data: {\"n\":0}\n\ndata: {\"n\":1}\n\ndata: {\"n\":2}\n\ndata: {\"n\":3}\n\ndata: [DONE]\n\n";
    assert_eq!(answer.text().await.unwrap(), expected);
    backend.behave(Behaviour::Stall);
    let mut pieces = routed.ask(true).send().await.unwrap().bytes_stream();
    let mut text = Vec::new();
    while !text.ends_with(b"data: {\"n\":1}\n\n") {
        text.extend(tokio::time::timeout(PATIENCE, pieces.next()).await.unwrap().unwrap().unwrap());
    }
}

#[tokio::test]
async fn who_asks_is_told_the_decision_and_the_last_ones_are_kept() {
    let (one, other) = (Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer));
    let routed = Routed::before(&[&one, &other]).await;
    let request = routed.ask(false).header("x-request-id", "asked").header("x-servelab-decision", "1");
    let answer = request.send().await.unwrap();
    let decision = answer.headers()["x-servelab-decision"].to_str().unwrap().to_owned();
    let backend = answer.headers()["x-backend"].to_str().unwrap();
    assert!(
        decision.starts_with(&format!("replica=http://127.0.0.1:{backend}; policy=cost; ")),
        "{decision}"
    );
    let kept: Value = routed.get("/decisions?limit=1").send().await.unwrap().json().await.unwrap();
    assert_eq!(kept["decisions"][0]["request_id"], "asked");
    assert_eq!(kept["decisions"][0]["table"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn fault_4_a_client_that_leaves_frees_its_request_at_the_replica_at_once() {
    let backend = Backend::start(Behaviour::Hang);
    let routed = Routed::before(&[&backend]).await;
    for (streams, behaviour) in [(false, Behaviour::Hang), (true, Behaviour::Hang), (true, Behaviour::Stall)]
    {
        backend.behave(behaviour);
        let asked = tokio::spawn({
            let request = routed.ask(streams);
            async move {
                let answer = request.send().await.unwrap();
                answer.text().await.unwrap()
            }
        });
        until(async || backend.inside() == 1).await;
        asked.abort();
        until(async || backend.inside() == 0).await;
    }
    until(async || routed.metric("servelab_router_requests_in_flight").await == 0.0).await;
    assert_eq!(routed.metric("servelab_router_requests_total{outcome=\"left\"}").await, 3.0);
    let replicas: Value = routed.get("/replicas").send().await.unwrap().json().await.unwrap();
    assert_eq!(replicas["replicas"][0]["in_flight"], 0);
}

#[tokio::test]
async fn fault_6_a_slow_client_slows_its_own_stream_and_fills_nobodys_memory() {
    let backend = Backend::start(Behaviour::Endless);
    let routed = Routed::before(&[&backend]).await;
    let unread = routed.ask(true).send().await.unwrap();
    let before = std::cell::Cell::new(usize::MAX);
    // What the sockets hold is a few megabytes; then nothing moves.
    until(async || {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        before.replace(backend.sent()) == backend.sent()
    })
    .await;
    assert!(backend.sent() < 64 << 20, "{} bytes were taken from the replica", backend.sent());
    backend.behave(Behaviour::Answer);
    assert_eq!(routed.ask(false).send().await.unwrap().status().as_u16(), 200);
    drop(unread);
    until(async || backend.inside() == 0).await;
}

#[tokio::test]
async fn other_routes_are_the_replicas() {
    let backend = Backend::start(Behaviour::Answer);
    let routed = Routed::before(&[&backend]).await;
    let answer = routed.get("/v1/models?x=1").send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["x-backend"].to_str().unwrap()),
        (200, backend.name())
    );
}
