//! Attaching the programs so that they outlive the agent, taking over what a former one attached, removing what is not
//! wanted any more.
//!
//! XDP and TCX attachments are links, pinned as `link-INTERFACE-KIND`. A filter of clsact stays by itself; there a pin
//! of its program keeps the name, so that a later agent knows of it.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};
use serde::Serialize;

use super::interface::Choice;
use super::{DecapsulatorError, kernel, program};

/// Our filter among those of clsact: ahead of everything that says nothing of its place.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x7401);

/// Where a program can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// The driver's XDP hook.
    #[serde(rename = "xdp native")]
    Native,
    /// The kernel's XDP hook for drivers without one.
    #[serde(rename = "xdp generic")]
    Generic,
    /// tc's ingress, with a link (since Linux 6.6).
    #[serde(rename = "tcx")]
    Tcx,
    /// tc's ingress, with a filter.
    #[serde(rename = "tc filter")]
    Clsact,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Native, Self::Generic, Self::Tcx, Self::Clsact];

    fn tag(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "xdp native",
            Self::Generic => "xdp generic",
            Self::Tcx => "tcx",
            Self::Clsact => "tc filter",
        })
    }
}

impl Choice {
    /// What is tried, in this order.
    fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Xdp => &[Kind::Native, Kind::Generic],
            Self::Tc => &[Kind::Tcx, Kind::Clsact],
            Self::NativeXdpOrTc => &[Kind::Native, Kind::Tcx, Kind::Clsact],
        }
    }
}

/// A place where the decapsulator is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hook {
    /// Interface.
    pub interface: String,
    /// Where there.
    pub hook: Kind,
}

/// Attaches to each interface, then removes every other attachment below `pins`.
pub fn attach_all(
    ebpf: &mut Ebpf,
    wanted: &[(&str, Choice)],
    pins: &Path,
) -> Result<Vec<Hook>, DecapsulatorError> {
    let mut hooks = Vec::new();
    for (interface, choice) in wanted {
        hooks
            .push(Hook { interface: (*interface).to_owned(), hook: attach(ebpf, interface, *choice, pins)? });
    }
    // Afterwards: two programs at one interface are no harm, since the second finds nothing to strip.
    remove_others(&hooks, pins)?;
    Ok(hooks)
}

/// Removes every attachment below `pins`, and the tables with them.
pub fn remove_all(pins: &Path) -> Result<(), DecapsulatorError> {
    remove_others(&[], pins)?;
    match fs::remove_dir_all(pins) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(kernel(format!("removing {}", pins.display()))(error))
        }
        _ => Ok(()),
    }
}

fn attach(ebpf: &mut Ebpf, interface: &str, choice: Choice, pins: &Path) -> Result<Kind, DecapsulatorError> {
    // One that a former agent attached first: a hook that was good then is taken over before a better one is tried.
    let (there, rest): (Vec<Kind>, Vec<Kind>) =
        choice.kinds().iter().partition(|kind| pin(pins, interface, **kind).exists());
    let mut failed = None;
    for kind in there.into_iter().chain(rest) {
        match attach_at(ebpf, interface, kind, pins) {
            Ok(()) => return Ok(kind),
            Err(error) => {
                tracing::info!(interface, %kind, error = crate::client::chain(&error), "not attached there");
                failed = Some(error);
            }
        }
    }
    Err(failed.expect("every choice has its hooks"))
}

