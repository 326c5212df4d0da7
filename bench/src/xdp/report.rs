//! What came out: as JSON, as a table, as a chart.

use serde::Serialize;

use super::case::{Case, Family, Feature, Kind, Mode, Protocol};
use super::run::summary;
use crate::plot::{Axis, Chart, Group, Reference};
use crate::table::{Table, number};

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The kernel that it was measured on.
    pub kernel: String,
    /// Samples of each case.
    pub rounds: u32,
    /// What no program can undercut.
    pub floors: Floors,
    /// The cases.
    pub cases: Vec<CaseReport>,
    /// What features add to a packet.
    pub features: Vec<FeatureReport>,
}

/// Nanoseconds of the floors, wrapper included: the least of all rounds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Floors {
    /// XDP_TX alone.
    pub xdp_tx_ns: f64,
    /// Minimal IPIP encapsulation.
    pub ipip_ns: f64,
}

impl Floors {
    /// Takes a sample in.
    pub fn lower(floor: &mut f64, sample: f64) {
        if *floor == 0.0 || sample < *floor {
            *floor = rounded(sample);
        }
    }
}

/// A case's figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CaseReport {
    /// Of the service.
    pub mode: Mode,
    /// Of the packets.
    pub family: Family,
    /// Of the packets.
    pub protocol: Protocol,
    /// Which packets.
    pub case: Kind,
    /// Clients that they came from.
    pub flows: u32,
    /// Nanoseconds of a packet, wrapper included: the least of all rounds.
    pub ns_min: f64,
    /// Their median.
    pub ns_median: f64,
    /// The least beside the least of the XDP_TX floor in the same rounds.
    pub ratio: f64,
}

impl CaseReport {
    /// A case with its figures.
    pub fn new(case: Case, ns_min: f64, ns_median: f64, ratio: f64) -> Self {
        let Case { mode, family, protocol, kind, flows } = case;
        let [ns_min, ns_median, ratio] = [ns_min, ns_median, ratio].map(rounded);
        Self { mode, family, protocol, case: kind, flows, ns_min, ns_median, ratio }
    }
}

/// What a feature adds to the packets of a case.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FeatureReport {
    /// Which.
    pub feature: Feature,
    /// Of the service.
    pub mode: Mode,
    /// Of the packets.
    pub family: Family,
    /// Of the packets.
    pub protocol: Protocol,
    /// Which packets.
    pub case: Kind,
    /// Clients that they came from.
    pub flows: u32,
    /// Nanoseconds of a packet without it: the median of all rounds.
    pub ns_without: f64,
    /// With it.
    pub ns_with: f64,
    /// The median of the rounds' differences.
    pub ns_cost: f64,
}

impl FeatureReport {
    /// A feature's cost in a case, from each round's sample without it and with it.
    pub fn new(case: Case, feature: Feature, without: &[f64], with: &[f64]) -> Self {
        let Case { mode, family, protocol, kind, flows } = case;
        let cost = without.iter().zip(with).map(|(without, with)| with - without).collect();
        let [ns_without, ns_with, ns_cost] =
            [without.to_vec(), with.to_vec(), cost].map(|samples| rounded(summary(samples).1));
        Self { feature, mode, family, protocol, case: kind, flows, ns_without, ns_with, ns_cost }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

impl Report {
    /// An empty report of this machine.
    pub fn of_this_machine(rounds: u32) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let kernel = kernel.trim().to_owned();
        Self { kernel, rounds, floors: Floors::default(), cases: vec![], features: vec![] }
    }

    /// For a terminal.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.row(["", "flows", "ns min", "median", "x floor"]);
        table.row(["floor: XDP_TX", "", &number(self.floors.xdp_tx_ns), "", "1"]);
        let ipip = self.floors.ipip_ns;
        table.row(["floor: IPIP", "", &number(ipip), "", &number(ipip / self.floors.xdp_tx_ns)]);
        for case in &self.cases {
            let CaseReport { mode, family, protocol, case: kind, flows, ns_min, ns_median, ratio } = case;
            table.row([
                format!("{} {} {} {}", mode.label(), family.label(), protocol.label(), kind.label()),
                flows.to_string(),
                number(*ns_min),
                number(*ns_median),
                number(*ratio),
            ]);
        }
        for feature in &self.features {
            let FeatureReport { mode, family, protocol, case, flows, ns_cost, .. } = feature;
            let subject = [mode.label(), family.label(), protocol.label(), case.label()].join(" ");
            let name = format!("{}, {subject}", feature.feature.label());
            table.row([name, flows.to_string(), format!("{ns_cost:+.1}")]);
        }
        table
    }

