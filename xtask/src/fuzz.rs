//! `cargo xtask fuzz`: looks for packets and texts that do harm, for a bounded time.
//!
//! `differential` runs the test of that name (kernel programs against the core on the host) longer than tests may take,
//! on each CPU. The others are targets of the package `fuzz`, run by cargo-fuzz, whose corpora and findings are kept in
//! that folder. libFuzzer's instrumentation is not stable in rustc, so the compiler is told that it is trusted with it.

use std::process::{Child, Command};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::{setup, shell};

/// Between the seeds of processes, so that their rounds are never the same.
const SEED_STRIDE: u64 = 1 << 32;
/// Much, since flows that the core on the host makes are never freed.
const MEMORY_MB: u32 = 8192;

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The kernel programs against the same code on the host (needs root)
    Differential,
    /// Arbitrary packets through the core
    Packets,
    /// Arbitrary texts through the configuration's reader
    Config,
    /// Packets into tunnels and out of them
    Tunnel,
}

/// For how long, and from where.
#[derive(Args)]
pub struct Limits {
    /// Stop after so many minutes
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Stop after so many cases; of `differential`, ten million unless told otherwise
    #[arg(long)]
    cases: Option<u64>,
    /// Where to begin: a failure names its own
    #[arg(long)]
    seed: Option<u64>,
}

/// Fuzzes a target.
pub fn run(target: Target, limits: &Limits) -> Result<()> {
    match target {
        Target::Differential => differential(limits),
        Target::Packets => cargo_fuzz("packets", &[], limits),
        Target::Tunnel => cargo_fuzz("tunnel", &[], limits),
        Target::Config => cargo_fuzz("config", &["--features", "config"], limits),
    }
}

fn differential(limits: &Limits) -> Result<()> {
    const CASES: u64 = 10_000_000;
    const WORTH_A_PROCESS: u64 = 1_000_000;
    ensure!(shell::is_root(), "loading eBPF programs needs root: run this as root");
    setup::run(setup::Scope::Fuzz, setup::Show::Changes)?;
    let test = ["test", "--quiet", "--release", "-p", "lb", "--test", "differential"];
    shell::run(shell::cargo().args(test).arg("--no-run"))?;
    let cases = limits.cases.unwrap_or(CASES);
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let processes = processors.min(cases.div_ceil(WORTH_A_PROCESS)).max(1);
    let seed = limits.seed.unwrap_or(1);
    shell::say(&format!(
        "{cases} cases from seed {seed}, {processes} processes, at most {} minutes",
        limits.minutes
    ));
    let started = (0..processes)
        .map(|process| {
            let mut cargo = shell::cargo();
            cargo.args(test).args(["--", "--nocapture"]);
            for (name, value) in [
                ("SEED", seed.wrapping_add(process * SEED_STRIDE)),
                ("CASES", cases.div_ceil(processes)),
                ("SECONDS", limits.minutes * 60),
                ("CPU", process),
            ] {
                cargo.env(format!("DROVER_DIFFERENTIAL_{name}"), value.to_string());
            }
            cargo.spawn().context("cannot start cargo")
        })
        .collect::<Vec<Result<Child>>>();
    let mut failed = 0;
    for process in started {
        // Each is waited for, whatever became of the others.
        let succeeded = process.and_then(|mut child| Ok(child.wait()?.success())).unwrap_or(false);
        failed += u32::from(!succeeded);
    }
    if failed > 0 {
        bail!("kernel and host differ, or a process failed: see above");
    }
    Ok(())
}

fn cargo_fuzz(target: &str, features: &[&str], limits: &Limits) -> Result<()> {
    setup::run(setup::Scope::Fuzz, setup::Show::Changes)?;
    let mut cargo: Command = shell::cargo();
    cargo.args(["fuzz", "run", "--fuzz-dir", "fuzz"]).args(features).arg(target).arg("--");
    cargo.arg(format!("-max_total_time={}", limits.minutes * 60));
    cargo.args(["-detect_leaks=0", "-max_len=8192", "-print_final_stats=1"]);
    cargo.arg(format!("-rss_limit_mb={MEMORY_MB}"));
    if let Some(cases) = limits.cases {
        cargo.arg(format!("-runs={cases}"));
    }
    if let Some(seed) = limits.seed {
        cargo.arg(format!("-seed={seed}"));
    }
    // Flows that the core on the host makes are never freed, on purpose.
    shell::run(cargo.env("RUSTC_BOOTSTRAP", "1").env("ASAN_OPTIONS", "detect_leaks=0"))
}
