//! Steps whose bytes and operations are counted by hand.

use servelab_sim::formulas::{self, DecodeBatch};
use servelab_sim::roofline::possible_gpus;
use servelab_sim::{Dtype, HardwareProfile, Limit, ModelShape, Roofline, SequenceWork, SlidingWindow};

use crate::models::{decode_model, gpus, h100, llama_8b, llama_70b};

/// Two layers, so small that everything can be counted.
fn tiny() -> ModelShape {
    ModelShape {
        name: "tiny".to_owned(),
        layers: 2,
        hidden: 8,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        intermediate: 16,
        vocabulary: 10,
        tied_embeddings: false,
        max_context_tokens: 100,
        sliding_window: None,
        // 80 of the input embedding, 80 of the logits, 1,000 of the layers.
        parameters: 1160,
        weight_dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
    }
}

fn device() -> HardwareProfile {
    HardwareProfile::measured(1e9, 1000.0, Dtype::Bf16, 1e4).unwrap()
}

fn roofline(shape: &ModelShape) -> Roofline {
    Roofline::new(shape, &device(), 1).unwrap()
}

#[test]
fn a_decode_step_counted_by_hand() {
    let cost = roofline(&tiny()).step([SequenceWork::decode(5), SequenceWork::decode(3)]);
    // 1,080 weights of 2 bytes; 8 tokens of 2 x 2 layers x 1 head x 4 x 2 bytes.
    assert_eq!(cost.memory_bytes, 2160.0 + 8.0 * 32.0);
    // 1,080 weights and 2 tokens; 2 layers x 2 heads x 8 pairs, each 2 products of 4 numbers.
    assert_eq!(cost.flops, 2.0 * 1080.0 * 2.0 + 32.0 * 16.0);
    assert_eq!((cost.memory_seconds, cost.compute_seconds), (2.416, 0.4832));
    assert_eq!((cost.floor_seconds(), cost.limit(), cost.new_tokens), (2.416, Limit::Memory, 2));
}

#[test]
fn a_prompt_counted_by_hand() {
    let cost = roofline(&tiny()).step([SequenceWork::prefill(4, 3)]);
    assert_eq!(cost.memory_bytes, 2160.0 + 7.0 * 32.0);
    // The logits of one token; pairs 5 + 6 + 7.
    assert_eq!(cost.flops, 2.0 * (1000.0 * 3.0 + 80.0) + 32.0 * 2.0 * 18.0);
}

#[test]
fn a_chunk_needs_no_logits() {
    let cost = roofline(&tiny()).step([SequenceWork::chunk(0, 3)]);
    assert_eq!(cost.memory_bytes, 2000.0 + 3.0 * 32.0);
    assert_eq!(cost.flops, 2.0 * 1000.0 * 3.0 + 32.0 * 2.0 * 6.0);
    let tied = ModelShape { tied_embeddings: true, parameters: 1080, ..tiny() };
    assert_eq!(roofline(&tied).step([SequenceWork::chunk(0, 3)]), cost);
}

#[test]
fn nothing_costs_nothing() {
    let cost = roofline(&tiny()).step([SequenceWork::chunk(5, 0)]);
    assert_eq!((cost.memory_bytes, cost.flops, cost.floor_seconds()), (0.0, 0.0, 0.0));
}

#[test]
fn a_sliding_window_bounds_what_a_layer_reads() {
    let window = Some(SlidingWindow { layers: 1, tokens: 4 });
    let sliding = roofline(&ModelShape { sliding_window: window, ..tiny() });
    let cost = sliding.step([SequenceWork::decode(10)]);
    // One layer touches 10 tokens, the other 4; 16 bytes a layer and token.
    assert_eq!(cost.memory_bytes, 2160.0 + 14.0 * 16.0);
    assert_eq!(cost.flops, 2.0 * 1080.0 + 32.0 * 14.0);
    // Pairs 3, 4, 4, 4 in the one layer, 3, 4, 5, 6 in the other.
    let cost = sliding.step([SequenceWork::chunk(2, 4)]);
    assert_eq!(cost.flops, 2.0 * 1000.0 * 4.0 + 32.0 * (15.0 + 18.0));
    // Within the window it is a plain model.
    let work = [SequenceWork::prefill(1, 3)];
    assert_eq!(sliding.step(work), roofline(&tiny()).step(work));
}

