//! Taking the loaded object's maps, each as the type that it is used as.

use std::os::fd::AsFd;

use aya::Ebpf;
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use lb_core::record::{LAYOUT_VERSION, NatSource, Traffic};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::AtomicU64;

use super::mapped::MappedArray;
use super::program::kernel;
use super::records::to_bytes;
use super::shared::SharedTables;
use super::sites::Locations;
use super::tables::{Backends, Names, ServicesV4, ServicesV6, words};
use crate::config;
use crate::datapath::DatapathError;

/// Backends that the tables have room for.
pub const BACKENDS_MOST: u32 = 4096;
/// Sites that the tables have room for.
pub const SITES_MOST: u32 = 256;
/// Maglev rings that the tables have room for.
pub const RINGS_MOST: u32 = 64;

/// Places of each ring.
pub const RING_PLACES: u32 = 16_381;

/// A backend's packets and bytes on one CPU.
pub type TrafficBytes = [u8; size_of::<Traffic>()];

/// The maps that the plan changes.
pub struct Maps {
    pub backends: Backends,
    pub backend_names: Names,
    pub site_names: Names,
    pub rings: MappedArray<AtomicU64>,
    pub services_v4: ServicesV4,
    pub services_v6: ServicesV6,
}

/// The maps that are read or shared.
pub struct Parts {
    pub shared: SharedTables,
    pub locations: Locations,
    pub capture: RingBuf<MapData>,
    pub reasons: PerCpuArray<MapData, u64>,
    pub traffic: PerCpuArray<MapData, TrafficBytes>,
}

/// Takes all maps out of a loaded object and checks the layout that they were made with.
pub fn take(ebpf: &mut Ebpf, config: &config::Datapath) -> Result<(Maps, Parts), DatapathError> {
    check_layout(ebpf)?;
    write_nat_sources(ebpf, config)?;
    let backends = take_map(ebpf, "BACKENDS")?;
    let holds = take_map(ebpf, "HOLDS")?;
    let shared = SharedTables::new(data(&backends), data(&holds), BACKENDS_MOST)
        .map_err(kernel("mapping the tables into memory"))?;
    let rings = take_map(ebpf, "RINGS")?;
    let rings = MappedArray::new(data(&rings).fd().as_fd(), RINGS_MOST * RING_PLACES)
        .map_err(kernel("mapping the Maglev rings into memory"))?;
    let maps = Maps {
        backends: typed("BACKENDS", backends)?,
        backend_names: take_typed(ebpf, "BACKEND_NAMES")?,
        site_names: take_typed(ebpf, "SITE_NAMES")?,
        rings,
        services_v4: take_typed(ebpf, "SERVICES_V4")?,
        services_v6: take_typed(ebpf, "SERVICES_V6")?,
    };
    let parts = Parts {
        shared,
        locations: take_typed(ebpf, "LOCATIONS")?,
        capture: take_typed(ebpf, "CAPTURE")?,
        reasons: take_typed(ebpf, "REASONS")?,
        traffic: take_typed(ebpf, "TRAFFIC")?,
    };
    Ok((maps, parts))
}

/// Refuses tables whose records are laid out otherwise than this daemon's.
fn check_layout(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    let mut layout: Array<MapData, u64> = take_typed(ebpf, "LAYOUT")?;
    match layout.get(&0, 0).map_err(kernel("reading the layout version"))? {
        0 => layout.set(0, LAYOUT_VERSION, 0).map_err(kernel("writing the layout version")),
        LAYOUT_VERSION => Ok(()),
        found => Err(kernel(format!(
            "the pinned tables have layout {found}, this daemon needs {LAYOUT_VERSION}; drain, stop the traffic \
             and remove the pins (config: datapath.pin_path)"
        ))(io::Error::from(ErrorKind::Unsupported))),
    }
}

fn write_nat_sources(ebpf: &mut Ebpf, config: &config::Datapath) -> Result<(), DatapathError> {
    if let Some(prefix) = config.nat_source4 {
        let [_, _, _, base] = words(prefix.address().into());
        let host_mask =
            u32::from(Ipv4Addr::from_bits(u32::MAX.checked_shr(prefix.length().into()).unwrap_or(0)));
        let source = NatSource { base: [base], host_mask: [host_mask.to_be()] };
        let mut map: Array<MapData, [u8; size_of::<NatSource<1>>()]> = take_typed(ebpf, "NAT_V4")?;
        map.set(0, to_bytes(&source), 0).map_err(kernel("writing the IPv4 NAT source"))?;
    }
    if let Some(prefix) = config.nat_source6 {
        let host_bits = u128::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
        let source = NatSource {
            base: words(prefix.address().into()),
            host_mask: words(Ipv6Addr::from_bits(host_bits).into()),
        };
        let mut map: Array<MapData, [u8; size_of::<NatSource<4>>()]> = take_typed(ebpf, "NAT_V6")?;
        map.set(0, to_bytes(&source), 0).map_err(kernel("writing the IPv6 NAT source"))?;
    }
    Ok(())
}

fn take_typed<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<T, DatapathError> {
    typed(name, take_map(ebpf, name)?)
}

fn typed<T: TryFrom<Map, Error = MapError>>(name: &str, map: Map) -> Result<T, DatapathError> {
    T::try_from(map).map_err(kernel(format!("table {name}")))
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map, DatapathError> {
    ebpf.take_map(name)
        .ok_or_else(|| kernel(format!("looking for table {name}"))(io::Error::from(ErrorKind::NotFound)))
}

fn data(map: &Map) -> &MapData {
    match map {
        Map::Array(data) => data,
        _ => unreachable!("mapped tables are declared as arrays"),
    }
}
