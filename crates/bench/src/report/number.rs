//! Numbers for people.

/// Three significant digits and more, thousands grouped, without an exponent.
pub fn shown(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    match value.abs() {
        0.0 => "0".into(),
        below if below < 0.001 => if value < 0.0 { "> -0.001" } else { "< 0.001" }.into(),
        below if below < 10.0 => format!("{value:.3}"),
        below if below < 100.0 => format!("{value:.2}"),
        below if below < 1000.0 => format!("{value:.1}"),
        _ => grouped(&format!("{value:.0}")),
    }
}

/// A count, thousands grouped.
pub fn count(value: u64) -> String {
    grouped(&value.to_string())
}

/// Four significant digits without zeros at the end: for machines, where every byte is written hundreds of times.
pub fn short(value: f64) -> String {
    let digits = if value == 0.0 { 0.0 } else { value.abs().log10().floor() };
    let decimals = (3.0 - digits).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent.abs() {
        none if !none.is_finite() => "-".into(),
        nothing if nothing < 0.005 => "0 %".into(),
        little if little < 0.1 => format!("{percent:.2} %"),
        _ => format!("{percent:.1} %"),
    }
}

fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |rest| ("-", rest));
    let mut out = String::from(sign);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits_and_group_thousands() {
        for (value, text) in [
            (0.0, "0"),
            (0.0004, "< 0.001"),
            (1.2345, "1.234"),
            (12.345, "12.35"),
            (123.45, "123.5"),
            (1234.5, "1,234"),
            (-1_234_567.0, "-1,234,567"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(shown(value), text);
        }
        assert_eq!([count(999), count(1000), count(1_234_567)], ["999", "1,000", "1,234,567"]);
    }

    #[test]
    fn short_numbers_are_short() {
        for (value, text) in [(0.0, "0"), (0.1, "0.1"), (1234.56, "1235"), (12.3456, "12.35"), (100.0, "100")]
        {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn small_shares_are_not_nothing() {
        assert_eq!([percent(1e-9), percent(0.0004), percent(0.25)], ["0 %", "0.04 %", "25.0 %"]);
    }
}
