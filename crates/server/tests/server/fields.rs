//! Every field: refused by name where it is wrong, unknown or not implemented; accepted where it is right.

use serde_json::{Value, json};
use servelab_wire::unsupported::{Api, UNSUPPORTED};

use crate::harness::{Replica, chat, completion};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn refused(replica: &Replica, path: &str, body: &Value, param: &str) {
    let answer = replica.post(path, body).await;
    assert_eq!(answer.status, 400, "{param}: {body}: {}", answer.text);
    let error = answer.error();
    assert_eq!(error["param"], *param, "{body}: {error}");
    assert_eq!(error["type"], "invalid_request_error");
    let last = param.rsplit(['.', '[']).next().unwrap().trim_end_matches(']');
    assert!(error["message"].as_str().unwrap().contains(last), "{error}");
}

async fn accepted(replica: &Replica, path: &str, body: &Value) {
    let answer = replica.post(path, body).await;
    assert_eq!(answer.status, 200, "{body}: {}", answer.text);
}

#[tokio::test]
async fn wrong_values_are_refused_by_name() {
    let replica = Replica::start().await;
    let wrong: &[(&str, &[Value])] = &[
        ("model", &[json!(7), json!(["bytes"])]),
        (
            "max_tokens",
            &[json!(0), json!(-1), json!(1.5), json!("5"), json!(1e300), json!(4096), json!(true)],
        ),
        ("max_completion_tokens", &[json!(0), json!([]), json!(-5)]),
        ("temperature", &[json!(-0.1), json!(2.1), json!("1"), json!(1e308)]),
        ("top_p", &[json!(0), json!(-1), json!(1.01), json!(null_object()), json!(1e-60)]),
        ("top_k", &[json!(-2), json!(1.5), json!("all"), json!(1e20)]),
        ("min_p", &[json!(-0.1), json!(1.1), json!(false)]),
        ("presence_penalty", &[json!(-2.1), json!(2.1), json!("0")]),
        ("frequency_penalty", &[json!(-2.1), json!(2.1), json!([])]),
        ("repetition_penalty", &[json!(0), json!(-1), json!(11), json!("1")]),
        ("seed", &[json!(1.5), json!("1"), json!(18446744073709551615u64), json!(1e300)]),
        ("n", &[json!(0), json!(-1), json!(9), json!(1e9), json!("2")]),
        (
            "stop",
            &[json!(""), json!([""]), json!(7), json!([7]), json!(vec!["x"; 17]), json!("x".repeat(1025))],
        ),
        ("stop_token_ids", &[json!([258]), json!(7), json!(vec![1; 129])]),
        ("min_tokens", &[json!(-1), json!(6), json!("0")]),
        ("ignore_eos", &[json!(1), json!("true")]),
        ("skip_special_tokens", &[json!(0)]),
        ("include_stop_str_in_output", &[json!("no")]),
        ("add_special_tokens", &[json!(1)]),
        ("logit_bias", &[json!([]), json!({"a": 1}), json!({"-1": 1}), json!({"258": 1})]),
        ("logit_bias.5", &[json!({"5": 101}), json!({"5": "1"})]),
        ("prompt_logprobs", &[json!(-1), json!(21), json!(true)]),
        ("priority", &[json!(2147483648u64), json!("high")]),
        ("cache_salt", &[json!(""), json!(7)]),
        ("stream", &[json!(1), json!("true")]),
        ("stream_options", &[json!({"include_usage": true})]),
        ("user", &[json!(7)]),
        ("metadata", &[json!("x")]),
        ("no_such_field", &[json!(1), json!("x")]),
    ];
    for (path, body) in [(CHAT, chat as fn(Value) -> Value), (COMPLETIONS, completion)] {
        for (name, values) in wrong {
            let field = name.split('.').next().unwrap();
            for value in *values {
                let mut more = json!({});
                more[field] = value.clone();
                let param = match *name {
                    "max_completion_tokens" if value.is_number() => "max_completion_tokens",
                    other => other,
                };
                refused(&replica, path, &body(more), param).await;
            }
        }
    }
}

fn null_object() -> Value {
    json!({"a": null})
}

