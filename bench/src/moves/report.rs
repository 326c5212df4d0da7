//! What was measured: as JSON, as a table, as charts. Field names end in their units.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::Case;
use super::clients::Counts;
use super::goals::{Comparison, Goal};
use crate::plot::{Axis, Chart, Group};
use crate::stall::Percentiles;
use crate::table::{Table, bytes, number};

/// Cases that fit into one chart.
const CASES_PER_CHART: usize = 4;

/// One move of one system.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Move {
    /// The longest time in which the server did not run, as it says itself.
    pub freeze_ms: f64,
    /// The longest gap of each probe.
    pub stalls_ms: Vec<f64>,
    /// Bytes that the server's site sent to the other.
    pub bytes: u64,
    /// From the order to its end.
    pub total_ms: f64,
    /// The parts of that in their order, by whoever moved it.
    pub phases_ms: Vec<(String, f64)>,
    /// How long the server ran while some of its memory was only where it came from.
    pub exposed_ms: f64,
}

impl Move {
    /// How much longer than the freeze each probe's gap is.
    fn added_stalls_ms(&self) -> impl Iterator<Item = f64> {
        self.stalls_ms.iter().map(|stall_ms| (stall_ms - self.freeze_ms).max(0.0))
    }
}

/// What came of a case with one system.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The moves that succeeded.
    pub moves: Vec<Move>,
    /// Moves that did not, with the reason.
    pub failures: Vec<String>,
    /// What clients saw.
    pub counts: Counts,
    /// Pages that held something else than was written there, at the end.
    pub wrong_pages: u64,
}

/// A part of a move.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseReport {
    /// In the words of whoever moved the server.
    pub name: String,
    /// How long it took, over moves.
    pub ms: Percentiles,
}

/// One system in one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseReport {
    /// Who moved the server.
    pub system: String,
    /// What was moved, over what.
    #[serde(flatten)]
    pub case: Case,
    /// The longest time in which the server did not run, over moves.
    pub freeze_ms: Percentiles,
    /// The longest gap between two answers, over probes and moves.
    pub stall_ms: Percentiles,
    /// What of it is not the freeze.
    pub added_stall_ms: Percentiles,
    /// Bytes that the server's site sent to the other; the median of the moves.
    pub bytes: u64,
    /// From the order to its end; the median of the moves.
    pub total_ms: f64,
    /// Where that goes.
    pub phases: Vec<PhaseReport>,
    /// How long the server ran while some of its memory was only where it came from, over moves.
    pub exposed_ms: Percentiles,
    /// Moves that succeeded.
    pub committed: u64,
    /// Moves that did not.
    pub failed: u64,
    /// Why, each reason once.
    pub failures: Vec<String>,
    /// Requests that were answered, over the whole case.
    pub answered: u64,
    /// Requests that were not, or wrongly.
    pub lost: u64,
    /// Connections that broke.
    pub resets: u64,
    /// Pages that held something else at the end than was written there.
    pub wrong_pages: u64,
}

/// A value of a row.
type Figure = fn(&CaseReport) -> f64;

/// How it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Setting {
    /// Moves of each system in each case, at most.
    pub moves: u32,
    /// The kernel's release.
    pub kernel: String,
    /// The processor's model and how many there were.
    pub processors: String,
    /// What was the same for all.
    pub everywhere: Vec<String>,
    /// How each system moves the server.
    pub systems: BTreeMap<String, String>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How it was measured.
    pub setting: Setting,
    /// The figures.
    pub cases: Vec<CaseReport>,
    /// Drover beside the others.
    pub comparisons: Vec<Comparison>,
    /// What is aimed at.
    pub goals: Vec<Goal>,
    /// What was asked for and not measured, with the reason.
    pub skipped: BTreeMap<String, String>,
}

impl CaseReport {
    /// Sums a case up.
    pub fn new(system: &str, case: Case, outcome: Outcome) -> CaseReport {
        let Outcome { moves, mut failures, counts, wrong_pages } = outcome;
        let over =
            |values: fn(&Move) -> Vec<f64>| rounded(Percentiles::of(moves.iter().flat_map(values).collect()));
        let failed = failures.len() as u64;
        failures.sort();
        failures.dedup();
        CaseReport {
            system: system.to_owned(),
            case,
            freeze_ms: over(|one| vec![one.freeze_ms]),
            stall_ms: over(|one| one.stalls_ms.clone()),
            added_stall_ms: over(|one| one.added_stalls_ms().collect()),
            bytes: over(|one| vec![one.bytes as f64]).p50 as u64,
            total_ms: over(|one| vec![one.total_ms]).p50,
            phases: phases(&moves),
            exposed_ms: over(|one| vec![one.exposed_ms]),
            committed: moves.len() as u64,
            failed,
            failures,
            answered: counts.answered,
            lost: counts.lost,
            resets: counts.resets,
            wrong_pages,
        }
    }

