use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};

use crate::util::{Server, chat, events, greedy, prose, run, servelab, text};

/// A 70B on four H100s, many times as fast, so that a test does not take the time of one.
const SEVENTY: [&str; 8] = ["--device", "sim", "--model", "llama-3.1-70b", "--tp", "4", "--speed", "50"];

async fn json_of(server: &Server, path: &str) -> Value {
    let (status, text) = server.get(path).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn a_simulated_70b_answers_sentences_and_the_same_ones_again() {
    let server = Server::start(&SEVENTY).await;
    let question = json!({
        "messages": [{"role": "user", "content": prose(1, 40)}], "temperature": 0,
    });
    let first = server.ok("/v1/chat/completions", &question).await;
    let answer = first["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(answer.ends_with('.') && answer.split_whitespace().count() > 5, "{answer}");
    assert!(answer.is_ascii() && !answer.contains('<'), "{answer}");
    assert_eq!(first["choices"][0]["finish_reason"], "stop");
    let again = server.ok("/v1/chat/completions", &question).await;
    assert_eq!(again["choices"][0]["message"]["content"], answer);
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    let other = server.ok("/v1/chat/completions", &chat("Why does it take so long?", 60)).await;
    assert_ne!(other["choices"][0]["message"]["content"], answer);
}

#[tokio::test]
async fn bounds_stop_strings_and_seeds_behave() {
    let server = Server::start(&SEVENTY).await;
    let long = server.ok("/v1/completions", &greedy("Once", 200)).await;
    assert_eq!(
        (&long["choices"][0]["finish_reason"], &long["usage"]["completion_tokens"]),
        (&json!("length"), &json!(200))
    );
    let word = text(&long).split_whitespace().nth(4).unwrap().to_owned();
    let mut body = greedy("Once", 200);
    body["stop"] = json!([word]);
    let stopped = server.ok("/v1/completions", &body).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert!(text(&long).starts_with(text(&stopped)) && !text(&stopped).contains(&word));
    let seeded = async |seed: u64| {
        let body = json!({"prompt": "Once", "max_tokens": 40, "temperature": 1, "seed": seed});
        text(&server.ok("/v1/completions", &body).await).to_owned()
    };
    assert_eq!(seeded(1).await, seeded(1).await);
    assert_ne!(seeded(1).await, seeded(2).await);
}

#[tokio::test]
async fn what_has_no_logits_refuses_what_needs_them() {
    let server = Server::start(&SEVENTY).await;
    for (field, value) in
        [("logprobs", json!(1)), ("prompt_logprobs", json!(1)), ("logit_bias", json!({"5": 1}))]
    {
        let mut body = greedy("Hello", 4);
        body[field] = value;
        let (status, answer) = server.post("/v1/completions", &body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains(field) && message.contains("simulated"),
            "{status} {answer}"
        );
    }
    assert!(!server.complete("Hello", 4).await.is_empty(), "the server goes on");
}

/// Nobody who looks can take it for a GPU.
#[tokio::test]
async fn it_says_everywhere_that_it_is_simulated() {
    let server = Server::start(&SEVENTY).await;
    for path in ["/state", "/version"] {
        let device = &json_of(&server, path).await["device"];
        assert_eq!((&device["kind"], &device["simulated"]), (&json!("sim"), &json!(true)), "{path}");
        assert_eq!((&device["name"], &device["speed"]), (&json!("4 x H100 SXM, simulated"), &json!("50")));
    }
    let (_, metrics) = server.get("/metrics").await;
    let info = metrics.lines().find(|line| line.starts_with("servelab_device_info{")).unwrap();
    assert!(info.contains("simulated=\"True\"") && info.contains("4 x H100 SXM"), "{info}");
    assert!(server.log().contains("4 x H100 SXM is SIMULATED at 50 times its speed"), "{}", server.log());
}

/// F4: what 0.9 of four GPUs leaves beside the weights and 1.25 GB of activations each, in blocks of 16 tokens.
#[tokio::test]
async fn the_pool_is_that_of_the_real_gpus() {
    let server = Server::start(&SEVENTY).await;
    let pool = 4.0 * (0.9 * 85.5e9 - 1.25e9) - 2.0 * 70_553_706_496.0;
    let state = server.engine_state().await;
    assert_eq!(state["blocks"]["total"].as_u64().unwrap(), (pool / (16.0 * 327_680.0)) as u64);
    assert_eq!(state["config"]["max_running"], 256);
}

/// Steps of a 70B on four H100s take at least 10.4 ms, and somewhat more.
#[tokio::test]
async fn answers_take_the_time_of_the_device() {
    let server = Server::start(&["--device", "sim", "--model", "llama-3.1-70b", "--tp", "4"]).await;
    let start = Instant::now();
    let answers = join_all((0..4).map(|at| server.complete(["a", "b", "c", "d"][at], 30))).await;
    assert_eq!(answers.len(), 4);
    let floor = Duration::from_millis(30 * 104 / 10);
    assert!(start.elapsed() >= floor, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_device_that_takes_no_time_serves_too() {
    let server = Server::start(&["--device", "sim", "--speed", "inf", "--model", "llama-3.1-8b"]).await;
    let questions: Vec<String> = (0..32).map(|at| format!("question {at}")).collect();
    let answers = join_all(questions.iter().map(|question| server.complete(question, 100))).await;
    assert!(answers.iter().all(|answer| answer.split_whitespace().count() > 20));
    server.until_idle().await;
}

/// As on a GPU that falls off the bus: whoever waits is told, nothing new is taken, and the exit status has the container
/// started anew.
#[tokio::test]
async fn a_lost_device_tells_its_clients_and_ends_the_program() {
    let mut server = Server::start(&[&SEVENTY[..6], &["--lost-after", "1500ms"]].concat()).await;
    server.wait_until_ready().await;
    let mut body = greedy("What is a lost device?", 4000);
    body["ignore_eos"] = json!(true);
    let stream = server.open_stream("/v1/completions", &body).await;
    let (status, whole) = server.post("/v1/completions", &body).await;
    assert_eq!((status, &whole["error"]["code"]), (500, &json!("model_failed")), "{whole}");
    let told = events(stream).await;
    assert!(told.len() > 10, "it answered until then: {told:?}");
    let last: Value = serde_json::from_str(told.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "model_failed", "{last}");
    let status = server.ended().await;
    assert_eq!(status.code(), Some(1), "{}", server.log());
    assert!(server.log().contains("the simulated device is lost, as it was told to be"), "{}", server.log());
}

#[test]
fn what_cannot_be_simulated_is_refused_with_what_can() {
    let refused = |flags: &[&str]| {
        let (code, _, error) = run(servelab(&[&["serve", "--port", "0"], flags].concat()));
        (code, error)
    };
    let (code, error) = refused(&["--device", "sim", "--model", "llama-3.1-70b"]);
    assert!(code == 1 && error.contains("use --tp 2, the smallest that fits"), "{code} {error}");
    let (code, error) = refused(&["--device", "sim", "--model", "llama-3.1-70b", "--tp", "3"]);
    assert!(code == 1 && error.contains("it splits over 1, 2, 4, 8"), "{code} {error}");
    for (flags, expected) in [
        (&["--hardware", "h100"][..], "--hardware h100 goes with --device sim only"),
        (&["--lost-after", "2m"], "--lost-after 120s goes with --device sim only"),
        (&["--device", "sim", "--hardware", "h1000"], "unknown hardware \"h1000\"; known: a100-40"),
        (&["--device", "sim", "--speed", "0"], "--speed is 0; it must be from 0.001 to 1e6, or inf"),
        (&["--device", "sim", "--speed", "nan"], "--speed is NaN; it must be"),
        (&["--device", "sim", "--tp", "0"], "--tp is 0; it must be from 1 to 1024"),
        (&["--device", "sim", "--threads", "2"], "--threads 2 does not go with --device sim"),
        (&["--device", "sim", "--model", "llama-9"], "unknown shape preset \"llama-9\""),
    ] {
        let (code, error) = refused(flags);
        assert!(code == 2 && error.contains(expected), "{code} {error}");
    }
}

/// A ladder over an 8B on an H100 in virtual time is fitted, the profile serves, and says with which model it was made.
#[tokio::test]
async fn a_benchmark_becomes_a_profile_that_serves() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (result, profile) = (path("result"), path("profile.toml"));
    let bench = [
        ["bench", "--offline"],
        ["--device", "sim"],
        ["--hardware", "h100"],
        ["--model", "llama-3.1-8b"],
        ["--concurrency", "1,4,16,64"],
        ["--requests", "256"],
        ["--input-tokens", "256"],
        ["--output-tokens", "64"],
        ["--out", &result],
    ];
    let start = Instant::now();
    let (code, out, error) = run(servelab(&[&bench.concat()[..], &["--seed", "1"]].concat()));
    assert!(code == 0, "{out}{error}");
    let json: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("result/result.json")).unwrap()).unwrap();
    let points = json["points"].as_array().unwrap();
    let seconds: f64 =
        points.iter().map(|point| point["metrics"]["duration_seconds"].as_f64().unwrap()).sum();
    // 256 answers of 64 steps of at least 4.48 ms, one after the other, and more.
    assert!(seconds > 60.0, "{seconds} s were simulated in {:?}", start.elapsed());
    let calibrate =
        ["sim", "calibrate", &result, "--hardware", "h100", "--overlap", "--out", &profile, "--json"];
    let (code, out, error) = run(servelab(&calibrate));
    assert!(code == 0, "{out}{error}");
    let fit: Value = serde_json::from_str(&out).unwrap();
    // Most of a step goes into reading 16 GB at 3.35 TB/s, and the fit says so.
    assert!(fit["calibration"]["weights_seconds"].as_f64().unwrap() > 4e-3, "{fit}");
    for errors in fit["errors"].as_array().unwrap() {
        assert!(errors["tpot"].as_f64().unwrap().abs() < 0.05, "{fit}");
    }
    let (code, table, error) =
        run(servelab(&["sim", "calibrate", &result, "--hardware", "h100", "--overlap"]));
    assert!(code == 0 && table.contains("mean held-out error: TTFT"), "{table}{error}");
    // A result that is only predicted says nothing to the fit: here the same one, whose errors are then known.
    let (code, out, error) = run(servelab(&[&calibrate[..], &["--check", &result]].concat()));
    assert!(code == 0, "{error}");
    let checked: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&checked["calibration"], &checked["checked"]), (&fit["calibration"], &fit["errors"]));
    let server = Server::start(&["--device", "sim", "--hardware", &profile, "--speed", "100"]).await;
    assert!(!server.complete("Hello", 8).await.is_empty());
    assert!(server.log().contains("its times calibrated with llama-3.1-8b"), "{}", server.log());
    let (code, _, error) =
        run(servelab(&["serve", "--port", "0", "--device", "sim", "--hardware", &profile, "--tp", "2"]));
    assert!(code == 2 && error.contains("the profile was calibrated with 1"), "{error}");
}

