use std::io::Write;

use serde_json::Value;
use tempfile::NamedTempFile;

use crate::util::{Server, greedy, run, servelab};

fn file(content: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

/// Runs `servelab serve` with flags that cannot work: one line of complaint, no backtrace.
fn complaint(flags: &[&str]) -> (i32, String) {
    let mut command = servelab(&["serve", "--log-level", "error"]);
    command.args(flags);
    if !flags.contains(&"--port") {
        command.args(["--port", "0"]);
    }
    let (code, out, err) = run(command);
    assert!(!out.contains("listening"), "{flags:?} must not start: {out}");
    assert!(!err.contains("panicked") && !err.contains("backtrace"), "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    (code, err)
}

#[test]
fn without_arguments_the_commands_are_listed() {
    let (code, out, _) = run(servelab(&[]));
    assert_eq!(code, 0);
    assert!(out.contains("serve") && out.contains("Exit codes"), "{out}");
}

/// The binary starts where no CUDA library is, and says what is missing. A machine with a GPU has nothing to show
/// here.
#[test]
fn a_gpu_that_is_not_there_is_missed_only_if_it_was_asked_for() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    let (code, message) = complaint(&["--device", "cuda"]);
    assert_eq!(code, 2, "{message}");
    assert!(message.contains("--device cuda: ") && message.contains("use --device cpu"), "{message}");
    let (code, message) = complaint(&["--device", "cuda", "--cuda-lib-dir", "/no/such/folder"]);
    assert_eq!(code, 2, "{message}");
}

#[test]
fn formats_that_only_a_gpu_has_are_refused_without_one() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    for (flag, format) in [("--dtype", "fp8"), ("--kv-dtype", "fp8"), ("--kv-dtype", "f16")] {
        let (code, _, message) =
            run(servelab(&["serve", "--port", "0", "--log-level", "error", flag, format]));
        assert_eq!(code, 1, "{message}");
        assert!(
            message.contains(format) && message.contains("GPU") && message.lines().count() == 1,
            "{message}"
        );
    }
}

