//! Every way in which the load generator makes requests arrive; a search; results compared; limits of the hardware.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::bench::{bench, json, result, text};
use crate::util::Server;

/// One repeat of short requests.
const SHORT: [&str; 7] = ["--repeats", "1", "--input-tokens", "8", "--output-tokens", "3", "--json"];

async fn measured(server: &Server, flags: &[&str]) -> Value {
    let flags: Vec<String> =
        ["--url", &server.base].iter().chain(flags).map(|flag| (*flag).to_owned()).collect();
    let run = move || result(&bench(&flags.iter().map(String::as_str).collect::<Vec<_>>()));
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// Load in words and completed requests, of which none may be missing.
fn point(printed: &Value) -> (String, u64) {
    let point = &printed["points"][0];
    assert_eq!(point["metrics"]["failed"], 0, "{point}");
    let load = &point["load"];
    let shape = load["shape"].as_str().map_or_else(|| load.to_string(), str::to_owned);
    (shape, point["metrics"]["completed"].as_u64().unwrap())
}

#[tokio::test]
async fn requests_arrive_in_every_shape() {
    let server = Server::start(&[]).await;
    let shapes: [(&[&str], &str, u64); 6] = [
        (&["--rate", "60", "--burstiness", "inf", "--requests", "12"], "equal intervals", 12),
        (&["--rate", "60", "--burstiness", "0.5", "--requests", "12"], "gamma of burstiness 0.5", 12),
        (
            &["--rate", "60", "--on-off", "200ms,100ms", "--requests", "12"],
            "on for 0.2 s and off for 0.1 s on average",
            12,
        ),
        (
            &["--steps", "20x300ms,20-80x310ms", "--burstiness", "100000", "--warm-up", "0"],
            "20 req/s for 0.3 s, then 20 to 80 req/s over 0.31 s, gamma of burstiness 100000",
            21,
        ),
        (&["--rate", "inf", "--max-concurrency", "3", "--requests", "12"], "all at once", 12),
        (
            &["--concurrency", "3", "--think-time", "20ms", "--requests", "12"],
            r#""think_time_seconds":0.02"#,
            12,
        ),
    ];
    for (flags, words, requests) in shapes {
        let (load, completed) = point(&measured(&server, &[flags, &SHORT].concat()).await);
        assert!(load.contains(words), "{flags:?}: {load}");
        assert_eq!(completed, requests, "{flags:?}");
    }
}

#[tokio::test]
async fn traces_are_replayed_in_both_forms() {
    let server = Server::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let mooncake = folder.path().join("mooncake.jsonl");
    let line = |at: u32, ids: &str| {
        format!("{{\"timestamp\":{at},\"input_length\":600,\"output_length\":3,\"hash_ids\":{ids}}}\n")
    };
    std::fs::write(&mooncake, [line(0, "[7,1]"), line(900, "[7,2]"), line(1800, "[8,3]")].concat()).unwrap();
    let azure = folder.path().join("azure.csv");
    let rows =
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,40,3\n2023-11-16 18:15:47.6,30,5\n";
    std::fs::write(&azure, rows).unwrap();
    for (file, speed, requests, input, cached) in [(&mooncake, "3", 3, 600.0, 496), (&azure, "4", 2, 40.0, 0)]
    {
        let flags = ["--trace", file.to_str().unwrap(), "--trace-speed", speed, "--repeats", "1", "--json"];
        let printed = measured(&server, &flags).await;
        let (load, completed) = point(&printed);
        assert_eq!((load, completed), (format!("{requests} arrivals of a trace"), requests));
        let metrics = &printed["points"][0]["metrics"];
        assert_eq!(metrics["input_tokens"]["max"], input);
        // Of the second prompt the server knows the block of 512 tokens that it shares with the first.
        assert!(metrics["cached_prompt_tokens"].as_u64() >= Some(cached), "{metrics}");
    }
}

/// Every kind of limit together, all so wide that each rate keeps them: the search doubles until it may not go on.
#[tokio::test]
async fn a_search_judges_every_limit_at_every_rate() {
    let server = Server::start(&[]).await;
    let slo = "ttft=20s,tpot=5s@p95,e2el=60s@p90";
    let flags = ["--find-rate", "40", "--slo", slo, "--requests", "3", "--warm-up", "0"];
    let flags = [&flags[..], &SHORT].concat();
    let output = {
        let flags: Vec<String> =
            ["--url", &server.base].iter().chain(&flags).map(|flag| (*flag).to_owned()).collect();
        let run = move || bench(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        tokio::task::spawn_blocking(run).await.unwrap()
    };
    let printed = result(&output);
    let search = &printed["search"];
    let trials = search["trials"].as_array().unwrap();
    assert!(!trials.is_empty() && trials[0]["rate"] == 40.0, "{search}");
    for trial in trials {
        assert_eq!(trial["kept"], true, "{trial}");
        for limit in ["within ttft = 20000 ms", "within tpot = 5000 ms", "within e2el = 60000 ms"] {
            assert!(trial["reason"].as_str().unwrap().contains(limit), "{trial}");
        }
    }
    assert_eq!(search["best_rate"], trials.last().unwrap()["rate"]);
    let metrics = &printed["points"][0]["metrics"];
    assert_eq!(metrics["slo_attainment"], 1.0);
    assert!(printed["request_goodput"].as_f64() > Some(0.0));
}

/// A result of the engine in this process, which no late client can spoil, in `folder`.
fn saved(folder: &Path, more: &[&str]) -> Output {
    let out = folder.to_str().unwrap();
    let flags = ["--offline", "--concurrency", "2", "--requests", "6", "--out", out, "--quiet"];
    bench(&[&flags[..], more].concat())
}

#[test]
fn results_are_compared_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let lengths = ["--input-tokens", "16", "--output-tokens", "4"];
    let same = [&lengths[..], &["--seed", "3"]].concat();
    for (name, flags) in [("a", &same[..]), ("b", &lengths)] {
        let output = saved(&path(name), flags);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let compare = |more: &[&str], b: &str| {
        let (a, b) = (path("a"), path(b));
        let output = bench(&[&["compare", a.to_str().unwrap(), b.to_str().unwrap()][..], more].concat());
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, table, _) = compare(&[], "a");
    assert_eq!(code, Some(0));
    assert!(table.contains("concurrency 2") && table.contains("within noise"), "{table}");
    assert!(!table.contains("better") && !table.contains("worse"), "{table}");
    let (code, table, errors) = compare(&[], "b");
    assert_eq!((code, table.as_str()), (Some(2), ""));
    assert!(errors.contains("seed: 3 and 0") && errors.contains("--force"), "{errors}");
    let (code, table, _) = compare(&["--force"], "b");
    assert!(
        code == Some(0) && table.contains("! seed: 3 and 0") && table.contains("output tokens/s"),
        "{table}"
    );
    let (code, text, _) = compare(&["--force", "--json"], "b");
    let comparison: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, comparison["levels"].as_array().unwrap().len()), (Some(0), 1));
    let (code, _, errors) = compare(&[], "missing");
    assert!(code == Some(2) && errors.contains("missing"), "{errors}");
    // The reports can be written anew from what is saved.
    let report = path("a").join("report.html");
    let before = std::fs::read(&report).unwrap();
    std::fs::remove_file(&report).unwrap();
    assert!(bench(&["report", path("a").to_str().unwrap()]).status.success());
    assert_eq!(std::fs::read(&report).unwrap(), before);
}

