//! The load generator against servers that misbehave: each way to fail is counted under its own name, and a report is
//! written all the same.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;

use serde_json::Value;

use crate::bench::{bench, json, text};

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"bad","object":"model","max_model_len":4096}]}"#;
/// To a question about the length of a prompt.
const COUNTED: &str = r#"{"choices":[{"text":"x","finish_reason":"length"}],"usage":{"prompt_tokens":24,"completion_tokens":1}}"#;

/// What a bad server does with a streaming request.
type Script = fn(&mut TcpStream);

/// A server that leaves streaming requests to the script, and other ones too unless it `answers_questions`. Its
/// threads end when their clients hang up.
fn serve(answers_questions: bool, script: Script) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || converse(stream, answers_questions, script));
        }
    });
    base
}

fn converse(mut stream: TcpStream, answers_questions: bool, script: Script) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some((path, body)) = read_request(&mut reader) {
        match path.as_str() {
            _ if !answers_questions || body["stream"] == true => script(&mut stream),
            "/v1/models" => say(&mut stream, &plain("200 OK", MODELS)),
            "/v1/completions" => say(&mut stream, &plain("200 OK", COUNTED)),
            _ => say(&mut stream, &plain("404 Not Found", "{}")),
        }
    }
}

/// Path and body; `None` once the client has hung up.
pub fn read_request(reader: &mut BufReader<TcpStream>) -> Option<(String, Value)> {
    let (mut path, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if path.is_empty() {
            path = line.split(' ').nth(1)?.to_owned();
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((path, serde_json::from_slice(&body).unwrap_or_default()))
}

pub fn say(stream: &mut TcpStream, text: &str) {
    // The client may have left.
    let _ = stream.write_all(text.as_bytes());
}

pub fn plain(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn event(data: &str) -> String {
    let event = format!("data: {data}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}

fn token() -> String {
    event(r#"{"choices":[{"text":"x","finish_reason":null}]}"#)
}

fn whole(rest: &[String]) -> String {
    let finish = event(r#"{"choices":[{"text":"x","finish_reason":"length"}]}"#);
    [HEAD, &token(), &finish, &rest.concat(), &event("[DONE]"), "0\r\n\r\n"].concat()
}

/// The benchmark of four requests against it, into `folder`: its printed result, its errors.
fn measured(url: &str, folder: &Path, more: &[&str]) -> (Value, String) {
    let out = folder.to_str().unwrap();
    let mut flags = vec!["--url", url, "--concurrency", "2", "--requests", "4", "--repeats", "1"];
    flags.extend(["--warm-up", "0", "--no-cool-down", "--json", "--out", out]);
    flags.extend(more);
    let output = bench(&flags);
    let errors = text(&output.stderr);
    let printed = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(json(&folder.join("result.json")), printed);
    (printed, errors)
}

/// All requests failed in this way, and everything that is shown says so.
fn fails_as(url: &str, more: &[&str], name: &str, requests: u64) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let (printed, errors) = measured(url, folder.path(), more);
    let point = &printed["points"][0];
    assert_eq!((&point["metrics"]["completed"], &point["metrics"]["failed"]), (&0.into(), &requests.into()));
    let failures = point["repeats"][0]["failures"].as_array().unwrap();
    assert_eq!((failures.len(), &failures[0]["name"]), (1, &name.into()), "{failures:?}");
    assert_eq!(failures[0]["measured"], requests);
    assert!(errors.contains(&format!("{requests} x {name}")), "{errors}");
    for report in ["report.html", "report.md"] {
        let report = std::fs::read_to_string(folder.path().join(report)).unwrap();
        assert!(report.contains(name) || report.contains(&name.replace('_', "\\_")), "{report}");
    }
    let lines = std::fs::read_to_string(folder.path().join("requests.jsonl")).unwrap();
    assert_eq!(lines.lines().count() as u64, requests);
    printed
}

#[test]
fn every_failure_is_counted_by_name() {
    let bad: [(&str, Script, &[&str]); 7] = [
        ("status_500", |stream| say(stream, &plain("500 No", r#"{"error":{"message":"no"}}"#)), &[]),
        (
            "dropped",
            |stream| {
                say(stream, &format!("{HEAD}{}", token()));
                let _ = stream.shutdown(Shutdown::Both);
            },
            &[],
        ),
        ("first_byte_timeout", |_| {}, &["--first-byte-timeout", "200ms"]),
        ("stall", |stream| say(stream, &format!("{HEAD}{}", token())), &["--idle-timeout", "200ms"]),
        ("broken_sse", |stream| say(stream, &format!("{HEAD}{}", event("<html>"))), &[]),
        ("no_usage", |stream| say(stream, &whole(&[])), &[]),
        (
            "error_event",
            |stream| say(stream, &format!("{HEAD}{}", event(r#"{"error":{"message":"lost"}}"#))),
            &[],
        ),
    ];
    for (name, script, more) in bad {
        fails_as(&serve(true, script), more, name, 4);
    }
}

/// A server that does not even say what it serves gets one request.
#[test]
fn a_server_that_tells_nothing_is_reported() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let refuses: Script = |stream| say(stream, &plain("503 No", r#"{"error":{"message":"no"}}"#));
    let hangs_up: Script = |stream| {
        let _ = stream.shutdown(Shutdown::Both);
    };
    let silent = ["--first-byte-timeout", "200ms"];
    for (url, more, name) in [
        (nobody, &[][..], "unreachable"),
        (serve(false, refuses), &[], "status_503"),
        (serve(false, hangs_up), &[], "dropped"),
        (serve(false, |_| {}), &silent, "first_byte_timeout"),
    ] {
        let printed = fails_as(&url, more, name, 1);
        let reason = printed["header"]["unanswered"].as_str().unwrap();
        assert!(reason.contains(&url), "{reason}");
    }
    // Named by the user, the model need not be listed.
    let printed = fails_as(&serve(false, refuses), &["--model", "mine"], "status_503", 4);
    assert_eq!(printed["header"]["model"]["id"], "mine");
    assert!(printed["header"].get("unanswered").is_none());
}

#[test]
fn good_answers_beside_bad_ones_are_measured() {
    let every_other: Script = |stream| {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        match NUMBER.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => say(stream, &plain("429 No", r#"{"error":{"message":"full"}}"#)),
            _ => say(
                stream,
                &whole(&[event(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#)]),
            ),
        }
    };
    let flags = ["--concurrency", "1", "--requests", "6", "--repeats", "1", "--warm-up", "0", "--json"];
    let url = serve(true, every_other);
    let output = bench(&[&["--url", &url, "--no-cool-down"][..], &flags].concat());
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let point = &printed["points"][0];
    assert_eq!((&point["metrics"]["completed"], &point["metrics"]["failed"]), (&3.into(), &3.into()));
    assert_eq!(point["repeats"][0]["failures"][0]["name"], "status_429");
    assert!(printed["mean_ttft_ms"].as_f64() > Some(0.0));
}