#[test]
fn results_that_cannot_be_fitted_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("result.json");
    let refused = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let (code, _, error) =
            run(servelab(&["sim", "calibrate", file.to_str().unwrap(), "--hardware", "h100"]));
        assert_eq!(code, 2, "{error}");
        error
    };
    assert!(refused("{}").contains("is no result of vllm bench serve: missing field `model_id`"));
    assert!(refused("{\"schema_version\": 9}").contains("has schema version 9"));
    let one = r#"{"model_id": "m", "completed": 4, "request_rate": "inf", "max_concurrency": 2, "total_input_tokens": 400,
        "total_output_tokens": 80, "request_throughput": 2.0, "mean_ttft_ms": 50.0, "mean_tpot_ms": 10.0}"#;
    assert!(refused(one).contains("1 points are too few; measure at least 3"));
}

/// The autoscaler that is shipped for clusters without KEDA, with the rules that give it its metric.
#[test]
fn a_fleet_is_scaled_by_a_metric_of_its_pods() {
    let folder =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/kustomize/components/hpa");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (hpa, rules) = (path("hpa.yaml"), path("adapter-values.yaml"));
    let busy = [
        ["sim", "--json"],
        ["--scaler", &hpa],
        ["--rate", "8"],
        ["--workload", "azure-chat"],
        ["--duration", "4m"],
    ]
    .concat();
    let with = |rules: &str| run(servelab(&[&busy[..], &["--prometheus-adapter", rules]].concat()));
    let (code, out, error) = with(&rules);
    assert!(code == 0, "{error}");
    let outcome = &serde_json::from_str::<Value>(&out).unwrap()[0];
    let said = outcome["log"].to_string();
    assert!(said.contains("HPA: 1 to") && said.contains("s0 is") && said.contains("a pod"), "{said}");
    assert!(outcome["most_ready"].as_u64().unwrap() > 2, "{}", outcome["most_ready"]);

    let (code, _, error) = run(servelab(&busy));
    assert!(code == 2 && error.contains("no rule offers the metric \"held_requests\""), "{code} {error}");
    let (code, _, error) = with("no/such/file");
    assert!(code == 2 && error.contains("--prometheus-adapter: cannot read no/such/file"), "{code} {error}");
    let (code, _, error) = with(&hpa);
    assert!(code == 2 && error.contains("rules"), "{code} {error}");
    let (code, _, error) = run(servelab(&[
        "sim",
        "--model",
        "llama-3-8b",
        "--scaler",
        "queue",
        "--rate",
        "8",
        "--prometheus-adapter",
        &rules,
    ]));
    assert!(code == 2 && error.contains("no --scaler asks for a metric of pods"), "{code} {error}");
}
