//! The configuration is read again, and what differs is applied: SIGHUP, `POST /v1/reload`, `lb reload`.
//!
//! All or nothing: a file with a mistake, or with a change that takes a restart, changes nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Current, LoadError};
use crate::control::{Changes, Control, ControlError};
use crate::migrations::Migrations;

/// Why the configuration stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The file.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// A change that takes a restart.
    #[error(
        "{} cannot change while the load balancer runs: restart it (packets keep flowing meanwhile), or take the \
         change back", .0.join(", ")
    )]
    Fixed(Vec<&'static str>),
    /// The gates or the data path.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The daemon was not started from a file.
    #[error("this load balancer has no configuration file to read again")]
    NoFile,
}

/// What a reload has done, or would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// Whether it was done; false where only a check was asked for.
    pub applied: bool,
    /// Services, backends and sites that differ.
    #[serde(flatten)]
    pub changes: Changes,
    /// Other sections that differ: `hold`, `flows`, `checks`, `agents`, `tls`.
    pub sections: Vec<String>,
    /// What is allowed and yet worth a word.
    pub warnings: Vec<String>,
    /// How long reading and checking the file took, in milliseconds.
    pub read_ms: f64,
    /// How long applying it took, in milliseconds; 0 where it was only checked.
    pub apply_ms: f64,
}

/// Reads the configuration again.
pub struct Reloader {
    file: Option<PathBuf>,
    current: Current,
    control: Arc<Control>,
    migrations: Arc<Migrations>,
    /// One at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Reloader {
    /// For a daemon that was started from a file.
    pub fn new(
        file: Option<PathBuf>,
        current: Current,
        control: Arc<Control>,
        migrations: Arc<Migrations>,
    ) -> Self {
        Self { file, current, control, migrations, turn: tokio::sync::Mutex::default() }
    }

    /// Reads the file again and applies what differs; with `check`, only says what it would do.
    pub async fn reload(self: &Arc<Self>, check: bool) -> Result<ReloadReport, ReloadError> {
        let _turn = self.turn.lock().await;
        let this = self.clone();
        // Reading, netlink and the tables: all of it waits.
        let work = tokio::task::spawn_blocking(move || this.reload_now(check));
        match work.await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    fn reload_now(&self, check: bool) -> Result<ReloadReport, ReloadError> {
        let file = self.file.as_ref().ok_or(ReloadError::NoFile)?;
        let start = Instant::now();
        let new = Config::load(file)?;
        let read_ms = start.elapsed().as_secs_f64() * 1e3;
        let old = self.current.get();
        let fixed = fixed(&old, &new);
        if !fixed.is_empty() {
            return Err(ReloadError::Fixed(fixed));
        }
        let changes = Changes::between(&old.plan, &new.plan);
        let sections = sections(&old, &new);
        let warnings = new.warnings.iter().cloned().chain(new.tls_warning()).collect();
        let start = Instant::now();
        if !check {
            if !changes.is_empty() || old.hold != new.hold {
                self.control.replan(&new.plan, new.hold, |backend| self.migrations.is_under_way(backend))?;
            }
            self.control.datapath().set_flow_times(new.flows);
            self.current.replace(Arc::new(new));
        }
        let apply_ms = if check { 0.0 } else { start.elapsed().as_secs_f64() * 1e3 };
        Ok(ReloadReport { applied: !check, changes, sections, warnings, read_ms, apply_ms })
    }
}

/// What differs and cannot be applied.
fn fixed(old: &Config, new: &Config) -> Vec<&'static str> {
    let (was, is) = (&old.datapath, &new.datapath);
    let differs = [
        ("admin.listen", old.admin != new.admin),
        ("datapath.interfaces", was.interfaces != is.interfaces),
        ("datapath.pin_path", was.pin_path != is.pin_path),
        ("datapath.hook", was.hook != is.hook),
        ("datapath.nat_source4", was.nat_source4 != is.nat_source4),
        ("datapath.nat_source6", was.nat_source6 != is.nat_source6),
        ("migrations.journal", old.migrations != new.migrations),
        ("limits", was.limits != is.limits),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what).collect()
}

/// Sections besides the plan that differ.
fn sections(old: &Config, new: &Config) -> Vec<String> {
    let differs = [
        ("hold", old.hold != new.hold),
        ("flows", old.flows != new.flows),
        ("checks", old.checks != new.checks),
        ("agents", old.agents != new.agents),
        ("tls", old.tls != new.tls),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what.to_owned()).collect()
}
