//! Whose tokens the router hashes: the replica's, if the canaries agree; else pieces of text, and everybody sees it.

use std::time::Duration;

use serde_json::{Value, json};
use servelab_router::parity::watch::ParityOptions;

use crate::util::{Backend, Behaviour, Routed, options, until};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant:{% endif %}";
/// The same but for one character of every turn.
const OTHER: &str = "{% for m in messages %}{{ m.role }}; {{ m.content }}\n{% endfor %}\
                     {% if add_generation_prompt %}assistant:{% endif %}";

async fn routed(backend: &Backend) -> Routed {
    let mut options = options(&[backend]);
    options.parity = ParityOptions { interval: Duration::from_millis(50), ..ParityOptions::default() };
    Routed::start(options, 1).await
}

async fn until_parity(routed: &Routed, backend: &Backend, value: f64) {
    let series = format!("servelab_router_token_parity{{replica=\"http://{}\"}}", backend.address);
    until(async || routed.metric(&series).await == value).await;
}

/// Asks twice; the second time the whole prompt but its last block is there. The decision as the header tells it.
async fn ask_twice(routed: &Routed) -> String {
    let body =
        json!({"messages": [{"role": "user", "content": "What is a block, and what is a step? ".repeat(9)}]});
    let mut decision = String::new();
    for _ in 0..2 {
        let request = routed.client.post(format!("{}/v1/chat/completions", routed.base)).json(&body);
        let answer = request.header("x-servelab-decision", "1").send().await.unwrap();
        decision = answer.headers()["x-servelab-decision"].to_str().unwrap().to_owned();
    }
    decision
}

/// Tokens that the decision says are there, and those that the prompt has.
fn matched(decision: &str) -> (u32, u32) {
    let told = decision.split("; ").find_map(|part| part.strip_prefix("matched=")).unwrap();
    let (matched, tokens) = told.split_once('/').unwrap();
    (matched.parse().unwrap(), tokens.parse().unwrap())
}

async fn replica(routed: &Routed) -> Value {
    routed.get("/replicas").send().await.unwrap().json::<Value>().await.unwrap()["replicas"][0].clone()
}

#[tokio::test]
async fn a_replica_that_tokenises_as_it_says_is_matched_by_its_tokens() {
    let backend = Backend::start(Behaviour::Answer);
    backend.tokenise(TEMPLATE, TEMPLATE);
    let routed = routed(&backend).await;
    until_parity(&routed, &backend, 1.0).await;
    let replica = replica(&routed).await;
    assert_eq!((&replica["parity"], &replica["hashing"]), (&json!("kept"), &json!("tokens")), "{replica}");
    let decision = ask_twice(&routed).await;
    let (matched, tokens) = matched(&decision);
    assert!(decision.contains("hashing=tokens"), "{decision}");
    assert_eq!(matched, (tokens - 1) / 16 * 16, "{decision}");
    // The backend says that every prompt has 20 tokens.
    until(async || routed.metric("servelab_router_token_count_mismatches_total").await == 2.0).await;
    assert_eq!(routed.metric("servelab_router_tokenised_total{outcome=\"done\"}").await, 2.0);
}

/// Fault 2 of the peers: the router hashes other tokens than the replica caches, hit rate 0 with every light green.
#[tokio::test]
async fn without_token_parity_a_light_is_red_and_text_hashing_still_finds_hits() {
    let backend = Backend::start(Behaviour::Answer);
    backend.tokenise(TEMPLATE, OTHER);
    let routed = routed(&backend).await;
    until_parity(&routed, &backend, 0.0).await;
    let replica = replica(&routed).await;
    assert_eq!((&replica["parity"], &replica["hashing"]), (&json!("lost"), &json!("text")), "{replica}");
    let detail = replica["parity_detail"].as_str().unwrap();
    assert!(detail.starts_with("canary \"chat\": at token "), "{detail}");
    let decision = ask_twice(&routed).await;
    let (matched, tokens) = matched(&decision);
    assert!(decision.contains("hashing=text") && matched > tokens / 2, "{decision}");
    let decisions: Value = routed.get("/decisions?limit=1").send().await.unwrap().json().await.unwrap();
    assert_eq!(decisions["decisions"][0]["hashing"], "text");
    assert_eq!(
        routed.metric("servelab_router_token_count_mismatches_total").await,
        0.0,
        "it is known to differ"
    );
}

#[tokio::test]
async fn a_loss_is_noticed_later_and_so_is_its_end() {
    let backend = Backend::start(Behaviour::Answer);
    backend.tokenise(TEMPLATE, TEMPLATE);
    let routed = routed(&backend).await;
    until_parity(&routed, &backend, 1.0).await;
    backend.tokenise(TEMPLATE, OTHER);
    until_parity(&routed, &backend, 0.0).await;
    backend.tokenise(OTHER, OTHER);
    until_parity(&routed, &backend, 1.0).await;
}

#[tokio::test]
async fn of_a_replica_that_serves_no_tokenizer_nothing_is_known() {
    let backend = Backend::start(Behaviour::Answer);
    let routed = routed(&backend).await;
    until(async || replica(&routed).await["parity_detail"].is_string()).await;
    let replica = replica(&routed).await;
    assert_eq!((&replica["parity"], &replica["hashing"]), (&json!("unknown"), &json!("text")), "{replica}");
    assert!(replica["parity_detail"].as_str().unwrap().contains("--tokenizer"), "{replica}");
    until_parity(&routed, &backend, -1.0).await;
}
