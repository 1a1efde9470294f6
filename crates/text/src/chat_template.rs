//! From messages to the prompt: the model's own Jinja template.

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::error::TextError;
use crate::jinja::Template;
use crate::tokenizer::{read_config, special_tokens};

/// What a template sees of a request.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// Messages as JSON objects in OpenAI's form, at least one. Fields that are null are dropped, as
    /// transformers does.
    pub messages: &'a [Value],
    /// Tools as JSON objects. `None` and an empty list are different to a template.
    pub tools: Option<&'a [Value]>,
    /// Documents for retrieval templates, as JSON objects.
    pub documents: Option<&'a [Value]>,
    /// Whether the prompt ends with the header of the assistant's next message.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends within the last message, for the model to continue it.
    pub continue_final_message: bool,
    /// Further variables (`chat_template_kwargs`), for instance `enable_thinking`.
    pub extra: &'a Map<String, Value>,
}

impl Default for ChatInput<'_> {
    fn default() -> Self {
        static NO_EXTRA: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        ChatInput {
            messages: &[],
            tools: None,
            documents: None,
            add_generation_prompt: false,
            continue_final_message: false,
            extra: &NO_EXTRA,
        }
    }
}

/// A compiled chat template: immutable, shared between threads.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Template,
    tool_use: Option<Template>,
    special_tokens: Map<String, Value>,
}

/// Stands after the final message while `continue_final_message` is worked out. The space shows whether the
/// template trims.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are what it sees as `bos_token` and `eos_token`.
    ///
    /// Fails with [`TextError::TemplateSyntax`].
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<ChatTemplate, TextError> {
        let named = [("bos_token", bos), ("eos_token", eos)];
        let special = named.into_iter().filter_map(|(role, token)| Some((role.to_owned(), token?.into())));
        Ok(ChatTemplate {
            default: Template::compile(source)?,
            tool_use: None,
            special_tokens: special.collect(),
        })
    }

    /// Compiles the template of a model's files: `chat_template.jinja` if there, else `chat_template` of
    /// `tokenizer_config.json`, which is a string or a list of named templates: `default`, and `tool_use` for
    /// requests with tools. `None` if the model has no template.
    ///
    /// Fails with [`TextError::TokenizerConfig`], [`TextError::NoDefaultTemplate`] or
    /// [`TextError::TemplateSyntax`].
    pub fn from_files(
        tokenizer_config: Option<&[u8]>,
        chat_template_jinja: Option<&str>,
    ) -> Result<Option<ChatTemplate>, TextError> {
        let config = tokenizer_config.map(read_config).transpose()?.unwrap_or_default();
        let special = tokenizer_config.map(special_tokens).transpose()?.unwrap_or_default();
        let (default, tool_use) = match (chat_template_jinja, config.get("chat_template")) {
            (Some(source), _) => (source.to_owned(), None),
            (None, None | Some(Value::Null)) => return Ok(None),
            (None, Some(Value::String(source))) => (source.clone(), None),
            (None, Some(Value::Array(named))) => choose_named(named)?,
            (None, Some(_)) => {
                let reason = "chat_template must be a string or a list of {name, template} objects".into();
                return Err(TextError::TokenizerConfig { reason });
            }
        };
        Ok(Some(ChatTemplate {
            default: Template::compile(&default)?,
            tool_use: tool_use.map(|source| Template::compile(&source)).transpose()?,
            special_tokens: special.into_iter().map(|(role, token)| (role, token.into())).collect(),
        }))
    }

    /// Whether the template reads `tools`: one that does not would drop them without a word.
    pub fn supports_tools(&self) -> bool {
        self.tool_use.is_some() || self.default.mentions("tools")
    }

    /// The prompt for a conversation, as transformers' `apply_chat_template` renders it. Dates that the template
    /// asks for are of now, UTC.
    ///
    /// Cost: microseconds per message, O(length of the conversation); not for async threads when it is long.
    ///
    /// Fails with [`TextError::TemplateRefused`] when the template calls `raise_exception`, with
    /// [`TextError::TemplateRender`] on a fault in the template or a field that is missing, with
    /// [`TextError::TemplateLimit`] when the template uses too much, with [`TextError::ChatInput`] or
    /// [`TextError::ContinueFinalMessage`] on a wrong input.
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.render_at(input, i64::try_from(now).unwrap_or(i64::MAX))
    }

    /// [`ChatTemplate::render`] with the clock at `unix_seconds`.
    pub fn render_at(&self, input: &ChatInput, unix_seconds: i64) -> Result<String, TextError> {
        let mut messages = messages_as_transformers(input.messages)?;
        let template = match &self.tool_use {
            Some(tool_use) if input.tools.is_some() => tool_use,
            _ => &self.default,
        };
        let continued = match input.continue_final_message {
            true => Some(tag_final_message(&mut messages, template, input.add_generation_prompt)?),
            false => None,
        };
        let rendered = template.render(self.variables(input, messages)?, unix_seconds)?;
        match continued {
            Some(text) => cut_at_tag(&rendered, &text),
            None => Ok(rendered),
        }
    }

    /// All variables of the template; `extra` goes over the special tokens, as in transformers.
    fn variables(&self, input: &ChatInput, messages: Vec<Value>) -> Result<Map<String, Value>, TextError> {
        let mut variables = self.special_tokens.clone();
        variables.extend(input.extra.iter().map(|(name, value)| (name.clone(), value.clone())));
        for (name, value) in [
            ("messages", Value::Array(messages)),
            ("tools", objects("tools", input.tools)?),
            ("documents", objects("documents", input.documents)?),
            ("add_generation_prompt", input.add_generation_prompt.into()),
        ] {
            if input.extra.contains_key(name) {
                return Err(TextError::ChatInput {
                    what: format!("chat_template_kwargs.{name}"),
                    expected: "left out: this variable comes from the request's own field",
                });
            }
            variables.insert(name.into(), value);
        }
        Ok(variables)
    }
}

