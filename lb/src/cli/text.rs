//! How things are written for a person: tables, sizes, errors with what is behind them.

/// An error and its sources, each said once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text += &format!(": {said}");
        }
        source = error.source();
    }
    text
}

/// Rows under their headings, each column as wide as its widest cell; numbers to the right.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..headings.len())
        .map(|i| rows.iter().map(|row| row[i].chars().count()).chain([headings[i].len()]).max().unwrap_or(0))
        .collect();
    let is_number =
        |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-') && !cell.contains(':');
    let numbers: Vec<bool> =
        (0..headings.len()).map(|i| !rows.is_empty() && rows.iter().all(|row| is_number(&row[i]))).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().enumerate().map(|(i, cell)| {
            let width = widths[i];
            if numbers[i] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let headings: Vec<String> = headings.iter().map(|heading| (*heading).to_owned()).collect();
    line(&headings) + &rows.iter().map(|row| line(row)).collect::<String>()
}

/// Bytes with a unit that keeps the number short.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A rate with a unit that keeps the number short: 0, 9.5, 950, 9.50k, 95.0M.
pub(super) fn rate(per_second: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut value = per_second;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match (unit, value) {
        (0, value) if value >= 10.0 || value == 0.0 => 0,
        (0, _) => 1,
        (_, value) if value >= 100.0 => 0,
        (_, value) if value >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}{}", UNITS[unit])
}

/// A time with the unit that an operator thinks of it in.
pub(super) fn milliseconds(time: u64) -> String {
    match time {
        0..10_000 => format!("{:.1} s", time as f64 / 1e3),
        10_000..120_000 => format!("{} s", time / 1000),
        120_000..7_200_000 => format!("{} min", time / 60_000),
        _ => format!("{} h", time / 3_600_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [vec!["chat-1".into(), "7".into()], vec!["b".into(), "1234".into()]];
        assert_eq!(table(&["BACKEND", "N"], &rows), "BACKEND     N\nchat-1      7\nb        1234\n");
        assert_eq!(table(&["A", "B"], &[]), "A  B\n");
    }

    #[test]
    fn sizes_are_short() {
        for (size, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB")]
        {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn rates_and_times_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.25, "0.2"),
            (9.5, "9.5"),
            (950.4, "950"),
            (9_500.0, "9.50k"),
            (95_000_000.0, "95.0M"),
            (123_400_000_000.0, "123G"),
        ] {
            assert_eq!(rate(value), text);
        }
        for (value, text) in
            [(0, "0.0 s"), (9_940, "9.9 s"), (59_999, "59 s"), (300_000, "5 min"), (7_200_000, "2 h")]
        {
            assert_eq!(milliseconds(value), text);
        }
    }
}
