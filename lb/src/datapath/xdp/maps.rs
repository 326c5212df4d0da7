//! Taking the loaded object's maps, each as the type that it is used as.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use lb_core::record::{LAYOUT_VERSION, NatSource};

use super::mapped::MappedArray;
use super::peers;
use super::program::{self, kernel};
use super::records::to_bytes;
use super::settings::SettingsTable;
use super::shared::SharedTables;
use super::sites::Locations;
use super::tables::{Backends, Names, ServiceMaps, TrafficTable, words};
use super::ticks::TickClock;
use crate::config::{self, Limits};
use crate::datapath::DatapathError;

/// New flows are counted in windows of this length: bursts within one are let through.
const WINDOW: Duration = Duration::from_millis(100);

/// The maps that the plan changes.
pub struct Maps {
    pub backends: Backends,
    pub backend_names: Names,
    pub site_names: Names,
    pub services: ServiceMaps,
}

/// The maps that are read or shared.
pub struct Parts {
    pub shared: SharedTables,
    pub locations: Locations,
    pub capture: RingBuf<MapData>,
    pub reasons: PerCpuArray<MapData, u64>,
    pub traffic: TrafficTable,
}

/// Takes all maps out of a loaded object. Their layout was checked before they were loaded.
pub fn take(ebpf: &mut Ebpf, config: &config::Datapath) -> Result<(Maps, Parts), DatapathError> {
    let mut layout: Array<MapData, u64> = take_typed(ebpf, "LAYOUT")?;
    layout.set(0, LAYOUT_VERSION, 0).map_err(kernel("writing the layout version"))?;
    write_nat_sources(ebpf, config)?;
    write_settings(ebpf, &config.limits)?;
    let peered = take_map(ebpf, "PEERED")?;
    let peered = MappedArray::whole(data(&peered)).map_err(kernel("mapping the table of interfaces"))?;
    peers::mark(&peered, &config.interfaces)?;
    let backends = take_map(ebpf, "BACKENDS")?;
    let holds = take_map(ebpf, "HOLDS")?;
    let shared =
        SharedTables::new(data(&backends), data(&holds)).map_err(kernel("mapping the tables into memory"))?;
    let mapped =
        |map: &Map| MappedArray::whole(data(map)).map_err(kernel("mapping the Maglev rings into memory"));
    let services_v4 = take_map(ebpf, "SERVICES_V4")?;
    let services = ServiceMaps {
        // Half of the elements are for virtual addresses that answer echo.
        most: data_of(&services_v4)?.info().map_err(kernel("looking at a table"))?.max_entries() / 2,
        v4: typed("SERVICES_V4", services_v4)?,
        v6: take_typed(ebpf, "SERVICES_V6")?,
        rings: mapped(&take_map(ebpf, "RINGS")?)?,
        members: mapped(&take_map(ebpf, "MEMBERS")?)?,
        traffic: typed("TRAFFIC", Map::PerCpuArray(pinned(&config.pin_path, "TRAFFIC")?))?,
    };
    let maps = Maps {
        backends: typed("BACKENDS", backends)?,
        backend_names: names(ebpf, &config.pin_path, "BACKEND_NAMES")?,
        site_names: names(ebpf, &config.pin_path, "SITE_NAMES")?,
        services,
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

/// Another handle on a pinned map.
fn pinned(pins: &Path, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(program::map_pin(pins, name))
        .map_err(kernel(format!("opening the pinned table {name}")))
}

fn names(ebpf: &mut Ebpf, pins: &Path, name: &str) -> Result<Names, DatapathError> {
    let array = take_typed(ebpf, name)?;
    Names::new(array, pinned(pins, name)?).map_err(kernel(format!("table {name}")))
}

/// Bounds of new flows. Nothing is sampled until somebody asks.
fn write_settings(ebpf: &mut Ebpf, limits: &Limits) -> Result<(), DatapathError> {
    let tick = TickClock::new().map_err(kernel("finding out how long the kernel's ticks are"))?.tick();
    let ticks = (WINDOW.as_nanos() / tick.as_nanos().max(1)).clamp(1, 1000);
    let window = tick.as_secs_f64() * ticks as f64;
    // Not less than one, or nobody would ever be let in.
    let in_window = |per_second: u32| (f64::from(per_second) * window).ceil().max(1.0) as u32;
    let settings = take_map(ebpf, "SETTINGS")?;
    let settings = SettingsTable::new(data(&settings)).map_err(kernel("mapping the settings into memory"))?;
    settings.set_sample(0);
    settings.set_bounds(
        u32::try_from(ticks).expect("clamped"),
        in_window(limits.new_flows_per_second_per_cpu),
        in_window(limits.new_flows_per_second_per_prefix),
    );
    Ok(())
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

fn data_of(map: &Map) -> Result<&MapData, DatapathError> {
    match map {
        Map::HashMap(data) => Ok(data),
        _ => Err(kernel("looking at a table")(io::Error::from(ErrorKind::InvalidData))),
    }
}
