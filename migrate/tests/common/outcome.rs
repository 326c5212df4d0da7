//! What a migration came to: that it moved, rolled back, or was refused before anything was held.

use std::sync::Arc;

use migrate::coordinator::{Outcome, Report};

use super::{At, Client, DEADLINE, Lab, Options, possible};

pub fn lab(options: Options) -> Option<Arc<Lab>> {
    possible().then(|| Arc::new(Lab::new(options)))
}

pub fn show(what: &str, report: &Report) {
    let phases: Vec<_> = report
        .phases
        .iter()
        .map(|phase| format!("{} {:.1}", phase.name, phase.end_ms - phase.start_ms))
        .collect();
    println!(
        "{what}: {:?}, freeze {:.1} ms (of it {:.1} ms for the test's own flip), phases in ms: {}",
        report.outcome,
        report.freeze_ms,
        report.flip_us / 1e3,
        phases.join(", ")
    );
}

/// Everything that has to hold after a migration that did not happen.
pub fn assert_rolled_back(lab: &Arc<Lab>, report: &Report, why: &str) {
    show("rollback", report);
    assert_eq!(report.outcome, Outcome::RolledBack, "{:?}", report.reason);
    let reason = report.reason.as_deref().unwrap_or_default();
    assert!(reason.contains(why), "{reason:?} does not say {why:?}");
    assert!(report.phases.iter().any(|phase| phase.name == "rollback"), "{:?}", report.phases);
    assert!(lab.get(At::A, "/v1/workloads").contains("\"state\":\"running\""));
    lab.assert_unsilenced(At::A);
}

pub fn assert_moves(lab: &Arc<Lab>, client: &Client, id: &str, from: At) {
    let report = lab.migrate(lab.spec(id, from, DEADLINE), |_| ());
    show(id, &report);
    assert_eq!(report.outcome, Outcome::Committed, "{:?}", report.reason);
    client.wait(20);
}

/// Refused in prepare, for this reason; no client waited.
pub fn assert_refused(lab: &Arc<Lab>, client: &Client, id: &str, why: &str) {
    let report = lab.migrate(lab.spec(id, At::A, DEADLINE), |_| ());
    assert_rolled_back(lab, &report, why);
    assert!(report.phases.iter().all(|phase| phase.name != "hold"), "{:?}", report.phases);
    client.wait(20);
    let target = lab.get(At::B, "/v1/workloads");
    assert!(target.contains("\"state\":\"absent\""), "{target}");
}

/// A folder for files of one test; in memory, and wiped with the test.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}
