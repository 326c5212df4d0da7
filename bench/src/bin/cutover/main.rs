//! `cutover`: what a flip and a replay take while the tables hold many flows. See `bench::cutover`.

use std::process::ExitCode;

use anyhow::Result;
use bench::cutover::run::{Settings, run};
use bench::plot;
use bench::program::{Output, ended};
use clap::Parser;
use indicatif::ProgressBar;

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask bench cutover",
    about = "What a flip and a replay take while the tables hold many flows",
    after_help = "Needs root. Figures are worth something only while nothing else runs."
)]
struct Args {
    #[command(flatten)]
    output: Output,
    /// Few flows and flips: shows that it works, its figures are worth nothing
    #[arg(long)]
    quick: bool,
    /// Flows in the tables, a case each; powers of two
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = power_of_two)]
    flows: Option<Vec<u32>>,
    /// Flips of each case
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    flips: Option<u32>,
    /// Replays of each case; the median counts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    replays: Option<u32>,
}

impl Args {
    fn settings(&self) -> Settings {
        let mut settings = if self.quick { Settings::quick() } else { Settings::full() };
        if let Some(flows) = &self.flows {
            settings.flows.clone_from(flows);
        }
        settings.flips = self.flips.unwrap_or(settings.flips);
        settings.replays = self.replays.unwrap_or(settings.replays);
        settings
    }
}

fn power_of_two(text: &str) -> Result<u32, String> {
    let flows = text.parse::<u32>().map_err(|error| error.to_string())?;
    if flows.is_power_of_two() { Ok(flows) } else { Err(format!("{flows} is not a power of two")) }
}

fn main() -> ExitCode {
    ended("cutover", measure(&Args::parse()))
}

fn measure(args: &Args) -> Result<()> {
    let settings = args.settings();
    // On something that is not a terminal the bar hides itself.
    let bar = ProgressBar::new_spinner();
    let report = run(&settings, |doing| {
        bar.set_message(doing);
        bar.tick();
    });
    bar.finish_and_clear();
    let report = report?;
    print!("{}", report.table());
    args.output.write(&report, || plot::svg(&report.charts()))
}
