//! The flows of health checks: both entries are written before the probe's first packet, so that it reaches the
//! backend under test and not one of its service's choice.
//!
//! The maps are opened by their pins: whoever else owns handles on them has nothing to do with probes. A daemon that
//! dies in the middle of a probe leaves two entries behind, which end by expiry as any flow's do.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use aya::maps::MapData;
use lb_core::decide::{TCP, UDP};
use lb_core::flow::{Common, State};
use lb_core::record::Backend;
use lb_core::{Direction, Flow, FlowKey, Mode};

use super::batch::BatchMap;
use super::program::{self, kernel};
use super::tables::words;
use super::ticks::TickClock;
use crate::config;
use crate::datapath::{self, DatapathError, ProbeFlow, Protocol};

/// The established flows of both families.
pub struct ProbeFlows {
    v4: BatchMap<FlowKey<1>, Flow<1>>,
    v6: BatchMap<FlowKey<4>, Flow<4>>,
    backends: BatchMap<u32, Backend>,
    /// First of our addresses towards backends, by family.
    sources: [Option<IpAddr>; 2],
    clock: TickClock,
}

impl ProbeFlows {
    /// Opens the pinned tables.
    pub fn open(config: &config::Datapath) -> Result<Self, DatapathError> {
        let pins = &config.pin_path;
        let sources = [
            config.nat_source4.map(|prefix| prefix.address().into()),
            config.nat_source6.map(|prefix| prefix.address().into()),
        ];
        Ok(Self {
            v4: map(pins, "FLOWS_V4")?,
            v6: map(pins, "FLOWS_V6")?,
            backends: map(pins, "BACKENDS")?,
            sources,
            clock: TickClock::new().map_err(kernel("reading the kernel's clock"))?,
        })
    }

    /// Writes a probe's flow.
    pub fn put(&self, probe: &ProbeFlow, member: u32) -> Result<(), DatapathError> {
        let backend = self.backend(probe)?;
        let common = Common {
            now: self.clock.now().map_err(kernel("reading the kernel's clock"))?,
            backend: probe.backend.0,
            incarnation: backend.incarnation,
            member,
            mode: mode(probe.mode),
            state: State::PINNED,
            link: probe.back,
        };
        let written = match probe.to.is_ipv4() {
            true => put(&self.v4, &self.names(probe, &backend)?, &common),
            false => put(&self.v6, &self.names(probe, &backend)?, &common),
        };
        written.map_err(kernel("writing the flow of a health check"))
    }

    /// Removes it.
    pub fn remove(&self, probe: &ProbeFlow) -> Result<(), DatapathError> {
        let backend = self.backend(probe)?;
        let removed = match probe.to.is_ipv4() {
            true => remove(&self.v4, &self.names(probe, &backend)?),
            false => remove(&self.v6, &self.names(probe, &backend)?),
        };
        removed.map_err(kernel("removing the flow of a health check"))
    }

    fn backend(&self, probe: &ProbeFlow) -> Result<Backend, DatapathError> {
        let found = self.backends.get(&probe.backend.0).map_err(kernel("reading a backend"))?;
        found.ok_or_else(|| kernel("reading a backend")(io::Error::from(io::ErrorKind::NotFound)))
    }

    fn names<const W: usize>(&self, probe: &ProbeFlow, backend: &Backend) -> Result<Names<W>, DatapathError> {
        let source = self.sources[usize::from(!probe.to.is_ipv4())];
        names(probe, backend, source).ok_or_else(|| {
            let missing =
                "the load balancer has no source addresses of this family (config: datapath.nat_source4, 6)";
            kernel("writing the flow of a health check")(io::Error::other(missing))
        })
    }
}

fn map<K, V>(pins: &Path, name: &str) -> Result<BatchMap<K, V>, DatapathError>
where
    K: super::records::Record,
    V: super::records::Record,
{
    let opening = || format!("opening table {name} for health checks");
    let data = MapData::from_pin(program::map_pin(pins, name)).map_err(kernel(opening()))?;
    BatchMap::new(data).map_err(kernel(opening()))
}

/// What a probe's packets are named before and after their translation.
struct Names<const W: usize> {
    client: FlowKey<W>,
    backend: FlowKey<W>,
}

impl<const W: usize> Names<W> {
    /// Keys of the entries towards the backend and back.
    fn keys(&self) -> [FlowKey<W>; 2] {
        [self.client, self.backend.reversed()]
    }
}

