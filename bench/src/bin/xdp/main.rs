//! `xdp`: nanoseconds that the XDP program spends on a packet. See `bench::xdp`.

use std::process::ExitCode;

use anyhow::Result;
use bench::plot;
use bench::program::{Output, ended};
use bench::xdp::case::Mode;
use bench::xdp::run::{Progress, Settings, run};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask bench xdp",
    about = "Nanoseconds that the XDP program spends on a packet, through BPF_PROG_TEST_RUN",
    after_help = "Needs root. Figures are worth something only while nothing else runs."
)]
struct Args {
    #[command(flatten)]
    output: Output,
    /// Few flows and rounds: shows that it works, its figures are worth nothing
    #[arg(long)]
    quick: bool,
    /// Samples of each case
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Only these modes; more than once for several
    #[arg(long = "mode", value_name = "MODE", value_enum)]
    modes: Vec<Mode>,
}

fn main() -> ExitCode {
    ended("xdp", measure(&Args::parse()))
}

fn measure(args: &Args) -> Result<()> {
    // Before any thread starts: those that run already would not follow.
    bench::xdp::private_bpffs()?;
    let mut settings = if args.quick { Settings::QUICK } else { Settings::FULL };
    settings.rounds = args.rounds.unwrap_or(settings.rounds);
    // On something that is not a terminal the bar hides itself.
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("  {bar:24} {pos}/{len}  {msg}  ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut told = 0;
    let modes = if args.modes.is_empty() { &Mode::ALL } else { args.modes.as_slice() };
    let report = run(settings, modes, |Progress { doing, done, groups }| {
        if bar.is_hidden() && done != told {
            eprintln!("  {done} of {groups} groups measured after {} s", bar.elapsed().as_secs());
            told = done;
        }
        bar.set_length(groups);
        bar.set_position(done);
        bar.set_message(doing);
    });
    bar.finish_and_clear();
    let report = report?;
    print!("{}", report.table());
    args.output.write(&report, || plot::svg(&report.charts()))
}
