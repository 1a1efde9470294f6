//! What a whole answer holds.

use serde_json::{Value, json};
use servelab_front::prompts::{Prompter, TextFiles};
use servelab_server::SamplingDefaults;
use servelab_wire::{TokenizeRequest, TokenizerManifest};

use crate::harness::{EOS, Replica, chat, completion, text_tokens};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat() {
    let replica = Replica::start().await;
    let body = replica.post(CHAT, &chat(json!({}))).await.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"), "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "bytes");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert!(body["system_fingerprint"].is_string());
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hello", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("length"), &Value::Null));
    // "<|im_start|>user:Hi\n<|im_start|>assistant:"
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
               "prompt_tokens_details": {"cached_tokens": 0}})
    );
    let again = replica.post(CHAT, &chat(json!({}))).await.json();
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 16, "one full block");
    let other = replica.post(CHAT, &chat(json!({"cache_salt": "another tenant"}))).await.json();
    assert_eq!(other["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn templates_see_what_was_sent() {
    let replica = Replica::start().await;
    let count = async |more: Value| {
        replica.post(CHAT, &chat(more)).await.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let base = count(json!({})).await;
    assert_eq!(count(json!({"add_generation_prompt": false})).await, base - 11);
    assert_eq!(count(json!({"messages": [{"role": "user", "content": parts}]})).await, base + 1, "a\\nb");
    let developer = json!([{"role": "developer", "content": "Hi"}]);
    assert_eq!(count(json!({"messages": developer})).await, base + 2, "developer is system to templates");
    let open = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]);
    let continued = json!({"messages": open, "continue_final_message": true, "add_generation_prompt": false});
    assert_eq!(count(continued).await, base + 2);
}

#[tokio::test]
async fn a_model_without_a_template_cannot_chat() {
    let replica = Replica::with(|setup| setup.template = None).await;
    let answer = replica.post(CHAT, &chat(json!({}))).await;
    assert_eq!(answer.status, 400);
    assert!(answer.error()["message"].as_str().unwrap().contains("/v1/completions"));
    assert_eq!(replica.post(COMPLETIONS, &completion(json!({}))).await.status, 200);
}

#[tokio::test]
async fn a_template_that_refuses_is_the_clients_fault() {
    let replica = Replica::with(|setup| setup.template = Some("{{ raise_exception('no such talk') }}")).await;
    let answer = replica.post(CHAT, &chat(json!({}))).await;
    assert_eq!(answer.status, 400);
    assert!(answer.error()["message"].as_str().unwrap().contains("no such talk"));
}

#[tokio::test]
async fn every_way_to_stop() {
    let script = [text_tokens("one two three"), vec![EOS]].concat();
    let replica = Replica::with(|setup| setup.script = script).await;
    let cases = [
        (json!({}), "one two three", "stop", Value::Null, 14),
        (json!({"max_tokens": 3}), "one", "length", Value::Null, 3),
        (json!({"stop": "two"}), "one ", "stop", json!("two"), 7),
        (json!({"stop": ["x", " t"]}), "one", "stop", json!(" t"), 5),
        (json!({"stop": "two", "include_stop_str_in_output": true}), "one two", "stop", json!("two"), 7),
        (json!({"stop": "twice"}), "one two three", "stop", Value::Null, 14),
        (json!({"stop": "threes", "max_tokens": 13}), "one two three", "length", Value::Null, 13),
        (json!({"stop_token_ids": [b't']}), "one ", "stop", json!(b't'), 5),
        (json!({"stop_token_ids": [b't'], "min_tokens": 6}), "one -wo ", "stop", json!(b't'), 9),
        (json!({"ignore_eos": true, "max_tokens": 17}), "one two threeone", "length", Value::Null, 17),
        (
            json!({"ignore_eos": true, "skip_special_tokens": false, "max_tokens": 15}),
            "one two three<|eos|>o",
            "length",
            Value::Null,
            15,
        ),
        (json!({"skip_special_tokens": false}), "one two three", "stop", Value::Null, 14),
    ];
    for (more, text, reason, stop_reason, tokens) in cases {
        let mut more = more;
        if more.get("max_tokens").is_none() {
            more["max_tokens"] = json!(40);
        }
        let body = replica.post(CHAT, &chat(more.clone())).await.json();
        let choice = &body["choices"][0];
        assert_eq!(choice["message"]["content"], text, "{more}");
        assert_eq!(choice["finish_reason"], reason, "{more}");
        assert_eq!(choice["stop_reason"], stop_reason, "{more}");
        assert_eq!(body["usage"]["completion_tokens"], tokens, "{more}");
    }
    replica.until_idle().await;
}

