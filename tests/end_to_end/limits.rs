use futures::future::join_all;
use serde_json::json;

use crate::util::{Server, greedy, prose};

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let server = Server::start(&["--max-running", "1", "--max-waiting", "1"]).await;
    let post = || server.client.post(server.url("/v1/completions")).json(&greedy("Hello", 400)).send();
    let answers = join_all((0..12).map(|_| post())).await;
    let mut statuses: Vec<u16> = Vec::new();
    for answer in answers {
        let answer = answer.unwrap();
        statuses.push(answer.status().as_u16());
        if answer.status() == 429 {
            let seconds: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!(seconds >= 1);
            let body: serde_json::Value = answer.json().await.unwrap();
            assert_eq!(body["error"]["type"], "rate_limit_error", "{body}");
        }
    }
    let count = |status| statuses.iter().filter(|&&other| other == status).count();
    assert!(count(200) >= 2, "one runs and one waits: {statuses:?}");
    assert!(count(429) >= 1, "{statuses:?}");
    assert_eq!(count(200) + count(429), 12, "{statuses:?}");
    let rejected = "servelab_admission_rejections_total{model_name=\"demo\",reason=\"queue_full\"}";
    assert_eq!(server.metric(rejected).await, Some(count(429) as f64));
    assert_eq!(server.get("/ready").await.0, 200, "a full queue does not make it unready");
}

/// In peers a request larger than the pool but within the context stops the scheduler for good.
#[tokio::test]
async fn a_request_larger_than_the_pool_is_refused_and_harms_nobody() {
    let server = Server::start(&["--kv-blocks", "8", "--max-model-len", "512"]).await;
    let (status, answer) = server.post("/v1/completions", &greedy("Hello", 300)).await;
    assert_eq!(status, 400, "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("KV blocks") && message.contains('8'), "{message}");
    let rejected = "servelab_admission_rejections_total{model_name=\"demo\",reason=\"never_fits\"}";
    assert_eq!(server.metric(rejected).await, Some(1.0));
    assert!(!server.complete("Hello", 8).await.is_empty());
}

#[tokio::test]
async fn a_request_that_fills_the_pool_exactly_is_served() {
    let server = Server::start(&["--kv-blocks", "8", "--max-model-len", "128"]).await;
    let tokens = json!((100..164).collect::<Vec<u32>>());
    let mut body = greedy("", 64);
    body["prompt"] = tokens;
    for _ in 0..2 {
        let answer = server.ok("/v1/completions", &body).await;
        assert_eq!(answer["usage"]["completion_tokens"], 64);
    }
    server.until_idle().await;
}

/// In peers a prompt of exactly one block, or one that is cached whole, gives a step without tokens.
#[tokio::test]
async fn prompts_of_whole_blocks_are_served_from_the_cache_too() {
    let server = Server::start(&[]).await;
    for length in [1_u32, 15, 16, 17, 32] {
        let mut body = greedy("", 5);
        body["prompt"] = json!((100..100 + length).collect::<Vec<u32>>());
        let cold = server.ok("/v1/completions", &body).await;
        let warm = server.ok("/v1/completions", &body).await;
        assert_eq!(cold["choices"], warm["choices"], "{length} tokens");
    }
}

#[tokio::test]
async fn many_clients_at_once_are_all_answered() {
    let server = Server::start(&[]).await;
    let prompts: Vec<String> = (0..32).map(|at| prose(at, 10 + at)).collect();
    let answers = join_all(prompts.iter().map(|prompt| server.complete(prompt, 16))).await;
    assert!(answers.iter().all(|answer| !answer.is_empty()));
    server.until_idle().await;
}
