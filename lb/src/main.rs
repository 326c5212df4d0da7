//! `lb`: the load balancer's daemon and the commands that talk to it.

use std::process::ExitCode;

use clap::Parser as _;
use lb::cli::Cli;

fn main() -> ExitCode {
    lb::cli::main(Cli::parse())
}
