//! Keys and what they may use, answers given twice, and the administrator's routes.

use serde_json::{Value, json};
use servelab_router::ClientKey;
use servelab_router::limits::KeyLimits;
use servelab_telemetry::Secret;

use crate::util::{Backend, Behaviour, Routed, options, until};

fn key(secret: &str, requests_per_minute: Option<u64>, tokens_per_minute: Option<u64>) -> ClientKey {
    ClientKey { secret: Secret::new(secret), limits: KeyLimits { requests_per_minute, tokens_per_minute } }
}

#[tokio::test]
async fn keys_open_and_each_has_its_own_limits() {
    let backend = Backend::start(Behaviour::Answer);
    let mut options = options(&[&backend]);
    options.keys = vec![key("many", None, None), key("few", Some(2), Some(1000))];
    options.replica_key = Some(Secret::new("inner"));
    let routed = Routed::start(options, 1).await;
    let ask = async |key: &str| routed.ask(false).bearer_auth(key).send().await.unwrap();
    for answer in [routed.ask(false).send().await.unwrap(), ask("other").await] {
        assert_eq!(answer.status().as_u16(), 401);
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "invalid_api_key");
    }
    let answer = ask("few").await;
    assert_eq!(answer.headers()["x-ratelimit-remaining-requests"], "1");
    assert_eq!(backend.headers()["authorization"], "Bearer inner");
    let answer = ask("few").await;
    // Two answers used 25 tokens each, by the replica's count, whatever was reserved for them.
    assert_eq!(answer.headers()["x-ratelimit-limit-tokens"], "1000");
    let refused = ask("few").await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"30".parse().unwrap()));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "requests");
    assert_eq!(routed.metric("servelab_router_limited_total{limit=\"requests\"}").await, 1.0);
    for _ in 0..5 {
        let answer = ask("many").await;
        assert_eq!(answer.status().as_u16(), 200);
        assert!(!answer.headers().contains_key("x-ratelimit-limit-tokens"), "it has no limit");
    }
}

#[tokio::test]
async fn tokens_are_reserved_at_the_door_and_settled_by_what_was_used() {
    let backend = Backend::start(Behaviour::Answer);
    let mut options = options(&[&backend]);
    options.anonymous_limits.tokens_per_minute = Some(300);
    let routed = Routed::start(options, 1).await;
    let ask = async |max_tokens: u32| {
        let body = json!({"prompt": "x", "max_tokens": max_tokens});
        routed.client.post(format!("{}/v1/completions", routed.base)).json(&body).send().await.unwrap()
    };
    assert_eq!(ask(299).await.status().as_u16(), 200);
    let answer = ask(270).await;
    assert_eq!(answer.status().as_u16(), 200, "only 25 of 300 were used");
    let refused = ask(5000).await;
    assert_eq!((refused.status().as_u16(), refused.headers().get("retry-after")), (429, None));
    let message = refused.json::<Value>().await.unwrap()["error"]["message"].to_string();
    assert!(message.contains("lower max_tokens"), "{message}");
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_answer_also_while_it_runs() {
    let backend = Backend::start(Behaviour::Hang);
    let routed = Routed::before(&[&backend]).await;
    let ask = || routed.ask(false).header("idempotency-key", "k-1").send();
    let gives_up = tokio::spawn(ask());
    until(async || backend.came() == 1).await;
    let waits = tokio::spawn(ask());
    until(async || routed.metric("servelab_router_requests_waiting").await == 1.0).await;
    backend.behave(Behaviour::Answer);
    gives_up.abort();
    let answer = waits.await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), backend.came()), (200, 2), "the one that waited ran it anew");
    let again = ask().await.unwrap();
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(again.json::<Value>().await.unwrap()["backend"], backend.name());
    assert_eq!(backend.came(), 2);
    let body = json!({"prompt": "another", "max_tokens": 10});
    let other = routed
        .client
        .post(format!("{}/v1/completions", routed.base))
        .header("idempotency-key", "k-1")
        .json(&body);
    assert_eq!(other.send().await.unwrap().status().as_u16(), 422);
}

#[tokio::test]
async fn more_than_the_replicas_should_have_waits_in_the_router() {
    let backend = Backend::start(Behaviour::Hang);
    let mut options = options(&[&backend]);
    (options.max_in_flight_per_replica, options.max_waiting) = (2, 1);
    let routed = Routed::start(options, 1).await;
    let asked: Vec<_> = (0..3).map(|_| tokio::spawn(routed.ask(false).send())).collect();
    until(async || routed.metric("servelab_router_requests_waiting").await == 1.0 && backend.inside() == 2)
        .await;
    let refused = routed.ask(false).send().await.unwrap();
    assert_eq!(refused.status().as_u16(), 429);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "queue_full");
    backend.behave(Behaviour::Answer);
    asked.iter().for_each(|asked| asked.abort());
    until(async || backend.inside() == 0).await;
    assert_eq!(routed.ask(false).send().await.unwrap().status().as_u16(), 200);
}

#[tokio::test]
async fn an_administrator_adds_and_removes_replicas_and_running_answers_end() {
    let (one, other) = (Backend::start(Behaviour::Stall), Backend::start(Behaviour::Answer));
    let mut options = options(&[&one]);
    options.admin_key = Some(Secret::new("admin"));
    let routed = Routed::start(options, 1).await;
    let url = format!("{}/replicas", routed.base);
    let post = |address: String| routed.client.post(&url).json(&json!({"url": address}));
    let address = format!("http://{}", other.address);
    assert_eq!(post(address.clone()).send().await.unwrap().status().as_u16(), 401);
    let streaming = routed.ask(true).send().await.unwrap();
    assert_eq!(post(address.clone()).bearer_auth("admin").send().await.unwrap().status().as_u16(), 201);
    let wrong = post("ftp://x".into()).bearer_auth("admin").send().await.unwrap();
    assert_eq!(wrong.status().as_u16(), 400);
    until(async || routed.health().await["replicas_ready"] == 2).await;
    let remove = routed
        .client
        .delete(&url)
        .bearer_auth("admin")
        .json(&json!({"url": format!("http://{}", one.address)}));
    assert_eq!(remove.send().await.unwrap().status().as_u16(), 200);
    for _ in 0..10 {
        assert_eq!(routed.ask(false).send().await.unwrap().headers()["x-backend"], other.name());
    }
    assert_eq!(one.inside(), 1, "its stream goes on");
    drop(streaming);
    until(async || one.inside() == 0).await;
    assert_eq!(routed.health().await["replicas"], 1);
}
