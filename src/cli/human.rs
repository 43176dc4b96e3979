//! Numbers in the words of a reader.

use std::path::Path;

/// A time in the units of a clock: `340 µs`, `1.25 s`, `8 h 12 min`.
pub fn duration(seconds: f64) -> String {
    const MINUTE: f64 = 60.0;
    const HOUR: f64 = 3600.0;
    const DAY: f64 = 86400.0;
    let pair = |(large, large_name): (f64, &str), (small, small_name): (f64, &str)| {
        let smalls = (seconds / small).round();
        let per_large = (large / small).round();
        let larges = (smalls / per_large).floor();
        format!(
            "{larges:.0} {large_name} {:.0} {small_name}",
            smalls - larges * per_large
        )
    };
    if !seconds.is_finite() {
        "no end".to_owned()
    } else if seconds >= 2.0 * DAY {
        pair((DAY, "d"), (HOUR, "h"))
    } else if seconds >= 2.0 * HOUR {
        pair((HOUR, "h"), (MINUTE, "min"))
    } else if seconds >= 2.0 * MINUTE {
        pair((MINUTE, "min"), (1.0, "s"))
    } else if seconds >= 1.0 {
        format!("{} s", digits(seconds, 3))
    } else if seconds >= 1e-3 {
        format!("{} ms", digits(seconds * 1e3, 3))
    } else {
        format!("{} µs", digits(seconds * 1e6, 3))
    }
}

/// At least `significant` digits, without an exponent for numbers that a person writes without.
pub fn digits(value: f64, significant: i32) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    // The exponent after rounding: 0.9999 has three digits as 1.00.
    let scientific = format!("{value:.*e}", (significant - 1).max(0) as usize);
    let exponent: Option<i32> = scientific
        .split_once('e')
        .and_then(|(_, exponent)| exponent.parse().ok());
    match exponent {
        Some(exponent @ -6..15) => format!("{value:.*}", (significant - 1 - exponent).max(0) as usize),
        _ => scientific,
    }
}

/// A number without needless digits.
pub fn plain(value: f64) -> String {
    let rounded = digits(value, 6);
    match rounded.contains('.') && !rounded.contains('e') {
        true => rounded.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => rounded,
    }
}

/// Below this a part of one is rounding.
const ROUNDING: f64 = 1e-7;

/// A part of one in per cent, with two digits.
pub fn percent(part: f64) -> String {
    if part.abs() < ROUNDING {
        return "0 %".to_owned();
    }
    format!("{} %", digits(part * 100.0, 2))
}

/// A number with the prefix of its unit: `500 kHz`.
pub fn with_prefix(value: f64, unit: &str) -> String {
    let (scale, prefix) = prefix(value);
    format!("{} {prefix}{unit}", digits(value / scale, 3))
}

/// The SI prefix under which `value` is between 1 and 1000, and its factor.
pub fn prefix(value: f64) -> (f64, &'static str) {
    const PREFIXES: [(f64, &str); 7] = [
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ];
    // Rounding to three digits must not show 1000 of something.
    PREFIXES
        .into_iter()
        .find(|(scale, _)| value.abs() >= scale * 0.9995)
        .unwrap_or((1.0, ""))
}

/// How far a plan can be from the best, in words.
pub fn certificate(gap: f64) -> String {
    match gap < ROUNDING {
        true => "certified: the best possible".to_owned(),
        false => format!("certified: at most {} from the best possible", percent(gap)),
    }
}

/// `1.5 MB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Columns as wide as their longest entry: the first to the left, as those whose heads are in `left`, and numbers to the right.
pub fn table(head: &[&str], rows: &[Vec<String>], left: &[&str]) -> String {
    let head: Vec<String> = head.iter().map(|&name| name.to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (column, entry) in line.iter().enumerate() {
            let width = widths[column];
            row += &match column {
                0 => format!("{entry:<width$}"),
                _ if left.contains(&head[column].as_str()) => format!("  {entry:<width$}"),
                _ => format!("  {entry:>width$}"),
            };
        }
        text += row.trim_end();
        text.push('\n');
    }
    text
}

/// A path as one word of a shell.
pub fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |letter: char| letter.is_alphanumeric() || "/._-+:@%".contains(letter);
    match text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_take_the_unit_that_fits() {
        for (seconds, text) in [
            (0.00034, "340 µs"),
            (0.0125, "12.5 ms"),
            (1.2549, "1.25 s"),
            (119.94, "120 s"),
            (179.6, "3 min 0 s"),
            (29_519.0, "8 h 12 min"),
            (7_199.0, "119 min 59 s"),
            (200_000.0, "2 d 8 h"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn numbers_keep_their_digits() {
        assert_eq!(digits(0.0, 3), "0");
        assert_eq!(digits(1234.5, 3), "1234");
        assert_eq!(digits(0.012345, 3), "0.0123");
        assert_eq!(plain(0.30000000000000004), "0.3");
        assert_eq!(plain(20.0), "20");
        assert_eq!(plain(0.0), "0");
        assert_eq!(percent(0.00312), "0.31 %");
        assert_eq!(percent(1e-12), "0 %");
        assert_eq!(with_prefix(500e3, "Hz"), "500 kHz");
        assert_eq!(with_prefix(999_999.0, "Hz"), "1.00 MHz");
        assert_eq!(certificate(0.0), "certified: the best possible");
        assert_eq!(certificate(0.003), "certified: at most 0.30 % from the best possible");
    }

    #[test]
    fn byte_counts_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1500), "1.5 kB");
        assert_eq!(bytes(123_456_789), "123 MB");
        assert_eq!(bytes(2_000_000_000), "2.0 GB");
    }
}