/// Hardware that could not have done it.
#[test]
fn a_result_that_beats_physics_is_flagged() {
    let folder = tempfile::tempdir().unwrap();
    let slow = folder.path().join("slow.toml");
    let profile = "name = \"slow\"\nmemory_bytes = 1e9\nbandwidth_bytes_per_second = 1e3\nsource = \"made up\"\n\
        [flops_per_second]\nbf16 = 1e3\nf32 = 1e3\n";
    std::fs::write(&slow, profile).unwrap();
    let run = folder.path().join("run");
    let lengths = ["--input-tokens", "16", "--output-tokens", "4", "--repeats", "1"];
    let output = saved(&run, &[&lengths[..], &["--hardware", slow.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(1));
    let (shown, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(errors.contains("is faster than physics"), "{errors}");
    assert!(shown.contains("FASTER THAN PHYSICS") && shown.contains("Do not quote these figures"), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
    let written = json(&run.join("result.json"));
    let rows = written["points"][0]["limits"]["rows"].as_array().unwrap();
    assert!(rows.len() == 3 && rows.iter().all(|row| row["beaten"] == true), "{rows:?}");
    for report in ["report.html", "report.md"] {
        let report = std::fs::read_to_string(run.join(report)).unwrap();
        assert!(report.contains("faster than physics"), "{report}");
    }
}
