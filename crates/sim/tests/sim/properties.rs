//! What must hold for any input: the right direction, the right dimension, never faster than the roofline.

use proptest::prelude::*;
use servelab_sim::formulas::*;
use servelab_sim::{
    Assumptions, HardwareProfile, ModelShape, PlanError, Roofline, SequenceWork, plan, whiteboard,
};

use crate::models::{decode_model, h100, llama_8b, llama_70b};

/// A failing case is printed; no file is left behind.
fn config() -> ProptestConfig {
    ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() }
}

/// Equal up to rounding.
fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

/// Not more than, up to rounding.
fn at_most(a: f64, b: f64) -> bool {
    a <= b * (1.0 + 1e-9)
}

prop_compose! {
    fn models()(
        parameters in 1e8..1e12_f64,
        bytes_per_parameter in prop::sample::select(vec![1.0, 2.0, 4.0]),
        kv_bytes_per_token in 1e3..1e7_f64,
    ) -> DecodeModel {
        let streamed_bytes = parameters * bytes_per_parameter;
        DecodeModel { streamed_parameters: parameters, streamed_bytes, kv_bytes_per_token }
    }
}

prop_compose! {
    fn some_gpus()(count in 1_u32..=64, bandwidth in 1e10..1e13_f64, flops in 1e11..1e16_f64) -> Gpus {
        Gpus { count, bandwidth_bytes_per_second: bandwidth, flops_per_second: flops }
    }
}

prop_compose! {
    fn batches()(sequences in 1_u32..2000, context_tokens in 1.0..1e5_f64) -> DecodeBatch {
        DecodeBatch { sequences: f64::from(sequences), context_tokens }
    }
}

prop_compose! {
    fn work()(cached in 0_u64..50_000, new in 1_u64..3000, rows in 0_u64..=1) -> SequenceWork {
        SequenceWork { cached_tokens: cached, new_tokens: new, logits_rows: rows }
    }
}

