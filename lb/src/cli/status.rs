//! `lb status`.

use std::io::Write as _;

use http::Method;

use super::ClientError;
use super::text::{bytes, table};
use crate::admin::StatusView;
use crate::client::AdminClient;
use crate::control::BackendView;
use crate::health::{CheckState, CheckView};

/// How many of the last migrations are shown.
const MIGRATIONS: usize = 10;

pub(super) async fn show(client: &AdminClient, json: bool) -> Result<(), ClientError> {
    let text = if json {
        let status: serde_json::Value = client.json(Method::GET, "/v1/status", None::<&()>).await?;
        format!("{status:#}\n")
    } else {
        render(&client.json(Method::GET, "/v1/status", None::<&()>).await?)
    };
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

/// The status as tables.
pub(super) fn render(status: &StatusView) -> String {
    let hooks: Vec<String> =
        status.hooks.iter().map(|hook| format!("{} ({})", hook.interface, hook.mode)).collect();
    let services = if status.services == 1 { "service" } else { "services" };
    let mut text =
        format!("Drover {}, {} {services}, on {}\n\n", status.version, status.services, hooks.join(", "));
    let rows: Vec<Vec<String>> = status.backends.iter().map(backend).collect();
    let headings = [
        "BACKEND",
        "ADDRESS",
        "LOCATION",
        "GATE",
        "HEALTH",
        "GENERATION",
        "HELD",
        "DROPPED",
        "FROM CLIENTS",
        "TO CLIENTS",
    ];
    text += &table(&headings, &rows);
    let skipped = status.migrations.len().saturating_sub(MIGRATIONS);
    if !status.migrations.is_empty() {
        let rows: Vec<Vec<String>> =
            status.migrations[skipped..].iter().map(super::migrations::cells).collect();
        let headings = ["MIGRATION", "BACKEND", "FROM", "TO", "STATE", "FROZEN", "HELD", "REASON"];
        text += "\n";
        text += &table(&headings, &rows);
    }
    text
}

fn backend(backend: &BackendView) -> Vec<String> {
    let gate = match (backend.state.as_str(), backend.deadline_in_ms) {
        ("holding" | "holding_new", Some(left)) => format!("{} ({left} ms left)", backend.gate),
        ("expired", _) => format!("{} (deadline passed)", backend.gate),
        _ => backend.gate.clone(),
    };
    let gate = if backend.drained { format!("{gate}, drained") } else { gate };
    let traffic = backend.traffic;
    vec![
        backend.name.clone(),
        backend.address.to_string(),
        backend.location.clone().unwrap_or_else(|| "unknown".to_owned()),
        gate,
        health(backend),
        backend.generation.to_string(),
        backend.hold.held_packets.to_string(),
        backend.hold.dropped_packets.to_string(),
        format!("{} ({})", traffic.to_backend_packets, bytes(traffic.to_backend_bytes)),
        format!("{} ({})", traffic.to_clients_packets, bytes(traffic.to_clients_bytes)),
    ]
}

/// The worst of what the checks say, and why.
fn health(backend: &BackendView) -> String {
    let Some(worst) = backend.checks.iter().max_by_key(|check| badness(check)) else {
        return "not checked".to_owned();
    };
    let error = worst.last_error.as_deref();
    let text = match (worst.state, error) {
        (CheckState::Down, Some(error)) => format!("DOWN: {error}"),
        (CheckState::Down, None) => "DOWN".to_owned(),
        (CheckState::Up, _) => "up".to_owned(),
        (CheckState::Untried, Some(error)) => format!("unknown: {error}"),
        (CheckState::Untried, None) => "unknown".to_owned(),
    };
    if worst.suspended { format!("{text} (resting)") } else { text }
}

fn badness(check: &CheckView) -> u8 {
    match check.state {
        CheckState::Up => 0,
        CheckState::Untried => 1,
        CheckState::Down => 2,
    }
}
