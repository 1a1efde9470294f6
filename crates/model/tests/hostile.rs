//! Checkpoints that are broken or made to do harm: an error that names the fault, never a panic.
#![allow(clippy::unwrap_used, reason = "a helper that unwraps fails the test that called it")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::folder;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use servelab_model::{LoadFormat, ModelConfig, ModelError, ModelSource, OpenOptions, Prepared};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A copy of a fixture that a test may damage.
fn copy(fixture: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder(fixture)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, target.path().join(path.file_name().unwrap())).unwrap();
    }
    target
}

fn open(folder: &Path) -> Result<(), ModelError> {
    Prepared::open(&ModelSource::Folder(folder.to_owned()), OpenOptions::default()).map(|_| ())
}

fn message(folder: &Path) -> String {
    open(folder).unwrap_err().to_string()
}

/// Rewrites the weights of a copy.
fn change_tensors(folder: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let copy = copy("llama");
    let path = copy.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 1, 7, 8, 9, 100, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(message(copy.path()).contains("safetensors"), "{length}");
    }
    std::fs::write(&path, [whole.as_slice(), &[0]].concat()).unwrap();
    assert!(message(copy.path()).contains("safetensors"));
}

#[test]
fn absurd_headers_are_refused() {
    let copy = copy("llama");
    let path = copy.path().join("model.safetensors");
    let header = |length: u64, text: &str| [&length.to_le_bytes(), text.as_bytes()].concat();
    let of = |text: &str| header(text.len() as u64, text);
    for bytes in [
        header(u64::MAX, "{}"),
        header(u64::MAX - 8, "{}"),
        header(1 << 40, "{}"),
        header(0, ""),
        of("[]"),
        of("{"),
        of(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#),
        of(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#),
        of(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#),
        of(r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#),
        of(r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#),
        of(&"[".repeat(100_000)),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(open(copy.path()), Err(ModelError::Safetensors { .. })));
    }
}

#[test]
fn missing_misshapen_and_foreign_tensors_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let missing = copy("llama");
    change_tensors(missing.path(), |tensors| drop(tensors.remove(name)));
    assert!(message(missing.path()).contains(&format!("no tensor {name} (shape [48, 32]")));

    let transposed = copy("llama");
    change_tensors(transposed.path(), |tensors| tensors.get_mut(name).unwrap().1 = vec![32, 48]);
    assert!(message(transposed.path()).contains(&format!("{name} has shape [32, 48]")));

    let integers = copy("llama");
    change_tensors(integers.path(), |tensors| tensors.get_mut(name).unwrap().0 = Dtype::I16);
    assert!(message(integers.path()).contains(&format!("{name} has dtype I16")));

    let extra = copy("llama");
    let bias = "model.layers.0.self_attn.q_proj.bias".to_owned();
    change_tensors(extra.path(), |tensors| {
        drop(tensors.insert(bias.clone(), (Dtype::F32, vec![32], vec![0; 128])))
    });
    assert!(message(extra.path()).contains(&bias));
}

#[test]
fn buffers_of_old_checkpoints_and_copies_of_a_tied_head_are_no_fault() {
    let copy = copy("llama-tied");
    change_tensors(copy.path(), |tensors| {
        let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
        tensors.insert(inv_freq, (Dtype::F32, vec![4], vec![0; 16]));
        tensors.insert("lm_head.weight".to_owned(), tensors["model.embed_tokens.weight"].clone());
        tensors.insert("visual.patch".to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    open(copy.path()).unwrap();
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    for name in [
        "../other.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "weights.bin",
        "a\\b.safetensors",
    ] {
        let copy = copy("llama-sharded");
        let index = json!({"weight_map": {"model.norm.weight": name}});
        std::fs::write(copy.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert!(matches!(open(copy.path()), Err(ModelError::IndexEscapes { .. })), "{name}");
    }
    let copy = copy("llama-sharded");
    std::fs::remove_file(copy.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(message(copy.path()).contains("model-00002-of-00003.safetensors"));
    std::fs::write(copy.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(matches!(open(copy.path()), Err(ModelError::Json { .. })));
}

#[test]
fn folders_without_a_model_say_what_is_missing() {
    let empty = tempfile::tempdir().unwrap();
    assert!(message(empty.path()).contains("config.json"));
    std::fs::copy(folder("llama").join("config.json"), empty.path().join("config.json")).unwrap();
    assert!(message(empty.path()).contains("model.safetensors"));
    let nowhere = ModelSource::parse(Some("./no/such/folder"), LoadFormat::Auto, None).unwrap_err();
    assert!(nowhere.to_string().contains("neither a folder nor a hub id"), "{nowhere}");
}

/// Fields that change the maths, each with a value that is not implemented.
#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let cases = [
        ("llama", "architectures", json!(["GPT2LMHeadModel"])),
        ("llama", "architectures", json!([])),
        ("llama", "hidden_act", json!("gelu")),
        ("llama", "quantization_config", json!({"quant_method": "awq"})),
        ("llama", "rope_parameters", json!({"rope_type": "longrope", "rope_theta": 1e4})),
        ("llama", "rope_parameters", json!({"rope_type": "dynamic", "factor": 2.0})),
        ("llama", "rope_scaling", json!({"type": "su"})),
        ("llama", "rope_parameters", json!({"full_attention": {"rope_type": "default"}})),
        ("llama", "rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "sliding_window", json!(64)),
        ("llama", "attn_logit_softcapping", json!(30.0)),
        ("llama", "residual_multiplier", json!(0.2)),
        ("llama", "num_local_experts", json!(8)),
        ("mistral", "attention_bias", json!(true)),
        ("mistral", "layer_types", json!(["sliding_attention", "full_attention"])),
        ("qwen2", "layer_types", json!(["chunked_attention", "full_attention"])),
        ("qwen3", "mlp_bias", json!(true)),
    ];
    for (fixture, field, value) in cases {
        let copy = copy(fixture);
        change_config(copy.path(), |config| config[field] = value.clone());
        let message = message(copy.path());
        let named = message.contains(field.split('.').next_back().unwrap()) || message.contains("rope");
        assert!(named && message.contains("config.json"), "{field}: {message}");
    }
}

#[test]
fn senseless_values_are_refused_and_nothing_panics() {
    for fixture in ["llama-rope-llama3", "mistral-window", "qwen2-window", "qwen3-rope-yarn-mscale"] {
        let original: Value =
            serde_json::from_slice(&std::fs::read(folder(fixture).join("config.json")).unwrap()).unwrap();
        let fields: Vec<String> = original.as_object().unwrap().keys().cloned().collect();
        let rope: Vec<String> = original["rope_parameters"].as_object().unwrap().keys().cloned().collect();
        for value in [
            json!(null),
            json!(-1),
            json!(0),
            json!(1),
            json!(3),
            json!(1e300),
            json!(u64::MAX),
            json!("x"),
            json!([]),
            json!({}),
            json!(true),
            json!([[]]),
            json!(1.5),
            json!(-1e-300),
        ] {
            for field in &fields {
                let mut config = original.clone();
                config[field] = value.clone();
                let _ = ModelConfig::parse(config.to_string().as_bytes(), None);
                let _ =
                    ModelConfig::parse(original.to_string().as_bytes(), Some(config.to_string().as_bytes()));
            }
            for field in &rope {
                let mut config = original.clone();
                config["rope_parameters"][field] = value.clone();
                let _ = ModelConfig::parse(config.to_string().as_bytes(), None);
            }
        }
        for (field, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(1u64 << 40)),
            ("vocab_size", json!(-5)),
            ("num_hidden_layers", json!(1_000_000_000)),
            ("num_key_value_heads", json!(3)),
            ("num_attention_heads", json!("four")),
            ("head_dim", json!(7)),
            ("rms_norm_eps", json!(0)),
            ("max_position_embeddings", json!(null)),
            ("tie_word_embeddings", json!("yes")),
            ("eos_token_id", json!("</s>")),
        ] {
            let mut config = original.clone();
            config[field] = value.clone();
            let error = ModelConfig::parse(config.to_string().as_bytes(), None).unwrap_err().to_string();
            assert!(error.contains(field), "{fixture}, {field} {value}: {error}");
        }
    }
    for bytes in ["", "{", "[]", "null", "{}", "\u{feff}{}"] {
        assert!(ModelConfig::parse(bytes.as_bytes(), None).is_err());
    }
    assert!(ModelConfig::parse("[".repeat(1 << 20).as_bytes(), None).is_err());
}

#[test]
fn end_of_sequence_tokens_come_from_both_files() {
    let config = std::fs::read(folder("llama").join("config.json")).unwrap();
    let parse =
        |generation: &str| ModelConfig::parse(&config, Some(generation.as_bytes())).unwrap().eos_token_ids;
    assert_eq!(parse("{}"), [2]);
    assert_eq!(parse(r#"{"eos_token_id": 7}"#), [2, 7]);
    assert_eq!(parse(r#"{"eos_token_id": [9, 2, 7, 96, -1]}"#), [2, 7, 9]);
}