/// Picks `default` and `tool_use` from a list of `{name, template}`.
fn choose_named(named: &[Value]) -> Result<(String, Option<String>), TextError> {
    let entry = |value: &Value| {
        Some((value.get("name")?.as_str()?.to_owned(), value.get("template")?.as_str()?.to_owned()))
    };
    let all: Option<Vec<(String, String)>> = named.iter().map(entry).collect();
    let all = all.ok_or_else(|| TextError::TokenizerConfig {
        reason: "each entry of chat_template must have the strings `name` and `template`".into(),
    })?;
    let find = |name: &str| all.iter().find(|(n, _)| n == name).map(|(_, template)| template.clone());
    match find("default") {
        Some(default) => Ok((default, find("tool_use"))),
        None => {
            Err(TextError::NoDefaultTemplate { names: all.iter().map(|(name, _)| name.clone()).collect() })
        }
    }
}

/// A list of objects, or null where there is none.
fn objects(what: &str, list: Option<&[Value]>) -> Result<Value, TextError> {
    let Some(list) = list else { return Ok(Value::Null) };
    match list.iter().position(|value| !value.is_object()) {
        Some(index) => {
            Err(TextError::ChatInput { what: format!("{what}[{index}]"), expected: "a JSON object" })
        }
        None => Ok(Value::Array(list.to_vec())),
    }
}

/// The names under which a message may carry its reasoning; templates read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The messages as transformers 5 hands them to a template: no null fields, and the reasoning under the names
/// that templates read.
fn messages_as_transformers(messages: &[Value]) -> Result<Vec<Value>, TextError> {
    if messages.is_empty() {
        return Err(TextError::ChatInput {
            what: "messages".into(),
            expected: "a list of at least one message",
        });
    }
    let mut prepared = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let Value::Object(fields) = message else {
            return Err(TextError::ChatInput {
                what: format!("messages[{index}]"),
                expected: "a JSON object",
            });
        };
        let mut fields: Map<String, Value> =
            fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning);
        }
        prepared.push(Value::Object(fields));
    }
    Ok(prepared)
}

/// Puts [`CONTINUE_TAG`] behind the text of the final message and gives that text.
fn tag_final_message(
    messages: &mut [Value],
    template: &Template,
    add_generation_prompt: bool,
) -> Result<String, TextError> {
    let fault = |reason: &str| TextError::ContinueFinalMessage { reason: reason.into() };
    if add_generation_prompt {
        return Err(fault("does not go with add_generation_prompt; set one of the two to false"));
    }
    if !template.mentions("content") {
        return Err(fault("the chat template does not read `content`; leave it out for this model"));
    }
    let content = match messages.last_mut().and_then(|message| message.get_mut("content")) {
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        other => other,
    };
    match content {
        Some(Value::String(text)) => {
            let original = text.clone();
            text.push_str(CONTINUE_TAG);
            Ok(original)
        }
        _ => {
            Err(fault("the final message has no text to continue; give it a string or text parts as content"))
        }
    }
}

/// Cuts the prompt where the final message ends; if the template trimmed the message, the prompt is trimmed too.
fn cut_at_tag(rendered: &str, final_text: &str) -> Result<String, TextError> {
    let at = rendered.rfind(CONTINUE_TAG.trim_end());
    let Some(at) = at.filter(|_| rendered.contains(final_text.trim())) else {
        return Err(TextError::ContinueFinalMessage {
            reason:
                "the chat template changes or drops the final message, so it cannot be continued; send it \
                     as a finished message"
                    .into(),
        });
    };
    match rendered[at..].starts_with(CONTINUE_TAG) {
        true => Ok(rendered[..at].to_owned()),
        false => Ok(rendered[..at].trim_end().to_owned()),
    }
}
