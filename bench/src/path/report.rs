//! What the path benchmark found, as JSON. Field names end in their units.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::goals::Comparison;

/// What was measured of each system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Requests that were answered each second, on connections that stay.
    RequestsPerS,
    /// Connections that were made, answered once and closed each second.
    NewConnectionsPerS,
    /// One TCP connection's throughput, 10^9 bits.
    TcpGbitPerS,
    /// UDP datagrams that arrived each second.
    UdpPacketsPerS,
    /// Seconds of one processor for a million requests, everything counted.
    CpuSPerMillionRequests,
    /// Seconds of one processor for 10^9 bytes, everything counted.
    CpuSPerGb,
}

impl Metric {
    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Metric::RequestsPerS => "requests_per_s",
            Metric::NewConnectionsPerS => "new_connections_per_s",
            Metric::TcpGbitPerS => "tcp_gbit_per_s",
            Metric::UdpPacketsPerS => "udp_packets_per_s",
            Metric::CpuSPerMillionRequests => "cpu_s_per_million_requests",
            Metric::CpuSPerGb => "cpu_s_per_gb",
        }
    }

    /// Whether less of it is better.
    pub fn is_cost(self) -> bool {
        matches!(self, Metric::CpuSPerMillionRequests | Metric::CpuSPerGb)
    }
}

/// How the links' offloads are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Links {
    /// As Drover's XDP program needs them on veth, for every system.
    Same,
    /// As the system does best.
    Best,
}

impl Links {
    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Links::Same => "same",
            Links::Best => "best",
        }
    }
}

/// Which way bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// What a row is about, without the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subject {
    /// What was measured.
    pub metric: Metric,
    /// On how many connections, where that makes a difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// Which way, where that makes a difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
}

impl Subject {
    /// Of this metric alone.
    pub fn of(metric: Metric) -> Subject {
        Subject { metric, connections: None, direction: None }
    }

    /// For people.
    pub fn label(self) -> String {
        let many = |n: u32| if n == 1 { "1 connection".to_owned() } else { format!("{n} connections") };
        let what = match self.metric {
            Metric::RequestsPerS => "requests/s",
            Metric::NewConnectionsPerS => "new connections/s",
            Metric::TcpGbitPerS => "TCP Gbit/s",
            Metric::UdpPacketsPerS => "UDP packets/s",
            Metric::CpuSPerMillionRequests => "CPU s per million requests",
            Metric::CpuSPerGb => "CPU s per GB",
        };
        let of =
            self.connections.map(many).into_iter().chain(self.direction.map(|direction| match direction {
                Direction::Up => "to the server".to_owned(),
                Direction::Down => "to the client".to_owned(),
            }));
        std::iter::once(what.to_owned()).chain(of).collect::<Vec<_>>().join(", ")
    }
}

/// One round's value of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// In the metric's unit.
    pub value: f64,
    /// Half of the requests took no longer.
    pub p50_us: Option<f64>,
    /// 99 percent took no longer.
    pub p99_us: Option<f64>,
    /// Share of datagrams that did not arrive, 0 to 1.
    pub loss: Option<f64>,
}

/// One system's figure, with the medians of all rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What carried the packets.
    pub system: String,
    /// How the links were set.
    pub links: Links,
    /// What was measured.
    #[serde(flatten)]
    pub subject: Subject,
    /// In the metric's unit.
    pub median: f64,
    /// Half of the requests took no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<f64>,
    /// 99 percent took no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<f64>,
    /// Share of datagrams that did not arrive, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Each round's value, in order.
    pub rounds: Vec<f64>,
}

/// How it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Every system was measured so many times, in turn.
    pub rounds: u32,
    /// Each measurement took so long.
    pub seconds: f64,
    /// The kernel's release.
    pub kernel: String,
    /// The processor's model and how many there were.
    pub processors: String,
    /// Share of all processors' time that others used before the rounds, 0 to 1; the worst of all rounds.
    pub others_busy: f64,
    /// What every system's network was like.
    pub everywhere: Vec<String>,
    /// What each system was set to.
    pub systems: BTreeMap<String, String>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathReport {
    /// How it was measured.
    pub setting: Setting,
    /// The figures.
    pub rows: Vec<Row>,
    /// Drover beside the others.
    pub comparisons: Vec<Comparison>,
    /// What was asked for and could not be measured, with the reason.
    pub skipped: BTreeMap<String, String>,
}

/// Gathers samples while rounds go on.
#[derive(Clone, Debug, Default)]
pub struct Samples(BTreeMap<(usize, Subject), Vec<Sample>>);

impl Samples {
    /// Adds one round's value; `variant` is a system with its links, as a position in a list.
    pub fn add(&mut self, variant: usize, subject: Subject, sample: Sample) {
        self.0.entry((variant, subject)).or_default().push(sample);
    }

    /// The rows; `variants` says which system and which links a position stands for.
    pub fn rows(&self, variants: &[(String, Links)]) -> Vec<Row> {
        let row = |((variant, subject), samples): (&(usize, Subject), &Vec<Sample>)| {
            let (system, links) = &variants[*variant];
            let of = |part: fn(&Sample) -> Option<f64>| median(samples.iter().filter_map(part).collect());
            Row {
                system: system.clone(),
                links: *links,
                subject: *subject,
                median: of(|sample| Some(sample.value)).unwrap_or_default(),
                p50_us: of(|sample| sample.p50_us),
                p99_us: of(|sample| sample.p99_us),
                loss: of(|sample| sample.loss),
                rounds: samples.iter().map(|sample| sample.value).collect(),
            }
        };
        self.0.iter().map(row).collect()
    }
}

/// The middle one; of an even number the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_medians_of_what_was_given() {
        let subject = Subject { connections: Some(32), ..Subject::of(Metric::RequestsPerS) };
        let mut samples = Samples::default();
        for (value, p99_us) in [(3.0, 30.0), (1.0, 10.0), (8.0, 20.0)] {
            samples.add(1, subject, Sample { value, p99_us: Some(p99_us), ..Sample::default() });
        }
        let variants = [("routing".to_owned(), Links::Same), ("drover-xdp-nat".to_owned(), Links::Same)];
        let rows = samples.rows(&variants);
        assert_eq!(rows.len(), 1);
        let json = serde_json::to_value(&rows[0]).unwrap();
        let expected = serde_json::json!({
            "system": "drover-xdp-nat", "links": "same", "metric": "requests_per_s", "connections": 32,
            "median": 3.0, "p99_us": 20.0, "rounds": [3.0, 1.0, 8.0]
        });
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), rows[0]);
    }

    #[test]
    fn medians_of_few() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
    }
}
