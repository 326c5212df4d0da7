//! `cargo xtask demo`: builds the programs for speed and runs the drill.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{setup, shell};

/// Runs the drill with `flags`; on success it does not return, the drill takes this process's place.
pub fn run(flags: &[OsString]) -> Result<()> {
    setup::run(setup::Scope::Demo, setup::Show::Changes)?;
    shell::run(shell::cargo().args([
        "build",
        "--quiet",
        "--release",
        "--bins",
        "-p",
        "lb",
        "-p",
        "migrate",
        "-p",
        "bench",
    ]))?;
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    // This program is TARGET/debug/xtask.
    let target = own.ancestors().nth(2).context("this program is not in a target folder")?;
    let drill = target.join("release/drill");
    let error = Command::new(&drill).args(flags).exec();
    Err(error).with_context(|| format!("cannot start {}", drill.display()))
}
