//! The simulated device under the real engine: answers, time, memory.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use servelab_engine::{
    Engine, EngineConfig, Event, FinishReason, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use servelab_sim::{
    Answers, Calibration, CostModel, DeviceOptions, Dtype, HardwareProfile, ModelShape, Pace, Roofline,
    SequenceWork, SimulatedDevice, VirtualClock, kv_pool,
};

use crate::models::{h100, llama_8b, llama_70b};

const END: TokenId = 1000;

fn config() -> EngineConfig {
    EngineConfig {
        block_size: 16,
        num_blocks: 400,
        max_model_len: 2048,
        max_batched_tokens: 256,
        max_running: 16,
        max_waiting: 64,
        prefix_cache: true,
    }
}

fn answers() -> Arc<Answers> {
    let encode = |text: &str| Ok::<_, Infallible>(text.bytes().map(TokenId::from).collect());
    Arc::new(Answers::new(encode, Some(END)).unwrap())
}

fn engine(
    config: EngineConfig,
    pace: Pace,
    cost: CostModel,
    steps_at_once: usize,
) -> Engine<SimulatedDevice> {
    let (num_blocks, block_size) = (config.num_blocks, config.block_size);
    let answers = answers();
    let options =
        DeviceOptions { num_blocks, block_size, steps_at_once, cost, pace, lost_after: None, answers };
    Engine::new(config, SimulatedDevice::new(options)).unwrap()
}

fn instant(config: EngineConfig, steps_at_once: usize) -> Engine<SimulatedDevice> {
    engine(config, Pace::Virtual(VirtualClock::default()), CostModel::Nothing, steps_at_once)
}

fn request(id: u64, prompt: Vec<TokenId>, max_tokens: u32, sampling: SamplingParams) -> Request {
    Request {
        id: RequestId(id),
        prompt: prompt.into(),
        n: 1,
        sampling: Arc::new(sampling),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: [END].into() },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    }
}

fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens).map(|token| (token * 31 + seed * 7) % 900).collect()
}

/// The answers by request and choice, with the reasons of their ends.
fn run(
    engine: &mut Engine<SimulatedDevice>,
    requests: Vec<Request>,
) -> Vec<((u64, u32), Vec<TokenId>, FinishReason)> {
    let mut tokens = std::collections::BTreeMap::<(u64, u32), Vec<TokenId>>::new();
    let mut ended = Vec::new();
    requests.into_iter().for_each(|request| engine.add(request).unwrap());
    for _ in 0..20_000 {
        if !engine.has_work() {
            break;
        }
        for event in engine.step(Duration::ZERO).events {
            match event {
                Event::Token { request, choice, token, .. } => {
                    tokens.entry((request.0, choice)).or_default().push(token);
                }
                Event::Finished { request, choice, reason } => {
                    let key = (request.0, choice);
                    ended.push((key, tokens.remove(&key).unwrap_or_default(), reason));
                }
                _ => {}
            }
        }
    }
    assert!(!engine.has_work(), "the engine does not end");
    ended.sort_by_key(|(key, ..)| *key);
    ended
}

fn alone(request: Request) -> Vec<TokenId> {
    run(&mut instant(EngineConfig { prefix_cache: false, ..config() }, 1), vec![request]).remove(0).1
}

/// Among others, in chunks, with few blocks and so with preemptions, with a warm cache, one or two steps at once.
#[test]
fn the_same_request_has_the_same_answer_in_any_company() {
    let requests = || -> Vec<Request> {
        (0..12)
            .map(|id| request(id, prompt(id as u32 / 2, 40 + 30 * id as u32), 300, SamplingParams::greedy()))
            .collect()
    };
    let expected: Vec<_> = requests().into_iter().map(alone).collect();
    assert_ne!(expected[2], expected[4]);
    for steps_at_once in [1, 2] {
        let mut engine = instant(EngineConfig { num_blocks: 90, ..config() }, steps_at_once);
        for _ in 0..2 {
            let found: Vec<_> =
                run(&mut engine, requests()).into_iter().map(|(_, tokens, _)| tokens).collect();
            assert_eq!(found, expected);
        }
        assert!(engine.stats().preemptions > 0 && engine.stats().prefix_hit_tokens > 0);
    }
}

#[test]
fn seeds_and_choices_give_other_answers_and_greedy_ones_ignore_them() {
    let sampled = |seed| SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() };
    let answer = |sampling| alone(request(0, prompt(1, 30), 60, sampling));
    assert_eq!(answer(sampled(1)), answer(sampled(1)));
    assert_ne!(answer(sampled(1)), answer(sampled(2)));
    let greedy = |seed| SamplingParams { seed, ..SamplingParams::greedy() };
    assert_eq!(answer(greedy(1)), answer(greedy(2)));
    let three = Request { n: 3, ..request(0, prompt(1, 30), 60, sampled(1)) };
    let mut choices: Vec<_> =
        run(&mut instant(config(), 2), vec![three]).into_iter().map(|(_, t, _)| t).collect();
    choices.dedup();
    assert_eq!(choices.len(), 3);
}

#[test]
fn answers_end_by_themselves_at_the_bound_or_after_the_least_length() {
    let greedy = SamplingParams::greedy;
    let of = |request| run(&mut instant(config(), 1), vec![request]).remove(0);
    let (_, tokens, reason) = of(request(0, prompt(3, 20), 1900, greedy()));
    assert_eq!((tokens.last(), reason), (Some(&END), FinishReason::Stop(Some(END))));
    let (_, cut, reason) = of(request(0, prompt(3, 20), 5, greedy()));
    assert_eq!((&cut[..], reason), (&tokens[..5], FinishReason::Length));
    let mut long = request(0, prompt(3, 20), 1900, greedy());
    long.stop.min_tokens = tokens.len() as u32 + 10;
    let (_, longer, reason) = of(long);
    assert!(longer.len() > tokens.len() && reason == FinishReason::Stop(Some(END)));
    assert!(!longer[..longer.len() - 1].contains(&END));
}

