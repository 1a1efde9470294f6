//! What a GPU offers: memory, bandwidth, arithmetic, the links to its neighbours, and a price.
//!
//! The known ones stand with their sources in `data/hardware.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::calibration::{Calibration, CalibrationError};
use crate::dtype::Dtype;

const DATA: &str = include_str!("../data/hardware.toml");

/// One GPU, or any device with memory and arithmetic. Decimal units; rates are the data sheet's peaks, or
/// measured.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareProfile {
    /// As people write it.
    pub name: String,
    /// What [`HardwareProfile::named`] finds it by.
    #[serde(default, skip_serializing)]
    pub aliases: Vec<String>,
    /// Memory that the driver reports as total.
    pub memory_bytes: f64,
    pub bandwidth_bytes_per_second: f64,
    /// Dense operations a second (a multiplication with its addition counts as two) for each number format
    /// that the arithmetic units take.
    pub flops_per_second: BTreeMap<Dtype, f64>,
    /// Absent: one device alone.
    pub interconnect: Option<Interconnect>,
    pub tdp_watts: Option<f64>,
    /// An assumption.
    pub dollars_per_hour: Option<f64>,
    /// Where the numbers are from.
    pub source: String,
    /// How long steps take where that was measured, with one model; see [`crate::calibration`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

/// The links between the GPUs of one machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Interconnect {
    pub name: String,
    /// What one GPU sends, in one direction.
    pub bytes_per_second: f64,
    /// GPUs that it joins.
    pub gpus: u32,
}

/// A profile that does not exist or makes no sense.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum HardwareError {
    #[error("unknown hardware {name:?}; known: {}; or give the path of a profile (TOML)", known.join(", "))]
    Unknown { name: String, known: Vec<String> },
    #[error("{field} of hardware {name:?} is {value}; it must be {rule}")]
    Range { name: String, field: &'static str, value: f64, rule: &'static str },
    #[error("the name of a hardware profile must be 1 to 40 printable characters, and {0:?} is not")]
    Name(String),
    #[error("hardware {name:?} has no entry in flops_per_second; give at least bf16 = ...")]
    NoFlops { name: String },
    #[error(
        "hardware {name} has no arithmetic for {dtype}; it has {}; choose another number format",
        has.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
    )]
    NoDtype { name: String, dtype: Dtype, has: Vec<Dtype> },
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error("line {line}: {message}")]
    Toml { line: usize, message: String },
}

/// Least and most of every rate: wide enough for a microcontroller and for a rack, and small enough that
/// no product of them overflows.
const RATE_RULE: &str = "from 1e3 to 1e18";

