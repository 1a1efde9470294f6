//! Numbers as people write them on a whiteboard: three figures, thousands separated, a unit.

/// 520833.3 as `520,833`.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits.as_str()), |rest| ("-", rest));
    let mut text = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A computed number: three figures below 1,000, whole below a million, then `3.47M`, `15.0B`.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size < 999.5 => figures(value),
        size if size < 999_999.5 => grouped(value),
        size if size < 999.5e6 => format!("{}M", figures(value / 1e6)),
        size if size < 999.5e9 => format!("{}B", figures(value / 1e9)),
        size if size < 999.5e12 => format!("{}T", figures(value / 1e12)),
        _ => format!("{value:.2e}"),
    }
}

/// A count: `36`, `5,134`, `3.47M`.
pub fn whole(value: u64) -> String {
    if value < 1_000_000 { grouped(value as f64) } else { short(value as f64) }
}

/// `1 GPU`, `2 GPUs`.
pub fn plural(count: u64, unit: &str) -> String {
    format!("{} {unit}{}", whole(count), if count == 1 { "" } else { "s" })
}

/// A mean of counts: `10.4`.
pub fn tenths(value: f64) -> String {
    if value < 999.5 { format!("{value:.1}") } else { short(value) }
}

/// A count of parameters: `70.55e9`. Not with a B, which is a byte beside it.
pub fn parameters(value: u64) -> String {
    match value as f64 {
        value if value < 1e9 => format!("{:.1}e6", value / 1e6),
        value => format!("{:.2}e9", value / 1e9),
    }
}

/// An assumption, as it was given: `1.3`, `3`, `2,000`, `1M`.
pub fn given(value: f64) -> String {
    let million = value / 1e6;
    if value >= 1e6 && (million * 1e3).fract() == 0.0 && million < 1e6 {
        return format!("{million}M");
    }
    if value.fract() == 0.0 || value >= 1000.0 { grouped(value) } else { format!("{}", rounded(value)) }
}

/// At most four places.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Three significant figures, for values below 1,000.
fn figures(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size < 0.000_995 => format!("{value:.1e}"),
        size if size < 0.0995 => format!("{value:.4}"),
        size if size < 0.995 => format!("{value:.3}"),
        size if size < 9.995 => format!("{value:.2}"),
        size if size < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// `22.1 ms`.
pub fn seconds(value: f64) -> String {
    match value {
        value if value < 0.999_5e-3 => format!("{} us", figures(value * 1e6)),
        value if value < 0.999_5 => format!("{} ms", figures(value * 1e3)),
        _ => format!("{} s", short(value)),
    }
}

/// In powers of 1000: `141.1 GB`.
pub fn bytes(value: f64) -> String {
    match value.abs() {
        size if size < 1e6 => format!("{} B", grouped(value)),
        size if size < 1e9 => format!("{:.1} MB", value / 1e6),
        size if size < 1e12 => format!("{:.1} GB", value / 1e9),
        size if size < 1e15 => format!("{:.1} TB", value / 1e12),
        _ => format!("{value:.2e} B"),
    }
}

/// A rate of bytes, as data sheets give it: `3.35 TB/s`.
pub fn bandwidth(value: f64) -> String {
    match value {
        value if value < 999.5e6 => format!("{} MB/s", figures(value / 1e6)),
        value if value < 999.5e9 => format!("{} GB/s", figures(value / 1e9)),
        _ => format!("{} TB/s", short(value / 1e12)),
    }
}

/// A rate of operations: `989 TFLOP/s`.
pub fn flops(value: f64) -> String {
    match value {
        value if value < 999.5e9 => format!("{} GFLOP/s", figures(value / 1e9)),
        _ => format!("{} TFLOP/s", short(value / 1e12)),
    }
}

/// `2.59 kW`.
pub fn power(watts: f64) -> String {
    match watts {
        watts if watts < 999.5 => format!("{} W", figures(watts)),
        watts if watts < 999.5e3 => format!("{} kW", figures(watts / 1e3)),
        watts => format!("{} MW", short(watts / 1e6)),
    }
}

/// `$3.00`, `$0.083`.
pub fn dollars(value: f64) -> String {
    match value {
        value if value < 0.1 => format!("${}", figures(value)),
        value if value < 1000.0 => format!("${value:.2}"),
        value => format!("${}", short(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computed_numbers_have_three_figures_or_all_their_digits() {
        let shown = |value| short(value);
        assert_eq!(
            [0.0, 0.05, 2.2749, 13.0, 578.7, 999.6, 520_833.3, 999_999.6, 3.472e6, 15e9, 2e15].map(shown),
            ["0", "0.0500", "2.27", "13.0", "579", "1,000", "520,833", "1.00M", "3.47M", "15.0B", "2.00e15"]
        );
    }

    #[test]
    fn counts_are_whole_and_their_means_are_not() {
        assert_eq!([0.04, 10.44, 1234.5].map(tenths), ["0.0", "10.4", "1,234"]);
        assert_eq!([1, 5134, 3_472_222].map(whole), ["1", "5,134", "3.47M"]);
        assert_eq!([1, 5134].map(|count| plural(count, "GPU")), ["1 GPU", "5,134 GPUs"]);
        assert_eq!([3_100_000, 134_515_008, 70_553_706_496].map(parameters), ["3.1e6", "134.5e6", "70.55e9"]);
    }

    #[test]
    fn given_numbers_stay_as_they_are() {
        assert_eq!(
            [1.3, 3.0, 0.85, 2000.0, 1e6, 1.5e6, 1_234_567.0, 1e10].map(given),
            ["1.3", "3", "0.85", "2,000", "1M", "1.5M", "1,234,567", "10000M"]
        );
    }

    #[test]
    fn quantities_carry_a_fitting_unit() {
        assert_eq!(
            [15.2e-6, 22.1e-3, 0.9999, 15.04].map(seconds),
            ["15.2 us", "22.1 ms", "1.00 s", "15.0 s"]
        );
        assert_eq!(
            [327_680.0, 2.5e6, 141.1e9, 1.2e12].map(bytes),
            ["327,680 B", "2.5 MB", "141.1 GB", "1.2 TB"]
        );
        assert_eq!([864e9, 3.35e12].map(bandwidth), ["864 GB/s", "3.35 TB/s"]);
        assert_eq!([100e9, 989e12, 2250e12].map(flops), ["100 GFLOP/s", "989 TFLOP/s", "2,250 TFLOP/s"]);
        assert_eq!([144.0, 2590.0, 3.594e6].map(power), ["144 W", "2.59 kW", "3.59 MW"]);
        assert_eq!([0.0772, 0.8333, 24.6, 12_000.0].map(dollars), ["$0.0772", "$0.83", "$24.60", "$12,000"]);
    }
}
