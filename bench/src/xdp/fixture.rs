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
use lb_core::maglev::{Candidate, RING_SIZE, Turn, identity, populate};
use lb_core::record::{Backend, LAYOUT_VERSION, Link, Location, NatSource, Service, ServiceKey};
use lb_core::{Gate, GateWord, Reason, Slot};

use super::PINS;
use super::case::{Case, Family, Kind, Mode, Protocol};
use super::packets;

/// `BPF_PROG_TEST_RUN` lets packets arrive on the loopback interface; a location behind it makes the verdict XDP_TX.
const INTERFACE: u32 = 1;
/// Hardware address of the site, and of the load balancer towards it.
pub const SITE_LINK: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 0xa], [2, 0, 0, 0, 1, 0xa]);

/// Backends behind the service.
const BACKENDS: u32 = 16;
const SITE: u32 = 0;
const RING: u32 = 0;

/// NAT addresses: 256, so that ports do not become scarce with a million flows.
const NAT_HOSTS: u32 = 0xff;

/// A table that fills evenly needs room beside its entries; an LRU table twice as much.
const ROOM: u32 = 2;
/// Entries of a flow: one for each direction.
const DIRECTIONS: u32 = 2;
const UNUSED: u32 = 1024;

/// The loaded program.
pub struct Subject {
    ebpf: Ebpf,
    reasons: PerCpuArray<MapData, u64>,
}

impl Subject {
    /// Loads the program with a service in this mode, and tables for this many flows.
    pub fn load(mode: Mode, family: Family, capacity: u32) -> Result<Self> {
        let pins = pins()?;
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&pins);
        for (table, of) in [("FLOWS_V4", Family::V4), ("FLOWS_V6", Family::V6)] {
            let entries = if of == family { capacity * DIRECTIONS * ROOM } else { UNUSED };
            loader.map_max_entries(table, entries);
        }
        let mut ebpf = loader.load(program::OBJECT).context("cannot load the XDP program's tables")?;
        // The tables live as long as the program; their names are not needed.
        std::fs::remove_dir_all(&pins).with_context(|| format!("cannot remove {}", pins.display()))?;
        program::program(&mut ebpf)?.load().context("the kernel refuses the XDP program")?;
        fill(&mut ebpf, mode, family)?;
        let reasons = ebpf.take_map("REASONS").context("the program has no REASONS")?.try_into()?;
        Ok(Self { ebpf, reasons })
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
    match (case.kind, case.protocol) {
        (Kind::Hit | Kind::Syn, _) | (Kind::Miss, Protocol::Udp) => Reason::ToBackend,
        (Kind::Miss, Protocol::Tcp) => Reason::NoFlow,
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
    let Mode::Nat = mode;
    array::<u64>(ebpf, "LAYOUT")?.set(0, LAYOUT_VERSION, 0)?;
    let (neighbour, own) = SITE_LINK;
    let location = Location { link: Link::new(INTERFACE, neighbour, own) };
    set::<{ size_of::<Location>() }, _>(ebpf, "LOCATIONS", SITE, &location)?;
    for number in 0..BACKENDS {
        set::<{ size_of::<Backend>() }, _>(ebpf, "BACKENDS", number, &backend(family, number))?;
    }
    fill_ring(ebpf)?;
    match family {
        Family::V4 => fill_family::<1, { size_of::<ServiceKey<1>>() }, { size_of::<NatSource<1>>() }>(
            ebpf,
            family,
            ["SERVICES_V4", "NAT_V4"],
        ),
        Family::V6 => fill_family::<4, { size_of::<ServiceKey<4>>() }, { size_of::<NatSource<4>>() }>(
            ebpf,
            family,
            ["SERVICES_V6", "NAT_V6"],
        ),
    }
}

fn backend(family: Family, number: u32) -> Backend {
    let host = number as u16 + 1;
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(10, 1, 0, host as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, host).into(),
    };
    let record = Backend { address: words(address), port: 8080_u16.to_be(), ..Backend::default() };
    record.word.store(GateWord::new(Gate::Forward, Slot::A, 1).bits(), Relaxed);
    record.sites.store([SITE, SITE]);
    record
}

fn fill_ring(ebpf: &mut Ebpf) -> Result<()> {
    let candidates: Vec<Candidate> = (0..BACKENDS)
        .map(|number| Candidate { identity: identity(&number.to_string()), number, weight: 1 })
        .collect();
    let mut places = vec![0; RING_SIZE as usize];
    populate(&mut places, &candidates, &mut vec![Turn::default(); candidates.len()]);
    let mut rings = array::<u64>(ebpf, "RINGS")?;
    for (place, number) in (RING * RING_SIZE..).zip(places) {
        rings.set(place, u64::from(number), 0)?;
    }
    Ok(())
}

fn fill_family<const W: usize, const KEY: usize, const NAT: usize>(
    ebpf: &mut Ebpf,
    family: Family,
    [services, nat]: [&str; 2],
) -> Result<()> {
    let address = packets::service(family);
    let mut map: HashMap<_, [u8; KEY], [u8; size_of::<Service>()]> = map(ebpf, services)?.try_into()?;
    for protocol in [lb_core::decide::TCP, lb_core::decide::UDP] {
        let key = ServiceKey::<W> {
            address: narrow(words(address.ip())),
            port: address.port().to_be(),
            protocol: u16::from(protocol),
        };
        map.insert(to_bytes::<KEY, _>(&key), to_bytes(&Service { number: 0, ring: RING }), 0)?;
    }
    let base: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(10, 9, 0, 0).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 0).into(),
    };
    let mut host_mask = [0; W];
    host_mask[W - 1] = NAT_HOSTS.to_be();
    let source = NatSource::<W> { base: narrow(words(base)), host_mask };
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
