//! `path`: what carries packets between a client and a server, side by side: plain routing, other load balancers and
//! Drover, in turn on the same machine.
//!
//! ```text
//! args      the command line
//! worker    clients and servers, each a process of its own: the same program with other arguments
//! place     a lab with links as they are to be, and addresses and settings for many connections
//! systems   what is measured: how it is set up, and what it can carry
//! measure   one system, one metric
//! rounds    all systems in turn, several times
//! summary   what is shown at the end, and the picture
//! ```

mod args;
mod measure;
mod place;
mod rounds;
mod summary;
mod systems;
mod worker;

use std::process::ExitCode;

use anyhow::Context;
use bench::interrupt::Interrupt;
use bench::program::ended;
use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.command {
        Some(Command::Worker(work)) => worker::run(work),
        None => run(&args),
    };
    ended("path", done)
}

/// Measures and reports. A goal that is missed is a finding, not a failure.
fn run(args: &Args) -> anyhow::Result<()> {
    let interrupt = Interrupt::watch().context("cannot watch for Ctrl-C")?;
    let report = rounds::run(args, &interrupt)?;
    print!("{}", summary::text(&report));
    args.output.write(&report, || summary::plot(&report))
}
