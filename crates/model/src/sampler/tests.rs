use std::sync::Arc;

use super::*;
use servelab_engine::SequenceId;

const VOCAB: usize = 50;

/// Logits with a clear order and no ties.
fn logits() -> Vec<f32> {
    (0..VOCAB as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 700.0 - 2.0).collect()
}

fn row(params: SamplingParams, output_index: u32, history: Option<History>, banned: &[TokenId]) -> LogitsRow {
    let draw = Draw { sampling: Arc::new(params), choice: 0, output_index, banned: banned.into(), history };
    LogitsRow { row: 0, sequence: SequenceId(1), want: Want::Sample(draw) }
}

fn sampled(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, seed: 42, ..SamplingParams::greedy() }
}

fn token(params: &SamplingParams, output_index: u32) -> TokenId {
    let mut sampler = Sampler::default();
    sampler.answer(&logits(), &row(params.clone(), output_index, None, &[])).unwrap().token
}

/// The distribution that the parameters describe, by sorting everything, in f64.
fn reference(params: &SamplingParams, mut logits: Vec<f64>) -> Vec<f64> {
    logits.iter_mut().for_each(|logit| *logit /= f64::from(params.temperature));
    let softmax = |logits: &[f64]| {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / total).collect::<Vec<f64>>()
    };
    let cut = |logits: &mut [f64], keep: &dyn Fn(usize) -> bool| {
        (0..VOCAB).filter(|i| !keep(*i)).for_each(|i| logits[i] = f64::NEG_INFINITY);
    };
    let p = softmax(&logits);
    let largest = p.iter().copied().fold(0.0, f64::max);
    cut(&mut logits, &|i| p[i] >= f64::from(params.min_p) * largest);
    let p = softmax(&logits);
    let mut order: Vec<usize> = (0..VOCAB).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    if let Some(k) = params.top_k {
        let kept = order[..(k as usize).min(VOCAB)].to_vec();
        cut(&mut logits, &|i| kept.contains(&i));
    }
    let p = softmax(&logits);
    let (mut sum, mut kept) = (0.0, Vec::new());
    for i in order {
        if sum < f64::from(params.top_p) && p[i] > 0.0 {
            sum += p[i];
            kept.push(i);
        }
    }
    cut(&mut logits, &|i| kept.contains(&i));
    softmax(&logits)
}

/// Draws agree with `expected` (chi-square, 0.9999 quantile by Wilson and Hilferty).
fn assert_distribution(params: &SamplingParams, expected: &[f64]) {
    const DRAWS: u32 = 20_000;
    let mut counts = [0u32; VOCAB];
    (0..DRAWS).for_each(|index| counts[token(params, index) as usize] += 1);
    let (mut chi, mut cells) = (0.0, 0);
    let (mut rare_expected, mut rare_found) = (0.0, 0.0);
    for (count, p) in counts.iter().zip(expected) {
        let mean = p * f64::from(DRAWS);
        if *p == 0.0 {
            assert_eq!(*count, 0, "{params:?}");
        } else if mean < 10.0 {
            rare_expected += mean;
            rare_found += f64::from(*count);
        } else {
            chi += (f64::from(*count) - mean).powi(2) / mean;
            cells += 1;
        }
    }
    if rare_expected > 5.0 {
        chi += (rare_found - rare_expected) * (rare_found - rare_expected) / rare_expected;
        cells += 1;
    }
    let freedom = f64::from(cells - 1).max(1.0);
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + 3.72 * spread.sqrt()).powi(3);
    assert!(chi < limit, "{params:?}: chi-square {chi} of {freedom} degrees, limit {limit}");
}

#[test]
fn draws_follow_the_distribution_that_the_parameters_describe() {
    let wide: Vec<f64> = logits().iter().map(|logit| f64::from(*logit)).collect();
    for params in [
        sampled(1.0),
        sampled(0.3),
        sampled(3.0),
        SamplingParams { top_k: Some(5), ..sampled(1.0) },
        SamplingParams { top_k: Some(1), ..sampled(1.0) },
        SamplingParams { top_k: Some(1000), ..sampled(1.0) },
        SamplingParams { top_p: 0.7, ..sampled(2.0) },
        SamplingParams { top_p: 1e-6, ..sampled(2.0) },
        SamplingParams { min_p: 0.2, ..sampled(1.0) },
        SamplingParams { min_p: 1.0, ..sampled(1.0) },
        SamplingParams { top_k: Some(20), top_p: 0.8, min_p: 0.05, ..sampled(1.3) },
    ] {
        assert_distribution(&params, &reference(&params, wide.clone()));
    }
}

#[test]
fn draws_depend_on_seed_choice_and_position_only() {
    let params = sampled(2.0);
    let draws = |params: &SamplingParams| (0..64).map(|i| token(params, i)).collect::<Vec<_>>();
    assert_eq!(draws(&params), draws(&params));
    assert_ne!(draws(&params), draws(&SamplingParams { seed: 43, ..params.clone() }));
    // A sampler that answered other rows before gives the same.
    let mut used = Sampler::default();
    used.answer(&[1.0; 7], &row(SamplingParams { top_p: 0.5, ..params.clone() }, 5, None, &[])).unwrap();
    let again: Vec<TokenId> =
        (0..64).map(|i| used.answer(&logits(), &row(params.clone(), i, None, &[])).unwrap().token).collect();
    assert_eq!(again, draws(&params));
}

