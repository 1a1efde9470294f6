//! The sources that need no network: the embedded demo and dummy weights.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]

mod common;

use common::*;
use servelab_engine::SamplingParams;
use servelab_model::{
    DummyShape, EngineKind, KvDtype, LoadFormat, ModelError, ModelSource, OpenOptions, Prepared,
    RunnerOptions, TextFiles, WeightDtype, dummy, presets,
};

fn greedy(source: &ModelSource, kind: EngineKind, dtype: Option<WeightDtype>, seed: u64) -> Vec<u32> {
    let options = runner_options(kind);
    let prepared = Prepared::open(source, OpenOptions { dtype, seed, ..OpenOptions::default() }).unwrap();
    let model = prepared.into_runner(&options).unwrap();
    let mut engine = engine(model, engine_config(&options));
    let mut request = request(1, &[10, 20, 30, 40, 50], 24);
    request.sampling = SamplingParams::greedy().into();
    answer(&mut engine, request).tokens
}

#[test]
fn the_demo_runs_the_same_in_both_engines() {
    let source = ModelSource::parse(None, LoadFormat::Auto, None).unwrap();
    assert_eq!(source, ModelSource::Demo);
    let f32 = Some(WeightDtype::F32);
    let paged = greedy(&source, EngineKind::Paged, f32, 0);
    assert_eq!(paged.len(), 24);
    assert_eq!(paged, greedy(&source, EngineKind::Naive, f32, 0));
    let prepared = Prepared::open(&source, OpenOptions::default()).unwrap();
    let text = prepared.text_files();
    assert!(text.tokenizer.is_some() && text.chat_template.is_some() && text.generation_config.is_some());
    assert!(!prepared.config().eos_token_ids.is_empty());
}

#[test]
fn dummy_weights_depend_on_the_seed_and_run_from_a_written_checkpoint_too() {
    let source = ModelSource::parse(Some("demo"), LoadFormat::Dummy, None).unwrap();
    let answer = greedy(&source, EngineKind::Paged, None, 3);
    assert_eq!(answer, greedy(&source, EngineKind::Paged, None, 3));
    assert_ne!(answer, greedy(&source, EngineKind::Paged, None, 4));

    let folder = tempfile::tempdir().unwrap();
    let json = presets::config_json("demo").unwrap();
    let prepared = Prepared::open(&source, OpenOptions::default()).unwrap();
    dummy::write_checkpoint(folder.path(), &json, prepared.config(), 3).unwrap();
    let written = ModelSource::Folder(folder.path().to_owned());
    assert_eq!(greedy(&written, EngineKind::Paged, None, 0), answer);

    // A config.json alone is a shape, too.
    let shape = folder.path().join("config.json");
    let shape = ModelSource::parse(shape.to_str(), LoadFormat::Dummy, None).unwrap();
    assert!(matches!(shape, ModelSource::Dummy(DummyShape::Path(_))));
    assert_eq!(greedy(&shape, EngineKind::Paged, None, 3), answer);
    assert_eq!(Prepared::open(&shape, OpenOptions::default()).unwrap().text_files(), &TextFiles::default());
}

#[test]
fn memory_is_told_before_it_is_taken() {
    for kv_dtype in [KvDtype::F32, KvDtype::BF16] {
        let options = RunnerOptions { kv_dtype, ..runner_options(EngineKind::Paged) };
        let prepared = Prepared::open(&ModelSource::Demo, OpenOptions::default()).unwrap();
        let block = prepared.kv_bytes_per_block(options.block_size, kv_dtype);
        let weights = prepared.weight_bytes();
        let memory = prepared.into_runner(&options).unwrap().memory;
        assert_eq!(memory.kv_cache_bytes, block * u64::from(options.num_blocks));
        // Packing pads to whole panels.
        assert!((weights..weights + weights / 2).contains(&memory.weight_bytes), "{weights} {memory:?}");
        assert!(memory.activation_bytes > 0);
    }
}

#[test]
fn impossible_sizes_are_refused() {
    let refused = |options: RunnerOptions| {
        let prepared = Prepared::open(&ModelSource::Demo, OpenOptions::default()).unwrap();
        matches!(prepared.into_runner(&options).map(|_| ()), Err(ModelError::Option { .. }))
    };
    let good = runner_options(EngineKind::Paged);
    assert!(refused(RunnerOptions { num_blocks: 0, ..good.clone() }));
    assert!(refused(RunnerOptions { block_size: 0, ..good.clone() }));
    assert!(refused(RunnerOptions { max_batched_tokens: 0, ..good.clone() }));
    assert!(refused(RunnerOptions { max_model_len: 0, ..good.clone() }));
    assert!(refused(RunnerOptions { num_blocks: u32::MAX, ..good }));
}

// Only Linux tells what is free in a file.
#[cfg(target_os = "linux")]
#[test]
fn a_model_larger_than_the_machine_is_refused_by_its_size() {
    let shape = tempfile::tempdir().unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&presets::config_json("llama-3.1-70b").unwrap()).unwrap();
    config["num_hidden_layers"] = 1000.into();
    config["intermediate_size"] = (1 << 20).into();
    let path = shape.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let source = ModelSource::Dummy(DummyShape::Path(path));
    let prepared = Prepared::open(&source, OpenOptions::default()).unwrap();
    match prepared.into_runner(&runner_options(EngineKind::Paged)).map(|_| ()) {
        Err(ModelError::OutOfMemory { needed_bytes, free_bytes }) => assert!(needed_bytes > free_bytes),
        other => panic!("{other:?}"),
    }
}