fn shapes() -> impl Strategy<Value = ModelShape> {
    prop::sample::select(vec![llama_8b(), llama_70b()])
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn f1_is_linear_in_every_input(layers in 1_u64..200, kv_heads in 1_u64..128, head_dim in 1_u64..256) {
        let layout = KvLayout { layers, kv_heads, head_dim, bytes_per_element: 2 };
        let twice = 2.0 * kv_bytes_per_token(layout);
        prop_assert_eq!(kv_bytes_per_token(KvLayout { layers: 2 * layers, ..layout }), twice);
        prop_assert_eq!(kv_bytes_per_token(KvLayout { kv_heads: 2 * kv_heads, ..layout }), twice);
        prop_assert_eq!(kv_bytes_per_token(KvLayout { head_dim: 2 * head_dim, ..layout }), twice);
        prop_assert_eq!(kv_bytes_per_token(KvLayout { bytes_per_element: 4, ..layout }), twice);
    }

    #[test]
    fn f2_more_work_takes_longer_and_more_gpus_less(
        model in models(), batch in batches(), gpus in some_gpus(), factor in 1.0..10.0_f64,
    ) {
        let floor = decode_step_floor_seconds(model, batch, gpus);
        let wider = DecodeBatch { sequences: batch.sequences * factor, ..batch };
        let longer = DecodeBatch { context_tokens: batch.context_tokens * factor, ..batch };
        prop_assert!(at_most(floor, decode_step_floor_seconds(model, wider, gpus)));
        prop_assert!(at_most(floor, decode_step_floor_seconds(model, longer, gpus)));
        let more = Gpus { count: gpus.count * 2, ..gpus };
        prop_assert!(same(floor, 2.0 * decode_step_floor_seconds(model, batch, more)));
    }

    /// Seconds: a clock that runs `unit` times as fast counts that many times as many of them.
    #[test]
    fn f2_to_f5_scale_as_their_dimensions(
        model in models(), batch in batches(), gpus in some_gpus(), unit in 0.001..1000.0_f64,
    ) {
        let slower = Gpus {
            bandwidth_bytes_per_second: gpus.bandwidth_bytes_per_second / unit,
            flops_per_second: gpus.flops_per_second / unit,
            ..gpus
        };
        let floor = |gpus| decode_step_floor_seconds(model, batch, gpus);
        let rate = |gpus| decode_tokens_per_second(model, batch, gpus);
        let prefill = |gpus: Gpus| prefill_gpu_seconds_per_token(model.streamed_parameters, gpus.flops_per_second);
        prop_assert!(same(floor(slower), unit * floor(gpus)));
        prop_assert!(same(rate(slower), rate(gpus) / unit));
        prop_assert!(same(prefill(slower), unit * prefill(gpus)));
        prop_assert!(same(ridge_batch(model, slower), ridge_batch(model, gpus)));
        // Bytes: what is counted in other units of memory takes the same time.
        let rescaled = DecodeModel {
            streamed_bytes: model.streamed_bytes * unit,
            kv_bytes_per_token: model.kv_bytes_per_token * unit,
            ..model
        };
        let bandwidth_bytes_per_second = gpus.bandwidth_bytes_per_second * unit;
        let rescaled_gpus = Gpus { bandwidth_bytes_per_second, ..gpus };
        prop_assert!(same(decode_step_floor_seconds(rescaled, batch, rescaled_gpus), floor(gpus)));
        prop_assert!(same(half_batch(rescaled, batch.context_tokens), half_batch(model, batch.context_tokens)));
    }

    #[test]
    fn f3_throughput_grows_with_the_batch_up_to_its_two_roofs(
        model in models(), batch in batches(), gpus in some_gpus(), factor in 1.0..10.0_f64,
    ) {
        let rate = decode_tokens_per_second(model, batch, gpus);
        let wider = DecodeBatch { sequences: batch.sequences * factor, ..batch };
        prop_assert!(at_most(rate, decode_tokens_per_second(model, wider, gpus)));
        prop_assert!(at_most(rate, asymptotic_tokens_per_second(model, batch.context_tokens, gpus)));
        let flops = f64::from(gpus.count) * gpus.flops_per_second;
        prop_assert!(at_most(rate, flops / (2.0 * model.streamed_parameters)));
    }

    #[test]
    fn f3_half_batch_gets_half_while_memory_binds(model in models(), context_tokens in 1.0..1e5_f64, gpus in some_gpus()) {
        let unlimited = Gpus { flops_per_second: 1e30, ..gpus };
        let batch = DecodeBatch { sequences: half_batch(model, context_tokens), context_tokens };
        let rate = decode_tokens_per_second(model, batch, unlimited);
        prop_assert!(same(2.0 * rate, asymptotic_tokens_per_second(model, context_tokens, unlimited)));
    }

    #[test]
    fn f3_at_the_ridge_weights_take_as_long_to_read_as_to_multiply(model in models(), gpus in some_gpus()) {
        let batch = DecodeBatch { sequences: ridge_batch(model, gpus), context_tokens: 0.0 };
        prop_assert!(same(decode_memory_seconds(model, batch, gpus), decode_compute_seconds(model, batch, gpus)));
    }

    #[test]
    fn f4_holds_what_fits_and_not_one_more(
        gpus in 1_u32..=8, memory_bytes_per_gpu in 1e9..2e11_f64, utilisation in 0.5..1.0_f64,
        weight_bytes in 1e8..1e11_f64, activation_bytes_per_gpu in 0.0..2e9_f64,
        tokens in 1.0..1e5_f64, kv in 1e3..1e6_f64,
    ) {
        let memory = ReplicaMemory { gpus, memory_bytes_per_gpu, utilisation, weight_bytes, activation_bytes_per_gpu };
        let pool = kv_pool_bytes(memory);
        let requests = batch_capacity(pool, tokens, kv).floor();
        let used = |requests: f64| {
            weight_bytes + f64::from(gpus) * activation_bytes_per_gpu + requests * tokens * kv
        };
        let usable = f64::from(gpus) * memory_bytes_per_gpu * utilisation;
        if requests >= 0.0 {
            prop_assert!(used(requests) <= usable * (1.0 + 1e-12));
        }
        prop_assert!(used(requests + 1.0) >= usable * (1.0 - 1e-12));
    }

    /// A prompt in two parts, the first of them then cached, takes as long as in one.
    #[test]
    fn f5_attention_of_the_parts_is_that_of_the_whole(first in 1.0..1e5_f64, second in 1.0..1e5_f64) {
        let part = |cached_tokens, uncached_tokens| {
            let attention = PromptAttention { layers: 80, heads: 64, head_dim: 128, cached_tokens, uncached_tokens };
            causal_attention_gpu_seconds(attention, 989e12)
        };
        prop_assert!(same(part(0.0, first) + part(first, second), part(0.0, first + second)));
    }

    #[test]
    fn f6_costs_more_for_longer_requests_and_less_on_better_engines(
        prefill in 1e-4..10.0_f64, mfu in 0.05..1.0_f64, output_tokens in 1.0..1e4_f64, rate in 1.0..1e5_f64,
        factor in 1.0..10.0_f64,
    ) {
        let cost = RequestCost {
            prefill_floor_gpu_seconds: prefill, mfu, output_tokens, decode_tokens_per_second_per_gpu: rate,
        };
        let seconds = gpu_seconds_per_request(cost);
        prop_assert!(seconds >= prefill && seconds >= output_tokens / rate);
        let longer = RequestCost { output_tokens: output_tokens * factor, ..cost };
        let colder = RequestCost { prefill_floor_gpu_seconds: prefill * factor, ..cost };
        let faster = RequestCost { decode_tokens_per_second_per_gpu: rate * factor, ..cost };
        let worse = RequestCost { mfu: mfu / factor, ..cost };
        prop_assert!(gpu_seconds_per_request(longer) >= seconds);
        prop_assert!(gpu_seconds_per_request(colder) >= seconds);
        prop_assert!(gpu_seconds_per_request(worse) >= seconds);
        prop_assert!(gpu_seconds_per_request(faster) <= seconds);
    }

    #[test]
    fn f7_and_f10_are_proportions(rate in 0.1..1e5_f64, seconds in 0.01..100.0_f64, price in 0.1..100.0_f64) {
        let residence = MeanResidence { ttft_seconds: seconds, output_tokens: 10.0, tpot_seconds: seconds / 10.0 };
        prop_assert!(same(in_flight(rate, residence), rate * 2.0 * seconds));
        // What an hour costs, for what it makes.
        let per_million = dollars_per_million_tokens(price, rate);
        prop_assert!(same(per_million * rate * 3600.0 / 1e6, price));
    }

    #[test]
    fn f8_a_hit_is_never_slower(overhead in 0.0..1.0_f64, total in 1.0..1e5_f64, share in 0.0..=1.0_f64) {
        let hit = PrefixHit {
            overhead_seconds: overhead, uncached_tokens: share * total, total_tokens: total,
            prefill_seconds_per_token: 15e-6,
        };
        let ratio = hit_ttft_ratio(hit);
        prop_assert!(at_most(ratio, 1.0) && ratio >= share * (1.0 - 1e-12));
    }

    #[test]
    fn the_roofline_is_never_above_f5_nor_below_f2(shape in shapes(), batch in 1_usize..300, context in 1_u64..20_000) {
        let roofline = Roofline::new(&shape, &h100(), 4).unwrap();
        let gpus = crate::models::gpus("h100", 4);
        let step = roofline.step(std::iter::repeat_n(SequenceWork::decode(context), batch));
        let uniform = DecodeBatch { sequences: batch as f64, context_tokens: context as f64 };
        prop_assert!(at_most(decode_step_floor_seconds(decode_model(&shape), uniform, gpus), step.floor_seconds()));
        let prompt = roofline.step([SequenceWork::prefill(0, context)]);
        let attention = PromptAttention {
            layers: shape.layers, heads: shape.heads, head_dim: shape.head_dim,
            cached_tokens: 0.0, uncached_tokens: context as f64,
        };
        let f5 = context as f64 * prefill_gpu_seconds_per_token(shape.streamed_parameters() as f64, 989e12)
            + causal_attention_gpu_seconds(attention, 989e12);
        // The diagonal, half a pair a token, is what the closed form leaves out.
        let diagonal = 2.0 * (shape.layers * shape.heads * shape.head_dim) as f64 * context as f64 / 989e12;
        prop_assert!(at_most(prompt.compute_seconds, (f5 + diagonal) / 4.0));
    }

    #[test]
    fn a_step_costs_at_least_each_part_and_at_most_their_sum(
        shape in shapes(), left in prop::collection::vec(work(), 1..20), right in prop::collection::vec(work(), 1..20),
    ) {
        let roofline = Roofline::new(&shape, &h100(), 4).unwrap();
        let floor = |work: &[SequenceWork]| roofline.step(work.iter().copied()).floor_seconds();
        let (alone, beside) = (floor(&left), floor(&right));
        let together = floor(&[left, right].concat());
        prop_assert!(at_most(alone.max(beside), together) && at_most(together, alone + beside));
    }

    #[test]
    fn a_prompt_in_chunks_takes_no_less_than_in_one(shape in shapes(), first in 1_u64..5000, second in 1_u64..5000) {
        let roofline = Roofline::new(&shape, &h100(), 2).unwrap();
        let floor = |work| roofline.step([work]).floor_seconds();
        let chunks = floor(SequenceWork::chunk(0, first)) + floor(SequenceWork::prefill(first, second));
        prop_assert!(at_most(floor(SequenceWork::prefill(0, first + second)), chunks));
    }
}

