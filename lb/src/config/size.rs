//! Sizes as people write them: `64 MiB`, or an integer of bytes.

/// Bytes of `"64 MiB"`, `"512 KiB"`, `"2 GiB"`, `"1500 B"` or `"4096"`.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    const EXAMPLE: &str = "write for example \"64 MiB\", or an integer of bytes";
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size; {EXAMPLE}"))?;
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => return Err(format!("{other:?} is not one of B, KiB, MiB, GiB; {EXAMPLE}")),
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_with_units_are_bytes() {
        for (text, bytes) in
            [("64 MiB", 64 << 20), ("512KiB", 512 << 10), ("2 GiB", 2 << 30), (" 1500 B ", 1500), ("7", 7)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "MiB", "64 MB", "-1", "1.5 MiB", "99999999999 GiB", "64 MiB extra"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
