//! Loading the programs over the pinned tables. Pins outlive the daemon: packets keep flowing without it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::{Program, ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use lb_core::record::LAYOUT_VERSION;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::log;
use crate::config::Limits;
use crate::datapath::DatapathError;

/// The programs and the definitions of their tables, for those who load them otherwise (benchmarks).
pub static OBJECT: &[u8] = include_bytes_aligned!(env!("DROVER_EBPF_OBJECT"));

const BPFFS: &str = "/sys/fs/bpf";

/// Loads the XDP program over the maps pinned below `pins`, making those that are missing in their usual sizes.
pub fn load(pins: &Path) -> Result<Ebpf, DatapathError> {
    let mut ebpf = prepare(pins, &Limits::default())?;
    program(&mut ebpf)?.load().map_err(kernel("loading the XDP program into the kernel"))?;
    Ok(ebpf)
}

/// Opens the maps pinned below `pins`, making those that are missing as large as `limits` say. The programs are not
/// in the kernel yet; they get there only while all of the maps are still open.
pub fn prepare(pins: &Path, limits: &Limits) -> Result<Ebpf, DatapathError> {
    mount_bpffs(pins)?;
    check_layout(pins)?;
    let folder = maps_folder(pins);
    fs::create_dir_all(&folder).map_err(kernel(format!("making {}", pins.display())))?;
    let mut loader = EbpfLoader::new();
    let log_level = log::level();
    loader.default_map_pin_directory(&folder).override_global(log::LEVEL, &log_level, true);
    for (name, size) in sizes(limits) {
        loader.map_max_entries(name, size_to_use(pins, name, size));
    }
    let loading = format!("loading the programs over the tables pinned at {}", pins.display());
    loader.load(OBJECT).map_err(kernel(loading))
}

/// The XDP program.
pub fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, DatapathError> {
    named(ebpf, "drover")
}

/// The program for traffic control; not loaded into the kernel before it is needed.
pub fn classifier(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    named(ebpf, "drover_tc")
}

fn named<'e, P>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P, DatapathError>
where
    &'e mut P: TryFrom<&'e mut Program, Error = ProgramError>,
{
    let missing =
        || kernel(format!("looking for {name} in its object"))(io::Error::from(ErrorKind::NotFound));
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(kernel(format!("looking at the program {name}")))
}

/// Elements of the tables whose size is configured.
fn sizes(limits: &Limits) -> [(&'static str, u32); 15] {
    // Both directions of a flow have an entry.
    let (flows, newcomers) = (limits.flows.saturating_mul(2), limits.newcomers.saturating_mul(2));
    // A virtual address that answers echo has one.
    let services = limits.services.saturating_mul(2);
    [
        ("FLOWS_V4", flows),
        ("FLOWS_V6", flows),
        ("NEWCOMERS_V4", newcomers),
        ("NEWCOMERS_V6", newcomers),
        ("SERVICES_V4", services),
        ("SERVICES_V6", services),
        ("BACKENDS", limits.backends),
        ("BACKEND_NAMES", limits.backends),
        ("HOLDS", limits.backends),
        ("MEMBERS", limits.members),
        ("TRAFFIC", limits.members),
        ("RINGS", limits.places()),
        ("LOCATIONS", limits.sites),
        ("SITE_NAMES", limits.sites),
        ("LAYOUT", 1),
    ]
}

/// A table that is pinned keeps its size, whatever is configured: flows are in it.
fn size_to_use(pins: &Path, name: &str, configured: u32) -> u32 {
    let Ok(info) = MapInfo::from_pin(map_pin(pins, name)) else { return configured };
    let pinned = info.max_entries();
    if pinned != configured {
        tracing::warn!(
            table = name,
            pinned,
            configured,
            "the pinned table keeps its size; to change it, stop the daemon, remove datapath.pin_path and start it \
             (connections end with it)"
        );
    }
    pinned
}

/// Refuses tables whose records are laid out otherwise than this daemon's, before anything is touched.
fn check_layout(pins: &Path) -> Result<(), DatapathError> {
    let pin = map_pin(pins, "LAYOUT");
    if !pin.exists() {
        return Ok(());
    }
    let reading = || kernel(format!("reading the layout version at {}", pin.display()));
    let map = MapData::from_pin(&pin).map_err(kernel(format!("opening {}", pin.display())))?;
    let layout: Array<MapData, u64> = Map::Array(map).try_into().map_err(reading())?;
    match layout.get(&0, 0).map_err(reading())? {
        // Made, and then the daemon that made it ended before it could write.
        0 | LAYOUT_VERSION => Ok(()),
        found => {
            let pins = pins.display().to_string();
            Err(DatapathError::Layout { found, needed: LAYOUT_VERSION, pins })
        }
    }
}

/// Where the table of a name is pinned.
pub fn map_pin(pins: &Path, name: &str) -> PathBuf {
    maps_folder(pins).join(name)
}

fn maps_folder(pins: &Path) -> PathBuf {
    pins.join("maps")
}

/// Mounts bpffs at its usual place where the pins would not be on one.
fn mount_bpffs(pins: &Path) -> Result<(), DatapathError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    let existing = pins.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if is_bpffs(existing) {
        return Ok(());
    }
    if !pins.starts_with(BPFFS) {
        return Err(kernel(format!(
            "{} is not on a bpf file system (config: datapath.pin_path; mount one with `mount -t bpf bpf DIR`)",
            pins.display()
        ))(io::Error::from(ErrorKind::Unsupported)));
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(kernel(format!("mounting the bpf file system at {BPFFS}")))
}

/// Wraps what the kernel answered with what was being done.
pub fn kernel<E>(doing: impl Into<String>) -> impl FnOnce(E) -> DatapathError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let doing = doing.into();
    move |error| DatapathError::Kernel { doing, source: error.into() }
}
