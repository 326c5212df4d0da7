//! The flow tables as user space reads them, and the flows in them as an operator sees them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use aya::maps::MapData;
use lb_core::decide::{TCP, UDP};
use lb_core::flow::State;
use lb_core::record::Backend;
use lb_core::{Direction, Flow, FlowKey, Mode};

use super::batch::BatchMap;
use super::expiry::verdict::{Half, Standing, Ticks};
use super::program::kernel;
use super::records::Record;
use super::ticks::TickClock;
use crate::datapath::observe::{FlowFilter, FlowList, FlowRow, FlowState};
use crate::datapath::{BackendNumber, DatapathError, Protocol};

/// Entries read with one system call.
const CHUNK: usize = 4096;

/// Flows by how their packets are named.
pub type FlowMap<const W: usize> = BatchMap<FlowKey<W>, Flow<W>>;

/// The flow tables of an address family.
pub struct FamilyFlows<const W: usize> {
    /// Confirmed by the client.
    pub established: FlowMap<W>,
    /// Not yet.
    pub newcomers: FlowMap<W>,
}

/// All flow tables, and the backends that flows refer to.
pub struct FlowMaps {
    /// IPv4.
    pub v4: FamilyFlows<1>,
    /// IPv6.
    pub v6: FamilyFlows<4>,
    /// By number.
    pub backends: BatchMap<u32, Backend>,
}

impl FlowMaps {
    /// Opens the tables; `open` opens one by name.
    pub fn open(open: impl Fn(&str) -> Result<MapData, DatapathError>) -> Result<Self, DatapathError> {
        Ok(Self {
            v4: FamilyFlows {
                established: table(&open, "FLOWS_V4")?,
                newcomers: table(&open, "NEWCOMERS_V4")?,
            },
            v6: FamilyFlows {
                established: table(&open, "FLOWS_V6")?,
                newcomers: table(&open, "NEWCOMERS_V6")?,
            },
            backends: table(&open, "BACKENDS")?,
        })
    }

    /// The flows that a filter lets through.
    pub fn list(&self, clock: &TickClock, filter: &FlowFilter) -> io::Result<FlowList> {
        let mut listing =
            Listing { filter, now: clock.now()?, tick: clock.tick(), list: FlowList::default() };
        listing.add(&self.v4.established, Standing::Established)?;
        listing.add(&self.v6.established, Standing::Established)?;
        listing.add(&self.v4.newcomers, Standing::Newcomer)?;
        listing.add(&self.v6.newcomers, Standing::Newcomer)?;
        Ok(listing.list)
    }
}

fn table<K: Record, V: Record>(
    open: impl Fn(&str) -> Result<MapData, DatapathError>,
    name: &str,
) -> Result<BatchMap<K, V>, DatapathError> {
    BatchMap::new(open(name)?).map_err(kernel(format!("looking at table {name}")))
}

/// What an entry says, for the decision about its end.
pub fn half<const W: usize>(flow: &Flow<W>) -> Half {
    let state = flow.state();
    Half {
        seen: Ticks(flow.seen.load(std::sync::atomic::Ordering::Relaxed)),
        finished: state.has(State::FINISHED),
        reset: state.has(State::RESET),
    }
}

/// The other entry of a flow, if there is one that is its partner.
pub fn partner<const W: usize>(
    map: &FlowMap<W>,
    key: &FlowKey<W>,
    flow: &Flow<W>,
) -> io::Result<Option<(FlowKey<W>, Flow<W>)>> {
    let other = flow.answers(key.protocol);
    let found = map.get(&other)?;
    // One that answers somebody else belongs to a later flow of the same name.
    Ok(found.filter(|found| found.answers(key.protocol) == *key).map(|found| (other, found)))
}

struct Listing<'a> {
    filter: &'a FlowFilter,
    now: u64,
    tick: Duration,
    list: FlowList,
}

impl Listing<'_> {
    fn add<const W: usize>(&mut self, map: &FlowMap<W>, standing: Standing) -> io::Result<()> {
        let mut chunks = map.chunks(CHUNK);
        while !self.list.is_cut {
            let Some(chunk) = chunks.next_chunk()? else { return Ok(()) };
            for (key, flow) in chunk {
                if flow.kind.direction() != Direction::ToBackend {
                    continue;
                }
                let Some(mut row) = row(key, flow).filter(|row| lets_through(self.filter, row)) else {
                    continue;
                };
                if self.list.flows.len() >= self.filter.limit {
                    self.list.is_cut = true;
                    break;
                }
                let reply = if flow.kind.mode() == Mode::Dsr { None } else { partner(map, key, flow)? };
                let halves = [Some(half(flow)), reply.map(|(_, reply)| half(&reply))];
                row.state = state(standing, halves);
                let seen = halves.iter().flatten().map(|half| half.seen.0).max().unwrap_or(self.now);
                let ticks = self.now.saturating_sub(seen);
                row.idle = self.tick.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX));
                self.list.flows.push(row);
            }
        }
        Ok(())
    }
}

/// What the entry towards the backend says by itself; `None` for what no service has.
fn row<const W: usize>(key: &FlowKey<W>, flow: &Flow<W>) -> Option<FlowRow> {
    let protocol = match key.protocol {
        protocol if protocol == u32::from(TCP) => Protocol::Tcp,
        protocol if protocol == u32::from(UDP) => Protocol::Udp,
        _ => return None,
    };
    let [client_port, service_port] = ports(key.ports);
    let [source_port, _] = ports(flow.ports);
    Some(FlowRow {
        protocol,
        client: SocketAddr::new(ip(key.source)?, client_port),
        service: SocketAddr::new(ip(key.destination)?, service_port),
        backend: BackendNumber(flow.backend),
        mode: flow.kind.mode(),
        source: SocketAddr::new(ip(flow.source)?, source_port),
        state: FlowState::New,
        idle: Duration::ZERO,
    })
}

fn lets_through(filter: &FlowFilter, row: &FlowRow) -> bool {
    filter.client.is_none_or(|network| network.contains(row.client.ip()))
        && filter.service.is_none_or(|service| service == (row.service, row.protocol))
        && filter.backend.is_none_or(|backend| backend == row.backend)
        && filter.protocol.is_none_or(|protocol| protocol == row.protocol)
}

fn state(standing: Standing, halves: [Option<Half>; 2]) -> FlowState {
    let known = || halves.iter().flatten();
    if known().any(|half| half.reset) {
        FlowState::Reset
    } else if standing == Standing::Newcomer {
        FlowState::New
    } else if known().all(|half| half.finished) {
        FlowState::Closed
    } else if known().any(|half| half.finished) {
        FlowState::HalfClosed
    } else {
        FlowState::Established
    }
}

/// Source and destination port out of the word that has both as on the wire.
fn ports(ports: u32) -> [u16; 2] {
    let [a, b, c, d] = ports.to_ne_bytes();
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}

/// An address out of its words.
fn ip<const W: usize>(words: [u32; W]) -> Option<IpAddr> {
    match *words.as_slice() {
        [word] => Some(Ipv4Addr::from(word.to_ne_bytes()).into()),
        [a, b, c, d] => {
            let mut octets = [0; 16];
            for (to, word) in octets.chunks_exact_mut(4).zip([a, b, c, d]) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "flows_tests.rs"]
pub(in crate::datapath::xdp) mod tests;
