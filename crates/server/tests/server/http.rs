//! Bodies, headers, routes and keys.

use serde_json::{Value, json};
use servelab_telemetry::Secret;

use crate::harness::{Answer, Replica, chat};

const CHAT: &str = "/v1/chat/completions";

async fn send(replica: &Replica, content_type: Option<&str>, body: Vec<u8>) -> Answer {
    let mut request = replica.request("POST", CHAT).body(body);
    if let Some(content_type) = content_type {
        request = request.header("content-type", content_type);
    }
    Answer::of(request.send().await.unwrap()).await
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let replica = Replica::start().await;
    let deep = [vec![b'['; 200_000], vec![b']'; 200_000]].concat();
    let deep_object = format!("{{\"messages\":{}1{}}}", "{\"a\":".repeat(50_000), "}".repeat(50_000));
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"{\"model\": \"by".to_vec(),
        b"{\"temperature\": NaN}".to_vec(),
        b"{\"temperature\": 1e999}".to_vec(),
        b"{\"temperature\": Infinity}".to_vec(),
        b"{} {}".to_vec(),
        b"\xff\xfe{}".to_vec(),
        b"{\"model\": \"\xc3\x28\"}".to_vec(),
        b"{\"model\": \"\\ud800\"}".to_vec(),
        deep,
        deep_object.into_bytes(),
    ];
    for body in bodies {
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        let answer = send(&replica, Some("application/json"), body).await;
        assert_eq!((answer.status, &answer.error()["code"]), (400, &json!("invalid_json")), "{start}");
    }
    for body in ["null", "[]", "\"x\"", "5", "true"] {
        let answer = send(&replica, Some("application/json"), body.into()).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(answer.error()["message"].as_str().unwrap().contains("JSON object"), "{body}");
    }
}

#[tokio::test]
async fn content_types() {
    let replica = Replica::start().await;
    let body = || chat(json!({})).to_string().into_bytes();
    for good in ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"] {
        assert_eq!(send(&replica, Some(good), body()).await.status, 200, "{good}");
    }
    for bad in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("json"), Some("")] {
        let answer = send(&replica, bad, body()).await;
        assert_eq!(answer.status, 415, "{bad:?}");
        assert!(answer.error()["message"].as_str().unwrap().contains("application/json"));
    }
}

#[tokio::test]
async fn bodies_that_are_too_large() {
    let replica = Replica::with(|setup| setup.max_body_bytes = 1000).await;
    let large = chat(json!({"messages": [{"role": "user", "content": "x".repeat(2000)}]})).to_string();
    let announced = send(&replica, Some("application/json"), large.clone().into_bytes()).await;
    assert_eq!((announced.status, &announced.error()["code"]), (413, &json!("body_too_large")));
    let pieces = futures::stream::iter(
        large
            .into_bytes()
            .chunks(100)
            .map(|piece| Ok::<_, std::io::Error>(piece.to_vec()))
            .collect::<Vec<_>>(),
    );
    let request = replica.request("POST", CHAT).header("content-type", "application/json");
    let chunked = request.body(reqwest::Body::wrap_stream(pieces)).send().await.unwrap();
    let chunked = Answer::of(chunked).await;
    assert_eq!((chunked.status, &chunked.error()["code"]), (413, &json!("body_too_large")));
    assert_eq!(replica.post(CHAT, &chat(json!({}))).await.status, 200);
}

#[tokio::test]
async fn routes_and_methods_that_do_not_exist() {
    let replica = Replica::start().await;
    for path in ["/", "/v1", "/v1/chat", "/v1/embeddings", "/v1/chat/completions/", "/%ff", "/..%2f"] {
        let answer = replica.get(path).await;
        assert_eq!((answer.status, &answer.error()["code"]), (404, &json!("not_found")), "{path}");
    }
    for (method, path) in [
        ("GET", CHAT),
        ("DELETE", CHAT),
        ("GET", "/v1/completions"),
        ("POST", "/v1/models"),
        ("POST", "/metrics"),
        ("PUT", "/ready"),
        ("GET", "/tokenize"),
        ("GET", "/reset_prefix_cache"),
    ] {
        let answer = Answer::of(replica.request(method, path).send().await.unwrap()).await;
        assert_eq!((answer.status, &answer.error()["code"]), (405, &json!("method_not_allowed")), "{path}");
        assert!(answer.header("allow").is_some(), "{method} {path}");
    }
}

#[tokio::test]
async fn request_ids() {
    let replica = Replica::start().await;
    let with = async |path: &str, id: &str| {
        let request = replica.request("GET", path).header("x-request-id", id);
        Answer::of(request.send().await.unwrap()).await.header("x-request-id").map(str::to_owned)
    };
    assert_eq!(with("/version", "req-7/a").await.as_deref(), Some("req-7/a"));
    assert_eq!(with("/no/such/route", "req-8").await.as_deref(), Some("req-8"), "on errors too");
    assert_eq!(with(CHAT, "req-9").await.as_deref(), Some("req-9"), "on wrong methods too");
    for insane in ["two words", "x".repeat(129).as_str(), "tab\there"] {
        let made = with("/version", insane).await.unwrap();
        assert!(made != insane && made.len() == 32, "{made}");
    }
    let first = replica.get("/version").await.header("x-request-id").unwrap().to_owned();
    assert_ne!(replica.get("/version").await.header("x-request-id"), Some(first.as_str()));
    let refused = replica.post(CHAT, &json!({})).await;
    assert!(refused.header("x-request-id").is_some());
}

