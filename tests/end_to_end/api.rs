use serde_json::{Value, json};

use crate::util::{Server, chat, greedy, text};

#[tokio::test]
async fn a_chat_answers_in_openais_shape() {
    let server = Server::start(&[]).await;
    let answer = server.ok("/v1/chat/completions", &chat("What is continuous batching?", 8)).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "demo");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    let total = answer["usage"]["prompt_tokens"].as_u64().unwrap() + 8;
    assert_eq!(answer["usage"]["total_tokens"], total);
}

#[tokio::test]
async fn content_may_be_a_list_of_text_parts() {
    let server = Server::start(&[]).await;
    let plain = server.ok("/v1/chat/completions", &chat("What is a block?", 6)).await;
    let mut parts = chat("", 6);
    parts["messages"][0]["content"] =
        json!([{"type": "text", "text": "What is "}, {"type": "text", "text": "a block?"}]);
    let (status, answer) = server.post("/v1/chat/completions", &parts).await;
    assert_eq!(status, 200, "{answer}");
    assert!(!plain["choices"][0]["message"]["content"].is_null());
    assert!(!answer["choices"][0]["message"]["content"].is_null());
}

#[tokio::test]
async fn completions_take_text_lists_and_token_ids() {
    let server = Server::start(&[]).await;
    let single = server.complete("A KV block holds", 6).await;
    let tokens = server.ok("/tokenize", &json!({"prompt": "A KV block holds"})).await["tokens"].take();
    let mut from_ids = greedy("", 6);
    from_ids["prompt"] = tokens;
    assert_eq!(text(&server.ok("/v1/completions", &from_ids).await), single);
    let mut list = greedy("", 6);
    list["prompt"] = json!(["A KV block holds", "The prefix cache"]);
    let answer = server.ok("/v1/completions", &list).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(text(&answer), single);
    assert_eq!(answer["choices"][1]["index"], 1);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let server = Server::start(&[]).await;
    let said = "Blöcke, 缓存 and  two spaces";
    let body = json!({"prompt": said, "add_special_tokens": false});
    let tokenized = server.ok("/tokenize", &body).await;
    let count = tokenized["tokens"].as_array().unwrap().len();
    assert_eq!(tokenized["count"], count);
    let back = server.ok("/detokenize", &json!({"tokens": tokenized["tokens"]})).await;
    assert_eq!(back["prompt"], said);
}

#[tokio::test]
async fn models_and_probes_answer() {
    let server = Server::start(&["--served-model-name", "lab,second"]).await;
    let (status, models) = server.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(status, 200);
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["lab", "second"]);
    assert!(models["data"][0]["max_model_len"].as_u64().unwrap() > 0);
    assert!(models["data"][0]["root"].is_string());
    for path in ["/live", "/ready", "/health", "/version", "/state", "/metrics"] {
        assert_eq!(server.get(path).await.0, 200, "{path}");
    }
    let mut body = greedy("Hello", 2);
    body["model"] = json!("second");
    assert_eq!(server.ok("/v1/completions", &body).await["model"], "second", "the name that was asked for");
}

