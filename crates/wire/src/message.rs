//! The messages of a chat, checked and reduced to text.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::fields::{FieldError, Fields};

/// Who speaks. `developer` is OpenAI's newer word for `system`, and templates know only the latter:
/// a template that does not know a role drops the message, so that it is renamed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

/// One message, as chat templates expect it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatMessage {
    pub role: Role,
    /// Text parts are joined by line breaks, as vLLM joins them. `None` only beside `tool_calls`.
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Calls that the assistant made earlier; `arguments` is parsed into an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// # Errors
/// The first message or member of one that is wrong.
pub fn read_messages(value: Value) -> Result<Vec<ChatMessage>, FieldError> {
    match value {
        Value::Array(items) if !items.is_empty() => {
            items.into_iter().enumerate().map(|(at, item)| ChatMessage::read(item, at)).collect()
        }
        other => Err(FieldError::wanted("messages", "a list of at least one message", &other)),
    }
}

impl ChatMessage {
    fn read(value: Value, at: usize) -> Result<Self, FieldError> {
        let path = format!("messages[{at}]");
        let mut fields = Fields::of(value, &path)?;
        let role = role(&mut fields)?;
        let content =
            fields.take("content").map(|value| content(value, &fields.path("content"))).transpose()?;
        let name = fields.string("name")?;
        let tool_calls = if role == Role::Assistant { tool_calls(&mut fields)? } else { None };
        let tool_call_id = if role == Role::Tool { fields.string("tool_call_id")? } else { None };
        if content.is_none() && tool_calls.is_none() {
            return Err(FieldError::missing(fields.path("content"), "a string or a list of text parts"));
        }
        fields.none_left()?;
        Ok(Self { role, content, name, tool_calls, tool_call_id })
    }
}

fn role(fields: &mut Fields) -> Result<Role, FieldError> {
    const ROLES: &str = "one of \"system\", \"developer\", \"user\", \"assistant\", \"tool\"";
    let path = fields.path("role");
    let value = fields.take("role").ok_or_else(|| FieldError::missing(path.clone(), ROLES))?;
    match value.as_str() {
        Some("system" | "developer") => Ok(Role::System),
        Some("user") => Ok(Role::User),
        Some("assistant") => Ok(Role::Assistant),
        Some("tool") => Ok(Role::Tool),
        _ => Err(FieldError::wanted(path, ROLES, &value)),
    }
}

fn content(value: Value, path: &str) -> Result<String, FieldError> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let texts: Result<Vec<String>, FieldError> =
                parts.into_iter().enumerate().map(|(at, part)| text_part(part, path, at)).collect();
            Ok(texts?.join("\n"))
        }
        other => Err(FieldError::wanted(path, "a string or a list of text parts", &other)),
    }
}

fn text_part(part: Value, path: &str, at: usize) -> Result<String, FieldError> {
    let mut fields = Fields::of(part, &format!("{path}[{at}]"))?;
    let path = fields.path("type");
    let kind = fields.string("type")?.ok_or_else(|| FieldError::missing(path.clone(), "\"text\""))?;
    if kind != "text" {
        let kind = crate::fields::shortened(&kind);
        return Err(FieldError::new(
            path,
            format!("content parts of type {kind:?} are not supported; only \"text\" is"),
        ));
    }
    let text = fields.string("text")?.ok_or_else(|| FieldError::missing(fields.path("text"), "a string"))?;
    fields.none_left()?;
    Ok(text)
}

fn tool_calls(fields: &mut Fields) -> Result<Option<Vec<Value>>, FieldError> {
    let path = fields.path("tool_calls");
    let Some(calls) = fields.list("tool_calls")? else { return Ok(None) };
    if calls.is_empty() {
        return Ok(None);
    }
    let calls: Result<Vec<Value>, FieldError> =
        calls.into_iter().enumerate().map(|(at, call)| tool_call(call, &format!("{path}[{at}]"))).collect();
    calls.map(Some)
}

fn tool_call(call: Value, path: &str) -> Result<Value, FieldError> {
    let mut fields = Fields::of(call, path)?;
    let id = fields.string("id")?;
    let kind = fields.string("type")?.unwrap_or_else(|| "function".into());
    if kind != "function" {
        let kind = crate::fields::shortened(&kind);
        let path = fields.path("type");
        return Err(FieldError::new(path.clone(), format!("{path} must be \"function\"; it is {kind:?}")));
    }
    let function = fields
        .take("function")
        .ok_or_else(|| FieldError::missing(fields.path("function"), "an object with name and arguments"))?;
    fields.none_left()?;
    let mut function = Fields::of(function, &fields.path("function"))?;
    let name =
        function.string("name")?.ok_or_else(|| FieldError::missing(function.path("name"), "a string"))?;
    let arguments = arguments(&mut function)?;
    function.none_left()?;
    Ok(serde_json::json!({"id": id, "type": kind, "function": {"name": name, "arguments": arguments}}))
}

/// Clients send the arguments as JSON text; templates want the object.
fn arguments(function: &mut Fields) -> Result<Value, FieldError> {
    let path = function.path("arguments");
    match function.string("arguments")? {
        None => Ok(Value::Object(Map::new())),
        Some(text) if text.trim().is_empty() => Ok(Value::Object(Map::new())),
        Some(text) => match serde_json::from_str::<Value>(&text) {
            Ok(object @ Value::Object(_)) => Ok(object),
            _ => Err(FieldError::wanted(path, "a JSON object as text", &Value::String(text))),
        },
    }
}
