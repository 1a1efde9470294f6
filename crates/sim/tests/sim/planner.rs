//! Whole plans: their arithmetic done a second time, what they warn of, what they refuse.

use servelab_sim::{
    Assumptions, CapacityPlan, Dtype, HardwareProfile, Limit, ModelShape, PlanError, SlidingWindow, plan,
    whiteboard,
};

use crate::models::{h100, llama_8b, llama_70b};

const DEFAULT: Assumptions = Assumptions::DEFAULT;

fn planned(model: &ModelShape, hardware: &str, assumptions: Assumptions) -> CapacityPlan {
    plan(model, &HardwareProfile::named(hardware).unwrap(), &assumptions).unwrap()
}

fn refusal(model: &ModelShape, assumptions: Assumptions) -> String {
    plan(model, &h100(), &assumptions).unwrap_err().to_string()
}

fn warned(plan: &CapacityPlan, id: &str) -> Option<String> {
    plan.warnings.iter().find(|warning| warning.id == id).map(|warning| warning.text.clone())
}

#[track_caller]
fn close(value: f64, expected: f64) {
    assert!((value / expected - 1.0).abs() < 1e-9, "{value} is not {expected}");
}

/// The default plan, term by term from the numbers of the data sheet and of config.json.
#[test]
fn the_default_plan_by_hand() {
    let plan = planned(&llama_70b(), "h100", DEFAULT);
    let rate = 1e6 * 5.0 * 10.0 / 86_400.0 * 3.0;
    close(plan.load.peak_requests_per_second, rate);
    let pool = 2.0 * (85.5e9 * 0.9 - 1.25e9) - 141_107_412_992.0;
    close(plan.memory.kv_pool_bytes, pool);
    assert_eq!((plan.memory.gpus_per_replica, plan.speed.batch), (2, 13));
    let step = (139_006_066_688.0 + 13.0 * 2150.0 * 327_680.0) / 6.7e12;
    close(plan.speed.step_floor_seconds, step);
    assert_eq!(plan.speed.step_limit, Limit::Memory);
    let decode = 13.0 / (step / 0.6) / 2.0;
    close(plan.speed.decode_tokens_per_second_per_gpu, decode);
    let prefill = (2000.0 * 139_006_066_688.0 + 2.0 * 80.0 * 64.0 * 128.0 * 4e6) / 989e12;
    close(plan.speed.prefill_floor_gpu_seconds, prefill);
    let request = prefill / 0.5 + 300.0 / decode;
    close(plan.speed.gpu_seconds_per_request, request);
    let replicas = (rate * request * 1.3 / 2.0).ceil();
    assert_eq!((plan.fleet.replicas as f64, plan.fleet.gpus as f64), (replicas, 2.0 * replicas));
    let tpot = |batch: f64| {
        (139_006_066_688.0 + batch * 2150.0 * 327_680.0) / 6.7e12 / 0.6 + (batch - 1.0) * prefill / 300.0
    };
    close(plan.speed.ttft_seconds, prefill);
    close(plan.speed.full_batch_tpot_seconds, tpot(13.0));
    // All terms are linear in the batch here, so that Little's law can be solved for it.
    let (arrivals, slope) = (rate / replicas, (tpot(2.0) - tpot(1.0)) * 300.0);
    let others = arrivals * (prefill + 300.0 * tpot(1.0)) / (1.0 - arrivals * slope);
    close(plan.fleet.peak_batch, others + 1.0);
    close(plan.fleet.peak_tpot_seconds, tpot(others + 1.0));
    close(plan.fleet.in_flight, replicas * others);
    close(plan.fleet.dollars_per_million_busy.unwrap(), 3.0 / (300.0 / request * 3600.0) * 1e6);
    let day = 2.0 * replicas * 3.0 * 24.0;
    close(plan.fleet.dollars_per_million_fixed.unwrap(), day / (1e6 * 50.0 * 300.0) * 1e6);
    close(plan.fleet.watts.unwrap(), 2.0 * replicas * 700.0);
}

