//! `cargo xtask setup`: finds what the work needs, installs what is missing, and says so line by line.
//!
//! Each part looks first; only what is not found is installed, and only where that is possible (root, Debian's packages).
//! What was found where goes into the cache folder, where the builds and the programs read it.

mod criu;
mod debian;
mod ebpf;
mod kernel;
mod programs;
mod tools;

use anyhow::{Result, bail};

use crate::{cache, shell};

/// What is needed for which task.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What `setup` looks for.
    Everything,
    /// Build and checks, no labs.
    Checks,
    /// Build and labs, no checks.
    Demo,
    /// Build, labs, and what Drover is measured beside; nothing migrates.
    Bench,
    /// Build, labs with CRIU, and what migrations are measured beside.
    Moves,
    /// Build, and what the fuzzer needs.
    Fuzz,
}

/// Which lines are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// All.
    Everything,
    /// What was installed or is missing.
    Changes,
}

/// What became of one thing.
pub enum State {
    /// It was there.
    Found(String),
    /// It is there now.
    Installed(String),
    /// It is not there and need not be; the text says what would be better with it.
    Optional(String),
    /// It is not there; the text says what to do.
    Missing(String),
}

/// Looks for everything in `scope`, installs what is missing, fails if anything still is.
pub fn run(scope: Scope, show: Show) -> Result<()> {
    let _lock = cache::lock()?;
    let mut missing = 0;
    let mut report = |name: &str, state: State| {
        let (word, text) = match state {
            State::Found(_) | State::Optional(_) if show == Show::Changes => return,
            State::Found(text) => ("found", text),
            State::Installed(text) => ("installed", text),
            State::Optional(text) => ("optional", text),
            State::Missing(text) => {
                missing += 1;
                ("missing", text)
            }
        };
        shell::say(&format!("{word:<10} {name}: {text}"));
    };

    report("eBPF toolchain", ebpf::provide());
    if scope == Scope::Fuzz {
        tools::provide_fuzzer(&mut report);
    } else if scope != Scope::Checks {
        report("BPF file system", kernel::provide_bpffs());
        programs::provide(&mut report);
    }
    if scope == Scope::Bench {
        programs::provide_peers(&mut report);
    }
    if matches!(scope, Scope::Bench | Scope::Moves) {
        programs::provide_movers(&mut report);
    }
    if matches!(scope, Scope::Everything | Scope::Demo | Scope::Moves) {
        report("CRIU", criu::provide());
    }
    if matches!(scope, Scope::Everything | Scope::Checks) {
        tools::provide(&mut report);
    }
    match missing {
        0 => Ok(()),
        1 => bail!("one thing is missing; once it is there, run this again"),
        count => bail!("{count} things are missing; once they are there, run this again"),
    }
}

/// Says that something takes a while.
fn announce(what: &str) {
    shell::say(&format!("...        {what}"));
}

/// A failed attempt to install as a state, with the reason.
fn missing(error: &anyhow::Error) -> State {
    State::Missing(format!("{error:#}"))
}
