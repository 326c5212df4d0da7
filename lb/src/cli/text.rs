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
}