impl HardwareProfile {
    /// The known profiles.
    ///
    /// # Errors
    /// None with the data that this crate is built with, which a test reads.
    pub fn all() -> Result<Vec<Self>, HardwareError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            profile: Vec<HardwareProfile>,
        }
        let file: File = toml::from_str(DATA).map_err(|error| toml_error(DATA, &error))?;
        Ok(file.profile)
    }

    /// One name for each known profile.
    ///
    /// # Errors
    /// As [`HardwareProfile::all`].
    pub fn names() -> Result<Vec<String>, HardwareError> {
        Ok(Self::all()?.iter().filter_map(|profile| profile.aliases.first().cloned()).collect())
    }

    /// The known profile of that name, in any case.
    ///
    /// # Errors
    /// [`HardwareError::Unknown`], which lists the known ones.
    pub fn named(name: &str) -> Result<Self, HardwareError> {
        let found = Self::all()?.into_iter().find(|profile| profile.answers_to(name));
        match found {
            Some(profile) => Ok(profile),
            None => Err(HardwareError::Unknown { name: name.to_owned(), known: Self::names()? }),
        }
    }

    fn answers_to(&self, name: &str) -> bool {
        let mut names = self.aliases.iter().chain([&self.name]);
        names.any(|known| known.eq_ignore_ascii_case(name))
    }

    /// A profile from a file of the user, in the form that `data/hardware.toml` describes.
    ///
    /// # Errors
    /// [`HardwareError::Toml`] that names line and key, or what [`HardwareProfile::validate`] finds.
    pub fn parse(text: &str) -> Result<Self, HardwareError> {
        let profile: Self = toml::from_str(text).map_err(|error| toml_error(text, &error))?;
        profile.validate()?;
        Ok(profile)
    }

    /// A single device of which three numbers were measured, the operations with numbers of `dtype`.
    ///
    /// # Errors
    /// As [`HardwareProfile::validate`].
    pub fn measured(
        memory_bytes: f64,
        bandwidth_bytes_per_second: f64,
        dtype: Dtype,
        flops_per_second: f64,
    ) -> Result<Self, HardwareError> {
        let profile = Self {
            name: "measured".to_owned(),
            aliases: Vec::new(),
            memory_bytes,
            bandwidth_bytes_per_second,
            flops_per_second: BTreeMap::from([(dtype, flops_per_second)]),
            interconnect: None,
            tdp_watts: None,
            dollars_per_hour: None,
            source: "measured".to_owned(),
            calibration: None,
        };
        profile.validate()?;
        Ok(profile)
    }

    /// # Errors
    /// The first number that no device can have.
    pub fn validate(&self) -> Result<(), HardwareError> {
        let length = self.name.chars().count();
        if !(1..=40).contains(&length) || self.name.chars().any(char::is_control) {
            return Err(HardwareError::Name(self.name.chars().take(40).collect()));
        }
        if self.flops_per_second.is_empty() {
            return Err(HardwareError::NoFlops { name: self.name.clone() });
        }
        self.within("memory_bytes", Some(self.memory_bytes), 1e3..=1e18, RATE_RULE)?;
        let bandwidth = Some(self.bandwidth_bytes_per_second);
        self.within("bandwidth_bytes_per_second", bandwidth, 1e3..=1e18, RATE_RULE)?;
        for flops in self.flops_per_second.values() {
            self.within("flops_per_second", Some(*flops), 1e3..=1e18, RATE_RULE)?;
        }
        if let Some(link) = &self.interconnect {
            self.within("interconnect.bytes_per_second", Some(link.bytes_per_second), 1e3..=1e18, RATE_RULE)?;
            self.within("interconnect.gpus", Some(f64::from(link.gpus)), 1.0..=1024.0, "from 1 to 1024")?;
        }
        if let Some(calibration) = &self.calibration {
            calibration.validate()?;
        }
        self.within("tdp_watts", self.tdp_watts, 0.1..=1e6, "from 0.1 to 1e6")?;
        self.within("dollars_per_hour", self.dollars_per_hour, 0.0..=1e5, "from 0 to 1e5")
    }

    fn within(
        &self,
        field: &'static str,
        value: Option<f64>,
        range: std::ops::RangeInclusive<f64>,
        rule: &'static str,
    ) -> Result<(), HardwareError> {
        match value {
            Some(value) if !range.contains(&value) => {
                Err(HardwareError::Range { name: self.name.clone(), field, value, rule })
            }
            _ => Ok(()),
        }
    }

    /// The number format in which weights of `dtype` are multiplied, and the operations a second. Weights
    /// narrower than the arithmetic units take are widened: FP8 on a chip without it saves bytes only.
    ///
    /// # Errors
    /// [`HardwareError::NoDtype`].
    pub fn arithmetic(&self, dtype: Dtype) -> Result<(Dtype, f64), HardwareError> {
        let wider: &[Dtype] = match dtype {
            Dtype::Fp8 => &[Dtype::Fp8, Dtype::Bf16, Dtype::F16, Dtype::F32],
            Dtype::Bf16 => &[Dtype::Bf16, Dtype::F32],
            Dtype::F16 => &[Dtype::F16, Dtype::F32],
            Dtype::F32 => &[Dtype::F32],
        };
        let found = wider.iter().find_map(|dtype| Some((*dtype, *self.flops_per_second.get(dtype)?)));
        found.ok_or_else(|| HardwareError::NoDtype {
            name: self.name.clone(),
            dtype,
            has: self.flops_per_second.keys().copied().collect(),
        })
    }

    /// Most GPUs over which one replica can be spread.
    pub fn most_gpus(&self) -> u32 {
        self.interconnect.as_ref().map_or(1, |link| link.gpus)
    }
}