/// Attaches at one place, or takes over what a former agent attached there.
pub fn attach_at(ebpf: &mut Ebpf, interface: &str, kind: Kind, pins: &Path) -> Result<(), DecapsulatorError> {
    let pin = pin(pins, interface, kind);
    let attaching = || kernel(format!("attaching the decapsulator to interface {interface:?} ({kind})"));
    match kind {
        Kind::Native => attach_xdp(program::xdp(ebpf)?, interface, XdpMode::Driver, &pin),
        Kind::Generic => attach_xdp(program::xdp(ebpf)?, interface, XdpMode::Skb, &pin),
        Kind::Tcx => attach_tcx(program::tc(ebpf)?, interface, &pin),
        Kind::Clsact => attach_clsact(program::tc(ebpf)?, interface, &pin),
    }
    .map_err(|error| attaching()(error))
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A former agent's link. One whose interface is gone is removed on the way.
fn former(pin: &Path, take_over: impl FnOnce(FdLink) -> Result<(), Failure>) -> Result<bool, Failure> {
    let Ok(link) = PinnedLink::from_pin(pin) else { return Ok(false) };
    match take_over(link.into()) {
        Ok(()) => Ok(true),
        Err(error) => {
            tracing::info!(pin = %pin.display(), error, "a former agent's link is void; attaching anew");
            fs::remove_file(pin)?;
            Ok(false)
        }
    }
}

fn attach_xdp(xdp: &mut Xdp, interface: &str, mode: XdpMode, pin: &Path) -> Result<(), Failure> {
    let taken = former(pin, |link| {
        let id = xdp.attach_to_link(link.try_into()?)?;
        // The pin keeps the link; this process's handle on it may go.
        xdp.take_link(id)?;
        Ok(())
    })?;
    if !taken {
        let id = xdp.attach(interface, mode)?;
        FdLink::try_from(xdp.take_link(id)?)?.pin(pin)?;
    }
    Ok(())
}

fn attach_tcx(tc: &mut SchedClassifier, interface: &str, pin: &Path) -> Result<(), Failure> {
    let taken = former(pin, |link| {
        let id = tc.attach_to_link(link.try_into()?)?;
        tc.take_link(id)?;
        Ok(())
    })?;
    if !taken {
        // Whatever else looks at packets there sees those of the workloads.
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = tc.attach_with_options(interface, TcAttachType::Ingress, first)?;
        FdLink::try_from(tc.take_link(id)?)?.pin(pin)?;
    }
    Ok(())
}

fn attach_clsact(tc: &mut SchedClassifier, interface: &str, pin: &Path) -> Result<(), Failure> {
    // There may be one already, of ours or of others.
    if let Err(error) = qdisc_add_clsact(interface) {
        tracing::debug!(interface, %error, "no clsact added");
    }
    let replaced = tc.attach_to_link(filter(interface)?);
    let id = match replaced {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() };
            tc.attach_with_options(interface, TcAttachType::Ingress, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropped, it would take the filter away.
    std::mem::forget(tc.take_link(id)?);
    // The former program's pin is only a name; it is replaced by this one's.
    if pin.exists() {
        fs::remove_file(pin)?;
    }
    tc.pin(pin)?;
    Ok(())
}

fn filter(interface: &str) -> std::io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None)
}

fn remove_others(wanted: &[Hook], pins: &Path) -> Result<(), DecapsulatorError> {
    let listing = match fs::read_dir(pins) {
        Ok(listing) => listing,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(kernel(format!("listing {}", pins.display()))(error)),
    };
    for entry in listing.flatten() {
        let Some((interface, kind)) = entry.file_name().to_str().and_then(read_pin) else { continue };
        if wanted.iter().any(|hook| (hook.interface.as_str(), hook.hook) == (interface.as_str(), kind)) {
            continue;
        }
        if kind == Kind::Clsact {
            // Where the interface is gone, so is its filter.
            if let Err(error) = filter(&interface).map_err(ProgramError::from).and_then(detach) {
                tracing::info!(interface, %error, "a former agent's filter was not there");
            }
        }
        fs::remove_file(entry.path()).map_err(kernel(format!("removing {}", entry.path().display())))?;
        tracing::info!("decapsulator removed interface={interface} hook={kind}");
    }
    Ok(())
}

fn detach(filter: SchedClassifierLink) -> Result<(), ProgramError> {
    aya::programs::links::Link::detach(filter)
}

fn pin(pins: &Path, interface: &str, kind: Kind) -> PathBuf {
    // That file system takes no dots in names, and interfaces have no colons.
    pins.join(format!("link-{}-{}", interface.replace('.', ":"), kind.tag()))
}

fn read_pin(name: &str) -> Option<(String, Kind)> {
    let (interface, tag) = name.strip_prefix("link-")?.rsplit_once('-')?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.tag() == tag)?;
    Some((interface.replace(':', "."), kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_lead_back_to_what_they_stand_for() {
        for interface in ["eth0", "eth0.100", "wl-an-0", "br_0"] {
            for kind in Kind::ALL {
                let path = pin(Path::new("/p"), interface, kind);
                let name = path.file_name().unwrap().to_str().unwrap();
                assert!(!name.contains('.'), "{name}");
                assert_eq!(read_pin(name), Some((interface.to_owned(), kind)));
            }
        }
        assert_eq!(read_pin("maps"), None);
    }
}
