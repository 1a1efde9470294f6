use futures::future::join_all;

use crate::util::{Server, prose};

/// Prompts of different lengths, some sharing a prefix.
fn prompts() -> Vec<String> {
    (0..16).map(|at| format!("{} {}", prose(at % 4, 20), prose(at, 5 + 7 * at))).collect()
}

async fn alone(server: &Server, prompts: &[String]) -> Vec<String> {
    let mut answers = Vec::new();
    for prompt in prompts {
        answers.push(server.complete(prompt, 24).await);
    }
    answers
}

#[tokio::test]
async fn greedy_answers_are_equal_alone_and_among_sixteen() {
    let server = Server::start(&[]).await;
    let prompts = prompts();
    let expected = alone(&server, &prompts).await;
    let warm = join_all(prompts.iter().map(|prompt| server.complete(prompt, 24))).await;
    assert_eq!(warm, expected, "together, with a warm prefix cache");
    server.ok("/reset_prefix_cache", &serde_json::json!({})).await;
    let cold = join_all(prompts.iter().map(|prompt| server.complete(prompt, 24))).await;
    assert_eq!(cold, expected, "together, with a cold prefix cache");
}

#[tokio::test]
async fn greedy_answers_are_equal_in_chunks_and_without_a_prefix_cache() {
    let prompts = prompts();
    let expected = alone(&Server::start(&[]).await, &prompts).await;
    let flags = ["--max-batched-tokens", "7", "--max-running", "4", "--no-prefix-cache"];
    let chunked = Server::start(&flags).await;
    let answers = join_all(prompts.iter().map(|prompt| chunked.complete(prompt, 24))).await;
    assert_eq!(answers, expected);
}

#[tokio::test]
async fn a_tiny_pool_preempts_and_the_answers_stay() {
    let prompts: Vec<String> = (0..6).map(|at| prose(at, 24)).collect();
    let roomy = Server::start(&[]).await;
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(roomy.complete(prompt, 64).await);
    }
    let tiny = Server::start(&["--kv-blocks", "20"]).await;
    let answers = join_all(prompts.iter().map(|prompt| tiny.complete(prompt, 64))).await;
    assert_eq!(answers, expected);
    let preemptions = tiny.metric("servelab_num_preemptions_total{model_name=\"demo\"}").await.unwrap();
    assert!(preemptions > 0.0, "six growing sequences do not fit into 20 blocks");
    tiny.until_idle().await;
}
