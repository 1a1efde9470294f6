//! Streams, as they go over the wire.

use serde_json::{Value, json};

use crate::harness::{Answer, Replica, chat, completion, events, streamed_text, text_tokens};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The stream with what differs from run to run replaced.
fn transcript(answer: &Answer) -> String {
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"), "{answer:?}");
    let lines = events(&answer.text).into_iter().map(|data| {
        let Ok(mut chunk) = serde_json::from_str::<Value>(&data) else { return data };
        for (member, value) in [("id", json!("ID")), ("created", json!(0))] {
            if chunk.get(member).is_some() {
                chunk[member] = value;
            }
        }
        chunk.to_string()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn a_chat_with_usage() {
    let replica = Replica::with(|setup| setup.script = text_tokens("wör")).await;
    let more = json!({"stream": true, "max_tokens": 4, "stream_options": {"include_usage": true}});
    insta::assert_snapshot!(transcript(&replica.post(CHAT, &chat(more)).await));
}

#[tokio::test]
async fn a_chat_with_two_choices_and_a_stop_string() {
    let replica = Replica::start().await;
    let more = json!({"stream": true, "max_tokens": 20, "n": 2, "stop": "lo"});
    let answer = replica.post(CHAT, &chat(more)).await;
    // The choices advance side by side; the order within each is what counts.
    let mut lines: Vec<String> = transcript(&answer).lines().map(str::to_owned).collect();
    lines.sort_by_key(|line| {
        serde_json::from_str::<Value>(line)
            .map_or(u64::MAX, |chunk| chunk["choices"][0]["index"].as_u64().unwrap())
    });
    insta::assert_snapshot!(lines.join("\n"));
    replica.until_idle().await;
}

#[tokio::test]
async fn a_chat_with_log_probabilities() {
    let replica = Replica::start().await;
    let more = json!({"stream": true, "max_tokens": 2, "logprobs": true, "top_logprobs": 1});
    insta::assert_snapshot!(transcript(&replica.post(CHAT, &chat(more)).await));
}

#[tokio::test]
async fn a_completion_with_echo_and_running_usage() {
    let replica = Replica::start().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let more = json!({"stream": true, "max_tokens": 2, "echo": true, "stream_options": options});
    insta::assert_snapshot!(transcript(&replica.post(COMPLETIONS, &completion(more)).await));
}

#[tokio::test]
async fn a_completion_with_log_probabilities() {
    let replica = Replica::start().await;
    let more = json!({"stream": true, "max_tokens": 2, "logprobs": 1});
    insta::assert_snapshot!(transcript(&replica.post(COMPLETIONS, &completion(more)).await));
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let replica = Replica::start().await;
    for more in [
        json!({"max_tokens": 100}),
        json!({"max_tokens": 100, "stop": ["d. H"]}),
        json!({"max_tokens": 100, "stop": ["never there", "wörl"], "include_stop_str_in_output": true}),
        json!({"max_tokens": 8, "stop": ["Hello world"]}),
    ] {
        let whole = replica.post(CHAT, &chat(more.clone())).await.json();
        let mut streamed = more.clone();
        streamed["stream"] = json!(true);
        let stream = replica.post(CHAT, &chat(streamed.clone())).await;
        assert_eq!(whole["choices"][0]["message"]["content"], streamed_text(&stream.text), "{more}");
        let whole = replica.post(COMPLETIONS, &completion(more.clone())).await.json();
        let stream = replica.post(COMPLETIONS, &completion(streamed)).await;
        assert_eq!(whole["choices"][0]["text"], streamed_text(&stream.text), "{more}");
    }
}

#[tokio::test]
async fn a_refusal_is_an_answer_and_not_a_stream() {
    let replica = Replica::start().await;
    let answer = replica.post(CHAT, &chat(json!({"stream": true, "max_tokens": 5000}))).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.error()["code"], "context_length_exceeded");
}
