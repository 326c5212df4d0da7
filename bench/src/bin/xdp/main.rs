//! `xdp`: nanoseconds that the XDP program spends on a packet. See `bench::xdp`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::plot;
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
    /// Writes the figures as JSON
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Draws the figures
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
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
    match measure(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xdp: {error:#}");
            ExitCode::FAILURE
        }
    }
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
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
        write(path, text + "\n", "report")?;
    }
    if let Some(path) = &args.plot {
        write(path, plot::svg(&report.charts()), "plot")?;
    }
    Ok(())
}

fn write(path: &PathBuf, text: String, what: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{what} written to {}", path.display());
    Ok(())
}
