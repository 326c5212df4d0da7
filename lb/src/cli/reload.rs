//! `lb reload`.

use std::io::Write as _;

use http::Method;
use serde::Serialize;

use super::{ClientError, ReloadArgs};
use crate::client::AdminClient;
use crate::reload::ReloadReport;

/// Names of a kind that are written out; of more there is a number.
const SHOWN: usize = 8;

#[derive(Serialize)]
struct Request {
    check: bool,
}

pub(super) async fn command(args: &ReloadArgs) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let report = client.json(Method::POST, "/v1/reload", Some(&Request { check: args.check })).await?;
    let _ = std::io::stdout().write_all(render(&report).as_bytes());
    Ok(())
}

/// The report as lines.
pub(super) fn render(report: &ReloadReport) -> String {
    let changes = &report.changes;
    let mut text = String::new();
    for (what, names) in
        [("added", &changes.added), ("removed", &changes.removed), ("changed", &changes.changed)]
    {
        if !names.is_empty() {
            let more = names.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            text += &format!("{what:<8} {}{more}\n", names[..names.len().min(SHOWN)].join(", "));
        }
    }
    if !report.sections.is_empty() {
        text += &format!("changed  {}\n", report.sections.join(", "));
    }
    for warning in &report.warnings {
        text += &format!("warning: {warning}\n");
    }
    let nothing = changes.is_empty() && report.sections.is_empty();
    text += &match (nothing, report.applied) {
        (true, _) => "nothing differs\n".to_owned(),
        (false, false) => "checked; nothing was applied\n".to_owned(),
        (false, true) => {
            format!("applied in {:.1} ms (the file took {:.1} ms to read)\n", report.apply_ms, report.read_ms)
        }
    };
    text
}