#[test]
fn settings_that_cannot_work_end_with_2_and_one_line() {
    let config = file("port = 0\nmax-runing = 4\n");
    let (code, message) = complaint(&["--config", config.path().to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(
        message.contains("line 2: unknown field `max-runing`") && message.contains("`max-running`"),
        "{message}"
    );
    let cases: [(&[&str], &str); 7] = [
        (&["--config", "no/such.toml"], "no/such.toml"),
        (&["--device", "cpu", "--no-overlap"], "--no-overlap true does not go with --device cpu"),
        (&["--kv-blocks", "4", "--kv-memory", "1MiB"], "give one of them"),
        (&["--block-size", "24"], "a power of two from 8 to 256"),
        (&["--model", "/no/such/folder"], "/no/such/folder"),
        (&["--api-key-file", "no/such/keys"], "no/such/keys"),
        (&["--load-format", "dummy", "--model", "gpt-9"], "gpt-9"),
    ];
    for (flags, part) in cases {
        let (code, message) = complaint(flags);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn flags_that_do_not_exist_end_with_2() {
    for flags in [&["serve", "--warp-speed"][..], &["fly"], &["serve", "--kv-memory", "5 bananas"]] {
        let (code, _, err) = run(servelab(flags));
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(flags.last().unwrap()), "{err}");
    }
}

#[test]
fn failures_while_starting_end_with_1_and_one_line() {
    let empty = tempfile::tempdir().unwrap();
    let (code, message) = complaint(&["--model", empty.path().to_str().unwrap()]);
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("config.json"), "{message}");
}

#[test]
fn a_length_beyond_the_models_context_is_refused() {
    let mut command = servelab(&["serve", "--port", "0", "--log-level", "off", "--max-model-len", "9000000"]);
    command.env("RUST_BACKTRACE", "1");
    let (code, _, err) = run(command);
    assert_eq!(code, 1);
    assert!(err.contains("--max-model-len 9000000 exceeds the model's context"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let server = Server::start(&[]).await;
    let port = server.address().rsplit(':').next().unwrap();
    let (code, message) = complaint(&["--port", port]);
    assert_eq!(code, 1, "{message}");
    assert!(message.contains(port) && message.contains("--port"), "{message}");
}

#[tokio::test]
async fn a_file_sets_what_flags_do_not() {
    let config =
        file("served-model-name = [\"from-file\"]\nblock-size = 32\nkv-memory = \"4MiB\"\nmax-running = 5\n");
    let path = config.path().to_str().unwrap();
    let server = Server::start(&["--config", path, "--kv-blocks", "12", "--max-running", "6"]).await;
    let config = server.engine_state().await["config"].clone();
    assert_eq!((&config["block_size"], &config["num_blocks"]), (&32.into(), &12.into()));
    assert_eq!(config["max_running"], 6);
    assert!(server.get("/v1/models").await.1.contains("from-file"));
}

#[tokio::test]
async fn the_memory_for_the_cache_gives_its_blocks() {
    let server = Server::start(&["--kv-memory", "1MiB", "--kv-dtype", "f32"]).await;
    let blocks = server.engine_state().await["blocks"]["total"].as_u64().unwrap();
    // The weights of the demo are bf16, and so is a cache of which nothing is said.
    let half = Server::start(&["--kv-memory", "1MiB"]).await;
    let in_half = half.engine_state().await["blocks"]["total"].as_u64().unwrap();
    assert!(blocks > 0 && in_half / 2 == blocks, "half the bytes, twice the blocks: {blocks}, {in_half}");
}

#[tokio::test]
async fn json_logs_carry_the_request_id() {
    let server = Server::start(&["--log-format", "json", "--log-level", "debug"]).await;
    let request = server.client.post(server.url("/v1/completions")).json(&greedy("Hello", 2));
    request.header("x-request-id", "req-42").send().await.unwrap();
    server.until("logged", async || server.log().contains("req-42")).await;
    for line in server.log().lines() {
        let record: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(record["level"].is_string() && record["timestamp"].is_string(), "{line}");
    }
}

#[tokio::test]
async fn the_log_tells_how_to_ask() {
    let server = Server::start(&[]).await;
    server.until("introduced", async || server.log().contains("curl -s http://127.0.0.1:")).await;
    let log = server.log();
    // On a machine with a GPU the reason is another; the demo is computed on the CPU there too.
    for part in ["device cpu: ", "KV cache", "LlamaForCausalLM"] {
        assert!(log.contains(part), "{part}: {log}");
    }
}

#[tokio::test]
async fn dummy_weights_of_a_shape_are_served() {
    let server = Server::start(&["--load-format", "dummy", "--seed", "3"]).await;
    let again = Server::start(&["--load-format", "dummy", "--seed", "3"]).await;
    let other = Server::start(&["--load-format", "dummy", "--seed", "4"]).await;
    let first = server.complete("Hello", 8).await;
    assert_eq!(first, again.complete("Hello", 8).await, "drawn from the seed");
    assert_ne!(first, other.complete("Hello", 8).await);
}

#[tokio::test]
async fn the_naive_engine_gives_the_same_answers() {
    let paged = Server::start(&[]).await;
    let naive = Server::start(&["--engine", "naive"]).await;
    for prompt in ["Hello", "The prefix cache holds"] {
        assert_eq!(paged.complete(prompt, 16).await, naive.complete(prompt, 16).await);
    }
}

#[tokio::test]
async fn keys_may_come_from_the_environment() {
    let mut command = servelab(&["serve", "--port", "0"]);
    command.env("SERVELAB_API_KEYS", "sk-one,sk-two");
    let server = Server::spawn(command);
    server.wait_until_ready().await;
    assert_eq!(server.get("/v1/models").await.0, 401);
    let answer = server.client.get(server.url("/v1/models")).bearer_auth("sk-two").send().await.unwrap();
    assert_eq!(answer.status(), 200);
}
