//! `servelab plan`: the whiteboard as text and as data, and what it refuses. Its arithmetic is tested beside the
//! planner.

use serde_json::Value;

use crate::util::{run, servelab};

fn plan(flags: &[&str]) -> (i32, String, String) {
    let mut command = servelab(&["plan"]);
    command.args(flags);
    run(command)
}

#[test]
fn a_plan_is_a_whiteboard_or_data() {
    let load = ["--model", "llama-3.1-8b", "--hardware", "h100", "--dau", "1M", "--peak", "3"];
    let (code, text, err) = plan(&load);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(text.starts_with("llama-3.1-8b, weights bf16, KV bf16, on 1 x H100 SXM a replica"), "{text}");
    // 2 x 32 layers x 8 heads x 128 x 2 B; 50M requests a day x 300 tokens / 86,400 s x 3.
    assert!(text.contains("= 131,072 B/token") && text.contains("= 520,833 out/s"), "{text}");
    let (code, json, err) = plan(&[&load[..], &["--json"]].concat());
    assert_eq!((code, err.as_str()), (0, ""));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["model"]["name"], "llama-3.1-8b");
    let gpus = json["fleet"]["gpus"].as_u64().unwrap();
    let line = text.lines().find(|line| line.starts_with("GPUs")).unwrap();
    assert!(line.contains(&format!("= {gpus} ")), "{gpus}: {line}");
}

#[test]
fn a_plan_of_what_does_not_exist_is_refused() {
    let cases: [(&[&str], &str); 6] = [
        (&["--model", "gpt-9"], "--model: unknown shape preset \"gpt-9\"; known: llama-3.1-8b, "),
        (&["--hardware", "abacus"], "unknown hardware \"abacus\"; known: "),
        (&["--output-tokens", "0"], "--output-tokens is 0; it must be from 1 to "),
        (&["--dau", "many"], "many"),
        (&["--peak", "NaN"], "--peak is NaN; it must be "),
        (&["--mfu", "1.5"], "--mfu is 1.5; it must be "),
    ];
    for (flags, part) in cases {
        let (code, out, err) = plan(flags);
        assert_eq!((code, out.as_str()), (2, ""), "{flags:?}: {err}");
        assert!(err.contains(part), "{flags:?}: {err}");
    }
}
