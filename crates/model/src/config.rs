//! `config.json` of an untrusted checkpoint, read into what the decoder needs.
//!
//! Whatever changes the maths and is not implemented is refused by name. Fields that transformers
//! itself does not read for these architectures (training settings, library versions) are skipped.

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeScaling, YarnConfig};

const FILE: &str = "config.json";

/// The model families that the decoder implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Architecture {
    const ALL: [(&str, Self); 4] = [
        ("LlamaForCausalLM", Self::Llama),
        ("MistralForCausalLM", Self::Mistral),
        ("Qwen2ForCausalLM", Self::Qwen2),
        ("Qwen3ForCausalLM", Self::Qwen3),
    ];

    /// The class name in `architectures` of config.json.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }
}

/// Number format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    F32,
    F16,
    BF16,
}

impl WeightDtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// `f32`, `f16` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }
}

/// The shape and the maths of a model. All numbers are within bounds that make every product of
/// them fit in 64 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    /// Longest context the checkpoint claims, in tokens.
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Biases of the feed-forward projections.
    pub mlp_bias: bool,
    /// An RMS norm over each head of query and key.
    pub qk_norm: bool,
    pub rope: RopeConfig,
    /// For each layer, how many of the latest tokens (the current one included) it attends to.
    pub windows: Vec<Option<usize>>,
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence, of config.json and generation_config.json together.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads config.json and, if there, generation_config.json (for its end-of-sequence tokens).
    ///
    /// # Errors
    /// [`ModelError::Unsupported`], [`ModelError::Invalid`] or [`ModelError::MissingField`] that name
    /// the field; [`ModelError::Json`].
    pub fn parse(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, ModelError> {
        let fields = Fields::parse(config, FILE)?;
        let architecture = architecture(&fields)?;
        refuse_unimplemented(&fields, architecture)?;
        let mut config = shape(&fields, architecture)?;
        config.rope = rope(&fields, config.max_position_embeddings)?;
        config.windows = windows(&fields, architecture, config.num_layers)?;
        config.bos_token_id = token_ids(&fields, "bos_token_id", config.vocab_size)?.first().copied();
        config.eos_token_ids = token_ids(&fields, "eos_token_id", config.vocab_size)?;
        if let Some(bytes) = generation_config {
            let fields = Fields::parse(bytes, "generation_config.json")?;
            config.eos_token_ids.extend(token_ids(&fields, "eos_token_id", config.vocab_size)?);
        }
        config.eos_token_ids.sort_unstable();
        config.eos_token_ids.dedup();
        Ok(config)
    }

    /// Width of the queries of one token.
    pub fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of the keys (and of the values) of one token.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of query, key and value of one token together.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }

    /// Numbers that the KV cache holds for one token over all layers.
    pub fn kv_values_per_token(&self) -> u64 {
        2 * self.num_layers as u64 * self.kv_width() as u64
    }

    /// Count of all weights, each tensor once.
    pub fn num_parameters(&self) -> u64 {
        crate::weights::expected_tensors(self).iter().map(|t| t.elements() as u64).sum()
    }

    /// The shortest sliding window of any layer.
    pub fn shortest_window(&self) -> Option<usize> {
        self.windows.iter().flatten().min().copied()
    }
}

/// A JSON object with getters that name field and file in their errors.
struct Fields {
    map: Map<String, Value>,
    file: &'static str,
    /// Put before a field's name in errors, as in `rope_scaling.`.
    prefix: &'static str,
}

impl Fields {
    fn parse(bytes: &[u8], file: &'static str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|source| ModelError::Json { file: file.to_owned(), source })?;
        match value {
            Value::Object(map) => Ok(Self { map, file, prefix: "" }),
            other => Err(invalid(file, "the top level", &other, "an object")),
        }
    }

    /// `None` for an absent field and for `null`.
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn invalid(&self, name: &str, value: &Value, rule: &str) -> ModelError {
        invalid(self.file, &format!("{}{name}", self.prefix), value, rule)
    }

    fn unsupported(&self, name: &str, value: &Value, supported: &str) -> ModelError {
        ModelError::Unsupported {
            file: self.file,
            field: format!("{}{name}", self.prefix),
            value: shorten(value),
            supported: supported.to_owned(),
        }
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingField { file: self.file, field: format!("{}{name}", self.prefix) }
    }