#[tokio::test]
async fn right_values_are_accepted() {
    let replica = Replica::start().await;
    let right = [
        json!({"model": "org/bytes"}),
        json!({"model": null}),
        json!({"max_tokens": 1}),
        json!({"max_tokens": 5.0}),
        json!({"max_tokens": null}),
        json!({"max_tokens": 5, "max_completion_tokens": 5}),
        json!({"temperature": 0}),
        json!({"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -9223372036854775808i64}),
        json!({"top_k": 0}),
        json!({"top_k": 1000000}),
        json!({"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1.1}),
        json!({"n": 8}),
        json!({"stop": ["a", "b"], "stop_token_ids": [0, 257], "ignore_eos": true, "min_tokens": 5}),
        json!({"stop": [], "logit_bias": {}, "stop_token_ids": []}),
        json!({"logit_bias": {"0": -100, "257": 100}}),
        json!({"user": "me", "metadata": {"a": "b"}, "priority": -3, "cache_salt": "tenant"}),
        json!({"stream": false, "stream_options": null}),
        json!({"stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}}),
        json!({"skip_special_tokens": false, "add_special_tokens": false}),
    ];
    for more in right {
        accepted(&replica, CHAT, &chat(more.clone())).await;
        accepted(&replica, COMPLETIONS, &completion(more)).await;
    }
}

#[tokio::test]
async fn what_is_not_implemented_is_refused_unless_it_asks_for_nothing() {
    let replica = Replica::start().await;
    for field in UNSUPPORTED {
        for api in field.apis {
            let (path, body): (&str, fn(Value) -> Value) = match api {
                Api::Chat => (CHAT, chat),
                Api::Completions => (COMPLETIONS, completion),
                Api::Tokenize => ("/tokenize", tokenize),
            };
            let with = |value: Value| {
                let mut more = json!({});
                more[field.name] = value;
                body(more)
            };
            refused(&replica, path, &with(json!({"anything": ["else", 1]})), field.name).await;
            refused(&replica, path, &with(json!("something")), field.name).await;
            accepted(&replica, path, &with(Value::Null)).await;
            for harmless in field.harmless {
                accepted(&replica, path, &with(serde_json::from_str(harmless).unwrap())).await;
            }
        }
    }
}

fn tokenize(more: Value) -> Value {
    let mut body = json!({"prompt": "x"});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn messages_are_checked_to_the_last_member() {
    let replica = Replica::start().await;
    let user = json!({"role": "user", "content": "Hi"});
    let call = |function: Value| json!({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]});
    let wrong = [
        (json!([]), "messages"),
        (json!("Hi"), "messages"),
        (json!(null), "messages"),
        (json!(["Hi"]), "messages[0]"),
        (json!([{"content": "Hi"}]), "messages[0].role"),
        (json!([user, {"role": "robot", "content": "Hi"}]), "messages[1].role"),
        (json!([{"role": 1, "content": "Hi"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": null}]), "messages[0].content"),
        (json!([{"role": "user", "content": 5}]), "messages[0].content"),
        (json!([{"role": "user", "content": [5]}]), "messages[0].content[0]"),
        (json!([{"role": "user", "content": [{"text": "x"}]}]), "messages[0].content[0].type"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content[0].type",
        ),
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]),
            "messages[0].content[0].x",
        ),
        (json!([{"role": "user", "content": "Hi", "x": 1}]), "messages[0].x"),
        (json!([{"role": "user", "content": "Hi", "tool_calls": [1]}]), "messages[0].tool_calls"),
        (json!([{"role": "user", "content": "Hi", "name": 1}]), "messages[0].name"),
        (json!([call(json!({}))]), "messages[0].tool_calls[0].function.name"),
        (
            json!([call(json!({"name": "f", "arguments": "{"}))]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            json!([call(json!({"name": "f", "arguments": "[]"}))]),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ];
    for (messages, param) in wrong {
        refused(&replica, CHAT, &chat(json!({"messages": messages})), param).await;
    }
    let right = [
        json!([{"role": "system", "content": "Be"}, user]),
        json!([{"role": "developer", "content": "Be"}, user]),
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"}]),
        json!([user, call(json!({"name": "f", "arguments": "{\"a\": 1}"})), {"role": "tool", "content": "1", "tool_call_id": "1"}]),
    ];
    for messages in right {
        accepted(&replica, CHAT, &chat(json!({"messages": messages}))).await;
    }
}

#[tokio::test]
async fn fields_of_one_api_only() {
    let replica = Replica::start().await;
    for (more, param) in [
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"max_tokens": 4, "max_completion_tokens": 5}), "max_tokens"),
        (json!({"chat_template_kwargs": 1}), "chat_template_kwargs"),
        (json!({"prompt": "Hi"}), "prompt"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
        (
            json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
            "stream_options.include_obfuscation",
        ),
        (json!({"stream": true, "stream_options": 1}), "stream_options"),
    ] {
        refused(&replica, CHAT, &chat(more), param).await;
    }
    for (more, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [258]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt[1]"),
        (json!({"prompt": [1, -1]}), "prompt[1]"),
        (json!({"prompt": ["a", 1]}), "prompt[1]"),
        (json!({"prompt": [[1], [1, 2.5]]}), "prompt[1][1]"),
        (json!({"prompt": vec!["a"; 257]}), "prompt"),
        (json!({"prompt": vec!["a"; 100]}), "prompt"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"echo": 1}), "echo"),
        (json!({"echo": true, "logprobs": 1, "stream": true}), "echo"),
        (json!({"messages": []}), "messages"),
    ] {
        refused(&replica, COMPLETIONS, &completion(more), param).await;
    }
}

#[tokio::test]
async fn what_cannot_fit_is_refused_with_advice() {
    let replica = Replica::with(|setup| setup.engine.num_blocks = 8).await;
    let answer = replica.post(COMPLETIONS, &completion(json!({"prompt": "x".repeat(5000)}))).await;
    assert_eq!((answer.status, &answer.error()["code"]), (400, &json!("context_length_exceeded")));
    let answer = replica.post(COMPLETIONS, &completion(json!({"max_tokens": 4095}))).await;
    let message = answer.error()["message"].to_string();
    assert!(message.contains("lower max_tokens to 4094 or less"), "{message}");
    let answer = replica.post(COMPLETIONS, &completion(json!({"max_tokens": 200}))).await;
    assert!(answer.error()["message"].to_string().contains("KV blocks"), "{}", answer.text);
    // Without max_tokens the answer takes what context and pool have room for: 8 blocks of 16.
    let answer = replica.post(COMPLETIONS, &completion(json!({"max_tokens": null}))).await;
    assert_eq!(answer.json()["usage"]["total_tokens"], 129, "the last token needs no slot");
    let answer = replica.post(COMPLETIONS, &completion(json!({"max_tokens": null, "n": 3}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}