/// `None` where a source address is needed and there is none.
fn names<const W: usize>(probe: &ProbeFlow, backend: &Backend, source: Option<IpAddr>) -> Option<Names<W>> {
    let protocol = match probe.protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    };
    let client = FlowKey {
        source: narrow(words(probe.from.ip())),
        destination: narrow(words(probe.to.ip())),
        ports: ports(probe.from.port().to_be(), probe.to.port().to_be()),
        protocol: u32::from(protocol),
    };
    let mut translated = client;
    if probe.mode != datapath::Mode::Dsr {
        translated.destination = narrow(backend.address);
        translated.ports = ports(probe.from.port().to_be(), backend.port);
    }
    if probe.mode == datapath::Mode::Nat {
        translated.source = narrow(words(source?));
    }
    Some(Names { client, backend: translated })
}

fn put<const W: usize>(
    flows: &BatchMap<FlowKey<W>, Flow<W>>,
    names: &Names<W>,
    common: &Common,
) -> io::Result<()> {
    let [to_backend, to_client] = names.keys();
    // The way back first: no packet goes where its answer would not be known.
    flows
        .put(&to_client, &Flow::between(&to_client, &names.client.reversed(), Direction::ToClient, common))?;
    flows.put(&to_backend, &Flow::between(&to_backend, &names.backend, Direction::ToBackend, common))
}

fn remove<const W: usize>(flows: &BatchMap<FlowKey<W>, Flow<W>>, names: &Names<W>) -> io::Result<()> {
    flows.delete(&names.keys()).map(drop)
}

/// An address in the words of its family, out of the last ones.
fn narrow<const W: usize>(words: [u32; 4]) -> [u32; W] {
    std::array::from_fn(|i| words[4 - W + i])
}

/// Both as on the wire.
fn ports(source: u16, destination: u16) -> u32 {
    let ([s0, s1], [d0, d1]) = (source.to_ne_bytes(), destination.to_ne_bytes());
    u32::from_ne_bytes([s0, s1, d0, d1])
}

fn mode(mode: datapath::Mode) -> Mode {
    match mode {
        datapath::Mode::Nat => Mode::Nat,
        datapath::Mode::Transparent => Mode::Transparent,
        datapath::Mode::Dsr => Mode::Dsr,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use lb_core::record::Link;

    use super::*;
    use crate::datapath::BackendNumber;

    fn probe(mode: datapath::Mode, to: &str, from: &str) -> ProbeFlow {
        ProbeFlow {
            service: "chat".to_owned(),
            to: to.parse().unwrap(),
            mode,
            protocol: Protocol::Tcp,
            backend: BackendNumber(3),
            from: from.parse().unwrap(),
            back: Link::default(),
        }
    }

    fn backend(address: &str) -> Backend {
        let address: SocketAddr = address.parse().unwrap();
        Backend { address: words(address.ip()), port: address.port().to_be(), ..Backend::default() }
    }

    fn bytes<const W: usize>(words: [u32; W]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn each_mode_names_what_the_backend_sees() {
        use datapath::Mode::{Dsr, Nat, Transparent};
        let ours = Some("10.9.0.0".parse().unwrap());
        for (mode, source, destination, port) in [
            (Nat, [10, 9, 0, 0], [10, 1, 0, 1], 6379_u16),
            (Transparent, [169, 254, 77, 1], [10, 1, 0, 1], 6379),
            (Dsr, [169, 254, 77, 1], [192, 0, 2, 1], 80),
        ] {
            let probe = probe(mode, "192.0.2.1:80", "169.254.77.1:1024");
            let names: Names<1> = names(&probe, &backend("10.1.0.1:6379"), ours).unwrap();
            assert_eq!(bytes(names.client.source), [169, 254, 77, 1]);
            assert_eq!(bytes(names.client.destination), [192, 0, 2, 1]);
            assert_eq!(names.client.ports.to_ne_bytes(), [4, 0, 0, 80]);
            assert_eq!(bytes(names.backend.source), source, "{mode:?}");
            assert_eq!(bytes(names.backend.destination), destination, "{mode:?}");
            let [p0, p1] = port.to_be_bytes();
            assert_eq!(names.backend.ports.to_ne_bytes(), [4, 0, p0, p1], "{mode:?}");
            // The answers' name is what the site will send.
            assert_eq!(bytes(names.keys()[1].source), destination, "{mode:?}");
        }
    }

    #[test]
    fn ipv6_and_the_want_of_a_source() {
        let probe = probe(datapath::Mode::Nat, "[2001:db8::1]:80", "[fd77::1]:1025");
        let backend = backend("[fd00:1::1]:80");
        assert!(names::<4>(&probe, &backend, None).is_none());
        let found: Names<4> = names(&probe, &backend, Some("fd00:9::".parse().unwrap())).unwrap();
        assert_eq!(bytes(found.backend.destination)[..6], [0xfd, 0, 0, 1, 0, 0]);
        assert_eq!(bytes(found.backend.source)[..6], [0xfd, 0, 0, 9, 0, 0]);
    }
}