    fn size(&self, name: &str, limit: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=limit).contains(&n) => Ok(Some(n)),
            _ => Err(self.invalid(name, value, &format!("a whole number from 1 to {limit}"))),
        }
    }

    fn required_size(&self, name: &str, limit: usize) -> Result<usize, ModelError> {
        self.size(name, limit)?.ok_or_else(|| self.missing(name))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.invalid(name, value, "true or false"))
    }

    /// A positive finite number of reasonable size.
    fn positive(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x < 1e15 => Ok(Some(x)),
            _ => Err(self.invalid(name, value, "a number above 0 and below 1e15")),
        }
    }

    fn required_positive(&self, name: &str) -> Result<f64, ModelError> {
        self.positive(name)?.ok_or_else(|| self.missing(name))
    }

    /// The object in field `name`.
    fn object(&self, name: &'static str, prefix: &'static str) -> Result<Option<Self>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map: map.clone(), file: self.file, prefix })),
            Some(other) => Err(self.invalid(name, other, "an object")),
        }
    }
}

fn invalid(file: &'static str, field: &str, value: &Value, rule: &str) -> ModelError {
    ModelError::Invalid { file, field: field.to_owned(), value: shorten(value), rule: rule.to_owned() }
}

/// A value as JSON, cut so that a hostile file cannot fill the log.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn architecture(fields: &Fields) -> Result<Architecture, ModelError> {
    let supported = Architecture::ALL.map(|(name, _)| name).join(", ");
    let value = fields.get("architectures").ok_or_else(|| fields.missing("architectures"))?;
    let name = match value.as_array().map(Vec::as_slice) {
        Some([Value::String(name)]) => name,
        _ => return Err(fields.invalid("architectures", value, &format!("a list of one of {supported}"))),
    };
    let found = Architecture::ALL.iter().find(|(known, _)| known == name);
    found.map(|(_, a)| *a).ok_or_else(|| fields.unsupported("architectures", value, &supported))
}

/// Fields that other implementations of these families use to change the maths, each with the
/// values that change nothing.
const NEUTRAL: &[(&str, &[f64])] = &[
    ("quantization_config", &[]),
    ("compression_config", &[]),
    ("partial_rotary_factor", &[1.0]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("logit_softcapping", &[]),
    ("query_pre_attn_scalar", &[]),
    ("attention_multiplier", &[]),
    ("embedding_multiplier", &[1.0]),
    ("residual_multiplier", &[1.0]),
    ("logits_scaling", &[1.0]),
    ("logit_scale", &[1.0]),
    ("scale_emb", &[1.0]),
    ("scale_depth", &[]),
    ("clip_qkv", &[]),
    ("attention_chunk_size", &[0.0]),
    ("no_rope_layers", &[]),
    ("no_rope_layer_interval", &[0.0]),
    ("num_local_experts", &[0.0]),
    ("num_experts", &[0.0]),
    ("n_routed_experts", &[0.0]),
    ("num_experts_per_tok", &[0.0]),
    ("kv_lora_rank", &[]),
    ("cross_attention_layers", &[]),
    ("vision_config", &[]),
    ("layer_norm_eps", &[]),
];

/// Flags that change the maths when true.
const OFF: &[&str] = &[
    "qk_layernorm",
    "use_qk_norm",
    "rope_interleave",
    "rope_interleaved",
    "use_mrope",
    "alibi",
    "scale_embeddings",
    "use_parallel_residual",
    "parallel_attn",
    "add_cross_attention",
    "is_encoder_decoder",
    "use_attention_sinks",
    "use_bidirectional_attention",
];

fn refuse_unimplemented(fields: &Fields, architecture: Architecture) -> Result<(), ModelError> {
    for (name, neutral) in NEUTRAL {
        if let Some(value) = fields.get(name)
            && !value.as_f64().is_some_and(|x| neutral.contains(&x))
        {
            let supported = neutral.first().map_or("null".to_owned(), |x| format!("null or {x}"));
            return Err(fields.unsupported(name, value, &supported));
        }
    }
    let mut off = OFF.to_vec();
    match architecture {
        Architecture::Llama => off.push("use_sliding_window"),
        Architecture::Mistral => off.extend(["attention_bias", "mlp_bias", "use_sliding_window"]),
        Architecture::Qwen2 | Architecture::Qwen3 => off.push("mlp_bias"),
    }
    for name in off {
        if fields.flag(name)? == Some(true) {
            return Err(fields.unsupported(name, &Value::Bool(true), "false"));
        }
    }
    match fields.get("hidden_act") {
        None => Ok(()),
        Some(Value::String(act)) if act == "silu" || act == "swish" => Ok(()),
        Some(other) => Err(fields.unsupported("hidden_act", other, "silu")),
    }
}

fn shape(fields: &Fields, architecture: Architecture) -> Result<ModelConfig, ModelError> {
    let hidden_size = fields.required_size("hidden_size", 1 << 17)?;
    let num_heads = fields.required_size("num_attention_heads", 1 << 10)?;
    let num_layers = fields.required_size("num_hidden_layers", 1 << 10)?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        architecture,
        vocab_size: fields.required_size("vocab_size", 1 << 22)?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size", 1 << 20)?,
        num_layers,
        num_heads,
        num_kv_heads: num_kv_heads(fields, architecture, num_heads)?,
        head_dim: head_dim(fields, architecture, hidden_size, num_heads)?,
        rms_norm_eps: rms_norm_eps(fields)?,
        max_position_embeddings: fields.required_size("max_position_embeddings", 1 << 25)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: attention_bias || architecture == Architecture::Qwen2,
        output_bias: attention_bias && architecture != Architecture::Qwen2,
        mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
        qk_norm: architecture == Architecture::Qwen3,
        rope: RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default },
        windows: Vec::new(),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    })
}

