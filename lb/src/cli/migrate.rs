//! `lb migrate`: starts a migration and shows its phases as they come.

use std::io::{IsTerminal as _, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Method;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::migrations::what_to_do;
use super::text::{bytes, chain};
use super::{MigrateArgs, NOT_DONE, failed};
use crate::client::{AdminClient, ClientError};
use crate::control::Policy;
use crate::migrations::{MigrationState, MigrationView, PhaseView, ReportView};

/// Exit code of a migration whose outcome is not known.
const IN_DOUBT: u8 = 3;
/// How long a load balancer that went away in the middle is waited for: a restart and its recovery.
const LOST_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks for it.
const LOST_PAUSE: Duration = Duration::from_millis(300);

#[derive(Serialize)]
struct Request<'a> {
    backend: &'a str,
    to: &'a str,
    policy: Policy,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_ms: Option<u64>,
}

#[derive(Deserialize)]
struct Started {
    id: String,
}

pub(super) async fn command(args: MigrateArgs) -> ExitCode {
    let client = match AdminClient::new(&args.admin.admin) {
        Ok(client) => client,
        Err(error) => return failed(&error, NOT_DONE),
    };
    let mut screen = Screen::new();
    let id = match start(&client, &args).await {
        Ok(id) => id,
        Err(error) => return failed(&error, NOT_DONE),
    };
    let interrupted = tokio::signal::ctrl_c();
    tokio::select! {
        end = watch(&client, &id, &mut screen) => match end {
            Ok(view) => exit_code(view.state),
            Err(error) => {
                screen.line(&format!("outcome unknown: {}", chain(&error)));
                screen.line("see `lb migrations` once the load balancer is back");
                ExitCode::from(IN_DOUBT)
            }
        },
        _ = interrupted => {
            screen.line(&format!("the migration goes on; to abort it: lb migration {id} abort --admin {}", client.url()));
            ExitCode::from(IN_DOUBT)
        }
    }
}

pub(super) async fn start(client: &AdminClient, args: &MigrateArgs) -> Result<String, ClientError> {
    let policy = args.policy.into();
    let request = Request { backend: &args.backend, to: &args.to, policy, deadline_ms: args.deadline_ms };
    let started: Started = client.json(Method::POST, "/v1/migrations", Some(&request)).await?;
    Ok(started.id)
}

pub(super) fn exit_code(state: MigrationState) -> ExitCode {
    match state {
        MigrationState::Committed => ExitCode::SUCCESS,
        MigrationState::RolledBack => ExitCode::from(1),
        MigrationState::Running | MigrationState::InDoubt => ExitCode::from(IN_DOUBT),
    }
}

/// Shows a migration until it has ended.
pub(super) async fn watch(
    client: &AdminClient,
    id: &str,
    screen: &mut Screen,
) -> Result<MigrationView, ClientError> {
    let view = match follow(client, id, screen).await {
        Ok(Some(view)) => view,
        lost => {
            let why = match lost {
                Err(error) => chain(&error),
                Ok(_) => "the load balancer is stopping".to_owned(),
            };
            screen.line(&format!("{why}; waiting for it to come back"));
            wait_for_return(client, id).await?
        }
    };
    screen.end(&view);
    Ok(view)
}

/// Follows the events; `None` when they ended before the migration.
async fn follow(
    client: &AdminClient,
    id: &str,
    screen: &mut Screen,
) -> Result<Option<MigrationView>, ClientError> {
    let view: MigrationView = client.json(Method::GET, &path(id), None::<&()>).await?;
    screen.begin(&view);
    let mut events = client.events(&format!("{}/events", path(id))).await?;
    while let Some(event) = events.next().await? {
        // Events of a later version are none of ours.
        match event.name.as_str() {
            "phase" => {
                if let Ok(phase) = serde_json::from_str(&event.data) {
                    screen.phase(&phase);
                }
            }
            "doubt" => {
                let view: MigrationView = client.json(Method::GET, &path(id), None::<&()>).await?;
                return Ok(Some(view));
            }
            "finished" => return Ok(serde_json::from_str(&event.data).ok()),
            _ => {}
        }
    }
    Ok(None)
}