#[tokio::test]
async fn choices_and_seeds() {
    let replica = Replica::start().await;
    let texts = async |more: Value| {
        let body = replica.post(CHAT, &chat(more)).await.json();
        let choices = body["choices"].as_array().unwrap().clone();
        assert!(choices.iter().zip(0..).all(|(choice, index)| choice["index"] == index), "{body}");
        let tokens = body["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!(tokens, 5 * choices.len() as u64);
        choices.iter().map(|choice| choice["message"]["content"].to_string()).collect::<Vec<_>>()
    };
    let three = texts(json!({"n": 3, "seed": 7, "temperature": 1})).await;
    assert_eq!(three.len(), 3);
    assert!(three[0] != three[1] && three[1] != three[2], "{three:?}");
    assert_eq!(texts(json!({"n": 3, "seed": 7, "temperature": 1})).await, three, "same seed, same text");
    assert_ne!(texts(json!({"n": 3, "seed": 8, "temperature": 1})).await, three);
    let unseeded = json!({"temperature": 1});
    let mut distinct = std::collections::HashSet::new();
    for _ in 0..8 {
        distinct.extend(texts(unseeded.clone()).await);
    }
    assert!(distinct.len() > 1, "requests without a seed differ");
}

#[tokio::test]
async fn the_models_own_sampling_values_are_the_default() {
    let defaults = SamplingDefaults { temperature: Some(1.0), top_k: Some(5), ..SamplingDefaults::default() };
    let replica = Replica::with(|setup| setup.defaults = defaults).await;
    let version = replica.get("/version").await.json();
    assert_eq!(version["default_sampling_params"]["top_k"], 5);
    assert_eq!(version["default_sampling_params"]["top_p"], 1.0);
    let greedy = replica.post(CHAT, &chat(json!({"temperature": 0, "seed": 3}))).await.json();
    let drawn = replica.post(CHAT, &chat(json!({"seed": 3}))).await.json();
    let text = |body: &Value| body["choices"][0]["message"]["content"].clone();
    assert_eq!(text(&greedy), "Hello");
    assert_eq!(text(&drawn), "lo w\u{fffd}", "five bytes from the third on");
}

#[tokio::test]
async fn every_form_of_prompt() {
    let replica = Replica::start().await;
    let cases = [
        (json!("Hi"), 1, 2),
        (json!(["Hi", "Ho!"]), 2, 5),
        (json!([72, 105]), 1, 2),
        (json!([[72, 105], [72]]), 2, 3),
        (json!(["Hi", [72]]), 2, 3),
    ];
    for (prompt, prompts, tokens) in cases {
        let body = replica.post(COMPLETIONS, &completion(json!({"prompt": prompt, "n": 2}))).await.json();
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * prompts, "{body}");
        assert!(choices.iter().zip(0..).all(|(choice, index)| choice["index"] == index));
        assert!(
            choices.iter().all(|choice| choice["text"] == "Hello" && choice["finish_reason"] == "length")
        );
        assert_eq!(body["usage"]["prompt_tokens"], tokens, "{prompt}");
        assert_eq!(body["usage"]["completion_tokens"], 10 * prompts);
        assert_eq!(body["object"], "text_completion");
    }
}

#[tokio::test]
async fn echo() {
    let replica = Replica::start().await;
    let body = replica.post(COMPLETIONS, &completion(json!({"prompt": ["Hi ", [72]], "echo": true}))).await;
    let body = body.json();
    assert_eq!(body["choices"][0]["text"], "Hi Hello");
    assert_eq!(body["choices"][1]["text"], "HHello");
    let more = json!({"echo": true, "logprobs": 2, "max_tokens": 1, "n": 2});
    let body = replica.post(COMPLETIONS, &completion(more)).await.json();
    for choice in body["choices"].as_array().unwrap() {
        let logprobs = &choice["logprobs"];
        assert_eq!(logprobs["tokens"], json!(["H", "i", "H"]));
        assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5]));
        assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
        assert_eq!(logprobs["top_logprobs"], json!([null, {"i": -0.5, "j": -1.0}, {"H": -0.5, "I": -1.0}]));
    }
    assert_eq!(body["choices"][0]["prompt_logprobs"], Value::Null, "nobody asked for vLLM's form");
}

#[tokio::test]
async fn log_probabilities() {
    let replica = Replica::with(|setup| setup.script = text_tokens("ö!")).await;
    let more = json!({"logprobs": true, "top_logprobs": 1, "max_tokens": 3});
    let body = replica.post(CHAT, &chat(more)).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0]["bytes"], json!([0xc3]), "half a character has its own bytes");
    assert_eq!(content[1]["bytes"], json!([0xb6]));
    assert_eq!(
        content[2],
        json!({"token": "!", "logprob": -0.5, "bytes": [33],
               "top_logprobs": [{"token": "!", "logprob": -0.5, "bytes": [33]}]})
    );
    let none = replica.post(CHAT, &chat(json!({"logprobs": true}))).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    let legacy = replica.post(COMPLETIONS, &completion(json!({"logprobs": 0, "max_tokens": 3}))).await.json();
    let logprobs = &legacy["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"][2], "!");
    assert_eq!(logprobs["top_logprobs"][2], json!({"!": -0.5}), "the chosen token is always there");
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
}