#[test]
fn gpus_share_everything_but_what_they_send() {
    let work = || std::iter::repeat_n(SequenceWork::decode(2250), 64);
    let [one, four] = [1, 4].map(|gpus| Roofline::new(&llama_8b(), &h100(), gpus).unwrap().step(work()));
    assert_eq!(four.memory_bytes, one.memory_bytes);
    assert_eq!(four.memory_seconds, one.memory_seconds / 4.0);
    assert_eq!(four.compute_seconds, one.compute_seconds / 4.0);
    assert_eq!((one.link_bytes, one.link_seconds), (0.0, 0.0));
    // Two sums a layer of 4,096 numbers of 2 bytes, for 64 tokens.
    assert_eq!(four.link_bytes, 2.0 * 32.0 * 4096.0 * 2.0 * 64.0);
    assert_eq!(four.link_seconds, four.link_bytes / 450e9);
}

#[test]
fn kv_heads_shared_by_several_gpus_are_read_by_each() {
    let shape = ModelShape { kv_heads: 2, ..llama_8b() };
    let kv_bytes = |gpus| {
        let cost = Roofline::new(&shape, &h100(), gpus).unwrap().step([SequenceWork::decode(1000)]);
        cost.memory_bytes - shape.streamed_bytes()
    };
    assert_eq!(kv_bytes(8), 4.0 * kv_bytes(2));
}

#[test]
fn the_limit_changes_with_the_step() {
    let limit = |hardware: &str, gpus, work| {
        let profile = HardwareProfile::named(hardware).unwrap();
        Roofline::new(&llama_70b(), &profile, gpus).unwrap().step([work]).limit()
    };
    assert_eq!(limit("h100", 4, SequenceWork::decode(2250)), Limit::Memory);
    assert_eq!(limit("h100", 4, SequenceWork::prefill(0, 2000)), Limit::Compute);
    assert_eq!(limit("l40s", 8, SequenceWork::prefill(0, 2000)), Limit::Interconnect);
}

/// F2 where memory binds; and F5 less the logits of all tokens but one.
#[test]
fn it_agrees_with_the_closed_forms() {
    for (shape, count) in [(llama_8b(), 1), (llama_70b(), 4)] {
        let roofline = Roofline::new(&shape, &h100(), count).unwrap();
        let step = roofline.step(std::iter::repeat_n(SequenceWork::decode(2250), 32));
        let batch = DecodeBatch { sequences: 32.0, context_tokens: 2250.0 };
        let floor = formulas::decode_step_floor_seconds(decode_model(&shape), batch, gpus("h100", count));
        assert!((step.floor_seconds() / floor - 1.0).abs() < 1e-12);
        let prompt = roofline.step([SequenceWork::prefill(0, 2000)]);
        let f5 = 2000.0 * formulas::prefill_gpu_seconds_per_token(shape.streamed_parameters() as f64, 989e12);
        let skipped = 2.0 * shape.logits_parameters() as f64 * 1999.0 / 989e12;
        let attention = 2.0 * (shape.layers * shape.heads * shape.head_dim) as f64 * 2000.0 * 2001.0 / 989e12;
        let expected = (f5 - skipped + attention) / f64::from(count);
        assert!((prompt.compute_seconds / expected - 1.0).abs() < 1e-12);
    }
}

#[test]
fn a_split_that_cannot_be_is_refused_with_those_that_can() {
    let error = Roofline::new(&llama_8b(), &h100(), 3).unwrap_err().to_string();
    assert_eq!(error, "llama-3.1-8b does not split over 3 GPUs of H100 SXM; it splits over 1, 2, 4, 8");
    assert_eq!(possible_gpus(&llama_8b(), &device()), [1]);
    let f32 = ModelShape { weight_dtype: Dtype::F32, ..llama_8b() };
    assert!(Roofline::new(&f32, &h100(), 1).unwrap_err().to_string().contains("no arithmetic for f32"));
}