/// Looks for the migration until it has ended. A restarted load balancer finds it under its id again.
async fn wait_for_return(client: &AdminClient, id: &str) -> Result<MigrationView, ClientError> {
    let give_up = Instant::now() + LOST_PATIENCE;
    loop {
        tokio::time::sleep(LOST_PAUSE).await;
        match client.json::<MigrationView>(Method::GET, &path(id), None::<&()>).await {
            // Also one in doubt that goes on: an operator is wanted.
            Ok(view) if view.state != MigrationState::Running => return Ok(view),
            Err(error) if Instant::now() >= give_up => return Err(error),
            Ok(view) if Instant::now() >= give_up => return Ok(view),
            Ok(_) | Err(_) => {}
        }
    }
}

fn path(id: &str) -> String {
    format!("/v1/migrations/{id}")
}

/// Where the phases are shown: a spinner for the one under way on a terminal, a line for each that ended.
pub(super) struct Screen {
    spinner: Option<ProgressBar>,
    out: Box<dyn Write + Send>,
}

impl Screen {
    pub(super) fn new() -> Self {
        let spinner = std::io::stdout().is_terminal().then(|| {
            let style = ProgressStyle::with_template("  {spinner} {msg}").expect("the template is right");
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()).with_style(style)
        });
        Self { spinner, out: Box::new(std::io::stdout()) }
    }

    #[cfg(test)]
    pub(super) fn to(out: impl Write + Send + 'static) -> Self {
        Self { spinner: None, out: Box::new(out) }
    }

    pub(super) fn line(&mut self, line: &str) {
        match &self.spinner {
            Some(spinner) => spinner.println(line),
            // Nobody reads: the migration goes on all the same.
            None => drop(writeln!(self.out, "{line}").and_then(|()| self.out.flush())),
        }
    }

    fn begin(&mut self, view: &MigrationView) {
        self.line(&format!("{}: {} -> {} ({})", view.backend, view.from, view.to, view.id));
    }

    fn phase(&mut self, phase: &PhaseView) {
        match phase.end_ms {
            Some(end_ms) => {
                let line = format!("  {:<9} {:>9.2} ms", phase.name, end_ms - phase.start_ms);
                self.line(&line);
            }
            None => {
                if let Some(spinner) = &self.spinner {
                    spinner.set_message(phase.name.clone());
                    spinner.enable_steady_tick(Duration::from_millis(80));
                }
            }
        }
    }

    fn end(&mut self, view: &MigrationView) {
        let text = match &view.report {
            Some(report) => summary(view, report),
            None => match &view.doubt {
                Some(doubt) => format!("IN DOUBT: {doubt}\n{}", what_to_do(view)),
                None => "still under way; see `lb migrations`".to_owned(),
            },
        };
        for line in text.lines() {
            self.line(line);
        }
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}

/// What became of it.
fn summary(view: &MigrationView, report: &ReportView) -> String {
    let total_ms = report.phases.last().and_then(|phase| phase.end_ms).unwrap_or(0.0);
    let mut text = match view.state {
        MigrationState::Committed => {
            format!("committed in {total_ms:.1} ms: {} runs at {}", view.backend, view.to)
        }
        MigrationState::RolledBack => {
            format!("rolled back in {total_ms:.1} ms: {} runs at {} as before", view.backend, view.from)
        }
        MigrationState::InDoubt | MigrationState::Running => {
            format!(
                "IN DOUBT after {total_ms:.1} ms: look at {} at {} and {}",
                view.backend, view.from, view.to
            )
        }
    };
    if let Some(reason) = &report.reason {
        text += &format!("\n  reason: {reason}");
    }
    if report.freeze_ms > 0.0 {
        text += &format!(
            "\n  frozen for {:.1} ms, {} of images, {} sent",
            report.freeze_ms,
            bytes(report.image_bytes),
            bytes(report.sent_bytes)
        );
    }
    if report.exposed_ms > 0.0 {
        text += &format!("\n  for {:.1} ms it ran while memory was still to come", report.exposed_ms);
    }
    if report.held_packets + report.dropped_packets > 0 {
        text += &format!(
            "\n  {} packets held ({}), {} replayed, {} dropped",
            report.held_packets,
            bytes(report.held_bytes),
            report.replayed_packets,
            report.dropped_packets
        );
    }
    if view.state == MigrationState::Committed {
        text += &format!("\n  flip {:.0} us", report.flip_us);
        if let Some(first_replay_us) = report.first_replay_us {
            text += &format!(", first held packet sent after {first_replay_us:.0} us");
        }
    }
    text
}
