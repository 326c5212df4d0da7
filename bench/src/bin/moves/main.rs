//! `moves`: a server with memory and connections moves between two sites, by Drover and by others, side by side.
//!
//! ```text
//! args      the command line
//! systems   who moves the server: how its place is set up, and one move
//! measure   one system in one case: clients, moves, what came of them
//! rounds    all cases, the systems in turn
//! summary   what is shown at the end
//! ```

mod args;
mod measure;
mod rounds;
mod summary;
mod systems;

use std::process::ExitCode;

use anyhow::Context;
use bench::interrupt::Interrupt;
use bench::moves::server;
use bench::plot;
use bench::program::ended;
use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.command {
        Some(Command::Serve { listen, resident_mb, dirty_pct }) => {
            server::serve(listen, resident_mb, dirty_pct).map_err(anyhow::Error::from)
        }
        None => run(&args),
    };
    ended("moves", done)
}

/// Measures and reports. A goal that is missed is a finding, not a failure; so is a move that failed.
fn run(args: &Args) -> anyhow::Result<()> {
    let interrupt = Interrupt::watch().context("cannot watch for Ctrl-C")?;
    let report = rounds::run(args, &interrupt)?;
    print!("{}", summary::text(&report));
    args.output.write(&report, || plot::svg(&report.charts()))
}
