//! The fields that OpenAI or vLLM define and this server does not implement.
//!
//! A field that is accepted and ignored is worse than one that is refused: the client believes in an
//! answer that it did not get. So each of them is an error that names it, unless its value asks for
//! nothing.

use serde_json::Value;

use crate::fields::{FieldError, Fields, shortened};

/// Which request a field belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completions,
    Tokenize,
}

/// A field that is known and not implemented.
#[derive(Clone, Copy, Debug)]
pub struct Unsupported {
    pub name: &'static str,
    pub apis: &'static [Api],
    /// Values that ask for nothing, as JSON; null always is one.
    pub harmless: &'static [&'static str],
}

const CHAT: &[Api] = &[Api::Chat];
const COMPLETIONS: &[Api] = &[Api::Completions];
const BOTH: &[Api] = &[Api::Chat, Api::Completions];
const TEMPLATED: &[Api] = &[Api::Chat, Api::Tokenize];

const fn field(name: &'static str, apis: &'static [Api], harmless: &'static [&'static str]) -> Unsupported {
    Unsupported { name, apis, harmless }
}

/// OpenAI's first, vLLM's after them.
pub const UNSUPPORTED: &[Unsupported] = &[
    field("audio", CHAT, &[]),
    field("best_of", BOTH, &["1"]),
    field("function_call", CHAT, &["\"none\"", "\"auto\""]),
    field("functions", CHAT, &["[]"]),
    field("modalities", CHAT, &["[\"text\"]"]),
    field("moderation", CHAT, &[]),
    field("parallel_tool_calls", CHAT, &["true", "false"]),
    field("prediction", CHAT, &[]),
    field("prompt_cache_key", BOTH, &[]),
    field("prompt_cache_options", BOTH, &[]),
    field("prompt_cache_retention", BOTH, &["\"in_memory\"", "\"in-memory\""]),
    field("reasoning_effort", CHAT, &["\"none\""]),
    field("response_format", BOTH, &["{\"type\":\"text\"}"]),
    field("service_tier", BOTH, &["\"auto\"", "\"default\""]),
    field("store", CHAT, &["false"]),
    field("suffix", COMPLETIONS, &["\"\""]),
    field("tool_choice", CHAT, &["\"none\"", "\"auto\""]),
    field("tools", TEMPLATED, &["[]"]),
    field("verbosity", CHAT, &["\"medium\""]),
    field("web_search_options", CHAT, &[]),
    field("allowed_token_ids", BOTH, &[]),
    field("bad_words", BOTH, &["[]"]),
    field("chat_template", TEMPLATED, &[]),
    field("documents", CHAT, &["[]"]),
    field("echo", CHAT, &["false"]),
    field("guided_choice", BOTH, &[]),
    field("guided_decoding_backend", BOTH, &[]),
    field("guided_grammar", BOTH, &[]),
    field("guided_json", BOTH, &[]),
    field("guided_regex", BOTH, &[]),
    field("guided_whitespace_pattern", BOTH, &[]),
    field("include_reasoning", CHAT, &["true", "false"]),
    field("kv_transfer_params", BOTH, &[]),
    field("length_penalty", BOTH, &["1"]),
    field("logits_processors", BOTH, &["[]"]),
    field("logprob_token_ids", BOTH, &[]),
    field("media_io_kwargs", TEMPLATED, &["{}"]),
    field("mm_processor_kwargs", TEMPLATED, &["{}"]),
    field("prompt_embeds", COMPLETIONS, &[]),
    field("reasoning", CHAT, &[]),
    field("repetition_detection", BOTH, &[]),
    field("request_id", BOTH, &[]),
    field("return_token_ids", BOTH, &["false"]),
    field("return_tokens_as_token_ids", BOTH, &["false"]),
    field("spaces_between_special_tokens", BOTH, &["true"]),
    field("structural_tag", BOTH, &[]),
    field("structured_outputs", BOTH, &[]),
    field("thinking_token_budget", BOTH, &[]),
    field("truncate_prompt_tokens", BOTH, &[]),
    field("truncation_side", BOTH, &[]),
    field("use_beam_search", BOTH, &["false"]),
    field("vllm_xargs", BOTH, &["{}"]),
];

/// Refuses whatever is left of a request after its implemented fields were taken.
///
/// # Errors
/// The first field that is unknown, or known and asking for something that is not implemented.
pub fn refuse_the_rest(fields: &Fields, api: Api) -> Result<(), FieldError> {
    fields.rest().filter(|(_, value)| !value.is_null()).try_for_each(|(name, value)| {
        let known = UNSUPPORTED.iter().find(|field| field.name == name && field.apis.contains(&api));
        match known {
            None => {
                let name = shortened(name);
                Err(FieldError::new(
                    name.clone(),
                    format!("{name} is not a field of this request; remove it"),
                ))
            }
            Some(field) if field.is_harmless(value) => Ok(()),
            Some(field) => Err(FieldError::new(field.name, field.refusal())),
        }
    })
}

impl Unsupported {
    fn is_harmless(&self, value: &Value) -> bool {
        self.harmless.iter().any(|text| match (serde_json::from_str::<Value>(text), value) {
            (Ok(Value::Number(harmless)), Value::Number(given)) => harmless.as_f64() == given.as_f64(),
            (Ok(harmless), given) => harmless == *given,
            (Err(_), _) => false,
        })
    }

    fn refusal(&self) -> String {
        match self.harmless {
            [] => format!("{} is not supported by this server; leave it out", self.name),
            values => {
                let values = values.join(" or ");
                format!("{} is not supported by this server; leave it out or give {values}", self.name)
            }
        }
    }
}
