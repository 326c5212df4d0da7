//! `cargo xtask bench`: builds a benchmark for speed and runs it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{setup, shell};

/// What can be measured. Each is a program of the package `bench` under its name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Bench {
    /// What carries packets between client and server: routing, nftables, haproxy, nginx and Drover side by side
    Path,
    /// Nanoseconds that the XDP program spends on a packet
    Xdp,
    /// What a flip and a replay take while the tables hold many flows
    Cutover,
}

impl Bench {
    fn program(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::Xdp => "xdp",
            Self::Cutover => "cutover",
        }
    }

    /// What cargo has to build for it.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Path => &["-p", "bench", "--bin", "path", "-p", "lb", "--bin", "lb"],
            Self::Xdp => &["-p", "bench", "--bin", "xdp"],
            Self::Cutover => &["-p", "bench", "--bin", "cutover"],
        }
    }

    fn scope(self) -> setup::Scope {
        match self {
            Self::Path => setup::Scope::Bench,
            Self::Xdp | Self::Cutover => setup::Scope::Demo,
        }
    }
}

/// Runs a benchmark with `flags`; on success it does not return, the benchmark takes this process's place.
pub fn run(bench: Bench, flags: &[OsString]) -> Result<()> {
    setup::run(bench.scope(), setup::Show::Changes)?;
    shell::run(shell::cargo().args(["build", "--quiet", "--release"]).args(bench.packages()))?;
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    // This program is TARGET/debug/xtask.
    let target = own.ancestors().nth(2).context("this program is not in a target folder")?;
    let program = target.join("release").join(bench.program());
    let error = Command::new(&program).args(flags).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
