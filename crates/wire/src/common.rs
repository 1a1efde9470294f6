//! The fields that chat and text completions share.

use serde_json::Value;

use crate::fields::{FieldError, Fields, integer, number, token_ids};

/// Stop strings of one request (OpenAI allows 4).
const MAX_STOP_STRINGS: usize = 16;
/// Bytes of one stop string: each is looked for after every token.
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 128;
const MAX_LOGIT_BIAS: usize = 1024;
/// Most alternatives that OpenAI reports per token.
pub const MAX_LOGPROBS: u32 = 20;
/// A bound that keeps every product of `n` and token counts far from overflow. The server's own bound,
/// the sequences that run at once, is lower and checked there.
const MAX_N: u32 = 4096;
/// The same for token counts.
const MAX_TOKENS: u32 = 1 << 30;

/// What chat and text completions share. Ranges that do not depend on the model are checked; `None` is
/// the default of the model or the server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CommonFields {
    /// Absent: the model served.
    pub model: Option<String>,
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub n: u32,
    pub temperature: Option<f32>,
    /// 0 and -1 keep all tokens: `Some(0)`.
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: Option<f32>,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub include_stop_str_in_output: bool,
    pub skip_special_tokens: bool,
    pub add_special_tokens: Option<bool>,
    pub prompt_logprobs: Option<u32>,
    pub priority: i32,
    pub cache_salt: Option<String>,
    /// `None`: the whole answer at once.
    pub stream: Option<StreamOptions>,
}

/// How a streamed answer reports its usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// A last chunk without choices carries the usage.
    pub include_usage: bool,
    /// Every chunk carries the usage so far.
    pub continuous_usage_stats: bool,
}

impl CommonFields {
    /// Takes the shared fields out of `fields`.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn take(fields: &mut Fields) -> Result<Self, FieldError> {
        // Accepted and without effect on the answer, as at OpenAI: who asks, and labels for one's own use.
        fields.string("user")?;
        fields.string("safety_identifier")?;
        fields.object("metadata")?;
        let common = Self {
            model: fields.string("model")?,
            max_tokens: max_tokens(fields)?,
            min_tokens: fields.count("min_tokens", 0..=MAX_TOKENS)?.unwrap_or(0),
            n: fields.count("n", 1..=MAX_N)?.unwrap_or(1),
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| u32::try_from(k).unwrap_or(0)),
            top_p: positive(fields, "top_p", 1.0)?,
            min_p: fields.number("min_p", 0.0..=1.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition_penalty: positive(fields, "repetition_penalty", 10.0)?,
            logit_bias: logit_bias(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            stop: stop(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            include_stop_str_in_output: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            add_special_tokens: fields.boolean("add_special_tokens")?,
            prompt_logprobs: fields.count("prompt_logprobs", 0..=MAX_LOGPROBS)?,
            priority: priority(fields)?,
            cache_salt: cache_salt(fields)?,
            stream: stream(fields)?,
        };
        common.agree()
    }

    /// Fields that are fine alone and not together.
    fn agree(self) -> Result<Self, FieldError> {
        if let Some(max) = self.max_tokens.filter(|max| self.min_tokens > *max) {
            let message = format!(
                "min_tokens {} exceeds max_tokens {max}; lower min_tokens to {max} or less",
                self.min_tokens
            );
            return Err(FieldError::new("min_tokens", message));
        }
        if self.stream.is_some() && self.prompt_logprobs.is_some() {
            let message = "prompt_logprobs cannot be streamed; leave out stream or prompt_logprobs";
            return Err(FieldError::new("prompt_logprobs", message));
        }
        Ok(self)
    }
}

/// `max_completion_tokens` is the newer name of `max_tokens`.
fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, FieldError> {
    let old = fields.count("max_tokens", 1..=MAX_TOKENS)?;
    let new = fields.count("max_completion_tokens", 1..=MAX_TOKENS)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(FieldError::new(
            "max_tokens",
            format!("max_tokens {old} and max_completion_tokens {new} differ; give one of them"),
        )),
        _ => Ok(new.or(old)),
    }
}

/// A number in (0, most].
fn positive(fields: &mut Fields, name: &str, most: f64) -> Result<Option<f32>, FieldError> {
    let path = fields.path(name);
    fields
        .take(name)
        .map(|value| {
            number(&value, &path, 0.0..=most).ok().filter(|number| *number > 0.0).ok_or_else(|| {
                FieldError::wanted(&path, &format!("a number above 0 and at most {most}"), &value)
            })
        })
        .transpose()
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, FieldError> {
    let path = fields.path("logit_bias");
    let Some(members) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if members.len() > MAX_LOGIT_BIAS {
        let message = format!("{path} has {} members; at most {MAX_LOGIT_BIAS} are allowed", members.len());
        return Err(FieldError::new(path, message));
    }
    members
        .iter()
        .map(|(token, bias)| {
            let id = token.parse::<u32>().map_err(|_| {
                let token = crate::fields::shortened(token);
                FieldError::new(&path, format!("the keys of {path} must be token ids; {token:?} is none"))
            })?;
            Ok((id, number(bias, &format!("{path}.{id}"), -100.0..=100.0)?))
        })
        .collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, FieldError> {
    let path = fields.path("stop");
    let strings = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::Array(items)) if items.len() > MAX_STOP_STRINGS => {
            let message = format!("stop has {} strings; at most {MAX_STOP_STRINGS} are allowed", items.len());
            return Err(FieldError::new(path, message));
        }
        Some(Value::Array(items)) => items,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(FieldError::wanted(path, "a string or a list of strings", &other)),
    };
    strings
        .into_iter()
        .map(|item| match item {
            Value::String(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text),
            other => {
                let wanted = format!("strings of 1 to {MAX_STOP_BYTES} bytes");
                Err(FieldError::wanted(path.clone(), &wanted, &other))
            }
        })
        .collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, FieldError> {
    let path = fields.path("stop_token_ids");
    fields
        .take("stop_token_ids")
        .map(|value| token_ids(value, &path, MAX_STOP_TOKENS))
        .transpose()
        .map(Option::unwrap_or_default)
}

fn priority(fields: &mut Fields) -> Result<i32, FieldError> {
    let path = fields.path("priority");
    let Some(value) = fields.take("priority") else { return Ok(0) };
    let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
    Ok(i32::try_from(integer(&value, &path, range)?).unwrap_or(0))
}

fn cache_salt(fields: &mut Fields) -> Result<Option<String>, FieldError> {
    match fields.string("cache_salt")? {
        Some(salt) if salt.is_empty() => {
            Err(FieldError::new("cache_salt", "cache_salt must not be empty; leave it out or name a tenant"))
        }
        salt => Ok(salt),
    }
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, FieldError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let path = fields.path("stream_options");
    let Some(options) = fields.take("stream_options") else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        return Err(FieldError::new(path, "stream_options is only allowed with \"stream\": true"));
    }
    let mut options = Fields::of(options, &path)?;
    let read = StreamOptions {
        include_usage: options.boolean("include_usage")?.unwrap_or(false),
        continuous_usage_stats: options.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    let path = options.path("include_obfuscation");
    if options.boolean("include_obfuscation")?.unwrap_or(false) {
        return Err(FieldError::new(path.clone(), format!("{path} is not supported; leave it out")));
    }
    options.none_left()?;
    Ok(Some(read))
}
