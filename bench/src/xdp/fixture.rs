//! The program under test with its tables filled. The only file here that knows the tables and their records.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::ProgramFd;
use aya::{Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions};
use lb::datapath::xdp::program;
use lb::datapath::xdp::records::{Record, to_bytes};
use lb_core::maglev::{Candidate, Turn, identity, populate, ring_size};
use lb_core::record::{
    Backend, LAYOUT_VERSION, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions, Settings,
};
use lb_core::{Flow, FlowKey, Gate, GateWord, Reason, Slot};

use super::PINS;
use super::case::{Case, Family, Feature, Kind, Mode};
use super::packets;

/// `BPF_PROG_TEST_RUN` lets packets arrive on the loopback interface; a location behind it makes the verdict XDP_TX.
const INTERFACE: u32 = 1;
/// Hardware address of the site, and of the load balancer towards it.
pub const SITE_LINK: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 0xa], [2, 0, 0, 0, 1, 0xa]);

/// Backends behind the service.
const BACKENDS: u32 = 16;
const SITE: u32 = 0;

/// NAT addresses: 256, so that ports do not become scarce with a million flows.
const NAT_HOSTS: u32 = 0xff;

/// Entries of a flow at most: one for each direction.
const DIRECTIONS: u32 = 2;

/// The loaded program.
pub struct Subject {
    ebpf: Ebpf,
    reasons: PerCpuArray<MapData, u64>,
    mode: Mode,
    family: Family,
}

impl Subject {
    /// Loads the program with a service in this mode, and tables of the usual size or for so many flows.
    pub fn load(mode: Mode, family: Family, capacity: Option<u32>) -> Result<Self> {
        let pins = pins()?;
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&pins);
        if let Some(capacity) = capacity {
            loader.map_max_entries(established(family), capacity * DIRECTIONS);
        }
        let mut ebpf = loader.load(program::OBJECT).context("cannot load the XDP program's tables")?;
        // The tables live as long as the program; their names are not needed.
        std::fs::remove_dir_all(&pins).with_context(|| format!("cannot remove {}", pins.display()))?;
        program::program(&mut ebpf)?.load().context("the kernel refuses the XDP program")?;
        fill(&mut ebpf, mode, family)?;
        let reasons = ebpf.take_map("REASONS").context("the program has no REASONS")?.try_into()?;
        Ok(Self { ebpf, reasons, mode, family })
    }

    /// Switches a feature on, or all of them off.
    pub fn switch(&mut self, feature: Option<Feature>) -> Result<()> {
        let mut settings = Settings::default();
        let mut location = location(self.mode, self.family);
        match feature {
            None => {}
            Some(Feature::Sampling) => settings.sample = 1000,
            Some(Feature::PathMtu) => location.mtu = 1500,
            Some(Feature::FlowLimits) => {
                settings.window = 100;
                settings.new_flows_per_cpu = u32::MAX;
                settings.new_flows_per_prefix = u32::MAX;
            }
        }
        set::<{ size_of::<Settings>() }, _>(&mut self.ebpf, "SETTINGS", 0, &settings)?;
        set::<{ size_of::<Location>() }, _>(&mut self.ebpf, "LOCATIONS", SITE, &location)
    }

    /// Entries of flows that are not established.
    pub fn newcomers(&mut self) -> Result<usize> {
        fn count<const KEY: usize, const FLOW: usize>(ebpf: &mut Ebpf, name: &str) -> Result<usize> {
            let map: HashMap<_, [u8; KEY], [u8; FLOW]> = map(ebpf, name)?.try_into()?;
            Ok(map.keys().count())
        }
        match self.family {
            Family::V4 => {
                count::<{ size_of::<FlowKey<1>>() }, { size_of::<Flow<1>>() }>(&mut self.ebpf, "NEWCOMERS_V4")
            }
            Family::V6 => {
                count::<{ size_of::<FlowKey<4>>() }, { size_of::<Flow<4>>() }>(&mut self.ebpf, "NEWCOMERS_V6")
            }
        }
    }

    /// The program, to be called by the wrapper.
    pub fn fd(&mut self) -> Result<ProgramFd> {
        Ok(program::program(&mut self.ebpf)?.fd()?.try_clone()?)
    }

    /// Sends one packet through the program; the packet as it left, or nothing where it was not sent on.
    pub fn send(&mut self, packet: &[u8]) -> Result<Option<Vec<u8>>> {
        const XDP_TX: u32 = 3;
        let mut out = vec![0; 256];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program::program(&mut self.ebpf)?.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value == XDP_TX).then_some(out))
    }

    /// Packets that ended with a reason, since the program was loaded.
    pub fn counted(&self, reason: Reason) -> Result<u64> {
        Ok(self.reasons.get(&(reason as u32), 0)?.iter().sum())
    }
}

/// The reason that every packet of a case must end with, else it was not what was measured.
pub fn expected(case: &Case) -> Reason {
    let known = matches!(case.kind, Kind::Hit | Kind::HitShuffled);
    if known || case.opens_flows() { Reason::ToBackend } else { Reason::NoFlow }
}

/// The table of established flows.
fn established(family: Family) -> &'static str {
    match family {
        Family::V4 => "FLOWS_V4",
        Family::V6 => "FLOWS_V6",
    }
}

/// A folder for the pins of one load.
fn pins() -> Result<PathBuf> {
    static LOADS: AtomicU32 = AtomicU32::new(0);
    let name = format!("drover-bench-{}-{}", std::process::id(), LOADS.fetch_add(1, Relaxed));
    let pins = PathBuf::from(PINS).join(name);
    std::fs::create_dir(&pins).with_context(|| format!("cannot make {}", pins.display()))?;
    Ok(pins)
}

