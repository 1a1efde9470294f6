use serde_json::{Value, json};

use crate::util::{Server, chat, greedy, text};

fn parsed(events: &[String]) -> Vec<Value> {
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
    events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[tokio::test]
async fn a_streamed_completion_is_the_unstreamed_one_in_pieces() {
    let server = Server::start(&[]).await;
    let body = greedy("The scheduler", 24);
    let whole = server.ok("/v1/completions", &body).await;
    let chunks = parsed(&server.stream("/v1/completions", &body).await);
    let joined: String = chunks.iter().map(text).collect();
    assert_eq!(joined, text(&whole));
    assert!(chunks.len() > 4, "it comes in pieces: {}", chunks.len());
    let ids: std::collections::BTreeSet<&str> = chunks.iter().map(|c| c["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none_or(Value::is_null)));
}

#[tokio::test]
async fn a_streamed_chat_is_the_unstreamed_one_in_pieces() {
    let server = Server::start(&[]).await;
    let body = chat("What is a prefix cache?", 24);
    let whole = server.ok("/v1/chat/completions", &body).await;
    let chunks = parsed(&server.stream("/v1/chat/completions", &body).await);
    let piece = |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned();
    let joined: String = chunks.iter().map(piece).collect();
    assert_eq!(joined, whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
}

#[tokio::test]
async fn every_choice_of_a_stream_is_whole() {
    let server = Server::start(&[]).await;
    let mut body = json!({"prompt": "A step", "max_tokens": 10, "n": 3, "temperature": 1.2, "seed": 3});
    body["ignore_eos"] = json!(true);
    let whole = server.ok("/v1/completions", &body).await;
    let chunks = parsed(&server.stream("/v1/completions", &body).await);
    for choice in whole["choices"].as_array().unwrap() {
        let pieces = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        let of_choice = pieces.filter(|piece| piece["index"] == choice["index"]);
        let joined: String = of_choice.map(|piece| piece["text"].as_str().unwrap()).collect();
        assert_eq!(joined, choice["text"].as_str().unwrap());
    }
}

#[tokio::test]
async fn usage_comes_where_it_is_asked_for() {
    let server = Server::start(&[]).await;
    let mut body = greedy("The queue", 6);
    body["stream_options"] = json!({"include_usage": true});
    let chunks = parsed(&server.stream("/v1/completions", &body).await);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 6);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = parsed(&server.stream("/v1/completions", &body).await);
    let counts: Vec<u64> =
        chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.windows(2).all(|pair| pair[0] <= pair[1]) && *counts.last().unwrap() == 6, "{counts:?}");
}

#[tokio::test]
async fn a_stop_string_is_never_streamed() {
    let server = Server::start(&[]).await;
    let whole = server.complete("The prefix cache", 24).await;
    let middle = whole.char_indices().map(|(at, _)| at).nth(whole.chars().count() / 2).unwrap();
    let stop: String = whole[middle..].chars().take(4).collect();
    let mut body = greedy("The prefix cache", 24);
    body["stop"] = json!(stop);
    let chunks = parsed(&server.stream("/v1/completions", &body).await);
    let joined: String = chunks.iter().map(text).collect();
    assert_eq!(joined, whole[..whole.find(&stop).unwrap()]);
}