/// In one line.
fn toml_error(text: &str, error: &toml::de::Error) -> HardwareError {
    let start = error.span().map_or(0, |span| span.start);
    let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
    HardwareError::Toml { line, message: error.message().replace('\n', " ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_file_is_sound() {
        let all = HardwareProfile::all().unwrap();
        let expected = ["a100-40", "a100-80", "l4", "l40s", "h100", "h100-pcie", "h200", "b200"];
        assert_eq!(HardwareProfile::names().unwrap(), expected);
        for profile in &all {
            profile.validate().unwrap();
            let found = all.iter().filter(|other| other.answers_to(&profile.aliases[0]));
            assert_eq!(found.count(), 1, "{}", profile.name);
            assert!(profile.source.contains("data sheet") && profile.source.contains("nvidia-smi"));
            assert_eq!(profile.arithmetic(Dtype::F16).unwrap().1, profile.arithmetic(Dtype::Bf16).unwrap().1);
        }
    }

    #[test]
    fn names_are_found_in_any_case_and_unknown_ones_list_the_known() {
        assert_eq!(HardwareProfile::named("H100").unwrap(), HardwareProfile::named("h100 sxm").unwrap());
        let message = HardwareProfile::named("h1000").unwrap_err().to_string();
        assert!(message.contains("\"h1000\"") && message.contains("h100, h100-pcie, h200"), "{message}");
    }

    #[test]
    fn narrow_weights_are_widened_where_the_chip_lacks_them() {
        let a100 = HardwareProfile::named("a100").unwrap();
        assert_eq!(a100.arithmetic(Dtype::Fp8).unwrap(), (Dtype::Bf16, 312e12));
        let h100 = HardwareProfile::named("h100").unwrap();
        assert_eq!(h100.arithmetic(Dtype::Fp8).unwrap(), (Dtype::Fp8, 1979e12));
        let message = h100.arithmetic(Dtype::F32).unwrap_err().to_string();
        assert_eq!(
            message,
            "hardware H100 SXM has no arithmetic for f32; it has f16, bf16, fp8; choose another number format"
        );
    }

    const OWN: &str = "name = \"box\"\nmemory_bytes = 16e9\nbandwidth_bytes_per_second = 20e9\n\
                       flops_per_second = { f32 = 100e9 }\nsource = \"measured\"\n";

    #[test]
    fn a_file_of_the_user_is_checked() {
        let own = HardwareProfile::parse(OWN).unwrap();
        assert_eq!((own.most_gpus(), own.arithmetic(Dtype::Bf16).unwrap()), (1, (Dtype::F32, 100e9)));
        for (from, to, part) in [
            ("16e9", "-1", "memory_bytes of hardware \"box\" is -1; it must be from 1e3 to 1e18"),
            ("20e9", "nan", "bandwidth_bytes_per_second of hardware \"box\" is NaN"),
            ("20e9", "inf", "is inf"),
            ("{ f32 = 100e9 }", "{}", "no entry in flops_per_second"),
            ("f32 =", "f31 =", "line 4: unknown variant `f31`, expected one of `f32`, `f16`"),
            ("source =", "sauce =", "line 5: unknown field `sauce`"),
            ("\"box\"", "\"\"", "1 to 40 printable"),
        ] {
            let message = HardwareProfile::parse(&OWN.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn measured_numbers_make_a_profile_of_one_device() {
        let measured = HardwareProfile::measured(16e9, 20e9, Dtype::Bf16, 1e12).unwrap();
        assert_eq!(measured.arithmetic(Dtype::Bf16).unwrap(), (Dtype::Bf16, 1e12));
        assert_eq!(measured.most_gpus(), 1);
        assert!(HardwareProfile::measured(16e9, 0.0, Dtype::Bf16, 1e12).is_err());
    }
}
