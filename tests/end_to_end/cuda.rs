//! `--device cuda` through the real binary where there is no GPU: NVIDIA's three libraries are replaced by emulated
//! ones, which the program finds and loads as it would the real ones. See `emulator/libraries` of the model crate.
//!
//! What this cannot show is speed, and what the real driver does otherwise than its documentation says.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use futures::future::join_all;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::util::{Server, chat, events, greedy, run, servelab, text};

#[path = "../../crates/model/src/cuda/emulator/libraries/command.rs"]
mod command;

/// The folder of the emulated libraries.
fn libraries() -> Option<&'static PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    const SCRIPT: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../model/src/cuda/emulator/libraries/build.sh");
    FOLDER.get_or_init(|| command::build(SCRIPT, env!("CARGO_TARGET_TMPDIR"))).as_ref()
}

/// `servelab` on an emulated GPU with these settings, and the folder of its cache.
fn on_gpu(settings: &str, arguments: &[&str]) -> Option<(Command, TempDir)> {
    let (cache, mut command) = (tempfile::tempdir().unwrap(), servelab(arguments));
    command::set_up(&mut command, libraries()?, settings, cache.path()).unwrap();
    Some((command, cache))
}

/// A server on an emulated GPU.
struct OnGpu {
    server: Server,
    _cache: TempDir,
}

