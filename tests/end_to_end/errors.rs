use serde_json::{Value, json};

use crate::util::{Server, chat, greedy};

/// A request, the status it gets, the field that the error names, and a part of the message.
type Case = (&'static str, Value, u16, Option<&'static str>, &'static str);

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

fn cases() -> Vec<Case> {
    let completion = |field: &str, value: Value| with(greedy("Hello", 4), field, value);
    let talk = |field: &str, value: Value| with(chat("Hello", 4), field, value);
    const COMPLETIONS: &str = "/v1/completions";
    const CHAT: &str = "/v1/chat/completions";
    vec![
        (COMPLETIONS, completion("temperature", json!(-1)), 400, Some("temperature"), "temperature"),
        (COMPLETIONS, completion("temperature", json!("hot")), 400, Some("temperature"), "hot"),
        (COMPLETIONS, completion("top_p", json!(0)), 400, Some("top_p"), "top_p"),
        (COMPLETIONS, completion("max_tokens", json!(0)), 400, Some("max_tokens"), "max_tokens"),
        (COMPLETIONS, completion("max_tokens", json!(-5)), 400, Some("max_tokens"), "-5"),
        (
            COMPLETIONS,
            completion("max_tokens", json!(100_000)),
            400,
            Some("max_tokens"),
            "exceeds the context length",
        ),
        (COMPLETIONS, completion("n", json!(0)), 400, Some("n"), "n"),
        (COMPLETIONS, completion("n", json!(1000)), 400, Some("n"), "1000"),
        (COMPLETIONS, completion("logprobs", json!(21)), 400, Some("logprobs"), "21"),
        (COMPLETIONS, completion("suffix", json!("tail")), 400, Some("suffix"), "suffix"),
        (COMPLETIONS, completion("best_of", json!(3)), 400, Some("best_of"), "best_of"),
        (COMPLETIONS, completion("no_such_field", json!(1)), 400, Some("no_such_field"), "no_such_field"),
        (COMPLETIONS, completion("prompt", json!([])), 400, Some("prompt"), "prompt"),
        (COMPLETIONS, completion("prompt", json!([999_999_999])), 400, Some("prompt"), "999999999"),
        (COMPLETIONS, completion("prompt", json!(7)), 400, Some("prompt"), "prompt"),
        (COMPLETIONS, json!({"max_tokens": 4}), 400, Some("prompt"), "prompt"),
        (COMPLETIONS, completion("model", json!("gpt-9")), 404, Some("model"), "gpt-9"),
        (COMPLETIONS, json!([1, 2]), 400, None, "object"),
        (CHAT, json!({"messages": []}), 400, Some("messages"), "messages"),
        (CHAT, talk("tools", json!([{"type": "function"}])), 400, Some("tools"), "tools"),
        (
            CHAT,
            talk("response_format", json!({"type": "json_object"})),
            400,
            Some("response_format"),
            "response_format",
        ),
        (CHAT, talk("top_logprobs", json!(3)), 400, Some("top_logprobs"), "logprobs"),
        (CHAT, talk("seed", json!(1.5)), 400, Some("seed"), "1.5"),
        (CHAT, talk("stream", json!("yes")), 400, Some("stream"), "yes"),
        ("/detokenize", json!({"tokens": [999_999_999]}), 400, None, "999999999"),
        ("/v1/embeddings", json!({"input": "a"}), 404, None, "/v1/embeddings"),
    ]
}

#[tokio::test]
async fn faults_are_named_in_openais_shape() {
    let server = Server::start(&[]).await;
    for (path, body, status, param, part) in cases() {
        let (got, answer) = server.post(path, &body).await;
        assert_eq!(got, status, "{path} {body}: {answer}");
        let error = &answer["error"];
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {answer}");
        assert!(error["type"].is_string(), "{answer}");
        if param.is_some() {
            assert_eq!(error["param"].as_str(), param, "{body}: {answer}");
        }
    }
    server.until_idle().await;
    assert_eq!(server.complete("still here", 2).await, server.complete("still here", 2).await);
}

#[tokio::test]
async fn bodies_that_are_no_json_are_the_clients_fault() {
    let server = Server::start(&["--max-body-bytes", "64KiB"]).await;
    let send = async |body: Vec<u8>| {
        let request = server.client.post(server.url("/v1/completions"));
        let answer = request.header("content-type", "application/json").body(body).send().await.unwrap();
        answer.status().as_u16()
    };
    let deep = "[".repeat(20_000).into_bytes();
    let cases: [(Vec<u8>, u16); 7] = [
        (b"".to_vec(), 400),
        (b"{".to_vec(), 400),
        (b"{\"prompt\": \"\xff\xfe\"}".to_vec(), 400),
        (b"{\"prompt\": \"a\", \"temperature\": NaN}".to_vec(), 400),
        (b"{\"prompt\": \"a\", \"temperature\": 1e999}".to_vec(), 400),
        (deep, 400),
        (vec![b' '; 65 * 1024], 413),
    ];
    for (body, status) in cases {
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        assert_eq!(send(body).await, status, "{start}");
    }
}

#[tokio::test]
async fn wrong_methods_and_paths_are_told() {
    let server = Server::start(&[]).await;
    assert_eq!(server.get("/v1/completions").await.0, 405);
    assert_eq!(server.get("/nothing/here").await.0, 404);
    assert_eq!(server.get("/v1/models/no-such-model").await.0, 404);
    assert_eq!(server.get("/v1/models/demo").await.0, 200);
}

#[tokio::test]
async fn a_key_is_asked_for_where_keys_are_given() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "# lab\nsk-first\nsk-second\n").unwrap();
    let server = Server::start(&["--api-key-file", keys.path().to_str().unwrap()]).await;
    let ask = async |key: Option<&str>| {
        let request = server.client.post(server.url("/v1/completions")).json(&greedy("a", 1));
        let request = match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(ask(None).await, 401);
    assert_eq!(ask(Some("sk-firs")).await, 401);
    assert_eq!(ask(Some("sk-second")).await, 200);
    assert_eq!(server.get("/ready").await.0, 200, "probes need no key");
    assert_eq!(server.get("/metrics").await.0, 200, "the scraper needs no key");
    assert!(!server.log().contains("sk-"), "keys never reach the log");
}
