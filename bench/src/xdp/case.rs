//! What is measured: cases as data.

use serde::Serialize;

/// How packets reach the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Both addresses translated, replies through the load balancer.
    Nat,
    /// The destination translated, replies through the load balancer.
    Transparent,
    /// Encapsulated (IPIP, IP6IP6), replies past the load balancer.
    Dsr,
}

impl Mode {
    /// All, in the order of the report.
    pub const ALL: [Mode; 3] = [Mode::Nat, Mode::Transparent, Mode::Dsr];

    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Mode::Nat => "nat",
            Mode::Transparent => "transparent",
            Mode::Dsr => "dsr",
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
    /// Of established flows, from one client after the other, in the order in which the flows were opened.
    Hit,
    /// The same, but from the clients in no order that caches could foresee: the least favourable one.
    HitShuffled,
    /// Of no flow: with `nat` a TCP segment out of nowhere is dropped; everything else opens a flow.
    Miss,
    /// The first of a TCP connection.
    Syn,
}

impl Kind {
    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Hit => "hit",
            Kind::HitShuffled => "hit, shuffled",
            Kind::Miss => "miss",
            Kind::Syn => "syn",
        }
    }
}

/// Something that costs nothing while nobody has asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// One packet in a thousand is copied for whoever captures.
    Sampling,
    /// The way to the site has a bound on packets' size, which none of these exceeds.
    PathMtu,
    /// Bounds on new flows, which are not reached; for packets that open one.
    FlowLimits,
}

impl Feature {
    /// As in the report.
    pub fn label(self) -> &'static str {
        match self {
            Feature::Sampling => "sampling 1/1000",
            Feature::PathMtu => "path MTU",
            Feature::FlowLimits => "new-flow limits",
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
        match self.kind {
            Kind::Hit | Kind::HitShuffled => false,
            Kind::Miss => !(self.protocol == Protocol::Tcp && self.mode == Mode::Nat),
            Kind::Syn => true,
        }
    }

    /// Packets of one sample: `usual`, but fewer where each opens a flow and takes many times as long.
    pub fn packets(&self, usual: u32) -> u32 {
        if self.opens_flows() { usual / 8 } else { usual }
    }
}

/// Cases that run in turn on the same tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Mode, family and protocol of all its cases.
    pub subject: (Mode, Family, Protocol),
    /// Flows that the tables are sized for, where they have not the program's usual size.
    pub capacity: Option<u32>,
    /// Flows that are established before the first round.
    pub established: u32,
    /// The cases.
    pub cases: Vec<Case>,
    /// Features, each measured with the group's case of as many flows.
    pub features: Vec<(Feature, u32)>,
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
    /// Numbers of flows for hits in tables of the usual size, and in large tables of their own. So many that they do
    /// not fit a core's own caches are hit in both orders.
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

/// The least number of flows that are hit in both orders.
const SHUFFLED_FROM: u32 = 1 << 16;

/// Everything that is measured of these modes, in the order of the report.
pub fn groups(extent: Extent, modes: &[Mode]) -> Vec<Group> {
    let mut groups = Vec::new();
    for mode in modes.iter().copied() {
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
    let group =
        |capacity, established, cases| Group { subject, capacity, established, cases, features: vec![] };
    let (few, many) = extent.flows();
    let most = few.iter().copied().max().unwrap_or(1);
    let hits = |flows: &[u32]| {
        let shuffled = flows.iter().filter(|flows| **flows >= SHUFFLED_FROM);
        let shuffled = shuffled.map(|flows| case(Kind::HitShuffled, *flows));
        flows.iter().map(|flows| case(Kind::Hit, *flows)).chain(shuffled).collect()
    };
    let mut strangers = vec![case(Kind::Miss, extent.strangers())];
    if protocol == Protocol::Tcp {
        strangers.push(case(Kind::Syn, extent.strangers()));
    }
    let (opening, passing): (Vec<Case>, Vec<Case>) = strangers.into_iter().partition(Case::opens_flows);

    let mut usual = group(None, most, hits(few));
    usual.cases.extend(passing);
    // What features cost is the same for all; one family and protocol show it.
    let shows_features = (family, protocol) == (Family::V4, Protocol::Tcp);
    if shows_features {
        usual.features = vec![(Feature::Sampling, 1), (Feature::PathMtu, 1)];
    }
    let mut groups = vec![usual];
    groups.extend(many.map(|flows| group(Some(flows), flows, hits(&[flows]))));
    // What opens flows pushes others out of the tables, and so each kind has tables of its own.
    groups.extend(opening.into_iter().map(|case| {
        let mut group = group(None, 1, vec![case]);
        if shows_features && case.kind == Kind::Syn {
            group.features.push((Feature::FlowLimits, case.flows));
        }
        group
    }));
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_family_and_protocol_has_hits_misses_and_what_opens_flows() {
        let cases: Vec<Case> =
            groups(Extent::Full, &Mode::ALL).into_iter().flat_map(|group| group.cases).collect();
        for mode in Mode::ALL {
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    let own =
                        |case: &&Case| (case.mode, case.family, case.protocol) == (mode, family, protocol);
                    let hits: Vec<u32> =
                        cases.iter().filter(own).filter(|c| c.kind == Kind::Hit).map(|c| c.flows).collect();
                    assert_eq!(hits, [1, 1024, 65_536, 1_048_576]);
                    let shuffled = cases.iter().filter(own).filter(|case| case.kind == Kind::HitShuffled);
                    assert!(shuffled.map(|case| case.flows).eq([65_536, 1_048_576]));
                    assert!(cases.iter().filter(own).any(|case| case.kind == Kind::Miss));
                    let opening = cases.iter().filter(own).filter(|case| case.opens_flows()).count();
                    assert!(opening >= 1);
                }
            }
        }
    }

    #[test]
    fn flows_are_powers_of_two_and_established_before_they_are_hit() {
        for group in [Extent::Full, Extent::Quick].into_iter().flat_map(|extent| groups(extent, &Mode::ALL)) {
            for case in &group.cases {
                assert!(case.flows.is_power_of_two());
                assert!(
                    !matches!(case.kind, Kind::Hit | Kind::HitShuffled) || case.flows <= group.established
                );
                assert!(!case.opens_flows() || group.cases.len() == 1);
            }
            for (_, flows) in &group.features {
                assert!(
                    group.cases.iter().any(|case| case.flows == *flows),
                    "a feature has a case to compare with"
                );
            }
        }
    }
}