    /// A chart for each mode.
    pub fn charts(&self) -> Vec<Chart> {
        Mode::ALL.into_iter().map(|mode| self.chart(mode)).collect()
    }

    fn chart(&self, mode: Mode) -> Chart {
        let subjects: Vec<(Family, Protocol)> = Protocol::ALL
            .into_iter()
            .flat_map(|protocol| Family::ALL.map(|family| (family, protocol)))
            .collect();
        let own = || self.cases.iter().filter(|case| case.mode == mode);
        let mut columns: Vec<(Kind, u32)> = Vec::new();
        for case in own() {
            if !columns.contains(&(case.case, case.flows)) {
                columns.push((case.case, case.flows));
            }
        }
        let groups = columns.into_iter().map(|(kind, flows)| Group {
            label: match kind {
                Kind::Hit | Kind::HitShuffled => format!("{}, {flows} flows", kind.label()),
                Kind::Miss | Kind::Syn => kind.label().to_owned(),
            },
            values: subjects
                .iter()
                .map(|subject| {
                    own()
                        .find(|case| {
                            (case.family, case.protocol) == *subject
                                && (case.case, case.flows) == (kind, flows)
                        })
                        .map(|case| case.ns_min)
                })
                .collect(),
        });
        let reference = |label: &str, value| Reference { label: label.to_owned(), value };
        Chart {
            title: format!(
                "XDP program, {}: time of a packet (least of {} rounds)",
                mode.label(),
                self.rounds
            ),
            unit: "ns".to_owned(),
            axis: Axis::Linear,
            series: subjects
                .iter()
                .map(|(family, protocol)| format!("{} {}", family.label(), protocol.label()))
                .collect(),
            groups: groups.collect(),
            references: vec![
                reference("XDP_TX", self.floors.xdp_tx_ns),
                reference("minimal IPIP", self.floors.ipip_ns),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let case =
            |kind, flows| Case { mode: Mode::Nat, family: Family::V4, protocol: Protocol::Tcp, kind, flows };
        let mut report = Report::of_this_machine(5);
        report.floors = Floors { xdp_tx_ns: 24.0, ipip_ns: 37.0 };
        report.cases = vec![
            CaseReport::new(case(Kind::Hit, 1), 60.0, 61.004, 2.5),
            CaseReport::new(case(Kind::Syn, 1024), 600.0, 610.0, 25.0),
        ];
        report.features = vec![FeatureReport::new(
            case(Kind::Hit, 1),
            Feature::Sampling,
            &[60.0, 90.0, 61.0],
            &[64.0, 93.5, 61.5],
        )];
        report
    }

    #[test]
    fn the_json_has_the_documented_shape() {
        let json = serde_json::to_value(report()).expect("the report is plain data");
        assert_eq!(json["floors"], serde_json::json!({ "xdp_tx_ns": 24.0, "ipip_ns": 37.0 }));
        assert_eq!(
            json["cases"][0],
            serde_json::json!({
                "mode": "nat", "family": "v4", "protocol": "tcp", "case": "hit", "flows": 1,
                "ns_min": 60.0, "ns_median": 61.0, "ratio": 2.5
            })
        );
    }

    #[test]
    fn a_features_cost_is_the_difference_and_has_its_sign() {
        let report = report();
        assert_eq!(report.features[0].ns_cost, 3.5);
        let table = report.table().to_string();
        assert!(table.contains("sampling 1/1000, nat v4 tcp hit") && table.contains("  +3.5"), "{table}");
    }

    #[test]
    fn floors_only_go_down() {
        let mut floor = 0.0;
        for (sample, expected) in [(30.0, 30.0), (24.123, 24.12), (28.0, 24.12)] {
            Floors::lower(&mut floor, sample);
            assert_eq!(floor, expected);
        }
    }

    #[test]
    fn the_chart_has_a_group_for_each_kind_and_number_of_flows() {
        let charts = report().charts();
        assert_eq!(charts.len(), Mode::ALL.len());
        assert_eq!(charts[0].groups.len(), 2);
        assert_eq!(charts[0].groups[0].values, [Some(60.0), None, None, None]);
        let table = report().table().to_string();
        assert!(
            table.lines().any(|line| {
                line.split_whitespace().eq(["nat", "v4", "tcp", "syn", "1024", "600", "610", "25.0"])
            }),
            "{table}"
        );
    }
}
