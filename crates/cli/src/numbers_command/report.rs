//! What `servelab numbers run` says: first what is expected, then what was measured, and how far off it was.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use servelab_bench::experiments::{
    Circumstances, ExperimentError, ExperimentId, Finding, Observer, Prediction, PredictionKind,
};
use servelab_bench::ledger::lines::wrap;
use servelab_bench::ledger::{Ledger, LedgerError, Unit};
use servelab_sim::numbers::{bandwidth, bytes, flops, parameters};

/// No line is longer, in characters.
const WIDTH: usize = 100;
const INDENT: &str = "      ";
const LABEL: usize = 10;

/// Writes lines to `out`, and on a terminal what is being done to standard error.
pub struct Report<'a, W> {
    out: &'a mut W,
    /// The first line that could not be written; there is nobody to tell it to in between.
    broken: Option<io::Error>,
    shows_progress: bool,
    /// Whether nothing was said yet.
    is_first: bool,
    /// How the numbers came about.
    verb: &'static str,
}

impl<'a, W: Write> Report<'a, W> {
    pub fn new(out: &'a mut W) -> Self {
        Self {
            out,
            broken: None,
            shows_progress: io::stderr().is_terminal(),
            is_first: true,
            verb: "measured",
        }
    }

    fn line(&mut self, text: &str) {
        self.clear();
        let written = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
        if let (Err(error), None) = (written, &self.broken) {
            self.broken = Some(error);
        }
    }

    /// A paragraph behind a label.
    fn labelled(&mut self, label: &str, text: &str) {
        let room = WIDTH - INDENT.len() - LABEL;
        for (at, line) in wrap(text, room).into_iter().enumerate() {
            let label = if at == 0 { label } else { "" };
            self.line(&format!("{INDENT}{label:<LABEL$}{line}"));
        }
    }

    /// Takes what was shown of the progress away again.
    pub fn clear(&mut self) {
        if self.shows_progress {
            // Standard error may be closed.
            let _ = write!(io::stderr(), "\r\u{1b}[K");
        }
    }

    fn check(&mut self) -> io::Result<()> {
        self.broken.take().map_or(Ok(()), Err)
    }

    /// What is measured, and with what.
    fn title(&mut self, circumstances: &Circumstances) {
        let (model, limits) = (&circumstances.model, &circumstances.limits);
        let title = format!(
            "{}, {}: {} parameters in {}, KV in {}; on {}",
            model.name,
            circumstances.weights,
            parameters(model.parameters),
            model.weight_dtype,
            model.kv_dtype,
            circumstances.hardware
        );
        for line in wrap(&title, WIDTH) {
            self.line(&line);
        }
        let rate = limits.arithmetic(model.weight_dtype).map_or(0.0, |(_, rate)| rate);
        let text = format!(
            "Limits: {} of memory, {} in {}; {} ({}).",
            bandwidth(limits.bandwidth_bytes_per_second),
            flops(rate),
            model.weight_dtype,
            bytes(limits.memory_bytes),
            limits.source
        );
        for line in wrap(&text, WIDTH) {
            self.line(&line);
        }
        if circumstances.is_busy() {
            let text = "Other programs keep this machine busy: what is measured now will be too slow. Run this \
                        again when they have ended.";
            for line in wrap(text, WIDTH) {
                self.line(&line);
            }
        }
    }

    /// The rows that were not measured, and what they need.
    pub fn others(&mut self, ledger: &Ledger, ids: &[String]) -> Result<(), super::Error> {
        if ids.is_empty() {
            return Ok(());
        }
        self.line("");
        self.line("Not measured here:");
        for id in ids {
            let row = ledger.row(id).map_err(|error: LedgerError| error)?;
            let text = format!("{}: {}", row.needs.describe(), row.how);
            for (at, line) in wrap(&text, WIDTH - 14).into_iter().enumerate() {
                let id = if at == 0 { id.as_str() } else { "" };
                self.line(&format!("  {id:<12}{line}"));
            }
        }
        Ok(self.check()?)
    }

    pub fn end(&mut self, kept: usize, path: &Path) -> io::Result<()> {
        if kept > 0 {
            self.line("");
            self.line(&format!("{kept} measurements added to {}", path.display()));
            self.line("The table with them: servelab numbers");
        }
        self.check()
    }
}

impl<W: Write> Observer for Report<'_, W> {
    fn turns_to(&mut self, circumstances: &Circumstances) {
        if !std::mem::replace(&mut self.is_first, false) {
            self.line("");
        }
        self.title(circumstances);
    }

    fn begins(&mut self, experiment: ExperimentId, number: usize, of: usize) {
        self.verb = if experiment.is_simulated() { "simulated" } else { "measured" };
        self.line("");
        self.line(&format!("[{number}/{of}] {}: {}", experiment.name(), experiment.question()));
    }

    fn predicts(&mut self, label: &str, unit: Unit, prediction: &Prediction) {
        let word = match prediction.kind {
            PredictionKind::Equal => "expected",
            PredictionKind::Floor => "at least",
            PredictionKind::Ceiling => "at most",
        };
        let text = format!("{label}: {}   [{}]", unit.show(prediction.value), prediction.because);
        self.labelled(word, &text);
    }

    fn progress(&mut self, text: &str) {
        if self.shows_progress {
            let text: String = text.chars().take(WIDTH - 8).collect();
            // Standard error may be closed.
            let _ = write!(io::stderr(), "\r\u{1b}[K{INDENT}{text} ...").and_then(|()| io::stderr().flush());
        }
    }

    fn found(&mut self, finding: &Finding) {
        let comparison = finding.comparison_text().map(|text| format!("; {text}")).unwrap_or_default();
        self.labelled(self.verb, &format!("{}: {}{comparison}", finding.label, finding.measured_text()));
        if let Some(note) = &finding.note {
            self.labelled("", &format!("({note})"));
        }
    }

    fn ended(&mut self, _experiment: ExperimentId, took: Duration, error: Option<&ExperimentError>) {
        match error {
            Some(error) => self.labelled("no result", &error.to_string()),
            None => self.labelled("", &format!("{:.1} s", took.as_secs_f64())),
        }
    }
}