impl std::ops::Deref for OnGpu {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// A ready server with the demo model.
async fn server(settings: &str, flags: &[&str]) -> Option<OnGpu> {
    let small =
        ["serve", "--port", "0", "--device", "cuda", "--max-running", "4", "--max-batched-tokens", "64"];
    let (command, cache) = on_gpu(settings, &[&small, flags].concat())?;
    let server = Server::spawn(command);
    server.wait_until_ready().await;
    Some(OnGpu { server, _cache: cache })
}

const QUESTIONS: [&str; 5] = [
    "What is continuous batching?",
    "What is a paged KV cache?",
    "What is TTFT?",
    "What does the router do?",
    "What is a prefix cache?",
];

/// Greedy answers to all questions, asked at once.
async fn answers(server: &Server) -> Vec<String> {
    let ask = async |question: &str| {
        let answer = server.ok("/v1/chat/completions", &chat(question, 40)).await;
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    join_all(QUESTIONS.map(ask)).await
}

/// Work is done as late as it may be, or at random times: a buffer that is reused too early or a stream that does not
/// wait for another gives other answers than the CPU.
#[tokio::test]
async fn the_gpu_answers_as_the_cpu_does_however_late_it_works() {
    let cpu = answers(&Server::start(&[]).await).await;
    for (settings, flags) in [
        ("order=late", &[][..]),
        ("order=random,seed=7", &[]),
        ("order=late,seed=4", &["--no-cuda-graphs"]),
        ("order=late,seed=5", &["--no-overlap", "--no-prefix-cache"]),
    ] {
        let Some(mut server) = server(settings, flags).await else { return };
        assert_eq!(answers(&server).await, cpu, "{settings} {flags:?}\n{}", server.log());
        assert_eq!(answers(&server).await, cpu, "{settings} {flags:?}\n{}", server.log());
        let (_, state) = server.get("/state").await;
        let device = &serde_json::from_str::<Value>(&state).unwrap()["device"];
        assert!(device.to_string().contains("cuda"), "{device}");
        server.signal("TERM");
        assert_eq!(server.server.ended().await.code(), Some(0), "{}", server.log());
        assert!(!server.log().contains("emulated GPU: "), "the driver complains: {}", server.log());
    }
}

/// Random tokens too: the same seed gives the same answer, whatever runs beside it, and stop strings and bounds hold.
#[tokio::test]
async fn sampling_on_the_gpu_keeps_seeds_and_log_probabilities() {
    let Some(server) = server("order=random,seed=3", &[]).await else { return };
    let cpu = Server::start(&[]).await;
    let mut body = greedy("What is a token? It is", 12);
    body["logprobs"] = json!(5);
    let (one, other) = (server.ok("/v1/completions", &body).await, cpu.ok("/v1/completions", &body).await);
    let logprobs = |answer: &Value| -> Vec<f64> {
        let values = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
        values.iter().map(|value| value.as_f64().unwrap()).collect()
    };
    assert_eq!(text(&one), text(&other));
    // Activations are bf16 there and f32 here.
    let distance =
        logprobs(&one).iter().zip(logprobs(&other)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(distance < 0.2 && logprobs(&one).len() == 12, "{distance} {one} {other}");

    let seeded = |seed: u64| json!({"prompt": "Once", "max_tokens": 16, "temperature": 1.5, "top_p": 0.95, "seed": seed});
    let alone = text(&server.ok("/v1/completions", &seeded(1)).await).to_owned();
    let together =
        join_all((1..=4).map(async |seed| server.ok("/v1/completions", &seeded(seed)).await)).await;
    assert_eq!(text(&together[0]), alone);
    assert!(together[1..].iter().all(|other| text(other) != alone), "{together:?}");
    server.until_idle().await;
}

#[tokio::test]
async fn eight_bits_answer_too() {
    let Some(kv) = server("order=late", &["--kv-dtype", "fp8"]).await else { return };
    let weights = server("order=late", &["--kv-dtype", "fp8", "--dtype", "fp8"]).await.unwrap();
    for server in [kv, weights] {
        let answers = answers(&server).await;
        assert!(answers.iter().all(|answer| answer.split_whitespace().count() > 5), "{answers:?}");
        let label = server.get("/metrics").await.1;
        assert!(label.contains("cache_dtype=\"fp8\""), "{label}");
    }
}

/// Ends one stream and one whole answer with the error of a GPU that fails under them.
async fn fail_under_requests(server: &Server, file: &Path, error: u32) -> Vec<Value> {
    let mut body = greedy("What happens when a GPU fails?", 400);
    body["ignore_eos"] = json!(true);
    let stream = server.open_stream("/v1/completions", &body).await;
    let whole = async { server.post("/v1/completions", &body).await };
    let fail = async {
        server
            .until("two running", async || {
                server.metric("servelab_num_requests_running{model_name=\"demo\"}").await == Some(2.0)
            })
            .await;
        // A whole file at once: the GPU looks all the time.
        let making = file.with_extension("making");
        std::fs::write(&making, error.to_string()).unwrap();
        std::fs::rename(making, file).unwrap();
    };
    let (told, (status, whole), ()) = tokio::join!(events(stream), whole, fail);
    assert_eq!(status, 500, "{whole}");
    vec![serde_json::from_str(told.last().unwrap()).unwrap(), whole]
}

#[tokio::test]
async fn a_lost_gpu_tells_its_clients_and_ends_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fail");
    let Some(mut server) = server(&format!("fail={}", file.display()), &[]).await else { return };
    // CUDA_ERROR_ILLEGAL_ADDRESS
    for answer in fail_under_requests(&server, &file, 700).await {
        assert_eq!(answer["error"]["code"], "model_failed", "{answer}");
    }
    assert_eq!(server.server.ended().await.code(), Some(1), "{}", server.log());
    assert!(server.log().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{}", server.log());
}

#[tokio::test]
async fn what_the_driver_refuses_ends_the_requests_and_not_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fail");
    let Some(server) = server(&format!("fail={}", file.display()), &[]).await else { return };
    let before = server.complete("What is a step?", 8).await;
    // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    for answer in fail_under_requests(&server, &file, 701).await {
        assert_eq!(answer["error"]["code"], "model_failed", "{answer}");
    }
    server.until_idle().await;
    assert_eq!(server.complete("What is a step?", 8).await, before);
    assert_eq!(server.get("/ready").await.0, 200);
}

#[test]
fn a_gpu_that_cannot_be_used_is_refused_with_what_to_do() {
    let Some(folder) = libraries() else { return };
    let refused = |settings: &str, flags: &[&str]| {
        let flags = [&["serve", "--port", "0", "--device", "cuda"], flags].concat();
        let (command, _cache) = on_gpu(settings, &flags).unwrap();
        let (code, _, error) = run(command);
        (code, error)
    };
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    for (settings, flags, code, expected) in [
        ("arch=75", &[][..], 2, "has compute capability 7.5; 8.0 or later is needed"),
        ("driver=12080", &[], 2, "libnvrtc.so of CUDA 13.0 is newer than the driver, which is made for 12.8"),
        ("order=late", &["--cuda-lib-dir", path], 2, "has no libnvrtc.so"),
        ("memory_mib=12", &[], 2, "the GPU has no memory left for one more program"),
        ("memory_mib=30", &[], 2, "the GPU has no memory left for one more program"),
        ("memory_mib=40", &[], 1, "lower --gpu-memory-utilization or the sizes of the batch"),
        ("order=late", &["--kv-dtype", "f32"], 2, "--kv-dtype f32 does not go with --device cuda"),
        ("order=late", &["--kv-dtype", "f16"], 1, "where it is bf16 or fp8"),
    ] {
        let (actual, error) = refused(settings, flags);
        assert!(actual == code && error.contains(expected), "{settings} {flags:?}: {actual} {error}");
    }

    // The driver is there and the rest is not: on a machine with a toolkit that cannot be seen.
    if Path::new("/usr/local/cuda").exists() || Path::new("/dev/nvidiactl").exists() {
        return;
    }
    for name in ["libcuda.so.1", "libcuda.so"] {
        std::fs::copy(folder.join(name), empty.path().join(name)).unwrap();
    }
    let mut command = servelab(&["serve", "--port", "0", "--device", "cuda"]);
    command.env("LD_LIBRARY_PATH", empty.path()).env("HOME", empty.path()).env("PATH", "/nowhere");
    command.env_remove("VIRTUAL_ENV").env_remove("CONDA_PREFIX");
    let (code, _, error) = run(command);
    assert!(code == 2 && error.contains("pip install nvidia-"), "{code} {error}");
}

#[test]
fn the_doctor_checks_an_emulated_gpu() {
    let flags = ["doctor", "--gpu", "--quick", "--json", "--threads", "1"];
    let Some((command, _cache)) = on_gpu("order=late", &flags) else { return };
    let (code, out, error) = run(command);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["faults"]), (0, &json!([])), "{out}{error}");
    assert_eq!((&report["gpu"]["name"], &report["gpu"]["limits"]), (&json!("emulated GPU"), &Value::Null));
    assert!(report["gpu"]["checks"].as_array().unwrap().len() > 50, "{out}");
}
