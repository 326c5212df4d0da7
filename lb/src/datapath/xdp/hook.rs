//! Attaching the program to the interfaces: at XDP, or at traffic control through TCX.
//!
//! Links are pinned: packets are taken while no daemon runs, and the next daemon puts its program into the same links
//! without missing a packet. A daemon that takes packets at another hook attaches there first and removes the former
//! links then.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode};

use super::program::{self, kernel};
use crate::config::{self, HookChoice};
use crate::datapath::{DatapathError, Hook};

/// Where our filter stands at a clsact queueing discipline, so that the next daemon finds it.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Packets that were past XDP's hook when the program came there have reached traffic control after this long. If
/// nobody took them there, the host's own stack would answer them: with a reset.
const ON_THEIR_WAY: Duration = Duration::from_millis(100);

/// One way of taking an interface's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    XdpNative,
    XdpGeneric,
    Tcx,
    /// A filter at the interface's clsact: for kernels without TCX (before 6.6).
    Clsact,
}

impl Way {
    fn label(self) -> &'static str {
        match self {
            Self::XdpNative => "xdp native",
            Self::XdpGeneric => "xdp generic",
            Self::Tcx => "tc (tcx)",
            Self::Clsact => "tc (clsact)",
        }
    }

    /// Where its link is pinned. A filter has no link; the mark says that there is one.
    fn pin(self, pins: &Path, interface: &str) -> PathBuf {
        let way = match self {
            Self::XdpNative => "native",
            Self::XdpGeneric => "generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        };
        // bpffs takes no dots in names.
        pins.join(format!("link-{}-{way}", interface.replace('.', "_")))
    }
}

/// One hook for all interfaces: which program takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// `drover`.
    Xdp,
    /// `drover_tc`.
    Tc,
}

/// Loads the program that the configuration chooses into the kernel.
pub fn load(ebpf: &mut Ebpf, config: &config::Datapath) -> Result<Chosen, DatapathError> {
    let chosen = choose(config.hook, &config.interfaces);
    match chosen {
        Chosen::Xdp => program::program(ebpf)?.load(),
        Chosen::Tc => program::classifier(ebpf)?.load(),
    }
    .map_err(kernel(format!("loading the {chosen:?} program into the kernel")))?;
    Ok(chosen)
}

/// Attaches the loaded program to each configured interface: over the pinned link of a former daemon, else anew.
pub fn attach(
    ebpf: &mut Ebpf,
    chosen: Chosen,
    config: &config::Datapath,
) -> Result<Vec<Hook>, DatapathError> {
    let (mut hooks, mut ours) = (Vec::new(), Vec::new());
    for interface in &config.interfaces {
        let pins = &config.pin_path;
        let way = match chosen {
            Chosen::Tc => attach_tc(program::classifier(ebpf)?, interface, pins)?,
            Chosen::Xdp => attach_xdp(program::program(ebpf)?, interface, pins)?,
        };
        hooks.push(Hook { interface: interface.clone(), mode: way.label().into() });
        ours.push(way.pin(pins, interface));
    }
    // Only now that packets are taken where they are to be.
    detach_others(&config.interfaces, &config.pin_path, &ours);
    Ok(hooks)
}

/// Attaches the program to an interface that goes with this process, in the way of the others: what it redirects
/// has to be what they take.
pub fn attach_while_alive(
    ebpf: &mut Ebpf,
    chosen: Chosen,
    interface: &str,
    hooks: &[Hook],
) -> Result<(), DatapathError> {
    // Not pinned, and not taken out of the program: the link ends with it.
    let attached = match chosen {
        Chosen::Xdp => {
            let generic = hooks.iter().any(|hook| hook.mode == Way::XdpGeneric.label());
            let mode = if generic { XdpMode::Skb } else { XdpMode::Driver };
            program::program(ebpf)?.attach(interface, mode).map(drop)
        }
        Chosen::Tc => {
            let filter = hooks.iter().any(|hook| hook.mode == Way::Clsact.label());
            let options = if filter {
                // There is one already, or the attaching says what is wrong.
                let _ = tc::qdisc_add_clsact(interface);
                TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None })
            } else {
                TcAttachOptions::TcxOrder(LinkOrder::first())
            };
            program::classifier(ebpf)?
                .attach_with_options(interface, TcAttachType::Ingress, options)
                .map(drop)
        }
    };
    attached.map_err(kernel(format!("attaching to {interface:?}")))
}

/// What `auto` comes to: packets of virtual interfaces are large segments at traffic control and single packets at
/// XDP.
fn choose(wish: HookChoice, interfaces: &[String]) -> Chosen {
    match wish {
        HookChoice::Tc => Chosen::Tc,
        HookChoice::Auto if interfaces.iter().all(|interface| is_virtual(interface)) => Chosen::Tc,
        HookChoice::Auto | HookChoice::Xdp => Chosen::Xdp,
    }
}

/// Whether an interface is software: it has no device behind it, or one of a virtual machine.
fn is_virtual(interface: &str) -> bool {
    let device = Path::new("/sys/class/net").join(interface).join("device");
    match fs::canonicalize(device.join("driver")) {
        Ok(driver) => driver.file_name().is_some_and(|name| name == "virtio_net"),
        Err(_) => !device.exists(),
    }
}

