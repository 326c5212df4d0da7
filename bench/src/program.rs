//! What the measuring programs have in common: where their figures go, and how they end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::interrupt::Interrupted;

/// Where the figures go, beside the table.
#[derive(Debug, clap::Args)]
pub struct Output {
    /// Writes the figures here, as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// Draws the figures here.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

impl Output {
    /// Writes what is wanted, and says where it is.
    pub fn write(&self, report: &impl Serialize, plot: impl FnOnce() -> String) -> anyhow::Result<()> {
        if let Some(path) = &self.report {
            write_report(path, report)?;
        }
        if let Some(path) = &self.plot {
            write(path, &plot())?;
            println!("plot written to {}", path.display());
        }
        Ok(())
    }
}

/// Writes figures as JSON, and says where they are.
pub fn write_report(path: &Path, report: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report).context("cannot write the report as JSON")?;
    write(path, &(text + "\n"))?;
    println!("\nreport written to {}", path.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The exit code of a program of that name, after its last words.
pub fn ended(program: &str, done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("interrupted; everything that was started is stopped");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