#[tokio::test]
async fn several_choices_are_independent_and_seeded() {
    let server = Server::start(&[]).await;
    let body = json!({"prompt": "The queue", "max_tokens": 12, "n": 4, "temperature": 1.5, "seed": 7});
    let first = server.ok("/v1/completions", &body).await;
    let second = server.ok("/v1/completions", &body).await;
    assert_eq!(first["choices"], second["choices"], "the same seed gives the same text");
    let texts: std::collections::BTreeSet<&str> =
        first["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert!(texts.len() > 1, "choices of one request differ: {texts:?}");
    let mut other = body.clone();
    other["seed"] = json!(8);
    assert_ne!(server.ok("/v1/completions", &other).await["choices"], first["choices"]);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_before_it() {
    let server = Server::start(&[]).await;
    let whole = server.complete("The prefix cache", 24).await;
    let middle = whole.char_indices().map(|(at, _)| at).nth(whole.chars().count() / 2).unwrap();
    let stop: String = whole[middle..].chars().take(3).collect();
    let mut body = greedy("The prefix cache", 24);
    body["stop"] = json!([stop]);
    let answer = server.ok("/v1/completions", &body).await;
    assert_eq!(text(&answer), &whole[..whole.find(&stop).unwrap()]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    server.until_idle().await;
}

#[tokio::test]
async fn log_probabilities_are_natural_and_ordered() {
    let server = Server::start(&[]).await;
    let mut body = chat("What is TTFT?", 4);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(5);
    let answer = server.ok("/v1/chat/completions", &body).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 4);
    for token in content {
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["logprob"].as_f64().unwrap())
            .collect();
        assert_eq!(top.len(), 5);
        assert!(top.windows(2).all(|pair| pair[0] >= pair[1]), "{top:?}");
        assert_eq!(token["logprob"].as_f64().unwrap(), top[0], "greedy takes the likeliest");
        let mass: f64 = top.iter().map(|logprob| logprob.exp()).sum();
        assert!(mass > 0.0 && mass <= 1.0 + 1e-4, "natural logarithms of probabilities: {mass}");
    }
}

#[tokio::test]
async fn all_of_the_vocabulary_adds_up_to_one() {
    let server = Server::start(&[]).await;
    let mut body = greedy("cache", 1);
    body["logprobs"] = json!(20);
    let answer = server.ok("/v1/completions", &body).await;
    let top = answer["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().clone();
    let mass: f64 = top.values().map(|logprob| logprob.as_f64().unwrap().exp()).sum();
    assert!(top.len() >= 19 && mass > 0.0 && mass <= 1.0 + 1e-4, "{mass}: {top:?}");
}

#[tokio::test]
async fn usage_tells_what_the_prefix_cache_supplied() {
    let server = Server::start(&[]).await;
    let prompt = crate::util::prose(1, 60);
    let cold = server.ok("/v1/completions", &greedy(&prompt, 4)).await;
    let warm = server.ok("/v1/completions", &greedy(&prompt, 4)).await;
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let prompt_tokens = warm["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&cold), 0);
    assert!(cached(&warm) >= 16 && cached(&warm) < prompt_tokens, "{warm}");
    assert_eq!(cached(&warm) % 16, 0, "only full blocks are shared");
    assert_eq!(text(&cold), text(&warm));
    server.ok("/reset_prefix_cache", &json!({})).await;
    assert_eq!(cached(&server.ok("/v1/completions", &greedy(&prompt, 4)).await), 0);
    let mut salted = greedy(&prompt, 4);
    salted["cache_salt"] = json!("another tenant");
    assert_eq!(cached(&server.ok("/v1/completions", &salted).await), 0, "tenants do not share");
}

#[tokio::test]
async fn echo_repeats_the_prompt() {
    let server = Server::start(&[]).await;
    let mut body = greedy("The queue", 3);
    body["echo"] = json!(true);
    let plain = server.complete("The queue", 3).await;
    assert_eq!(text(&server.ok("/v1/completions", &body).await), format!("The queue{plain}"));
}

#[tokio::test]
async fn request_ids_are_honoured_and_made() {
    let server = Server::start(&[]).await;
    let post = |id: Option<&'static str>| {
        let request = server.client.post(server.url("/v1/completions")).json(&greedy("a", 1));
        match id {
            Some(id) => request.header("x-request-id", id).send(),
            None => request.send(),
        }
    };
    assert_eq!(post(Some("lab-7")).await.unwrap().headers()["x-request-id"], "lab-7");
    let made = post(None).await.unwrap().headers()["x-request-id"].to_str().unwrap().to_owned();
    assert!(made.len() >= 16, "{made}");
    let hostile = post(Some("a b\tc")).await.unwrap();
    assert_ne!(hostile.headers()["x-request-id"], "a b\tc", "an id that could break a log line is replaced");
}