fn attach_xdp(program: &mut Xdp, interface: &str, pins: &Path) -> Result<Way, DatapathError> {
    for way in [Way::XdpNative, Way::XdpGeneric] {
        let pin = way.pin(pins, interface);
        let Ok(link) = PinnedLink::from_pin(&pin) else { continue };
        let link = FdLink::from(link).try_into().map_err(kernel("reading the pinned link"))?;
        // The pin keeps the link; this process's handle on it may go.
        match program.attach_to_link(link).and_then(|id| program.take_link(id)) {
            Ok(_) => return Ok(way),
            Err(error) => forget(interface, &pin, &error)?,
        }
    }
    match attach_new_xdp(program, interface, XdpMode::Driver, Way::XdpNative, pins) {
        Ok(way) => Ok(way),
        Err(native) => {
            tracing::info!(interface, %native, "no native XDP here; attaching to the generic hook");
            attach_new_xdp(program, interface, XdpMode::Skb, Way::XdpGeneric, pins)
        }
    }
}

fn attach_new_xdp(
    program: &mut Xdp,
    interface: &str,
    mode: XdpMode,
    way: Way,
    pins: &Path,
) -> Result<Way, DatapathError> {
    let attaching = || format!("attaching XDP to interface {interface:?} (config: datapath.interfaces)");
    let link =
        program.attach(interface, mode).and_then(|id| program.take_link(id)).map_err(kernel(attaching()))?;
    let link = FdLink::try_from(link).map_err(kernel(attaching()))?;
    link.pin(way.pin(pins, interface)).map_err(kernel(format!("pinning the XDP link of {interface:?}")))?;
    Ok(way)
}

fn attach_tc(program: &mut SchedClassifier, interface: &str, pins: &Path) -> Result<Way, DatapathError> {
    let pin = Way::Tcx.pin(pins, interface);
    if let Ok(link) = PinnedLink::from_pin(&pin) {
        let link = FdLink::from(link).try_into().map_err(kernel("reading the pinned link"))?;
        match program.attach_to_link(link).and_then(|id| program.take_link(id)) {
            Ok(_) => return Ok(Way::Tcx),
            Err(error) => forget(interface, &pin, &error)?,
        }
    }
    let attaching = || format!("attaching to traffic control of interface {interface:?}");
    // First in the row: packets for services are ours before anybody else's.
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let attached = program
        .attach_with_options(interface, TcAttachType::Ingress, options)
        .and_then(|id| program.take_link(id));
    match attached {
        Ok(link) => {
            let link = FdLink::try_from(link).map_err(kernel(attaching()))?;
            link.pin(&pin).map_err(kernel(format!("pinning the tc link of {interface:?}")))?;
            Ok(Way::Tcx)
        }
        Err(tcx) => {
            tracing::info!(interface, %tcx, "no TCX here; attaching a filter");
            attach_filter(program, interface, pins)
        }
    }
}

/// Attaches as a filter of the interface's clsact, over a former daemon's one. It stays without a pin.
fn attach_filter(program: &mut SchedClassifier, interface: &str, pins: &Path) -> Result<Way, DatapathError> {
    let attaching = || {
        format!("attaching a filter to the clsact of interface {interface:?} (config: datapath.interfaces)")
    };
    // There is one already, or the attaching says what is wrong.
    let _ = tc::qdisc_add_clsact(interface);
    let mark = Way::Clsact.pin(pins, interface);
    let former = SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None);
    let replaced = match former {
        Ok(former) if mark.exists() => program.attach_to_link(former),
        _ => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program.attach_with_options(interface, TcAttachType::Ingress, TcAttachOptions::Netlink(options))
        }
    };
    let link = replaced.and_then(|id| program.take_link(id)).map_err(kernel(attaching()))?;
    // Dropping it would detach.
    std::mem::forget(link);
    fs::create_dir_all(&mark).map_err(kernel(format!("marking the filter at {}", mark.display())))?;
    Ok(Way::Clsact)
}

/// A pinned link whose interface is gone.
fn forget(interface: &str, pin: &Path, error: &dyn std::error::Error) -> Result<(), DatapathError> {
    tracing::info!(interface, %error, "a former daemon's link is void; attaching anew");
    fs::remove_file(pin).map_err(kernel(format!("removing {}", pin.display())))
}

/// Removes what a former daemon attached elsewhere: at another hook, or to an interface that is not ours any more.
fn detach_others(interfaces: &[String], pins: &Path, ours: &[PathBuf]) {
    let marks = interfaces.iter().map(|interface| (interface, Way::Clsact.pin(pins, interface)));
    let filters: Vec<_> = marks.filter(|(_, mark)| mark.exists() && !ours.contains(mark)).collect();
    let links: Vec<PathBuf> = fs::read_dir(pins)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("link-"))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .filter(|pin| !ours.contains(pin))
        .collect();
    if filters.is_empty() && links.is_empty() {
        return;
    }
    std::thread::sleep(ON_THEIR_WAY);
    for (interface, mark) in filters {
        // Dropped, it detaches.
        drop(SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None));
        said(&mark, fs::remove_dir(&mark));
    }
    for pin in links {
        // The last reference to the link.
        said(&pin, fs::remove_file(&pin));
    }
}

fn said(pin: &Path, removed: std::io::Result<()>) {
    match removed {
        Ok(()) => tracing::info!(pin = %pin.display(), "detached a former hook"),
        Err(error) => tracing::error!(%error, pin = %pin.display(), "cannot detach a former hook"),
    }
}