fn fill(ebpf: &mut Ebpf, mode: Mode, family: Family) -> Result<()> {
    array::<u64>(ebpf, "LAYOUT")?.set(0, LAYOUT_VERSION, 0)?;
    set::<{ size_of::<Location>() }, _>(ebpf, "LOCATIONS", SITE, &location(mode, family))?;
    for number in 0..BACKENDS {
        set::<{ size_of::<Backend>() }, _>(ebpf, "BACKENDS", number, &backend(family, number))?;
    }
    let service = Service { number: 0, ring: 0, places: fill_ring(ebpf)?, options: options(mode) };
    match family {
        Family::V4 => fill_family::<1, { size_of::<ServiceKey<1>>() }, { size_of::<NatSource<1>>() }>(
            ebpf,
            family,
            &service,
            ["SERVICES_V4", "NAT_V4"],
        ),
        Family::V6 => fill_family::<4, { size_of::<ServiceKey<4>>() }, { size_of::<NatSource<4>>() }>(
            ebpf,
            family,
            &service,
            ["SERVICES_V6", "NAT_V6"],
        ),
    }
}

fn options(mode: Mode) -> ServiceOptions {
    let mode = match mode {
        Mode::Nat => lb_core::Mode::Nat,
        Mode::Transparent => lb_core::Mode::Transparent,
        Mode::Dsr => lb_core::Mode::Dsr,
    };
    ServiceOptions::new(mode, false)
}

fn location(mode: Mode, family: Family) -> Location {
    let (neighbour, own) = SITE_LINK;
    let link = Link::new(INTERFACE, neighbour, own);
    let [ours, theirs] = [254, 1].map(|host| words(address(family, 2, host)));
    match (mode, family) {
        (Mode::Nat | Mode::Transparent, _) => Location::plain(link, 0),
        (Mode::Dsr, Family::V4) => Location::tunnel4(link, 0, ours[3], theirs[3]),
        (Mode::Dsr, Family::V6) => Location::tunnel6(link, 0, ours, theirs),
    }
}

/// A host of one of the fixture's networks.
fn address(family: Family, network: u16, host: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, network as u8, 0, host as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, network, 0, 0, 0, 0, 0, host).into(),
    }
}

fn backend(family: Family, number: u32) -> Backend {
    let address = words(address(family, 1, number as u16 + 1));
    let record = Backend { address, port: 8080_u16.to_be(), ..Backend::default() };
    record.word.store(GateWord::new(Gate::Forward, Slot::A, 1).bits(), Relaxed);
    record.sites.store([SITE, SITE]);
    record
}

/// Fills the first ring; how many places it has.
fn fill_ring(ebpf: &mut Ebpf) -> Result<u32> {
    let candidates: Vec<Candidate> = (0..BACKENDS)
        .map(|number| Candidate { identity: identity(&number.to_string()), number, weight: 1 })
        .collect();
    let mut places = vec![0; ring_size(candidates.len()) as usize];
    populate(&mut places, &candidates, &mut vec![Turn::default(); candidates.len()]);
    let mut rings = array::<u64>(ebpf, "RINGS")?;
    for (index, number) in (0..).zip(&places) {
        rings.set(index, Place::new(*number, *number).bits(), 0)?;
    }
    Ok(places.len() as u32)
}

fn fill_family<const W: usize, const KEY: usize, const NAT: usize>(
    ebpf: &mut Ebpf,
    family: Family,
    service: &Service,
    [services, nat]: [&str; 2],
) -> Result<()> {
    let virtual_address = packets::service(family);
    let mut map: HashMap<_, [u8; KEY], [u8; size_of::<Service>()]> = map(ebpf, services)?.try_into()?;
    for protocol in [lb_core::decide::TCP, lb_core::decide::UDP] {
        let key = ServiceKey::<W> {
            address: narrow(words(virtual_address.ip())),
            port: virtual_address.port().to_be(),
            protocol: u16::from(protocol),
        };
        map.insert(to_bytes::<KEY, _>(&key), to_bytes(service), 0)?;
    }
    let mut host_mask = [0; W];
    host_mask[W - 1] = NAT_HOSTS.to_be();
    let source = NatSource::<W> { base: narrow(words(address(family, 9, 0))), host_mask };
    set::<NAT, _>(ebpf, nat, 0, &source)
}

/// An address as the tables have it: words as on the wire, IPv4 in the last one.
fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(v4) => [0, 0, 0, u32::from(v4).to_be()],
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            std::array::from_fn(|i| ((bits >> (96 - 32 * i)) as u32).to_be())
        }
    }
}

fn narrow<const W: usize>(words: [u32; 4]) -> [u32; W] {
    std::array::from_fn(|i| words[4 - W + i])
}

fn map<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut aya::maps::Map> {
    match ebpf.map_mut(name) {
        Some(map) => Ok(map),
        None => bail!("the program has no table {name}"),
    }
}

fn array<'e, V: Pod>(ebpf: &'e mut Ebpf, name: &str) -> Result<Array<&'e mut MapData, V>> {
    Ok(map(ebpf, name)?.try_into()?)
}

fn set<const N: usize, T: Record>(ebpf: &mut Ebpf, name: &str, index: u32, record: &T) -> Result<()> {
    Ok(array::<[u8; N]>(ebpf, name)?.set(index, to_bytes(record), 0)?)
}
