//! `servelab doctor` as people run it. What it does with a GPU is tested on an emulator, in the model crate.

use serde_json::Value;

use crate::util::{run, servelab};

fn has_gpu() -> bool {
    std::path::Path::new("/dev/nvidiactl").exists()
}

#[test]
fn the_doctor_shows_the_machine_and_ends_with_a_verdict() {
    if has_gpu() {
        return;
    }
    let (code, out, err) = run(servelab(&["doctor"]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let starts: Vec<&str> = out.lines().map(|line| line.split("  ").next().unwrap()).collect();
    assert_eq!(starts[..4], ["CPU", "CPU limits", "CPU model", "GPU"], "{out}");
    assert!(out.contains("no NVIDIA driver (libcuda.so.1) was found"), "{out}");
    assert_eq!(
        out.lines().last(),
        Some("all is well: servelab serves on the CPU; there was no GPU to check"),
        "{out}"
    );
}

#[test]
fn the_doctor_speaks_json_and_fails_where_a_gpu_was_asked_for() {
    if has_gpu() {
        return;
    }
    let (code, out, _) = run(servelab(&["doctor", "--json", "--gpu", "--threads", "1"]));
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["passed"], &report["gpu"]), (1, &Value::Bool(false), &Value::Null));
    assert_eq!(report["cpu"]["threads"], 1);
    assert_eq!(report["cpu"]["small_model"]["passed"], true);
    assert_eq!(report["faults"][0], report["no_gpu"]);
}

#[test]
fn what_the_doctor_does_not_know_ends_with_2() {
    for flags in [&["doctor", "--threads", "0"][..], &["doctor", "--gpus"]] {
        let (code, _, err) = run(servelab(flags));
        assert_eq!(code, 2, "{err}");
    }
}
