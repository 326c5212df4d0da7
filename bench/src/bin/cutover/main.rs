//! `cutover`: what a flip and a replay take while the tables hold many flows. See `bench::cutover`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::cutover::run::{Settings, run};
use clap::Parser;
use indicatif::ProgressBar;

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask bench cutover",
    about = "What a flip and a replay take while the tables hold many flows",
    after_help = "Needs root. Figures are worth something only while nothing else runs."
)]
struct Args {
    /// Writes the figures as JSON
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Few flows and flips: shows that it works, its figures are worth nothing
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    match measure(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cutover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Result<()> {
    let settings = if args.quick { Settings::quick() } else { Settings::full() };
    // On something that is not a terminal the bar hides itself.
    let bar = ProgressBar::new_spinner();
    let report = run(&settings, |doing| {
        bar.set_message(doing);
        bar.tick();
    });
    bar.finish_and_clear();
    let report = report?;
    print!("{}", report.table());
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        println!("\nreport written to {}", path.display());
    }
    Ok(())
}
