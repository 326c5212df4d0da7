//! Measures group after group. Within a group every case and the floors run in turn, round after round: what disturbs
//! the machine for a while disturbs all of them, and each is compared with the floor of its own rounds.

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramFd;

use super::case::{self, Case, Extent, Family, Feature, Group, Kind, Mode, Protocol};
use super::fixture::{self, Subject};
use super::handshake;
use super::packets::{ACK, Clients, SYN, Template};
use super::report::{CaseReport, FeatureReport, Floors, Report};
use super::wrapper::{Floor, Order, Wrapper};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Which cases.
    pub extent: Extent,
    /// Rounds; each gives a sample of every case.
    pub rounds: u32,
    /// Packets of a sample (see [`Case::packets`]); the next one goes on with the clients that follow.
    pub packets: u32,
}

impl Settings {
    /// For figures that can be quoted.
    pub const FULL: Settings = Settings { extent: Extent::Full, rounds: 21, packets: 1 << 17 };
    /// For a look whether everything works.
    pub const QUICK: Settings = Settings { extent: Extent::Quick, rounds: 3, packets: 1 << 15 };
}

/// What is under way.
#[derive(Clone, Debug)]
pub struct Progress {
    /// What is being done.
    pub doing: String,
    /// Groups that are done.
    pub done: u64,
    /// Groups in all.
    pub groups: u64,
}

/// Share of a case's packets that may end otherwise than the case says: tables with least-recently-used eviction
/// sometimes lose a flow before they are full.
const STRAY_MOST: f64 = 0.001;

/// Measures everything of these modes.
pub fn run(settings: Settings, modes: &[Mode], mut watch: impl FnMut(Progress)) -> Result<Report> {
    let groups = case::groups(settings.extent, modes);
    let mut wrapper = Wrapper::load()?;
    let mut report = Report::of_this_machine(settings.rounds);
    for (done, group) in (0..).zip(&groups) {
        let (mode, family, protocol) = group.subject;
        let name = format!("{} {} {}", mode.label(), family.label(), protocol.label());
        let mut tell = |doing: String| watch(Progress { doing, done, groups: groups.len() as u64 });
        let measured = Session::prepare(group, &mut wrapper, |flows| {
            tell(format!("{name}: {flows} of {} flows established", group.established));
        })
        .and_then(|mut session| {
            for round in 0..settings.rounds {
                tell(format!("{name}: round {} of {}", round + 1, settings.rounds));
                session.round(&mut wrapper, settings.packets)?;
            }
            Ok(session)
        })
        .with_context(|| format!("measuring {name}"))?;
        measured.summarize(&mut report);
    }
    Ok(report)
}

/// A group under measurement.
struct Session {
    subject: Subject,
    family: Family,
    protocol: Protocol,
    entries: Vec<Entry>,
    /// Packets so far: the next sample goes on with the client of that number, so that strangers stay strangers.
    sent: u32,
}

/// Something that gets a sample in each round.
struct Entry {
    what: What,
    target: ProgramFd,
    template: Template,
    flows: u32,
    order: Order,
    samples: Vec<f64>,
}

#[derive(Clone, Copy)]
enum What {
    Floor(Floor),
    Case(Case),
    /// A case with a feature switched on.
    Feature(Case, Feature),
}

impl What {
    fn case(self) -> Option<Case> {
        match self {
            What::Floor(_) => None,
            What::Case(case) | What::Feature(case, _) => Some(case),
        }
    }
}

impl Session {
    fn prepare(group: &Group, wrapper: &mut Wrapper, progress: impl FnMut(u32)) -> Result<Self> {
        let (mode, family, protocol) = group.subject;
        let mut subject = Subject::load(mode, family, group.capacity)?;
        handshake::establish(&mut subject, group.subject, group.established, progress)?;
        let mut entries = Vec::new();
        let mut floors = vec![Floor::Transmit];
        if (family, protocol) == (Family::V4, Protocol::Tcp) {
            floors.push(Floor::Ipip);
        }
        for floor in floors {
            entries.push(Entry {
                what: What::Floor(floor),
                target: wrapper.floor(floor)?,
                template: Template::new(family, protocol, Clients::Known, ACK),
                flows: 1,
                order: Order::InTurn,
                samples: Vec::new(),
            });
        }
        let features = group.features.iter().flat_map(|(feature, flows)| {
            let with = group.cases.iter().filter(|case| case.flows == *flows);
            with.map(|case| What::Feature(*case, *feature))
        });
        for what in group.cases.iter().copied().map(What::Case).chain(features) {
            let Some(case) = what.case() else { continue };
            let (clients, flags) = match case.kind {
                Kind::Hit | Kind::HitShuffled => (Clients::Known, ACK),
                Kind::Miss => (Clients::Strangers, ACK),
                Kind::Syn => (Clients::Strangers, SYN),
            };
            entries.push(Entry {
                what,
                target: subject.fd()?,
                template: Template::new(family, protocol, clients, flags),
                flows: case.flows,
                order: if case.kind == Kind::HitShuffled { Order::Shuffled } else { Order::InTurn },
                samples: Vec::new(),
            });
        }
        let session = Self { subject, family, protocol, entries, sent: 0 };
        session.check_wrapper(wrapper)?;
        Ok(session)
    }

