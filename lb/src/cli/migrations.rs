//! `lb migrations` and `lb migration`: what migrations there were and are, and an operator's word on one.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use migrate::coordinator::Verdict;
use serde::Serialize;

use super::text::table;
use super::{AdminArgs, ClientError};
use crate::client::AdminClient;
use crate::migrations::{MigrationState, MigrationView};

#[derive(Debug, Args)]
pub(super) struct MigrationsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print what the API answered, as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct MigrationArgs {
    /// The migration's id, as in `lb migrations`.
    id: String,
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Call it off; taken until it has flipped.
    Abort,
    /// Say how it ends, where it is in doubt and one of the sites will not answer again.
    ///
    /// committed: you have seen the server run at the target; the copy at the source has to be removed there.
    /// rolled-back: the source's copy is the one; clients get there again. Refused where the other copy may be serving.
    Resolve {
        /// Where the server runs that counts.
        #[arg(long, value_enum)]
        r#as: VerdictArg,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum VerdictArg {
    Committed,
    RolledBack,
}

impl From<VerdictArg> for Verdict {
    fn from(verdict: VerdictArg) -> Self {
        match verdict {
            VerdictArg::Committed => Self::Committed,
            VerdictArg::RolledBack => Self::RolledBack,
        }
    }
}

#[derive(Serialize)]
struct Resolve {
    r#as: Verdict,
}

/// Shows all that are remembered.
pub(super) async fn list(args: &MigrationsArgs) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let views: serde_json::Value = client.json(Method::GET, "/v1/migrations", None::<&()>).await?;
    let text = match serde_json::from_value::<Vec<MigrationView>>(views.clone()) {
        Ok(views) if !args.json => render(&views),
        _ => format!("{views:#}\n"),
    };
    print(&text);
    Ok(())
}

/// Shows one, after what is to be done with it.
pub(super) async fn one(args: &MigrationArgs) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let path = format!("/v1/migrations/{}", args.id);
    let view: MigrationView = match &args.action {
        None => client.json(Method::GET, &path, None::<&()>).await?,
        Some(Action::Abort) => client.json(Method::DELETE, &path, None::<&()>).await?,
        Some(Action::Resolve { r#as }) => {
            let body = Resolve { r#as: (*r#as).into() };
            client.json(Method::POST, &format!("{path}/resolve"), Some(&body)).await?
        }
    };
    print(&detail(&view));
    Ok(())
}

fn print(text: &str) {
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// A table, the oldest first.
pub(super) fn render(views: &[MigrationView]) -> String {
    if views.is_empty() {
        return "no migrations yet\n".to_owned();
    }
    let headings = ["MIGRATION", "BEGAN", "BACKEND", "FROM", "TO", "STATE", "FROZEN", "HELD", "REASON"];
    let rows: Vec<Vec<String>> = views.iter().map(row).collect();
    table(&headings, &rows)
}

fn row(view: &MigrationView) -> Vec<String> {
    let mut cells = cells(view);
    cells.insert(1, ago(view.started_at_unix_us));
    cells
}

/// A migration's line without its time.
pub(super) fn cells(view: &MigrationView) -> Vec<String> {
    let state = match (view.state, &view.report) {
        (MigrationState::Running, _) => {
            let phase = view.phases.last().map_or("", |phase| phase.name.as_str());
            format!("running: {phase}")
        }
        (MigrationState::Committed, _) => "committed".to_owned(),
        (MigrationState::RolledBack, _) => "rolled back".to_owned(),
        (MigrationState::InDoubt, Some(_)) => "IN DOUBT".to_owned(),
        (MigrationState::InDoubt, None) => "IN DOUBT, still trying".to_owned(),
    };
    let report = view.report.as_ref();
    let reason = report.and_then(|report| report.reason.clone()).or_else(|| view.doubt.clone());
    vec![
        view.id.clone(),
        view.backend.clone(),
        view.from.clone(),
        view.to.clone(),
        state,
        report.map_or_else(|| "-".to_owned(), |report| format!("{:.1} ms", report.freeze_ms)),
        report.map_or_else(|| "-".to_owned(), |report| report.held_packets.to_string()),
        reason.unwrap_or_default(),
    ]
}

/// One migration with its phases, and what an operator can do about it.
fn detail(view: &MigrationView) -> String {
    let mut text = render(std::slice::from_ref(view));
    if !view.phases.is_empty() {
        let rows = view.phases.iter().map(|phase| {
            let length = phase.end_ms.map_or("-".to_owned(), |end| format!("{:.2} ms", end - phase.start_ms));
            vec![phase.name.clone(), format!("{:.2} ms", phase.start_ms), length]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        text += "\n";
        text += &table(&["PHASE", "AT", "TOOK"], &rows);
    }
    if view.doubt.is_some() {
        text += &format!("\n{}\n", what_to_do(view));
    }
    text
}

/// What an operator can do about a migration in doubt.
pub(super) fn what_to_do(view: &MigrationView) -> String {
    let MigrationView { id, backend, from, to, .. } = view;
    format!(
        "It goes on by itself when the site answers. If it never will, look where {backend} runs:\n\
         \x20 at {to}:  lb migration {id} resolve --as committed\n\
         \x20 at {from}:  lb migration {id} resolve --as rolled-back"
    )
}

/// How long ago, in the largest unit that says something.
fn ago(unix_us: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_micros(unix_us);
    let seconds = SystemTime::now().duration_since(then).unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
