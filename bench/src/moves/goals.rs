//! Drover beside the others, and what it is meant to reach.

use serde::Serialize;

use super::case::{Case, SMALL};
use super::report::CaseReport;

/// Whom all are compared with: what people do by hand today.
pub const SCRIPT: &str = "script";
/// Begins the name of every way in which Drover moves a server.
const DROVER: &str = "drover";
/// With memory in the freeze.
pub const DROVER_PRE: &str = "drover-pre";
/// With memory after the restore.
pub const DROVER_POST: &str = "drover-post";

/// How many times shorter than the others' Drover's stall is meant to be.
const SHORTER: f64 = 3.0;
/// Above this share of pages rewritten each second a large server is not mostly idle.
const MOSTLY_IDLE_PCT: f64 = 5.0;

/// One system beside the script in one case: how many times as long the script's figure is. Above 1 is better than
/// the script.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Who.
    pub system: String,
    /// In which case.
    #[serde(flatten)]
    pub case: Case,
    /// Of the freeze.
    pub freeze_ratio: f64,
    /// Of the stall.
    pub stall_ratio: f64,
    /// Of the bytes sent.
    pub bytes_ratio: f64,
    /// Of the total time.
    pub total_ratio: f64,
}

/// Something that is aimed at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// In words.
    pub goal: String,
    /// Which of Drover's ways.
    pub system: String,
    /// What was measured.
    pub value: f64,
    /// What it is meant to be.
    pub bound: f64,
    /// Whether it is.
    pub met: bool,
}

/// Every system beside the script, in the cases that both have figures of.
pub fn compare(rows: &[CaseReport]) -> Vec<Comparison> {
    let measured = || rows.iter().filter(|row| row.committed > 0);
    let comparison = |row: &CaseReport| {
        let script = measured().find(|other| other.system == SCRIPT && other.case == row.case)?;
        Some(Comparison {
            system: row.system.clone(),
            case: row.case,
            freeze_ratio: ratio(script.freeze_ms.p50, row.freeze_ms.p50),
            stall_ratio: ratio(script.stall_ms.p50, row.stall_ms.p50),
            bytes_ratio: ratio(script.bytes as f64, row.bytes as f64),
            total_ratio: ratio(script.total_ms, row.total_ms),
        })
    };
    measured().filter(|row| row.system != SCRIPT).filter_map(comparison).collect()
}

/// The goals that the rows say something of.
pub fn judge(rows: &[CaseReport]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for row in rows.iter().filter(|row| row.committed > 0 && row.system.starts_with(DROVER)) {
        let case = row.case;
        let mut at_most = |what: &str, value: f64, bound: f64| {
            let goal = format!("{}: {what} at most {bound} ms", case.label());
            goals.push(Goal { goal, system: row.system.clone(), value, bound, met: value <= bound });
        };
        if case == SMALL {
            at_most("stall p50", row.stall_ms.p50, 12.0);
            at_most("stall p99", row.stall_ms.p99, 25.0);
        }
        if case == (Case { resident_mb: 100, ..SMALL }) {
            at_most("freeze p50", row.freeze_ms.p50, 60.0);
        }
        if case.dirty_pct <= MOSTLY_IDLE_PCT
            && case == (Case { resident_mb: 1000, dirty_pct: case.dirty_pct, ..SMALL })
        {
            at_most("freeze p50", row.freeze_ms.p50, 150.0);
        }
        if case == (Case { connections: 1000, ..SMALL }) {
            at_most("freeze p50", row.freeze_ms.p50, 110.0);
        }
    }
    goals.extend(shorter_stalls(rows));
    goals
}

fn shorter_stalls(rows: &[CaseReport]) -> Vec<Goal> {
    let measured = || rows.iter().filter(|row| row.committed > 0 && row.case.is_idle_and_near());
    let mut goals = Vec::new();
    for drover in measured().filter(|row| row.system.starts_with(DROVER)) {
        let others = measured().filter(|row| !row.system.starts_with(DROVER) && row.case == drover.case);
        goals.extend(others.map(|other| {
            let value = ratio(other.stall_ms.p50, drover.stall_ms.p50);
            Goal {
                goal: format!(
                    "{}: stall {SHORTER} times shorter than {}'s",
                    drover.case.label(),
                    other.system
                ),
                system: drover.system.clone(),
                value,
                bound: SHORTER,
                met: value >= SHORTER,
            }
        }));
    }
    goals
}

/// How many times as much `other` is as `value`; never infinite, so that JSON can hold it.
fn ratio(other: f64, value: f64) -> f64 {
    if value > 0.0 { (other / value * 100.0).round() / 100.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::report::Outcome;
    use super::super::report::constructed::row;
    use super::*;

    fn judged(rows: &[CaseReport]) -> Vec<(String, bool)> {
        judge(rows).into_iter().map(|goal| (goal.goal, goal.met)).collect()
    }

    #[test]
    fn all_but_the_script_are_compared_with_it_where_both_were_measured() {
        let large = Case { resident_mb: 1000, ..SMALL };
        let rows = [
            row("drover", SMALL, 10.0, 20.0),
            row("script", SMALL, 40.0, 210.0),
            row("runc", SMALL, 80.0, 420.0),
            row("drover", large, 1.0, 1.0),
            CaseReport::new("script", large, Outcome::default()),
        ];
        let found = compare(&rows);
        let told: Vec<_> =
            found.iter().map(|one| (one.system.as_str(), one.freeze_ratio, one.stall_ratio)).collect();
        assert_eq!(told, [("drover", 4.0, 10.5), ("runc", 0.5, 0.5)]);
    }

    #[test]
    fn each_bound_is_held_against_its_own_case_only() {
        let with =
            |resident_mb, connections, dirty_pct| Case { resident_mb, connections, dirty_pct, ..SMALL };
        let rows = [
            row("drover", SMALL, 10.0, 12.5),
            row("drover", with(100, 1, 0.0), 60.0, 70.0),
            row("drover", with(1000, 1, 5.0), 151.0, 160.0),
            row("drover", with(1000, 1, 20.0), 9000.0, 9000.0),
            row("drover", with(10, 1000, 0.0), 110.0, 120.0),
            row("drover", Case { delay_ms: 40, ..SMALL }, 9000.0, 9000.0),
            row("runc", SMALL, 9000.0, 9000.0),
        ];
        let expected = [
            ("10 MB: stall p50 at most 12 ms", false),
            ("10 MB: stall p99 at most 25 ms", true),
            ("100 MB: freeze p50 at most 60 ms", true),
            ("1000 MB, 5 %/s: freeze p50 at most 150 ms", false),
            ("10 MB, 1000 connections: freeze p50 at most 110 ms", true),
            ("10 MB: stall 3 times shorter than runc's", true),
        ];
        assert_eq!(judged(&rows), expected.map(|(goal, met)| (goal.to_owned(), met)));
    }

    #[test]
    fn a_ratio_below_the_goal_is_not_met_and_what_failed_is_not_judged() {
        let rows = [row("drover-pre", SMALL, 1.0, 10.0), row("script", SMALL, 1.0, 29.0)];
        assert_eq!(
            judged(&rows).last().unwrap(),
            &("10 MB: stall 3 times shorter than script's".to_owned(), false)
        );
        assert_eq!(judge(&[CaseReport::new("drover", SMALL, Outcome::default())]), []);
    }
}
