//! Loading the programs over their pinned tables, and filling those.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use lb_core::decapsulate::Address;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::config::Config;
use super::{DecapsulatorError, kernel};

static OBJECT: &[u8] = include_bytes_aligned!(env!("DROVER_EBPF_OBJECT"));

const BPFFS: &str = "/sys/fs/bpf";
/// Grows when a table's records change.
const LAYOUT_VERSION: u64 = 1;

/// Loads both programs over the tables pinned below `pins`, making those that are missing.
pub fn load(pins: &Path) -> Result<Ebpf, DecapsulatorError> {
    mount_bpffs(pins)?;
    let maps = pins.join("maps");
    fs::create_dir_all(&maps).map_err(kernel(format!("making {}", maps.display())))?;
    let mut ebpf = EbpfLoader::new().default_map_pin_directory(&maps).load(OBJECT).map_err(kernel(format!(
        "loading the decapsulator over the tables pinned at {0} (if they are another version's, remove {0}: \
         decapsulation stops until the agent is started again)",
        pins.display()
    )))?;
    check_layout(&mut ebpf, pins)?;
    xdp(&mut ebpf)?.load().map_err(kernel("loading the XDP decapsulator into the kernel"))?;
    tc(&mut ebpf)?.load().map_err(kernel("loading the tc decapsulator into the kernel"))?;
    Ok(ebpf)
}

/// The XDP variant.
pub fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, DecapsulatorError> {
    program(ebpf, "decapsulate_xdp")
}

/// The tc variant.
pub fn tc(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DecapsulatorError> {
    program(ebpf, "decapsulate_tc")
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, DecapsulatorError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let looking = || kernel(format!("looking for {name} in the decapsulator's object"));
    let program = ebpf.program_mut(name).ok_or_else(|| kernel(format!("looking for {name}"))(not_found()))?;
    program.try_into().map_err(|error: ProgramError| looking()(error))
}

/// Makes the tables say what the configuration says. What is in them already stays there throughout.
pub fn fill(
    ebpf: &mut Ebpf,
    config: &Config,
    destinations: &BTreeSet<IpAddr>,
) -> Result<(), DecapsulatorError> {
    let addresses = |from: &BTreeSet<IpAddr>| from.iter().map(|ip| address(*ip)).collect::<BTreeSet<_>>();
    fill_set(ebpf, "ENDPOINTS", &addresses(&config.endpoints))?;
    fill_set(ebpf, "DESTINATIONS", &addresses(destinations))?;
    let mut sources: BTreeSet<(Ipv6Addr, u8)> = config.from.iter().map(|prefix| prefix.among_v6()).collect();
    if sources.is_empty() {
        sources.insert((Ipv6Addr::UNSPECIFIED, 0));
    }
    fill_sources(ebpf, &sources)
}

fn fill_set(ebpf: &mut Ebpf, name: &str, wanted: &BTreeSet<Address>) -> Result<(), DecapsulatorError> {
    let writing = || kernel(format!("writing the decapsulator's table {name}"));
    let mut map: HashMap<&mut MapData, Address, u32> = map(ebpf, name)?;
    let there: Vec<Address> = map.keys().collect::<Result<_, MapError>>().map_err(writing())?;
    for key in wanted {
        map.insert(key, 1, 0).map_err(writing())?;
    }
    for key in there.iter().filter(|key| !wanted.contains(*key)) {
        map.remove(key).map_err(writing())?;
    }
    Ok(())
}

fn fill_sources(ebpf: &mut Ebpf, wanted: &BTreeSet<(Ipv6Addr, u8)>) -> Result<(), DecapsulatorError> {
    let writing = || kernel("writing the decapsulator's table SOURCES");
    let mut map: LpmTrie<&mut MapData, Address, u32> = map(ebpf, "SOURCES")?;
    let there: Vec<Key<Address>> = map.keys().collect::<Result<_, MapError>>().map_err(writing())?;
    for (ip, length) in wanted {
        map.insert(&Key::new((*length).into(), words(*ip)), 1, 0).map_err(writing())?;
    }
    let is_wanted = |key: &Key<Address>| {
        wanted.iter().any(|(ip, length)| (u32::from(*length), words(*ip)) == (key.prefix_len(), key.data()))
    };
    for key in there.iter().filter(|key| !is_wanted(key)) {
        map.remove(key).map_err(writing())?;
    }
    Ok(())
}

/// An address as it is in the tables.
pub fn address(ip: IpAddr) -> Address {
    words(match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    })
}

fn words(ip: Ipv6Addr) -> Address {
    let octets = ip.octets();
    std::array::from_fn(|i| {
        u32::from_ne_bytes([octets[4 * i], octets[4 * i + 1], octets[4 * i + 2], octets[4 * i + 3]])
    })
}

fn map<'a, M>(ebpf: &'a mut Ebpf, name: &str) -> Result<M, DecapsulatorError>
where
    M: TryFrom<&'a mut Map, Error = MapError>,
{
    let map = ebpf.map_mut(name).ok_or_else(|| kernel(format!("looking for table {name}"))(not_found()))?;
    map.try_into().map_err(kernel(format!("looking at table {name}")))
}

/// Refuses tables whose records are laid out otherwise than this agent's.
fn check_layout(ebpf: &mut Ebpf, pins: &Path) -> Result<(), DecapsulatorError> {
    let mut layout: Array<&mut MapData, u64> = map(ebpf, "LAYOUT")?;
    match layout.get(&0, 0).map_err(kernel("reading the layout version"))? {
        0 => layout.set(0, LAYOUT_VERSION, 0).map_err(kernel("writing the layout version")),
        LAYOUT_VERSION => Ok(()),
        found => Err(kernel(format!(
            "the pinned tables have layout {found}, this agent needs {LAYOUT_VERSION}: remove {} (decapsulation stops \
             until the agent is started again)",
            pins.display()
        ))(io::Error::from(ErrorKind::Unsupported))),
    }
}

/// Mounts the BPF file system at its usual place where the pins would not be on one.
fn mount_bpffs(pins: &Path) -> Result<(), DecapsulatorError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    let existing = pins.ancestors().find(|path| path.exists()).map_or(PathBuf::from("/"), Path::to_owned);
    if is_bpffs(&existing) {
        return Ok(());
    }
    if !pins.starts_with(BPFFS) {
        return Err(kernel(format!(
            "{} is not on a bpf file system (config: decapsulator.pin_path; mount one with `mount -t bpf bpf DIR`)",
            pins.display()
        ))(io::Error::from(ErrorKind::Unsupported)));
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(kernel(format!("mounting the bpf file system at {BPFFS}")))
}

fn not_found() -> io::Error {
    io::Error::from(ErrorKind::NotFound)
}
