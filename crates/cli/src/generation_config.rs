//! `generation_config.json`: sampling values that hold where a request is silent.

use serde_json::{Map, Value};
use servelab_server::SamplingDefaults;

/// A value that cannot be a default.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerationConfigError {
    #[error("generation_config.json is not a JSON object: {0}")]
    Json(String),
    #[error("{field} is {value} in generation_config.json; it must be {rule}")]
    Range { field: &'static str, value: String, rule: &'static str },
}

/// Reads temperature, top_k, top_p, min_p and repetition_penalty. Without the file there are no
/// defaults but OpenAI's.
///
/// # Errors
/// If one of them is there and is no number that sampling accepts.
pub fn sampling_defaults(file: Option<&[u8]>) -> Result<SamplingDefaults, GenerationConfigError> {
    let Some(bytes) = file else { return Ok(SamplingDefaults::default()) };
    let fields: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| GenerationConfigError::Json(error.to_string()))?;
    let top_k = number(&fields, "top_k", "a whole number", |k| k.fract() == 0.0 && (-1.0..1e9).contains(&k))?;
    Ok(SamplingDefaults {
        temperature: number(&fields, "temperature", "from 0 to 100", |t| (0.0..=100.0).contains(&t))?,
        // 0 and -1 both mean that all tokens are kept.
        top_k: top_k.filter(|&k| k >= 1.0).map(|k| k as u32),
        top_p: number(&fields, "top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
        min_p: number(&fields, "min_p", "from 0 to 1", |p| (0.0..=1.0).contains(&p))?,
        repetition_penalty: number(&fields, "repetition_penalty", "above 0", |r| r > 0.0 && r < 1e6)?,
    })
}

fn number(
    fields: &Map<String, Value>,
    field: &'static str,
    rule: &'static str,
    fits: impl Fn(f32) -> bool,
) -> Result<Option<f32>, GenerationConfigError> {
    let Some(value) = fields.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
    match value.as_f64().map(|number| number as f32).filter(|&number| fits(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(GenerationConfigError::Range { field, value: value.to_string(), rule }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_absent_ones_stay_absent() {
        let file =
            br#"{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": null, "eos_token_id": [1, 2]}"#;
        let defaults = sampling_defaults(Some(file)).unwrap();
        assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.6), Some(20), Some(0.95)));
        assert_eq!((defaults.min_p, defaults.repetition_penalty), (None, None));
        assert_eq!(sampling_defaults(None).unwrap(), SamplingDefaults::default());
        assert_eq!(sampling_defaults(Some(br#"{"top_k": 0}"#)).unwrap().top_k, None);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for file in [r#"{"temperature": -1}"#, r#"{"top_p": 2}"#, r#"{"top_k": "many"}"#, r#"{"top_k": 1.5}"#]
        {
            let error = sampling_defaults(Some(file.as_bytes())).unwrap_err().to_string();
            assert!(error.contains("generation_config.json; it must be"), "{error}");
        }
        assert!(sampling_defaults(Some(b"[]")).is_err());
    }
}
