//! What the load generator shows while it runs: lines that are drawn again on a terminal, plain lines elsewhere,
//! nothing if it is told to be quiet.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::pty::{Winsize, openpty};

use crate::bench::text;
use crate::util::{Server, servelab};

fn command(server: &Server, flags: &[&str]) -> Command {
    let mut command =
        servelab(&["bench", "--url", &server.base, "--input-tokens", "8", "--output-tokens", "4"]);
    command.args(flags).env("TERM", "xterm-256color").stdout(Stdio::null());
    command
}

/// Runs to its end, with standard error on a terminal of 100 columns; returns what that was sent.
fn on_a_terminal(mut command: Command) -> String {
    let size = Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(Some(&size), None).unwrap();
    let mut child = command.stderr(Stdio::from(pair.slave)).spawn().unwrap();
    // Holds the terminal's other end, without which reading would never end.
    drop(command);
    let (mut terminal, mut shown) = (File::from(pair.master), Vec::new());
    // An error says that the last writer has left.
    let _ = terminal.read_to_end(&mut shown);
    child.wait().unwrap();
    text(&shown)
}

#[tokio::test]
async fn a_terminal_is_drawn_again() {
    let server = Server::start(&[]).await;
    let flags = ["--rate", "20", "--requests", "30", "--repeats", "2"];
    let start = Instant::now();
    let command = command(&server, &flags);
    let shown = tokio::task::spawn_blocking(|| on_a_terminal(command)).await.unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let drawn = shown.matches(" in flight, ").count();
    // At most five times a second, and once more at each beginning and end.
    assert!(drawn >= 2 && drawn as f64 <= 5.0 * seconds + 4.0, "{drawn} in {seconds} s: {shown:?}");
    for part in
        ["20.0000 req/s, Poisson, repeat 2 of 2", "TTFT p50 ", "ITL p50 ", "tokens/s", "% ", "\u{1b}["]
    {
        assert!(shown.contains(part), "{part:?} is not in {shown:?}");
    }
    // What stays is one line for each repeat.
    assert_eq!(shown.matches("repeat 1: 30 of 30, ").count(), 1, "{shown:?}");
}

#[tokio::test]
async fn elsewhere_there_is_a_line_now_and_then() {
    let server = Server::start(&[]).await;
    let flags = ["--rate", "4", "--duration", "6s", "--repeats", "1", "--warm-up", "0"];
    let run = |more: &[&str]| {
        let mut command = command(&server, &[&flags, more].concat());
        command.stderr(Stdio::piped());
        async { tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap() }
    };
    let (plain, quiet, json) = tokio::join!(run(&[]), run(&["--quiet"]), run(&["--json"]));
    let lines = text(&plain.stderr);
    let live = lines.lines().find(|line| line.contains(" in flight, "));
    assert!(live.is_some_and(|line| line.contains("% ") && line.contains("ITL p50 ")), "{lines}");
    assert!(!lines.contains('\u{1b}'), "{lines:?}");
    // Nothing but, on a busy machine, why the figures do not stand.
    for output in [quiet, json] {
        let errors = text(&output.stderr);
        assert!(errors.lines().all(|line| line.contains("client-bound")), "{errors}");
    }
}
