//! The workloads that are data: `data/workloads.toml` and `data/engine_comparison.toml`.

use serde::Deserialize;

use super::lengths::{Lengths, Quantiles, Span};
use super::tree::PrefixTree;
use crate::arrivals::ArrivalShape;

const WORKLOADS: &str = include_str!("../../data/workloads.toml");
const COMPARISON: &str = include_str!("../../data/engine_comparison.toml");

/// `data/workloads.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    percentiles: Vec<f64>,
    #[serde(rename = "table")]
    tables: Vec<Table>,
    pub prefixes: Vec<Prefixes>,
}

/// A trace in quantiles.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    pub name: String,
    pub description: String,
    /// Mean requests a second in the trace.
    pub rate: f64,
    burstiness: Option<f64>,
    on_seconds: Option<f64>,
    off_seconds: Option<f64>,
    input: Vec<u32>,
    input_least: u32,
    input_most: u32,
    output: Vec<u32>,
    output_least: u32,
    output_most: u32,
    pub prefixes: Option<PrefixTree>,
}

/// Some prefixes, and requests that each begin with one of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefixes {
    pub name: String,
    pub description: String,
    pub rate: f64,
    pub prefixes: u32,
    pub prefix_tokens: u32,
    pub input: u32,
    pub output: u32,
}

/// `data/engine_comparison.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    pub temperature: f64,
    pub input: Vec<u32>,
    pub output: Vec<u32>,
}

impl Catalogue {
    pub fn load() -> Self {
        toml::from_str(WORKLOADS).expect("the file is part of the crate, and a test reads it")
    }

    pub fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|table| table.name == name)
    }

    pub fn prefixes(&self, name: &str) -> Option<&Prefixes> {
        self.prefixes.iter().find(|prefixes| prefixes.name == name)
    }

    /// Names and descriptions, in the order of the file.
    pub fn list(&self) -> impl Iterator<Item = (&str, &str)> {
        let tables = self.tables.iter().map(|table| (table.name.as_str(), table.description.as_str()));
        tables.chain(
            self.prefixes.iter().map(|prefixes| (prefixes.name.as_str(), prefixes.description.as_str())),
        )
    }

    pub fn input(&self, table: &Table) -> Lengths {
        self.lengths(&table.input, table.input_least, table.input_most)
    }

    pub fn output(&self, table: &Table) -> Lengths {
        self.lengths(&table.output, table.output_least, table.output_most)
    }

    fn lengths(&self, quantiles: &[u32], least: u32, most: u32) -> Lengths {
        Quantiles::new(&self.percentiles, quantiles, least, most)
            .map_or(Lengths::Uniform(Span { least, most }), Lengths::Table)
    }
}

impl Table {
    /// How requests arrive in the trace.
    pub fn arrivals(&self) -> ArrivalShape {
        let rate = self.rate;
        match (self.on_seconds, self.off_seconds) {
            (Some(on_seconds), Some(off_seconds)) => ArrivalShape::OnOff { rate, on_seconds, off_seconds },
            _ => ArrivalShape::Gamma { rate, burstiness: self.burstiness.unwrap_or(1.0) },
        }
    }
}

impl Comparison {
    pub fn load() -> Self {
        toml::from_str(COMPARISON).expect("the file is part of the crate, and a test reads it")
    }
}

#[cfg(test)]
mod tests {
    use super::super::lengths::Strata;
    use super::*;

    #[test]
    fn samples_have_the_quantiles_of_the_table_within_three_percent() {
        let catalogue = Catalogue::load();
        for table in &catalogue.tables {
            for (quantiles, lengths) in
                [(&table.input, catalogue.input(table)), (&table.output, catalogue.output(table))]
            {
                assert!(matches!(lengths, Lengths::Table(_)), "{}", table.name);
                let mut strata = Strata::new(5, 1);
                let mut sample: Vec<f64> =
                    (0..20_000).map(|_| f64::from(lengths.at(strata.share()))).collect();
                sample.sort_by(f64::total_cmp);
                for (percent, expected) in catalogue.percentiles.iter().zip(quantiles) {
                    let got = crate::stats::percentile(&sample, *percent);
                    let expected = f64::from(*expected);
                    // A length is a whole number.
                    let allowed = (0.03 * expected).max(0.5);
                    assert!(
                        (got - expected).abs() <= allowed,
                        "{} p{percent}: {got}, {expected}",
                        table.name
                    );
                }
            }
        }
    }

    /// What facts about the trace are known besides its rate: CV 13, a tenth of the minutes empty.
    #[test]
    fn azure_code_arrives_in_bursts_with_empty_minutes() {
        let catalogue = Catalogue::load();
        let ArrivalShape::OnOff { rate, on_seconds, off_seconds } =
            catalogue.table("azure-code").unwrap().arrivals()
        else {
            panic!("not on/off")
        };
        let off = off_seconds / (on_seconds + off_seconds);
        let rates = 1.0 / on_seconds + 1.0 / off_seconds;
        let cv = (1.0 + 2.0 * rate / (1.0 - off) / on_seconds / rates.powi(2)).sqrt();
        assert!((cv - 13.0).abs() < 0.2, "CV {cv}");
        let empty = off * (-60.0 / off_seconds).exp();
        assert!((empty - 0.1).abs() < 0.01, "empty minutes {empty}");
    }

    #[test]
    fn the_comparison_asks_for_the_tokens_that_were_published() {
        let comparison = Comparison::load();
        assert_eq!((comparison.input.len(), comparison.output.len()), (256, 256));
        assert_eq!(comparison.output.iter().sum::<u32>(), 133_966);
        assert!(
            comparison.input.iter().chain(&comparison.output).all(|tokens| (100..=1024).contains(tokens))
        );
    }
}
