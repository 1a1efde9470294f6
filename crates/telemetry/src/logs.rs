//! Logs: human lines or JSON on standard error, filtered by a setting and never by the environment.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// What a library would say again and again, and our own record says once. A setting may name it all the same.
const QUIET: &str = "kube_runtime=error";

/// How log records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line a record, coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a record; the fields of the spans around it, `request_id` among them, in `span`.
    Json,
}

impl FromStr for LogFormat {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(LogError::Format(other.to_owned())),
        }
    }
}

/// Why logs cannot be written as asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("unknown log format {0:?}; use human or json")]
    Format(String),
    #[error(
        "log level {level:?} is not understood ({reason}); use error, warn, info, debug, trace or off, for one crate \
         as in info,servelab_server=debug"
    )]
    Level { level: String, reason: String },
    #[error("logs were set up before")]
    Twice,
}

/// Sends the records of the whole process to standard error.
///
/// `level` is `error`, `warn`, `info`, `debug`, `trace` or `off`, optionally with exceptions for single
/// crates: `info,servelab_server=debug`.
///
/// # Errors
/// [`LogError::Level`] if `level` is not understood, [`LogError::Twice`] if it was called before.
pub fn init_logs(format: LogFormat, level: &str) -> Result<(), LogError> {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter(level)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let installed = match format {
        LogFormat::Human => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_span_list(false).try_init(),
    };
    installed.map_err(|_| LogError::Twice)
}

/// Whether [`init_logs`] understands `level`.
///
/// # Errors
/// [`LogError::Level`] if it does not.
pub fn check_level(level: &str) -> Result<(), LogError> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let wrong = |reason: String| LogError::Level { level: level.to_owned(), reason };
    // A bare word that is no level would pass as the name of a crate and silence everything.
    for part in level.split(',').filter(|part| !part.contains('=')) {
        if part.trim().is_empty() || LevelFilter::from_str(part.trim()).is_err() {
            return Err(wrong(format!("{part:?} is no level")));
        }
    }
    let is_off = level.split(',').any(|part| part.trim().eq_ignore_ascii_case("off"));
    let level = if is_off { level.to_owned() } else { format!("{QUIET},{level}") };
    EnvFilter::builder().parse(level).map_err(|error| wrong(error.to_string()))
}

/// The span that everything done for one request runs in; its records carry `request_id`, and `trace_id` if the
/// request is traced.
pub fn request_span(request_id: &str, trace_id: Option<&str>) -> tracing::Span {
    tracing::info_span!("request", request_id, trace_id)
}

/// A text that must not reach a log, an error message or a page: an API key, a token of a hub.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[secret]")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_records_carry_the_request_id_and_no_secret() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            request_span("req-7", Some("4bf9"))
                .in_scope(|| tracing::info!(key = ?Secret::new("sk-very-secret"), "taken"));
            request_span("req-8", None).in_scope(|| tracing::info!("not traced"));
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let records: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [record, untraced] = records.as_slice() else { panic!("{text}") };
        assert_eq!(record["span"]["request_id"], "req-7");
        assert_eq!(record["span"]["trace_id"], "4bf9");
        assert_eq!(untraced["span"].get("trace_id"), None, "{text}");
        assert_eq!(record["message"], "taken");
        assert!(!text.contains("very-secret"), "{text}");
    }

    #[test]
    fn levels_are_checked() {
        for level in ["info", "debug,servelab_server=trace", "off", "warn"] {
            check_level(level).unwrap();
        }
        for level in ["loud", "info,loud", "info=x=y", ""] {
            let error = check_level(level).unwrap_err().to_string();
            assert!(error.contains("use error, warn, info"), "{error}");
        }
    }

    #[test]
    fn a_library_that_repeats_itself_is_quiet_unless_it_is_named() {
        let shown = |level: &str| filter(level).unwrap().to_string();
        assert!(shown("info").contains("kube_runtime=error") && shown("info").contains("info"));
        let named = shown("info,kube_runtime=debug");
        assert!(named.contains("kube_runtime=debug") && !named.contains("kube_runtime=error"), "{named}");
        assert_eq!(shown("off"), "off");
    }

    #[test]
    fn formats_are_named() {
        assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
        assert!("xml".parse::<LogFormat>().unwrap_err().to_string().contains("human or json"));
    }
}
