//! The ledger for one model and hardware, with what was measured beside it: plain data, from which every form of
//! output is made. As JSON it is the output itself.

use serde::Serialize;

use super::calculation::Calculation;
use super::evaluate::{Chosen, Computed, EvaluationError, Inputs};
use super::row::{Figure, LimitFigure, Needs, Published, Row, Source, Standing, Topic};
use super::unit::Unit;
use super::{Ledger, LedgerError};
use crate::experiments::{ExperimentId, Finding, Ladder, Measurement};

/// All rows, computed.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerView {
    /// What the limits are of.
    pub model: String,
    /// `bf16 weights, bf16 KV`.
    pub number_formats: String,
    pub hardware: String,
    pub rows: Vec<RowView>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RowView {
    pub id: String,
    pub topic: Topic,
    pub quoted: String,
    pub source: Source,
    pub standing: Standing,
    pub verdict: String,
    pub needs: Needs,
    pub how: String,
    pub experiment: Option<ExperimentId>,
    pub arithmetic: Vec<FigureView>,
    pub limits: Vec<FigureView>,
    pub published: Vec<Published>,
    pub measured: Vec<MeasuredView>,
}

/// A number with its formula.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum FigureView {
    Computed {
        label: String,
        /// The circumstances in short; may be empty.
        at: String,
        value: f64,
        unit: Unit,
        /// With its unit, as it is shown.
        text: String,
        formula: &'static str,
        general: &'static str,
        substituted: String,
    },
    /// Why there is none for this model and hardware.
    Absent { label: String, reason: String },
}

impl FigureView {
    fn new(label: &str, computed: Result<Computed, EvaluationError>) -> Self {
        let label = label.to_owned();
        match computed {
            Err(error) => Self::Absent { label, reason: error.to_string() },
            Ok(computed) => Self::Computed {
                label,
                text: computed.unit.show(computed.value),
                at: computed.at,
                value: computed.value,
                unit: computed.unit,
                formula: computed.formula,
                general: computed.general,
                substituted: computed.substituted,
            },
        }
    }

    /// In one line: what it is of, and the number.
    pub fn line(&self) -> String {
        match self {
            Self::Absent { label, reason } => joined(&[label, reason], ": "),
            Self::Computed { label, at, text, .. } => joined(&[&joined(&[label, at], ", "), text], ": "),
        }
    }
}

/// The parts that are not empty.
fn joined(parts: &[&str], between: &str) -> String {
    let parts: Vec<&str> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
    parts.join(between)
}

/// The newest measurement of a row's experiment on one hardware with one model.
#[derive(Clone, Debug, Serialize)]
pub struct MeasuredView {
    pub hardware: String,
    pub model: String,
    pub weights: String,
    /// `2026-11-24`.
    pub date: String,
    pub commit: Option<String>,
    /// Other programs took a part of the machine, so that times are too long.
    pub is_busy: bool,
    /// Those that answer the row.
    pub findings: Vec<Finding>,
    /// The curve behind them, of the batch ladder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ladder: Option<Ladder>,
}

impl MeasuredView {
    /// `demo on AMD EPYC, 2 threads, 2026-11-24`.
    pub fn place(&self) -> String {
        let busy = if self.is_busy { " (busy)" } else { "" };
        format!("{} on {}{busy}, {}", self.model, self.hardware, self.date)
    }
}

/// Which rows are wanted; empty lists want all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub ids: Vec<String>,
    pub needs: Vec<Needs>,
}

impl LedgerView {
    /// `llama-3.1-8b (bf16 weights, bf16 KV) on H100 SXM`.
    pub fn limits_of(&self) -> String {
        format!("{} ({}) on {}", self.model, self.number_formats, self.hardware)
    }

    /// Computes the rows. `measurements` in any order.
    ///
    /// # Errors
    /// If a row that is wanted does not exist.
    pub fn new(
        ledger: &Ledger,
        chosen: &Chosen,
        filter: &Filter,
        measurements: &[Measurement],
    ) -> Result<Self, LedgerError> {
        for id in &filter.ids {
            ledger.row(id)?;
        }
        let wanted = |row: &&Row| {
            (filter.ids.is_empty() || filter.ids.contains(&row.id))
                && (filter.needs.is_empty() || filter.needs.contains(&row.needs))
        };
        let inputs = ledger.inputs(chosen);
        let rows = ledger.rows.iter().filter(wanted).map(|row| RowView::new(row, inputs, measurements));
        Ok(Self {
            model: chosen.model.name.clone(),
            number_formats: format!("{} weights, {} KV", chosen.model.weight_dtype, chosen.model.kv_dtype),
            hardware: chosen.hardware.name.clone(),
            rows: rows.collect(),
        })
    }

    /// How many rows stand in each way, in the order of [`Standing`].
    pub fn counts(&self) -> [(Standing, usize); 4] {
        [Standing::Holds, Standing::Depends, Standing::Wrong, Standing::Open]
            .map(|standing| (standing, self.rows.iter().filter(|row| row.standing == standing).count()))
    }
}

impl RowView {
    fn new(row: &Row, inputs: Inputs<'_>, measurements: &[Measurement]) -> Self {
        let figure =
            |label: &str, calculation: &Calculation| FigureView::new(label, calculation.evaluate(inputs));
        let arithmetic =
            row.arithmetic.iter().map(|Figure { label, calculation, .. }| figure(label, calculation));
        let limits = row.limits.iter().map(|LimitFigure { label, calculation }| figure(label, calculation));
        Self {
            id: row.id.clone(),
            topic: row.topic,
            quoted: row.quoted.clone(),
            source: row.source,
            standing: row.standing,
            verdict: row.verdict.clone(),
            needs: row.needs,
            how: row.how.clone(),
            experiment: row.experiment,
            arithmetic: arithmetic.collect(),
            limits: limits.collect(),
            published: row.published.clone(),
            measured: measured(row, measurements),
        }
    }
}

/// The newest of each hardware and model, the newest first.
fn measured(row: &Row, measurements: &[Measurement]) -> Vec<MeasuredView> {
    let answers = |measurement: &&Measurement| {
        Some(measurement.experiment) == row.experiment
            && (row.needs != Needs::OneGpu || measurement.circumstances.is_gpu)
    };
    let mut found: Vec<&Measurement> = measurements.iter().filter(answers).collect();
    found.sort_by_key(|measurement| std::cmp::Reverse(measurement.unix_seconds));
    let mut seen: Vec<(&str, &str)> = Vec::new();
    found.retain(|measurement| {
        let place =
            (measurement.circumstances.hardware.as_str(), measurement.circumstances.model.name.as_str());
        let is_new = !seen.contains(&place);
        seen.push(place);
        is_new
    });
    found.into_iter().map(|measurement| measured_view(row, measurement)).collect()
}

fn measured_view(row: &Row, measurement: &Measurement) -> MeasuredView {
    let circumstances = &measurement.circumstances;
    let of_key = |key: &String| measurement.findings.iter().find(|finding| finding.key == *key).cloned();
    MeasuredView {
        hardware: circumstances.hardware.clone(),
        model: circumstances.model.name.clone(),
        weights: circumstances.weights.clone(),
        date: date(measurement.unix_seconds),
        commit: circumstances.origin.tool_commit.clone(),
        is_busy: circumstances.is_busy(),
        findings: row.shows.iter().filter_map(of_key).collect(),
        ladder: measurement.ladder.clone(),
    }
}

/// The day, in UTC.
pub fn date(unix_seconds: u64) -> String {
    let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX);
    let timestamp = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    timestamp.strftime("%Y-%m-%d").to_string()
}
