//! `servelab numbers`: the ledger in its four forms, and one experiment from its prediction to the file of results.
//! What the numbers are is tested beside the ledger; here it is what comes out of the command.

use std::path::Path;

use serde_json::Value;

use crate::util::{run, servelab};

fn numbers(results: &Path, flags: &[&str]) -> (i32, String, String) {
    let mut command = servelab(&["numbers"]);
    command.args(flags).arg("--results").arg(results);
    run(command)
}

/// What is printed by a command that succeeds and has nothing to complain of.
fn printed(results: &Path, flags: &[&str]) -> String {
    let (code, out, err) = numbers(results, flags);
    assert_eq!((code, err.as_str()), (0, ""), "{flags:?}");
    out
}

#[test]
fn the_ledger_is_a_table_a_document_data_and_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("none.jsonl");
    let table = printed(&results, &[]);
    assert!(table.lines().all(|line| line.chars().count() <= 100) && !table.contains('\u{1b}'), "{table}");
    let json: Value = serde_json::from_str(&printed(&results, &["--json"])).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert!(rows.len() >= 25, "{}", rows.len());
    let markdown = printed(&results, &["--format", "markdown"]);
    let page = folder.path().join("numbers.html");
    let page_flags = ["--format", "html", "--out", page.to_str().unwrap()];
    assert_eq!(printed(&results, &page_flags), "");
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>"), "{page:.40}");
    for row in rows {
        let id = row["id"].as_str().unwrap();
        assert!(table.lines().any(|line| line == id), "{id}");
        assert!(markdown.contains(&format!("| {id} |")) && page.contains(&format!("id=\"{id}\"")), "{id}");
    }
    assert!(!results.exists(), "only an experiment makes the file");
}

#[test]
fn rows_model_and_hardware_can_be_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("none.jsonl");
    let flags = ["--model", "llama-3.1-70b", "--hardware", "h200", "--kv-dtype", "fp8", "--row", "kv-70b"];
    let text = printed(&results, &flags);
    assert!(text.contains("Limits: llama-3.1-70b (bf16 weights, fp8 KV) on H200."), "{text}");
    assert!(text.contains("2 x 80 x 8 x 128 x 1 B = 163,840 B/token"), "{text}");
    let text = printed(&results, &["--needs", "nothing"]);
    assert!(text.contains("\nkv-mha\n") && !text.contains("\nkv-8b\n"), "{text}");
}

#[test]
fn an_experiment_is_predicted_measured_kept_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("state/numbers.jsonl");
    let text = printed(&results, &["run", "kv-left", "kv-mha", "--device", "cpu"]);
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part:?}: {text}"));
    assert!(at("      expected  ") < at("      measured  "), "{text}");
    assert!(at("Not measured here:") < at("kv-mha"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100 || line.contains("/")), "{text}");

    let lines = std::fs::read_to_string(&results).unwrap();
    let kept: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(kept.len(), 1, "{lines}");
    assert_eq!(kept[0]["experiment"], "first-preemption");
    let circumstances = &kept[0]["circumstances"];
    assert_eq!((&circumstances["model"]["name"], &circumstances["is_gpu"]), (&"demo".into(), &false.into()));
    // How many requests a pool holds does not depend on how busy the machine is.
    let finding = &kept[0]["findings"][0];
    assert_eq!(finding["measured"], 16.0, "{finding}");
    assert_eq!(finding["prediction"]["value"], 16.0, "{finding}");

    let flags = ["--json", "--row", "kv-left", "--hardware", "measured", "--model", "demo"];
    let shown: Value = serde_json::from_str(&printed(&results, &flags)).unwrap();
    assert_eq!(shown["hardware"], circumstances["hardware"]);
    assert_eq!(shown["rows"][0]["measured"][0]["findings"][0], *finding);
    // Of another model nothing was measured.
    let shown = printed(&results, &["--json", "--row", "kv-left", "--model", "llama-3.1-8b"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["rows"][0]["measured"], Value::Array(Vec::new()));
}