prop_compose! {
    fn assumptions()(
        daily_users in 1.0..1e8_f64,
        sessions_per_user in 0.001..100.0_f64,
        requests_per_session in 0.001..100.0_f64,
        input_tokens in 1_u64..60_000,
        cached_share in 0.0..=1.0_f64,
        output_tokens in 1_u64..60_000,
        peak_factor in prop::option::of(1.0..=100.0_f64),
        memory_utilisation in 0.8..=1.0_f64,
        mfu in 0.01..=1.0_f64,
        decode_efficiency in 0.01..=1.0_f64,
        headroom in 1.0..=10.0_f64,
        max_running in prop::option::of(1_u32..1000),
    ) -> Assumptions {
        Assumptions {
            daily_users, sessions_per_user, requests_per_session, input_tokens, cached_share, output_tokens,
            peak_factor, memory_utilisation, mfu, decode_efficiency, headroom, max_running,
            ..Assumptions::DEFAULT
        }
    }
}

fn hardware() -> impl Strategy<Value = HardwareProfile> {
    prop::sample::select(HardwareProfile::all().unwrap())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_plan_never_beats_the_roofline_and_fits_the_whiteboard(
        shape in shapes(), hardware in hardware(), assumptions in assumptions(),
    ) {
        let plan = match plan(&shape, &hardware, &assumptions) {
            Ok(plan) => plan,
            Err(PlanError::DoesNotFit { .. }) => return Ok(()),
            Err(error) => panic!("{error}"),
        };
        let count = plan.memory.gpus_per_replica;
        let roofline = Roofline::new(&shape, &hardware, count).unwrap();
        // Contexts of whole tokens below the mean, so that the floor is not above that of the mean.
        let context = plan.speed.context_tokens.floor() as u64;
        let step = roofline.step(std::iter::repeat_n(SequenceWork::decode(context), plan.speed.batch as usize));
        let memory = step.memory_seconds / assumptions.decode_efficiency;
        prop_assert!(at_most(memory, plan.speed.step_seconds));
        let uncached = assumptions.uncached_tokens() as u64;
        let prompt = roofline.step([SequenceWork::chunk(assumptions.input_tokens - uncached, uncached - 1)]);
        prop_assert!(at_most(prompt.compute_seconds, plan.speed.ttft_seconds));
        // A TTFT of a whole step counts the first token twice.
        if plan.speed.ttft_seconds == plan.speed.prefill_seconds {
            prop_assert!(at_most(plan.fleet.in_flight, plan.fleet.slots as f64));
        }
        prop_assert!(at_most(plan.fleet.peak_tpot_seconds, plan.speed.full_batch_tpot_seconds));
        let lines = [whiteboard::lines(&plan), whiteboard::warning_lines(&plan)];
        prop_assert!(lines[0].len() < 25);
        for line in lines.iter().flatten() {
            prop_assert!(line.chars().count() <= whiteboard::WIDTH, "{}", line);
            prop_assert!(!line.contains("inf") && !line.contains("NaN"), "{}", line);
        }
    }

    #[test]
    fn more_of_anything_costly_never_needs_fewer_gpus(assumptions in assumptions(), factor in 1.0..3.0_f64) {
        let gpus = |assumptions: &Assumptions| Some(plan(&llama_8b(), &h100(), assumptions).ok()?.fleet.gpus);
        let base = gpus(&assumptions).unwrap();
        let more = [
            Assumptions { daily_users: assumptions.daily_users * factor, ..assumptions },
            Assumptions { headroom: (assumptions.headroom * factor).min(10.0), ..assumptions },
            Assumptions { mfu: (assumptions.mfu / factor).max(0.01), ..assumptions },
            Assumptions { decode_efficiency: (assumptions.decode_efficiency / factor).max(0.01), ..assumptions },
            Assumptions { cached_share: assumptions.cached_share / factor, ..assumptions },
            Assumptions { output_tokens: assumptions.output_tokens + 1000, ..assumptions },
            Assumptions { input_tokens: assumptions.input_tokens + 1000, ..assumptions },
        ];
        for changed in &more {
            prop_assert!(gpus(changed).unwrap() >= base, "{:?}", changed);
        }
    }
}
