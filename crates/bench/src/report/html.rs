//! A document as one HTML page, with everything that it needs in it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, Output, State, context};

use super::document::Document;
use super::escape;

const PAGE: &str = include_str!("../../assets/report.html");
const STYLE: &str = include_str!("../../assets/report.css");
const SCRIPT: &str = include_str!("../../assets/report.js");

/// The page. It is well-formed XML too.
///
/// # Errors
/// If the template does not fit the document, which the tests rule out.
pub fn page(document: &Document) -> Result<String, Error> {
    let style = Value::from_safe_string(STYLE.to_owned());
    let script = Value::from_safe_string(SCRIPT.to_owned());
    render("report.html", PAGE, context! { document => Value::from(Serde(document)), style, script })
}

/// Fills in a template of a page. What is not marked as safe is escaped.
///
/// # Errors
/// If the template does not fit the context.
pub(crate) fn render(name: &str, template: &str, context: Value) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_formatter(write_escaped);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_template(name, template)?;
    environment.get_template(name)?.render(context)
}

/// The same escaping for the page as for the pictures in it. Only what is marked as safe is written as it is.
fn write_escaped(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) if !value.is_safe() => out.write_str(&escape::html(text))?,
        _ => write!(out, "{value}")?,
    }
    Ok(())
}