/// In virtual time, so that the outcome is the same on every machine: the scaler that is quoted answers nobody.
#[test]
fn a_row_that_takes_a_fleet_is_simulated() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("numbers.jsonl");
    let text = printed(&results, &["run", "keda-zero"]);
    assert!(
        text.starts_with("llama-3.1-8b, no weights: ") && text.contains("on simulated H100 SXM"),
        "{text}"
    );
    assert!(text.contains("      simulated ") && !text.contains("      measured "), "{text}");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(&results).unwrap()).unwrap();
    let findings = kept["findings"].as_array().unwrap();
    let shares: Vec<_> = findings[..2].iter().map(|finding| &finding["measured"]).collect();
    assert_eq!(shares, [0.0, 1.0], "{findings:?}");
    assert!(kept["server_flags"][0].as_str().unwrap().starts_with("sim --json --hardware h100 "), "{kept}");
    let shown = printed(&results, &["--row", "keda-zero"]);
    assert!(shown.contains("llama-3.1-8b on simulated H100 SXM"), "{shown}");
    // What was simulated is not what this machine can do.
    let (code, _, err) = numbers(&results, &["--hardware", "measured"]);
    assert!(code == 2 && err.contains("holds no measurement yet"), "{err}");
}

/// What takes an embedding model is neither measured nor simulated, and a flag for a measurement is no mistake then.
#[test]
fn rows_that_cannot_be_answered_are_told_with_what_they_need() {
    let folder = tempfile::tempdir().unwrap();
    let text =
        printed(&folder.path().join("numbers.jsonl"), &["run", "semantic", "kv-mha", "--device", "cpu"]);
    assert!(text.contains("Not measured here:") && text.contains("an embedding model"), "{text}");
}

/// The server that an experiment started ends with it.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_ends_the_run_and_its_server() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};

    use crate::util::PATIENCE;

    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("numbers.jsonl");
    let mut command = servelab(&["numbers", "run", "littles-law", "--device", "cpu", "--results"]);
    command.arg(&results).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.spawn().unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("expected")), "it says what it expects once its server runs");
    let id = running.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let server = children.trim();
    assert!(Path::new(&format!("/proc/{server}")).exists() && !server.contains(' '), "{children:?}");
    assert!(Command::new("kill").args(["-s", "INT", &id.to_string()]).status().unwrap().success());
    let rest = std::thread::spawn(move || lines.for_each(drop));
    let start = std::time::Instant::now();
    while running.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            let _ = running.kill();
            panic!("it does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    rest.join().unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(1));
    let mut errors = String::new();
    running.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(errors.contains("interrupted; 0 measurements are in"), "{errors}");
    // The number may have been given to another process since; that is then no server.
    let command_line = std::fs::read(format!("/proc/{server}/cmdline")).unwrap_or_default();
    assert!(!String::from_utf8_lossy(&command_line).contains("serve\0"), "the server still runs");
}

#[test]
fn what_is_not_known_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("numbers.jsonl");
    let cases: [(&[&str], &str); 11] = [
        (&["run", "keda-zero", "--model", "demo"], "--model changes nothing here"),
        (&["run", "knee-33"], "\"knee-33\" is no row of the ledger and no experiment; rows: decode-70b, "),
        (&["run", "--dollars-per-hour", "0"], "--dollars-per-hour is 0; it must be from "),
        (&["run", "--model", "/no/such/folder"], "neither a folder nor a hub id"),
        (&["run", "--hardware", "abacus"], "unknown hardware \"abacus\"; known: "),
        (&["--row", "knee-33"], "no row \"knee-33\"; there are decode-70b, "),
        (&["--needs", "moon"], "nothing, machine, gpu, fleet, embeddings"),
        (&["--model", "gpt-9"], "unknown shape preset \"gpt-9\"; known: llama-3.1-8b, "),
        (&["--hardware", "abacus"], "unknown hardware \"abacus\"; known: "),
        (&["--hardware", "measured"], "holds no measurement yet; servelab numbers run makes some"),
        (&["--format", "pdf"], "table, markdown, json, html"),
    ];
    for (flags, part) in cases {
        let (code, out, err) = numbers(&results, flags);
        assert_eq!((code, out.as_str()), (2, ""), "{flags:?}: {err}");
        assert!(err.contains(part), "{flags:?}: {err}");
    }
}

#[test]
fn a_file_of_results_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_str().unwrap();
    for (flags, part) in [(&[][..], "cannot read"), (&["run", "kv-left"], "cannot write")] {
        let (code, _, err) = numbers(folder.path(), flags);
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(part) && err.contains(name), "{err}");
    }
    let results = folder.path().join("numbers.jsonl");
    std::fs::write(&results, "{\"cut").unwrap();
    let (code, out, err) = numbers(&results, &["--row", "kv-mha"]);
    assert!(code == 0 && out.contains("kv-mha"), "{err}");
    assert!(err.contains("1 line of") && err.contains("the first is line 1"), "{err}");
}
