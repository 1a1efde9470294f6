//! Mutated bodies: whatever a client sends, the answer is a success or the client's fault, and comes.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Replica, chat, completion};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

const NAMES: &[&str] = &[
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "echo",
    "logit_bias",
    "min_tokens",
    "stop_token_ids",
    "tools",
    "response_format",
    "priority",
    "cache_salt",
    "prompt_logprobs",
    "chat_template_kwargs",
    "role",
    "content",
    "continue_final_message",
    "repetition_penalty",
    "ignore_eos",
    "user",
    "",
    "\u{0}",
    "messages[0]",
];

fn value(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth > 3 { 11 } else { 14 }) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 => json!(random.next() as i64),
        3 => json!(random.next()),
        4 => json!(random.below(20)),
        5 => json!(-(random.below(20) as i64)),
        6 => json!(f64::from_bits(random.next())),
        7 => json!(random.below(1000) as f64 / 500.0),
        8 => json!(""),
        9 => json!("a".repeat(random.below(200))),
        10 => json!(["\u{0}", "\u{10ffff}", "<|eos|>", "{{ x }}", "é"][random.below(5)]),
        11 | 12 => (0..random.below(5)).map(|_| value(random, depth + 1)).collect(),
        _ => {
            let members = (0..random.below(4)).map(|_| (name(random).to_owned(), value(random, depth + 1)));
            Value::Object(members.collect())
        }
    }
}

fn name(random: &mut Random) -> &'static str {
    NAMES[random.below(NAMES.len())]
}

/// Changes one place somewhere in `body`.
fn mutate(random: &mut Random, body: &mut Value) {
    let deeper = random.below(3) > 0;
    match body {
        Value::Object(members) if !members.is_empty() && deeper => {
            let at = random.below(members.len());
            if let Some((_, member)) = members.iter_mut().nth(at) {
                mutate(random, member);
            }
        }
        Value::Object(members) => {
            let key = members.keys().nth(random.below(members.len())).cloned();
            match (random.below(3), key) {
                (0, Some(key)) => drop(members.remove(&key)),
                (1, Some(key)) => drop(members.insert(key, value(random, 0))),
                _ => drop(members.insert(name(random).to_owned(), value(random, 0))),
            }
        }
        Value::Array(items) if !items.is_empty() && deeper => {
            let at = random.below(items.len());
            mutate(random, &mut items[at]);
        }
        Value::Array(items) => items.push(value(random, 1)),
        other => *other = value(random, 1),
    }
}

/// Flips, drops or doubles bytes of the text.
fn damage(random: &mut Random, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(3) {
            0 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            1 => bytes.truncate(at),
            _ => bytes.insert(at.min(bytes.len()), random.next() as u8),
        }
    }
    bytes
}

fn body(random: &mut Random) -> (&'static str, Vec<u8>) {
    let (path, mut body) = match random.below(6) {
        0 => {
            ("/v1/chat/completions", chat(json!({"stream": true, "stream_options": {"include_usage": true}})))
        }
        1 => (
            "/v1/chat/completions",
            chat(json!({"logprobs": true, "top_logprobs": 2, "stop": ["lo"], "n": 2})),
        ),
        2 => (
            "/v1/completions",
            completion(json!({"prompt": ["a", "b"], "logprobs": 1, "temperature": 1, "seed": 1})),
        ),
        3 => ("/v1/completions", completion(json!({"prompt": [1, 2], "echo": true, "logit_bias": {"1": 2}}))),
        4 => {
            ("/tokenize", json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}))
        }
        _ => ("/detokenize", json!({"tokens": [1, 2, 256]})),
    };
    for _ in 0..=random.below(3) {
        mutate(random, &mut body);
    }
    let bytes = body.to_string().into_bytes();
    (path, if random.below(5) == 0 { damage(random, bytes) } else { bytes })
}

async fn client(replica: Arc<Replica>, seed: u64, requests: usize) {
    let mut random = Random(seed);
    for number in 0..requests {
        let (path, body) = body(&mut random);
        let shown = String::from_utf8_lossy(&body).into_owned();
        let request = replica.request("POST", path).header("content-type", "application/json").body(body);
        let answer = tokio::time::timeout(Duration::from_secs(60), async {
            crate::harness::Answer::of(request.send().await.unwrap()).await
        })
        .await
        .unwrap_or_else(|_| panic!("seed {seed}, request {number} hangs: {path} {shown}"));
        assert!(
            answer.status == 200 || (400..500).contains(&answer.status),
            "seed {seed}, request {number}: {} for {path} {shown}: {}",
            answer.status,
            answer.text
        );
        if answer.status != 200 {
            answer.error();
        }
        assert!(
            !answer.text.contains("server_error"),
            "seed {seed}, request {number}: {path} {shown}: {}",
            answer.text
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_bodies_are_answered() {
    let replica = Replica::with(|setup| {
        setup.engine.max_model_len = 256;
        setup.max_waiting = 1000;
    })
    .await;
    let replica = Arc::new(replica);
    let clients = (0..6).map(|seed| tokio::spawn(client(replica.clone(), seed, 600)));
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    replica.until_idle().await;
}
