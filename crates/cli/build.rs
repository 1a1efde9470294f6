//! Tells the binary which commit it was built from, where the sources are a repository.

use std::path::Path;
use std::process::Command;

/// Grows with every commit and checkout.
const HEAD_LOG: &str = "../../.git/logs/HEAD";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if Path::new(HEAD_LOG).exists() {
        println!("cargo::rerun-if-changed={HEAD_LOG}");
    }
    if let Some(commit) = commit() {
        println!("cargo::rustc-env=SERVELAB_COMMIT={commit}");
    }
}

fn commit() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !commit.is_empty()).then_some(commit)
}
