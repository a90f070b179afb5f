//! What users type on the command line: sizes, times, lists of CPUs.

use std::time::Duration;

/// Bytes: a number with an optional `K`, `M`, `G` (or `KiB`, `MiB`, `GiB`), powers of 1,024.
///
/// # Errors
/// What is wrong with it, and what would be right.
pub fn size(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit
        .to_ascii_lowercase()
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => {
            return Err(format!(
                "unknown unit `{unit}`: write for example 256M or 4G"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "write a number with a unit, for example 256M or 4G".to_owned())?;
    number
        .checked_shl(shift)
        .filter(|n| n >> shift == number)
        .ok_or_else(|| "too large".to_owned())
}

/// A time: a number with `ms`, `s`, `m` or `h`.
///
/// # Errors
/// What is wrong with it, and what would be right.
pub fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => {
            return Err(format!(
                "unknown unit `{unit}`: write for example 500ms, 5s or 1m"
            ));
        }
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "write a number with a unit, for example 5s".to_owned())?;
    let seconds = number * unit;
    if !(0.001..=86_400.0).contains(&seconds) {
        return Err("must be between 1ms and 24h".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Bytes for people.
#[must_use]
pub fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// Nanoseconds for people.
#[must_use]
pub fn nanos(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} ns"),
        10_000..10_000_000 => format!("{:.1} us", n as f64 / 1e3),
        _ => format!("{:.1} ms", n as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("4GiB"), Ok(4 << 30));
        assert_eq!(size("123"), Ok(123));
        assert_eq!(size("1kb"), Ok(1024));
        for bad in [
            "",
            "M",
            "1.5G",
            "-1",
            "5T",
            "99999999999999999999",
            "18446744073709551615G",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["", "s", "5 s", "1d", "0s", "1e9s", "48h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
