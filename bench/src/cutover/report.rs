//! What came out.

use serde::Serialize;

use crate::plot::{Axis, Chart, Group, Reference};
use crate::table::{Table, number};

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Flips of each case.
    pub flips: u32,
    /// Packets of a replay.
    pub held: u32,
    /// A case for each number of flows.
    pub cases: Vec<CaseReport>,
}

/// Medians with so many flows in the tables.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CaseReport {
    /// Established flows.
    pub flows: u32,
    /// Microseconds of the store that points the backend at its new location.
    pub flip_us_p50: f64,
    /// Microseconds from there until the first held packet has left.
    pub first_replay_us_p50: f64,
    /// Held packets that arrive at the new location in a second, in order.
    pub replay_per_s: f64,
}

impl CaseReport {
    /// A case with its figures.
    pub fn new(flows: u32, flip_us: f64, first_replay_us: f64, replay_per_s: f64) -> Self {
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        Self {
            flows,
            flip_us_p50: rounded(flip_us),
            first_replay_us_p50: rounded(first_replay_us),
            replay_per_s: replay_per_s.round(),
        }
    }
}

impl Report {
    /// For a terminal.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.row(["flows", "flip us", "first packet us", "replayed packets/s"]);
        for case in &self.cases {
            table.row([
                case.flows.to_string(),
                number(case.flip_us_p50),
                number(case.first_replay_us_p50),
                number(case.replay_per_s),
            ]);
        }
        table
    }
}

impl Report {
    /// For a plot: times and rates by the number of flows, with what is aimed at.
    pub fn charts(&self) -> Vec<Chart> {
        let chart = |title: &str, unit: &str, series: &[&str], goal: Reference, values: ValuesOf| Chart {
            title: title.into(),
            unit: unit.into(),
            axis: Axis::Linear,
            series: series.iter().map(|name| (*name).into()).collect(),
            groups: self
                .cases
                .iter()
                .map(|case| Group { label: format!("{} flows", case.flows), values: values(case) })
                .collect(),
            references: vec![goal],
        };
        vec![
            chart(
                "Cutover: medians",
                "us",
                &["flip", "first held packet"],
                Reference { label: "goal for a flip".into(), value: 50.0 },
                |case| vec![Some(case.flip_us_p50), Some(case.first_replay_us_p50)],
            ),
            chart(
                "Replay",
                "packets/s",
                &["replayed in order"],
                Reference { label: "goal".into(), value: 500_000.0 },
                |case| vec![Some(case.replay_per_s)],
            ),
        ]
    }
}

/// The values of a case's bars.
type ValuesOf = fn(&CaseReport) -> Vec<Option<f64>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_documented_shape() {
        let cases = vec![CaseReport::new(1 << 20, 0.31251, 40.0, 512_345.6)];
        let report = Report { flips: 300, held: 100_000, cases };
        let json = serde_json::to_value(&report).expect("the report is plain data");
        assert_eq!(
            json["cases"][0],
            serde_json::json!({
                "flows": 1_048_576, "flip_us_p50": 0.313, "first_replay_us_p50": 40.0, "replay_per_s": 512_346.0
            })
        );
        assert!(report.table().to_string().contains("1048576"));
    }
}