/// Little's law over replicas that are just full gives the batch.
#[test]
fn a_full_replica_holds_its_batch() {
    for (model, hardware) in [(llama_70b(), "h100"), (llama_8b(), "l4"), (llama_8b(), "b200")] {
        let plan = planned(&model, hardware, DEFAULT);
        let rate = f64::from(plan.memory.gpus_per_replica) / plan.speed.gpu_seconds_per_request;
        let residence = plan.speed.ttft_seconds + 300.0 * plan.speed.full_batch_tpot_seconds;
        close(rate * residence, plan.speed.batch as f64);
    }
}

#[test]
fn a_request_that_is_alone_decodes_at_the_speed_of_one() {
    let plan = planned(&llama_8b(), "h100", few_users());
    // 8B on an H100 by itself: the floor of 4.57 ms at this context over 0.6.
    assert!((0.0075..0.0085).contains(&plan.fleet.peak_tpot_seconds), "{}", plan.fleet.peak_tpot_seconds);
    assert!(plan.fleet.in_flight < 1.0 && plan.fleet.peak_batch < 2.0);
}

/// 50 tokens are computed in 12 ms, and reading the weights takes an L4 83 ms.
#[test]
fn a_short_prompt_takes_as_long_as_reading_the_weights() {
    let short = Assumptions { input_tokens: 50, output_tokens: 50, ..DEFAULT };
    let plan = planned(&llama_8b(), "l4", short);
    assert!(plan.speed.ttft_seconds > 15.0e9 / 300e9 / 0.6 && plan.speed.prefill_seconds < 0.02);
    assert!(whiteboard::lines(&plan).iter().any(|line| line.contains("a step of one sequence")));
}

/// One request at a time and no room for more: the batch cannot grow.
#[test]
fn the_batch_of_the_peak_is_at_most_a_full_one() {
    let single = Assumptions { max_running: Some(1), headroom: 1.0, ..DEFAULT };
    let plan = planned(&llama_8b(), "h100", single);
    assert_eq!(plan.fleet.peak_batch, 1.0);
    assert_eq!(plan.fleet.peak_tpot_seconds, plan.speed.full_batch_tpot_seconds);
}

#[test]
fn a_70b_does_not_fit_one_h100_and_takes_two() {
    for wanted in [None, Some(1)] {
        let plan = planned(&llama_70b(), "h100", Assumptions { gpus_per_replica: wanted, ..DEFAULT });
        assert_eq!(plan.memory.gpus_per_replica, 2);
        let text = warned(&plan, "fit").unwrap();
        assert_eq!(
            text,
            "141.1 GB of weights do not fit into 1 x H100 SXM (77.0 GB usable); 2 GPUs a replica do"
        );
    }
    let wanted = Assumptions { gpus_per_replica: Some(4), ..DEFAULT };
    assert_eq!(warned(&planned(&llama_70b(), "h100", wanted), "fit"), None);
}

#[test]
fn more_gpus_a_replica_can_be_fewer_in_all() {
    let smallest = planned(&llama_70b(), "h100", DEFAULT);
    let best = planned(&llama_70b(), "h100", Assumptions { gpus_per_replica: Some(8), ..DEFAULT });
    assert!(best.fleet.gpus < smallest.fleet.gpus / 2, "{} of {}", best.fleet.gpus, smallest.fleet.gpus);
    let text = warned(&smallest, "tp").unwrap();
    assert!(text.starts_with("8 GPUs a replica need"), "{text}");
    assert_eq!(warned(&best, "tp"), None);
}

