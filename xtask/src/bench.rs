//! `cargo xtask bench`: a place kept for the benchmarks.

use std::ffi::OsString;

use anyhow::{Result, bail};

/// Says that there is nothing to run yet.
pub fn run(_flags: &[OsString]) -> Result<()> {
    bail!(
        "there are no benchmarks yet; `cargo xtask demo --report FILE.json` measures a migration from the clients' side"
    )
}