#[tokio::test]
async fn keys() {
    let replica =
        Replica::with(|setup| setup.api_keys = vec![Secret::new("sk-1"), Secret::new("sk-2")]).await;
    let with = async |method: &str, path: &str, key: Option<&str>| {
        let mut request = replica.request(method, path).json(&chat(json!({})));
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        Answer::of(request.send().await.unwrap()).await
    };
    for key in [None, Some("Bearer sk-3"), Some("sk-1"), Some("Bearer"), Some("Basic sk-1")] {
        for (method, path) in [
            ("POST", CHAT),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/bytes"),
            ("POST", "/reset_prefix_cache"),
            ("POST", "/tokenize"),
        ] {
            let answer = with(method, path, key).await;
            assert_eq!(
                (answer.status, &answer.error()["code"]),
                (401, &json!("invalid_api_key")),
                "{path} {key:?}"
            );
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert!(!answer.text.contains("sk-"), "{}", answer.text);
        }
    }
    assert_eq!(with("POST", CHAT, Some("Bearer sk-1")).await.status, 200);
    assert_eq!(with("POST", CHAT, Some("bearer sk-2")).await.status, 200);
    for open in ["/live", "/ready", "/health", "/metrics", "/version"] {
        assert_eq!(with("GET", open, None).await.status, 200, "{open}");
    }
}

#[tokio::test]
async fn an_unusable_key_stops_the_start() {
    let metrics = Replica::start().await.metrics;
    let options = servelab_server::ServerOptions {
        host: "127.0.0.1".into(),
        port: 0,
        served_model_names: vec!["m".into()],
        max_waiting: 1,
        max_connections: 16,
        max_body_bytes: 1,
        api_keys: vec![Secret::new("")],
        drain_timeout: std::time::Duration::ZERO,
        stall_timeout: std::time::Duration::ZERO,
        seed: 0,
        kv_zmq: None,
        metrics,
        traces: servelab_telemetry::Traces::off(),
        load: Box::new(|| Err(servelab_server::LoadError("not reached".into()))),
    };
    let error = servelab_server::Server::bind(options).await.err().unwrap().to_string();
    assert!(error.contains("API key number 1"), "{error}");
}

#[tokio::test]
async fn metrics_count_what_was_done() {
    let replica = Replica::start().await;
    for _ in 0..2 {
        replica.post(CHAT, &chat(json!({"n": 2}))).await;
    }
    replica.post(CHAT, &json!({})).await;
    replica.get("/nowhere").await;
    replica.until_idle().await;
    let answer = replica.get("/metrics").await;
    assert!(answer.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let value = |series: &str| {
        let line = answer.text.lines().find(|line| line.starts_with(series));
        let line = line.unwrap_or_else(|| panic!("no {series} in\n{}", answer.text));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(value("servelab_request_success_total{finished_reason=\"length\""), 2.0);
    assert_eq!(value("servelab_generation_tokens_total"), 20.0);
    assert_eq!(value("servelab_prompt_tokens_total"), 40.0);
    assert_eq!(value("servelab_prompt_tokens_cached_total"), 16.0);
    assert_eq!(value("servelab_prefix_cache_queries_total"), 40.0);
    assert_eq!(value("servelab_prefix_cache_hits_total"), 16.0);
    assert_eq!(value("servelab_time_to_first_token_seconds_count"), 2.0);
    assert_eq!(value("servelab_inter_token_latency_seconds_count"), 16.0);
    assert_eq!(value("servelab_e2e_request_latency_seconds_count"), 2.0);
    assert_eq!(value("servelab_request_queue_time_seconds_count"), 2.0);
    assert_eq!(value("servelab_num_requests_running"), 0.0);
    assert_eq!(value("servelab_kv_cache_usage_perc"), 0.0);
    assert!(value("servelab_iteration_tokens_total_count") >= 10.0);
    let http = |route: &str, class: &str| {
        let all = answer.text.lines().filter(|line| line.starts_with("servelab_http_requests_total{"));
        let mut of = all.filter(|line| line.contains(&format!("route=\"{route}\"")) && line.contains(class));
        of.next().unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!((http(CHAT, "2xx"), http(CHAT, "4xx"), http("unknown", "4xx")), (2.0, 1.0, 1.0));
}

#[tokio::test]
async fn the_state_and_the_reset() {
    let replica = Replica::with(|setup| setup.step_time = std::time::Duration::from_millis(2)).await;
    let long = replica.request("POST", CHAT).header("x-request-id", "req-long");
    let long = long.json(&chat(json!({"max_tokens": 500}))).send();
    let long = tokio::spawn(async move { long.await.unwrap().status().as_u16() });
    let state =
        replica.until("/state", |answer| answer.json()["engine"]["running"] != json!([])).await.json();
    let running = &state["engine"]["running"][0];
    assert_eq!((&running["request_id"], &running["prompt_tokens"]), (&json!("req-long"), &json!(20)));
    assert!(!running["blocks"].as_array().unwrap().is_empty());
    let blocks = &state["engine"]["blocks"];
    let count = |name: &str| blocks[name].as_u64().unwrap();
    assert_eq!(count("held") + count("cached") + count("free"), count("total"));
    assert_eq!(blocks["map"].as_array().unwrap().len(), 2048);
    assert_eq!(state["engine"]["config"]["max_waiting"], 64);
    assert_eq!((&state["phase"], &state["model"]), (&json!("ready"), &json!("bytes")));
    assert_eq!(long.await.unwrap(), 200);
    replica.until_idle().await;
    let reset = Answer::of(replica.request("POST", "/reset_prefix_cache").send().await.unwrap()).await;
    assert_eq!((reset.status, &reset.json()["had_content"]), (200, &json!(true)));
    assert_eq!(replica.get("/state").await.json()["engine"]["blocks"]["cached"], 0);
    let again: Value = replica.post(CHAT, &chat(json!({}))).await.json();
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}