/// Each warning where its shortcut is wrong, and not where it is right.
#[test]
fn shortcuts_are_named_where_they_are_wrong() {
    let short_answers = Assumptions { input_tokens: 20, output_tokens: 1000, ..DEFAULT };
    let plain = ModelShape { kv_heads: 32, ..llama_8b() };
    let few_kv_heads = ModelShape { kv_heads: 4, ..llama_8b() };
    let fp8 = |shape: ModelShape| ModelShape { weight_dtype: Dtype::Fp8, ..shape };
    let spread = |gpus| Assumptions { gpus_per_replica: Some(gpus), ..DEFAULT };
    let known_peak = Assumptions { peak_factor: Some(3.0), ..DEFAULT };
    let cases = [
        ("prefill", planned(&llama_70b(), "h100", DEFAULT), planned(&llama_8b(), "h100", short_answers)),
        ("gqa", planned(&llama_8b(), "h100", DEFAULT), planned(&plain, "h100", DEFAULT)),
        ("knee", planned(&llama_70b(), "h100", DEFAULT), planned(&fp8(llama_8b()), "h100", DEFAULT)),
        ("quoted", planned(&llama_70b(), "h100", DEFAULT), planned(&llama_70b(), "h200", DEFAULT)),
        ("peak", planned(&llama_70b(), "h100", DEFAULT), planned(&llama_70b(), "h100", known_peak)),
        ("compute", planned(&llama_8b(), "l40s", short_answers_fp8()), planned(&llama_8b(), "l40s", DEFAULT)),
        ("fp8", planned(&fp8(llama_8b()), "a100", DEFAULT), planned(&fp8(llama_8b()), "l4", DEFAULT)),
        ("links", planned(&llama_70b(), "l40s", spread(8)), planned(&llama_70b(), "h100", spread(8))),
        ("copies", planned(&few_kv_heads, "h100", spread(8)), planned(&few_kv_heads, "h100", spread(4))),
        ("spare", planned(&llama_8b(), "h100", few_users()), planned(&llama_8b(), "h100", DEFAULT)),
    ];
    for (id, wrong, right) in &cases {
        assert!(warned(wrong, id).is_some(), "{id} is missing");
        assert_eq!(warned(right, id), None);
    }
}

fn short_answers_fp8() -> Assumptions {
    Assumptions { input_tokens: 16, output_tokens: 16, ..DEFAULT }
}

fn few_users() -> Assumptions {
    Assumptions { daily_users: 100.0, ..DEFAULT }
}

#[test]
fn littles_law_is_named_where_a_percentile_would_mislead() {
    let text = warned(&planned(&llama_70b(), "h100", DEFAULT), "little").unwrap();
    assert!(text.contains("868 in flight"), "{text}");
    // A residence of about half a second.
    let short = Assumptions { input_tokens: 300, output_tokens: 16, max_running: Some(32), ..DEFAULT };
    let plan = planned(&llama_8b(), "h100", short);
    let residence = plan.fleet.in_flight / plan.load.peak_requests_per_second;
    assert!((0.25..1.0).contains(&residence), "{residence}");
    assert_eq!(warned(&plan, "little"), None);
}

#[test]
fn a_warm_prefix_cache_saves_prefill_but_not_its_last_token() {
    let with = |cached_share| planned(&llama_8b(), "h100", Assumptions { cached_share, ..DEFAULT });
    let (cold, half, full) = (with(0.0), with(0.5), with(1.0));
    assert!(half.speed.prefill_floor_gpu_seconds > 0.5 * cold.speed.prefill_floor_gpu_seconds);
    assert!(half.fleet.gpus < cold.fleet.gpus && full.fleet.gpus < half.fleet.gpus);
    assert_eq!(full.assumptions.uncached_tokens(), 1.0);
    assert!(full.speed.prefill_floor_gpu_seconds > 0.0);
}

#[test]
fn the_batch_can_be_limited() {
    let plan = planned(&llama_8b(), "h100", Assumptions { max_running: Some(32), ..DEFAULT });
    assert_eq!(plan.speed.batch, 32);
    assert!(plan.memory.capacity_requests > 32);
    assert!(whiteboard::lines(&plan).iter().any(|line| line.contains("32 (of ")));
    let beyond = Assumptions { max_running: Some(1_000_000), ..DEFAULT };
    let plan = planned(&llama_8b(), "h100", beyond);
    assert_eq!(plan.speed.batch, plan.memory.capacity_requests);
}

#[test]
fn without_a_price_nothing_is_said_about_money() {
    let own = HardwareProfile { dollars_per_hour: None, ..h100() };
    let silent = plan(&llama_8b(), &own, &DEFAULT).unwrap();
    assert_eq!(silent.fleet.dollars_per_million_busy, None);
    assert!(whiteboard::lines(&silent).iter().all(|line| !line.contains('$')));
    let priced = Assumptions { dollars_per_gpu_hour: Some(2.0), ..DEFAULT };
    assert_eq!(plan(&llama_8b(), &own, &priced).unwrap().fleet.dollars_per_gpu_hour, Some(2.0));
}

