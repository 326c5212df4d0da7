//! Plain tables for a terminal: aligned columns, no colors, no frames.

use std::fmt;

/// Rows of text; the first column is aligned to the left, the others to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

/// Spaces between columns.
const GAP: usize = 2;

impl Table {
    /// Without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row; rows may have different lengths.
    pub fn row<T: fmt::Display>(&mut self, cells: impl IntoIterator<Item = T>) -> &mut Self {
        self.rows.push(cells.into_iter().map(|cell| cell.to_string()).collect());
        self
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::from("  ");
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                if column == 0 {
                    line += &format!("{cell:<width$}");
                } else {
                    line += &format!("{:GAP$}{cell:>width$}", "");
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A number for people: three digits that matter, and a zero that is really none.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A count of bytes for people.
pub fn bytes(value: u64) -> String {
    match value {
        0..1024 => format!("{value} B"),
        1024..1_048_576 => format!("{} KiB", number(value as f64 / 1024.0)),
        _ => format!("{} MiB", number(value as f64 / 1_048_576.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new();
        table.row(["", "p50", "max"]).row(["stall", "9.4", "11"]).row(["long name", "100"]).row(["note", ""]);
        assert_eq!(
            table.to_string(),
            "             p50  max\n  stall      9.4   11\n  long name  100\n  note\n"
        );
        assert_eq!(Table::new().to_string(), "");
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (value, text) in
            [(0.0, "0"), (0.0123, "0.012"), (0.5, "0.50"), (9.87, "9.87"), (21.04, "21.0"), (1234.5, "1234")]
        {
            assert_eq!(number(value), text);
        }
        for (value, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 << 20, "3.00 MiB")] {
            assert_eq!(bytes(value), text);
        }
    }
}
