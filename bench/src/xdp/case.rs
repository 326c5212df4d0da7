//! What is measured: cases as data.

use serde::Serialize;

/// How the load balancer reaches the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Both addresses translated, replies through the load balancer.
    Nat,
}

impl Mode {
    /// All, in the order of the report.
    pub const ALL: [Mode; 1] = [Mode::Nat];

    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Mode::Nat => "nat",
        }
    }

    /// Whether the backend's answers come through the load balancer.
    pub fn sees_replies(self) -> bool {
        match self {
            Mode::Nat => true,
        }
    }
}

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Family::V4 => "v4",
            Family::V6 => "v6",
        }
    }
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Both.
    pub const ALL: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Of established flows, from the client.
    Hit,
    /// Of no flow: a TCP segment out of nowhere, which is dropped; a client's first datagram, which opens a flow.
    Miss,
    /// The first of a TCP connection.
    Syn,
}

impl Kind {
    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Hit => "hit",
            Kind::Miss => "miss",
            Kind::Syn => "syn",
        }
    }
}

/// One line of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Mode of the service.
    pub mode: Mode,
    /// Of the packets.
    pub family: Family,
    /// Of the packets.
    pub protocol: Protocol,
    /// Which packets.
    pub kind: Kind,
    /// Clients that the packets come from, in turn; a power of two.
    pub flows: u32,
}

impl Case {
    /// Whether each of its packets opens a flow.
    pub fn opens_flows(&self) -> bool {
        self.kind == Kind::Syn || (self.kind == Kind::Miss && self.protocol == Protocol::Udp)
    }
}

/// Cases that run in turn on the same tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Mode, family and protocol of all its cases.
    pub subject: (Mode, Family, Protocol),
    /// Flows that the tables are sized for.
    pub capacity: u32,
    /// Flows that are established before the first round.
    pub established: u32,
    /// The cases.
    pub cases: Vec<Case>,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything, for figures.
    Full,
    /// Every kind of case with few flows: shows that the harness works, and nothing else.
    Quick,
}

impl Extent {
    /// Numbers of flows for hits in tables of the usual size, and in large tables of their own.
    fn flows(self) -> (&'static [u32], Option<u32>) {
        match self {
            Extent::Full => (&[1, 1 << 10, 1 << 16], Some(1 << 20)),
            Extent::Quick => (&[1, 1 << 10], None),
        }
    }

    /// Distinct clients of packets that belong to no flow.
    fn strangers(self) -> u32 {
        match self {
            Extent::Full => 1 << 20,
            Extent::Quick => 1 << 10,
        }
    }
}

/// Flows that tables of the usual size are made for.
const USUAL_CAPACITY: u32 = 1 << 16;

/// Everything that is measured, in the order of the report.
pub fn groups(extent: Extent) -> Vec<Group> {
    let mut groups = Vec::new();
    for mode in Mode::ALL {
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                groups.extend(groups_of(extent, mode, family, protocol));
            }
        }
    }
    groups
}

fn groups_of(extent: Extent, mode: Mode, family: Family, protocol: Protocol) -> Vec<Group> {
    let subject = (mode, family, protocol);
    let case = |kind, flows| Case { mode, family, protocol, kind, flows };
    let group = |capacity, established, cases| Group { subject, capacity, established, cases };
    let (few, many) = extent.flows();
    let most = few.iter().copied().max().unwrap_or(1);

    let mut usual: Vec<Case> = few.iter().map(|flows| case(Kind::Hit, *flows)).collect();
    let strangers = match protocol {
        Protocol::Tcp => {
            usual.push(case(Kind::Miss, extent.strangers()));
            case(Kind::Syn, extent.strangers())
        }
        Protocol::Udp => case(Kind::Miss, extent.strangers()),
    };
    let mut groups = vec![group(USUAL_CAPACITY, most, usual)];
    groups.extend(many.map(|flows| group(flows, flows, vec![case(Kind::Hit, flows)])));
    // What opens flows pushes others out of the tables, and so it has tables of its own.
    groups.push(group(USUAL_CAPACITY, 1, vec![strangers]));
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_family_and_protocol_has_hits_misses_and_what_opens_flows() {
        let cases: Vec<Case> = groups(Extent::Full).into_iter().flat_map(|group| group.cases).collect();
        for mode in Mode::ALL {
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    let own =
                        |case: &&Case| (case.mode, case.family, case.protocol) == (mode, family, protocol);
                    let hits: Vec<u32> =
                        cases.iter().filter(own).filter(|c| c.kind == Kind::Hit).map(|c| c.flows).collect();
                    assert_eq!(hits, [1, 1024, 65_536, 1_048_576]);
                    assert!(cases.iter().filter(own).any(|case| case.kind == Kind::Miss));
                    let opening = cases.iter().filter(own).filter(|case| case.opens_flows()).count();
                    assert_eq!(opening, 1);
                }
            }
        }
    }

    #[test]
    fn flows_are_powers_of_two_and_established_before_they_are_hit() {
        for group in [Extent::Full, Extent::Quick].into_iter().flat_map(groups) {
            for case in &group.cases {
                assert!(case.flows.is_power_of_two());
                assert!(case.kind != Kind::Hit || case.flows <= group.established);
                assert!(!case.opens_flows() || group.cases.len() == 1);
            }
            assert!(group.established <= group.capacity);
        }
    }
}