    /// The wrapper, through the XDP_TX floor, makes the packets that flows were established with.
    fn check_wrapper(&self, wrapper: &mut Wrapper) -> Result<()> {
        let transmit = wrapper.floor(Floor::Transmit)?;
        for entry in &self.entries {
            let mut template = entry.template.clone();
            wrapper.aim(template.bytes(), (entry.flows, entry.order), self.sent, &transmit)?;
            let (made, client) = wrapper.one(self.family, self.protocol, template.bytes())?;
            ensure!(made == template.of(client), "the wrapper makes other packets than the harness");
        }
        Ok(())
    }

    fn round(&mut self, wrapper: &mut Wrapper, packets: u32) -> Result<()> {
        let (family, protocol) = (self.family, self.protocol);
        for entry in &mut self.entries {
            let template = entry.template.bytes();
            self.subject.switch(if let What::Feature(_, feature) = entry.what {
                Some(feature)
            } else {
                None
            })?;
            wrapper.aim(template, (entry.flows, entry.order), self.sent, &entry.target)?;
            let packets = entry.what.case().map_or(packets, |case| case.packets(packets));
            // The others' packets have left the caches as they pleased.
            let warming = entry.flows.clamp(packets / 8, packets);
            wrapper.run(family, protocol, template, warming)?;
            let counted = |subject: &Subject| {
                entry.what.case().map_or(Ok(0), |case| subject.counted(fixture::expected(&case)))
            };
            let before = counted(&self.subject)?;
            let run = wrapper.run(family, protocol, template, packets)?;
            self.sent = self.sent.wrapping_add(warming + packets);
            if let Some(case) = entry.what.case() {
                let as_expected = counted(&self.subject)? - before;
                ensure!(
                    as_expected as f64 >= f64::from(packets) * (1.0 - STRAY_MOST),
                    "only {as_expected} of {packets} packets ended as {:?}, as those of case {} with {} flows must",
                    fixture::expected(&case),
                    case.kind.label(),
                    case.flows
                );
            }
            entry.samples.push(run.ns);
        }
        Ok(())
    }

    fn summarize(self, report: &mut Report) {
        let mut transmit_ns = f64::INFINITY;
        for entry in &self.entries {
            let (min, median) = summary(entry.samples.clone());
            match entry.what {
                What::Floor(Floor::Transmit) => {
                    transmit_ns = min;
                    Floors::lower(&mut report.floors.xdp_tx_ns, min);
                }
                What::Floor(Floor::Ipip) => Floors::lower(&mut report.floors.ipip_ns, min),
                What::Case(case) => {
                    report.cases.push(CaseReport::new(case, min, median, min / transmit_ns));
                }
                What::Feature(case, feature) => {
                    let plain = self.entries.iter().find(|plain| plain.is(case));
                    let without = plain.map_or(&entry.samples, |plain| &plain.samples);
                    report.features.push(FeatureReport::new(case, feature, without, &entry.samples));
                }
            }
        }
    }
}

impl Entry {
    /// Whether it is a case as such.
    fn is(&self, wanted: Case) -> bool {
        matches!(self.what, What::Case(case) if case == wanted)
    }
}

/// Least and median.
pub fn summary(mut samples: Vec<f64>) -> (f64, f64) {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    (samples.first().copied().unwrap_or(0.0), samples.get(middle).copied().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_least_and_median() {
        assert_eq!(summary(vec![3.0, 1.0, 2.0]), (1.0, 2.0));
        assert_eq!(summary(vec![]), (0.0, 0.0));
    }
}
