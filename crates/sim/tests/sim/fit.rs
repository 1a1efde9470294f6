//! Calibration against a truth that is known: points measured in virtual time over the real engine.

use servelab_engine::EngineConfig;
use servelab_sim::fit::{Errors, Fit, FitError, Point, Target, fit, merged};
use servelab_sim::replay::{Arrivals, Length, Load, Measured, replay};
use servelab_sim::{Calibration, CostModel};

fn target() -> Target {
    Target {
        model: "truth".to_owned(),
        gpus: 1,
        max_running: 64,
        max_batched_tokens: 4096,
        kv_tokens: 320_000,
        steps_at_once: 1,
        is_remote: true,
    }
}

fn truth() -> Calibration {
    Calibration {
        model: "truth".to_owned(),
        gpus: 1,
        step_seconds: 5e-3,
        weights_seconds: 0.0,
        decode_seconds: 40e-6,
        context_token_seconds: 60e-9,
        prefill_step_seconds: 3e-3,
        prefill_token_seconds: 25e-6,
        prefill_pair_seconds: 2e-9,
        request_seconds: 2e-3,
    }
}

fn measure(calibration: &Calibration, load: Load) -> Measured {
    let target = target();
    let config = EngineConfig {
        block_size: 16,
        num_blocks: target.kv_tokens / 16,
        max_model_len: 2,
        max_batched_tokens: target.max_batched_tokens,
        max_running: target.max_running,
        max_waiting: 1,
        prefix_cache: false,
    };
    let cost = CostModel::Calibrated(calibration.clone());
    replay(config, cost, target.steps_at_once, Load { request_seconds: calibration.request_seconds, ..load })
        .unwrap()
}

fn load(arrivals: Arrivals, input_tokens: u32, output_tokens: u32) -> Load {
    let requests = match arrivals {
        Arrivals::Closed(clients) => 6 * clients.max(4),
        Arrivals::Poisson(_) => 200,
    };
    Load {
        arrivals,
        requests,
        warm_up: 0,
        input_tokens: Length { mean: f64::from(input_tokens), std: 0.2 * f64::from(input_tokens) },
        output_tokens: Length { mean: f64::from(output_tokens), std: 0.2 * f64::from(output_tokens) },
        request_seconds: 0.0,
    }
}

fn closed(clients: u32, input_tokens: u32, output_tokens: u32) -> Load {
    load(Arrivals::Closed(clients), input_tokens, output_tokens)
}

fn point(load: Load) -> Point {
    point_of(&truth(), load)
}

fn point_of(truth: &Calibration, load: Load) -> Point {
    let measured = measure(truth, load);
    Point {
        label: format!("{:?}", load.arrivals),
        arrivals: load.arrivals,
        requests: load.requests,
        warm_up: 0,
        input_tokens: load.input_tokens,
        output_tokens: load.output_tokens,
        requests_per_second: f64::from(load.requests) / measured.duration_seconds,
        ttft_seconds: measured.ttft_seconds,
        tpot_seconds: measured.tpot_seconds,
    }
}

fn fitted(loads: &[Load]) -> Fit {
    let points: Vec<Point> = loads.iter().map(|load| point(*load)).collect();
    fit(&target(), &points, &[]).unwrap()
}

fn close(found: f64, truth: f64, share: f64) -> bool {
    (found / truth - 1.0).abs() < share
}

fn within(errors: &[Errors], share: f64) -> bool {
    errors
        .iter()
        .all(|errors| [errors.ttft, errors.tpot, errors.requests_per_second].iter().all(|e| e.abs() < share))
}

/// Several lengths of prompts and of answers at several loads tell all coefficients.
#[test]
fn the_truth_is_found_again() {
    let mut loads = vec![load(Arrivals::Poisson(8.0), 400, 100)];
    for clients in [1, 6, 24] {
        loads.extend([closed(clients, 200, 150), closed(clients, 1500, 60), closed(clients, 3000, 100)]);
    }
    let fit = fitted(&loads);
    let (found, truth) = (&fit.calibration, truth());
    assert!(fit.unseen.is_empty() && found.weights_seconds == 0.0, "{fit:#?}");
    assert!(close(found.step_seconds, truth.step_seconds, 0.05), "{found:?}");
    assert!(close(found.decode_seconds, truth.decode_seconds, 0.3), "{found:?}");
    assert!(close(found.prefill_token_seconds, truth.prefill_token_seconds, 0.05), "{found:?}");
    assert!(close(found.context_token_seconds, truth.context_token_seconds, 0.2), "{found:?}");
    assert!(close(found.prefill_pair_seconds, truth.prefill_pair_seconds, 0.2), "{found:?}");
    assert!(close(found.prefill_step_seconds, truth.prefill_step_seconds, 0.3), "{found:?}");
    assert!(close(found.request_seconds, truth.request_seconds, 0.3), "{found:?}");
    assert!(within(&fit.errors, 0.05) && within(&fit.held_out, 0.1), "{fit:#?}");
}

