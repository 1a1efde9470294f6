//! Kubernetes' quantities: `4`, `500m`, `1.5`, `2k`, `1Gi`.

/// Suffixes and what they multiply by.
const SUFFIXES: [(&str, f64); 11] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
];

/// The number that a quantity stands for; `None` if it is none.
pub fn parse(text: &str) -> Option<f64> {
    let text = text.trim();
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    let number: f64 = number.parse().ok()?;
    number.is_finite().then_some(number * factor)
}

/// In thousandths, rounded up as `resource.Quantity` does when it is made of text.
pub fn millis(value: f64) -> i64 {
    // A product such as 0.3 * 1000 may come out a hair above the whole number that is meant.
    (value * 1000.0 - 1e-6).ceil() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_multiply() {
        for (text, value) in
            [("4", 4.0), ("500m", 0.5), ("1.5", 1.5), ("2k", 2000.0), ("1Gi", 1_073_741_824.0)]
        {
            assert_eq!(parse(text), Some(value), "{text}");
        }
        assert_eq!((parse(""), parse("m"), parse("four"), parse("inf")), (None, None, None, None));
        assert_eq!((millis(0.3), millis(4.0), millis(0.0001)), (300, 4000, 1));
    }
}