fn num_kv_heads(fields: &Fields, architecture: Architecture, heads: usize) -> Result<usize, ModelError> {
    let kv_heads = match (fields.size("num_key_value_heads", 1 << 10)?, architecture) {
        (Some(n), _) => n,
        (None, Architecture::Llama) => heads,
        (None, _) => return Err(fields.missing("num_key_value_heads")),
    };
    if !heads.is_multiple_of(kv_heads) {
        let rule = format!("a divisor of num_attention_heads {heads}");
        return Err(fields.invalid("num_key_value_heads", &Value::from(kv_heads), &rule));
    }
    Ok(kv_heads)
}

/// Explicit, or as transformers defaults it: 128 for Qwen3, else hidden / heads.
fn head_dim(
    fields: &Fields,
    architecture: Architecture,
    hidden: usize,
    heads: usize,
) -> Result<usize, ModelError> {
    let head_dim = match (fields.size("head_dim", 1 << 10)?, architecture) {
        (Some(n), _) => n,
        (None, Architecture::Qwen3) => 128,
        (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
        (None, _) => {
            let rule = format!("a multiple of num_attention_heads {heads}, or head_dim given");
            return Err(fields.invalid("hidden_size", &Value::from(hidden), &rule));
        }
    };
    if head_dim > 1 << 10 || !head_dim.is_multiple_of(2) {
        return Err(fields.invalid("head_dim", &Value::from(head_dim), "an even number up to 1024"));
    }
    Ok(head_dim)
}

fn rms_norm_eps(fields: &Fields) -> Result<f32, ModelError> {
    let eps = fields.positive("rms_norm_eps")?.unwrap_or(1e-6);
    if eps > 1.0 {
        return Err(fields.invalid("rms_norm_eps", &Value::from(eps), "above 0 and at most 1"));
    }
    Ok(eps as f32)
}

/// `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5, with `rope_theta` inside).
fn rope(fields: &Fields, max_positions: usize) -> Result<RopeConfig, ModelError> {
    let scaling = match fields.object("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Some(scaling),
        None => fields.object("rope_parameters", "rope_parameters.")?,
    };
    let Some(scaling) = scaling else {
        let theta = rope_theta(fields)?.unwrap_or(10_000.0);
        return Ok(RopeConfig { theta, scaling: RopeScaling::Default });
    };
    if let Some((name, value)) = scaling.map.iter().find(|(_, value)| value.is_object()) {
        return Err(scaling.unsupported(name, value, "one set of rope parameters for all layers"));
    }
    if let Some(value) = scaling.get("partial_rotary_factor")
        && value.as_f64() != Some(1.0)
    {
        return Err(scaling.unsupported("partial_rotary_factor", value, "1"));
    }
    let theta = match rope_theta(&scaling)? {
        Some(theta) => theta,
        None => rope_theta(fields)?.unwrap_or(10_000.0),
    };
    let original = match fields.positive("original_max_position_embeddings")? {
        Some(original) => original,
        None => scaling.positive("original_max_position_embeddings")?.unwrap_or(max_positions as f64),
    };
    Ok(RopeConfig { theta, scaling: rope_scaling(&scaling, original, max_positions)? })
}

fn rope_theta(fields: &Fields) -> Result<Option<f64>, ModelError> {
    match fields.positive("rope_theta")? {
        Some(theta) if theta <= 1.0 => {
            Err(fields.invalid("rope_theta", &Value::from(theta), "a number above 1"))
        }
        theta => Ok(theta),
    }
}

fn rope_scaling(fields: &Fields, original: f64, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let default = Value::from("default");
    let kind = fields.get("rope_type").or_else(|| fields.get("type")).unwrap_or(&default);
    match kind.as_str() {
        Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: fields.required_positive("factor")? }),
        Some("llama3") => llama3(fields, original),
        Some("yarn") => yarn(fields, original, max_positions),
        _ => Err(fields.unsupported("rope_type", kind, "default, linear, llama3, yarn")),
    }
}

