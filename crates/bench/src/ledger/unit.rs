//! Units of the ledger's numbers, and how a number in one of them is written.

use serde::{Deserialize, Serialize};
use servelab_sim::numbers::{bytes, dollars, given, grouped, seconds, short, whole};

/// What a number counts.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    TokensPerSecond,
    TokensPerSecondPerGpu,
    RequestsPerSecond,
    BytesPerToken,
    Bytes,
    Seconds,
    /// Of a batch.
    Sequences,
    Requests,
    Tokens,
    Gpus,
    /// A ratio.
    Factor,
    /// A part of one.
    Share,
    /// A relative difference, with its sign.
    Deviation,
    DollarsPerMillionTokens,
}

impl Unit {
    /// The number with its unit, in about three figures.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::TokensPerSecond => format!("{} tok/s", short(value)),
            Self::TokensPerSecondPerGpu => format!("{} tok/s/GPU", short(value)),
            Self::RequestsPerSecond => format!("{} req/s", short(value)),
            Self::BytesPerToken => format!("{} B/token", grouped(value)),
            Self::Bytes => bytes(value),
            Self::Seconds => seconds(value),
            Self::Sequences => counted(value, "sequence"),
            Self::Requests => counted(value, "request"),
            Self::Tokens => counted(value, "token"),
            Self::Gpus => format!("{} GPUs", whole(value.round() as u64)),
            Self::Factor => format!("{}x", short(value)),
            Self::Share => percent(value),
            Self::Deviation => format!("{}{}", if value > 0.0005 { "+" } else { "" }, percent(value)),
            Self::DollarsPerMillionTokens => format!("{} per 1M tokens", dollars(value)),
        }
    }
}

/// `16 requests`, `16.5 requests`, `1 request`.
fn counted(value: f64, unit: &str) -> String {
    let number = if value.fract() == 0.0 { given(value) } else { short(value) };
    format!("{number} {unit}{}", if value == 1.0 { "" } else { "s" })
}

/// `31 %`, `0.4 %`, `1,240 %`.
pub fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if percent.abs() < 0.05 {
        "0 %".to_owned()
    } else if percent.abs() < 9.95 {
        format!("{percent:.1} %")
    } else {
        format!("{} %", grouped(percent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_carry_their_unit() {
        let shown = [
            (Unit::TokensPerSecondPerGpu, 658.7, "659 tok/s/GPU"),
            (Unit::BytesPerToken, 327_680.0, "327,680 B/token"),
            (Unit::Seconds, 15.2e-6, "15.2 us"),
            (Unit::Sequences, 50.9, "50.9 sequences"),
            (Unit::Gpus, 676.9, "677 GPUs"),
            (Unit::Factor, 9.26, "9.26x"),
            (Unit::Share, 0.31, "31 %"),
            (Unit::Share, 0.004, "0.4 %"),
            (Unit::Deviation, 0.53, "+53 %"),
            (Unit::Deviation, -0.24, "-24 %"),
            (Unit::Deviation, 12.4, "+1,240 %"),
            (Unit::Deviation, 0.000_2, "0 %"),
            (Unit::Requests, 16.0, "16 requests"),
            (Unit::Requests, 16.5, "16.5 requests"),
            (Unit::DollarsPerMillionTokens, 0.8333, "$0.83 per 1M tokens"),
        ];
        for (unit, value, text) in shown {
            assert_eq!(unit.show(value), text);
        }
    }
}
