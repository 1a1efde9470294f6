//! Sizes and times as people type them: `512MiB`, `2GB`, `30s`, `1.5s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// A number of bytes. Typed as `1048576`, `512MiB` (powers of 1024) or `2GB` (powers of 1000).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// What was typed is no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error(
        "{0:?} is no size; give bytes, or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 512MiB"
    )]
    Size(String),
    #[error("{0:?} is no time; give seconds, or a number with ms, s, m or h, such as 30s")]
    Time(String),
}

impl FromStr for ByteSize {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wrong = || QuantityError::Size(text.to_owned());
        let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let bytes = number * *factor as f64;
        if bytes < (1_u64 << 53) as f64 { Ok(Self(bytes as u64)) } else { Err(wrong()) }
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that gives at least 1: `64.0 MiB`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= factor {
                return write!(out, "{:.1} {unit}", self.0 as f64 / factor as f64);
            }
        }
        write!(out, "{} bytes", self.0)
    }
}

/// A span of time. Typed as seconds (`30`, `0.5`) or with a unit (`500ms`, `30s`, `2m`, `1h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeSpan(pub Duration);

impl FromStr for TimeSpan {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wrong = || QuantityError::Time(text.to_owned());
        let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
        let factor = match unit.as_str() {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        let seconds = number * factor;
        // A year: beyond it arithmetic on points in time may overflow.
        if seconds > 366.0 * 86_400.0 {
            return Err(wrong());
        }
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|_| wrong())
    }
}

/// Splits `1.5GiB` into 1.5 and `gib`. No sign, no exponent.
fn number_and_unit(text: &str) -> Option<(f64, String)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim().to_ascii_lowercase()))
}

/// In a file these are text, or a number of bytes or seconds.
macro_rules! from_text_or_number {
    ($name:ident) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Typed {
                    Whole(u64),
                    Decimal(f64),
                    Text(String),
                }
                let text = match Typed::deserialize(deserializer)? {
                    Typed::Whole(number) => number.to_string(),
                    Typed::Decimal(number) => number.to_string(),
                    Typed::Text(text) => text,
                };
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

from_text_or_number!(ByteSize);
from_text_or_number!(TimeSpan);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_families_of_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("2GB", 2_000_000_000),
            ("1.5 GiB", 3 << 29),
            ("10kb", 10_000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1e9", "5 bananas", "1G", "99999999TiB", "nan", "1.2.3MB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_seconds_unless_a_unit_says_otherwise() {
        for (text, milliseconds) in
            [("30", 30_000), ("0.5", 500), ("250ms", 250), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(text.parse(), Ok(TimeSpan(Duration::from_millis(milliseconds))), "{text}");
        }
        for text in ["", "s", "-1s", "inf", "5 days", "99999999999h"] {
            assert!(text.parse::<TimeSpan>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_a_readable_unit() {
        let shown = |bytes| ByteSize(bytes).to_string();
        assert_eq!([shown(100), shown(64 << 20), shown(3 << 29)], ["100 bytes", "64.0 MiB", "1.5 GiB"]);
    }
}
