//! What the span of a request says about it, under the names of OpenTelemetry's conventions for generative AI; what
//! they have no name for begins with `servelab.`. Parts of the time are added where they are measured, in
//! [`servelab_telemetry::RequestTimings`].

use serde_json::json;
use servelab_telemetry::RequestTrace;
use servelab_telemetry::traces::{KeyValue, StringValue};
use servelab_wire::{ChatMessage, CommonFields, FinishReason, Prompt, Usage};

use crate::app::{App, Heading};
use crate::errors::ApiError;
use crate::model::Model;

/// Of a prompt's text that is recorded, where that was asked for.
const MAX_PROMPT_BYTES: usize = 64 << 10;

/// What was asked for. Its name was checked, so that there are as many span names as models served.
pub fn tell_request(trace: &RequestTrace, app: &App, model: &Model, operation: &str, common: &CommonFields) {
    if !trace.is_recorded() {
        return;
    }
    let name = common.model.as_deref().unwrap_or_else(|| app.model_name());
    trace.rename(format!("{operation} {name}"));
    let float = |name, value: Option<f32>| value.map(|value| KeyValue::new(name, f64::from(value)));
    let integer = |name, value: Option<i64>| value.map(|value| KeyValue::new(name, value));
    let given = [
        integer("gen_ai.request.max_tokens", common.max_tokens.map(i64::from)),
        float("gen_ai.request.temperature", common.temperature),
        float("gen_ai.request.top_p", common.top_p),
        integer("gen_ai.request.top_k", common.top_k.map(i64::from)),
        integer("gen_ai.request.seed", common.seed),
        (common.n > 1).then(|| KeyValue::new("gen_ai.request.choice.count", i64::from(common.n))),
    ];
    trace.set(given.into_iter().flatten());
    trace.set([
        KeyValue::new("gen_ai.request.model", name.to_owned()),
        KeyValue::new("gen_ai.request.stream", common.stream.is_some()),
        KeyValue::new("servelab.device", model.device.kind.clone()),
    ]);
}

/// The conversation, if prompts are wanted.
pub fn tell_messages(trace: &RequestTrace, messages: &[ChatMessage]) {
    if trace.wants_prompts() {
        tell_input(trace, messages.iter().map(|message| (json!(message.role), message.content.clone())));
    }
}

/// The texts to go on from, if prompts are wanted; of one that is given as token ids there is no text.
pub fn tell_prompts(trace: &RequestTrace, prompts: &[Prompt]) {
    if trace.wants_prompts() {
        let texts = prompts.iter().map(|prompt| match prompt {
            Prompt::Text(text) => (json!("user"), Some(text.clone())),
            Prompt::Tokens(_) => (json!("user"), None),
        });
        tell_input(trace, texts);
    }
}

/// Messages in the form that the conventions have for them, until there is no room for more.
fn tell_input(trace: &RequestTrace, messages: impl Iterator<Item = (serde_json::Value, Option<String>)>) {
    let mut room = MAX_PROMPT_BYTES;
    let mut told = Vec::new();
    for (role, text) in messages {
        let text = text.unwrap_or_default();
        if room == 0 {
            break;
        }
        let content = &text[..text.floor_char_boundary(room)];
        room = if content.len() < text.len() { 0 } else { room - content.len() };
        told.push(json!({"role": role, "parts": [{"type": "text", "content": content}]}));
    }
    trace.set([
        KeyValue::new("gen_ai.input.messages", json!(told).to_string()),
        KeyValue::new("servelab.prompt.is_whole", room > 0),
    ]);
}

/// What the answer calls itself.
pub fn tell_heading(trace: &RequestTrace, heading: &Heading) {
    if trace.is_recorded() {
        trace.set([
            KeyValue::new("gen_ai.response.id", StringValue::from(heading.id.clone())),
            KeyValue::new("gen_ai.response.model", StringValue::from(heading.model.clone())),
        ]);
    }
}

/// What the answer came to, whole or not.
pub fn tell_answer(trace: &RequestTrace, reasons: &[FinishReason], usage: &Usage) {
    if !trace.is_recorded() {
        return;
    }
    let cached = usage.prompt_tokens_details.cached_tokens;
    trace.set([
        KeyValue::new("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens)),
        KeyValue::new("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens)),
        KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(cached)),
        KeyValue::new("gen_ai.response.finish_reasons", texts(reasons)),
    ]);
}

fn texts(reasons: &[FinishReason]) -> servelab_telemetry::traces::Value {
    let text = |reason: &FinishReason| serde_json::to_value(reason).ok()?.as_str().map(str::to_owned);
    servelab_telemetry::traces::strings(reasons.iter().filter_map(text))
}

/// Why there is no whole answer.
pub fn tell_error(trace: &RequestTrace, error: &ApiError) {
    if error.status().is_server_error() {
        trace.fail(error.code().unwrap_or("server_error"));
    } else {
        trace.set_error_type(error.code().unwrap_or("invalid_request"));
    }
}