    /// Whether every move succeeded and nothing was lost.
    pub fn is_clean(&self) -> bool {
        self.committed > 0 && [self.failed, self.lost, self.resets, self.wrong_pages] == [0; 4]
    }
}

/// Each phase over the moves that had it, in the order of the first.
fn phases(moves: &[Move]) -> Vec<PhaseReport> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in moves.iter().flat_map(|one| &one.phases_ms) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let of = |name: &str| {
        let all = moves.iter().flat_map(|one| &one.phases_ms);
        all.filter(|(other, _)| other == name).map(|(_, ms)| *ms).collect()
    };
    let report = |name: &str| PhaseReport { name: name.to_owned(), ms: rounded(Percentiles::of(of(name))) };
    names.into_iter().map(report).collect()
}

/// To the microsecond: what is behind that is no measurement.
fn rounded(values: Percentiles) -> Percentiles {
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    Percentiles { p50: round(values.p50), p99: round(values.p99), max: round(values.max) }
}

impl Report {
    /// The figures for a terminal.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        let header =
            ["", "system", "freeze ms", "p99", "stall ms", "p99", "added ms", "p99", "sent", "total ms"];
        table.row(header.into_iter().chain(["moves", "lost", "resets"]));
        for row in &self.cases {
            let moves = match row.failed {
                0 => row.committed.to_string(),
                failed => format!("{} of {}", row.committed, row.committed + failed),
            };
            let figure = |value: f64| if row.committed > 0 { number(value) } else { "-".to_owned() };
            table.row([
                row.case.label(),
                row.system.clone(),
                figure(row.freeze_ms.p50),
                figure(row.freeze_ms.p99),
                figure(row.stall_ms.p50),
                figure(row.stall_ms.p99),
                figure(row.added_stall_ms.p50),
                figure(row.added_stall_ms.p99),
                if row.committed > 0 { bytes(row.bytes) } else { "-".to_owned() },
                figure(row.total_ms),
                moves,
                (row.lost + row.wrong_pages).to_string(),
                row.resets.to_string(),
            ]);
        }
        table
    }

    /// Where the time of each system's moves goes, for a terminal.
    pub fn phases(&self) -> Table {
        let mut table = Table::new();
        table.row(["", "system", "its phases, p50 in ms"]);
        for row in self.cases.iter().filter(|row| !row.phases.is_empty()) {
            let phases = row.phases.iter().map(|phase| format!("{} {}", phase.name, number(phase.ms.p50)));
            let exposed =
                (row.exposed_ms.max > 0.0).then(|| format!("(exposed {})", number(row.exposed_ms.p50)));
            let cells: Vec<String> = phases.chain(exposed).collect();
            table.row([row.case.label(), row.system.clone(), cells.join("  ")]);
        }
        table
    }

    /// Stall, freeze and bytes of all cases, a few in each chart.
    pub fn charts(&self) -> Vec<Chart> {
        let figures: [(&str, &str, Figure); 3] = [
            ("Stall, median", "ms", |row| row.stall_ms.p50),
            ("Freeze, median", "ms", |row| row.freeze_ms.p50),
            ("Sent from site to site, median", "MB", |row| row.bytes as f64 / 1e6),
        ];
        let mut charts = Vec::new();
        for (title, unit, value) in figures {
            for cases in self.distinct_cases().chunks(CASES_PER_CHART) {
                charts.push(self.chart(title, unit, cases, value));
            }
        }
        charts
    }

    fn chart(&self, title: &str, unit: &str, cases: &[Case], value: Figure) -> Chart {
        let systems = self.systems();
        let of = |case: &Case, system: &str| {
            let mut rows = self.cases.iter().filter(|row| row.committed > 0);
            rows.find(|row| row.case == *case && row.system == system).map(value)
        };
        let group = |case: &Case| Group {
            label: case.label(),
            values: systems.iter().map(|system| of(case, system)).collect(),
        };
        Chart {
            title: title.to_owned(),
            unit: unit.to_owned(),
            axis: Axis::Logarithmic,
            series: systems.iter().map(|&system| system.to_owned()).collect(),
            groups: cases.iter().map(group).collect(),
            references: Vec::new(),
        }
    }

    fn distinct_cases(&self) -> Vec<Case> {
        let mut cases: Vec<Case> = Vec::new();
        for row in &self.cases {
            if !cases.contains(&row.case) {
                cases.push(row.case);
            }
        }
        cases
    }

    fn systems(&self) -> Vec<&str> {
        let mut systems: Vec<&str> = Vec::new();
        for row in &self.cases {
            if !systems.contains(&row.system.as_str()) {
                systems.push(&row.system);
            }
        }
        systems
    }
}