#[test]
fn greedy_takes_the_likeliest_and_of_equals_the_first() {
    let mut sampler = Sampler::default();
    let greedy = row(SamplingParams::greedy(), 0, None, &[]);
    assert_eq!(sampler.answer(&[1.0, 3.0, 3.0, 2.0], &greedy).unwrap().token, 1);
    let banned = row(SamplingParams::greedy(), 0, None, &[1, 2, 900]);
    assert_eq!(sampler.answer(&[1.0, 3.0, 3.0, 2.0], &banned).unwrap().token, 3);
    let bias = SamplingParams { logit_bias: vec![(0, 5.0), (900, 5.0)], ..SamplingParams::greedy() };
    assert_eq!(sampler.answer(&[1.0, 3.0, 3.0, 2.0], &row(bias, 0, None, &[])).unwrap().token, 0);
}

/// What the penalties make of logits, seen through the log-probabilities of a second sampler that is
/// given the modified logits: the greedy choices must agree.
#[test]
fn penalties_are_those_of_the_formulas() {
    let history = History { prompt: [0u32, 1, 900].as_slice().into(), output: vec![1, 2, 2, 2, 901] };
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        temperature: 1.0,
        ..SamplingParams::greedy()
    };
    let mut sampler = Sampler::default();
    let logits = [4.0, 3.0, -1.0, 0.5, 6.0];
    sampler.answer(&logits, &row(params, 0, Some(history), &[])).unwrap();
    // Prompt only: divided. Prompt and once in the output: divided, minus 0.5 + 0.25. Three times in
    // the output and negative: multiplied, minus 1.5 + 0.25. Unseen: untouched.
    assert_eq!(sampler.logits, [2.0, 0.75, -3.75, 0.5, 6.0]);
}

#[test]
fn logprobs_are_the_log_softmax_of_the_raw_logits() {
    let params =
        SamplingParams { logprobs: Some(20), logit_bias: vec![(3, 100.0)], top_k: Some(2), ..sampled(0.1) };
    let output = Sampler::default().answer(&logits(), &row(params, 0, None, &[])).unwrap();
    assert_eq!(output.token, 3);
    let raw: Vec<f64> = logits().iter().map(|logit| f64::from(*logit)).collect();
    let normaliser = raw.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    let logprobs = output.logprobs.unwrap();
    assert!((f64::from(logprobs.logprob) - (raw[3] - normaliser)).abs() < 1e-5);
    assert_eq!(logprobs.rank as usize, 1 + raw.iter().filter(|logit| **logit > raw[3]).count());
    let mut order: Vec<usize> = (0..VOCAB).collect();
    order.sort_by(|a, b| raw[*b].total_cmp(&raw[*a]));
    assert_eq!(logprobs.top.len(), 20);
    for ((token, logprob), expected) in logprobs.top.iter().zip(order) {
        assert_eq!(*token as usize, expected);
        assert!((f64::from(*logprob) - (raw[expected] - normaliser)).abs() < 1e-5);
    }
}

#[test]
fn scores_name_the_target_and_extreme_logits_do_not_overflow() {
    let score =
        |target, top| LogitsRow { row: 0, sequence: SequenceId(1), want: Want::Score { target, top } };
    let mut sampler = Sampler::default();
    let output = sampler.answer(&[3e38, -3e38, 3e38], &score(1, 0)).unwrap();
    let logprobs = output.logprobs.unwrap();
    assert_eq!((output.token, logprobs.rank, logprobs.top.len()), (1, 3, 0));
    assert!(logprobs.logprob < -1e38);
    let output = sampler.answer(&[3e38, -3e38, 3e38], &score(2, 9)).unwrap();
    let logprobs = output.logprobs.unwrap();
    assert_eq!((logprobs.rank, logprobs.top.len(), logprobs.top[0].0), (1, 3, 0));
    assert!((logprobs.logprob + std::f32::consts::LN_2).abs() < 1e-6);
    assert!(sampler.answer(&[1.0], &score(1, 0)).is_err());
}

#[test]
fn logits_that_are_no_numbers_fail_the_step() {
    let mut sampler = Sampler::default();
    for params in [SamplingParams::greedy(), sampled(1.0), SamplingParams { top_p: 0.5, ..sampled(1.0) }] {
        for broken in [f32::NAN, f32::INFINITY] {
            let row = row(params.clone(), 0, None, &[]);
            assert!(matches!(sampler.answer(&[1.0, broken, 2.0], &row), Err(RunnerError::Step(_))));
            assert!(matches!(sampler.answer(&[f32::NEG_INFINITY; 3], &row), Err(RunnerError::Step(_))));
        }
        let all_banned = row(params, 0, None, &[0, 1]);
        assert!(matches!(sampler.answer(&[1.0, 2.0], &all_banned), Err(RunnerError::Step(_))));
    }
}