/// What the calibration is for: a device that was calibrated at some concurrencies behaves at others as the one that
/// was measured, below saturation and beyond.
#[test]
fn a_calibrated_device_behaves_like_the_measured_one_at_other_concurrencies() {
    let fit = fitted(&[1, 2, 8, 24, 48].map(|clients| closed(clients, 512, 128)));
    for clients in [4, 16, 36, 64, 100] {
        let load = closed(clients, 512, 128);
        let (found, truth) = (measure(&fit.calibration, load), measure(&truth(), load));
        let is_close = close(found.tpot_seconds, truth.tpot_seconds, 0.1)
            && close(found.output_tokens_per_second, truth.output_tokens_per_second, 0.1)
            && close(found.ttft_seconds, truth.ttft_seconds, 0.1);
        assert!(is_close, "{clients}: {found:?} against {truth:?}, with {fit:#?}");
    }
}

/// Up to some number of tokens a step takes as long as reading the weights; a line through all loads would be too high
/// among few clients and too low among many.
#[test]
fn tokens_that_are_hidden_behind_the_weights_are_found_out() {
    let truth = Calibration {
        step_seconds: 1e-3,
        weights_seconds: 12e-3,
        decode_seconds: 1.5e-3,
        context_token_seconds: 0.0,
        prefill_step_seconds: 0.0,
        prefill_token_seconds: 0.5e-3,
        prefill_pair_seconds: 0.0,
        ..truth()
    };
    let points = [1, 2, 4, 8, 16, 32].map(|clients| point_of(&truth, closed(clients, 64, 48)));
    let checks = [3, 6, 12, 24].map(|clients| point_of(&truth, closed(clients, 64, 48)));
    let fit = fit(&target(), &points, &checks).unwrap();
    assert!(close(fit.calibration.weights_seconds, truth.weights_seconds, 0.3), "{fit:#?}");
    assert!(within(&fit.errors, 0.07) && within(&fit.checked, 0.07), "{fit:#?}");
}

/// A load that was measured again is no load more, and a measurement that a stall spoilt does not count.
#[test]
fn what_was_measured_several_times_is_one_point() {
    let good = point(closed(4, 512, 128));
    let other = point(closed(4, 2048, 128));
    let stalled = Point { ttft_seconds: 10.0 * good.ttft_seconds, requests: 1, ..good.clone() };
    let longer = Length { mean: 1.1 * good.input_tokens.mean, ..good.input_tokens };
    let again = Point { input_tokens: longer, ..good.clone() };
    let merged = merged(&[good.clone(), other.clone(), stalled, again]);
    assert_eq!(merged, [good, other]);
}

/// Points that are only predicted change nothing of the fit.
#[test]
fn other_loads_are_predicted_and_not_fitted() {
    let points = [1, 2, 8, 24, 48].map(|clients| point(closed(clients, 512, 128)));
    let checks = [4, 16, 36].map(|clients| point(closed(clients, 512, 128)));
    let (plain, checked) = (fit(&target(), &points, &[]).unwrap(), fit(&target(), &points, &checks).unwrap());
    assert_eq!(checked.calibration, plain.calibration);
    assert!(checked.checked.len() == 3 && within(&checked.checked, 0.1), "{checked:#?}");
    let beyond = Point { ttft_seconds: -1.0, ..checks[0].clone() };
    assert!(fit(&target(), &points, &[beyond]).is_err());
}

/// With one length of prompt and answer nothing tells tokens of context from sequences.
#[test]
fn what_the_points_cannot_tell_is_named_and_left_out() {
    let fit = fitted(&[1, 4, 16].map(|clients| closed(clients, 512, 128)));
    assert!(fit.unseen.contains(&"gamma") && fit.unseen.contains(&"epsilon"), "{:?}", fit.unseen);
    assert_eq!((fit.calibration.context_token_seconds, fit.calibration.prefill_pair_seconds), (0.0, 0.0));
    assert!(fit.held_out.is_empty(), "three points are needed to fit, so none can be held out");
}

#[test]
fn points_that_cannot_be_are_refused_by_name() {
    let points: Vec<Point> = [1, 2, 4].map(|clients| point(closed(clients, 64, 16))).into();
    assert_eq!(fit(&target(), &points[..2], &[]), Err(FitError::TooFew(2)));
    let with = |change: fn(&mut Point)| {
        let mut points = points.clone();
        change(&mut points[1]);
        fit(&target(), &points, &[]).unwrap_err().to_string()
    };
    assert!(with(|point| point.tpot_seconds = 0.0).contains("mean TPOT is 0; it must be a positive number"));
    assert!(with(|point| point.ttft_seconds = f64::NAN).contains("mean TTFT is NaN"));
    assert!(with(|point| point.output_tokens.mean = 1.0).contains("of answers at least 2"));
}
