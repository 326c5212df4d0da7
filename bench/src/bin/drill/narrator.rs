//! What is shown while a drill runs: a line per step, and on a terminal a line that moves.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::bail;
use bench::driver::Running;
use bench::report::{Outcome, Phase};
use bench::table::number;
use indicatif::{ProgressBar, ProgressStyle};

use bench::interrupt::{Interrupt, NOTICED_WITHIN};

/// Tells what happens.
pub struct Narrator {
    bar: ProgressBar,
}

impl Narrator {
    /// Begins with nothing to tell.
    pub fn new() -> Self {
        // On something that is not a terminal the bar hides itself.
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("  {spinner} {msg}  ({elapsed})");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar }
    }

    /// Says what is under way, until the next message.
    pub fn doing(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Notes a step that is done.
    pub fn step(&self, what: &str, detail: &str) {
        self.line(&format!("{what:<10} {detail}"));
    }

    /// Notes the end of a phase of a migration.
    pub fn phase(&self, phase: &Phase) {
        if let Some(end_ms) = phase.end_ms {
            let (at, length) = (number(phase.start_ms), number(end_ms - phase.start_ms));
            self.line(&format!("    at {at:>6} ms  {:<9} {length:>6} ms", phase.name));
        }
    }

    /// Notes the end of a migration.
    pub fn outcome(&self, migration: &bench::report::Migration) {
        let report = &migration.coordinated;
        let text = match report.outcome {
            Outcome::Committed => format!(
                "committed: frozen {} ms, flip {} us, {} packets held, {} dropped",
                number(report.freeze_ms),
                number(report.flip_us),
                report.held_packets,
                report.dropped_packets,
            ),
            Outcome::RolledBack => format!("rolled back to {}: {}", migration.from, reason(report)),
            _ => format!("in doubt: {}", reason(report)),
        };
        self.line(&format!("    {text}"));
    }

    /// Waits for this long with the clients' counts on the moving line.
    pub fn watch(&self, clients: &Running, duration: Duration, interrupt: &Interrupt) -> anyhow::Result<()> {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            if clients.has_failed() {
                bail!("the clients stopped by themselves");
            }
            let progress = clients.progress();
            let (due, answered) =
                (progress.due.load(Ordering::Relaxed), progress.answered.load(Ordering::Relaxed));
            self.bar.set_message(format!("{due} messages sent, {} unanswered", due - answered.min(due)));
            interrupt.sleep(NOTICED_WITHIN.min(end.saturating_duration_since(Instant::now())))?;
        }
        Ok(())
    }

    /// Removes the moving line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| println!("{text}"));
    }
}

fn reason(report: &bench::report::Coordinated) -> &str {
    report.reason.as_deref().unwrap_or("no reason given")
}

impl Drop for Narrator {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