#[test]
fn log_probabilities_are_refused_and_the_device_lives_on() {
    let mut engine = instant(config(), 2);
    let asking = SamplingParams { logprobs: Some(2), ..SamplingParams::greedy() };
    let (_, _, reason) = run(&mut engine, vec![request(0, prompt(1, 9), 5, asking)]).remove(0);
    assert!(matches!(reason, FinishReason::Error(text) if text.contains("no logits")));
    assert_eq!(run(&mut engine, vec![request(1, prompt(1, 9), 5, SamplingParams::greedy())])[0].1.len(), 5);
}

fn flat(step_seconds: f64) -> CostModel {
    CostModel::Calibrated(Calibration { gpus: 1, step_seconds, ..Calibration::default() })
}

/// A prompt and 20 tokens are 20 steps; with two at once the step that comes after the last is under way already.
#[test]
fn steps_take_their_time_one_after_the_other() {
    for (steps_at_once, steps) in [(1, 20.0), (2, 20.0)] {
        let clock = VirtualClock::default();
        let mut engine = engine(config(), Pace::Virtual(clock.clone()), flat(0.01), steps_at_once);
        let answer = run(&mut engine, vec![request(0, prompt(1, 9), 20, SamplingParams::greedy())]);
        assert_eq!(answer[0].1.len(), 20);
        let seconds = clock.now().as_secs_f64();
        assert!((steps * 0.01..=(steps + 1.0) * 0.01 + 1e-6).contains(&seconds), "{seconds}");
    }
}

#[test]
fn on_the_wall_a_device_is_never_early_and_speed_divides() {
    let start = Instant::now();
    let mut engine = engine(config(), Pace::real(10.0), flat(0.1), 2);
    run(&mut engine, vec![request(0, prompt(1, 9), 10, SamplingParams::greedy())]);
    let seconds = start.elapsed().as_secs_f64();
    assert!((0.1..5.0).contains(&seconds), "{seconds}");
}

#[test]
fn the_pool_is_that_of_the_real_gpu() {
    // F4 of the ledger: 182 requests of 2,500 tokens.
    let pool = kv_pool(&llama_8b(), &h100(), 1, 0.9, 16, 2048).unwrap();
    assert_eq!(pool.num_blocks * 16 / 2500, 182);
    assert_eq!((pool.bytes_per_token, pool.weight_bytes), (131_072.0, 2.0 * 8_030_261_248.0));
    let four = kv_pool(&llama_70b(), &h100(), 4, 0.9, 16, 2048).unwrap();
    assert!(four.pool_bytes + four.weight_bytes + four.activation_bytes <= 4.0 * 0.9 * 85.5e9);
}

#[test]
fn a_model_that_does_not_fit_is_told_where_it_would() {
    let refusal = |shape: &ModelShape, hardware: &str, gpus| {
        let hardware = HardwareProfile::named(hardware).unwrap();
        kv_pool(shape, &hardware, gpus, 0.9, 16, 2048).unwrap_err().to_string()
    };
    let message = refusal(&llama_70b(), "h100", 1);
    assert_eq!(
        message,
        "llama-3.1-70b with room for 2048 tokens needs 143.0 GB and 1 x H100 SXM offer 77.0 GB; use --tp 2, the \
         smallest that fits"
    );
    assert!(refusal(&llama_70b(), "l4", 1).ends_with("use --tp 8, the smallest that fits"));
    let wide = ModelShape { weight_dtype: Dtype::F32, ..llama_70b() };
    assert!(refusal(&wide, "l4", 8).contains("no number of its GPUs is enough"));
}

fn works() -> impl Strategy<Value = Vec<SequenceWork>> {
    let work = (0u64..30_000, 1u64..4000, 0u64..2).prop_map(|(cached_tokens, new_tokens, logits_rows)| {
        SequenceWork { cached_tokens, new_tokens, logits_rows }
    });
    let decode = (1u64..30_000).prop_map(SequenceWork::decode);
    prop::collection::vec(prop_oneof![work, decode], 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// An estimate that beat physics would be wrong, on any GPU.
    #[test]
    fn no_estimate_is_below_the_roofline(works in works(), large in any::<bool>(), gpus in 0u32..4) {
        let gpus = 1 << gpus;
        let shape = if large { llama_70b() } else { llama_8b() };
        for hardware in HardwareProfile::all().unwrap() {
            let cost = CostModel::new(&shape, &hardware, gpus).unwrap();
            let floor = Roofline::new(&shape, &hardware, gpus).unwrap().step(works.iter().copied()).floor_seconds();
            let seconds = cost.step_seconds(works.iter().copied());
            prop_assert!(seconds >= floor, "{} {gpus}: {seconds} below {floor}", hardware.name);
        }
    }

    /// More work never takes less time.
    #[test]
    fn time_grows_with_work(works in works(), more in 1u64..5000) {
        let cost = CostModel::new(&llama_8b(), &h100(), 1).unwrap();
        let seconds = |works: &[SequenceWork]| cost.step_seconds(works.iter().copied());
        let before = seconds(&works);
        let mut larger = works.clone();
        larger[0].cached_tokens += more;
        prop_assert!(seconds(&larger) >= before);
        larger.push(SequenceWork::decode(more));
        prop_assert!(seconds(&larger) > before);
        prop_assert_eq!(seconds(&[]), 0.0);
    }
}
