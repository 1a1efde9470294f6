//! Requests read from JSON, and events read from bytes.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use serde_json::{Value, json};
use servelab_wire::sse::{SseReader, frame};
use servelab_wire::unsupported::{Api, UNSUPPORTED};
use servelab_wire::{
    ChatRequest, CompletionRequest, FieldError, Prompt, Role, StreamOptions, TokenizeRequest,
};

fn chat(more: Value) -> Result<ChatRequest, FieldError> {
    ChatRequest::read(over(json!({"messages": [{"role": "user", "content": "Hi"}]}), more))
}

fn completion(more: Value) -> Result<CompletionRequest, FieldError> {
    CompletionRequest::read(over(json!({"prompt": "Hi"}), more))
}

fn over(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn silence_means_the_default() {
    let request = chat(json!({})).unwrap();
    let common = request.common;
    assert_eq!((common.n, common.min_tokens, common.max_tokens), (1, 0, None));
    assert_eq!((common.temperature, common.top_p, common.top_k), (None, None, None));
    assert_eq!((common.stream, common.seed, common.model), (None, None, None));
    assert!(common.skip_special_tokens && !common.ignore_eos && !common.include_stop_str_in_output);
    assert!(request.conversation.add_generation_prompt && !request.conversation.continue_final_message);
    assert_eq!(request.logprobs, None);
}

#[test]
fn values_arrive_as_they_were_sent() {
    let request = chat(json!({
        "max_completion_tokens": 7, "temperature": 0.5, "top_k": -1, "seed": -1, "stop": "x",
        "logit_bias": {"3": -1.5}, "stream": true, "stream_options": {"include_usage": true},
        "logprobs": true, "top_logprobs": 4, "metadata": {"a": "b"}, "user": "u",
    }))
    .unwrap();
    let common = request.common;
    assert_eq!((common.max_tokens, common.temperature, common.top_k), (Some(7), Some(0.5), Some(0)));
    assert_eq!((common.seed, common.stop, common.logit_bias), (Some(-1), vec!["x".into()], vec![(3, -1.5)]));
    let options = StreamOptions { include_usage: true, continuous_usage_stats: false };
    assert_eq!((common.stream, request.logprobs), (Some(options), Some(4)));
}

#[test]
fn to_continue_the_last_message_is_to_open_no_new_one() {
    assert!(!chat(json!({"continue_final_message": true})).unwrap().conversation.add_generation_prompt);
    let both = chat(json!({"continue_final_message": true, "add_generation_prompt": true}));
    assert_eq!(both.unwrap_err().param, "continue_final_message");
}

#[test]
fn prompts_have_four_forms() {
    let prompts = |prompt: Value| completion(json!({"prompt": prompt})).unwrap().prompts;
    let (text, tokens) = (Prompt::Text("a".into()), Prompt::Tokens(vec![1, 2]));
    assert_eq!(prompts(json!("a")), vec![text.clone()]);
    assert_eq!(prompts(json!(["a", "a"])), [text.clone(), text]);
    assert_eq!(prompts(json!([1, 2])), vec![tokens.clone()]);
    assert_eq!(prompts(json!([[1, 2], [1, 2]])), [tokens.clone(), tokens]);
}

#[test]
fn messages_are_reduced_to_text() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": [1]}"}});
    let request = chat(json!({"messages": [
        {"role": "developer", "content": parts},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]}))
    .unwrap();
    assert_eq!(
        (request.conversation.messages[0].role, request.conversation.messages[0].content.as_deref()),
        (Role::System, Some("a\nb"))
    );
    let calls = request.conversation.messages[1].tool_calls.as_ref().unwrap();
    assert_eq!(calls[0]["function"]["arguments"], json!({"x": [1]}));
    assert_eq!(request.conversation.messages[2].tool_call_id.as_deref(), Some("1"));
    let shown = serde_json::to_value(&request.conversation.messages[0]).unwrap();
    assert_eq!(shown, json!({"role": "system", "content": "a\nb"}));
}

#[test]
fn errors_say_what_was_wrong_and_what_is_allowed() {
    let message = |more: Value| chat(more).unwrap_err().message;
    assert_eq!(message(json!({"temperature": 3})), "temperature must be a number from 0 to 2; it is 3");
    assert_eq!(
        message(json!({"max_tokens": "5"})),
        "max_tokens must be an integer from 1 to 1073741824; it is \"5\""
    );
    assert_eq!(message(json!({"seed": 0.5})), "seed must be an integer of 64 bits; it is 0.5");
    assert_eq!(
        message(json!({"guided_json": {}})),
        "guided_json is not supported by this server; leave it out"
    );
    assert_eq!(
        message(json!({"tool_choice": "required"})),
        "tool_choice is not supported by this server; leave it out or give \"none\" or \"auto\""
    );
    assert_eq!(message(json!({"temprature": 1})), "temprature is not a field of this request; remove it");
    let long = message(json!({"temperature": "x".repeat(10_000)}));
    assert!(long.len() < 200, "{long}");
    let long = chat(json!({"y".repeat(10_000): 1})).unwrap_err();
    assert!(long.message.len() < 200 && long.param.len() < 100);
}

#[test]
fn every_field_of_the_table_is_refused_and_its_harmless_values_are_not() {
    for field in UNSUPPORTED {
        for api in field.apis {
            let read = |value: Value| {
                let more = json!({field.name: value});
                match api {
                    Api::Chat => chat(more).map(drop),
                    Api::Completions => completion(more).map(drop),
                    Api::Tokenize => TokenizeRequest::read(over(json!({"prompt": "x"}), more)).map(drop),
                }
            };
            for harmful in [json!({"a": 1}), json!("something"), json!([1]), json!(-7.5)] {
                assert_eq!(read(harmful).unwrap_err().param, field.name);
            }
            assert_eq!(read(Value::Null), Ok(()), "{}", field.name);
            for harmless in field.harmless {
                assert_eq!(read(serde_json::from_str(harmless).unwrap()), Ok(()), "{}", field.name);
            }
        }
    }
}

#[test]
fn the_table_names_no_field_twice_and_none_that_is_implemented() {
    for (at, field) in UNSUPPORTED.iter().enumerate() {
        for other in &UNSUPPORTED[..at] {
            let shared = other.apis.iter().any(|api| field.apis.contains(api));
            assert!(other.name != field.name || !shared, "{}", field.name);
        }
    }
    assert_eq!(chat(json!({"best_of": 1.0})).map(drop), Ok(()), "1.0 is 1");
}

#[test]
fn events_are_found_wherever_the_network_cuts() {
    let mut bytes = frame(&json!({"a": "ö\n"})).unwrap();
    bytes.extend_from_slice(b": comment\r\n\r\ndata: [DONE]\n\n");
    let whole = SseReader::default().push(&bytes);
    assert_eq!(whole, ["{\"a\":\"ö\\n\"}", "[DONE]"]);
    for cut in 0..=bytes.len() {
        let (first, second) = bytes.split_at(cut);
        let mut reader = SseReader::default();
        let mut events = reader.push(first);
        events.extend(reader.push(second));
        assert_eq!(events, whole, "cut at {cut}");
    }
    let two_lines = SseReader::default().push(b"event: x\ndata: a\ndata:b\n\n");
    assert_eq!(two_lines, ["a\nb"]);
}
