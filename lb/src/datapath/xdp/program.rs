//! Loading, pinning and attaching the XDP program. Pins outlive the daemon: packets keep flowing without it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::log;
use crate::datapath::{DatapathError, Hook};

/// The program and the definitions of its tables, for those who load it otherwise (benchmarks).
pub static OBJECT: &[u8] = include_bytes_aligned!(env!("DROVER_EBPF_OBJECT"));

const PROGRAM: &str = "drover";
const NATIVE: &str = "xdp native";
const GENERIC: &str = "xdp generic";
const BPFFS: &str = "/sys/fs/bpf";

/// Loads the program over the maps pinned below `pins`, making those that are missing.
pub fn load(pins: &Path) -> Result<Ebpf, DatapathError> {
    mount_bpffs(pins)?;
    fs::create_dir_all(maps_folder(pins)).map_err(kernel(format!("making {}", pins.display())))?;
    let log_level = log::level();
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(maps_folder(pins)).override_global(log::LEVEL, &log_level, true);
    let mut ebpf = loader.load(OBJECT).map_err(kernel(format!(
        "loading the XDP program over the tables pinned at {0} (if they are another version's, \
             stop the traffic and remove {0})",
        pins.display()
    )))?;
    program(&mut ebpf)?.load().map_err(kernel("loading the XDP program into the kernel"))?;
    Ok(ebpf)
}

/// The loaded program.
pub fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, DatapathError> {
    ebpf.program_mut(PROGRAM)
        .ok_or_else(|| {
            kernel("looking for the XDP program in its object")(io::Error::from(ErrorKind::NotFound))
        })
        .and_then(|program| program.try_into().map_err(kernel("looking at the XDP program")))
}

/// Attaches the program to each interface: over the pinned link of a former daemon without missing a packet,
/// else natively, else in the kernel's generic hook.
pub fn attach(ebpf: &mut Ebpf, interfaces: &[String], pins: &Path) -> Result<Vec<Hook>, DatapathError> {
    let program = program(ebpf)?;
    interfaces.iter().map(|interface| attach_one(program, interface, pins)).collect()
}

fn attach_one(program: &mut Xdp, interface: &str, pins: &Path) -> Result<Hook, DatapathError> {
    for (mode, label) in [(XdpMode::Driver, NATIVE), (XdpMode::Skb, GENERIC)] {
        let pin = link_pin(pins, interface, mode);
        if let Ok(link) = PinnedLink::from_pin(&pin) {
            let taken_over = program
                .attach_to_link(FdLink::from(link).try_into().map_err(kernel("reading the pinned link"))?)
                .and_then(|id| program.take_link(id));
            match taken_over {
                // The pin keeps the link; this process's handle on it may go.
                Ok(_) => return Ok(Hook { interface: interface.into(), mode: label.into() }),
                // The interface that it belonged to is gone.
                Err(error) => {
                    tracing::info!(interface, %error, "a former daemon's link is void; attaching anew");
                    fs::remove_file(&pin).map_err(kernel(format!("removing {}", pin.display())))?;
                }
            }
        }
    }
    match attach_new(program, interface, XdpMode::Driver, pins) {
        Ok(()) => Ok(Hook { interface: interface.into(), mode: NATIVE.into() }),
        Err(native) => {
            tracing::info!(interface, %native, "no native XDP here; attaching to the generic hook");
            attach_new(program, interface, XdpMode::Skb, pins)?;
            Ok(Hook { interface: interface.into(), mode: GENERIC.into() })
        }
    }
}

fn attach_new(program: &mut Xdp, interface: &str, mode: XdpMode, pins: &Path) -> Result<(), DatapathError> {
    let attaching = || format!("attaching XDP to interface {interface:?} (config: datapath.interfaces)");
    let link =
        program.attach(interface, mode).and_then(|id| program.take_link(id)).map_err(kernel(attaching()))?;
    FdLink::try_from(link)
        .map_err(kernel(attaching()))?
        .pin(link_pin(pins, interface, mode))
        .map_err(kernel(format!("pinning the XDP link of {interface:?}")))?;
    Ok(())
}

/// Where the table of a name is pinned.
pub fn map_pin(pins: &Path, name: &str) -> PathBuf {
    maps_folder(pins).join(name)
}

/// Attaches the program to an interface that goes with this process, in the way of the others: what it redirects
/// has to be what they take.
pub fn attach_while_alive(ebpf: &mut Ebpf, interface: &str, hooks: &[Hook]) -> Result<(), DatapathError> {
    let generic = hooks.iter().any(|hook| hook.mode == GENERIC);
    let mode = if generic { XdpMode::Skb } else { XdpMode::Driver };
    // Not pinned, and not taken out of the program: the link ends with it.
    program(ebpf)?
        .attach(interface, mode)
        .map(drop)
        .map_err(kernel(format!("attaching XDP to {interface:?}")))
}

fn maps_folder(pins: &Path) -> PathBuf {
    pins.join("maps")
}

fn link_pin(pins: &Path, interface: &str, mode: XdpMode) -> PathBuf {
    let mode = if matches!(mode, XdpMode::Driver) { "native" } else { "generic" };
    // bpffs takes no dots in names.
    pins.join(format!("link-{}-{mode}", interface.replace('.', "_")))
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
