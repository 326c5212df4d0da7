//! The one door: `cargo xtask setup | demo | test | fuzz | bench`.
//!
//! `setup` knows what the work needs and where it comes from; the others call it when something is missing. What demo and
//! bench do is in the package `bench`; here they are only built and started.

mod bench;
mod cache;
mod demo;
mod fuzz;
mod setup;
mod shell;
mod test;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "xtask",
    bin_name = "cargo xtask",
    about = "Drover's one door",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Looks for what the work needs and installs what is missing (Debian; elsewhere it says what to install)
    Setup {
        /// Also what `bench path` and `bench migrate` measure beside Drover
        #[arg(long)]
        bench: bool,
    },
    /// The main job in a lab: live servers move between two sites under live clients
    #[command(disable_help_flag = true)]
    Demo {
        /// Given to the drill; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<OsString>,
    },
    /// Everything that must hold: format, lints, licences, unit, model, packet and lab tests
    Test {
        /// Without the lab tests, and so without root
        #[arg(long)]
        quick: bool,
    },
    /// Looks for packets and texts that do harm, for a bounded time
    Fuzz {
        /// What to fuzz
        target: fuzz::Target,
        #[command(flatten)]
        limits: fuzz::Limits,
    },
    /// Measures
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: bench::Bench,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Setup { bench } => {
            let more = if bench { setup::run(setup::Scope::Bench, setup::Show::Changes) } else { Ok(()) };
            more.and_then(|()| setup::run(setup::Scope::Everything, setup::Show::Everything))
        }
        Task::Demo { flags } => demo::run(&flags),
        Task::Test { quick } => test::run(quick),
        Task::Fuzz { target, limits } => fuzz::run(target, &limits),
        Task::Bench { what } => bench::run(&what),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
