//! Drover beside the others, row by row: what it is meant to reach, and whether it did.

use serde::{Deserialize, Serialize};

use super::report::{Links, Row, Subject};

/// Whom Drover is compared with, and how many times as good it is meant to be in every row.
pub const GOALS: &[(&str, f64)] = &[("nft-dnat", 1.0), ("haproxy", 1.4), ("nginx-stream", 1.4)];

/// Begins the name of every way in which Drover carries packets.
pub const DROVER: &str = "drover-";

/// Drover's best hook and mode in one row, beside one other system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What was measured.
    #[serde(flatten)]
    pub subject: Subject,
    /// `same`: all with the same links; `best`: each with those links that were better for it.
    pub links: Links,
    /// Which of Drover's ways did best.
    pub drover: String,
    /// Its median.
    pub value: f64,
    /// Beside whom.
    pub peer: String,
    /// The other's median.
    pub peer_value: f64,
    /// How many times as good Drover is; above 1 is better than the other, also where less is better.
    pub ratio: f64,
    /// What the ratio is meant to be at least.
    pub goal: f64,
    /// Whether it is.
    pub met: bool,
}

/// All comparisons that the rows allow, first with the same links, then with each one's best.
pub fn compare(rows: &[Row]) -> Vec<Comparison> {
    let mut subjects: Vec<Subject> = rows.iter().map(|row| row.subject).collect();
    subjects.sort();
    subjects.dedup();
    let mut comparisons = Vec::new();
    for links in [Links::Same, Links::Best] {
        for (peer, goal) in GOALS {
            for subject in &subjects {
                let of = |is_it: &dyn Fn(&str) -> bool| best(rows, *subject, links, is_it);
                let (Some(drover), Some(other)) =
                    (of(&|name| name.starts_with(DROVER)), of(&|name| name == *peer))
                else {
                    continue;
                };
                comparisons.push(comparison(links, drover, other, *goal));
            }
        }
    }
    comparisons
}

/// The best row of the systems that `is_it` chooses. Whoever may choose its links also chooses among those that all share.
fn best<'a>(
    rows: &'a [Row],
    subject: Subject,
    links: Links,
    is_it: &dyn Fn(&str) -> bool,
) -> Option<&'a Row> {
    rows.iter()
        .filter(|row| row.subject == subject && is_it(&row.system))
        .filter(|row| links == Links::Best || row.links == Links::Same)
        .reduce(|best, row| if ratio(subject, row.median, best.median) > 1.0 { row } else { best })
}

fn comparison(links: Links, drover: &Row, peer: &Row, goal: f64) -> Comparison {
    let ratio = ratio(drover.subject, drover.median, peer.median);
    Comparison {
        subject: drover.subject,
        links,
        drover: drover.system.clone(),
        value: drover.median,
        peer: peer.system.clone(),
        peer_value: peer.median,
        ratio,
        goal,
        met: ratio >= goal,
    }
}

/// How many times as good `value` is as `other`.
fn ratio(subject: Subject, value: f64, other: f64) -> f64 {
    let (above, below) = if subject.metric.is_cost() { (other, value) } else { (value, other) };
    // Nothing at all against something: never infinite, so that JSON can hold it.
    if below > 0.0 { above / below } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::report::Metric;
    use super::*;

    fn row(system: &str, links: Links, metric: Metric, median: f64) -> Row {
        let (subject, system) = (Subject::of(metric), system.to_owned());
        Row { system, links, subject, median, p50_us: None, p99_us: None, loss: None, rounds: vec![median] }
    }

    #[test]
    fn the_best_way_is_compared_under_the_same_links_and_under_the_best() {
        let metric = Metric::TcpGbitPerS;
        let rows = [
            row("drover-xdp-nat", Links::Same, metric, 5.0),
            row("drover-tc-nat", Links::Same, metric, 4.0),
            row("drover-tc-nat", Links::Best, metric, 20.0),
            row("nft-dnat", Links::Same, metric, 4.5),
            row("nft-dnat", Links::Best, metric, 25.0),
        ];
        let found = compare(&rows);
        let told: Vec<_> = found
            .iter()
            .map(|one| (one.links, one.drover.as_str(), one.value, one.peer_value, one.met))
            .collect();
        assert_eq!(
            told,
            [
                (Links::Same, "drover-xdp-nat", 5.0, 4.5, true),
                (Links::Best, "drover-tc-nat", 20.0, 25.0, false)
            ]
        );
    }

    #[test]
    fn of_a_cost_less_is_better() {
        let metric = Metric::CpuSPerGb;
        let rows = [
            row("drover-xdp-nat", Links::Same, metric, 0.5),
            row("drover-tc-nat", Links::Same, metric, 0.4),
            row("haproxy", Links::Same, metric, 0.6),
        ];
        let one = &compare(&rows)[0];
        assert_eq!((one.drover.as_str(), one.met, one.goal), ("drover-tc-nat", true, 1.4));
        assert!((one.ratio - 1.5).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_is_not_compared() {
        assert_eq!(compare(&[row("haproxy", Links::Same, Metric::UdpPacketsPerS, 1.0)]), []);
    }
}
