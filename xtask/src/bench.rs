//! `cargo xtask bench`: builds a benchmark for speed and runs it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::{setup, shell};

/// What can be measured. Each is a program of the package `bench`.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What carries packets between client and server: routing, nftables, haproxy, nginx and Drover side by side
    #[command(disable_help_flag = true)]
    Path(Flags),
    /// Nanoseconds that the XDP program spends on a packet
    #[command(disable_help_flag = true)]
    Xdp(Flags),
    /// What a flip and a replay take while the tables hold many flows
    #[command(disable_help_flag = true)]
    Cutover(Flags),
    /// What clients feel while a server moves: by Drover, by a script around CRIU, by runc
    #[command(disable_help_flag = true)]
    Migrate(Flags),
    /// What large configurations cost: the first install, a change of one backend, memory
    #[command(disable_help_flag = true)]
    Scale(Flags),
}

/// What the benchmark itself is given.
#[derive(Debug, Args)]
pub struct Flags {
    /// Given to the benchmark; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<OsString>,
}

impl Bench {
    fn program(&self) -> &'static str {
        match self {
            Self::Path(_) => "path",
            Self::Xdp(_) => "xdp",
            Self::Cutover(_) => "cutover",
            // The agent's program has the other name.
            Self::Migrate(_) => "moves",
            Self::Scale(_) => "scale",
        }
    }

    fn flags(&self) -> &[OsString] {
        match self {
            Self::Path(it) | Self::Xdp(it) | Self::Cutover(it) | Self::Migrate(it) | Self::Scale(it) => {
                &it.flags
            }
        }
    }

    /// What cargo has to build for it.
    fn packages(&self) -> &'static [&'static str] {
        match self {
            Self::Path(_) => &[
                "-p", "bench", "--bin", "path", "-p", "lb", "--bin", "lb", "-p", "migrate", "--bin",
                "migrate",
            ],
            Self::Migrate(_) => &[
                "-p", "bench", "--bin", "moves", "-p", "lb", "--bin", "lb", "-p", "migrate", "--bin",
                "migrate",
            ],
            Self::Xdp(_) => &["-p", "bench", "--bin", "xdp"],
            Self::Cutover(_) => &["-p", "bench", "--bin", "cutover"],
            Self::Scale(_) => &["-p", "bench", "--bin", "scale"],
        }
    }

    fn scope(&self) -> setup::Scope {
        match self {
            Self::Path(_) => setup::Scope::Bench,
            Self::Migrate(_) => setup::Scope::Moves,
            Self::Xdp(_) | Self::Cutover(_) | Self::Scale(_) => setup::Scope::Demo,
        }
    }
}

/// Runs a benchmark; on success it does not return, the benchmark takes this process's place.
pub fn run(bench: &Bench) -> Result<()> {
    setup::run(bench.scope(), setup::Show::Changes)?;
    shell::run(shell::cargo().args(["build", "--quiet", "--release"]).args(bench.packages()))?;
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    // This program is TARGET/debug/xtask.
    let target = own.ancestors().nth(2).context("this program is not in a target folder")?;
    let program = target.join("release").join(bench.program());
    let error = Command::new(&program).args(bench.flags()).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
