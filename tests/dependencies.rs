//! Every dependency has a licence that `deny.toml` allows and comes from the crates registry.
//!
//! The same check as `cargo deny check licenses sources`, from the same list, without a tool to install.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The packages that are built for this machine.
fn packages() -> Vec<Value> {
    let rustc = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(rustc.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let arguments = ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(repository()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(metadata["packages"].take()).unwrap()
}

fn allowed() -> Vec<String> {
    let text = std::fs::read_to_string(repository().join("deny.toml")).unwrap();
    let table: toml::Table = toml::from_str(&text).unwrap();
    let list = table["licenses"]["allow"].as_array().unwrap().clone();
    list.into_iter().map(|licence| licence.as_str().unwrap().to_owned()).collect()
}

/// Whether a licence expression (SPDX, and the older `A/B`) can be met with these licences.
fn is_met(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = tokens.as_slice();
    alternatives(&mut rest, allowed) == Some(true) && rest.is_empty()
}

/// `None` if the tokens are no expression.
fn alternatives(rest: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = all_of(rest, allowed)?;
    while rest.first() == Some(&"OR") {
        *rest = &rest[1..];
        met |= all_of(rest, allowed)?;
    }
    Some(met)
}

fn all_of(rest: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = one(rest, allowed)?;
    while rest.first() == Some(&"AND") {
        *rest = &rest[1..];
        met &= one(rest, allowed)?;
    }
    Some(met)
}

fn one(rest: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let (&first, tail) = rest.split_first()?;
    *rest = tail;
    if first == "(" {
        let met = alternatives(rest, allowed)?;
        let (&closing, tail) = rest.split_first()?;
        *rest = tail;
        return (closing == ")").then_some(met);
    }
    let mut name = first.to_owned();
    if let ["WITH", exception, tail @ ..] = *rest {
        name = format!("{name} WITH {exception}");
        *rest = tail;
    }
    Some(allowed.contains(&name))
}

#[test]
fn every_dependency_may_be_used() {
    let allowed = allowed();
    let packages = packages();
    assert!(packages.len() > 100, "the list of packages is not whole: {}", packages.len());
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(
            is_met(licence, &allowed),
            "{name} has the licence {licence}, which deny.toml does not allow"
        );
        let source = package["source"].as_str();
        assert!(source.is_none_or(|source| source == REGISTRY), "{name} comes from {source:?}");
    }
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT".to_owned(), "ISC".to_owned(), "A WITH B".to_owned()];
    for met in ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND ISC", "(GPL-3.0 OR MIT) AND ISC", "A WITH B"]
    {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in
        ["", "GPL-3.0", "MIT AND GPL-3.0", "A", "(MIT", "MIT)", "MIT OR", "A WITH C", "MIT ISC", "none"]
    {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}