#[tokio::test]
async fn prompt_log_probabilities() {
    let replica = Replica::start().await;
    let wanted = json!([null, {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
                               "106": {"logprob": -1.0, "rank": 2, "decoded_token": "j"}}]);
    let body = replica.post(COMPLETIONS, &completion(json!({"prompt_logprobs": 2}))).await.json();
    assert_eq!(body["choices"][0]["prompt_logprobs"], wanted);
    let body = replica.post(CHAT, &chat(json!({"prompt_logprobs": 0}))).await.json();
    assert_eq!(body["prompt_logprobs"].as_array().unwrap().len(), 20);
    assert_eq!(body["prompt_logprobs"][0], Value::Null);
}

#[tokio::test]
async fn tokenize_and_detokenize() {
    let replica = Replica::start().await;
    let body = replica.post("/tokenize", &json!({"prompt": "Hi", "return_token_strs": true})).await.json();
    assert_eq!(
        body,
        json!({"count": 2, "max_model_len": 4096, "tokens": [72, 105], "token_strs": ["H", "i"]})
    );
    let messages = json!({"messages": [{"role": "user", "content": "Hi"}], "model": "bytes"});
    let body = replica.post("/tokenize", &messages).await.json();
    assert_eq!((&body["count"], &body["token_strs"]), (&json!(20), &Value::Null));
    let text = replica.post("/detokenize", &json!({"tokens": body["tokens"]})).await.json();
    assert_eq!(text, json!({"prompt": "<|im_start|>user:Hi\n<|im_start|>assistant:"}));
    for (path, body, param) in [
        ("/tokenize", json!({}), json!("prompt")),
        ("/tokenize", json!({"prompt": 1}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "messages": []}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "x": 1}), json!("x")),
        ("/tokenize", json!([]), Value::Null),
        ("/detokenize", json!({"tokens": [258]}), json!("tokens")),
        ("/detokenize", json!({"tokens": "a"}), json!("tokens")),
        ("/detokenize", json!({}), json!("tokens")),
        ("/detokenize", json!({"tokens": [1], "x": 1}), json!("x")),
    ] {
        let answer = replica.post(path, &body).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &param), "{body}");
    }
}

#[tokio::test]
async fn models() {
    let replica = Replica::start().await;
    let list = replica.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    assert_eq!((&card["id"], &card["root"]), (&json!("bytes"), &json!("models/bytes")));
    assert_eq!(card["max_model_len"], 4096);
    let named = replica.get("/v1/models/org/bytes").await.json();
    assert_eq!(named["id"], "org/bytes");
    for path in ["/v1/models/gpt", "/v1/models/%ff"] {
        let missing = replica.get(path).await;
        assert_eq!((missing.status, &missing.error()["code"]), (404, &json!("model_not_found")));
    }
    let wrong = replica.post(CHAT, &chat(json!({"model": "gpt"}))).await;
    assert_eq!((wrong.status, &wrong.error()["param"]), (404, &json!("model")));
}

/// A router that has fetched the files makes the tokens that the replica says that it makes.
#[tokio::test]
async fn whoever_fetches_the_tokenizer_tokenises_alike() {
    let replica = Replica::start().await;
    let manifest: TokenizerManifest = serde_json::from_value(replica.get("/tokenizer").await.json()).unwrap();
    assert_eq!((manifest.model.as_str(), manifest.block_size), ("bytes", 16));
    let mut files = TextFiles::default();
    for file in &manifest.files {
        let content = replica.get(&format!("/tokenizer/{}", file.name)).await.text;
        assert_eq!(content.len() as u64, file.bytes);
        files.put(&file.name, content.into()).unwrap();
    }
    assert_eq!(format!("{:032x}", files.revision()), manifest.revision);
    let prompter = Prompter::new(&files).unwrap();
    for body in [json!({"prompt": "wörld <|eos|>"}), json!({"messages": [{"role": "user", "content": "Hi"}]})]
    {
        let tokens = prompter.tokenize(TokenizeRequest::read(body.clone()).unwrap()).unwrap().tokens;
        assert_eq!(replica.post("/tokenize", &body).await.json()["tokens"], json!(*tokens), "{body}");
    }
    assert_eq!(replica.get("/tokenizer/tokenizer_config.json").await.status, 404);
    assert_eq!(replica.get("/tokenizer/..%2Fsecret").await.status, 404);
}