#[cfg(test)]
pub(super) mod constructed {
    use super::*;

    /// A row of two moves with this freeze and this stall.
    pub fn row(system: &str, case: Case, freeze_ms: f64, stall_ms: f64) -> CaseReport {
        let (stalls_ms, bytes, total_ms) = (vec![stall_ms], 1 << 20, 2.0 * stall_ms);
        let one = Move { freeze_ms, stalls_ms, bytes, total_ms, ..Move::default() };
        CaseReport::new(system, case, Outcome { moves: vec![one.clone(), one], ..Outcome::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::SMALL;
    use super::constructed::row;
    use super::*;

    fn report(cases: Vec<CaseReport>) -> Report {
        let (comparisons, goals) = (Vec::new(), Vec::new());
        Report { setting: Setting::default(), cases, comparisons, goals, skipped: BTreeMap::new() }
    }

    #[test]
    fn percentiles_are_over_moves_and_over_probes() {
        let one = |freeze_ms: f64, stalls_ms: &[f64]| Move {
            freeze_ms,
            stalls_ms: stalls_ms.to_vec(),
            bytes: 1000,
            total_ms: 100.0,
            phases_ms: vec![("prepare".to_owned(), 80.0), ("freeze".to_owned(), freeze_ms)],
            exposed_ms: 0.0,
        };
        let moves = vec![one(10.0, &[11.0, 12.0]), one(20.0, &[19.0, 25.0]), one(12.0, &[13.0, 14.0])];
        let row = CaseReport::new("drover", SMALL, Outcome { moves, ..Outcome::default() });
        assert_eq!((row.freeze_ms.p50, row.freeze_ms.p99), (12.0, 20.0));
        assert_eq!((row.stall_ms.p50, row.stall_ms.p99), (13.0, 25.0));
        assert_eq!((row.added_stall_ms.p50, row.added_stall_ms.max), (1.0, 5.0));
        assert_eq!((row.bytes, row.total_ms, row.committed), (1000, 100.0, 3));
        let phases: Vec<_> = row.phases.iter().map(|phase| (phase.name.as_str(), phase.ms.p50)).collect();
        assert_eq!(phases, [("prepare", 80.0), ("freeze", 12.0)]);
        assert!(row.is_clean());
    }

    #[test]
    fn the_json_has_the_documented_shape() {
        let json = serde_json::to_value(report(vec![row("script", SMALL, 205.0, 210.5)])).unwrap();
        let case = &json["cases"][0];
        for (field, value) in [
            ("system", serde_json::json!("script")),
            ("resident_mb", 10.into()),
            ("connections", 1.into()),
            ("dirty_pct", 0.0.into()),
            ("delay_ms", 0.into()),
            ("rate_mbit", serde_json::Value::Null),
            ("bytes", (1 << 20).into()),
            ("total_ms", 421.0.into()),
        ] {
            assert_eq!(case[field], value, "{field}");
        }
        for figure in ["freeze_ms", "stall_ms", "added_stall_ms"] {
            assert!(case[figure]["p50"].is_number() && case[figure]["p99"].is_number(), "{figure}");
        }
        assert_eq!(case["added_stall_ms"]["p50"], 5.5);
    }

    #[test]
    fn what_failed_shows_and_has_no_figures() {
        let failures = vec!["no space".to_owned(), "no space".to_owned()];
        let row = CaseReport::new("runc", SMALL, Outcome { failures, ..Outcome::default() });
        assert!(!row.is_clean());
        assert_eq!((row.failed, row.failures.len()), (2, 1));
        let text = report(vec![row]).table().to_string();
        assert!(text.contains("0 of 2") && text.contains(" - "), "{text}");
    }

    #[test]
    fn every_case_is_in_a_chart_of_each_figure() {
        let cases = super::super::case::Case::default_set();
        let count = cases.len();
        let rows =
            cases.into_iter().flat_map(|case| ["drover", "script"].map(|name| row(name, case, 1.0, 2.0)));
        let charts = report(rows.collect()).charts();
        let groups = |title: &str| -> usize {
            charts.iter().filter(|chart| chart.title.starts_with(title)).map(|chart| chart.groups.len()).sum()
        };
        assert_eq!([groups("Stall"), groups("Freeze"), groups("Sent")], [count; 3]);
        assert!(charts.iter().all(|chart| chart.series == ["drover", "script"]));
        assert!(
            charts
                .iter()
                .flat_map(|chart| &chart.groups)
                .all(|group| group.values.iter().all(Option::is_some))
        );
    }
}