fn llama3(fields: &Fields, original_context: f64) -> Result<RopeScaling, ModelError> {
    let low_freq_factor = fields.required_positive("low_freq_factor")?;
    let high_freq_factor = fields.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let rule = format!("above low_freq_factor {low_freq_factor}");
        return Err(fields.invalid("high_freq_factor", &Value::from(high_freq_factor), &rule));
    }
    let factor = fields.required_positive("factor")?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
}

fn yarn(fields: &Fields, original_context: f64, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = fields.positive("factor")?.unwrap_or(max_positions as f64 / original_context);
    let attention_factor = match fields.positive("attention_factor")? {
        Some(given) => given,
        None => YarnConfig::default_attention_factor(
            factor,
            fields.positive("mscale")?,
            fields.positive("mscale_all_dim")?,
        ),
    };
    Ok(RopeScaling::Yarn(YarnConfig {
        factor,
        original_context,
        beta_fast: fields.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: fields.positive("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: fields.flag("truncate")?.unwrap_or(true),
    }))
}

/// Which layers look back how far. Mistral: all or none. Qwen: `use_sliding_window` and then the
/// layers that `layer_types` or `max_window_layers` name.
fn windows(
    fields: &Fields,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = fields.size("sliding_window", 1 << 40)?;
    let kinds = layer_types(fields, layers)?;
    match architecture {
        Architecture::Llama => {
            if let Some(window) = window {
                return Err(fields.unsupported("sliding_window", &Value::from(window), "null"));
            }
            full_attention_only(fields, kinds.as_deref())?;
            Ok(vec![None; layers])
        }
        Architecture::Mistral => {
            // Absent is not null: transformers then takes 4096.
            let absent = !fields.map.contains_key("sliding_window");
            let window = if absent { Some(4096) } else { window };
            if let Some(kinds) = kinds
                && kinds.iter().any(|slides| *slides != window.is_some())
            {
                let supported = "the same kind for all layers, as sliding_window says";
                return Err(fields.unsupported("layer_types", &fields.map["layer_types"], supported));
            }
            Ok(vec![window; layers])
        }
        Architecture::Qwen2 | Architecture::Qwen3 => qwen_windows(fields, window, kinds, layers),
    }
}

fn qwen_windows(
    fields: &Fields,
    window: Option<usize>,
    kinds: Option<Vec<bool>>,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        full_attention_only(fields, kinds.as_deref())?;
        return Ok(vec![None; layers]);
    }
    let window = window.ok_or_else(|| fields.missing("sliding_window"))?;
    let first = match fields.get("max_window_layers").map(|value| (value, value.as_u64())) {
        None => 28,
        Some((_, Some(first))) => first,
        Some((value, None)) => return Err(fields.invalid("max_window_layers", value, "a whole number")),
    };
    let slides = |layer: usize| match &kinds {
        Some(kinds) => kinds[layer],
        None => layer as u64 >= first,
    };
    Ok((0..layers).map(|layer| slides(layer).then_some(window)).collect())
}

fn full_attention_only(fields: &Fields, kinds: Option<&[bool]>) -> Result<(), ModelError> {
    match kinds {
        Some(kinds) if kinds.contains(&true) => Err(fields.unsupported(
            "layer_types",
            &fields.map["layer_types"],
            "full_attention for all layers",
        )),
        _ => Ok(()),
    }
}

/// For each layer, whether `layer_types` says that it slides.
fn layer_types(fields: &Fields, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(value) = fields.get("layer_types") else { return Ok(None) };
    let kinds = match value.as_array() {
        Some(kinds) if kinds.len() == layers => kinds,
        _ => return Err(fields.invalid("layer_types", value, &format!("a list of {layers} entries"))),
    };
    let slides = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(fields.unsupported("layer_types", kind, "full_attention, sliding_attention")),
    };
    kinds.iter().map(slides).collect::<Result<_, _>>().map(Some)
}

/// One token id or a list of them. Some checkpoints write -1 or an id beyond the vocabulary for
/// "none"; such an id can never be chosen and is dropped.
fn token_ids(fields: &Fields, name: &str, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
    let rule = "a token id or a list of token ids";
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let values = match value {
        Value::Array(values) => values.as_slice(),
        other => std::slice::from_ref(other),
    };
    if values.len() > 1024 {
        return Err(fields.invalid(name, value, "a list of at most 1024 token ids"));
    }
    let ids = values.iter().map(|v| v.as_i64().ok_or_else(|| fields.invalid(name, value, rule)));
    let ids: Vec<i64> = ids.collect::<Result<_, _>>()?;
    Ok(ids
        .into_iter()
        .filter_map(|id| u32::try_from(id).ok())
        .filter(|id| (*id as usize) < vocab_size)
        .collect())
}
