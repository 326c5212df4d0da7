//! `drill`: a live server moves between two sites under the eyes of its clients.
//!
//! ```text
//! args        the command line
//! migrating   the drill in a lab: start everything, migrate there and back, verify
//! direct      clients straight at a server on loopback: what the driver itself costs
//! admin       the load balancer's admin API, as far as a drill needs it
//! narrator    what is shown while a drill runs
//! summary     what is shown at its end
//! ```

mod admin;
mod args;
mod direct;
mod migrating;
mod narrator;
mod summary;

use std::process::ExitCode;

use anyhow::Context;
use bench::report::{DrillReport, Outcome};
use clap::Parser;

use args::Args;
use bench::interrupt::Interrupt;
use bench::program::{ended, write_report};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(false) => ExitCode::FAILURE,
        done => ended("drill", done.map(|_| ())),
    }
}

/// Whether all went well.
fn run(args: &Args) -> anyhow::Result<bool> {
    let interrupt = Interrupt::watch().context("cannot watch for Ctrl-C")?;
    let report = if args.direct { direct::run(args, &interrupt)? } else { migrating::run(args, &interrupt)? };
    if let Some(path) = &args.report {
        write_report(path, &report)?;
    }
    let well = is_good(args, &report);
    println!("\n{}", summary::verdict(&report, well));
    Ok(well)
}

/// Every migration that was asked for has committed, and no client noticed more than a pause.
fn is_good(args: &Args, report: &DrillReport) -> bool {
    let committed = report
        .migrations
        .iter()
        .filter(|migration| migration.coordinated.outcome == Outcome::Committed)
        .count();
    let asked = if args.direct { 0 } else { args.migrations as usize };
    report.is_clean() && committed == asked && report.migrations.len() == asked
}