#[test]
fn what_cannot_be_is_refused() {
    let long = Assumptions { input_tokens: 131_000, output_tokens: 300, ..DEFAULT };
    assert_eq!(
        refusal(&llama_8b(), long),
        "131000 input and 300 output tokens exceed the 131072 tokens of llama-3.1-8b's context; lower them to that \
         together, or choose another model"
    );
    let window = Some(SlidingWindow { layers: 32, tokens: 2048 });
    let sliding = ModelShape { sliding_window: window, ..llama_8b() };
    assert!(refusal(&sliding, DEFAULT).contains("the 2048 tokens of llama-3.1-8b's sliding window"));
    let huge = ModelShape { name: "405b".to_owned(), parameters: 405_853_388_800, ..llama_70b() };
    assert_eq!(
        refusal(&huge, DEFAULT),
        "405b with one request of 2300 tokens needs 822.5 GB and 8 x H100 SXM offer 615.6 GB; choose a narrower number \
         format, shorter requests, or GPUs with more memory"
    );
    let three = Assumptions { gpus_per_replica: Some(3), ..DEFAULT };
    assert!(refusal(&llama_8b(), three).ends_with("it splits over 1, 2, 4, 8"));
    let f32 = ModelShape { weight_dtype: Dtype::F32, ..llama_8b() };
    assert!(refusal(&f32, DEFAULT).contains("no arithmetic for f32"));
    assert!(refusal(&ModelShape { layers: 0, ..llama_8b() }, DEFAULT).contains("layers"));
}

#[test]
fn impossible_assumptions_are_refused_by_name() {
    type Change = fn(&mut Assumptions);
    let changes: [(Change, &str); 16] = [
        (|all| all.daily_users = 0.0, "daily_users is 0"),
        (|all| all.daily_users = f64::NAN, "daily_users is NaN"),
        (|all| all.sessions_per_user = -1.0, "sessions_per_user is -1"),
        (|all| all.requests_per_session = f64::INFINITY, "requests_per_session is inf"),
        (
            |all| (all.daily_users, all.sessions_per_user) = (1e10, 1000.0),
            "requests_per_day is 100000000000000",
        ),
        (|all| all.input_tokens = 0, "input_tokens is 0"),
        (|all| all.output_tokens = u64::MAX, "output_tokens is 18446744073709552000"),
        (|all| all.cached_share = 1.1, "cached_share is 1.1; it must be from 0 to 1"),
        (|all| all.peak_factor = Some(0.5), "peak_factor is 0.5"),
        (|all| all.memory_utilisation = 90.0, "memory_utilisation is 90"),
        (|all| all.activation_bytes_per_gpu = -1.0, "activation_bytes_per_gpu is -1"),
        (|all| all.mfu = 50.0, "mfu is 50"),
        (|all| all.decode_efficiency = 0.0, "decode_efficiency is 0"),
        (|all| all.headroom = 0.5, "headroom is 0.5"),
        (|all| all.gpus_per_replica = Some(0), "gpus_per_replica is 0"),
        (|all| all.max_running = Some(0), "max_running is 0"),
    ];
    for (change, start) in changes {
        let mut assumptions = DEFAULT;
        change(&mut assumptions);
        let error = plan(&llama_8b(), &h100(), &assumptions).unwrap_err();
        assert!(matches!(error, PlanError::Range { .. }));
        assert!(error.to_string().starts_with(start), "{error}");
    }
}

#[test]
fn a_plan_is_data_too() {
    let plan = planned(&llama_70b(), "h100", DEFAULT);
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["fleet"]["gpus"], plan.fleet.gpus);
    assert_eq!(json["model"]["kv_dtype"], "bf16");
    assert_eq!(json["hardware"]["flops_per_second"]["fp8"], 1979e12);
    assert_eq!(json["speed"]["step_limit"], "memory");
    assert_eq!(json["warnings"][0]["id"], "fit");
}
