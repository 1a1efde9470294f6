//! Jinja as transformers runs it, and bounded: minijinja, with Python's ways of printing, JSON and methods.

mod bounds;
mod filters;
mod guard;
mod methods;
mod python;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::{Timestamp, tz::TimeZone};
use minijinja::machinery::{eval, get_compiled_template, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde_json::Map;

use crate::error::TextError;
use bounds::{FUEL, LimitReached, MAX_SOURCE_BYTES, MAX_TAG_BYTES, MAX_VALUE_BYTES, limit_reached};

const NAME: &str = "chat_template";

/// The parser and the code generator recurse once per operator: `- - - 1`, `1 + 1 + 1`. With a source of
/// [`MAX_SOURCE_BYTES`] in which every other byte is one, this is enough; only what is used becomes real memory.
const COMPILE_STACK_BYTES: usize = 512 << 20;

/// A compiled template: immutable, shared between threads.
#[derive(Debug)]
pub(crate) struct Template {
    /// Holds the template as compiled, unguarded.
    parsed: Environment<'static>,
    /// Runs the guarded instructions; knows no template by name, so that none can be included unguarded.
    running: Environment<'static>,
    source: String,
}

impl Template {
    /// Compiles the source with `trim_blocks` and `lstrip_blocks`, as transformers does.
    pub(crate) fn compile(source: &str) -> Result<Template, TextError> {
        let fault = |reason: String| TextError::TemplateSyntax { reason };
        if source.len() > MAX_SOURCE_BYTES {
            return Err(fault(format!("it has {} bytes, more than {MAX_SOURCE_BYTES}", source.len())));
        }
        if let Some(bytes) = longest_tag(source).filter(|&bytes| bytes > MAX_TAG_BYTES) {
            return Err(fault(format!(
                "one of its expressions has {bytes} bytes, more than {MAX_TAG_BYTES}"
            )));
        }
        let compile = || -> Result<Template, Error> {
            let running = environment()?;
            let mut parsed = running.clone();
            parsed.add_template_owned(NAME, generation_as_with(source))?;
            Ok(Template { parsed, running, source: source.to_owned() })
        };
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("template".into()).stack_size(COMPILE_STACK_BYTES);
            thread.spawn_scoped(scope, compile).map(|running| running.join())
        });
        match compiled {
            Ok(Ok(template)) => template.map_err(|error| fault(error.to_string())),
            Ok(Err(_)) => Err(fault("the template engine panicked on it".into())),
            Err(error) => Err(fault(format!("no thread to compile it on: {error}"))),
        }
    }

    /// Whether the source has this name anywhere.
    pub(crate) fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    pub(crate) fn render(
        &self,
        variables: Map<String, serde_json::Value>,
        unix_seconds: i64,
    ) -> Result<String, TextError> {
        match catch_unwind(AssertUnwindSafe(|| self.run(variables, unix_seconds))) {
            Ok(rendered) => rendered.map_err(render_error),
            Err(_) => Err(TextError::TemplateRender { reason: "the template engine panicked on it".into() }),
        }
    }

    fn run(&self, variables: Map<String, serde_json::Value>, unix_seconds: i64) -> Result<String, Error> {
        let template = self.parsed.get_template(NAME)?;
        let compiled = get_compiled_template(&template);
        let instructions = guard::guarded(&compiled.instructions);
        let blocks = compiled.blocks.iter().map(|(name, block)| (*name, guard::guarded(block))).collect();
        let clock = Value::from_function(move |format: &str| strftime(format, unix_seconds));
        let named = variables.into_iter().map(|(name, value)| (name, python::to_value(value)));
        let root = Value::from_pairs(std::iter::once(("strftime_now".to_owned(), clock)).chain(named));
        let mut prompt = String::new();
        eval(
            &self.running,
            &instructions,
            root,
            &blocks,
            &mut make_string_output(&mut prompt),
            AutoEscape::None,
        )?;
        match prompt.len() <= MAX_VALUE_BYTES {
            true => Ok(prompt),
            false => Err(limit_reached(format!("{MAX_VALUE_BYTES} bytes of prompt"))),
        }
    }
}

/// The engine with everything that transformers gives a template.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    // Errors are told to clients: no source of the template, no values of other variables.
    environment.set_debug(false);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(guard::emit);
    environment.remove_global("debug");
    environment.add_function("raise_exception", raise_exception);
    filters::add_to(&mut environment);
    guard::add_to(&mut environment);
    Ok(environment)
}

/// A template's own refusal of a conversation.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn raise_exception(message: Value) -> Result<Value, Error> {
    let mut text = bounds::Bounded::value();
    python::write_str(&mut text, &message)?;
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refused(text.text)))
}

/// `strftime_now(format)`: the date, UTC.
fn strftime(format: &str, unix_seconds: i64) -> Result<String, Error> {
    let fault =
        |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    methods::bounded_format(format)?;
    let now = Timestamp::from_second(unix_seconds).map_err(fault)?.to_zoned(TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now).map_err(fault)
}

/// Sorts the engine's errors into ours.
fn render_error(error: Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Refused(message)) = current.downcast_ref() {
            return TextError::TemplateRefused { message: message.clone() };
        }
        if let Some(LimitReached(limit)) = current.downcast_ref() {
            return TextError::TemplateLimit { limit: limit.clone() };
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::TemplateLimit { limit: format!("{FUEL} instructions") };
    }
    if error.detail().is_some_and(|detail| detail.contains("recursion limit")) {
        return TextError::TemplateLimit { limit: "500 levels of recursion".into() };
    }
    TextError::TemplateRender { reason: error.to_string() }
}

/// Bytes of the longest `{{ }}` or `{% %}`, without the texts in quotes: those may be whole system prompts.
fn longest_tag(source: &str) -> Option<usize> {
    let opens = |pair: &[u8]| pair == b"{{" || pair == b"{%";
    let bytes = source.as_bytes();
    let (mut longest, mut at) = (None, 0);
    while at + 1 < bytes.len() {
        if !opens(&bytes[at..at + 2]) {
            at += 1;
            continue;
        }
        let (end, size) = tag(bytes, at + 2);
        longest = longest.max(Some(size));
        at = end;
    }
    longest
}

/// Where the tag that was opened before `at` ends, and how many of its bytes are not in quotes.
fn tag(bytes: &[u8], mut at: usize) -> (usize, usize) {
    let (mut size, mut quote) = (0, None);
    while at < bytes.len() {
        let byte = bytes[at];
        match quote {
            Some(_) if byte == b'\\' => at += 1,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if bytes[at..].starts_with(b"}}") || bytes[at..].starts_with(b"%}") => break,
            None => {
                size += 1;
                quote = matches!(byte, b'"' | b'\'').then_some(byte);
            }
        }
        at += 1;
    }
    (at, size)
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for training, by the
/// block that does nothing but open a scope: `{% with %}`.
fn generation_as_with(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |at| at + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']);
        out.push_str(&match inner.trim() {
            word @ "generation" => tag.replacen(word, "with", 1),
            word @ "endgeneration" => tag.replacen(word, "endwith", 1),
            _ => tag.to_owned(),
        });
        rest = after;
    }
    out + rest
}
