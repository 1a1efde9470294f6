//! Jinja as transformers runs it: minijinja, with Python's ways of printing, JSON and string methods, and bounds.

use std::time::Duration;

use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value};

use crate::error::TextError;

/// A compiled template.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    source: String,
}

impl Template {
    pub(crate) fn compile(source: &str) -> Result<Template, TextError> {
        let mut environment = Environment::new();
        environment
            .add_template_owned("chat_template", source.to_owned())
            .map_err(|error| TextError::TemplateSyntax { reason: error.to_string() })?;
        Ok(Template { environment, source: source.to_owned() })
    }

    pub(crate) fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    pub(crate) fn render(
        &self,
        _variables: Map<String, Value>,
        _unix_seconds: i64,
    ) -> Result<String, TextError> {
        let _ = (Duration::ZERO, ErrorKind::OutOfFuel, Error::from(ErrorKind::OutOfFuel));
        todo!()
    }
}
